"""Which loss for which data: seven losses on four data sets, equal tuning, several seeds; and what K, B, epsilon, max_m do.

Each loss gets the same number of trials; the best on the validation rows is trained again under other seeds and measured
on the test rows. Everything it does is in study.json. A run that is interrupted goes on where it stopped.

    python examples/study.py                                # all of it (hours); records in out/study
    python examples/study.py --workers 4 --data species     # processes of one thread each; one data set alone
    python examples/study.py --collect benchmarks/results/study.json     # what has been recorded, in one file
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import study_data
from evaluation import ranks
from search import draw
from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NormedLinear

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import harness  # noqa: E402
from peers import FocalLoss, LDAMLoss, LogitAdjustedCrossEntropy, SmoothTopKSVM  # noqa: E402

BALANCED, IMBALANCED = "balanced noised top-K", "imbalanced noised top-K"
ON_COSINES = ("LDAM", IMBALANCED)  # their margins are differences of cosines
TOPS = (1, 5, 10, 20)
SHOTS = {"few": (1, 5), "medium": (5, 15), "many": (15, sys.maxsize)}  # training rows of a class, end excluded


def make_loss(name: str, s: dict, count: Tensor) -> nn.Module:
    """The loss called `name` with the settings `s`, for classes of `count` training rows."""
    rows = count.tolist()
    makers = {
        "cross-entropy": lambda: nn.CrossEntropyLoss(),
        "focal": lambda: FocalLoss(s["gamma"]),
        "LDAM": lambda: LDAMLoss(rows, s["max_m"], s["s"]),
        "logit-adjusted": lambda: LogitAdjustedCrossEntropy(rows, s["tau"]),
        "smooth top-K SVM": lambda: SmoothTopKSVM(s["k"], s["tau"]),
        BALANCED: lambda: BalNoisedTopK(s["k"], s["epsilon"], s["n_sample"]),
        IMBALANCED: lambda: ImbalNoisedTopK(s["k"], s["epsilon"], s["max_m"], rows, n_sample=s["n_sample"]),
    }
    return makers[name]()


def make_model(data: study_data.Data, loss: str) -> nn.Sequential:
    """One hidden layer for the species, three convolutions and one for the glyphs; a cosine head where margins need one."""
    head = NormedLinear if loss in ON_COSINES else nn.Linear
    if data.name == "species":
        body = [nn.Linear(data.inputs.shape[1], 256), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*body, head(256, data.classes))
    body, channels = [], (1, 16, 32, 64)
    for before, after in zip(channels, channels[1:]):
        body += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    flat = channels[-1] * (-(-data.inputs.shape[-1] // 8)) ** 2
    body += [nn.Flatten(), nn.Linear(flat, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, head(128, data.classes))


@lru_cache(maxsize=1)
def data_set(name: str, cache: Path) -> study_data.Data:
    return study_data.load(name, cache)


def run(job: dict, cache: Path) -> dict:
    """Train one model as `job` says, and measure it on the test rows (stage "test") or the validation rows (all else)."""
    data, s = data_set(job["data"], cache), job["settings"]
    torch.manual_seed(job["seed"])
    model, loss_of = make_model(data, job["loss"]), make_loss(job["loss"], s, data.count())
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"], fused=True)
    rows, target = data.parts["train"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["epochs"] * -(-len(rows) // job["batch"]))
    start = time.process_time()
    for _ in range(job["epochs"]):
        for batch in torch.randperm(len(rows)).split(job["batch"]):
            loss = loss_of(model(data.inputs[rows[batch]]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = (time.process_time() - start) / job["epochs"]
    part = data.parts["test" if job["stage"] == "test" else "val"]
    return job | measure(model.eval(), data, *part) | {"seconds an epoch": round(seconds, 3)}


@torch.no_grad()
def measure(model: nn.Module, data: study_data.Data, rows: Tensor, target: Tensor) -> dict:
    """Top-k over the rows, over the classes (macro), and top-5 over the rows of classes with few, medium, many shots."""
    rank = torch.cat([ranks(model(data.inputs[r]), t) for r, t in zip(rows.split(1024), target.split(1024))])
    shots, seen = data.count()[target], target.bincount(minlength=data.classes)
    share = {f"top-{k}": (rank < k).double() for k in TOPS}
    result = {name: hit.mean() for name, hit in share.items()}
    for name in ("top-1", "top-5"):
        hits = torch.zeros(data.classes, dtype=torch.double).index_add_(0, target, share[name])
        result[f"macro {name}"] = (hits[seen > 0] / seen[seen > 0]).mean()
    for name, (low, end) in SHOTS.items():
        inside = (shots >= low) & (shots < end)
        result[name] = share["top-5"][inside].mean() if inside.any() else None
    return {name: None if value is None else round(float(value), 5) for name, value in result.items()}


def jobs(config: dict, data: str, done: list[dict]) -> tuple[list[dict], list[dict]]:
    """What a data set takes, as far as it is known, and what of it is left to do.

    First the trials: learning rate and weight decay from one sequence, the same for all losses, each loss's own parameters
    from another. Once a loss's trials are done, the runs of the best of them.
    """

    def job(stage: str, loss: str, settings: dict, seed: int) -> dict:
        length = {name: config["data"][data][name] for name in ("epochs", "batch")}
        return {"stage": stage, "data": data, "loss": loss, "settings": settings, "seed": seed} | length

    have = {key_of(record): record for record in done}
    n_trials, seed = config["data"][data]["trials"], config["trial_seed"]
    fixed = {"k": config["k"], "n_sample": config["n_sample"]}
    wanted = []
    for loss, space in config["losses"].items():
        points = zip(draw(config["optimizer"], n_trials, seed), draw(space, n_trials, seed + 1))
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
    """All runs on record; a last line that was cut off is left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--data", choices=study_data.NAMES, nargs="+", default=study_data.NAMES)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--collect", type=Path, help="run nothing; put the records into this file")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and rendered data")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study", help="folder of the records")
    return parser.parse_args()


def collect(config: dict, folder: Path, cache: Path, path: Path) -> None:
    """The configured runs and what the data are, in one file, a run a line; refused while runs are missing."""
    have, found, described = records(folder), [], {}
    by_key = {key_of(record): record for record in have}
    for name in config["data"]:
        wanted, left = jobs(config, name, have)
        if left:
            sys.exit(f"{name}: runs are missing, {len(left)} at least; go on with: python examples/study.py")
        found += [by_key[key_of(job)] for job in wanted]
        data = study_data.load(name, cache)
        rows = {part: len(target) for part, (_, target) in data.parts.items()}
        least, most = data.count().aminmax()
        described[name] = {"classes": data.classes, "rows": rows, "least": int(least), "most": int(most)}
    environment = harness.environment("cpu") | {"threads": 1, "command": "python examples/study.py"}
    environment |= {key: found[-1][key] for key in ("commit", "date")}  # of the runs, not of their collection
    if commits := {record["commit"] for record in found} - {environment["commit"]}:
        print(f"note: runs of other commits too: {sorted(commits)}")
    head = json.dumps({"environment": environment, "config": config, "data": described}, indent=1)
    lines = ",\n".join("  " + json.dumps(record) for record in found)
    path.write_text(head[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n')
    print(f"{len(found)} runs: {path}")


def main() -> None:
    args = arguments()
    config = json.loads(args.config.read_text())
    if args.collect:
        collect(config, args.out, args.cache, args.collect)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.data:
        data_set(name, args.cache)  # fetched and rendered once, before there are several processes
    stamp = {key: harness.environment("cpu")[key] for key in ("commit", "date")}
    # Each start of the program writes a file of its own: no half-written line is ever appended to.
    path = args.out / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, torch.set_num_threads, (1,)) as pool, path.open("w", buffering=1) as file:
        for name in args.data:
            while left := jobs(config, name, records(args.out))[1]:
                for record in tqdm(
                    pool.imap_unordered(partial(run, cache=args.cache), left), name, total=len(left), unit="run"
                ):
                    file.write(json.dumps(record | stamp) + "\n")


if __name__ == "__main__":
    main()
