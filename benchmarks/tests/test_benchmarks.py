"""Contract under test: the gate refuses wrong losses, candidates are timed fairly, and programs write their results."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import ROOT, gpu, harness, linear, loss, memory, tables
from benchmarks.peers import PEERS, Case
from benchmarks.study import tables as study_tables
from examples.machine import environment
from topk_fast import BalNoisedTopK

CASE = Case(64, 100, n_sample=5)
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


def scores_and_target(kind="normal"):
    return harness.make_scores(kind, CASE.N, CASE.L, CASE.dtype, "cpu")


# Scores


@pytest.mark.parametrize("kind", ["normal", "flat", "spiky"])
def test_scores_are_leaves_and_the_same_each_time(kind):
    (scores, target), (again, same) = scores_and_target(kind), scores_and_target(kind)
    assert scores.shape == (64, 100) and target.shape == (64,) and scores.is_leaf and scores.requires_grad
    assert torch.equal(scores, again) and torch.equal(target, same) and 0 <= target.min() and target.max() < 100
    assert harness.make_scores(kind, 2, 9, "bfloat16", "cpu")[0].dtype == torch.bfloat16


def test_what_each_kind_claims():
    normal, flat = scores_and_target("normal")[0], scores_and_target("flat")[0]
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05  # of 6400: 4 standard errors
    assert (flat == flat[0, 0]).all()
    spiky, target = scores_and_target("spiky")
    peaks = spiky > 2  # 20 standard deviations of the others
    assert (peaks.sum(1) >= 3).all() and (peaks.sum(1) <= harness.PEAKS).all()  # peaks may meet in one class
    assert peaks[torch.arange(64), target].all() and abs(spiky[~peaks].std() - 0.1) < 0.005


def test_species_come_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "SPECIES", tmp_path / "logits.pt")
    with pytest.raises(FileNotFoundError, match="examples/all_species.py --losses cross-entropy --save-logits"):
        harness.make_scores("species", 2, 5, "float32", "cpu")
    logits, target = torch.randn(3, 5).half(), torch.tensor([4, 0, 2])
    torch.save({"logits": logits, "target": target}, harness.SPECIES)
    scores, labels = harness.make_scores("species", 2, 5, "float32", "cpu")
    assert torch.equal(scores.detach(), logits[:2].float()) and scores.requires_grad and labels.tolist() == [4, 0]
    with pytest.raises(ValueError, match="3 rows of 5 classes, asked for 2 of 6"):
        harness.make_scores("species", 2, 6, "float32", "cpu")


def test_unknown_kind():
    with pytest.raises(ValueError, match="got 'lumpy'"):
        harness.make_scores("lumpy", 2, 5, "float32", "cpu")


# The gate


def gate(losses, kind="normal"):
    return harness.gate(losses, *scores_and_target(kind), CASE.k, CASE.n_sample, CASE.epsilon)[0]


@pytest.mark.parametrize("kind", ["normal", "flat", "spiky"])
def test_gate_lets_right_losses_pass(kind):
    assert gate({name: PEERS[name].make(CASE) for name in loss.BASIC}, kind) == {}


@pytest.mark.parametrize("part", ["losses", "gradients"])
def test_gate_sees_one_bit(monkeypatch, part):
    """A backend whose first loss, or gradient, is one unit in the last place off."""
    right = harness.bal_noised_topk_loss
    if harness.list_own_backends("cpu") == ["torch"]:
        pytest.skip("the C++ kernels are not built: there is only one backend")

    def wrong(scores, *args, backend, **kwargs):
        if backend == "torch":
            return right(scores, *args, backend=backend, **kwargs)
        if part == "gradients":
            scores.register_hook(lambda grad: torch.nextafter(grad, torch.tensor(9.0)))
            return right(scores, *args, backend=backend, **kwargs)
        out = right(scores, *args, backend=backend, **kwargs)
        return out + (torch.nextafter(out, torch.tensor(9.0)) - out).detach()

    monkeypatch.setattr(harness, "bal_noised_topk_loss", wrong)
    with pytest.raises(SystemExit, match="cpp.*and the reference differ at .*nothing was timed"):
        gate({})


def test_gate_sees_another_mean():
    pytopk = PEERS["pytopk"].make(CASE)
    with pytest.raises(SystemExit, match="mean losses .* differ: nothing was timed"):
        gate({"pytopk": lambda scores, target: pytopk(scores, target) + 0.3})  # some 15 standard errors


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_gate_sees_what_is_not_finite(wrong):
    def peer(scores, target):
        if wrong == "gradient":
            return (scores - scores.detach()).abs().sqrt().sum()  # finite itself
        return F.cross_entropy(scores, target) * torch.inf

    with pytest.raises(SystemExit, match="bad has a loss or gradient that is not finite"):
        gate({"good": F.cross_entropy, "bad": peer})


def test_gate_notes_who_overwrites_its_scores():
    def peer(scores, target):
        loss = F.cross_entropy(scores.clone(), target)
        scores.data.zero_()
        return loss

    scores, target = scores_and_target()
    before = scores.detach().clone()
    losses = {"overwriting": peer, "cross-entropy": F.cross_entropy}
    assert harness.gate(losses, scores, target, CASE.k, CASE.n_sample, CASE.epsilon) == ({}, {"overwriting"})
    assert torch.equal(scores, before)


def test_gate_leaves_out_a_peer_that_fails_but_not_one_of_ours():
    def broken(scores, target):
        raise TypeError("no such dtype\nand more")

    assert gate({"peer": broken}) == {"peer": "TypeError: no such dtype"}
    with pytest.raises(TypeError, match="no such dtype"):
        gate({"topk_fast": broken})


def too_large(*_):
    return torch.empty(2**60, dtype=torch.int8)  # more than any address space


def test_too_large_is_left_out():
    assert gate({"good": F.cross_entropy, "large": too_large}) == {"large": "out of memory"}
    _, left_out = harness.sample_in_turn({"large": [too_large]}, "cpu", 3)
    assert left_out == {"large": "out of memory"}


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shape"):
        memory.attempt(lambda: torch.ones(2) @ torch.ones(3, 3) + torch.ones(2).view(3, 7))


# Timing


class Steps:
    """Candidates that take given times by a clock of their own, and the order in which they ran."""

    def __init__(self, **seconds):
        self.now, self.ran = 0.0, []
        self.candidates = {name: [self.one(name, s)] for name, s in seconds.items()}

    def one(self, name, seconds):
        def run():
            self.now += seconds
            self.ran.append(name)

        return run

    def interleaved(self, **options):
        return harness.sample_in_turn(self.candidates, "cpu", clock=lambda: self.now, **options)


def test_samples_are_in_turn_and_right():
    steps = Steps(a=1.0, b=2.0)  # too long for loops and untimed steps
    samples, left_out = steps.interleaved(repeats=4)
    assert "".join(steps.ran) == "ab" + 4 * "ab" and left_out == {}
    assert samples == {"a": 4 * [[1000.0]], "b": 4 * [[2000.0]]}


def test_brief_steps_are_repeated_after_an_untimed_one():
    steps = Steps(a=0.0011, b=0.03)
    samples, _ = steps.interleaved(repeats=5, seconds=0.5)  # 0.1 s a sample: 90 steps, and 3
    assert [len(values) for values in samples.values()] == [5, 5]
    assert steps.ran.count("a") == 1 + 5 * (1 + 90) and steps.ran.count("b") == 1 + 5 * (1 + 3)  # 1 to see how long
    assert all(abs(ms - 1.1) < 1e-6 for (ms,) in samples["a"]) and all(abs(ms - 30) < 1e-6 for (ms,) in samples["b"])


def test_long_steps_get_fewer_samples_but_three():
    samples, _ = Steps(brief=0.01, long=0.25, longest=60.0).interleaved(repeats=15, seconds=1.0)
    assert {name: len(values) for name, values in samples.items()} == {"brief": 15, "long": 4, "longest": 3}


def test_a_case_ends_when_its_time_is_spent():
    samples, _ = Steps(a=0.2, b=0.2).interleaved(repeats=15, case_seconds=0)
    assert [len(values) for values in samples.values()] == [harness.FEWEST] * 2


def test_passes_that_need_each_other_run_once_each():
    steps = Steps()
    passes = [steps.one("forward", 0.25), steps.one("backward", 0.5)]
    samples, _ = harness.sample_in_turn({"a": passes}, "cpu", 3, 1000, clock=lambda: steps.now)
    assert samples == {"a": 3 * [[250.0, 500.0]]} and steps.ran == 4 * ["forward", "backward"]


def test_quartiles():
    assert harness.compute_quartiles([3.0, 1.0, 2.0]) == {"lower": 1.0, "median": 2.0, "upper": 3.0, "repeats": 3}
    values = harness.compute_quartiles([float(i) for i in range(1, 12)])
    assert values == {"lower": 3.0, "median": 6.0, "upper": 9.0, "repeats": 11}


# Memory


def hold(small):
    return lambda: torch.ones(2**10 if small else 2**24).add_(1)


@NEEDS_PROC
def test_peak_memory_is_that_of_the_step():
    # Linux counts pages in batches.
    assert 0.98 * 2**26 <= memory.measure_peak(hold, device="cpu") <= 1.1 * 2**26


@NEEDS_PROC
def test_peak_memory_of_losses():
    """At its peak a step of ours holds the gradient; cross-entropy's a logarithm of the scores' size too."""
    case, logits = Case(8, 500_000), 8 * 500_000 * 4
    peak = {
        name: memory.measure_peak(loss.make_step, name, case, "cpu", device="cpu")
        for name in ("topk_fast", "cross-entropy")
    }
    assert 0.95 * logits <= peak["topk_fast"] <= 1.5 * logits and peak["cross-entropy"] >= 1.9 * logits


@NEEDS_PROC
def test_limit_makes_large_allocations_raise():
    """In a process of its own, which keeps the limit: what Linux grants otherwise, pages it never touches."""
    code = (
        "import resource, torch; from benchmarks import memory; memory.limit()\n"
        "free = resource.getrlimit(resource.RLIMIT_DATA)[0]\n"
        "print(free > 0, memory.attempt(torch.empty, free // 4 + 1)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True out of memory", done.stderr


# Results


def test_environment(monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    out = environment("cpu")
    assert out["commit"] == "abc1234" and out["torch"] == torch.__version__ and out["threads"] == 1
    assert {"cpu", "python", "pytopk", "topk_fast", "compiler", "instruction_sets", "date", "command"} <= set(out)
    json.dumps(out)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    harness.write(path, {"cases": [1]})
    with pytest.raises(TypeError):
        harness.write(path, {"cases": [1, object()]})
    assert json.loads(path.read_text()) == {"cases": [1]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("which", ["quick", "full"])
def test_sets_name_known_losses(which, device):
    known = loss.list_candidates(device)
    for entry in loss.list_entries(which, device):
        assert set(entry.names) <= set(known) and set(entry.memory) <= set(entry.names) and entry.names, entry


def test_the_full_set_has_its_groups():
    entries = loss.list_entries("full", "cpu")
    groups = {entry.group for entry in entries}
    assert groups == {"goals", "length", "samples", "k", "scores", "peers", "dtype"}
    goals = [entry.case for entry in entries if entry.group == "goals"]
    assert {(c.L, c.n_sample, c.epsilon) for c in goals} == {
        (n, b, e) for n in loss.GOALS for b in (5, 10) for e in (1, 0.2)
    }
    assert all(c.N * c.L <= 2**22 for c in (entry.case for entry in entries if entry.group == "length"))


@pytest.fixture
def tiny(monkeypatch):
    """loss.py with two cases of its own, and no limit set on this process."""
    entries = [
        loss.Entry("goals", Case(4, 50, n_sample=2), ("topk_fast", "cross-entropy", "pytopk", "Liger"), ("topk_fast",)),
        loss.Entry("length", Case(2, 70, dtype="bfloat16"), ("topk_fast", "cross-entropy")),
    ]
    monkeypatch.setattr(loss, "list_entries", lambda which, device: entries)
    monkeypatch.setattr(memory, "limit", lambda: None)
    return entries


@NEEDS_PROC
def test_loss_writes_its_result(tiny, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    loss.main(["--out", str(path), "--seconds", "0.01"])
    report = json.loads(path.read_text())
    assert list(report) == ["environment", "goals", "cases"] and report["goals"]["1000"] == [1.5, 1 / 40]
    first, second = report["cases"]
    case = dict(group="goals", N=4, L=50, k=5, n_sample=2, epsilon=1.0, dtype="float32", scores="normal")
    assert {key: first[key] for key in case} == case
    assert list(first["ms"]) == ["topk_fast", "cross-entropy", "pytopk"]
    assert all(set(ms) == {"lower", "median", "upper", "repeats"} for ms in first["ms"].values())
    assert first["left_out"] == {"Liger": "runs only on cuda"} and set(first["peak_bytes"]) == {"topk_fast"}
    assert second["dtype"] == "bfloat16" and second["peak_bytes"] == second["left_out"] == {}
    assert "Liger left out: runs only on cuda" in capsys.readouterr().out


def test_what_is_measured_stays(tiny, monkeypatch, tmp_path):
    """The second case's gate stops the run; the first case is in the file."""
    path, right = tmp_path / "cpu.json", harness.gate

    def once(losses, scores, *args):
        if len(scores) == 2:
            raise SystemExit("wrong")
        return right(losses, scores, *args)

    monkeypatch.setattr(harness, "gate", once)
    tiny[0] = tiny[0]._replace(memory=())
    with pytest.raises(SystemExit, match="wrong"):
        loss.main(["--out", str(path), "--seconds", "0.01"])
    assert [case["N"] for case in json.loads(path.read_text())["cases"]] == [4]


def test_peers_can_be_chosen(tiny, tmp_path):
    path = tmp_path / "cpu.json"
    loss.main(["--out", str(path), "--seconds", "0.01", "--peers", "cross-entropy"])
    assert [list(case["ms"]) for case in json.loads(path.read_text())["cases"]] == [["cross-entropy"]] * 2
    with pytest.raises(SystemExit):
        loss.main(["--peers", "no such loss"])


def test_a_step_of_each_shape_for_a_profiler(monkeypatch):
    seen = []
    monkeypatch.setattr(loss, "GOAL_SHAPES", [(3, 20), (2, 30)])
    monkeypatch.setattr(
        harness, "take_step", lambda f, scores, target: seen.append((type(f), len(scores), scores.dtype))
    )
    loss.main(["--once"])
    dtypes = (torch.float32, torch.bfloat16)
    assert seen == [
        (BalNoisedTopK, n, dtype) for n in (3, 2) for dtype in dtypes for _ in harness.list_own_backends("cpu")
    ]


def test_linear_keeps_the_form_of_its_result():
    committed = json.loads((ROOT / "benchmarks" / "results" / "linear_cpu.json").read_text())["cases"][0]["ms"]
    case = dict(N=8, D=4, L=60, dtype="float32")
    linear.check_equality(**case)
    ms = linear.measure(case, repeats=2)
    assert set(ms) <= set(committed) and set(linear.SEARCH) <= set(ms)
    for name, parts in ms.items():
        assert list(parts) == list(committed[name]) and set(committed[name]["both"]) <= set(parts["both"])


# Tables


def seeds(*values):
    return [{"top-1": value, "seed": seed} for seed, value in enumerate(values)]


def test_bold_is_what_the_seeds_do_not_tell_from_the_best():
    runs = {"best": seeds(0.80, 0.81, 0.82), "like it": seeds(0.79, 0.81, 0.80), "worse": seeds(0.60, 0.62, 0.61)}
    cells = study_tables.accuracy_cells(runs, "top-1")
    assert cells == {"best": "**81.0 ± 1.0**", "like it": "**80.0 ± 1.0**", "worse": "61.0 ± 1.0"}


def test_losses_are_compared_seed_by_seed():
    best = seeds(0.50, 0.60, 0.70)
    assert study_tables.falls_short(seeds(0.49, 0.59, 0.685), best, "top-1")  # a little, but on every seed
    assert not study_tables.falls_short(seeds(0.40, 0.70, 0.69), best, "top-1")
    assert study_tables.falls_short(
        list(reversed(seeds(0.49, 0.59, 0.685))), best, "top-1"
    )  # in whatever order they ran
    assert study_tables.falls_short(seeds(0.4, 0.5, 0.6), best, "top-1") and not study_tables.falls_short(
        best, best, "top-1"
    )


def test_what_did_not_fit_stands_in_the_linear_table(monkeypatch):
    quartiles = {"lower": 1.0, "median": 2.0, "upper": 3.0}
    ms = dict.fromkeys(("forward", "backward", "both", "optimizer"), quartiles)
    case = {
        "N": 1,
        "D": 2,
        "L": 3,
        "ms": {tables.PLAIN: ms, "large": "out of memory"},
        "peak_bytes": {tables.PLAIN: 2**20},
    }
    environment = dict.fromkeys(("cpu", "torch", "commit", "date"), "x")
    monkeypatch.setattr(tables, "result", lambda name: {"cases": [case], "environment": environment})
    lines = tables.linear_table().splitlines()
    assert "| 1, 2, 3 | large |  |  |  |  | out of memory |" in lines
    assert any("2 ms (1.00) | 2.0 ms | 1 MiB (1.00)" in line for line in lines)


def test_a_time_that_is_missing_says_why():
    with pytest.raises(KeyError, match="pytopk has no time at N, L = 64, 100: too many"):
        tables.median({"N": 64, "L": 100, "ms": {}, "left_out": {"pytopk": "too many"}}, "pytopk")


# What runs on a GPU


def test_a_step_that_fails_hangs_or_is_missing_keeps_none_from_running(tmp_path, capsys):
    python = [sys.executable, "-c"]
    todo = [
        gpu.Step("bad", 20, [*python, "print('said before'); raise SystemExit(3)"]),
        gpu.Step("hangs", 0.5, [*python, "import time; time.sleep(60)"]),
        gpu.Step("missing", 20, ["no-such-profiler"], optional=True),
        gpu.Step("good", 20, [*python, "print('said last')"]),
    ]
    assert gpu.run_all(todo, tmp_path, 100) == ["bad (failed with 3)", "hangs (cut short)"]
    ended = json.loads((tmp_path / "steps.json").read_text())["steps"]
    outcomes = ["failed with 3", "cut short", "no-such-profiler is not installed", "passed"]
    assert [step["outcome"] for step in ended] == outcomes and 0.5 <= ended[1]["seconds"] < 20
    log = (tmp_path / "gpu.log").read_text()
    assert log.index("said before") < log.index("== hangs") < log.index("said last")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [step.name for step in todo]


def test_steps_pass_where_only_an_optional_one_does_not(tmp_path):
    good = gpu.Step("good", 20, [sys.executable, "-c", ""])
    missing = gpu.Step("missing", 20, ["no-such-profiler"], optional=True)
    assert gpu.run_all([missing, good], tmp_path, 100) == []
    needed = missing._replace(optional=False)
    assert gpu.run_all([needed, good], tmp_path, 100) == ["missing (no-such-profiler is not installed)"]


@pytest.mark.parametrize("before", [False, True], ids=["first run", "with results of an earlier run"])
def test_a_benchmark_that_is_cut_short_has_not_failed_if_it_wrote_results(tmp_path, before):
    """Results of this run, not those that lay there before."""
    waits = "import os, pathlib, time; out = pathlib.Path(os.environ['OUT'])\n{}\ntime.sleep(60)"
    write = "(out / 'figures.json').write_text('{}')"
    if before:
        (tmp_path / "figures.json").write_text("{}")
    steps = {
        "writes": gpu.Step("writes", 5, [sys.executable, "-c", waits.format(write)], results="figures.json"),
        "does not": gpu.Step("does not", 0.5, [sys.executable, "-c", waits.format("")], results="figures.json"),
    }
    assert gpu.run_all([steps["does not"]], tmp_path, 100) == ["does not (cut short)"]
    assert gpu.run_all([steps["writes"]], tmp_path, 100) == []
    assert json.loads((tmp_path / "steps.json").read_text())["steps"][0]["outcome"] == "cut short, with results"


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_line_and_the_exit_code_say_what_failed(monkeypatch, tmp_path, capsys, fails):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {})
    monkeypatch.setenv("OUT", str(tmp_path))
    code = "raise SystemExit(2)" if fails else ""
    monkeypatch.setattr(gpu, "steps", lambda which: [gpu.Step("tests", 20, [sys.executable, "-c", code])])
    if fails:
        with pytest.raises(SystemExit, match=r"failed: tests \(failed with 2\); .*gpu\.log has their output"):
            gpu.main([])
    else:
        gpu.main([])
        assert capsys.readouterr().out.splitlines()[-1] == "no step failed"


def test_an_environment_without_git_and_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = environment("cuda")
    assert (found["commit"], found["driver"], found["device"]) == ("unknown", "unknown", "a GPU")


TESTS_CUT_SHORT = """
import time, pytest
@pytest.mark.parametrize("number", range(3))
def test_first(number):
    assert number
def test_last():
    time.sleep(60)
"""


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["in the foreground", "in the background"])
def test_tests_that_are_cut_short_report_what_they_found(tmp_path, capsys, monkeypatch, before):
    """pytest prints failures at its end only, which an interrupt lets it reach."""
    kept = signal.signal(signal.SIGINT, before)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins would take seconds of the step
    (tmp_path / "test_slow.py").write_text(TESTS_CUT_SHORT)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_slow.py")]
    try:
        (failed,) = gpu.run_all([gpu.Step("tests", 12, command)], tmp_path, 40)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert failed.startswith("tests (cut short: 1 failed, 2 passed in ")
    assert "assert 0" in (tmp_path / "gpu.log").read_text()
    assert "cut short: 1 failed, 2 passed in " in capsys.readouterr().out


def lives(pid):
    """Whether a process runs: it is there, and not one that ended and that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_process_outlives_its_step(tmp_path, monkeypatch):
    """Neither the step, which ignores an interrupt, nor the process that it started."""
    monkeypatch.setattr(gpu, "LAST_WORDS", 1)
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('pids', os.getpid(), child.pid, flush=True); time.sleep(60)"
    )
    assert gpu.run_all([gpu.Step("stubborn", 3, [sys.executable, "-c", code])], tmp_path, 20)
    pids = re.search(r"^pids (\d+) (\d+)$", (tmp_path / "gpu.log").read_text(), re.MULTILINE).groups()
    for pid in pids:  # a kill is asked for, and takes its time
        deadline = time.monotonic() + 20
        while lives(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lives(pid)


@pytest.mark.parametrize(
    "output, expected",
    [
        ("..F\n2 failed, 7 passed, 1 skipped in 3.21s\n", "2 failed, 7 passed, 1 skipped in 3.21s"),
        ("=== 1 error in 0.50s ===\nlater\n", "1 error in 0.50s"),
        ("3 passed in 200.00s (0:03:20)\n", "3 passed in 200.00s"),
        ("4 passed in 9.0s\n====== ERROR SUMMARY: 0 errors\n", "4 passed in 9.0s; ERROR SUMMARY: 0 errors"),
        ("====== RACECHECK SUMMARY: 1 hazard displayed (1 error)\n", "RACECHECK SUMMARY: 1 hazard displayed (1 error)"),
        ("nothing of the kind", ""),
    ],
)
def test_summary_of_a_step(output, expected):
    assert gpu.summary(output) == expected


def test_the_sanitizers_get_few_cases_of_each_kind():
    """On a GPU, each CUDA test runs once; here it runs in the model, in one order of threads or in three."""
    command = [sys.executable, "-m", "pytest", "--collect-only", *gpu.TESTS[1:], "-k", gpu.FEW]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    names = re.findall(r"::(\w+)", found)
    assert {name: names.count(name) for name in names} == {
        "test_more_contenders_than_a_list_holds": 1 + 2,  # with Triton, in one part and in four
        "test_rows_that_several_blocks_collect": 1,
        "test_excesses_and_gradients": 2,
    }


ABSENT = (
    "hypothesis",
    "xdist",
    "tqdm",
    "matplotlib",
    "pytopk",
    "difftopk",
    "entmax",
    "torchmetrics",
    "accelerate",
    "sklearn",
)


def test_make_gpu_needs_few_packages():
    """Torch, Triton, pytest with its benchmark plug-in, numpy and scipy suffice for its imports."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
        "from benchmarks import gpu, loss, linear\n"
        "print(len(loss.list_entries('full', 'cuda')))\n"
        "import pytest\n"
        "plugins = ['-p', 'pytest_benchmark.plugin', '-p', 'no:cacheprovider']\n"
        "raise SystemExit(pytest.main(['--collect-only', '-m', 'not host', *plugins, *gpu.TESTS]))"
    )
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_triton.py" in done.stdout and "test_under_sanitizers" not in done.stdout


def test_no_step_starts_after_the_time_is_up(tmp_path):
    step = gpu.Step("late", 20, [sys.executable, "-c", "raise SystemExit(1)"])
    assert gpu.run_all([step], tmp_path, 0) == ["late (no time left)"]
    assert json.loads((tmp_path / "steps.json").read_text())["steps"][0]["outcome"] == "no time left"


def test_every_step_names_what_is_there():
    for step in gpu.steps("quick"):
        for word in step.command:
            assert not word.endswith(".py") or (ROOT / word).exists(), word
        if "benchmarks" in " ".join(step.command):
            module = step.command[step.command.index("-m") + 1]
            assert importlib.util.find_spec(module), module
    assert sum(step.seconds for step in gpu.steps("full")) <= 480
