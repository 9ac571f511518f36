"""The first kanji of a Japanese word of two kanji from its reading, from the Debian package `edict`.

The words are those of EDICT, the dictionary of the Electronic Dictionary Research and Development Group (EDRDG), used
under its licence (https://www.edrdg.org/edrdg/licence.html), which asks for this acknowledgement; none of it is part of
this repository.
"""

import re
from pathlib import Path

import numpy as np

from .dataset import Dataset, cached
from .debian import Package

PACKAGE = Package(
    "edict",
    "2021.02.03-1 (Debian 12)",
    "f1d50611cd5486d30a4bdd56447bcfa1ee5084da7909340f5da3e1abc0b97b3b",
    otherwise="; or use --data species",
)
LENGTH = 8  # kana of a reading that a row keeps; longer readings are cut
FIRST, LAST = "ぁ", "ゖ"  # hiragana; a katakana letter counts as the hiragana letter of the same sound
MARK = ord(LAST) - ord(FIRST) + 2  # the code of the mark of a long vowel; code 0 is no kana

ENTRY = re.compile(r"(\S+) \[(\S+)\] /")
TWO_KANJI = re.compile("[\u4e00-\u9fff]{2}")
TO_HIRAGANA = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}


def load(cache: Path) -> Dataset:
    """The data set from `cache`, which is downloaded and parsed on first use."""

    def build() -> Dataset:
        with PACKAGE.unpacked(cache) as files:
            return parse((files / "usr" / "share" / "edict" / "edict").read_text("euc-jp", "replace"))

    return cached(cache / "kanji.npz", build)


def parse(text: str) -> Dataset:
    """Keeps the words of two kanji whose reading is all kana.

    The inputs are the codes of a reading's kana, [D, LENGTH]; the class is the word's first kanji.
    """
    words = {}
    for line in text.splitlines():
        match = ENTRY.match(line)
        if match and TWO_KANJI.fullmatch(match[1]) and encode(match[2]) is not None:
            words[match[1], match[2].translate(TO_HIRAGANA)] = match[1][0]
    classes, target = np.unique(list(words.values()), return_inverse=True)
    readings, group = np.unique([reading for _, reading in words], return_inverse=True)
    inputs = np.stack([encode(reading) for reading in readings])
    return Dataset(classes, inputs, group, target)


def encode(reading: str) -> np.ndarray | None:
    """The codes of a reading's kana, filled up with 0: [LENGTH] uint8; None if it has another character."""
    letters = reading.translate(TO_HIRAGANA)
    if not all(FIRST <= letter <= LAST or letter == "ー" for letter in letters):
        return None
    codes = [MARK if letter == "ー" else ord(letter) - ord(FIRST) + 1 for letter in letters[:LENGTH]]
    return np.array(codes + [0] * (LENGTH - len(codes)), np.uint8)


def decode(codes: np.ndarray) -> str:
    """The kana of the codes, the inverse of `encode` for readings that were not cut."""
    return "".join("ー" if code == MARK else chr(ord(FIRST) + code - 1) for code in codes.tolist() if code)
