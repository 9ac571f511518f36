"""Contract under test: the mean of the sampled cross-entropy and of its gradient are cross-entropy's, for any scores.

Seeds are fixed, so that a test fails or passes for good. A mean may be off by 4 of its standard errors; the largest
of many deviations by what a right one exceeds with probability LEVEL.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from testing import BACKENDS, ROOT
from topk_fast import LinearHead, SampledCrossEntropy
from topk_fast.functional import linear_sampled_cross_entropy, sampled_cross_entropy

B, LEVEL = 4, 1e-4
ROWS = 20_000 if BACKENDS[0] == "cpp" else 2000  # one backend is enough, since all have the same bits


@pytest.fixture(scope="module")
def bigrams():
    """Features, weight, bias and next words of a small language model, trained on this project's own pages."""
    words = [word for page in sorted((ROOT / "docs").glob("*.md")) for word in re.findall(r"\w+", page.read_text())]
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = torch.tensor([number[word] for word in words])
    torch.manual_seed(0)
    embedding, layer = nn.Embedding(len(number), 24), nn.Linear(24, len(number))
    optimizer = torch.optim.AdamW([*embedding.parameters(), *layer.parameters()], lr=0.02)
    for rows in torch.randperm(len(ids) - 1).repeat(2).split(512):
        optimizer.zero_grad()
        F.cross_entropy(layer(embedding(ids[rows])), ids[rows + 1]).backward()
        optimizer.step()
    rows = torch.randperm(len(ids) - 1)[:64]
    return embedding(ids[rows]).detach(), layer.weight.detach(), layer.bias.detach(), ids[rows + 1]


def scores_of(kind, bigrams):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, _ = bigrams
    return {
        "flat": torch.zeros(300),
        "normal": torch.randn(1500, generator=generator),
        "wide": 5 * torch.randn(1500, generator=generator),
        "masked": torch.randn(1500, generator=generator).masked_fill(torch.arange(1500) % 3 == 0, -torch.inf),
        "few classes": torch.tensor([1.0, 0.0, -1.0]),
        "real logits": F.linear(x[0], weight, bias),
        "other real logits": F.linear(x[1], weight, bias),
    }[kind]


def largest_deviation(n):
    """Of n means, in standard errors."""
    return stats.norm.isf(LEVEL / (2 * n))


KINDS = ("flat", "normal", "wide", "masked", "few classes", "real logits", "other real logits")


@pytest.mark.parametrize("sampler", ["thinned", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row(kind, sampler, bigrams):
    """Many rows alike: the mean loss, its standard deviation, and how often each class was drawn."""
    scores = scores_of(kind, bigrams)
    target = int(scores.argsort()[-2])
    rows = scores.expand(ROWS, -1).clone().requires_grad_()
    losses = sampled_cross_entropy(rows, torch.full((ROWS,), target), B, reduction="none", seed=7, sampler=sampler)
    error = losses.std() / ROWS**0.5
    exact = F.cross_entropy(scores, torch.tensor(target))
    print(f"mean loss {losses.mean():.4f}, exactly {exact:.4f}, standard error {error:.4f}")
    assert (losses.mean() - exact).abs() < 4 * error
    deviation = torch.pi / (6 * B) ** 0.5  # as the docstring says, for any scores
    assert abs(losses.std() / deviation - 1) < 3 / ROWS**0.5  # some 4 standard errors: 2 % of 20 000 rows

    (grad,) = torch.autograd.grad(losses.sum(), rows)
    assert ((grad != 0).sum(1) <= B + 1).all()
    counts = (grad * B).sum(0)  # how often each class was drawn, less B for each row's target
    counts[target] += B * ROWS
    expected = B * ROWS * scores.double().softmax(0)
    often = expected >= 20
    z = (counts - expected)[often] / (expected * (1 - expected / (B * ROWS)))[often].sqrt()
    seen, due = ([*x[often].tolist(), x[~often].sum().item()] for x in (counts, expected))
    if due[-1] < 20:
        seen, due = seen[:-1], [n * sum(seen[:-1]) / sum(due[:-1]) for n in due[:-1]]
    p = stats.chisquare(seen, due, sum_check=False).pvalue
    print(f"chi-square p = {p:.3g} over {len(due)} classes, largest deviation {z.abs().max():.2f} standard errors")
    assert p > LEVEL and z.abs().max() < largest_deviation(len(z))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_of_real_logits(weighted, bigrams):
    """Means over seeds of the loss and its gradient in the features, with and without weights of the classes."""
    x, weight, bias, target = bigrams
    x = x.clone().requires_grad_()
    classes = torch.linspace(0.5, 2.0, len(weight)) if weighted else None
    exact = F.cross_entropy(F.linear(x, weight, bias), target, classes)
    (wanted,) = torch.autograd.grad(exact, x)
    found = []
    for seed in range(600):
        loss = linear_sampled_cross_entropy(x, weight, target, B, linear_bias=bias, weight=classes, seed=seed)
        (grad,) = torch.autograd.grad(loss, x)
        found.append(torch.cat([loss.detach()[None], grad.flatten()]))
    found, wanted = torch.stack(found), torch.cat([exact.detach()[None], wanted.flatten()])
    z = (found.mean(0) - wanted) / (found.std(0) / len(found) ** 0.5)
    spread = z[1:].square().mean().sqrt()
    print(f"loss {z[0]:.2f} standard errors off, gradient {z[1:].abs().max():.2f} at most and {spread:.3f} on average")
    assert z[0].abs() < 4 and z[1:].abs().max() < largest_deviation(len(z) - 1) and 0.9 < spread < 1.1


def test_training_ends_where_cross_entropy_does():
    """A small model under both losses: the same exact loss within what two samplings of its batches differ by."""

    def train(step_of, seed):
        torch.manual_seed(0)
        head = LinearHead(8, 50, SampledCrossEntropy(16))
        centers = torch.randn(50, 8)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for _ in range(400):
            y = torch.randint(50, (128,), generator=generator)
            x = centers[y] + torch.randn(128, 8, generator=generator)
            optimizer.zero_grad()
            step_of(head, x, y).backward()
            optimizer.step()
        y = torch.arange(50).repeat(40)
        x = centers[y] + torch.randn(len(y), 8, generator=torch.Generator().manual_seed(99))
        return F.cross_entropy(head.logits(x), y).item()

    exact = torch.tensor([train(lambda head, x, y: F.cross_entropy(head.logits(x), y), seed) for seed in range(4)])
    sampled = torch.tensor([train(lambda head, x, y: head(x, y), seed) for seed in range(4)])
    error = ((exact.var() + sampled.var()) / 4) ** 0.5
    print(
        f"cross-entropy {exact.mean():.4f}, sampled {sampled.mean():.4f}, standard error of the difference {error:.4f}"
    )
    assert (sampled.mean() - exact.mean()).abs() < 4 * error
