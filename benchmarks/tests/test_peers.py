"""Contract under test: each peer is its docstring's formula, computed here in another way, with a finite gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F

for needed in ("pytopk", "difftopk"):
    pytest.importorskip(needed, reason=f"{needed} is a peer that the package itself does not need")

from difftopk.smooth_topk import Topk_Smooth_SVM  # noqa: E402

from benchmarks import losses  # noqa: E402
from benchmarks.cases import Case  # noqa: E402
from benchmarks.peers import PEERS  # noqa: E402


@pytest.fixture
def scores():
    return torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.double, requires_grad=True)


TARGET = torch.tensor([0, 4, 8])


def over_all_sets(scores, target, k, tau, alpha):
    """The smooth top-K SVM loss from its definition, set by set."""
    losses = []
    for row, y in zip(scores, target.tolist()):
        sets = list(itertools.combinations(range(len(row)), k))
        value = torch.stack([row[list(a)].sum() / k for a in sets])
        without = torch.tensor([alpha * (y not in a) for a in sets], dtype=torch.double)
        true = torch.tensor([y in a for a in sets])
        losses.append(tau * (torch.logsumexp((value + without) / tau, 0) - torch.logsumexp(value[true] / tau, 0)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_smooth_svm_is_the_sum_over_all_sets(scores, k, tau):
    loss = losses.SmoothTopKSVM(k, tau, alpha=0.7)
    torch.testing.assert_close(loss(scores, TARGET), over_all_sets(scores, TARGET, k, tau, 0.7), atol=1e-9, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda s: loss(s, TARGET), scores)


@pytest.mark.parametrize("length", [37, 300])
def test_smooth_svm_is_its_authors(length):
    generator = torch.Generator().manual_seed(length)
    scores = 5 * torch.randn(8, length, generator=generator)
    target = torch.randint(length, (8,), generator=generator)
    theirs = Topk_Smooth_SVM(torch.arange(length), k=5, tau=1.0)(scores, target).mean()  # comes with difftopk
    torch.testing.assert_close(losses.SmoothTopKSVM(5, 1.0)(scores, target), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("k", [0, 9])
def test_k_must_leave_a_class(scores, k):
    with pytest.raises(ValueError, match=rf"\[1, L - 1\] = \[1, 8\], got {k}"):
        losses.SmoothTopKSVM(k)(scores, TARGET)


def test_focal(scores):
    p = scores.softmax(1).gather(1, TARGET[:, None])[:, 0]
    torch.testing.assert_close(losses.FocalLoss(0.0)(scores, TARGET), F.cross_entropy(scores, TARGET))
    torch.testing.assert_close(losses.FocalLoss(2.0)(scores, TARGET), -((1 - p) ** 2 * p.log()).mean())


def test_focal_learns_nothing_from_a_row_that_is_certain():
    scores = torch.tensor([[200.0, 0.0], [1.0, 0.0]], requires_grad=True)
    losses.FocalLoss(0.5)(scores, torch.zeros(2, dtype=torch.long)).backward()
    assert (scores.grad[0] == 0).all() and scores.grad[1].isfinite().all() and scores.grad[1, 0] < 0


def test_ldam_takes_the_margin_from_the_true_class_alone(scores):
    loss = losses.LDAMLoss([16, 1, 1, 1, 81, 1, 1, 1, 1], max_m=0.6, s=10.0)
    margins = torch.tensor([0.3, 0.2, 0.6])  # of the classes 0, 4 and 8
    shifted = 10 * scores.detach().clone()
    shifted[range(3), TARGET] -= 10 * margins
    torch.testing.assert_close(loss(scores, TARGET), F.cross_entropy(shifted, TARGET), check_dtype=False)


def test_logit_adjustment_is_by_log_frequencies(scores):
    count = torch.arange(1.0, 10.0)
    loss = losses.LogitAdjustedCrossEntropy(count.int().tolist(), tau=2.0)
    expected = F.cross_entropy(scores + 2 * (count / 45).log(), TARGET)
    torch.testing.assert_close(loss(scores, TARGET), expected)


@pytest.mark.parametrize("name", [name for name in PEERS if "compiled" not in name])
@pytest.mark.parametrize("k", [1, 5])
def test_peers_run(name, k):
    case, peer = Case(6, 50, k=k), PEERS[name]
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    peer.make(case)(scores, torch.arange(6)).backward()
    assert peer.compared
    assert scores.grad.isfinite().all() and scores.grad.abs().sum() > 0
