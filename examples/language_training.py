"""The language model, the losses under which it is compared, and its training and exact perplexity."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm, trange

from examples.data_sets.dictionary import Text
from examples.machine import PeakMemory
from examples.networks import LinearCrossEntropy
from topk_fast import LinearHead, SampledCrossEntropy

WIDTH = 128  # of the embedding and of the state
SEQUENCES, LENGTH = 16, 32  # words of a step
VALIDATION = 32 * SEQUENCES * LENGTH  # words on which the learning curves are measured
SAMPLES = {"cross-entropy": None} | {f"sampled, B = {b}": b for b in (1, 5, 16, 64)}  # None: all logits
SPARSE = "sampled, B = 16, sparse_grad"
LOSSES = (*SAMPLES, SPARSE)


@dataclass(frozen=True)
class Run:
    """One training, with the learning rate and eps of AdamW and of SparseAdam."""

    loss: str
    seed: int
    lr: float
    eps: float


class Body(nn.Module):
    """All but the head: words -> embedding -> one layer of gated recurrent units."""

    def __init__(self, n_words: int):
        super().__init__()
        self.embedding = nn.Embedding(n_words, WIDTH)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, words: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the next words [S * T, D] of words [S, T], and the state after them."""
        features, state = self.recurrent(self.embedding(words), state)
        return features.flatten(0, 1), state.detach()


def make_head(loss: str, n_words: int) -> nn.Module:
    n_sample = SAMPLES[loss.removesuffix(", sparse_grad")]
    if n_sample is None:
        return LinearCrossEntropy(WIDTH, n_words)
    return LinearHead(WIDTH, n_words, SampledCrossEntropy(n_sample), sparse_grad=loss == SPARSE)


def make_optimizers(run: Run, body: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for everything; SparseAdam for a head with sparse gradients."""
    sparse = [*head.parameters()] if run.loss == SPARSE else []
    dense = [*body.parameters()] if sparse else [*body.parameters(), *head.parameters()]
    optimizers = [torch.optim.AdamW(dense, run.lr, eps=run.eps, fused=True)]
    return optimizers + ([torch.optim.SparseAdam(sparse, run.lr, eps=run.eps)] if sparse else [])


def batches(words: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts a text into SEQUENCES parts of equal length, and reads all of them LENGTH words at a time.

    Yields:
        words [S, T] and the words that follow each, [S * T].
    """
    parts = torch.from_numpy(words[: len(words) // SEQUENCES * SEQUENCES]).view(SEQUENCES, -1)
    for at in range(0, parts.shape[1] - 1, LENGTH):
        both = parts[:, at : at + LENGTH + 1].long()
        yield both[:, :-1], both[:, 1:].flatten()


@torch.no_grad()
def perplexity(body: nn.Module, head: nn.Module, words: np.ndarray) -> float:
    """The exponential of the mean cross-entropy of all logits, with the state carried through the text."""
    total, n_words, state = 0.0, 0, None
    for batch, target in batches(words):
        features, state = body(batch, state)
        total += float(nn.functional.cross_entropy(head.logits(features), target, reduction="sum"))
        n_words += len(target)
    return math.exp(total / n_words)


class Training:
    """A model that reads the training text from a random place on, and the CPU time of each step."""

    def __init__(self, run: Run, text: Text, steps: int):
        torch.manual_seed(run.seed)
        self.body, self.head = Body(len(text.words)), make_head(run.loss, len(text.words))
        self.optimizers = make_optimizers(run, self.body, self.head)
        self.schedules = [
            OneCycleLR(optimizer, run.lr, steps, pct_start=0.1, cycle_momentum=False) for optimizer in self.optimizers
        ]
        start = np.random.default_rng(run.seed).integers(len(text.train))
        words = np.roll(text.train, -start)
        self.batches, self.state = chain.from_iterable(batches(words) for _ in count()), None
        self.seconds: list[tuple[float, float]] = []  # of each step and of its head and loss

    def step(self) -> float:
        """One step of truncated back-propagation, whose state comes from the step before; returns the loss."""
        words, target = next(self.batches)
        start = time.process_time()
        output, self.state = self.body(words, self.state)
        features = output.detach().requires_grad_()  # the backward pass stops here, so that the head is timed apart
        head_start = time.process_time()
        loss = self.head(features, target)
        loss.backward()
        head_end = time.process_time()
        output.backward(features.grad)
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.seconds.append((time.process_time() - start, head_end - head_start))
        return float(loss.detach())


def train(run: Run, text: Text, steps: int, evaluations: int, memory: PeakMemory) -> tuple[Training, dict]:
    """A training that ended, and its learning curve of so many evaluations and peak memory."""
    training, curve, peaks = Training(run, text, steps), [], []
    with tqdm(total=steps, desc=f"{run.loss}, seed {run.seed}", unit="step") as bar:
        for stop in np.linspace(0, steps, evaluations + 1).round().astype(int)[1:]:
            memory.reset()
            while bar.n < stop:
                bar.set_postfix(loss=f"{training.step():.3f}", refresh=False)
                bar.update()
            peaks.append(memory.peak())
            found = perplexity(training.body, training.head, text.val[:VALIDATION])
            curve.append({"step": int(stop), "validation perplexity": found})
    peak = None if None in peaks else max(peaks) / 2**20
    return training, {"curve": curve, "peak MiB": peak}


def time_steps(runs: list[Run], text: Text, rounds: int) -> dict[str, dict[str, float]]:
    """By loss, the median milliseconds of a step and, as a part of it, of head and loss, forward and backward.

    Each run takes one step in turn, so that other load of the machine slows all alike.
    """
    trainings = {run.loss: Training(run, text, rounds) for run in runs}
    for _ in trange(rounds, desc="timing", unit="round"):
        for training in trainings.values():
            training.step()
    medians = {name: (1e3 * np.median(training.seconds, axis=0)).tolist() for name, training in trainings.items()}
    return {name: {"CPU ms a step": step, "CPU ms of head": head} for name, (step, head) in medians.items()}
