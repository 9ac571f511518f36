"""The networks of the tasks: a body that ends in FEATURES features, and a head with a row of weights for each class."""

import torch
from torch import Tensor, nn

from topk_fast import NormedLinear

FEATURES = 128


class LinearCrossEntropy(nn.Linear):
    """The plain form of a `LinearHead`, which computes all logits and then their cross-entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(input), target)

    def logits(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.logits(input).topk(k)


class CosineHead(NormedLinear):
    """Scores that are cosines times `scale`; rows of the weight start with the length `length`."""

    def __init__(self, in_features: int, out_features: int, scale: float, length: float = 1.0):
        super().__init__(in_features, out_features)
        self.scale = scale
        with torch.no_grad():
            self.weight.mul_(length)

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


def convolutions(size: int) -> nn.Sequential:
    """For images [N, 1, size, size]: three convolutions and a hidden layer."""
    layers, channels = [], (1, 16, 32, 64)
    for before, after in zip(channels, channels[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    flat = channels[-1] * (-(-size // 8)) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.2)).to(memory_format=torch.channels_last)  # faster on a CPU


def kana(length: int) -> nn.Sequential:
    """For codes below 256 of kana [N, length]: an embedding of each place's kana and two hidden layers."""
    hidden = 256
    layers = [nn.Embedding(256, 32), nn.Flatten(), nn.Linear(32 * length, hidden, bias=False)]
    layers += [nn.BatchNorm1d(hidden), nn.ReLU()]
    layers += [nn.Linear(hidden, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.2))


def hidden_layers(n_inputs: int) -> nn.Sequential:
    """For vectors [N, n_inputs]: two hidden layers."""
    width = 256
    layers = [nn.Linear(n_inputs, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, FEATURES), nn.ReLU()]
    return nn.Sequential(*layers)


def body_for(task: str, inputs: Tensor) -> nn.Module:
    """The body of a task, which turns its `inputs` into FEATURES features."""
    if task == "features":
        return nn.Identity()  # a pretrained network made them
    if task == "kanji":
        return kana(inputs.shape[1])
    return hidden_layers(inputs.shape[1]) if task == "species" else convolutions(inputs.shape[-1])
