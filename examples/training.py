"""Training, the same for all examples and for the study."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from examples.data_sets.dataset import Task
from examples.evaluation import measure
from examples.losses import Loss
from examples.networks import FEATURES, CosineHead, body_for


def take_steps(
    loss_of: Callable[[Tensor], Tensor],
    n_rows: int,
    batch: int,
    optimizers: Sequence[torch.optim.Optimizer],
    order: torch.Generator | None = None,
) -> Iterator[float]:
    """Trains without end, one step for each loss that is asked for; every epoch has the rows in a new order.

    Args:
        loss_of: The loss of the rows with the given numbers.
        order: Draws the order of the rows; None is torch's default generator, from which noise comes too.
    """
    while True:
        for rows in torch.randperm(n_rows, generator=order).split(batch):
            yield _take_step(loss_of(rows), optimizers)


def _take_step(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """One step, after which neither graph nor gradients take memory."""
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train_epochs(
    loss_of: Callable[[Tensor], Tensor],
    n_rows: int,
    batch: int,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator | None = None,
) -> Iterator[float]:
    """Trains for `epochs`, while the learning rate falls to 0 along a half cosine, and yields the loss of each step."""
    steps = epochs * -(-n_rows // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for loss in islice(take_steps(loss_of, n_rows, batch, [optimizer], order), steps):
        schedule.step()
        yield loss


def make_model(task: Task, loss: Loss, settings: dict) -> nn.Sequential:
    """The task's network, with a head of cosines for a loss that has one."""
    body = body_for(task.name, task.inputs)  # first: with one seed its weights are the same under all losses
    if loss.cosine:
        head = CosineHead(FEATURES, task.classes, settings.get("scale", 1.0), settings.get("length", 1.0))
    else:
        head = nn.Linear(FEATURES, task.classes)
    return nn.Sequential(body, head)


def fit_best_epoch(
    task: Task, loss: Loss, settings: dict, seed: int, epochs: int, batch: int, keep_by: str
) -> tuple[nn.Module, dict]:
    """Trains a model of a task under a loss. With one seed all losses have the same batches.

    Args:
        settings: lr, weight_decay and eps of AdamW, with momentum in place of eps of SGD; and those of the loss.
        keep_by: The measure of the validation rows that chooses the epoch, a name of `measure`'s.

    Returns:
        The model as it was after the epoch that was best on the validation rows, the measures of these rows in that
        epoch, and its number, from 1.
    """
    torch.manual_seed(seed)
    model, criterion = make_model(task, loss, settings), loss.make(settings, task.count().tolist())
    chosen = {name: settings[name] for name in ("lr", "weight_decay", "eps", "momentum") if name in settings}
    is_sgd = "momentum" in chosen
    optimizer = (torch.optim.SGD if is_sgd else torch.optim.AdamW)(model.parameters(), fused=True, **chosen)
    rows, target = task.parts["train"]

    def loss_of(batch: Tensor) -> Tensor:
        return criterion(model(task.inputs[rows[batch]]), target[batch])

    best, state, per_epoch = {keep_by: -1.0}, {}, -(-len(rows) // batch)
    order = torch.Generator().manual_seed(seed)
    for step, _ in enumerate(train_epochs(loss_of, len(rows), batch, epochs, optimizer, order), 1):
        if step % per_epoch == 0:
            found = measure(model.eval(), task, "val") | {"epoch": step // per_epoch}
            if found[keep_by] > best[keep_by]:
                best, state = found, {name: value.clone() for name, value in model.state_dict().items()}
            model.train()
    model.load_state_dict(state)
    return model.eval(), best
