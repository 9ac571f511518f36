"""The runs that the study's plan asks for, a run itself, those on record, and their collection in one file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.study.losses import BALANCED_DATA, IMBALANCED, LOSSES
from examples.evaluation import measure
from examples.losses import BALANCED, EPS, MOMENTUM, OPTIMIZER, SGD
from examples.tasks import load
from examples.training import fit_best_epoch

SEEDS = (1, 2, 3, 4, 5)
TRIAL_SEED = 0
SECOND_TRIALS = THIRD_TRIALS = 6


@dataclass(frozen=True)
class Plan:
    """How a data set is studied: each loss has `trials` trials per optimizer, SECOND_TRIALS around the best of them,
    and THIRD_TRIALS where the others are best; the best of all is run again under SEEDS.
    """

    epochs: int
    batch: int
    trials: int
    losses: Sequence[str]
    keep_by: str = "macro top-5"  # chooses the epoch of a run and the settings of a loss, on the validation rows
    optimizers: Sequence[str] = ("AdamW",)


# The smooth top-K SVM takes seven times as long as the others, and is tried once. Where classes are equally frequent a
# logit adjustment changes nothing.
ALL = list(LOSSES)
LONG_TAILED = [name for name in ALL if name != "smooth top-K SVM"]
FROM_SCRATCH = [name for name in LONG_TAILED if name != "focal" and "B = 5" not in name]
PLANS = {
    "features": Plan(15, 256, 15, ALL, optimizers=("AdamW", "SGD")),
    "kanji": Plan(6, 512, 9, [name for name in FROM_SCRATCH if name != "LDAM"], "top-5"),
    "species": Plan(20, 256, 9, LONG_TAILED, optimizers=("AdamW", "SGD")),
    "long-tailed glyphs": Plan(8, 128, 9, FROM_SCRATCH),
    "noisy glyphs": Plan(8, 128, 9, [name for name in FROM_SCRATCH if name in BALANCED_DATA]),
    "glyphs": Plan(8, 128, 9, [name for name in FROM_SCRATCH if name in BALANCED_DATA]),
}
# One setting of a loss at a time, all others as in its best first trial with AdamW; on the validation rows.
ABLATED, ABLATION_SEEDS = "features", (1, 2, 3)
SAMPLES = (1, 2, 5, 10, 30, 100)
ABLATIONS: dict[str, dict[str, Sequence]] = {
    "cross-entropy": {"eps": EPS},
    "logit-adjusted": {"eps": EPS},
    "sampled, B = 16": {"eps": EPS, "n_sample": SAMPLES},
    BALANCED: {"eps": EPS, "n_sample": SAMPLES, "k": (1, 3, 5, 10, 20), "epsilon": (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)},
    "{1, 5} softplus": {"ranks": ([1], [5], [1, 5], [1, 3, 5], [1, 5, 20])},
    "LDAM": {"length": (0.1, 1.0, 11.3)},  # of the rows of the head at the start; the last is sqrt(D)
    IMBALANCED: {"length": (0.1, 1.0, 11.3), "epsilon": (0.0, 0.003, 0.01, 0.03, 0.1), "max_m": (0.01, 0.03, 0.1, 0.3)},
}


def draw_points(space: dict[str, tuple[float, float]], trials: int, seed: int) -> list[dict[str, float]]:
    """`trials` points of a box of (low, high), log-uniform, from a scrambled Sobol sequence, rounded to two digits."""
    if not space:
        return [{} for _ in range(trials)]
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(trials).tolist()

    def place(key: str, u: float) -> float:
        low, high = space[key]
        return float(f"{low * (high / low) ** u:.2g}")

    return [{key: place(key, u) for key, u in zip(space, point)} for point in points]


def settings_of(loss: str, data: str, optimizer: str) -> list[dict]:
    """The settings that a loss tries on a data set with an optimizer.

    Learning rate and weight decay come from one Sobol sequence, which is the same for all losses, the loss's own
    settings from another, and eps of AdamW takes each of its values in turn.
    """
    trials, sgd = PLANS[data].trials, optimizer == "SGD"
    common = draw_points(SGD if sgd else OPTIMIZER, trials, TRIAL_SEED)
    own = draw_points(LOSSES[loss].space, trials, TRIAL_SEED + 1)
    third = [{"momentum": MOMENTUM} if sgd else {"eps": EPS[i % len(EPS)]} for i in range(trials)]
    return [a | b | c for a, b, c in zip(common, third, own)]


def settings_near(best: dict, loss: str) -> list[dict]:
    """The settings of the second trials: the learning rate and weight decay lie within a factor of two of the best
    first trial's, also beyond the bounds of the first ones, the loss's own settings anywhere, and all else is the same.
    """
    near = {name: (best[name] / 2, best[name] * 2) for name in OPTIMIZER}
    common, own = (draw_points(box, SECOND_TRIALS, TRIAL_SEED + i) for i, box in ((2, near), (3, LOSSES[loss].space)))
    return [best | a | b for a, b in zip(common, own)]


def settings_shared(chosen: dict[str, dict], tried: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The settings of the third trials: those of the optimizer with which other losses are best, and which this one has
    not tried, up to THIRD_TRIALS; those of more losses first, then in the order of the losses. A loss's own settings
    are those of its best trial.
    """
    names, found = (*OPTIMIZER, "eps", "momentum"), {}
    of_optimizer = Counter(tuple((name, s[name]) for name in names if name in s) for s in chosen.values())
    for loss, best in chosen.items():
        own = {name: best[name] for name in best if name not in names}
        points = [dict(shared) | own for shared, _ in of_optimizer.most_common()]
        found[loss] = [point for point in points if point not in tried[loss]][:THIRD_TRIALS]
    return found


def job_of(stage: str, data: str, loss: str, settings: dict, seed: int) -> dict:
    plan = PLANS[data]
    length = {"epochs": plan.epochs, "batch": plan.batch, "keep_by": plan.keep_by}
    return {"stage": stage, "data": data, "loss": loss, "settings": settings, "seed": seed} | length


def first_trials(data: str, optimizers: Sequence[str]) -> dict[str, list[dict]]:
    """The first trials of each loss."""
    return {
        loss: [
            job_of("trial", data, loss, point, TRIAL_SEED)
            for optimizer in optimizers
            for point in settings_of(loss, data, optimizer)
        ]
        for loss in PLANS[data].losses
    }


def best_settings(data: str, trials: dict[str, list[dict]], done: list[dict]) -> dict[str, dict]:
    """The settings of the best of some trials, of each loss whose trials are all done."""
    have, chosen = {key_of(record): record for record in done}, {}
    for loss, wanted in trials.items():
        found = [have[key_of(trial)] for trial in wanted if key_of(trial) in have]
        if len(found) == len(wanted):
            chosen[loss] = max(found, key=lambda record: record[PLANS[data].keep_by])["settings"]
    return chosen


def jobs(data: str, done: list[dict]) -> list[dict]:
    """The jobs of a data set, as far as they are known: all trials, and the best ones again, on the test rows."""
    plan = PLANS[data]
    trials = first_trials(data, plan.optimizers)
    both = {
        loss: trials[loss]
        + [job_of("second trial", data, loss, point, TRIAL_SEED) for point in settings_near(best, loss)]
        for loss, best in best_settings(data, trials, done).items()
    }
    chosen, all_trials = best_settings(data, both, done), trials | both
    if len(chosen) < len(plan.losses):  # the third trials depend on all losses
        return [job for wanted in all_trials.values() for job in wanted]
    tried = {loss: [job["settings"] for job in wanted] for loss, wanted in both.items()}
    for loss, points in settings_shared(chosen, tried).items():
        all_trials[loss] = both[loss] + [job_of("third trial", data, loss, point, TRIAL_SEED) for point in points]
    chosen = best_settings(data, all_trials, done)
    return [job for wanted in all_trials.values() for job in wanted] + [
        job_of("test", data, loss, best, seed) for loss, best in chosen.items() for seed in SEEDS
    ]


def ablation_jobs(done: list[dict]) -> list[dict]:
    """The jobs that vary one setting around the best first trial with AdamW, of the losses whose trials are done."""
    chosen = best_settings(ABLATED, first_trials(ABLATED, ("AdamW",)), done)
    return [
        job_of(f"ablation of {key}", ABLATED, loss, chosen[loss] | {key: value}, seed)
        for loss, keys in ABLATIONS.items()
        if loss in chosen
        for key, values in keys.items()
        for value in values
        for seed in ABLATION_SEEDS
    ]


def run(job: dict, cache: Path) -> dict:
    """Trains one model as `job` says and measures it, in stage "test" on the test rows, else on the validation rows."""
    task = load(job["data"], cache)
    how = (job[name] for name in ("settings", "seed", "epochs", "batch", "keep_by"))
    model, found = fit_best_epoch(task, LOSSES[job["loss"]], *how)
    return job | found | (measure(model, task, "test") if job["stage"] == "test" else {})


def left_of(wanted: list[dict], done: list[dict]) -> list[dict]:
    """The wanted jobs that are not on record."""
    have = {key_of(record) for record in done}
    return [job for job in wanted if key_of(job) not in have]


def key_of(job: dict) -> str:
    names = ("stage", "data", "loss", "settings", "seed", "epochs", "batch", "keep_by")
    return json.dumps([job[name] for name in names])


def records(folder: Path, collected: Path) -> list[dict]:
    """All runs on record: those that were collected, and those in `folder`, without a last line that was cut off."""
    found = json.loads(collected.read_text())["runs"] if collected.exists() else []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def collect(folder: Path, cache: Path, path: Path) -> None:
    """Writes the planned runs that are on record, one a line, and a description of the data, to one file."""
    have, found, described = records(folder, path), [], {}
    by_key = {key_of(record): record for record in have}
    for name, plan in PLANS.items():
        wanted = jobs(name, have)
        left = left_of(wanted, have)
        wanted += ablation_jobs(have) if name == ABLATED else []
        found += [by_key[key_of(job)] for job in wanted if key_of(job) in by_key]
        if left:
            print(f"{name}: at least {len(left)} runs are missing; continue with: python -m benchmarks.study")
        task = load(name, cache)
        rows = {part: len(target) for part, (_, target) in task.parts.items()}
        least, most = task.count().aminmax()
        described[name] = {"classes": task.classes, "rows": rows, "least": int(least), "most": int(most)}
        described[name] |= {"complete": not left, "losses": list(plan.losses), "keep_by": plan.keep_by}
    machine = {"threads": 1, "command": "python -m benchmarks.study"}
    machine |= {key: found[-1][key] for key in ("commit", "date")}  # of the runs, not of their collection
    if commits := {record["commit"] for record in found} - {machine["commit"]}:
        print(f"note: runs of other commits too: {sorted(commits)}")
    head = json.dumps({"environment": machine, "data": described}, indent=1)
    lines = ",\n".join("  " + json.dumps(record) for record in found)
    path.write_text(head[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n')
    print(f"{len(found)} runs: {path}")
