"""Contract under test: the dictionary's words and parts are as the docstrings say.

No network: the tests write the dictionaries they read.
"""

import gzip
import hashlib
import shutil
import subprocess

import numpy as np
import pytest

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed, reason=f"the example needs {needed}, which the package itself does not")

from data_sets import dictionary  # noqa: E402
from data_sets.debian import Package, PackageUnavailable  # noqa: E402

ENTRY = r"""Benefit \Ben"e*fit\, n. [OE. benefet, fr. L. benefactum; cf. {Fact}.]
   1. An act of kindness; a favor -- man's
      other. [1913 Webster]

            Bless the Lord!              --Ps. ciii. 2.
   (b[=e]`n[-e]
   pl[a^]s), (Law) [Obs.]
      [Webster 1913 Suppl. +PJC]
   [PJC] [WordNet 1.5]
"""


def tiny_dictionary(n_entries=300, seed=0):
    """Entries of 12 words each: a headword of its own and eleven of 40 words, of which the first are frequent."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 41)
    drawn = rng.choice(40, (n_entries, 11), p=share / share.sum())
    common = [f"w{'abcdefghij'[i % 10]}{'abcd'[i // 10]}" for i in range(40)]
    heads = ["".join("qrstuvwxyz"[int(digit)] for digit in str(i)) for i in range(n_entries)]
    return "\n".join(f"{head}\n   {' '.join(common[i] for i in row)}\n" for head, row in zip(heads, drawn))


def test_words_of_an_entry_leave_out_pronunciation_and_sources():
    expected = "benefit , n . oe . benefet , fr . l . benefactum ; cf . fact . 1 . an act of kindness ; a favor"
    expected += " man's other . bless the lord ! ps . ciii . 2 . , law obs ."
    assert dictionary.words_of(ENTRY) == expected.split()


def test_an_entry_starts_in_column_0():
    second = "2nd\n\n   another\n"
    assert dictionary.split_entries(ENTRY + second) == [ENTRY.removesuffix("\n"), second]


def test_parts_are_whole_entries_and_rare_words_are_unknown():
    text = tiny_dictionary()
    data = dictionary.parse(text)
    assert [len(part) for part in (data.test, data.val, data.train)] == [6 * 12, 6 * 12, 288 * 12]
    rows = np.concatenate([data.train, data.val, data.test]).reshape(-1, 12)
    read = sorted(" ".join(data.words[i] for i in row) for row in rows)
    words = [dictionary.words_of(entry) for entry in dictionary.split_entries(text)]
    known = set(data.words)
    assert read == sorted(" ".join(w if w in known else dictionary.UNKNOWN for w in entry) for entry in words)
    count = np.bincount(data.train, minlength=len(data.words))
    assert data.words[0] == dictionary.UNKNOWN and not any(entry[0] in known for entry in words)
    assert (np.diff(count[1:]) <= 0).all() and count[-1] >= dictionary.MIN_COUNT
    assert len(dictionary.parse(text, min_count=1).words) == 1 + 40 + 288  # training's headwords only


def write_package(folder, text):
    """A .deb with `text` as the dictionary, and what the data set has to know of it."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: dict-gcide\nVersion: 0\nArchitecture: all\nMaintainer: test <test@example.org>\nDescription: test\n"
    )
    (tree / "usr" / "share" / "dictd").mkdir(parents=True)
    (tree / "usr" / "share" / "dictd" / "gcide.dict.dz").write_bytes(gzip.compress(text.encode()))
    package = folder / "dict-gcide_0_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(package)], check=True, capture_output=True)
    return Package("dict-gcide", "0", hashlib.sha256(package.read_bytes()).hexdigest())


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb, which only Debian has, packs the dictionary")
def test_the_package_is_read_once_and_the_cache_gives_the_same(tmp_path, monkeypatch):
    text = tiny_dictionary()
    expected = dictionary.parse(text)
    monkeypatch.setattr(dictionary, "PACKAGE", write_package(tmp_path, text))
    first = dictionary.load(tmp_path)
    monkeypatch.setattr(dictionary, "parse", lambda text: pytest.fail("parsed twice"))
    for read in (first, dictionary.load(tmp_path)):
        assert read.words == expected.words
        for part in ("train", "val", "test"):
            np.testing.assert_array_equal(getattr(read, part), getattr(expected, part))


def test_another_package_is_refused(tmp_path):
    (tmp_path / "dict-gcide_0_all.deb").write_bytes(b"not the package")
    with pytest.raises(PackageUnavailable, match=r"put dict-gcide 0.48.5\+nmu2 \(Debian 12\) there\.$"):
        dictionary.load(tmp_path)
