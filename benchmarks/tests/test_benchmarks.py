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

from benchmarks import ROOT, cases, gpu, gradient, harness, linear, loss, tables
from benchmarks.cases import Case
from benchmarks.harness import Candidate, Effort, Entry
from benchmarks.peers import PEERS
from benchmarks.study import tables as study_tables
from examples.machine import environment, measure_peak
from examples.report import write

CASE = Case(64, 100, n_sample=5)


# Scores


@pytest.mark.parametrize("kind", ["normal", "flat", "spiky"])
def test_scores_are_leaves_and_the_same_each_time(kind):
    (scores, target), (again, same) = (cases.make_scores(kind, 64, 100, "float32", "cpu") for _ in range(2))
    assert scores.shape == (64, 100) and target.shape == (64,) and scores.is_leaf and scores.requires_grad
    assert torch.equal(scores, again) and torch.equal(target, same) and 0 <= target.min() and target.max() < 100
    assert cases.make_scores(kind, 2, 9, "bfloat16", "cpu")[0].dtype == torch.bfloat16


def test_what_each_kind_claims():
    normal, flat = (cases.make_scores(kind, 64, 100, "float32", "cpu")[0] for kind in ("normal", "flat"))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05  # of 6400: 4 standard errors
    assert (flat == flat[0, 0]).all()
    spiky, target = cases.make_scores("spiky", 64, 100, "float32", "cpu")
    peaks = spiky > 2  # 20 standard deviations of the others
    assert (peaks.sum(1) >= 3).all() and (peaks.sum(1) <= cases.PEAKS).all()  # peaks may meet in one class
    assert peaks[torch.arange(64), target].all() and abs(spiky[~peaks].std() - 0.1) < 0.005


def test_species_come_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "SPECIES", tmp_path / "logits.pt")
    with pytest.raises(FileNotFoundError, match="examples.all_species --losses cross-entropy --save-logits"):
        cases.make_scores("species", 2, 5, "float32", "cpu")
    logits, target = torch.randn(3, 5).half(), torch.tensor([4, 0, 2])
    torch.save({"logits": logits, "target": target}, cases.SPECIES)
    scores, labels = cases.make_scores("species", 2, 5, "float32", "cpu")
    assert torch.equal(scores.detach(), logits[:2].float()) and scores.requires_grad and labels.tolist() == [4, 0]
    with pytest.raises(ValueError, match="3 rows of 5 classes, asked for 2 of 6"):
        cases.make_scores("species", 2, 6, "float32", "cpu")


# The gate


@pytest.mark.parametrize("kind", ["normal", "flat", "spiky"])
def test_gate_lets_right_losses_pass(kind):
    CASE._replace(scores=kind).check(loss.BASIC, "cpu")


@pytest.mark.parametrize("part", ["losses", "gradients"])
@pytest.mark.parametrize("name", ["bal_noised_topk_loss", "sampled_cross_entropy"])
def test_gate_sees_one_bit(monkeypatch, name, part):
    """A backend whose first loss, or gradient, is one unit in the last place off."""
    right = getattr(cases, name)
    if cases.list_own_backends("cpu") == ["torch"]:
        pytest.skip("the C++ kernels are not built: there is only one backend")

    def wrong(scores, *args, backend, **kwargs):
        if backend == "torch":
            return right(scores, *args, backend=backend, **kwargs)
        if part == "gradients":
            scores.register_hook(lambda grad: torch.nextafter(grad, torch.tensor(9.0)))
            return right(scores, *args, backend=backend, **kwargs)
        out = right(scores, *args, backend=backend, **kwargs)
        return out + (torch.nextafter(out, torch.tensor(9.0)) - out).detach()

    wrong.__name__ = name
    monkeypatch.setattr(cases, name, wrong)
    with pytest.raises(SystemExit, match=f"cpp on cpu and the reference differ in {name} at .*nothing was timed"):
        CASE.check((), "cpu")


def test_gate_sees_another_mean():
    scores, target = cases.make_scores("normal", 64, 100, "float32", "cpu")
    with pytest.raises(SystemExit, match="mean losses .* and peer's .* differ: nothing was timed"):
        cases.check_means("peer", lambda s, t: F.cross_entropy(s, t) + 0.1, F.cross_entropy, scores, target)


@pytest.mark.parametrize("wrong", ["losses", "gradients"])
def test_gate_sees_a_linear_form_that_is_wrong(monkeypatch, wrong):
    name, right = "sampled cross-entropy, B = 16", linear.linear_sampled_cross_entropy

    def off(x, weight, y, **options):
        value = right(x, weight, y, **options)
        return value * (1 + 1e-6) if wrong == "losses" else 2 * value - value.detach()

    monkeypatch.setitem(linear.OWN, name, linear.partial(off, n_sample=16))
    with pytest.raises(SystemExit, match=f"{name}: linear and plain form disagree"):
        linear.Case(8, 4, 60).check((), "cpu")


# What is measured


def measure(names, **candidates):
    report = {"cases": []}
    entry = Entry("goals", CASE, names)
    harness.measure([entry], PEERS | candidates, "cpu", Effort(3, 0.01), report, None)
    return report["cases"][0]


def test_a_result_has_the_case_times_reasons_and_peaks(tmp_path, capsys):
    report = {"cases": []}
    entry = Entry("goals", Case(4, 50, n_sample=2), ("topk_fast", "cross-entropy"))
    harness.measure([entry], PEERS, "cpu", Effort(3, 0.01), report, tmp_path / "new" / "cpu.json")
    result = json.loads((tmp_path / "new" / "cpu.json").read_text())["cases"][0]
    case = dict(group="goals", N=4, L=50, k=5, n_sample=2, epsilon=1.0, dtype="float32", scores="normal")
    assert {key: result[key] for key in case} == case and result["left_out"] == {}
    assert all(set(ms) == {"lower", "median", "upper", "repeats"} for ms in result["ms"].values())
    assert list(result["ms"]) == list(result["peak_bytes"]) == ["topk_fast", "cross-entropy"]
    assert capsys.readouterr().out.startswith("goals: N=4 L=50 k=5 n_sample=2")


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_what_is_not_finite_is_not_timed(wrong):
    def peer(scores, target):
        if wrong == "gradient":
            return (scores - scores.detach()).abs().sqrt().sum()  # finite itself
        return F.cross_entropy(scores, target) * torch.inf

    with pytest.raises(SystemExit, match="bad has a loss or gradient that is not finite"):
        measure(("cross-entropy", "bad"), bad=Candidate(lambda case: peer))


def test_a_peer_that_fails_is_left_out_but_not_one_of_ours():
    def broken(case):
        raise TypeError("no such dtype\nand more")

    result = measure(("cross-entropy", "peer"), peer=Candidate(broken))
    assert result["left_out"] == {"peer": "TypeError: no such dtype"} and list(result["ms"]) == ["cross-entropy"]
    with pytest.raises(TypeError, match="no such dtype"):
        measure(("ours",), ours=Candidate(broken, own=True))


def test_what_is_measured_stays(monkeypatch, tmp_path):
    """The second case's gate stops the run; the first case is in the file."""
    entries = [Entry("goals", Case(n, 50), ("cross-entropy",)) for n in (4, 2)]
    monkeypatch.setattr(loss, "list_entries", lambda quick, device: entries)

    def check(case, names, device):
        if case.N == 2:
            raise SystemExit("wrong")

    monkeypatch.setattr(Case, "check", check)
    with pytest.raises(SystemExit, match="wrong"):
        loss.main(["--quick", "--out", str(tmp_path / "cpu.json")])
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert [case["N"] for case in report["cases"]] == [4] and report["environment"]["threads"] == 1
    assert {"cpu", "pytopk", "torch", "instruction_sets", "commit", "date", "command"} <= set(report["environment"])


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    write(tmp_path / "result.json", {"cases": [1]})
    with pytest.raises(TypeError):
        write(tmp_path / "result.json", {"cases": [1, object()]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"cases": [1]}


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

    def sampled(self, *effort):
        return harness.sample_in_turn(self.candidates, "cpu", Effort(*effort), clock=lambda: self.now)


def test_samples_are_in_turn_and_right():
    steps = Steps(a=1.0, b=2.0)  # too long for loops and untimed steps
    assert steps.sampled(4) == {"a": 4 * [[1000.0]], "b": 4 * [[2000.0]]}
    assert "".join(steps.ran) == "ab" + 4 * "ab"


def test_brief_steps_are_repeated_after_an_untimed_one():
    steps = Steps(a=0.0011, b=0.03)
    samples = steps.sampled(5, 0.5)  # 0.1 s a sample: 90 steps, and 3
    assert [len(values) for values in samples.values()] == [5, 5]
    assert steps.ran.count("a") == 1 + 5 * (1 + 90) and steps.ran.count("b") == 1 + 5 * (1 + 3)  # 1 to see how long
    assert all(abs(ms - 1.1) < 1e-6 for (ms,) in samples["a"]) and all(abs(ms - 30) < 1e-6 for (ms,) in samples["b"])


def test_long_steps_get_fewer_samples_but_three():
    steps = Steps(brief=0.2, long=0.25, longest=60.0)
    samples = steps.sampled(15, 3.0)
    assert {name: len(values) for name, values in samples.items()} == {"brief": 15, "long": 12, "longest": 3}
    turns = "".join({"brief": "b", "long": "l", "longest": "L"}[name] for name in steps.ran)
    assert [turn.count("L") for turn in turns.split("b")[2:]] == 3 * [1, 0, 0, 0, 0]  # not in the first turns only


def test_passes_that_need_each_other_run_once_each():
    steps = Steps()
    steps.candidates = {"a": [steps.one("forward", 0.25), steps.one("backward", 0.5), steps.one("update", 0.01)]}
    samples = steps.sampled(3)
    assert samples == {"a": 3 * [pytest.approx([250.0, 500.0, 10.0])]}
    assert steps.ran == 4 * ["forward", "backward", "update"]
    assert harness.summarize(samples["a"])["both"] == {"lower": 750, "median": 750, "upper": 750, "repeats": 3}


# Memory


def test_a_peak_counts_what_a_step_takes_and_gives_back():
    """And neither what it finds, nor that which was given back before more was taken."""
    found = torch.ones(2**18)  # of a MiB

    def step():
        found.add(1)
        kept = found + 1
        return (kept * 2).exp()  # three MiB at a time, the peak, of which one stays

    assert measure_peak(step) == 3 * 2**20


def test_peak_memory_of_losses():
    """At its peak a step of ours holds the gradient; cross-entropy's a logarithm of the scores' size too."""
    case, logits, peak = Case(8, 50_000), 8 * 50_000 * 4, {}
    for name in loss.BASIC[:3]:
        step = harness.Step(PEERS[name], case, case.make_batch("cpu"), "cpu")
        step.run()
        peak[name] = step.peak_bytes()
    assert all(logits <= peak[name] <= 1.1 * logits for name in loss.OWN)
    assert 2 * logits <= peak["cross-entropy"] <= 3.1 * logits


# The cases


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
@pytest.mark.parametrize("program", [loss, linear], ids=["loss", "linear"])
def test_cases_name_known_losses(program, quick, device):
    known = linear.CANDIDATES | linear.GPU_PEERS if program is linear else loss.list_candidates(device)
    for entry in program.list_entries(quick, device):
        assert set(entry.names) <= set(known) and entry.names, entry


def test_the_full_set_has_its_groups():
    entries = loss.list_entries(False, "cpu")
    groups = {entry.group for entry in entries}
    assert groups == {"goals", "length", "samples", "k", "scores", "peers"}
    goals = [entry.case for entry in entries if entry.group == "goals"]
    assert {(c.L, c.n_sample, c.epsilon) for c in goals} == {
        (n, b, e) for n in loss.GOALS for b in (5, 10) for e in (1, 0.2)
    }
    assert all(c.N * c.L <= 2**22 for c in (entry.case for entry in entries if entry.group == "length"))
    assert all("sampled cross-entropy" in e.names for e in entries if e.group in ("goals", "peers", "scores"))


def test_every_instruction_set_is_measured_and_the_best_one_stays(monkeypatch):
    chosen, groups = [], []
    sets = ["best", "other"]
    monkeypatch.setattr(loss.topk_fast, "build_info", lambda: {"instruction_sets": sets})
    monkeypatch.setattr(loss.topk_fast, "_C", type("_C", (), {"use_isa": chosen.append}), raising=False)
    monkeypatch.setattr(loss.harness, "measure", lambda entries, *rest: groups.append((chosen[-1], entries[0].group)))
    loss.measure_instruction_sets({"cases": []}, None)
    assert groups == [("best", "best"), ("other", "other")] and chosen[-1] == "best"


def test_a_step_of_each_shape_for_a_profiler(monkeypatch):
    seen = []
    monkeypatch.setattr(loss, "GOAL_SHAPES", [(3, 20), (2, 30)])
    monkeypatch.setattr(harness.Step, "run", lambda step: seen.append((step.loss, step.leaves[0])))
    loss.main(["--once"])
    dtypes = (torch.float32, torch.bfloat16)
    expected = [(type(PEERS[name].make(CASE)), n, dtype) for n in (3, 2) for dtype in dtypes for name in loss.OWN]
    assert [(type(own), len(scores), scores.dtype) for own, scores in seen] == expected


def test_linear_keeps_the_form_of_its_result():
    committed = json.loads((ROOT / "benchmarks" / "results" / "linear_cpu.json").read_text())["cases"][0]
    report, names = {"cases": []}, tuple(linear.CANDIDATES)
    entry = Entry("linear", linear.Case(8, 4, 60), names)
    harness.measure([entry], linear.CANDIDATES, "cpu", Effort(2), report, None)
    (result,) = report["cases"]
    assert list(result) == list(committed) and result["left_out"] == {} and list(result["ms"]) == list(names)
    for parts in result["ms"].values():
        assert set(parts) == {"forward", "backward", "both", "optimizer"} and parts["both"]["median"] > 0


# The gradient


def test_samples_add_their_share_of_the_variance_of_the_labels():
    """Of labels from the softmax, a sample is one more draw; of labels that the model knows, the share is larger."""
    torch.manual_seed(0)
    logits = torch.randn(400, 20)
    found = gradient.measure_sampling("x", logits, logits.softmax(1).multinomial(1)[:, 0], 50)
    assert abs(found["label_variance"] - found["model_variance"]) < 4 * found["label_variance_error"]
    for s in found["samples"]:
        expected = found["model_variance"] / s["n_sample"]
        assert abs(s["variance"] - expected) < 4 * s["variance_error"]
        assert abs(s["bias_squared"]) < 4 * s["bias_squared_error"]
    certain = gradient.measure_sampling("x", logits, logits.argmax(1), 2)
    assert certain["label_variance"] < 0.9 * certain["model_variance"] == 0.9 * found["model_variance"]


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
    assert study_tables.falls_short(seeds(0.49, 0.59, 0.685)[::-1], best, "top-1")  # in whatever order they ran
    assert study_tables.falls_short(seeds(0.4, 0.5, 0.6), best, "top-1")
    assert not study_tables.falls_short(best, best, "top-1")


ENVIRONMENT = dict.fromkeys(("cpu", "torch", "commit", "date"), "x") | {"instruction_sets": ["avx512", "avx2"]}


def test_what_did_not_fit_stands_in_the_linear_table(monkeypatch):
    quartiles = {"lower": 1.0, "median": 2.0, "upper": 3.0}
    ms = dict.fromkeys(("forward", "backward", "both", "optimizer"), quartiles)
    case = {"group": "linear", "N": 1, "D": 2, "L": 3, "ms": {tables.PLAIN: ms}, "peak_bytes": {tables.PLAIN: 2**20}}
    case["left_out"] = {"large": "OutOfMemoryError: x"}
    monkeypatch.setattr(tables, "result", lambda name: {"cases": [case], "environment": ENVIRONMENT})
    lines = tables.linear_table().splitlines()
    assert "| 1, 2, 3 | large |  |  |  |  | OutOfMemoryError: x |" in lines
    assert any("2 ms (1.00) | 2.0 ms | 1 MiB (1.00)" in line for line in lines)


def make_case(group, length, times, **more):
    ms = {name: {"median": value} for name, value in times.items()}
    case = {"group": group, "N": 2, "L": length, "scores": "normal", "k": 5, "n_sample": 5, "epsilon": 1.0}
    return case | {"ms": ms, "left_out": {}} | more


def test_columns_without_figures_are_left_out(monkeypatch):
    """And classes stand in falling order; cases with few classes are not in the short table."""
    times = {"topk_fast": 1.0, "cross-entropy": 2.0, "pytopk": 400.0}
    report = {"cases": [make_case("goals", n, times) for n in (1000, 10_000, 50_000)], "environment": ENVIRONMENT}
    monkeypatch.setattr(tables, "result", lambda name: report)
    _, _, first, second, *_ = tables.speed_table().splitlines()
    assert first == "| loss on logits, N, L = 2, 50000 | 2 ms (1) | - | 1 ms (0.5) | 400 ms (200) |"
    assert second.startswith("| loss on logits, N, L = 2, 10000 |")


def test_instruction_sets_stand_together(monkeypatch):
    cases = [make_case(name, n, {"topk_fast": t}) for name, t in (("avx512", 1.0), ("avx2", 2.0)) for n in (9, 99)]
    monkeypatch.setattr(tables, "result", lambda name: {"cases": cases, "environment": ENVIRONMENT})
    rows = tables.instructions_table().splitlines()
    assert rows[0] == "| N, L | instructions | balanced noised top-K |"
    assert rows[2:4] == ["| 2, 99 | avx512 | 1 ms |", "| 2, 99 | avx2 | 2 ms |"]


def test_a_time_that_is_missing_says_why():
    with pytest.raises(KeyError, match="pytopk has no time at N, L = 64, 100: too many"):
        tables.median({"N": 64, "L": 100, "ms": {}, "left_out": {"pytopk": "too many"}}, "pytopk")


# What runs on a GPU


def python_step(name, seconds, code, **more):
    return gpu.Step(name, seconds, [sys.executable, "-c", code], **more)


def test_a_step_that_fails_hangs_or_is_missing_keeps_none_from_running(tmp_path, capsys):
    todo = [
        python_step("bad", 20, "print('said before'); raise SystemExit(3)"),
        python_step("hangs", 0.5, "import time; time.sleep(60)"),
        gpu.Step("missing", 20, ["no-such-profiler"], optional=True),
        gpu.Step("needed", 20, ["no-such-profiler"]),
        python_step("good", 20, "print('said last')"),
    ]
    failed = ["bad (failed with 3)", "hangs (cut short)", "needed (no-such-profiler is not installed)"]
    assert gpu.run_all(todo, tmp_path, 100) == failed
    ended = json.loads((tmp_path / "steps.json").read_text())["steps"]
    outcomes = ["failed with 3", "cut short", *2 * ["no-such-profiler is not installed"], "passed"]
    assert [step["outcome"] for step in ended] == outcomes and 0.5 <= ended[1]["seconds"] < 20
    log = (tmp_path / "gpu.log").read_text()
    assert log.index("said before") < log.index("== hangs") < log.index("said last")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [step.name for step in todo]


@pytest.mark.parametrize("before", [False, True], ids=["first run", "with results of an earlier run"])
def test_a_benchmark_that_is_cut_short_has_not_failed_if_it_wrote_results(tmp_path, before):
    """Results of this run, not those that lay there before."""
    waits = "import os, pathlib, time; out = pathlib.Path(os.environ['OUT'])\n{}\ntime.sleep(60)"
    write = "(out / 'figures.json').write_text('{}')"
    if before:
        (tmp_path / "figures.json").write_text("{}")
    does_not = python_step("does not", 0.5, waits.format(""), results="figures.json")
    assert gpu.run_all([does_not], tmp_path, 100) == ["does not (cut short)"]
    assert gpu.run_all([python_step("writes", 2, waits.format(write), results="figures.json")], tmp_path, 100) == []
    assert json.loads((tmp_path / "steps.json").read_text())["steps"][0]["outcome"] == "cut short, with results"


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_line_and_the_exit_code_say_what_failed(monkeypatch, tmp_path, capsys, fails):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {})
    monkeypatch.setenv("OUT", str(tmp_path))
    code = "raise SystemExit(2)" if fails else ""
    monkeypatch.setattr(gpu, "steps", lambda quick: [python_step("tests", 20, code)])
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


def test_tests_that_are_cut_short_report_what_they_found(tmp_path, capsys, monkeypatch):
    """pytest prints failures at its end only, which an interrupt lets it reach, in a shell's background job as well."""
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins would take seconds of the step
    (tmp_path / "test_slow.py").write_text(TESTS_CUT_SHORT)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_slow.py")]
    try:
        (failed,) = gpu.run_all([gpu.Step("tests", 6, command)], tmp_path, 40)
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
    assert gpu.run_all([python_step("stubborn", 2, code)], tmp_path, 20)
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


ABSENT = "hypothesis xdist tqdm matplotlib pytopk difftopk torchmetrics accelerate sklearn".split()


def test_make_gpu_needs_few_packages():
    """Torch, Triton, pytest, numpy and scipy suffice for its imports."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
        "from benchmarks import gpu, loss, linear\n"
        "print(len(loss.list_entries(False, 'cuda')))\n"
        "import pytest\n"
        "raise SystemExit(pytest.main(['--collect-only', '-m', 'not host', '-p', 'no:cacheprovider', *gpu.TESTS]))"
    )
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_triton.py" in done.stdout and "test_under_sanitizers" not in done.stdout


def test_no_step_starts_after_the_time_is_up(tmp_path):
    assert gpu.run_all([python_step("late", 20, "raise SystemExit(1)")], tmp_path, 0) == ["late (no time left)"]
    assert json.loads((tmp_path / "steps.json").read_text())["steps"][0]["outcome"] == "no time left"


def test_every_step_names_what_is_there():
    for step in gpu.steps(quick=True):
        for word in step.command:
            assert not word.endswith(".py") or (ROOT / word).exists(), word
        if "benchmarks" in " ".join(step.command):
            module = step.command[step.command.index("-m") + 1]
            assert importlib.util.find_spec(module), module
    assert sum(step.seconds for step in gpu.steps(quick=False)) <= 480
