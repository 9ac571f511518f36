"""The network, the losses under which it is compared, and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NormedLinear

K = 5
N_SAMPLE = 5
BATCH = 256
HIDDEN = 256

CROSS_ENTROPY = "cross-entropy"
BALANCED = f"balanced top-{K}"
IMBALANCED = f"imbalanced top-{K}"
LOSSES = (CROSS_ENTROPY, BALANCED, IMBALANCED)


@dataclass(frozen=True)
class Settings:
    """The settings that validation chooses; cross-entropy does not use the last two, nor the balanced loss the last."""

    lr: float
    weight_decay: float
    epsilon: float | None = None
    max_m: float | None = None


class Rows(NamedTuple):
    """Labelled rows, several of which may share an input."""

    inputs: Tensor  # [D, F] float32
    group: Tensor  # [N] int64: the input of each row
    target: Tensor  # [N] int64: the class of each row
    n_classes: int

    def take(self, numbers: Tensor) -> Rows:
        """Some of the rows."""
        return self._replace(group=self.group[numbers], target=self.target[numbers])

    def count(self) -> Tensor:
        """The number of rows of each class, [C]."""
        return self.target.bincount(minlength=self.n_classes)


def make_loss(name: str, settings: Settings, class_count: Tensor, package: object | None = None) -> nn.Module:
    """The loss called `name`; `package` may be another module with the same class names, such as pytopk."""
    balanced = getattr(package, "BalNoisedTopK", BalNoisedTopK)
    imbalanced = getattr(package, "ImbalNoisedTopK", ImbalNoisedTopK)
    if name == CROSS_ENTROPY:
        return nn.CrossEntropyLoss()
    if name == BALANCED:
        return balanced(K, settings.epsilon, n_sample=N_SAMPLE)
    return imbalanced(K, settings.epsilon, settings.max_m, class_count.tolist(), n_sample=N_SAMPLE)


def make_model(name: str, n_features: int, n_classes: int) -> nn.Sequential:
    """A network with one hidden layer; the imbalanced loss, whose margins are cosines, gets a cosine head."""
    head = NormedLinear if name == IMBALANCED else nn.Linear
    return nn.Sequential(nn.Linear(n_features, HIDDEN), nn.ReLU(), nn.Dropout(0.5), head(HIDDEN, n_classes))


def take_steps(
    loss_of: Callable[[Tensor], Tensor], n_rows: int, batch: int, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[Tensor]:
    """Trains without end, one step for each loss that is asked for; every epoch has the rows in a new order.

    Args:
        loss_of: The loss of the rows with the given numbers.
    """
    while True:
        for rows in torch.randperm(n_rows).split(batch):
            loss = loss_of(rows)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            yield loss.detach()


def train_epochs(
    loss_of: Callable[[Tensor], Tensor], n_rows: int, batch: int, epochs: int, optimizer: torch.optim.Optimizer
) -> Iterator[Tensor]:
    """Trains for `epochs`, while the learning rate falls to 0 along a half cosine, and yields the loss of each step."""
    steps = epochs * -(-n_rows // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for loss in islice(take_steps(loss_of, n_rows, batch, [optimizer]), steps):
        schedule.step()
        yield loss


def fit(name: str, settings: Settings, rows: Rows, epochs: int, seed: int) -> nn.Sequential:
    """Trains a network as `train_epochs` does, with a bar that shows the mean loss of each epoch."""
    torch.manual_seed(seed)
    model = make_model(name, rows.inputs.shape[1], rows.n_classes)
    loss_of = make_loss(name, settings, rows.count())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    model.train()

    def loss_of_batch(batch: Tensor) -> Tensor:
        return loss_of(model(rows.inputs[rows.group[batch]]), rows.target[batch])

    losses = train_epochs(loss_of_batch, len(rows.target), BATCH, epochs, optimizer)
    per_epoch, running = -(-len(rows.target) // BATCH), 0.0
    with tqdm(losses, name, total=per_epoch * epochs, unit="step") as bar:
        for step, loss in enumerate(bar, 1):
            running += loss / per_epoch
            if step % per_epoch == 0:
                bar.set_postfix(loss=f"{running:.3f}")
                running = 0.0
    return model.eval()


@torch.no_grad()
def scores_of(model: nn.Module, rows: Rows) -> Tensor:
    """Scores of rows, [N, C]; the network runs once for each distinct input."""
    used, position = rows.group.unique(return_inverse=True)
    return model(rows.inputs[used])[position]
