"""Every named species of the 16S set, most of them seen once: a last layer of tens of thousands of classes.

Trains one network under linear + cross-entropy, and under linear losses whose weight has a row-sparse gradient for
SparseAdam: the sampled cross-entropy, and the noised top-K loss. Prints time, memory and accuracy of all.

    python -m examples.all_species                                                # all three, one process
    python -m examples.all_species --memory-only                                  # which needs no idle machine
    torchrun --nproc-per-node 2 -m examples.all_species --losses sampled topk     # the classes over two processes

With `--sampler dense --seed 0`, any number of processes computes the losses of one except for rounding, as the JSON
files show. Each process sees the same batches: the classifier is sharded, not the data.
"""

import argparse
import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from examples.data_sets import species
from examples.data_sets.dataset import Dataset, shuffle_within_classes
from examples.machine import ROOT, environment, measure_peak
from examples.networks import LinearCrossEntropy
from examples.report import table, write
from examples.training import take_steps
from topk_fast import BalNoisedTopK, LinearHead, SampledCrossEntropy

HIDDEN, BATCH, K, N_SAMPLE = 256, 256, 5, 16
LOGIT_ROWS = 64  # test rows, drawn at random, whose logits are saved on request
TEST_SHARE = 4  # every fourth gene of a species is a test gene; a species with fewer has none
LOSSES = ("cross-entropy", "sampled", "topk")
IN_A_ROW = 10  # steps of a loss, before the next one has its turn: their times share what else the machine does
# Of the hidden layer and of the classifier. By hand, for the best top-5 on validation rows (--validation), from ten
# settings or more of each loss: the same are best for all three. So was epsilon of the top-K loss.
LEARNING_RATES = (5e-5, 1e-2)
COST, ACCURACY = ("ms a step", "CPU ms a step", "MiB a step"), ("top-1", "top-5", "top-10")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", choices=LOSSES, nargs="+", default=LOSSES)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epsilon", type=float, default=5.0, help="of the top-K loss")
    parser.add_argument("--lr", type=float, nargs=2, default=LEARNING_RATES, help="hidden layer's and classifier's")
    parser.add_argument("--sampler", choices=["thinned", "dense"], default="thinned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--validation", action="store_true", help="measure on a part of the training rows, to choose by"
    )
    parser.add_argument("--memory-only", action="store_true", help="two steps of each loss: neither times nor accuracy")
    parser.add_argument("--save-logits", type=Path, help="file for logits of test rows, on which benchmarks can run")
    parser.add_argument("--cache", type=Path, default=ROOT / "data", help="folder of downloaded and parsed data")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "all_species.json")
    args = parser.parse_args(argv)
    if args.save_logits and "cross-entropy" not in args.losses:
        parser.error("--save-logits saves those of cross-entropy, which --losses leaves out")
    if "RANK" in os.environ and "cross-entropy" in args.losses:
        parser.error("the plain form has all classes in one process: under torchrun pass --losses sampled topk")
    return args


def split(target: np.ndarray, gene: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training and for the test; every fourth gene of a species, in random order, is a test gene.

    All rows of a test gene, which may belong to several species, are test rows, except those of species without a
    training row.
    """
    species_of, genes = np.unique(np.stack([target, gene]), axis=1)
    order, rank = shuffle_within_classes(species_of, seed)
    tested = np.isin(gene, genes[order[rank % TEST_SHARE == TEST_SHARE - 1]])
    known = np.isin(target, target[~tested])
    return torch.from_numpy(np.flatnonzero(~tested)), torch.from_numpy(np.flatnonzero(tested & known))


def features(data: Dataset, rows: Tensor) -> Tensor:
    return data.features(data.group[rows.numpy()])


def make_head(name: str, n_classes: int, args: argparse.Namespace, group) -> nn.Module:
    if name == "cross-entropy":
        return LinearCrossEntropy(HIDDEN, n_classes, bias=False)
    if name == "sampled":
        criterion = SampledCrossEntropy(N_SAMPLE, sampler=args.sampler)
    else:
        criterion = BalNoisedTopK(K, args.epsilon, sampler=args.sampler)
    return LinearHead(HIDDEN, n_classes, criterion, bias=False, sparse_grad=True, process_group=group)


class Training:
    """A hidden layer and a classifier under one of the losses, and the losses, memory and times of their steps.

    With one seed all losses have the same first weights and the same batches.
    """

    def __init__(self, name: str, data: Dataset, rows: Tensor, args: argparse.Namespace, group):
        torch.manual_seed(args.seed)
        self.hidden = nn.Sequential(nn.Linear(data.inputs.shape[1], HIDDEN), nn.ReLU(), nn.Dropout(0.5))
        self.head = make_head(name, len(data.classes), args, group)
        lr, lr_head = args.lr
        adam = torch.optim.Adam if name == "cross-entropy" else torch.optim.SparseAdam
        optimizers = [torch.optim.AdamW(self.hidden.parameters(), lr), adam(self.head.parameters(), lr_head)]
        target = torch.from_numpy(data.target)

        def loss_of(numbers: Tensor) -> Tensor:
            batch = rows[numbers]
            return self.head(self.hidden(features(data, batch)), target[batch])

        order = torch.Generator().manual_seed(args.seed)
        self.steps = take_steps(loss_of, len(rows), BATCH, optimizers, order)
        self.losses, self.seconds, self.cpu_seconds = [next(self.steps)], 0.0, 0.0  # makes the optimizers' state
        self.peak = measure_peak(lambda: self.losses.append(next(self.steps)))
        self.noise = torch.get_rng_state()

    def take(self, n_steps: int) -> None:
        """Some steps, which are timed. Other losses draw between them, which changes nothing here."""
        torch.set_rng_state(self.noise)
        start, spent = time.perf_counter(), time.process_time()
        self.losses += islice(self.steps, n_steps)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - spent
        self.noise = torch.get_rng_state()

    def costs(self) -> dict[str, float]:
        """What a step takes; times where any were timed, which the first two steps were not."""
        found, timed = {"MiB a step": self.peak / 2**20}, len(self.losses) - 2
        if timed:
            found |= {"ms a step": 1e3 * self.seconds / timed, "CPU ms a step": 1e3 * self.cpu_seconds / timed}
        return found


def train(trainings: dict[str, Training], n_steps: int, quiet: bool | None) -> None:
    """Trains all until each has taken ``n_steps``, some steps of one after some of the other."""
    taken = sum(len(t.losses) for t in trainings.values())
    with tqdm(total=n_steps * len(trainings), initial=taken, unit="step", disable=quiet) as bar:
        while left := [(name, t) for name, t in trainings.items() if len(t.losses) < n_steps]:
            for name, training in left:
                n = min(IN_A_ROW, n_steps - len(training.losses))
                training.take(n)
                bar.update(n)
                bar.set_postfix({name: f"{training.losses[-1]:.3f}"}, refresh=False)


@torch.no_grad()
def save_logits(path: Path, hidden: nn.Module, head: nn.Linear, data: Dataset, rows: Tensor) -> None:
    """Saves logits (float16) and target of some rows, for benchmarks on scores that come from training."""
    logits = nn.functional.linear(hidden(features(data, rows)), head.weight, head.bias)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"logits": logits.half(), "target": torch.from_numpy(data.target)[rows]}, path)


@torch.no_grad()
def accuracy(hidden: nn.Module, head: nn.Module, data: Dataset, rows: Tensor, k: tuple[int, ...] = (1, 5, 10)) -> dict:
    target = torch.from_numpy(data.target)
    best = torch.cat([head.topk(hidden(features(data, batch)), max(k))[1] for batch in rows.split(1024)])
    hits = best == target[rows, None]
    return {f"top-{i}": float(hits[:, :i].any(1).float().mean()) for i in k}


def compare(args: argparse.Namespace, group=None) -> dict:
    """Trains under each of `args.losses` and measures; prints what the data are and one line a loss."""
    talks = group is None or group.rank() == 0
    data = species.load(args.cache, whole=True)
    train_rows, test_rows = split(data.target, data.group, 0)
    if args.validation:
        inner = split(data.target[train_rows.numpy()], data.group[train_rows.numpy()], 1)
        train_rows, test_rows = (train_rows[part] for part in inner)
    count = torch.from_numpy(data.target).bincount()
    facts = {"rows": len(data.target), "classes": len(data.classes), "test rows": len(test_rows)}
    facts["seen once"] = float((count == 1).float().mean())
    if talks:
        print(
            f"{facts['rows']:,} rows of {facts['classes']:,} species, {facts['seen once']:.0%} of them seen once; "
            f"{facts['test rows']:,} test rows"
        )
    result = facts | {"processes": 1 if group is None else group.size(), "losses": {}}
    trainings = {name: Training(name, data, train_rows, args, group) for name in args.losses}
    if not args.memory_only:
        # None: a bar where the output is a terminal
        train(trainings, args.epochs * -(-len(train_rows) // BATCH), None if talks else True)
    for name, training in trainings.items():
        hidden, head = training.hidden.eval(), training.head
        found = {"losses": training.losses} | training.costs()
        if not args.memory_only:
            found |= accuracy(hidden, head, data, test_rows)
        result["losses"][name] = found
        if talks:
            print(f"{name}: " + ", ".join(f"{found[key]:.0f} {key}" for key in COST if key in found), flush=True)
        if args.save_logits and name == "cross-entropy":
            drawn = torch.randperm(len(test_rows), generator=torch.Generator().manual_seed(0))[:LOGIT_ROWS]
            save_logits(args.save_logits, hidden, head, data, test_rows[drawn])
    return result


def show(result: dict) -> None:
    print(
        f"\nA training step, {torch.get_num_threads()} threads a process; accuracy in percent of test rows. Memory is"
    )
    print("what a step takes at its peak, beyond what weights, optimizers' state and data hold:")
    rows = result["losses"].items()
    print(table({name: {c: row[c] for c in COST} | {c: 100 * row[c] for c in ACCURACY} for name, row in rows}, unit=1))


def main() -> None:
    args = arguments()
    group = None
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    result = {"environment": environment()} | compare(args, group)
    if group is None or group.rank() == 0:
        if not args.memory_only:
            show(result)
        write(args.out, result)
        print(f"\nfigures: {args.out}")
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
