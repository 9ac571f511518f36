"""A run of the study: one model, trained with one loss and its settings, and measured."""

from pathlib import Path

from benchmarks.study.losses import LOSSES
from examples.evaluation import measure
from examples.tasks import load
from examples.training import fit_best_epoch


def run(job: dict, cache: Path) -> dict:
    """Trains one model as `job` says and measures it, in stage "test" on the test rows, else on the validation rows."""
    task = load(job["data"], cache)
    how = (job[name] for name in ("settings", "seed", "epochs", "batch", "keep_by"))
    model, found = fit_best_epoch(task, LOSSES[job["loss"]], *how)
    return job | found | (measure(model, task, "test") if job["stage"] == "test" else {})
