"""The pages of docs/integrations: snippets for frameworks run and learn, and calls recompile as the table says.

Blocks that are marked with a framework run here, each in a process of its own; all others run in test_documentation.py.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from testing import ROOT
from topk_fast import NoisedTopKLoss, functional

PAGES = ROOT / "docs" / "integrations"

# torchvision's wheel for CUDA cannot load its kernels beside a CPU build of torch, and then fails at two of its own
# registrations, for lack of these schemas. timm needs its transforms alone.
TORCHVISION = """
import torch
try:
    import torchvision
except RuntimeError:
    schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        schemas.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# The sampled loss of cosines, as it says it is, with many samples: 0.02 are five standard deviations of the mean.
SAMPLED_SOFTMAX = """
accuracy = (classes == y[:, None]).float().mean()
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
theirs = NormalizedSoftmaxLoss(n_classes, 64, temperature=1 / s)
theirs.W.data = head.weight.detach().t()
softmax.n_sample = 5000
noise = torch.randn(len(y), 64, generator=torch.Generator().manual_seed(0))  # features that no class fits
torch.testing.assert_close(head(noise, y), theirs(noise, y), atol=0.02, rtol=0)
"""
# The marked blocks, page by page in alphabetical order: framework, what runs before the block, what must hold after it.
SNIPPETS = [
    ("transformers", "", "accuracy = measured['eval_top-5']"),
    (
        "transformers",
        "",
        "assert model.loss_type == 'ForCausalLM' and 0 <= measured['eval_loss'] < 0.1\n"
        "accuracy = (generated == tokens).float().mean()",
    ),
    ("lightning", "", "accuracy = trainer.callback_metrics['top-k accuracy']"),
    ("lightning", "", "accuracy = trainer.callback_metrics['top-5 accuracy']"),
    ("pytorch_metric_learning", "", SAMPLED_SOFTMAX),
    ("pytorch_metric_learning", "", "accuracy = (classes == y[:, None]).float().mean()"),
    ("pytorch_metric_learning", "", "accuracy = (classes == y[:, None]).any(1).float().mean()"),
    ("timm", TORCHVISION, "accuracy = (model(x).topk(5).indices == y[:, None]).any(1).float().mean()"),
]
APART = Path(sys.prefix) / "timm"  # timm with its torchvision, which would break other packages' imports


@pytest.fixture(scope="module")
def marked():
    """The marked blocks: pairs of a framework and a text."""
    text = "".join(page.read_text() for page in sorted(PAGES.glob("*.md")))
    return re.findall(r"^```python (\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_marked_block_has_a_test(marked):
    assert [framework for framework, _ in marked] == [framework for framework, _, _ in SNIPPETS]


@pytest.mark.parametrize("index", range(len(SNIPPETS)), ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(SNIPPETS)])
def test_framework(index, marked, tmp_path):
    """The snippet runs as it stands, and its model gets almost all rows right: the true class is among its first five,
    and a language model generates the true tokens.
    """
    framework, before, after = SNIPPETS[index]
    path = [str(ROOT)] + [str(APART)] * (framework == "timm")
    if not (importlib.util.find_spec(framework) or (framework == "timm" and (APART / framework).is_dir())):
        pytest.skip(f"{framework} is not installed; make test installs it into .venv")
    seeded = f"import torch\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n{before}\n{marked[index][1]}\n"
    check = f"{after}\nprint('accuracy', float(accuracy))\nassert accuracy > 0.9, accuracy\n"
    (tmp_path / "snippet.py").write_text(seeded + check)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


# With DistributedDataParallel a thread of gloo may still free its last work, which needs Python's lock, when Python
# ends; the process then aborts, with any loss (torch 2.13). It has printed all it had to say by then.
LEAVE = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


def run_under_torchrun(folder, text):
    """Two processes that run a script; what they printed."""
    (folder / "train.py").write_text(text + LEAVE)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, "train.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_the_recipe_of_sharding_under_torchrun(tmp_path):
    """Copied as it stands, it is one world of two ranks, each with half of the classes."""
    printed = run_under_torchrun(tmp_path, "\n".join(python_blocks(PAGES.parent / "sharding.md")))
    (loss,) = re.findall(r"2 ranks, 25000 classes on each, loss (\d+\.\d+)", printed)
    assert float(loss) > 0


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_the_blocks_of_data_parallel_training_under_torchrun(tmp_path):
    """DDP, FSDP2 and a column-parallel layer: two ranks, whose replicas stay equal though their samples differ, whose
    best classes are right, and which share the classes.
    """
    setup, ddp, fsdp, columns = python_blocks(PAGES / "distributed.md")
    check = """
weight = next(model.parameters()).detach().clone()
dist.broadcast(weight, 0)
assert world == 2 and torch.equal(weight, next(model.parameters())), rank
seeds = [None] * world  # of the next call's noise
dist.all_gather_object(seeds, torch.randint(2**62, ()).item())
assert len(set(seeds)) == world
dist.barrier()
print(f"rank {rank} of {world} is right", flush=True)
"""
    after = """
logits = (trunk.unshard(), head.unshard(), nn.functional.linear(trunk(x[rows]), head.weight, head.bias))[2]
assert torch.equal(classes, logits.topk(k).indices)
print("FSDP2 is right", flush=True)
"""
    last = """
assert last.weight.grad.to_local().shape == (50, 32)
print("the column-parallel layer is right", flush=True)
"""
    columns = columns.replace("dist.destroy_process_group()", last + "dist.destroy_process_group()")
    printed = run_under_torchrun(tmp_path, "\n".join([setup, ddp, check, fsdp, after, columns]))
    assert sorted(re.findall(r"rank \d of 2 is right", printed)) == [f"rank {rank} of 2 is right" for rank in range(2)]
    assert printed.count("FSDP2 is right") == printed.count("the column-parallel layer is right") == 2


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_a_forked_child_with_one_thread(kind):
    """distributed.md: a child that is forked after the parent's threads ran must set its own number first."""
    script = f"""
import os, torch
from topk_fast.functional import bal_noised_topk_loss
torch.set_num_threads(2)
x, y = torch.randn(512, 5000), torch.arange(512)
losses = {{
    "ours": lambda: bal_noised_topk_loss(x, y, 5, seed=1),
    "torch's": lambda: torch.nn.functional.cross_entropy(x, y),
}}
loss = losses[{kind!r}]
expected = loss()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.allclose(loss(), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


# The table of torch.md: some values of one argument, and the graphs compiled after each call.
ANEW = {
    "target": ([torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64), torch.arange(6)], [1, 1, 1]),
    "seed": ([torch.tensor(1), torch.tensor(2), torch.tensor(3)], [1, 1, 1]),
    "no seed": ([None, None, None], [1, 1, 1]),
    "int seed": ([1, 2, 3], [1, 2, 2]),
    "input": ([torch.ones(6, 300), torch.ones(7, 300), torch.ones(8, 300)], [1, 2, 2]),
    "k": ([1, 2, 3], [1, 2, 3]),
    "n_sample": ([1, 2, 3], [1, 2, 3]),
    "reduction": (["mean", "sum", "none"], [1, 2, 3]),
    "scale": ([50.0, 20.0, 10.0], [1, 2, 2]),
    "noise": (["normal", "gumbel", "normal"], [1, 2, 2]),
    "link": (["hinge", "softplus", "identity"], [1, 2, 3]),
    "temperature": ([1.0, 0.5, 0.25], [1, 3, 4]),  # torch.compile tries a dynamic one first
    "margin": ([1.0, 0.5, 0.25, 0.0], [1, 2, 2, 2]),
    "a tensor as margin": ([torch.ones(300), torch.zeros(300), torch.arange(300.0)], [1, 1, 1]),
    "rank_weights": ([(1.0,), (2.0,), (3.0,)], [1, 2, 2]),
    "exclude_target": ([False, True, False], [1, 2, 2]),
    "offset": ([torch.zeros(300), torch.ones(300), torch.arange(300.0)], [1, 1, 1]),
    "weight": ([torch.ones(300), torch.zeros(300), torch.arange(300.0)], [1, 1, 1]),
    "ignore_index": ([-1, -2, -3], [1, 2, 3]),
    "epsilon": ([1.0, 0.5, 0.25], None),
    "a tensor as epsilon": ([torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.25)], [1, 1, 1]),
}
# The functions, with more of their arguments, that have the argument where the balanced loss has not.
FUNCTIONS = {
    "scale": (functional.imbal_noised_topk_loss, {"margins": torch.ones(300), "epsilon": 0.1}),
    "noise": (functional.noised_excess, {}),
    "temperature": (functional.noised_topk_loss, {"link": "softplus"}),
    **{name: (functional.noised_topk_loss, {}) for name in ("link", "margin", "a tensor as margin", "rank_weights")},
    **{name: (functional.noised_topk_loss, {}) for name in ("exclude_target", "offset", "weight")},
}


@pytest.mark.parametrize("name", ANEW)
def test_what_recompiles(name):
    """As the table of torch.md says; for epsilon at least one more graph for each value."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function, more = FUNCTIONS.get(name, (functional.bal_noised_topk_loss, {}))
    compiled = torch.compile(lambda options: function(**options), backend=counter, fullgraph=True)
    values, expected = ANEW[name]
    counts = []
    for value in values:
        options = {"input": torch.ones(6, 300), "k": 5} | more | {name.split()[-1]: value}
        options.setdefault("target", torch.zeros(len(options["input"]), dtype=torch.int64))
        compiled(options)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == expected or (expected is None and counts[0] < counts[1] < counts[2]), counts


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("seed", (1, 2, 3), [1, 2, 3]),
        ("rank_weights", ((1.0,), (2.0,), (3.0,)), [1, 2, 3]),
        ("scale", (1.0, 2.0, 3.0), [1, 2, 2]),
    ],
)
def test_what_an_attribute_of_a_module_recompiles(name, values, expected):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    criterion = NoisedTopKLoss((5,))
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    counts = []
    for value in values:
        setattr(criterion, name, value)
        compiled(torch.ones(6, 300), torch.zeros(6, dtype=torch.int64))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts == expected
