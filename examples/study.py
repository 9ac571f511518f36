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
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import study_data
from evaluation import ranks
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
    """Train one model as `job` says, and measure it on the validation rows (a trial) or the test rows (all else)."""
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
    part = data.parts["val" if job["stage"] == "trial" else "test"]
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


def draw(space: dict[str, list[float]], trials: int, seed: int) -> list[dict[str, float]]:
    """`trials` points of a box of (low, high), log-uniform, from a scrambled Sobol sequence, rounded to two digits."""
    points = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed).draw(trials).tolist()
    place = lambda low, high, u: float(f"{low * (high / low) ** u:.2g}")  # noqa: E731
    return [{key: place(*space[key], u) for key, u in zip(space, point)} for point in points]


def jobs(config: dict, data: str, done: list[dict]) -> list[dict]:
    """What is left to do for a data set: first the trials; once these are done, what follows from the best of each loss."""

    def job(stage: str, loss: str, settings: dict, seed: int) -> dict:
        length = {name: config["data"][data][name] for name in ("epochs", "batch")}
        return {"stage": stage, "data": data, "loss": loss, "settings": settings, "seed": seed} | length

    n_trials = config["data"][data]["trials"]
    fixed = {"k": config["k"], "n_sample": config["n_sample"]}
    wanted = [
        job("trial", loss, settings | fixed, config["trial_seed"])
        for loss, space in config["losses"].items()
        for settings in draw(config["optimizer"] | space, n_trials, config["trial_seed"])
    ]
    best = {}
    for loss in config["losses"]:
        trials = [r for r in done if (r["stage"], r["data"], r["loss"]) == ("trial", data, loss)]
        if len(trials) == n_trials:
            best[loss] = max(trials, key=lambda r: r[config["criterion"]])["settings"]
    wanted += [job("test", loss, settings, seed) for loss, settings in best.items() for seed in config["seeds"]]
    if data == config["ablations"]["data"]:
        wanted += [
            job(f"ablation of {key}", loss, best[loss] | {key: value}, seed)
            for loss in (BALANCED, IMBALANCED)
            if loss in best
            for key, values in config["ablations"][loss].items()
            for value in values
            for seed in config["seeds"]
        ]
    have = {key_of(record) for record in done}
    return [j for j in wanted if key_of(j) not in have]


def key_of(job: dict) -> str:
    return json.dumps([job[name] for name in ("stage", "data", "loss", "settings", "seed", "epochs", "batch")])


def records(folder: Path) -> list[dict]:
    """All runs on record; a last line that was cut off is left out."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def _start(cache: Path) -> None:
    torch.set_num_threads(1)
    run.cache = cache


def _run(job: dict) -> dict:
    return run(job, run.cache)


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
    """The records of the configured runs, and what the data are, in one file: a run a line."""
    found = records(folder)
    described = {}
    for name in {r["data"] for r in found}:
        data = study_data.load(name, cache)
        rows = {part: len(target) for part, (_, target) in data.parts.items()}
        least, most = data.count().aminmax()
        described[name] = {"classes": data.classes, "rows": rows, "least": int(least), "most": int(most)}
    left = sum(len(jobs(config, name, found)) for name in config["data"])
    head = {"environment": harness.environment("cpu") | {"threads": 1}, "config": config, "data": described}
    head |= {"missing_runs": left}
    lines = ",\n".join("  " + json.dumps(record) for record in found)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n')
    print(f"{len(found)} runs, {left} missing: {path}")


def main() -> None:
    args = arguments()
    config = json.loads(args.config.read_text())
    if args.collect:
        collect(config, args.out, args.cache, args.collect)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.data:
        data_set(name, args.cache)  # fetched and rendered once, before there are several processes
    # Each start of the program writes a file of its own: no half-written line is ever appended to.
    path = args.out / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, _start, (args.cache,)) as pool, path.open("w", buffering=1) as file:
        for name in args.data:
            while left := jobs(config, name, records(args.out)):
                for record in tqdm(pool.imap_unordered(_run, left), name, total=len(left), unit="run"):
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
