"""Contract under test: the losses inside PyTorch's systems, and the shapes and edges a user of its losses expects."""

import copy
import gc
import os
import pickle
import shutil
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from testing import BACKENDS, INF, NAN, randn
from topk_fast import (
    BalNoisedTopK,
    ImbalNoisedTopK,
    LinearHead,
    NoisedTopK,
    NoisedTopKLoss,
    NormedLinear,
    SampledCrossEntropy,
    ops,
)
from topk_fast.functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    linear_noised_topk_loss,
    noised_topk,
    noised_topk_candidates,
    noised_topk_loss,
    sampled_cross_entropy,
)
from topk_fast.request import Labels, Noise, Place, Slice

N, L, K = 6, 300, 5

pytestmark = pytest.mark.slow  # most of them compile
MARGINS = torch.linspace(0.1, 1.0, L)

# As function(scores, target, **options), so that one test serves all of them.
FUNCTIONS = {
    "value": lambda x, y, **more: noised_topk(x, K, **more).mean(),
    "balanced": lambda x, y, **more: bal_noised_topk_loss(x, y, K, **more),
    "imbalanced": lambda x, y, **more: imbal_noised_topk_loss(x, y, K, MARGINS, 0.5, 3.0, **more),
    "family": lambda x, y, **more: noised_topk_loss(x, y, (1, K), **FAMILY, **more),
    "sampled": lambda x, y, n_sample=6, **more: sampled_cross_entropy(x, y, n_sample, **more),
}
FAMILY = dict(link="softplus", margin=MARGINS, rank_weights=(1.0, 0.5))
LOSSES = ["balanced", "imbalanced", "family", "sampled"]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def compiler():
    """A backend of torch.compile without code generation, which counts the graphs it is given."""
    from torch._dynamo.testing import CompileCounterWithBackend  # here, for DDP's processes import this file as well

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def batch(n_rows=N, n_classes=L, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_rows, n_classes, generator=generator)
    return scores, torch.randint(n_classes, (n_rows,), generator=generator)


def value_and_grad(function, x, *args, **more):
    x = x.detach().clone().requires_grad_()
    out = function(x, *args, **more)
    out.sum().backward()
    return out.detach(), x.grad


def assert_same(given, expected):
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)


# Ops, fake kernels and torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_backend
def test_opcheck(backend, dtype):
    def check(op, *args):
        torch.library.opcheck(ops.kernel(op, backend), args)

    scores, target = batch(3, 150)
    scores, wide = scores.to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    target[1] = -100
    wanted = Noise(torch.tensor(3), [K + 1], 1.0, None, n_sample=4, law=0, dense=False)
    schedule = torch.tensor(0.5, dtype=torch.float64)
    for noise in (wanted, wanted._replace(law=1, dense=True), wanted._replace(ranks=[2, K], schedule=schedule)):
        check("candidates", scores, *noise, *Place(2, 1000))
        for labels in (Labels(target), Labels(target, exclude_target=True), Labels(None)):
            check("excess", scores, *noise, *labels)
            excess, classes = ops.kernel("excess", backend)(scores, *noise, *labels)
            check("gradient", torch.ones_like(excess), classes, *labels[:2], *Slice(0, 150, dtype))
            assert excess.dtype == wide


@every_backend
def test_opcheck_of_strided_and_empty_scores(backend):
    op = ops.kernel("excess", backend)
    for scores in (randn(90, 4).t(), randn(4, 180)[:, :90], randn(0, 90), randn(1, 90), randn(1, 90).expand(4, 90)):
        for n_sample in (1, 4):
            wanted = Noise(torch.tensor(1), [2], 1.0, None, n_sample, law=0, dense=False)
            torch.library.opcheck(op, (scores, *wanted, *Labels(None)))


@every_function
@every_backend
def test_one_graph_for_all_seed_tensors(compiler, name, backend):
    def run(x, y, seed):
        return FUNCTIONS[name](x, y, seed=seed, backend=backend)

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    x, y = batch()
    for seed in (0, 1, -5, 2**63 - 1):
        seed = torch.tensor(seed)
        assert_same(value_and_grad(compiled, x, y, seed), value_and_grad(run, x, y, seed))
    assert compiler.frame_count == 1


@every_function
@every_backend
def test_one_graph_for_all_draws_of_the_seed(compiler, name, backend):
    def run(x, y):
        return FUNCTIONS[name](x, y, backend=backend)

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    x, y = batch()
    torch.manual_seed(0)
    given = [value_and_grad(compiled, x, y) for _ in range(4)]
    torch.manual_seed(0)
    expected = [value_and_grad(run, x, y) for _ in range(4)]
    assert_same(given, expected)
    assert len({value.item() for value, _ in given}) == 4
    assert compiler.frame_count == 1


@every_backend
def test_compiled_modules(compiler, backend):
    """A training step: model and criterion in one graph, seeds drawn inside."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), NormedLinear(16, L))
    criteria = [
        BalNoisedTopK(K, 1.0, backend=backend),
        ImbalNoisedTopK(K, 0.1, max_m=0.3, cls_num_list=range(1, L + 1), backend=backend),
    ]
    features, y = randn(N, 8), batch()[1]

    def step(x, y):
        return criteria[0](model(x), y) + criteria[1](model(x), y) + NoisedTopK(3, backend=backend)(model(x)).mean()

    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    results = []
    for function in (compiled, step):
        torch.manual_seed(4)
        model.zero_grad()
        out = function(features, y)
        out.backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    assert_same(results[0], results[1])
    assert compiler.frame_count == 1


def test_compile_with_a_plain_int_seed(compiler):
    compiled = torch.compile(bal_noised_topk_loss, backend=compiler, fullgraph=True)
    x, y = batch()
    for seed in (3, -1, 2**63 + 9, 2**64 - 1):
        assert_same(compiled(x, y, K, seed=seed), bal_noised_topk_loss(x, y, K, seed=seed))


@every_backend
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_compile_with_a_dynamic_batch(compiler, backend, reduction):
    def run(x, y, seed):
        return bal_noised_topk_loss(x, y, K, reduction=reduction, seed=seed, backend=backend)

    compiled = torch.compile(run, backend=compiler, fullgraph=True, dynamic=True)
    seed, graphs = torch.tensor(7), []
    for n_rows, n_classes in ((6, 300), (17, 300), (33, 301), (2, 1000)):
        x, y = batch(n_rows, n_classes)
        assert_same(value_and_grad(compiled, x, y, seed), value_and_grad(run, x, y, seed))
        graphs.append(compiler.frame_count)
    assert graphs == graphs[:1] * 4, "compiled anew for another shape"


@every_backend
@pytest.mark.parametrize("name", ["epsilon", "scale"])
def test_compile_with_a_schedule(compiler, backend, name):
    """A float that changes between calls becomes symbolic in the second one; checks must not break the graph then."""

    def run(x, y, seed, value):
        more = {"epsilon": 1.0, "scale": 1.0} | {name: value}
        return imbal_noised_topk_loss(x, y, K, MARGINS, seed=seed, backend=backend, **more)

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    x, y = batch()
    for value in (1.0, 0.5, 0.25):
        assert_same(compiled(x, y, torch.tensor(1), value), run(x, y, torch.tensor(1), value))


@every_backend
def test_compile_with_a_marked_batch_dimension(compiler, backend):
    def run(x, y, seed):
        return bal_noised_topk_loss(x, y, K, seed=seed, backend=backend) + noised_topk(x, K, seed=seed).sum()

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for n_rows in (5, 9, 64):
        x, y = batch(n_rows)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        assert_same(compiled(x, y, torch.tensor(1)), run(x, y, torch.tensor(1)))
    assert compiler.frame_count == 1


@every_loss
@every_backend
def test_a_wrong_label_in_compiled_code(compiler, name, backend):
    """The error of eager mode, and the value of the label, which no graph knows."""
    compiled = torch.compile(
        lambda x, y: FUNCTIONS[name](x, y, seed=1, backend=backend), backend=compiler, fullgraph=True
    )
    x, y = batch()
    assert_same(compiled(x, y), FUNCTIONS[name](x, y, seed=1, backend=backend))
    for label in (L, -1, 2**40):
        y[2] = label
        with pytest.raises(IndexError, match=rf"target must be in \[0, L - 1\] = \[0, 299\] .* got {label}"):
            compiled(x, y)
    assert compiler.frame_count == 1


@pytest.mark.parametrize("form", ["logits", "head"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_full_graph_of_rows_whose_number_depends_on_data(form):
    """As of the tokens that are no padding, or of a detector's boxes."""
    torch._dynamo.reset()
    head, (x, y) = LinearHead(8, L, SampledCrossEntropy(6, seed=1)), (randn(N, 8).requires_grad_(), batch()[1])

    def step(x, y, mask):
        return head(x[mask], y[mask]) if form == "head" else head.criterion(head.logits(x[mask]), y[mask])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for n_rows in (N - 1, 2):
        mask, leaves = torch.arange(N) < n_rows, (x, *head.parameters())
        given, expected = (run(x, y, mask) for run in (compiled, step))
        torch.testing.assert_close(given, expected)
        torch.testing.assert_close(torch.autograd.grad(given, leaves), torch.autograd.grad(expected, leaves))
    torch._dynamo.reset()


class Exported(nn.Module):
    """A model that returns its loss, as a training step that is exported does."""

    def __init__(self, form, **more):
        super().__init__()
        self.trunk = nn.Linear(8, 16)
        if form == "linear":
            sparse = more.pop("sparse_grad", False)
            self.head, self.criterion = None, LinearHead(16, L, BalNoisedTopK(K, 0.5, **more), sparse_grad=sparse)
        elif form == "linear sampled":
            self.head, self.criterion = None, LinearHead(16, L, SampledCrossEntropy(6, offset=-MARGINS, **more))
        elif form == "linear imbalanced":
            criterion = ImbalNoisedTopK(K, 0.1, 0.3, range(1, L + 1), **more)
            self.head, self.criterion = None, LinearHead(16, L, criterion, bias=False, normalize=True)
        else:
            self.head, self.criterion = nn.Linear(16, L), MODULES[form](**more)

    def forward(self, x, y):
        x = self.trunk(x).relu()
        if self.head is None:
            return self.criterion(x, y)
        return call(self.criterion, self.head(x), y).sum()


def test_an_exported_graph_makes_sparse_gradients():
    torch.manual_seed(0)
    model = Exported("linear", sparse_grad=True, seed=1)
    x, y = randn(N, 8), batch()[1]
    graph = torch.export.export(model, (x, y)).module()
    model(x, y).backward()
    graph(x, y).backward()
    given, expected = graph.criterion.weight.grad, model.criterion.weight.grad
    assert given.is_sparse
    assert_same(given.to_dense(), expected.to_dense())


@pytest.mark.parametrize("form", ["value", *LOSSES, "linear", "linear imbalanced", "linear sampled"])
@every_backend
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_an_exported_graph_trains(form, backend, strict):
    """Loss, gradients and labels' errors of a graph from torch.export are the module's; its noise is fresh in every
    call.
    """
    torch.manual_seed(0)
    model = Exported(form, backend=backend)
    x, y = randn(N, 8), batch()[1]
    program = torch.export.export(model, (x, y), strict=strict)
    graph = program.module()
    results = []
    for module in (model, graph):
        torch.manual_seed(1)
        losses = [module(x, y) for _ in range(2)]
        assert losses[0] != losses[1]
        sum(losses).backward()
        results.append(([loss.detach() for loss in losses], {k: p.grad for k, p in module.named_parameters()}))
    assert_same(results[1], results[0])
    assert all(g.any() for g in results[0][1].values())
    if form != "value":
        with pytest.raises(IndexError, match="target must be in .* got 300"):
            graph(x, y.clone().fill_(L))


class Guesses(nn.Module):
    """A head that is exported to predict, and one that measures."""

    def __init__(self, measure):
        super().__init__()
        self.head, self.measure = LinearHead(8, L, SampledCrossEntropy(6, seed=1)), measure

    def forward(self, x, y):
        return self.head(x, y, return_hits=(1, 5))[1] if self.measure else self.head.topk(x, 5)[1]


@pytest.mark.parametrize("measure", [True, False], ids=["hits", "topk"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_an_exported_head_takes_any_number_of_rows(measure, strict):
    model, (x, y) = Guesses(measure), (randn(N, 8), batch()[1])
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, (x, y), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    for n_rows in (2, N - 1):
        given = program.module()(x[:n_rows], y[:n_rows])
        assert_same(given.to(torch.uint8), model(x[:n_rows], y[:n_rows]).to(torch.uint8))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler on CPU")
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_inductor(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def run(x, y, seed):
        return imbal_noised_topk_loss(x.relu() * 1.5, y, K, MARGINS, 0.5, seed=seed, backend=backend)

    compiled = torch.compile(run, fullgraph=True)
    x, y = batch()
    for seed in (torch.tensor(1), torch.tensor(-2)):
        torch.testing.assert_close(value_and_grad(compiled, x, y, seed), value_and_grad(run, x, y, seed))
    torch._dynamo.reset()


@every_loss
def test_meta_scores_give_meta_losses(name):
    x, y = (
        torch.empty(N, L, device="meta", dtype=torch.bfloat16, requires_grad=True),
        torch.empty(N, device="meta").long(),
    )
    margins = MARGINS.to("meta")
    out = bal_noised_topk_loss(x, y, K) if name == "balanced" else imbal_noised_topk_loss(x, y, K, margins, 1.0)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.float32, ())
    out.backward()
    assert (x.grad.device.type, x.grad.dtype, x.grad.shape) == ("meta", torch.bfloat16, (N, L))
    assert noised_topk(torch.empty(2, 3, 4, device="meta"), 1, dim=1).shape == (2, 4)


@pytest.mark.parametrize("fused", [True, False])
def test_meta_heads_give_meta_losses(fused):
    x = torch.empty(N, 8, device="meta", requires_grad=True)
    if fused:
        head = LinearHead(8, L, BalNoisedTopK(K, 1.0), device="meta")
        out = head(x, torch.empty(N, device="meta").long())
    else:
        head = NormedLinear(8, L, device="meta")
        out = head(x)
    assert (out.device.type, out.dtype) == ("meta", torch.float32)
    out.sum().backward()
    assert (x.grad.device.type, x.grad.shape) == ("meta", (N, 8)) and head.weight.grad.shape == (L, 8)


# Autograd


@every_loss
@every_backend
def test_autocast_takes_logits_as_the_linear_layer_makes_them(name, backend):
    torch.manual_seed(0)
    layer, features = nn.Linear(16, L), randn(N, 16)
    y = batch()[1]
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(features)
        loss = FUNCTIONS[name](logits, y, seed=1, backend=backend)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_same(loss, FUNCTIONS[name](logits.float(), y, seed=1, backend=backend))
    loss.backward()
    _, grad = value_and_grad(lambda x: FUNCTIONS[name](x, y, seed=1, backend=backend), logits)
    assert grad.dtype == torch.bfloat16
    expected = (grad.t() @ features.to(torch.bfloat16)).float()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=2**-7, atol=2**-9)  # one bfloat16 rounding of a sum


@every_function
@every_backend
def test_func_grad(name, backend):
    x, y = batch()
    run = lambda x: FUNCTIONS[name](x, y, seed=2, backend=backend)  # noqa: E731
    assert_same(torch.func.grad(run)(x), value_and_grad(run, x)[1])
    grad, value = torch.func.grad_and_value(run)(x)
    assert_same((value, grad), value_and_grad(run, x))
    _, pullback = torch.func.vjp(run, x)
    assert_same(pullback(torch.tensor(1.0))[0], value_and_grad(run, x)[1])


@every_backend
def test_functional_call(backend):
    torch.manual_seed(0)
    layer, features, y = nn.Linear(16, L), randn(N, 16), batch()[1]
    criterion = BalNoisedTopK(K, 1.0, seed=3, backend=backend)

    def run(parameters):
        return criterion(torch.func.functional_call(layer, parameters, (features,)), y)

    grads = torch.func.grad(run)(dict(layer.named_parameters()))
    criterion(layer(features), y).backward()
    assert_same(grads, {key: p.grad for key, p in layer.named_parameters()})


@every_function
@every_backend
def test_deterministic_algorithms(name, backend):
    x, y = batch()
    y[0] = y[1]
    run = lambda x: FUNCTIONS[name](x, y, seed=2, n_sample=9, backend=backend)  # noqa: E731
    expected = value_and_grad(run, x)
    torch.use_deterministic_algorithms(True)  # it fills torch.empty with NaN as well
    try:
        for _ in range(3):
            assert_same(value_and_grad(run, x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@every_function
@every_backend
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoint_draws_the_same_noise_again(name, backend, reentrant):
    x, y = batch()
    run = lambda x: FUNCTIONS[name](x * 2, y, backend=backend)  # noqa: E731
    torch.manual_seed(5)
    expected = value_and_grad(run, x)
    torch.manual_seed(5)
    given = value_and_grad(lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant), x)
    assert_same(given, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "linear"])
def test_a_generator_inside_of_a_checkpoint(name, reentrant):
    """Its state is not restored for the second forward, so that the gradient would belong to other noise than the
    loss.
    """
    x, y = batch()
    weight = randn(L, L, seed=1)
    functions = FUNCTIONS | {
        "linear": lambda x, y, **more: linear_noised_topk_loss(x, weight, y, k=K, epsilon=1.0, **more)
    }
    generator = torch.Generator().manual_seed(1)

    def checkpointed(**source):
        run = lambda x: functions[name](x * 2, y, **source)  # noqa: E731
        return lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)

    with pytest.raises(RuntimeError, match="a generator inside of torch.utils.checkpoint would draw other noise"):
        value_and_grad(checkpointed(generator=generator), x)
    seed = torch.randint(2**62, (), generator=generator)  # what the error says to do
    plain = value_and_grad(lambda x: functions[name](x * 2, y, seed=seed), x)
    assert_same(value_and_grad(checkpointed(seed=seed), x), plain)


@every_function
@every_backend
@pytest.mark.parametrize("n_sample", [1, 5, 33])
def test_autograd_saves_no_matrix(name, backend, n_sample):
    """At most the class ids, the results and the labels: 8 (B + 2) bytes a row, whatever L and k are."""
    n_rows, n_classes, storages = 10, 5000, {}
    x, y = batch(n_rows, n_classes)
    x.requires_grad_()
    margins = torch.ones(n_classes)

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    more = dict(n_sample=n_sample, seed=1, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if name == "value":
            noised_topk(x, 100, **more).sum()
        elif name == "balanced":
            bal_noised_topk_loss(x, y, 100, **more)
        else:
            imbal_noised_topk_loss(x, y, 100, margins, 0.5, **more)
    assert sum(storages.values()) <= 8 * n_rows * (n_sample + 2) + 64


@every_function
@every_backend
def test_the_graph_does_not_hold_the_logits(name, backend):
    leaf, y = batch()
    logits = leaf.requires_grad_() + 1.0
    alive = weakref.ref(logits)
    out = FUNCTIONS[name](logits, y, seed=1, backend=backend)
    del logits
    gc.collect()
    assert alive() is None
    out.backward()


@every_function
@every_backend
def test_backward_twice(name, backend):
    x, y = batch()
    x.requires_grad_()
    out = FUNCTIONS[name](x, y, seed=1, backend=backend)
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert_same(second, first)


@every_function
@every_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(name, backend, mode):
    x, y = batch()
    expected = value_and_grad(FUNCTIONS[name], x, y, seed=1, backend=backend)[0]
    with mode():
        out = FUNCTIONS[name](x.requires_grad_(), y, seed=1, backend=backend)
        drawn = FUNCTIONS[name](x, y, backend=backend)
    assert not out.requires_grad and not drawn.requires_grad
    assert_same(out.clone(), expected)


@every_backend
def test_candidates_have_no_gradient(backend):
    values, classes = noised_topk_candidates(batch()[0].requires_grad_(), K, backend=backend)
    assert not values.requires_grad and not classes.requires_grad


def test_inputs_stay_as_they_are():
    x, y = batch()
    before, version = x.clone(), (x._version, y._version)
    for backend in BACKENDS:
        for function in FUNCTIONS.values():
            value_and_grad(function, x, y, backend=backend)
    assert_same(x, before)
    assert version == (x._version, y._version)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the reference's allocations fail in torch's own words")
def test_an_allocation_that_fails_speaks_of_memory():
    """A gradient of 2^53 bytes, more than the address space has."""
    n_rows, n_classes = 2**20, 2**31 - 1
    one, ids = torch.ones(1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=rf"a tensor of shape \[{n_rows}, {n_classes}\] cannot be allocated: .*memory"
    ):
        torch.ops.topk_fast.gradient_cpp(
            one.expand(n_rows, 1), ids.expand(n_rows, 1, 1), None, -100, 0, n_classes, torch.float32
        )


# Processes and copies


def _train_one_step(rank, world, backend, store, out):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # both are here: no look-up of the machine's name
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, L))
    features, y = randn(N, 8, seed=rank), batch(seed=rank)[1]
    BalNoisedTopK(K, 1.0, seed=10 + rank, backend=backend)(model(features), y).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], out)
    torch.distributed.barrier()  # neither leaves while the other still talks to it
    torch.distributed.destroy_process_group()
    # A thread of gloo may still free its last work, which needs Python's lock: an orderly end would race with it and
    # abort.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
def test_ddp_averages_the_gradients(tmp_path):
    backend, out = BACKENDS[0], tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(_train_one_step, (2, backend, tmp_path / "store", out), nprocs=2)
    torch.manual_seed(0)
    model = nn.Linear(8, L)
    for rank in range(2):
        features, y = randn(N, 8, seed=rank), batch(seed=rank)[1]
        (BalNoisedTopK(K, 1.0, seed=10 + rank, backend=backend)(model(features), y) / 2).backward()
    torch.testing.assert_close(torch.load(out), [p.grad for p in model.parameters()])


MODULES = {
    "value": lambda **more: NoisedTopK(3, 0.7, 6, 0, **more),
    "balanced": lambda **more: BalNoisedTopK(3, 0.7, 6, reduction="sum", ignore_index=1, **more),
    "imbalanced": lambda **more: ImbalNoisedTopK(
        3, 0.7, 0.3, range(1, L + 1), 20, 6, reduction="sum", ignore_index=1, **more
    ),
    "family": lambda **more: NoisedTopKLoss((1, K), reduction="sum", ignore_index=1, **FAMILY, **more),
    "sampled": lambda **more: SampledCrossEntropy(6, offset=-MARGINS, reduction="sum", ignore_index=1, **more),
}


def call(module, x, y):
    return module(x) if isinstance(module, NoisedTopK) else module(x, y)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("source", [dict(seed=4), dict(seed=torch.tensor(-4)), {}], ids=["int", "tensor", "drawn"])
def test_copies_of_modules(name, duplicate, source):
    module = MODULES[name](**source)
    twin = duplicate(module)
    x, y = batch()
    torch.manual_seed(0)
    expected = call(module, x, y)
    torch.manual_seed(0)
    assert_same(call(twin, x, y), expected)
    assert repr(twin) == repr(module) and twin.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_generators_go_on_where_they_stood(name):
    module = MODULES[name](generator=torch.Generator().manual_seed(1))
    x, y = batch()
    call(module, x, y)
    twin = copy.deepcopy(module)
    assert_same(call(twin, x, y), call(module, x, y))


def test_margins_travel_with_the_module(tmp_path):
    module = MODULES["imbalanced"](seed=1)
    assert list(module.state_dict()) == ["m_list"]
    other = ImbalNoisedTopK(3, 0.7, 0.9, [7] * L, 20, 6, reduction="sum", ignore_index=1, seed=1)
    other.load_state_dict(module.state_dict())
    x, y = batch()
    assert_same(other(x, y), module(x, y))
    assert module.double()(x.double(), y).dtype == torch.float64
    assert module.to(torch.bfloat16)(x.to(torch.bfloat16), y).dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_leave_margins_exact(cast):
    module = nn.Sequential(nn.Linear(8, L), MODULES["imbalanced"](seed=1))
    exact = module[1].m_list.clone()
    getattr(module, cast)()
    assert module[0].weight.dtype != torch.float32
    assert_same(module[1].m_list, exact)
    x, y = batch()
    x = x.to(module[0].weight.dtype)
    expected = imbal_noised_topk_loss(x, y, 3, exact, 0.7, 20, 6, reduction="sum", ignore_index=1, seed=1)
    assert_same(module[1](x, y), expected)
    assert_same(copy.deepcopy(module)[1].m_list, exact)
    assert module.to("meta")[1].m_list.is_meta


FROM_META = {
    "imbalanced": MODULES["imbalanced"],
    "head": lambda **more: LinearHead(8, L, BalNoisedTopK(3, 0.7), **more),
    "cosine head": lambda **more: LinearHead(8, L, MODULES["imbalanced"](), bias=False, normalize=True, **more),
    "cosine layer": lambda **more: NormedLinear(8, L),
}


@pytest.mark.parametrize("name", FROM_META)
def test_from_the_meta_device(name):
    """The usual way of large models: made without memory, given some, filled by reset_parameters."""
    with torch.device("meta"):
        module = FROM_META[name]()
    assert all(t.is_meta for t in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for t in module.state_dict().values():
            t.fill_(NAN)
    torch.manual_seed(2)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    torch.manual_seed(2)
    expected = FROM_META[name]()
    for key, t in module.state_dict().items():
        assert_same(t, expected.state_dict()[key])


@pytest.mark.parametrize("name", FROM_META)
def test_modules_under_fake_tensors_and_empty_weights(name):
    from accelerate import init_empty_weights
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = FROM_META[name]()
    with init_empty_weights(include_buffers=True):
        empty = FROM_META[name]()
    shapes = {key: t.shape for key, t in FROM_META[name]().state_dict().items()}
    assert {key: t.shape for key, t in fake.state_dict().items()} == shapes
    assert {key: t.shape for key, t in empty.state_dict().items()} == shapes
    assert all(t.is_meta for t in empty.state_dict().values())


def test_margins_on_other_devices_than_the_default():
    with torch.device("meta"):
        assert class_margins([1, 2], 0.3).is_meta
        assert not class_margins(torch.tensor([1, 2], device="cpu"), 0.3).is_meta
    with pytest.raises(ValueError, match="cls_num_list must hold numbers, got a tensor on the meta device"):
        class_margins(torch.ones(3, device="meta"), 0.3)


REPRS = [
    (lambda: NoisedTopK(3), "NoisedTopK(k=3)"),
    (lambda: NoisedTopK(3, 0.5, dim=0, sampler="dense"), "NoisedTopK(k=3, epsilon=0.5, dim=0, sampler='dense')"),
    (lambda: BalNoisedTopK(5, 1.0), "BalNoisedTopK(k=5, epsilon=1.0)"),
    (
        lambda: BalNoisedTopK(5, 1, 7, reduction="sum", ignore_index=-1, seed=3, backend="torch"),
        "BalNoisedTopK(k=5, epsilon=1, n_sample=7, reduction='sum', ignore_index=-1, seed=3, backend='torch')",
    ),
    (
        lambda: ImbalNoisedTopK(1, 0.1, 0.3, [5, 2, 1], scale=20),
        "ImbalNoisedTopK(k=1, epsilon=0.1, max_m=0.3, cls_num_list=<3 classes>, scale=20)",
    ),
    (
        lambda: LinearHead(8, 50, SampledCrossEntropy(seed=torch.tensor(3)), bias=False, sparse_grad=True),
        "LinearHead(\n  in_features=8, n_classes=50, bias=False, sparse_grad=True\n"
        "  (criterion): SampledCrossEntropy(seed=tensor(3))\n)",
    ),
    (
        lambda: NoisedTopKLoss((1, 2), margin=torch.ones(3), weight=torch.ones(3), link="softplus"),
        "NoisedTopKLoss(k=(1, 2), link='softplus', margin=<3 classes>, weight=<3 classes>)",
    ),
    (
        lambda: NoisedTopKLoss(3, epsilon=torch.tensor(0.5)).to("meta"),
        "NoisedTopKLoss(k=3, epsilon=tensor(..., device='meta', size=()))",
    ),
    (lambda: NormedLinear(4, 3), "NormedLinear(in_features=4, out_features=3)"),
]


@pytest.mark.parametrize("make, expected", REPRS, ids=lambda x: x if isinstance(x, str) else "")
def test_repr_shows_what_is_not_the_default(make, expected):
    assert repr(make()) == expected


def test_repr_of_a_subclass_with_arguments_of_its_own():
    class Weighted(SampledCrossEntropy):
        def __init__(self, frequencies, *args, config=None, **others):
            super().__init__(*args, **others)
            self.frequencies = frequencies

    assert repr(Weighted(torch.ones(3).numpy(), 4)) == "Weighted(frequencies=array([1., 1., 1.], dtype=float32))"


def test_tensors_among_the_arguments_move_with_a_module():
    """Also those that replace a number after the module was made; numbers may replace tensors as well."""
    loss = NoisedTopKLoss(k=2, seed=torch.tensor(3))
    loss.epsilon, loss.margin, loss.weight = torch.tensor(0.5), torch.rand(9), torch.ones(9)
    assert loss.state_dict().keys() == {"margin", "weight"}
    loss.to("meta")
    assert all(x.is_meta for x in (loss.epsilon, loss.margin, loss.weight, loss.seed))
    assert loss(torch.randn(4, 9, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")).is_meta
    loss.epsilon, loss.margin, loss.weight, loss.seed = nn.Parameter(torch.tensor(0.5)), 0.5, None, 4
    assert [name for name, _ in loss.named_parameters()] == ["epsilon"] and not loss.state_dict().keys() - {"epsilon"}
    loss.epsilon = 1
    assert repr(loss) == "NoisedTopKLoss(k=2, margin=0.5, seed=4)" and not list(loss.parameters())
    del loss.weight
    loss.weight = None
    assert "weight" in dict(loss._buffers)
    x, y = batch()
    assert loss(x, y) == NoisedTopKLoss(k=2, margin=0.5, seed=4)(x, y)


def test_a_tensor_as_seed_is_no_buffer_and_keeps_its_value():
    """DistributedDataParallel makes buffers equal on all ranks, whose noise must differ."""
    loss = NoisedTopKLoss(k=2, seed=torch.tensor(3), epsilon=torch.tensor(0.3)).half()
    assert [name for name, _ in loss.named_buffers()] == ["epsilon"] and loss.epsilon.dtype == torch.float32
    assert loss.to_empty(device="cpu").seed == 3
    smoothed = NoisedTopK(2, torch.tensor(0.3)).half()
    assert smoothed.epsilon.dtype == torch.float32


def test_a_parametrized_epsilon():
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    loss = NoisedTopKLoss(k=2, epsilon=nn.Parameter(torch.tensor(0.0)), seed=1)
    nn.utils.parametrize.register_parametrization(loss, "epsilon", Exponential())
    x, y = batch()
    assert loss(x, y).detach() == NoisedTopKLoss(k=2, epsilon=1.0, seed=1)(x, y)


def test_export_with_any_number_of_classes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = BalNoisedTopK(2, 1.0, seed=1)

        def forward(self, x, y):
            return self.criterion(x, y)

    x, y = batch()
    shapes = {"x": {1: torch.export.Dim("n_classes", min=10)}, "y": None}
    program = torch.export.export(Model(), (x, y), dynamic_shapes=shapes)
    for n in (L, L + 7):
        scores = randn(len(y), n)
        assert program.module()(scores, y) == Model()(scores, y)


def test_cosine_logits_in_a_symbolic_trace():
    model = nn.Sequential(nn.Linear(4, 8), NormedLinear(8, 5))
    x = torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_criterion_is_checked_in_every_call():
    head = LinearHead(8, 50, SampledCrossEntropy(seed=1))
    x, y = torch.randn(4, 8), torch.arange(4)
    before = head(x, y)
    head.criterion = nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="criterion must be a loss module of topk_fast, .* got CrossEntropyLoss"):
        head(x, y)
    head.criterion = SampledCrossEntropy(seed=1)
    assert head(x, y) == before


# Where the noise comes from


@pytest.mark.parametrize("name", MODULES)
@every_backend
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_manual_seed_makes_calls_reproducible(name, backend, training):
    module = MODULES[name](backend=backend).train(training)
    x, y = batch()
    torch.manual_seed(3)
    first = [call(module, x, y) for _ in range(3)]
    torch.manual_seed(3)
    again = [call(module, x, y) for _ in range(3)]
    assert_same(again, first)
    assert len({out.sum().item() for out in first}) == 3, "fresh noise in every call, in eval mode too"


@pytest.mark.parametrize("name", MODULES)
@every_backend
def test_a_generator_is_the_only_source(name, backend):
    generator = torch.Generator().manual_seed(3)
    module = MODULES[name](backend=backend, generator=generator)
    x, y = batch()
    before = torch.get_rng_state()
    first = [call(module, x, y) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(3)
    torch.manual_seed(99)
    assert_same([call(module, x, y) for _ in range(3)], first)
    assert len({out.sum().item() for out in first}) == 3


@every_function
def test_a_fixed_seed_leaves_the_default_generator_alone(name):
    x, y = batch()
    before = torch.get_rng_state()
    FUNCTIONS[name](x, y, seed=1)
    FUNCTIONS[name](x, y, seed=torch.tensor(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_have_their_own_noise():
    tops = noised_topk(torch.zeros(1000, 50), 1, n_sample=1, seed=0)
    assert len(tops.unique()) > 990


# Shapes, reductions, edges: as torch.nn.functional.cross_entropy where it knows them


SHAPES = [(N, L), (1, L), (0, L), (L,), (2, L, 3), (2, L, 3, 4), (2, L, 0), (0, L, 3)]


@every_loss
@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_are_those_of_cross_entropy(name, backend, shape, reduction):
    x = randn(*shape).requires_grad_()
    y = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    out = FUNCTIONS[name](x, y, seed=1, reduction=reduction, backend=backend)
    expected = F.cross_entropy(x, y, reduction=reduction)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(out.isnan(), expected.isnan()), "the mean over no rows is NaN"
    if not y.numel() and reduction == "sum":
        assert out == 0
    out.sum().backward()
    assert x.grad.shape == x.shape


@every_loss
@every_backend
def test_more_dimensions_equal_the_flattened_call(name, backend):
    x = randn(2, L, 3, 4)
    y = torch.arange(24).view(2, 3, 4)
    run = lambda x, y: FUNCTIONS[name](x, y, seed=1, reduction="none", backend=backend)  # noqa: E731
    losses, grad = value_and_grad(run, x, y)
    flat_losses, flat_grad = value_and_grad(run, x.movedim(1, -1).reshape(-1, L), y.flatten())
    assert_same(losses.flatten(), flat_losses)
    assert_same(grad.movedim(1, -1).reshape(-1, L), flat_grad)


@every_loss
@every_backend
def test_unbatched_equals_a_batch_of_one(name, backend):
    x, y = batch(1)
    run = lambda x, y: FUNCTIONS[name](x, y, seed=1, backend=backend)  # noqa: E731
    value, grad = value_and_grad(run, x[0], y[0])
    batched, batched_grad = value_and_grad(run, x, y)
    assert_same((value, grad), (batched, batched_grad[0]))


@every_backend
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_values_along_any_dimension(backend, dim):
    x = randn(4, 5, 6)
    value, grad = value_and_grad(noised_topk, x, 3, 1.0, 5, dim, seed=1, backend=backend)
    rows = x.movedim(dim, -1)
    flat, flat_grad = value_and_grad(noised_topk, rows.reshape(-1, rows.shape[-1]), 3, seed=1, backend=backend)
    assert_same(value.flatten(), flat)
    assert_same(grad.movedim(dim, -1).reshape(flat_grad.shape), flat_grad)
    assert value.shape == x.amax(dim).shape


@every_backend
def test_values_of_vectors_and_empty_batches(backend):
    x = randn(9)
    assert_same(noised_topk(x, 9, 0.0, 1, backend=backend), x.amin())
    assert noised_topk(x[None, :0], 1, dim=0, backend=backend).shape == (0,)
    value, grad = value_and_grad(noised_topk, torch.empty(0, 9), 2, backend=backend)
    assert value.shape == (0,) and grad.shape == (0, 9)


@every_loss
@every_backend
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, L + 5])
def test_ignored_rows(name, backend, ignore_index):
    """They have no loss and no gradient, count in no mean, and change no other row's noise."""
    x, y = batch(8)
    y.masked_fill_(y == ignore_index, 1)
    common = dict(seed=1, backend=backend, ignore_index=ignore_index)
    kept = torch.tensor([True, False, True, True, False, True, True, True])
    ignored = y.masked_fill(~kept, ignore_index)
    x[1] = NAN
    run = lambda x, y: FUNCTIONS[name](x, y, reduction="none", **common)  # noqa: E731
    whole, whole_grad = value_and_grad(run, x, y)
    losses, grad = value_and_grad(run, x, ignored)
    assert_same(losses, whole.where(kept, torch.zeros(8)))
    assert_same(grad, whole_grad.where(kept[:, None], torch.zeros(8, L)))
    assert_same(FUNCTIONS[name](x, ignored, reduction="sum", **common), losses.sum())
    assert_same(FUNCTIONS[name](x, ignored, **common), losses.sum() / 6)


@every_loss
@every_backend
def test_all_rows_ignored(name, backend):
    x, y = batch()
    y.fill_(-100)
    for reduction in ("mean", "sum", "none"):
        more = dict(seed=1, reduction=reduction, backend=backend)
        value, grad = value_and_grad(FUNCTIONS[name], x, y, **more)
        expected = F.cross_entropy(x, y, reduction=reduction)
        assert_same(value, expected)
        assert (grad == 0).all()


@every_loss
@every_backend
def test_mean_and_sum_are_torch_reductions_of_none(name, backend):
    x, y = batch(50)
    losses = FUNCTIONS[name](x, y, seed=1, reduction="none", backend=backend)
    assert_same(FUNCTIONS[name](x, y, seed=1, reduction="sum", backend=backend), losses.sum())
    assert_same(FUNCTIONS[name](x, y, seed=1, backend=backend), losses.sum() / 50)


@every_backend
@pytest.mark.parametrize("n_classes", [2, 3, 33, 200])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_largest_k(backend, n_rows, n_classes):
    """k = L - 1: the hinge compares with the smallest noised score, here by hand where there is no noise."""
    x, y = batch(n_rows, n_classes)
    losses = bal_noised_topk_loss(x, y, n_classes - 1, 0.0, 1, reduction="none", backend=backend)
    expected = ((1 + x.amin(1)) - x.gather(1, y[:, None])[:, 0]).relu()
    assert_same(losses, expected)
    assert_same(noised_topk(x, n_classes, 0.0, 1, backend=backend), x.amin(1))
    noisy, grad = value_and_grad(bal_noised_topk_loss, x, y, n_classes - 1, seed=1, backend=backend)
    assert noisy.isfinite() and grad.isfinite().all()


@every_loss
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nan_is_never_hidden(name, backend, dtype, reduction):
    """Not by the hinge, not by a target of the largest score, not by a reduction, wherever in the row it stands."""
    for at in (0, 1, 150, L - 1):
        x, y = batch(2)
        x, y = x.to(dtype), torch.tensor([5, 5])
        x[0, 5], x[0, at] = 1e4, NAN
        value, grad = value_and_grad(FUNCTIONS[name], x, y, seed=1, reduction=reduction, backend=backend)
        assert value.isnan().all() if reduction != "none" else value.isnan().tolist() == [True, False]
        assert grad[0].isnan().all() and not grad[1].isnan().any()


@every_loss
@every_backend
def test_nan_of_the_gradient_passes(name, backend):
    x, y = batch(2)
    x[:, :] = 0.0  # the hinge is open
    x.requires_grad_()
    out = FUNCTIONS[name](x, y, seed=1, reduction="none", backend=backend)
    out.backward(torch.tensor([NAN, 1.0]))
    assert x.grad[0].isnan().any() and not x.grad[1].isnan().any()


@every_backend
def test_masked_classes_take_no_part(backend):
    """-inf masks: the same loss as without these classes' columns, where there is no noise; no gradient there ever."""
    x, y = batch(8, 200)
    y %= 100
    masked = x.clone()
    masked[:, 100:] = -INF
    expected = bal_noised_topk_loss(x[:, :100], y, K, 0.0, backend=backend)
    assert_same(bal_noised_topk_loss(masked, y, K, 0.0, backend=backend), expected)
    for sampler in ("thinned", "dense"):
        _, grad = value_and_grad(bal_noised_topk_loss, masked, y, K, seed=1, sampler=sampler, backend=backend)
        assert grad.isfinite().all() and (grad[:, 100:] == 0).all()
