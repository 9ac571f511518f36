r"""Derivatives of the search, any number of times.

.. math:: \frac{\partial e_m}{\partial s_j} = \frac{\#\{b : c_{b,m} = j\}}{B} - [j = y]

Only the class ids c are kept for the backward. They are constant between the points where two noised scores change
ranks, so that the gradient of the scores is linear in the incoming gradient and has no derivative in the scores.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import noise, ops, reference
from .request import Labels, Noise, Place, Search, Slice

_MOST_ROWS = 1 << 14  # whose losses one block of a GPU adds up


def _excess(search: Search) -> tuple[Tensor, Tensor]:
    """Excesses [N, M] and class ids [N, B, M]; where classes lie on several ranks, over the classes of all of them."""
    scores, wanted, labels, backend, shards = search
    if shards is None:
        return ops.kernel("excess", backend)(scores, *wanted, *labels)
    if scores.shape[1]:
        lists = ops.kernel("candidates", backend)(scores, *wanted, *Place(0, search.first_class))
    else:
        lists = reference.empty_lists(scores, wanted.k, wanted.n_sample)
    true_score = reference.own_scores(scores, labels.target, search.first_class)
    values, classes, true_score = shards.merge_lists(*lists, true_score, labels.target)
    return reference.excess_of(values, classes, true_score, wanted.ranks, labels)


def _clean_excess(scores: Tensor, classes: Tensor, labels: Labels) -> Tensor:
    """The excesses [N, M] of these classes [N, B, M] without noise."""
    dtype = reference.arithmetic(scores.dtype)
    picked = scores.gather(1, classes.clamp(min=0).flatten(1)).view(classes.shape).to(dtype)
    own = None if labels.target is None else scores.gather(1, labels.known[:, None])[:, 0].to(dtype)
    return reference.clean_excess(picked, own, classes, labels)


def depending_on(epsilon: Tensor, excess: Tensor, clean: Tensor) -> Tensor:
    r"""The excesses [N, M] with their derivative in an epsilon that is learned; ``clean`` are those without noise.

    .. math:: e = \bar s + \epsilon \bar z, \qquad \partial e / \partial \epsilon = \bar z = (e - \bar s) / \epsilon

    The mean noise z at the ranks is constant between the points where two noised scores change ranks.
    """
    wide = excess.detach().double()
    mean = ((wide - clean) / epsilon.detach()).clamp(-noise.LARGEST_LEVEL, noise.LARGEST_LEVEL)
    mean = mean.masked_fill(wide.isinf(), 0.0)
    return excess + ((epsilon - epsilon.detach()) * mean).to(excess.dtype)


def refuse_batched(grad: Tensor) -> None:
    """Raises at a batch of incoming gradients, as ``is_grads_batched=True`` makes it."""
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        _refuse_vmap()


def _refuse_vmap():
    raise RuntimeError(
        "torch.vmap does not batch topk_fast, not even in torch.func.jacrev, jacfwd and hessian: take "
        'torch.autograd.grad of one output at a time, and gradients of all rows from reduction="none"'
    )


class Derivative(Function):
    """An autograd Function that is differentiated backwards only."""

    @staticmethod
    def vmap(info, in_dims, *args):
        _refuse_vmap()

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(
            "topk_fast has no forward-mode derivative: take torch.func.vjp or backward() in place of torch.func.jvp"
        )


class _Gradient(Derivative):
    """The gradient of the scores, itself differentiable in the gradient of the excesses."""

    @staticmethod
    def forward(grad, classes, target, ignore_index, part, backend):
        return ops.kernel("gradient", backend)(grad, classes, target, ignore_index, *part)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, classes, target, ctx.ignore_index, _, _ = inputs
        ctx.save_for_backward(classes, target)
        ctx.dtype = grad.dtype

    @staticmethod
    def backward(ctx, grad_out):
        classes, target = ctx.saved_tensors
        total = _clean_excess(grad_out, classes, Labels(target, ctx.ignore_index)).to(ctx.dtype)
        return total.masked_fill(reference.marks_nan(classes)[:, None], torch.nan), None, None, None, None, None


def _keep(ctx, search: Search, classes: Tensor, *more: Tensor | None) -> None:
    ctx.save_for_backward(classes, search.labels.target, *more)
    ctx.part = Slice(search.first_class, search.scores.shape[1], search.scores.dtype)
    ctx.ignore_index, ctx.backend, ctx.sharded = search.labels.ignore_index, search.backend, search.shards is not None


def _differentiate(ctx, grad: Tensor, classes: Tensor, target: Tensor | None) -> Tensor:
    """The gradient of the scores from that of the excesses [N, M]; ``ctx`` and the tensors as `_keep` filled them."""
    args = (grad.to(reference.arithmetic(ctx.part.dtype)), classes, target, ctx.ignore_index)
    if not torch.is_grad_enabled():
        return ops.kernel("gradient", ctx.backend)(*args, *ctx.part)
    if ctx.sharded and grad.requires_grad:
        raise RuntimeError(
            "a loss whose classes are sharded has no second derivative: call backward without create_graph"
        )
    return _Gradient.apply(*args, ctx.part, ctx.backend)


class _Excess(Derivative):
    """Scores to excesses and class ids."""

    @staticmethod
    def forward(scores, schedule, search):
        return _excess(search._replace(scores=scores, noise=search.noise._replace(schedule=schedule)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _keep(ctx, inputs[2]._replace(scores=inputs[0]), output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return _differentiate(ctx, grad, *ctx.saved_tensors), None, None


def differentiable_excess(search: Search) -> Tensor:
    """The excesses [N, M] of a search, differentiable in the scores, and in an epsilon that is learned."""
    epsilon, constant = search.noise.learned_epsilon, search.noise.without_derivative
    if torch.compiler.is_compiling() and search.shards is None:  # the op has a derivative of its own, for graphs
        excess, classes = _excess(search._replace(noise=constant))
    else:
        excess, classes = _Excess.apply(search.scores, constant.schedule, search)
    if epsilon is None:
        return excess
    with torch.no_grad():
        clean = _clean_excess(search.scores, classes, search.labels)
    return depending_on(epsilon, excess, clean)


class _Loss(Derivative):
    """Scores to reduced losses in one node of the graph: separate nodes for the link make a small step slower.

    For a link with curvature the excesses are a second output. A graph of the derivative starts from them, and what
    comes back through them is the gradient of that graph.
    """

    @staticmethod
    def forward(ctx, scores, search, criterion):
        labels = search.labels
        ctx.fused = _is_fused(search, criterion)
        # The ops have derivatives of their own, whose Python would cost some 6 us a call here, where this one's counts.
        with torch._C._AutoDispatchBelowAutograd():
            excess, classes = _excess(search)
            if ctx.fused:
                arguments = criterion.arguments(excess.shape[1])
                link = ops.kernel("link", search.backend)
                loss, slope, divisor = link(excess, labels.target, labels.ignore_index, *arguments)
            else:
                loss, slope, divisor = criterion.evaluated(excess, labels)
        excess = excess if criterion.is_curved else None
        _keep(ctx, search, classes, excess, slope, divisor)
        ctx.criterion = criterion
        ctx.set_materialize_grads(False)
        return loss, excess

    @staticmethod
    def backward(ctx, grad, grad_excess):
        *kept, excess, slope, divisor = ctx.saved_tensors
        if grad is None:
            return None if grad_excess is None else _differentiate(ctx, grad_excess, *kept), None, None
        if ctx.fused and grad_excess is None and not torch.is_grad_enabled():
            linked_gradient = ops.kernel("linked_gradient", ctx.backend)
            return linked_gradient(grad, slope, divisor, *kept, ctx.ignore_index, *ctx.part), None, None
        if excess is not None and torch.is_grad_enabled():
            loss = ctx.criterion.reduced(excess, Labels(kept[1], ctx.ignore_index))
            (total,) = torch.autograd.grad(loss, excess, grad, create_graph=True)
        else:
            grad = grad if divisor is None else grad / divisor
            total = (grad[:, None] if grad.dim() else grad) * slope
        return _differentiate(ctx, total if grad_excess is None else total + grad_excess, *kept), None, None


def _is_fused(search: Search, criterion) -> bool:
    """Whether one kernel evaluates the criterion. A loss that is reduced is the work of one block, for a few rows.

    The CPU's has torch's bits: a softplus and sums of weights, which it would round otherwise, are left to torch.
    """
    if search.backend == "cpp" and (criterion.is_curved or criterion.weight is not None):
        return False
    few = criterion.reduction == "none" or search.scores.shape[0] <= _MOST_ROWS
    return few and search.shards is None and ops.has_link(search.backend)


def loss(search: Search, criterion) -> Tensor:
    """The `criterion.Criterion` of a search's excesses, [N] or reduced, differentiable in the scores."""
    in_pieces = search.noise.learned_epsilon is not None or criterion.is_curved and not _is_fused(search, criterion)
    if in_pieces or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return criterion.reduced(differentiable_excess(search), search.labels)
    return _Loss.apply(search.scores, search, criterion)[0]


def _derivative_of(backend: str):
    """`_Excess`'s derivative, for the op itself."""

    def keep(ctx, inputs, output):
        scores, *args = inputs
        n = len(Noise._fields)
        search = Search(scores, Noise(*args[:n]), Labels(*args[n:]), backend)
        _keep(ctx, search, output[1])

    def backward(ctx, grad, _):
        return _differentiate(ctx, grad, *ctx.saved_tensors), *[None] * (len(Noise._fields) + len(Labels._fields))

    return keep, backward


ops.register_derivative("excess", _derivative_of)
