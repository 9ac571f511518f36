"""Contract under test: launches go to the right device and stream, can be captured, and wait for nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import topk_fast
from testing import assert_same, randn
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NoisedTopKLoss, SampledCrossEntropy, functional, noise, ops


def step(x, y, **options):
    """Forward and backward; torch's kernels do nothing here, so that there is no result to look at."""
    loss = functional.bal_noised_topk_loss(x, y, 5, backend="cuda", **options)
    torch.autograd.grad(loss, x)


def in_a_process(code):
    """Runs code that leaves its process of no use."""
    command, folder = [sys.executable, "-c", f"import torch\n{code}"], Path(topk_fast.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1, done.stderr  # an exception, and no crash
    return done


@pytest.fixture
def batch():
    y = torch.tensor([3, 699, 0]).cuda()
    return randn(3, 700).cuda().requires_grad_(), y


def test_launches_go_to_the_device_of_the_scores(calls, noise_on):
    x, y = randn(3, 700).to("cuda:1").requires_grad_(), torch.tensor([3, 699, 0]).to("cuda:1")
    wanted = noise_on("cuda:1", 6, 2)
    calls.take()
    assert torch.cuda.current_device() == 0
    excess, classes = ops.kernel("excess", "cuda")(x.detach(), *wanted, y, -100, False)
    ops.kernel("gradient", "cuda")(excess, classes, y, -100, 0, 700, torch.float32)
    step(x, y, seed=1)
    assert torch.cuda.current_device() == 0
    launches = calls.launches()
    assert sum(call["ours"] for call in launches) == 5 and {call["device"] for call in launches} == {1}
    expected = ops.kernel("excess", "cpp")(x.detach().cpu(), *noise_on("cpu", 6, 2), y.cpu(), -100, False)
    assert_same((excess.cpu(), classes.cpu()), expected)


@pytest.mark.parametrize("name", ["seed", "schedule", "target"])
def test_a_tensor_on_the_other_device_is_refused(calls, noise_on, name):
    tensors = {"seed": torch.tensor(3), "schedule": torch.tensor(1.0).double(), "target": torch.tensor([1, 2])}
    given = {other: x.to("cuda:1" if other == name else "cuda:0") for other, x in tensors.items()}
    x = randn(2, 150).to("cuda:0")
    wanted = noise_on("cuda:0", 6)._replace(seed=given["seed"], schedule=given["schedule"])
    calls.take()
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of the scores"):
        ops.kernel("excess", "cuda")(x, *wanted, given["target"], -100, False)
    options = {"seed": given["seed"], "epsilon": given["schedule"]}
    name = "epsilon" if name == "schedule" else name
    with pytest.raises(ValueError, match=f"{name} must be on input's device cuda:0, got cuda:1"):
        functional.bal_noised_topk_loss(x, given["target"], 5, backend="cuda", **options)
    assert not [call for call in calls.launches() if call["ours"]]


@pytest.mark.parametrize("name", ["grad", "target"])
def test_a_gradients_tensor_on_the_other_device_is_refused(calls, name):
    tensors = {"grad": randn(2, 1), "target": torch.tensor([1, 2])}
    given = {other: x.to("cuda:1" if other == name else "cuda:0") for other, x in tensors.items()}
    classes = torch.ones(2, 5, 1, dtype=torch.int64).to("cuda:0")
    calls.take()
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of the scores"):
        ops.kernel("gradient", "cuda")(given["grad"], classes, given["target"], -100, 0, 150, torch.float32)
    assert not calls.launches()


def test_launches_go_to_the_current_stream(calls, batch):
    stream = torch.cuda.Stream()
    calls.take()
    with torch.cuda.stream(stream):
        step(*batch, seed=1)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    launches = calls.launches()
    (number,) = {call["stream"] for call in launches}
    assert number and sum(call["ours"] for call in launches) == 3
    step(*batch, seed=1)
    assert {call["stream"] for call in calls.launches()} == {0}


def warmed_up(run):
    """Memory for the run is in the allocator's cache, and torch's generators are made."""
    for _ in range(2):
        run()


@pytest.mark.parametrize("law", noise.LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("n_classes", [700, 140_000])
def test_a_step_waits_for_nothing(calls, n_classes, law):
    """No synchronisation, no copy, no allocation once memory is cached, with a seed of the default generator."""
    x, y = randn(3, n_classes).cuda().requires_grad_(), torch.tensor([3, 699, 0]).cuda()

    def run():
        functional.noised_topk_loss(x, y, (1, 5), noise=law.name, backend="cuda").backward()

    warmed_up(run)
    calls.take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    noted = calls.take()
    assert {call.get("kind", call["what"]) for call in noted} <= {"launch", "device to device"}, noted
    x.sum().item()
    assert {"copy", "synchronise"} <= {call["what"] for call in calls.take()}, "a wait is noted where there is one"


@pytest.mark.parametrize("seeded", [True, False], ids=["seeds in a tensor", "seeds of the default generator"])
def test_a_step_is_captured(calls, batch, seeded):
    """Nothing waits. For its own generator newer torch waits for another stream, in a mode that allows it."""
    options = {"epsilon": torch.tensor(1.0).double().cuda()}
    if seeded:
        options["seed"] = torch.tensor(3).cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(*batch, **options)
    calls.take()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(*batch, **options)
    noted = calls.take()
    begin, end = (next(i for i, c in enumerate(noted) if c["what"] == f"{which} capture") for which in ("begin", "end"))
    captured = [call for call in noted[begin + 1 : end] if call.get("captured")]
    others = {call["what"] for call in noted[begin + 1 : end] if not call.get("captured")}
    assert others <= ({"malloc"} if seeded else {"malloc", "synchronise"}), others
    assert sum(call["what"] == "launch" and call["ours"] for call in captured) == 3


def test_a_wait_breaks_a_capture():
    """The stand-in has a device's rules."""
    code = "with torch.cuda.graph(torch.cuda.CUDAGraph()):\n    torch.ones(3, device='cuda').sum().item()"
    done = in_a_process(code)
    assert "operation not permitted when stream is capturing" in done.stderr, done.stderr


def test_a_replay_reads_the_tensors_anew(batch, noise_on):
    """The launches of a graph have the bits of "cpp" for scores and a seed that were written after the capture."""
    x, y = batch[0].detach(), batch[1]
    wanted = noise_on("cuda", 6, 2)
    out = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out[:] = ops.kernel("excess", "cuda")(x, *wanted, y, -100, False)
        out.append(ops.kernel("gradient", "cuda")(*out, y, -100, 0, 700, torch.float32))
    for number in (7, 8):
        scores, seed = randn(3, 700, seed=number), torch.tensor(number)
        x.copy_(scores), wanted.seed.copy_(seed)
        graph.replay()
        on_cpu = noise_on("cpu", 6, 2)._replace(seed=seed)
        expected = ops.kernel("excess", "cpp")(scores, *on_cpu, y.cpu(), -100, False)
        gradient = ops.kernel("gradient", "cpp")(*expected, y.cpu(), -100, 0, 700, torch.float32)
        assert_same(tuple(t.cpu() for t in out), (*expected, gradient))


LOSSES = {
    "balanced": lambda: BalNoisedTopK(5, 1.0),
    "imbalanced": lambda: ImbalNoisedTopK(5, 1.0, 0.3, range(1, 1001)),
    "sampled cross-entropy": lambda: SampledCrossEntropy(),
    "softplus of two ranks": lambda: NoisedTopKLoss((1, 5), link="softplus"),
    "class weights": lambda: NoisedTopKLoss(5, weight=torch.linspace(0.1, 2.0, 1000)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_launches_of_a_step(calls, loss):
    """In eager mode: a search, a link, a gradient; the seed's and torch's 1 for the gradient of the loss."""
    x, y = randn(128, 1000).cuda().requires_grad_(), (torch.arange(128) * 7).cuda()
    criterion = LOSSES[loss]().cuda()
    calls.take()
    criterion(x, y).backward()
    launches = calls.take("launch", "copy")
    print(f"\n{len(launches)} launches of a step of {criterion}, forward and backward:")
    for call in launches:
        print(f"  {call.get('grid', ''):>8}  {call.get('kernel', call.get('kind'))[:140]}")
    assert len(launches) == 5 and sum(call.get("ours", 0) for call in launches) == 3


@pytest.mark.parametrize("label", [-1, 40])
def test_a_wrong_label_stops_the_device(label):
    """The kernel prints why, and the next call that waits raises."""
    done = in_a_process(f"""
from topk_fast.functional import bal_noised_topk_loss
x, y = torch.ones(1, 40).cuda(), torch.tensor([{label}]).cuda()
loss = bal_noised_topk_loss(x, y, 3, seed=1, backend="cuda")
print("launched")
loss.item()
""")
    assert done.stdout == "launched\n", done.stderr
    assert "target out of bounds" in done.stderr and "device-side assert triggered" in done.stderr
