"""A run of the study: one model, trained with one loss and its settings, and measured."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.study.losses import LOSSES
from examples.evaluation import measure
from examples.networks import FEATURES, CosineHead, body_for
from examples.tasks import Task, load
from examples.training import train_epochs


def make_model(task: Task, loss: str, settings: dict) -> nn.Sequential:
    if LOSSES[loss].cosine:
        head = CosineHead(FEATURES, task.classes, settings.get("scale", 1.0), settings.get("length", 1.0))
    else:
        head = nn.Linear(FEATURES, task.classes)
    return nn.Sequential(body_for(task.name, task.inputs), head)


def run(job: dict, cache: Path) -> dict:
    """Trains one model as `job` says and measures it, in stage "test" on the test rows, else on the validation rows."""
    task, settings = load(job["data"], cache), job["settings"]
    torch.manual_seed(job["seed"])
    model = make_model(task, job["loss"], settings)
    criterion = LOSSES[job["loss"]].make(settings, task.count().tolist())
    found = fit_best_epoch(model, criterion, task, settings, job["epochs"], job["batch"], job["keep_by"])
    return job | found | (measure(model, task, "test") if job["stage"] == "test" else {})


def fit_best_epoch(
    model: nn.Module, criterion: nn.Module, task: Task, settings: dict, epochs: int, batch: int, keep_by: str
) -> dict:
    """Trains `model` and leaves it as it was after the epoch that was best on the validation rows.

    Args:
        settings: lr, weight_decay and eps of AdamW.
        keep_by: The measure of the validation rows that chooses the epoch, a name of `measure`'s.

    Returns:
        The measures of the validation rows in that epoch, and its number, from 1.
    """
    chosen = {name: settings[name] for name in ("lr", "weight_decay", "eps")}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **chosen)
    rows, target = task.parts["train"]

    def loss_of(batch: Tensor) -> Tensor:
        return criterion(model(task.inputs[rows[batch]]), target[batch])

    best, state, per_epoch = {keep_by: -1.0}, {}, -(-len(rows) // batch)
    for step, _ in enumerate(train_epochs(loss_of, len(rows), batch, epochs, optimizer), 1):
        if step % per_epoch == 0:
            found = measure(model.eval(), task, "val") | {"epoch": step // per_epoch}
            if found[keep_by] > best[keep_by]:
                best, state = found, {name: value.clone() for name, value in model.state_dict().items()}
            model.train()
    model.load_state_dict(state)
    model.eval()
    return best
