"""The network, the losses it is compared under, and one training run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from topk_fast import BalNoisedTopK, ImbalNoisedTopK, NormedLinear

K = 5
N_SAMPLE = 5
BATCH = 256
HIDDEN = 256

CROSS_ENTROPY = "cross-entropy"
BALANCED = f"balanced top-{K}"
IMBALANCED = f"imbalanced top-{K}"
LOSSES = (CROSS_ENTROPY, BALANCED, IMBALANCED)


@dataclass(frozen=True)
class Settings:
    """What validation chooses; cross-entropy has no use for the last two, nor the balanced loss for the last."""

    lr: float
    weight_decay: float
    epsilon: float | None = None
    max_m: float | None = None


def make_loss(name: str, settings: Settings, class_count: Tensor, package: object | None = None) -> nn.Module:
    """The loss called `name`; `package` may be another module with the same class names, such as pytopk."""
    balanced = getattr(package, "BalNoisedTopK", BalNoisedTopK)
    imbalanced = getattr(package, "ImbalNoisedTopK", ImbalNoisedTopK)
    if name == CROSS_ENTROPY:
        return nn.CrossEntropyLoss()
    if name == BALANCED:
        return balanced(K, settings.epsilon, n_sample=N_SAMPLE)
    return imbalanced(K, settings.epsilon, settings.max_m, class_count.tolist(), n_sample=N_SAMPLE)


def make_model(name: str, n_features: int, n_classes: int) -> nn.Sequential:
    """One hidden layer; the imbalanced loss, whose margins are cosines, gets a cosine head."""
    head = NormedLinear if name == IMBALANCED else nn.Linear
    return nn.Sequential(nn.Linear(n_features, HIDDEN), nn.ReLU(), nn.Dropout(0.5), head(HIDDEN, n_classes))


def fit(
    name: str, settings: Settings, inputs: Tensor, group: Tensor, target: Tensor, n_classes: int, epochs: int, seed: int
) -> nn.Sequential:
    """Train on rows (inputs[group], target) for `epochs`, the learning rate falling to 0 along a half cosine.

    Args:
        inputs: [D, F] float32. group, target: [N] int64.
    """
    torch.manual_seed(seed)
    model = make_model(name, inputs.shape[1], n_classes)
    loss_of = make_loss(name, settings, target.bincount(minlength=n_classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    steps = -(-len(target) // BATCH) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for _ in range(epochs):
            running = 0.0
            batches = torch.randperm(len(target)).split(BATCH)
            for rows in batches:
                loss = loss_of(model(inputs[group[rows]]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                running += loss.detach() / len(batches)
                bar.update()
            bar.set_postfix(loss=f"{running:.3f}")
    return model.eval()


@torch.no_grad()
def scores_of(model: nn.Module, inputs: Tensor, group: Tensor) -> Tensor:
    """Scores of rows, the network run once for each distinct input: [N, C]."""
    used, position = group.unique(return_inverse=True)
    return model(inputs[used])[position]
