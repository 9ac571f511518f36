"""A run of the study: one model, trained with one loss and its settings, and measured."""

from pathlib import Path

import torch

from benchmarks.study.losses import LOSSES
from examples.evaluation import measure
from examples.tasks import load
from examples.training import fit_best_epoch, make_model


def run(job: dict, cache: Path) -> dict:
    """Trains one model as `job` says and measures it, in stage "test" on the test rows, else on the validation rows."""
    task, loss, settings = load(job["data"], cache), LOSSES[job["loss"]], job["settings"]
    torch.manual_seed(job["seed"])
    model = make_model(task, loss, settings)
    criterion = loss.make(settings, task.count().tolist())
    found = fit_best_epoch(model, criterion, task, settings, job["epochs"], job["batch"], job["keep_by"])
    return job | found | (measure(model, task, "test") if job["stage"] == "test" else {})
