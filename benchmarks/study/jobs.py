"""The runs that the study's configuration asks for, those on record, and their collection in one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.study.data import load
from examples.machine import environment
from examples.trials import draw_points


def jobs(config: dict, data: str, done: list[dict]) -> tuple[list[dict], list[dict]]:
    """The jobs of a data set, as far as they are known, and those of them that are left to do.

    The trials come first: learning rate and weight decay come from one sequence, which is the same for all losses, and
    each loss's own parameters from another. Once a loss's trials are done, its best trial is run on the test rows.
    """

    def job(stage: str, loss: str, settings: dict, seed: int) -> dict:
        length = {name: config["data"][data][name] for name in ("epochs", "batch")}
        return {"stage": stage, "data": data, "loss": loss, "settings": settings, "seed": seed} | length

    have = {key_of(record): record for record in done}
    n_trials, seed = config["data"][data]["trials"], config["trial_seed"]
    fixed = {"k": config["k"], "n_sample": config["n_sample"]}
    wanted = []
    for loss, space in config["losses"].items():
        points = zip(draw_points(config["optimizer"], n_trials, seed), draw_points(space, n_trials, seed + 1))
        trials = [job("trial", loss, common | own | fixed, seed) for common, own in points]
        wanted += trials
        found = [have[key_of(trial)] for trial in trials if key_of(trial) in have]
        if len(found) < n_trials:
            continue
        best = max(found, key=lambda record: record[config["criterion"]])["settings"]
        wanted += [job("test", loss, best, seed) for seed in config["seeds"]]
        if data == config["ablations"]["data"]:
            wanted += [
                job(f"ablation of {key}", loss, best | {key: value}, seed)
                for key, values in config["ablations"].get(loss, {}).items()
                for value in values
                for seed in config["ablations"]["seeds"]
            ]
    return wanted, [job for job in wanted if key_of(job) not in have]


def key_of(job: dict) -> str:
    return json.dumps([job[name] for name in ("stage", "data", "loss", "settings", "seed", "epochs", "batch")])


def records(folder: Path) -> list[dict]:
    """All runs on record, without a last line that was cut off."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def collect(config: dict, folder: Path, cache: Path, path: Path) -> None:
    """Writes the configured runs, one a line, and a description of the data to one file; exits if runs are missing."""
    have, found, described = records(folder), [], {}
    by_key = {key_of(record): record for record in have}
    for name in config["data"]:
        wanted, left = jobs(config, name, have)
        if left:
            sys.exit(f"{name}: runs are missing, {len(left)} at least; continue with: python -m benchmarks.study")
        found += [by_key[key_of(job)] for job in wanted]
        data = load(name, cache)
        rows = {part: len(target) for part, (_, target) in data.parts.items()}
        least, most = data.count().aminmax()
        described[name] = {"classes": data.classes, "rows": rows, "least": int(least), "most": int(most)}
    machine = environment() | {"threads": 1, "command": "python -m benchmarks.study"}
    machine |= {key: found[-1][key] for key in ("commit", "date")}  # of the runs, not of their collection
    if commits := {record["commit"] for record in found} - {machine["commit"]}:
        print(f"note: runs of other commits too: {sorted(commits)}")
    head = json.dumps({"environment": machine, "config": config, "data": described}, indent=1)
    lines = ",\n".join("  " + json.dumps(record) for record in found)
    path.write_text(head[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n')
    print(f"{len(found)} runs: {path}")
