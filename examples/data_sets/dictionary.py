"""English text with tens of thousands of words, from the Debian package `dict-gcide`.

The text is the GNU Collaborative International Dictionary of English 0.48.5 (GPL, version 2 or later), which contains
Webster's Revised Unabridged Dictionary of 1913 and parts of WordNet.
"""

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .dataset import cached
from .debian import Package

PACKAGE = Package(
    "dict-gcide",
    "0.48.5+nmu2 (Debian 12)",
    "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
)
MIN_COUNT = 5  # rarer words become UNKNOWN
UNKNOWN = "<unk>"
SHARE = 50  # one entry of so many is in the validation part, and as many are in the test part
SPLIT_SEED = 0

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[.,;:!?]")
# The pronunciation, between backslashes or in brackets with marked letters as in (-p[=a]s`), and the source's name.
NOT_TEXT = re.compile(r"\\[^\\]*\\|\([^()]*\[[^()]*\)|\[(?:1913 Webster|Webster 1913|WordNet|PJC)[^]]*]")


@dataclass(frozen=True)
class Text:
    """Three parts of a text as numbers of words, dictionary entry after dictionary entry in random order."""

    words: np.ndarray  # [L] str, the most frequent first, after UNKNOWN
    train: np.ndarray  # [T] int32
    val: np.ndarray
    test: np.ndarray


def load(cache: Path) -> Text:
    """The text from `cache`, which is downloaded and cut into words on first use."""

    def build() -> Text:
        with PACKAGE.unpacked(cache) as files:
            # A .dz file is a gzip file with an index for random access, which gzip skips.
            text = gzip.decompress(next(files.rglob("gcide.dict.dz")).read_bytes()).decode("utf-8", "replace")
        return parse(text)

    return cached(cache / "dictionary.npz", build, Text)


def parse(text: str, min_count: int = MIN_COUNT) -> Text:
    """Splits the dictionary by entries, and keeps words that the training part has at least `min_count` times."""
    entries = split_entries(text)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(entries))
    held_out = len(entries) // SHARE
    val, test, train = np.split(order, [held_out, 2 * held_out])
    count = Counter(
        chain.from_iterable(words_of(entries[i]) for i in tqdm(train, "counting words", unit="entry", disable=None))
    )
    words = [UNKNOWN] + [word for word, n in count.most_common() if n >= min_count]
    number = {word: i for i, word in enumerate(words)}

    def encode(part: Sequence[int]) -> np.ndarray:
        listed = chain.from_iterable(
            words_of(entries[i]) for i in tqdm(part, "numbering words", unit="entry", disable=None)
        )
        return np.fromiter((number.get(word, 0) for word in listed), np.int32)

    return Text(np.array(words), encode(train), encode(val), encode(test))


def split_entries(text: str) -> list[str]:
    """The entries: each starts in column 0, and its other lines are indented or empty."""
    return re.split(r"\n(?=\S)", text)


def words_of(entry: str) -> list[str]:
    """The words, numbers and punctuation marks of an entry, in lower case, without pronunciation and sources."""
    return WORD.findall(NOT_TEXT.sub(" ", entry).lower())
