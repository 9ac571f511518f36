"""The language model, the losses under which it is compared, and its training and exact perplexity."""

from __future__ import annotations

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
from topk_fast import LinearHead, SampledCrossEntropy

WIDTH = 128  # of the embedding and of the state
SEQUENCES, LENGTH = 16, 32  # words of a step
VALIDATION = 32 * SEQUENCES * LENGTH  # words on which the learning curves are measured


@dataclass(frozen=True)
class Loss:
    """A loss and what validation chose for it."""

    n_sample: int | None  # None: the cross-entropy of all logits
    lr: float
    eps: float  # AdamW's, and SparseAdam's
    sparse: bool = False  # the head's gradient, for SparseAdam


@dataclass(frozen=True)
class Run:
    """One training."""

    name: str  # of the loss
    loss: Loss
    seed: int
    steps: int
    evaluations: int  # points of the learning curve


class LinearCrossEntropy(nn.Linear):
    """The plain form, which computes all logits and then their cross-entropy."""

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(features), target)

    def logits(self, features: Tensor) -> Tensor:
        return super().forward(features)


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


def make_head(loss: Loss, n_words: int) -> nn.Module:
    if loss.n_sample is None:
        return LinearCrossEntropy(WIDTH, n_words)
    return LinearHead(WIDTH, n_words, SampledCrossEntropy(loss.n_sample), sparse_grad=loss.sparse)


def make_optimizers(loss: Loss, body: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for everything; SparseAdam for a head with sparse gradients."""
    dense = [*body.parameters()] if loss.sparse else [*body.parameters(), *head.parameters()]
    optimizers = [torch.optim.AdamW(dense, loss.lr, eps=loss.eps, fused=True)]
    if loss.sparse:
        optimizers.append(torch.optim.SparseAdam(head.parameters(), loss.lr, eps=loss.eps))
    return optimizers


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


def clock() -> np.ndarray:
    """Seconds of this process's CPU time and of wall time."""
    return np.array([time.process_time(), time.perf_counter()])


class Training:
    """A model that reads the training text from a random place on, and the time of each step."""

    def __init__(self, run: Run, text: Text):
        torch.manual_seed(run.seed)
        loss, n_words = run.loss, len(text.words)
        self.body, self.head = Body(n_words), make_head(loss, n_words)
        self.optimizers = make_optimizers(loss, self.body, self.head)
        self.schedules = [
            OneCycleLR(optimizer, loss.lr, run.steps, pct_start=0.1, cycle_momentum=False)
            for optimizer in self.optimizers
        ]
        start = np.random.default_rng(run.seed).integers(len(text.train))
        words = np.roll(text.train, -start)
        self.batches, self.state = chain.from_iterable(batches(words) for _ in count()), None
        self.seconds: list[list[np.ndarray]] = []  # of each step and of its head and loss

    def step(self) -> float:
        """One step of truncated back-propagation, whose state comes from the step before; returns the loss."""
        words, target = next(self.batches)
        start = clock()
        output, self.state = self.body(words, self.state)
        features = output.detach().requires_grad_()  # the backward pass stops here, so that the head is timed apart
        head_start = clock()
        loss = self.head(features, target)
        loss.backward()
        head_end = clock()
        output.backward(features.grad)
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.seconds.append([clock() - start, head_end - head_start])
        return float(loss.detach())

    def median_times(self) -> dict[str, float]:
        """Milliseconds of a step and, as a part of it, of head and loss, forward and backward."""
        (cpu, wall), (head_cpu, head_wall) = (1e3 * np.median(self.seconds, axis=0)).tolist()
        return {"CPU ms a step": cpu, "CPU ms of head": head_cpu, "ms a step": wall, "ms of head": head_wall}


def train(run: Run, text: Text, memory: PeakMemory) -> tuple[nn.Module, nn.Module, dict]:
    """The trained body and head, and the learning curve and peak memory of training."""
    training, curve, peaks = Training(run, text), [], []
    with tqdm(total=run.steps, desc=f"{run.name}, seed {run.seed}", unit="step") as bar:
        for stop in np.linspace(0, run.steps, run.evaluations + 1).round().astype(int)[1:]:
            memory.reset()
            while bar.n < stop:
                bar.set_postfix(loss=f"{training.step():.3f}", refresh=False)
                bar.update()
            peaks.append(memory.peak())
            found = perplexity(training.body, training.head, text.val[:VALIDATION])
            curve.append({"step": int(stop), "validation perplexity": found})
    peak = None if None in peaks else max(peaks) / 2**20
    return training.body, training.head, {"curve": curve, "peak MiB": peak}


def time_steps(losses: dict[str, Loss], text: Text, rounds: int) -> dict[str, dict[str, float]]:
    """The times of each loss, from one step of each in turn, so that other load of the machine slows all alike."""
    trainings = {name: Training(Run(name, loss, 0, rounds, 1), text) for name, loss in losses.items()}
    for _ in trange(rounds, desc="timing", unit="round"):
        for training in trainings.values():
            training.step()
    return {name: training.median_times() for name, training in trainings.items()}
