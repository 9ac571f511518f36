"""Contract under test: every bad input raises one clear error that says what was expected and what was given."""

import re

import numpy as np
import pytest
import torch

from testing import BACKENDS, INF, NAN
from topk_fast import (
    BalNoisedTopK,
    ImbalNoisedTopK,
    NoisedTopK,
    NoisedTopKLoss,
    build_info,
)
from topk_fast.functional import (
    bal_noised_topk_loss,
    class_margins,
    imbal_noised_topk_loss,
    noised_topk,
    noised_topk_candidates,
)

N, L, K = 4, 100, 5
X = torch.randn(N, L, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)
MARGINS = torch.linspace(0.1, 1.0, L)

# Every function with good arguments, of which a test replaces some.
CALLS = {
    "noised_topk": lambda x=X, k=K, epsilon=1.0, **more: noised_topk(x, k, epsilon, **more),
    "candidates": lambda x=X, k=K, epsilon=1.0, **more: noised_topk_candidates(x, k, epsilon, **more),
    "balanced": lambda x=X, k=K, epsilon=1.0, y=Y, **more: bal_noised_topk_loss(x, y, k, epsilon, **more),
    "imbalanced": lambda x=X, k=K, epsilon=1.0, y=Y, margins=MARGINS, **more: imbal_noised_topk_loss(
        x, y, k, margins, epsilon, **more
    ),
}
LOSSES = ["balanced", "imbalanced"]
every_function = pytest.mark.parametrize("function", CALLS)
every_loss = pytest.mark.parametrize("function", LOSSES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def raises(error, message):
    """Expects that error with exactly that text in its message."""
    return pytest.raises(error, match=re.escape(message))


def name_of_scores(function):
    """The argument's name, which the error must use."""
    return "scores" if function == "candidates" else "input"


@pytest.mark.parametrize("function", CALLS)
def test_the_good_arguments_are_good(function):
    CALLS[function]()


@every_function
@pytest.mark.parametrize("bad, kind", [([[1.0] * L] * N, "list"), (X.numpy(), "ndarray"), (None, "NoneType")])
def test_scores_that_are_no_tensor(function, bad, kind):
    with raises(TypeError, f"{name_of_scores(function)} must be a tensor, got {kind}"):
        CALLS[function](x=bad)


@every_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_scores_of_a_wrong_dtype(function, dtype):
    with raises(TypeError, f"{name_of_scores(function)} must be float32, float64, bfloat16 or float16, got {dtype}"):
        CALLS[function](x=torch.zeros(N, L).to(dtype))


@pytest.mark.parametrize("shape", [(), (L,), (N, L, 2)], ids=str)
def test_candidates_take_matrices(shape):
    with raises(ValueError, f"scores must be [N, L], got shape {list(shape)}"):
        noised_topk_candidates(torch.zeros(shape), 1)


def test_candidates_of_no_class():
    with raises(ValueError, "scores must have at least one class, got shape [4, 0]"):
        noised_topk_candidates(torch.zeros(4, 0), 1)


def test_a_value_of_a_scalar():
    with raises(ValueError, "input must have at least one dimension, got a tensor without dimensions"):
        noised_topk(torch.tensor(1.0), 1)


@every_loss
def test_a_loss_of_a_scalar(function):
    with raises(ValueError, "input must be [N, L], [L] or [N, L, d1, ...], got a tensor without dimensions"):
        CALLS[function](x=torch.tensor(1.0), y=torch.tensor(0))


@every_loss
@pytest.mark.parametrize("bad, kind", [([0, 1, 2, 3], "list"), (Y.numpy(), "ndarray"), (2, "int"), (None, "NoneType")])
def test_target_that_is_no_tensor(function, bad, kind):
    with raises(TypeError, f"target must be a tensor, got {kind}"):
        CALLS[function](y=bad)


@every_loss
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8], ids=str)
def test_target_of_a_wrong_dtype(function, dtype):
    with raises(TypeError, f"target must be int64, got {dtype}; pass target.long()"):
        CALLS[function](y=Y.to(dtype))


@every_loss
@pytest.mark.parametrize(
    "x_shape, y_shape, expected",
    [
        ((N, L), (N + 1,), [N]),
        ((N, L), (N, 1), [N]),
        ((N, L), (N, L), [N]),
        ((N, L), (), [N]),
        ((L,), (1,), []),
        ((N, L, 2), (N,), [N, 2]),
        ((N, L, 2, 3), (N, 3, 2), [N, 2, 3]),
        ((0, L), (1,), [0]),
    ],
    ids=["another batch", "a column", "one hot", "a scalar", "unbatched", "no d1", "d1 and d2 swapped", "empty batch"],
)
def test_target_of_a_wrong_shape(function, x_shape, y_shape, expected):
    message = f"target must have shape {expected} for input of shape {list(x_shape)}, got {list(y_shape)}"
    with raises(ValueError, message):
        CALLS[function](x=torch.zeros(x_shape), y=torch.zeros(y_shape, dtype=torch.int64))


@every_loss
@every_backend
@pytest.mark.parametrize("label", [L, L + 1, -1, -99, -101, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("shape", [(N, L), (N, L, 2), (L,)], ids=["matrix", "with d1", "unbatched"])
def test_label_out_of_range(function, backend, label, shape):
    y = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    y.view(-1)[-1] = label
    with raises(IndexError, f"target must be in [0, L - 1] = [0, {L - 1}] or ignore_index = -100, got {label}"):
        CALLS[function](x=torch.zeros(shape), y=y, backend=backend)


@every_loss
@every_backend
def test_another_ignore_index_makes_the_default_one_a_bad_label(function, backend):
    y = torch.tensor([0, 7, -100, 3])
    with raises(IndexError, "target must be in [0, L - 1] = [0, 99] or ignore_index = 7, got -100"):
        CALLS[function](y=y, ignore_index=7, backend=backend)


@every_loss
@pytest.mark.parametrize("bad, kind", [(None, "NoneType"), (1.5, "float"), ("mean", "str")])
def test_ignore_index_that_is_no_int(function, bad, kind):
    with raises(TypeError, f"ignore_index must be an int, got {kind}"):
        CALLS[function](ignore_index=bad)


@every_loss
@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1])
def test_ignore_index_that_no_label_can_have(function, bad):
    with pytest.raises(ValueError, match=rf"ignore_index must be in \[.*\], got {bad}"):
        CALLS[function](ignore_index=bad)


@every_loss
@pytest.mark.parametrize("k", [-1, L, 120])
def test_k_out_of_range_for_losses(function, k):
    with raises(ValueError, f"k must be in [0, L - 1] = [0, 99], got {k}"):
        CALLS[function](k=k)


@every_loss
@pytest.mark.parametrize(
    "n_classes, message",
    [(1, "k must be in [0, L - 1] = [0, 0], got 1"), (0, "input must have at least 1 class, got 0")],
)
def test_too_few_classes_for_a_loss(function, n_classes, message):
    more = {"margins": torch.ones(n_classes)} if function == "imbalanced" else {}
    with raises(ValueError, message):
        CALLS[function](x=torch.zeros(N, n_classes), k=1, **more)


@pytest.mark.parametrize("k", [0, -1, L + 1])
def test_k_out_of_range_for_values(k):
    with raises(ValueError, f"k must be in [1, L] = [1, 100], got {k}"):
        noised_topk(X, k)


def test_k_out_of_range_along_another_dimension():
    with raises(ValueError, "k must be in [1, L] = [1, 4], got 5"):
        noised_topk(X, 5, dim=0)


@pytest.mark.parametrize("k", [0, -1, 2**31])
def test_k_out_of_range_for_candidates(k):
    with raises(ValueError, f"k must be in [1, {2**31 - 1}], got {k}"):
        noised_topk_candidates(X, k)


@every_function
@pytest.mark.parametrize("name", ["k", "n_sample"])
@pytest.mark.parametrize(
    "bad, kind", [(5.0, "float"), (True, "bool"), ("5", "str"), (None, "NoneType"), (torch.tensor(5), "Tensor")]
)
def test_counts_that_are_no_int(function, name, bad, kind):
    with raises(TypeError, f"{name} must be an int, got {kind}"):
        CALLS[function](**{name: bad})


@every_function
@pytest.mark.parametrize("n_sample", [0, -3, 2**31])
def test_n_sample_out_of_range(function, n_sample):
    with raises(ValueError, f"n_sample must be in [1, {2**31 - 1}], got {n_sample}"):
        CALLS[function](n_sample=n_sample)


@every_function
@pytest.mark.parametrize(
    "epsilon, message",
    [(-0.1, "at least 0, got -0.1"), (NAN, "finite, got nan"), (INF, "finite, got inf"), (-INF, "finite, got -inf")],
)
def test_epsilon_out_of_range(function, epsilon, message):
    with raises(ValueError, f"epsilon must be {message}"):
        CALLS[function](epsilon=epsilon)


@every_function
@pytest.mark.parametrize(
    "bad, kind", [("1.0", "str"), (True, "bool"), (None, "NoneType"), (1j, "complex"), ([1], "list")]
)
def test_epsilon_that_is_no_number(function, bad, kind):
    with raises(TypeError, f"epsilon must be a number, got {kind}"):
        CALLS[function](epsilon=bad)


@pytest.mark.parametrize("bad, kind", [([1.0] * L, "list"), ("0.5", "str"), (None, "NoneType")])
def test_margins_that_are_no_tensor(bad, kind):
    with raises(TypeError, f"margin must be a number or a tensor [L], got {kind}; see class_margins"):
        CALLS["imbalanced"](margins=bad)


@pytest.mark.parametrize("shape", [(L - 1,), (L + 1,), (1,), (), (N, L)], ids=str)
def test_margins_of_a_wrong_shape(shape):
    with raises(ValueError, f"margins must have shape [L] = [100], got {list(shape)}"):
        CALLS["imbalanced"](margins=torch.ones(shape))


def test_margins_fit_the_classes_not_the_last_dimension():
    with raises(ValueError, "margins must have shape [L] = [3], got [100]"):
        CALLS["imbalanced"](x=torch.zeros(N, 3, L), y=torch.zeros(N, L, dtype=torch.int64), k=1)


def test_margins_of_a_wrong_dtype():
    with raises(TypeError, "margins must be floating point, got torch.int64"):
        CALLS["imbalanced"](margins=torch.ones(L, dtype=torch.int64))


def test_margins_with_gradient():
    with raises(ValueError, "margins must hold constants, got a tensor that requires grad; pass margins.detach()"):
        CALLS["imbalanced"](margins=MARGINS.clone().requires_grad_())


@pytest.mark.parametrize(
    "scale, message", [(0, "positive, got 0.0"), (-1.0, "positive, got -1.0"), (INF, "finite, got inf")]
)
def test_scale_out_of_range(scale, message):
    with raises(ValueError, f"scale must be {message}"):
        CALLS["imbalanced"](scale=scale)


@pytest.mark.parametrize("bad, kind", [("50", "str"), (None, "NoneType"), (True, "bool")])
def test_scale_that_is_no_number(bad, kind):
    with raises(TypeError, f"scale must be a number, got {kind}"):
        CALLS["imbalanced"](scale=bad)


@pytest.mark.parametrize(
    "counts, message",
    [
        ([3, 0, 5], "must hold positive counts, got 0 for class 1"),
        ([3, 4, -5], "must hold positive counts, got -5 for class 2"),
        ([NAN, 4], "must hold positive counts, got nan for class 0"),
        ([1, INF], "must hold positive counts, got inf for class 1"),
        ([], "must be a list of counts, got an empty one"),
        ([[1, 2], [3, 4]], "must be a list of counts, got a list of lists"),
        (7, "must be a list of counts, got a single number"),
    ],
    ids=["zero", "negative", "NaN", "infinite", "empty", "nested", "one number"],
)
def test_class_counts(counts, message):
    with raises(ValueError, f"cls_num_list {message}"):
        class_margins(counts, 0.3)
    with raises(ValueError, f"cls_num_list {message}"):
        ImbalNoisedTopK(1, 1.0, max_m=0.3, cls_num_list=counts)


@pytest.mark.parametrize("bad", ["abc", None, [1, "a"], [1, 2j], {"a": 1}], ids=repr)
def test_class_counts_that_are_no_numbers(bad):
    with pytest.raises(TypeError, match="cls_num_list must be"):
        class_margins(bad, 0.3)


@pytest.mark.parametrize(
    "max_m, message", [(-0.1, "at least 0, got -0.1"), (NAN, "finite, got nan"), (INF, "finite, got inf")]
)
def test_max_m_out_of_range(max_m, message):
    with raises(ValueError, f"max_m must be {message}"):
        class_margins([1, 2], max_m)


@pytest.mark.parametrize("bad, kind", [("0.3", "str"), (None, "NoneType"), ([0.3], "list")])
def test_max_m_that_is_no_number(bad, kind):
    with raises(TypeError, f"max_m must be a number, got {kind}"):
        class_margins([1, 2], bad)


def test_class_counts_of_another_length_than_the_logits():
    criterion = ImbalNoisedTopK(K, 1.0, max_m=0.3, cls_num_list=[5] * (L + 1))
    with raises(ValueError, "margins must have shape [L] = [100], got [101]"):
        criterion(X, Y)


@every_loss
@pytest.mark.parametrize("bad", ["avg", "batchmean", "", None, 1], ids=repr)
def test_unknown_reduction(function, bad):
    with raises(ValueError, f"reduction must be 'mean', 'sum' or 'none', got {bad!r}"):
        CALLS[function](reduction=bad)


@every_function
@pytest.mark.parametrize("bad", ["sparse", "", None, 1], ids=repr)
def test_unknown_sampler(function, bad):
    with raises(ValueError, f"sampler must be 'auto', 'thinned' or 'dense', got {bad!r}"):
        CALLS[function](sampler=bad)


@every_function
@pytest.mark.parametrize("bad", ["numpy", "C++", "", None, 1], ids=repr)
def test_unknown_backend(function, bad):
    with raises(ValueError, f"backend must be 'auto', 'torch', 'cpp', 'cuda' or 'triton', got {bad!r}"):
        CALLS[function](backend=bad)


@every_function
@pytest.mark.parametrize("backend", [b for b, state in build_info()["backends"].items() if state != "available"])
def test_unavailable_backend_names_a_remedy(function, backend):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' .*not available.*(use|install)"):
        CALLS[function](backend=backend)


@every_function
def test_seed_and_generator_exclude_each_other(function):
    with raises(ValueError, "seed and generator exclude each other, got both"):
        CALLS[function](seed=1, generator=torch.Generator())


@every_function
@pytest.mark.parametrize("bad, kind", [(1.0, "float"), ("1", "str"), (True, "bool"), ([1], "list")])
def test_seed_that_is_no_int(function, bad, kind):
    with raises(TypeError, f"seed must be an int, got {kind}"):
        CALLS[function](seed=bad)


@every_function
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_out_of_range(function, seed):
    with raises(ValueError, f"seed must be in [{-(2**63)}, {2**64 - 1}], got {seed}"):
        CALLS[function](seed=seed)


@every_function
@pytest.mark.parametrize(
    "seed, given",
    [
        (torch.tensor(1.0), "torch.float32 []"),
        (torch.tensor(1, dtype=torch.int32), "torch.int32 []"),
        (torch.tensor([1]), "torch.int64 [1]"),
        (torch.tensor([1, 2]), "torch.int64 [2]"),
        (torch.tensor(True), "torch.bool []"),
    ],
    ids=["float", "int32", "a vector of one", "a vector", "bool"],
)
def test_seed_tensor_of_a_wrong_kind(function, seed, given):
    with raises(TypeError, f"a seed tensor must be int64 without dimensions, got {given}"):
        CALLS[function](seed=seed)


@every_function
@pytest.mark.parametrize(
    "bad, kind", [(5, "int"), ("cpu", "str"), (torch.tensor(5), "Tensor")], ids=["int", "str", "Tensor"]
)
def test_generator_that_is_no_generator(function, bad, kind):
    with raises(TypeError, f"generator must be a torch.Generator, got {kind}"):
        CALLS[function](generator=bad)


@pytest.mark.parametrize("dim", [2, -3, 100])
def test_dim_out_of_range(dim):
    with raises(IndexError, f"dim must be in [-2, 1], got {dim}"):
        noised_topk(X, 1, dim=dim)


@pytest.mark.parametrize(
    "bad, kind", [(1.0, "float"), ("1", "str"), (None, "NoneType"), ((0, 1), "tuple"), (True, "bool")]
)
def test_dim_that_is_no_int(bad, kind):
    with raises(TypeError, f"dim must be an int, got {kind}"):
        noised_topk(X, 1, dim=bad)


@pytest.mark.parametrize("name, high", [("first_row", 2**32 - 1), ("first_class", 2**31 - 1 - L)])
def test_first_row_and_class(name, high):
    for good in (0, high):
        noised_topk_candidates(X[:1], 1, **{name: good})
    for bad in (-1, high + 1):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, .*{high}\], got {bad}"):
            noised_topk_candidates(X[:1], 1, **{name: bad})
    with raises(TypeError, f"{name} must be an int, got float"):
        noised_topk_candidates(X, 1, **{name: 1.0})


META = torch.zeros(N, L, device="meta")


@every_loss
def test_target_on_another_device(function):
    with raises(ValueError, "target must be on input's device cpu, got meta"):
        CALLS[function](y=Y.to("meta"))
    with raises(ValueError, "target must be on input's device meta, got cpu"):
        CALLS[function](x=META)


def test_margins_on_another_device():
    with raises(ValueError, "margins must be on input's device cpu, got meta"):
        CALLS["imbalanced"](margins=MARGINS.to("meta"))


@every_function
def test_seed_on_another_device(function):
    with raises(ValueError, "seed must be on input's device cpu, got meta"):
        CALLS[function](seed=torch.tensor(1, device="meta"))


@every_function
def test_generator_on_another_device(function):
    more = {"y": Y.to("meta")} if function in LOSSES else {}
    more |= {"margins": MARGINS.to("meta")} if function == "imbalanced" else {}
    with raises(ValueError, "generator must be on input's device meta, got cpu"):
        CALLS[function](x=META, generator=torch.Generator(), **more)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ kernels are not built")
def test_cpp_on_another_device():
    with raises(ValueError, "backend 'cpp' runs on CPU tensors, got input on meta"):
        noised_topk(META, 1, backend="cpp")


MODULES = {
    "value": (lambda **bad: NoisedTopK(**({"k": 3} | bad)), ()),
    "balanced": (lambda **bad: BalNoisedTopK(**({"k": 3, "epsilon": 1.0} | bad)), ("loss",)),
    "imbalanced": (
        lambda **bad: ImbalNoisedTopK(**({"k": 3, "epsilon": 1.0, "max_m": 0.3, "cls_num_list": [9] * L} | bad)),
        ("loss", "scale", "classes"),
    ),
    "general": (lambda **bad: NoisedTopKLoss(**({"k": 3} | bad)), ("loss", "scale", "link")),
}
NONSENSE = [  # for which modules, argument, error, message
    ("", dict(k=-3), ValueError, "k must be in ["),
    ("", dict(k=2.0), TypeError, "k must be an int, got float"),
    ("classes", dict(k=L), ValueError, "k must be in [0, L - 1] = [0, 99], got 100"),
    ("", dict(epsilon=-1.0), ValueError, "epsilon must be at least 0, got -1.0"),
    ("", dict(epsilon=NAN), ValueError, "epsilon must be finite, got nan"),
    ("", dict(n_sample=0), ValueError, "n_sample must be in [1, 2147483647], got 0"),
    ("", dict(sampler="sparse"), ValueError, "sampler must be 'auto', 'thinned' or 'dense', got 'sparse'"),
    ("", dict(backend="numpy"), ValueError, "backend must be 'auto', 'torch', 'cpp', 'cuda' or 'triton', got 'numpy'"),
    ("", dict(seed=1, generator=torch.Generator()), ValueError, "seed and generator exclude each other, got both"),
    ("", dict(seed=1.5), TypeError, "seed must be an int, got float"),
    ("", dict(generator=3), TypeError, "generator must be a torch.Generator, got int"),
    ("loss", dict(reduction="avg"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ("loss", dict(ignore_index=None), TypeError, "ignore_index must be an int, got NoneType"),
    ("loss", dict(process_group="gloo"), TypeError, "process_group must be a torch.distributed.ProcessGroup"),
    ("scale", dict(scale=0.0), ValueError, "scale must be positive, got 0.0"),
    ("link", dict(link="relu"), ValueError, "link must be 'hinge', 'softplus' or 'identity', got 'relu'"),
    ("link", dict(temperature=0.0, link="softplus"), ValueError, "temperature must be positive, got 0.0"),
    ("link", dict(temperature=2.0), ValueError, "temperature belongs to link='softplus', got 2.0 with link='hinge'"),
    ("link", dict(margin="1"), TypeError, "margin must be a number or a tensor [L], got str"),
    ("link", dict(margin=torch.ones(3, 3)), ValueError, "margins must have shape [L], got [3, 3]"),
    ("link", dict(weight=[1.0]), TypeError, "weight must be a tensor, got list"),
    ("link", dict(offset=torch.ones(3).long()), TypeError, "offset must be floating point, got torch.int64"),
    ("link", dict(rank_weights=(1.0, 2.0)), ValueError, "rank_weights must have a number for each of the 1 ranks"),
    ("link", dict(rank_weights=1.0), TypeError, "rank_weights must be a sequence of numbers, got float"),
    ("link", dict(k=(0, 5), exclude_target=True), ValueError, "k must be in [1, 2147483646], got 0"),
    ("link", dict(noise="cauchy"), ValueError, "noise must be 'normal' or 'gumbel', got 'cauchy'"),
]


@pytest.mark.parametrize(
    "name, bad, error, message",
    [
        pytest.param(name, bad, error, message, id=f"{name}: {message}")
        for name, (_, kinds) in MODULES.items()
        for kind, bad, error, message in NONSENSE
        if kind in ("", *kinds)
    ],
)
def test_modules_refuse_nonsense_when_they_are_made(name, bad, error, message):
    with raises(error, message):
        MODULES[name][0](**bad)


def test_a_value_of_a_dimension_that_is_no_int():
    with raises(TypeError, "dim must be an int, got str"):
        NoisedTopK(3, dim="rows")


def test_modules_check_what_only_a_batch_can_tell():
    with raises(ValueError, "k must be in [0, L - 1] = [0, 99], got 120"):
        BalNoisedTopK(120, 1.0)(X, Y)
    criterion = BalNoisedTopK(5, 1.0)
    criterion.epsilon = -1.0  # a schedule gone wrong
    with raises(ValueError, "epsilon must be at least 0, got -1.0"):
        criterion(X, Y)


@every_function
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_epsilon_that_overflows_float32(function, backend, dtype):
    """The same limit in every backend and dtype, below which losses are finite."""
    more = {"x": X.to(dtype), "backend": backend, "seed": 1}
    with raises(ValueError, "epsilon must be at most 1e+36, got 1.1e+36: noise would overflow float32"):
        CALLS[function](epsilon=1.1e36, **more)
    result = CALLS[function](epsilon=1e36, **more)
    assert (result[0] if function == "candidates" else result).isfinite().all()


@every_loss
@pytest.mark.parametrize("shape", [(N,), (N, L)], ids=["floats", "probabilities"])
def test_soft_targets(function, shape):
    with raises(TypeError, "soft targets (probabilities of classes) are not supported"):
        CALLS[function](y=torch.rand(shape))


@every_loss
def test_classes_in_the_last_dimension(function):
    with raises(ValueError, "got [2, 7]; classes are dimension 1 of input: pass input.movedim(-1, 1)"):
        CALLS[function](x=torch.zeros(2, 7, L), y=torch.zeros(2, 7, dtype=torch.int64))


@every_function
def test_vmap_says_what_to_do(function):
    with raises(RuntimeError, "torch.vmap does not batch topk_fast"):
        torch.vmap(lambda x: CALLS[function](x=x, seed=1))(torch.stack([X, X]))


@every_loss
def test_vmap_over_targets_says_what_to_do(function):
    with raises(RuntimeError, "torch.vmap does not batch topk_fast"):
        torch.vmap(lambda y: CALLS[function](y=y, seed=1))(torch.stack([Y, Y]))


@every_loss
def test_transforms_of_torch_func_say_what_to_do(function):
    def loss(x):
        return CALLS[function](x=x, seed=1)

    with raises(RuntimeError, "torch.vmap does not batch topk_fast, whose functions take a batch of rows already"):
        torch.vmap(torch.func.grad(lambda x, y: CALLS[function](x=x[None], y=y[None], seed=1)))(X, Y)
    with raises(RuntimeError, "torch.vmap does not batch topk_fast, not even in torch.func.jacrev"):
        torch.func.jacrev(torch.func.grad(loss))(X)
    with raises(RuntimeError, "topk_fast has no forward-mode derivative: take torch.func.vjp"):
        torch.func.jvp(loss, (X,), (X,))
    with raises(RuntimeError, "topk_fast has no forward-mode derivative"), torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(X, X))


@every_function
@pytest.mark.parametrize("backend", BACKENDS)
def test_jit_trace_says_what_to_do(function, backend):
    with raises(RuntimeError, "torch.jit.trace would record one noise and one shape for all calls: use torch.export"):
        torch.jit.trace(lambda x: CALLS[function](x=x, backend=backend), (X,))


@pytest.mark.parametrize("name", MODULES)
def test_symbolic_trace_says_what_to_do(name):
    module = MODULES[name][0]()
    with raises(TypeError, "torch.fx.symbolic_trace cannot trace topk_fast"):
        torch.fx.symbolic_trace(module)


@every_function
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_numpy_are_numbers(function, backend):
    expected = CALLS[function](k=5, epsilon=0.5, n_sample=3, seed=-9, backend=backend)
    given = CALLS[function](
        k=np.int64(5), epsilon=np.float64(0.5), n_sample=np.int32(3), seed=np.int64(-9), backend=backend
    )
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    given = CALLS[function](
        k=np.uint8(5), epsilon=np.float32(0.5), n_sample=3, seed=np.uint64(2**64 - 9), backend=backend
    )
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_a_small_integer_of_numpy_does_not_overflow():
    """The losses search rank k + 1, which a uint8 of 255 cannot hold."""
    x, y = torch.zeros(1, 300), torch.zeros(1, dtype=torch.int64)
    expected = bal_noised_topk_loss(x, y, 255, seed=1)
    assert torch.equal(bal_noised_topk_loss(x, y, np.uint8(255), seed=1), expected)


@pytest.mark.parametrize(
    "counts", [np.array([16, 1, 81]), torch.tensor([16, 1, 81]), (16.0, 1, 81)], ids=["NumPy", "torch", "tuple"]
)
def test_class_counts_of_other_kinds(counts):
    torch.testing.assert_close(class_margins(counts, 0.3), torch.tensor([0.15, 0.3, 0.1]))


@every_loss
@every_backend
def test_an_error_leaves_no_trace(function, backend):
    """A call after a failed one gives what it gives alone."""
    expected = CALLS[function](seed=1, backend=backend)
    with pytest.raises(IndexError):
        CALLS[function](y=Y + L, seed=1, backend=backend)
    assert torch.equal(CALLS[function](seed=1, backend=backend), expected)


def test_more_classes_than_int32_ids():
    """Rows without memory of their own: nothing is read before the check."""
    rows = torch.zeros(1, 1, dtype=torch.bfloat16).expand(1, 2**31)
    for call in (noised_topk, noised_topk_candidates, lambda x, k: bal_noised_topk_loss(x, Y[:1], k)):
        with raises(ValueError, "there must be fewer than 2**31 classes, got 2147483648"):
            call(rows, 1)
