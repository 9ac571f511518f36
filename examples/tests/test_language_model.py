"""Contract under test: the language model's text, training, perplexity and command line are as the docstrings say.

No network: the tests write the dictionaries they read.
"""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="the example needs tqdm, which the package itself does not")

from examples import language_model, language_training  # noqa: E402
from examples.data_sets import dictionary  # noqa: E402
from examples.data_sets.debian import Package, PackageUnavailable  # noqa: E402
from examples.language_training import LENGTH, LOSSES, SEQUENCES, Run, Training, batches, perplexity  # noqa: E402
from examples.machine import PeakMemory  # noqa: E402

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
        for part, content in vars(expected).items():
            np.testing.assert_array_equal(getattr(read, part), content)


def test_another_package_is_refused(tmp_path):
    (tmp_path / "dict-gcide_0_all.deb").write_bytes(b"not the package")
    with pytest.raises(PackageUnavailable, match=r"put dict-gcide 0.48.5\+nmu2 \(Debian 12\) there\.$"):
        dictionary.load(tmp_path)


def test_batches_read_all_parts_at_the_same_pace():
    text = np.arange(SEQUENCES * 70 + 3, dtype=np.int32)
    words, target = (torch.cat(listed, 1) for listed in zip(*((w, t.view_as(w)) for w, t in batches(text))))
    parts = torch.arange(SEQUENCES * 70).view(SEQUENCES, 70)
    assert [w.shape[1] for w, _ in batches(text)] == [LENGTH, LENGTH, 69 - 2 * LENGTH]
    assert torch.equal(words, parts[:, :-1]) and torch.equal(target, parts[:, 1:])


@pytest.fixture
def text():
    return dictionary.parse(tiny_dictionary(1000))


def make_run(name, seed=3):
    """A run with settings that suit the tiny dictionary, unlike those of the script."""
    return Run(name, seed, lr=3e-3, eps=1e-8)


def test_a_step_is_that_of_plain_back_propagation(text):
    """The backward pass in two parts, which the clocks need, gives the parameters that a pass in one gives."""
    ours, plain = (Training(make_run("cross-entropy"), text, 5) for _ in range(2))
    optimizer = plain.optimizers[0]
    for _ in range(5):
        words, target = next(plain.batches)
        output, state = plain.body.recurrent(plain.body.embedding(words), plain.state)
        plain.state = state.detach()
        loss = nn.functional.cross_entropy(nn.functional.linear(output, *plain.head.parameters()).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain.schedules[0].step()
        assert ours.step() == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in zip((*ours.body.parameters(), *ours.head.parameters()), optimizer.param_groups[0]["params"]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_seeds_start_at_different_words_and_repeat_themselves(text):
    same, again = (Training(make_run("sampled, B = 16"), text, 2) for _ in range(2))
    other = Training(make_run("sampled, B = 16", seed=4), text, 2)
    words = [next(training.batches)[0] for training in (same, again, other)]
    assert torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])


def test_perplexity_is_that_of_one_pass_over_the_text(text):
    training = Training(make_run("sampled, B = 16"), text, 1)
    words = text.train[: SEQUENCES * 100]
    parts = torch.from_numpy(words).long().view(SEQUENCES, -1)
    features, _ = training.body(parts[:, :-1], None)
    logits = nn.functional.linear(features.double(), *(p.double() for p in training.head.parameters()))
    expected = nn.functional.cross_entropy(logits, parts[:, 1:].flatten()).exp().item()
    assert perplexity(training.body, training.head, words) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_training_learns_how_common_words_are(text, name):
    """Words are drawn independently, so the perplexity that a model can reach is that of their frequencies."""
    _, measured = language_training.train(make_run(name), text, 60, 2, PeakMemory())
    share = torch.from_numpy(np.bincount(text.train) / len(text.train))
    best = nn.functional.nll_loss(share.log().expand(len(text.val), -1), torch.from_numpy(text.val).long()).exp()
    assert measured["curve"][-1]["validation perplexity"] == pytest.approx(float(best), rel=0.15)
    assert [point["step"] for point in measured["curve"]] == [30, 60]


def test_a_step_contains_the_head(text):
    times = language_training.time_steps([make_run(name) for name in LOSSES], text, rounds=3)
    assert tuple(times) == LOSSES
    assert all(0 < taken["CPU ms of head"] <= taken["CPU ms a step"] for taken in times.values())


@pytest.fixture
def run(monkeypatch, tmp_path, text):
    """Runs the command line on the tiny dictionary; what it wrote as JSON."""
    monkeypatch.setattr(dictionary, "load", lambda cache: text)

    def run(*options):
        out = tmp_path / "out" / "runs.json"
        command = ["language_model", "--steps", "4", "--evaluations", "2", "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", command)
        language_model.main()
        return json.loads(out.read_text())

    return run


def test_parts_of_the_runs_are_merged(run, tmp_path, capsys):
    first = run("--losses", "sampled, B = 5", "--seeds", "1", "0")
    both = run("--losses", "cross-entropy", "sampled, B = 5", "--seeds", "0")
    assert [(r["loss"], r["seed"]) for r in both["runs"]] == [
        ("cross-entropy", 0),
        ("sampled, B = 5", 0),
        ("sampled, B = 5", 1),
    ]
    assert both["runs"][1:] == first["runs"] and both["times"] == first["times"]  # not repeated
    rows = language_model.summary(both)
    found = [r["test perplexity"] for r in first["runs"]]
    assert rows["sampled, B = 5"]["perplexity"] == pytest.approx(sum(found) / 2)
    assert rows["sampled, B = 5"]["±"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
    assert rows["cross-entropy"]["±"] is None and "cross-entropy" in capsys.readouterr().out


def test_runs_with_other_settings_are_refused(run):
    run("--losses", "sampled, B = 1", "--seeds", "0")
    with pytest.raises(SystemExit, match="pass another --out"):
        run("--losses", "sampled, B = 1", "--seeds", "0", "--steps", "5")


def test_tuning_tries_as_many_settings_of_every_loss_and_no_test_word(run, monkeypatch, text, capsys):
    seen = []
    monkeypatch.setattr(
        language_training, "perplexity", lambda body, head, words: seen.append(words) or 10.0 + len(seen)
    )
    monkeypatch.setattr(language_model, "perplexity", lambda *_: pytest.fail("measured on the test words"))
    result = run("--tune", "--losses", "cross-entropy", "sampled, B = 16", "--seeds", "0")
    expected = {(lr, eps) for lr in language_model.LEARNING_RATES for eps in language_model.EPS}
    for name in ("cross-entropy", "sampled, B = 16"):
        tried = [(r["lr"], r["eps"]) for r in result["runs"] if r["loss"] == name]
        assert len(tried) == 6 and set(tried) == expected
    assert len(seen) == 24 and all(np.array_equal(words, text.val) for words in seen)
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("cross", "sampled"))]
    assert [float(line.split()[-1]) for line in listed] == [*range(12, 24, 2), *range(24, 36, 2)]
