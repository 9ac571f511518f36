"""A module that owns a classifier's weight and computes its loss in one step, for up to millions of classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from . import checkpoints, checks, linear_losses, sharding
from .linear import linear_topk
from .linear_gradient import unit_rows
from .nn import Loss
from .request import Linear

__all__ = ["LinearHead"]

_BLOCK = 1 << 16  # classes whose first weights are drawn at a time


class LinearHead(Module):
    r"""A classifier's last layer and its loss in one, for up to millions of classes.

    .. math:: s = x W^T + b, \qquad \ell = criterion(s, y)

    It owns ``weight`` [n_classes, in_features] and ``bias`` [n_classes] as :class:`torch.nn.Linear` does, and its
    state_dict has them and the criterion's tensors, with the prefix ``criterion.``. The loss is found without holding
    all logits, by one matmul in place of three, see :func:`~topk_fast.functional.linear_noised_topk_loss`.

    Args:
        in_features: D, the length of the features.
        n_classes: L, at least 2.
        criterion: a loss module of this package, such as :class:`~topk_fast.SampledCrossEntropy` or
            :class:`~topk_fast.NoisedTopKLoss`, without a ``process_group`` of its own.
        bias: whether there is a bias.
        normalize: cosine logits: features and rows of the weight are divided by their lengths, as in
            :class:`~topk_fast.NormedLinear`, whose initial rows of length 1 the weight then has. With it, pass
            ``bias=False``, unless a bias of cosines is wanted.
        sparse_grad, chunk_size: as in :func:`~topk_fast.functional.linear_noised_topk_loss`.
        process_group: ranks over which the classes are sharded: each rank owns, in the order of ranks, the next
            ceil(n_classes / ranks) classes, from ``first_class`` on. Keep the head out of DistributedDataParallel then.
            Its state_dict has DTensors, which :mod:`torch.distributed.checkpoint` merges, and loads into any number of
            ranks; ``load_state_dict`` takes these, or the full tensors of a head that is not sharded.
        device, dtype: as in :class:`torch.nn.Linear`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range, or a criterion that does not fit.

    Example:
        >>> import torch
        >>> from topk_fast import LinearHead, SampledCrossEntropy
        >>> head = LinearHead(16, 50_000, SampledCrossEntropy(16), bias=False, sparse_grad=True)
        >>> optimizer = torch.optim.SparseAdam(head.parameters())
        >>> head(torch.randn(8, 16), torch.randint(50_000, (8,))).backward()
        >>> optimizer.step()
        >>> values, classes = head.topk(torch.randn(8, 16), k=5)
        >>> classes.shape
        torch.Size([8, 5])
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        criterion: Loss,
        *,
        bias: bool = True,
        normalize: bool = False,
        sparse_grad: bool = False,
        chunk_size: int | None = None,
        process_group=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features = checks.check_integer("in_features", in_features, 1, 2**31 - 1)
        self.n_classes = checks.check_integer("n_classes", n_classes, 2, 2**31 - 1)
        self.criterion = _check_criterion(criterion)
        checks.check_top(criterion.k, self.n_classes, least=int(criterion.exclude_target))
        for name, x in criterion.as_request().vectors.items():
            checks.check_class_vector(name, x, self.n_classes, x.device)
        if chunk_size is not None:
            checks.check_integer("chunk_size", chunk_size, 1, 2**31 - 1)
        self.normalize, self.sparse_grad, self.chunk_size = normalize, sparse_grad, chunk_size
        sharding.check_group(process_group)
        self.process_group = process_group
        self.first_class, n_local = sharding.own_slice(self.n_classes, process_group)
        self.weight = Parameter(torch.empty(n_local, self.in_features, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(n_local, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()
        self.register_state_dict_post_hook(checkpoints.save_head)
        self.register_load_state_dict_pre_hook(checkpoints.load_head)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights as :class:`~topk_fast.NormedLinear` or :class:`torch.nn.Linear` draws them, for any number of ranks.

        They are the same for all numbers of ranks if all ranks have called ``torch.manual_seed`` with the same number.
        Blocks of classes are drawn in turn, and each rank keeps its own, so that no rank holds them all.
        """
        bound = self.in_features**-0.5
        for parameter in filter(lambda p: p is not None, (self.weight, self.bias)):
            local, group, _ = sharding.local_part("weight", parameter, 0, None)  # of a DTensor, as FSDP2 makes them
            first = self.first_class + sharding.own_slice(parameter.shape[0], group)[0]
            for start in range(0, self.n_classes, _BLOCK):
                block = local.new_empty((min(_BLOCK, self.n_classes - start), *local.shape[1:]))
                if self.normalize and block.dim() == 2:
                    block = unit_rows(block.normal_())
                else:
                    block.uniform_(-bound, bound)
                skipped, at = max(0, first - start), max(0, start - first)
                own = local[at : at + max(0, len(block) - skipped)]
                own.copy_(block[skipped : skipped + len(own)])

    def forward(
        self, features: Tensor, target: Tensor, return_hits: int | Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""The loss, and where they are asked for the hits of the same pass, of which top-K accuracies are made.

        .. math:: hit_K(x, y) = [\,y \text{ is one of the } K \text{ classes with the largest } s_j\,]

        The hits rank the clean logits, as :meth:`topk` does, in the pass over the classes that finds the loss: there is
        no second matmul, and the loss keeps its bits.

        Args:
            features: [N, D] or [..., D].
            target: true classes [N] or [...].
            return_hits: K, or several, each 1 to L. A criterion with an ``offset`` has none, because its logits are not
                those of a prediction.

        Returns:
            The loss as :func:`~topk_fast.functional.linear_noised_topk_loss` returns it. With ``return_hits`` the loss
            and a bool tensor of target's shape, which has a last dimension for the Ks where they are a sequence; False
            in rows whose target is ``ignore_index`` and in rows with a NaN. It is the same on all ranks of a
            ``process_group``.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as
                :func:`~topk_fast.functional.linear_noised_topk_loss` does; and ``return_hits`` out of range, or with
                an ``offset``.

        Example:
            >>> import torch
            >>> from topk_fast import BalNoisedTopK, LinearHead
            >>> head = LinearHead(2, 3, BalNoisedTopK(1, epsilon=0.5), bias=False)
            >>> head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
            >>> features, target = torch.tensor([[1.0, 2.0], [1.0, -3.0]]), torch.tensor([1, 0])
            >>> loss, hits = head(features, target, return_hits=(1, 2))
            >>> hits
            tensor([[False,  True],
                    [ True,  True]])
            >>> hits.float().mean(0)  # top-1 and top-2 accuracy
            tensor([0.5000, 1.0000])
        """
        loss = _check_criterion(self.criterion).as_request()
        loss = loss._replace(options=loss.options._replace(process_group=self.process_group))
        how = (self.normalize, self.chunk_size, self.sparse_grad, return_hits, self.n_classes)
        linear = Linear(self.weight, self.bias, *how)
        value, hits = linear_losses.evaluate_with_hits(features, target, linear, loss)
        return value if hits is None else (value, hits)

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best logits and classes of every row, see :func:`~topk_fast.functional.linear_topk`.

        Args:
            features: [N, D] or [..., D].
            k: how many classes, 1 to L.
        """
        return linear_topk(
            features,
            self.weight,
            k,
            linear_bias=self.bias,
            normalize=self.normalize,
            chunk_size=self.chunk_size,
            backend=self.criterion.backend,
            process_group=self.process_group,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., L] as a plain layer computes them, to evaluate or export; without the criterion's offset.

        Where classes are sharded, the logits of this rank's classes as a part of a DTensor that is sharded along them.

        Args:
            features: [N, D] or [..., D].
        """
        if self.process_group is not None:
            features = sharding.SumGradients.apply(features, self.process_group)
        if self.normalize:
            result = F.linear(unit_rows(features), unit_rows(self.weight), self.bias)
        else:
            result = F.linear(features, self.weight, self.bias)
        shape = torch.Size((*features.shape[:-1], self.n_classes))
        if self.process_group is None:
            return result
        shard = torch.compiler.disable(checkpoints.shard) if torch.compiler.is_compiling() else checkpoints.shard
        return shard(result, -1, shape, self.process_group)

    def register_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Shards an optimizer's state of this head's rows in its state_dict, as the head's own shards the rows.

        Call it once for an optimizer that has parameters of a head with ``process_group``.

        Args:
            optimizer: one of :mod:`torch.optim` whose state of a parameter has its shape, or is a number, as that of
                SGD, Adam, SparseAdam and Adagrad; after it was made.

        Raises:
            RuntimeError: in the optimizer's ``state_dict()``, for state of another shape, as Adafactor's.
        """
        checkpoints.register_optimizer(self, optimizer)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, n_classes={self.n_classes}, bias={self.bias is not None}"
        named = {"normalize": self.normalize, "sparse_grad": self.sparse_grad, "chunk_size": self.chunk_size}
        return shown + "".join(f", {name}={value}" for name, value in named.items() if value)

    def __deepcopy__(self, memo):
        return sharding.copy_with_group(self, memo)


def _check_criterion(criterion) -> Loss:
    if not isinstance(criterion, Loss):
        raise TypeError(
            "criterion must be a loss module of topk_fast, such as SampledCrossEntropy(16), got "
            f"{type(criterion).__name__}; other losses take the logits of a torch.nn.Linear"
        )
    if type(criterion).forward is not Loss.forward:
        raise TypeError(
            f"LinearHead does not call its criterion's forward, which {type(criterion).__name__} overrides: change the "
            "head's loss, or pass the logits of a torch.nn.Linear"
        )
    if criterion.process_group is not None:
        raise ValueError("process_group must be given to LinearHead, got one that its criterion has")
    return criterion
