"""Estimates from critics: closed forms, caps, shifts, gradients, and what each of them is worth."""

import math

import pytest
import torch

from lightning_ext.functional import (
    club_estimate,
    donsker_varadhan_estimate,
    infonce,
    jensen_shannon_objective,
    leave_one_out_upper,
    mine_objective,
    nwj_estimate,
    smile_estimate,
)

F64 = torch.float64
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)
Q = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]], dtype=F64)
T = torch.tensor([[1.0, -0.5, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.5, 1.0]], dtype=F64)
PRIOR = JOINT.sum(0).expand(3, 3)


def counts(p, num=10_000):
    """Every cell as often as its probability says: means over these samples are expectations."""
    cells = torch.repeat_interleave(torch.arange(9), (p.flatten() * num).round().long())
    return cells // 3, cells % 3


@pytest.mark.parametrize(("base", "dv", "nwj"), [(Q, 0.20389154, -0.09691954), (PRIOR, 0.21939377, 0.08601068)])
def test_the_finite_model(base, dv, nwj):
    x, z = counts(JOINT)
    marginal = T[counts(JOINT.sum(1, keepdim=True) * base)]
    ba_term = (base / PRIOR).log()[x, z]
    assert donsker_varadhan_estimate(T[x, z], marginal, ba_term).item() == pytest.approx(dv, abs=6e-9)
    assert nwj_estimate(T[x, z], marginal, ba_term).item() == pytest.approx(nwj, abs=6e-9)


@pytest.mark.parametrize(
    ("symbols", "num", "value"),
    [(16, 2, 0.649825), (16, 8, 1.798397), (16, 64, 2.647556), (16, 1024, 2.765244), (256, 64, 3.996490)],
)
def test_copies_of_a_symbol_in_closed_form(symbols, num, value):
    """z is uniform and x = z: log K less the expected log of 1 and how many others drew the same symbol."""
    n = torch.arange(num, dtype=F64)
    matches = torch.distributions.Binomial(num - 1, torch.tensor(1 / symbols, dtype=F64))
    probability = matches.log_prob(n).exp()
    scores = torch.full((num, num), -torch.inf, dtype=F64)  # column i: the positive and i of the others match
    scores[0] = 0.0
    for i in range(num):
        scores[1 : 1 + i, i] = 0.0
    found = (infonce(scores, "slots") * probability).sum().item()
    assert found == pytest.approx(value, abs=1e-6)


def test_in_batch_scores_are_normalised_over_z():
    torch.manual_seed(0)
    scores = torch.randn(6, 6, dtype=F64)
    expected = scores.diagonal() - scores.exp().mean(1).log()
    torch.testing.assert_close(infonce(scores), expected)
    torch.testing.assert_close(infonce(scores + 5 * torch.randn(6, 1, dtype=F64)), expected)  # c(x) drops out
    assert not torch.allclose(infonce(scores + torch.randn(1, 6, dtype=F64)), expected)
    assert infonce(100 * torch.eye(6, dtype=F64)).max() <= math.log(6)


def test_rounding_does_not_break_the_cap_and_excluded_pairs_are_no_nan():
    scores = 1e7 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert infonce(scores).max() <= torch.tensor(math.log(8))
    assert infonce(scores, "slots").max() <= torch.tensor(math.log(8))
    assert infonce(torch.tensor([[-torch.inf, -torch.inf], [0.0, 0.0]])).tolist() == [-torch.inf, 0.0]


def test_a_constant_drops_out_of_donsker_varadhan_alone():
    torch.manual_seed(0)
    joint, marginal = torch.randn(50, dtype=F64), torch.randn(9, 50, dtype=F64)
    dv = donsker_varadhan_estimate(joint, marginal)
    torch.testing.assert_close(donsker_varadhan_estimate(joint + 3, marginal + 3), dv)
    assert nwj_estimate(joint, marginal) <= dv
    shift = torch.logsumexp(marginal.flatten(), 0) - math.log(marginal.numel())
    torch.testing.assert_close(nwj_estimate(joint - shift, marginal - shift), dv)  # where they meet
    torch.testing.assert_close(smile_estimate(joint, marginal, None), dv)
    torch.testing.assert_close(smile_estimate(joint, marginal, 100.0), dv)
    clipped = joint.mean() - marginal.clamp(-0.5, 0.5).exp().mean().log()
    torch.testing.assert_close(smile_estimate(joint, marginal, 0.5), clipped)
    assert donsker_varadhan_estimate(joint, marginal + 1000).isfinite()


def test_mine_divides_by_a_moving_average():
    torch.manual_seed(0)
    average, logs = None, None
    for step in range(4):
        joint, marginal = (torch.randn(8, dtype=F64, requires_grad=True) for _ in range(2))
        objective, value, logs = mine_objective(joint, marginal, logs, decay=0.9)
        now = marginal.detach().exp().mean()
        average = now if step == 0 else 0.9 * average + 0.1 * now
        torch.testing.assert_close(logs.exp(), average)
        torch.testing.assert_close(value, donsker_varadhan_estimate(joint, marginal).detach())
        torch.testing.assert_close(objective.detach(), value)
        objective.backward()
        torch.testing.assert_close(joint.grad, torch.full((8,), 1 / 8, dtype=F64))
        torch.testing.assert_close(marginal.grad, -marginal.detach().exp() / 8 / average)
    plain, _, _ = mine_objective(joint.detach(), leaf := marginal.detach().requires_grad_(), logs, decay=0.0)
    plain.backward()
    torch.testing.assert_close(leaf.grad, -torch.softmax(marginal.detach(), 0))
    assert not logs.requires_grad


def test_jensen_shannon_is_best_at_the_log_ratio():
    ratio = (JOINT / JOINT.sum(1, keepdim=True) / JOINT.sum(0)).log()
    joint, marginal = counts(JOINT), counts(JOINT.sum(1, keepdim=True) * JOINT.sum(0))
    best = jensen_shannon_objective(ratio[joint], ratio[marginal])
    for seed in range(5):
        other = ratio + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
        assert jensen_shannon_objective(other[joint], other[marginal]) < best <= 0


def test_club_and_leave_one_out_of_a_known_conditional():
    """x, z of correlation 0.8; log q is the true conditional density, so that both are upper bounds."""
    generator, rho, size = torch.Generator().manual_seed(0), 0.8, 2000
    x = torch.randn(size, generator=generator, dtype=F64)
    z = rho * x + math.sqrt(1 - rho**2) * torch.randn(size, generator=generator, dtype=F64)
    log_q = torch.distributions.Normal(rho * x[:, None], math.sqrt(1 - rho**2)).log_prob(z)
    club, l1out = club_estimate(log_q).mean().item(), leave_one_out_upper(log_q).mean().item()
    assert club == pytest.approx(rho**2 / (1 - rho**2), rel=0.1)
    assert l1out == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.05)
    small = [leave_one_out_upper(log_q[i : i + 4, i : i + 4]).mean().item() for i in range(0, size, 4)]
    assert sum(small) / len(small) > -0.5 * math.log(1 - rho**2) + 0.05  # far from tight with 3 others
    apart = torch.full((3, 3), -torch.inf).fill_diagonal_(0.0)
    assert leave_one_out_upper(apart).tolist() == [torch.inf] * 3
    by_hand = log_q[0, 0] - (log_q[1:3, 0].exp().mean()).log()
    torch.testing.assert_close(leave_one_out_upper(log_q[:3, :3])[0], by_hand)


def test_what_does_not_fit_is_refused():
    for call in (infonce, club_estimate):
        with pytest.raises(ValueError, match=r"scores must be \(B, B\).*got \(2, 3\)"):
            call(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="B >= 2"):
        leave_one_out_upper(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"scores must be \(K, B\).*got \(3,\)"):
        infonce(torch.zeros(3), "slots")
    with pytest.raises(ValueError, match="layout must be 'slots' or 'in_batch'; got 'square'"):
        infonce(torch.zeros(3, 3), "square")
    for call in (donsker_varadhan_estimate, nwj_estimate, smile_estimate, jensen_shannon_objective, mine_objective):
        with pytest.raises(ValueError, match=r"scores of joint pairs, \(B,\)"):
            call(torch.zeros(0), torch.zeros(3))
        with pytest.raises(ValueError, match=r"scores of joint pairs, \(B,\)"):
            call(torch.zeros(3, 3), torch.zeros(3))
    for call in (donsker_varadhan_estimate, nwj_estimate):
        with pytest.raises(ValueError, match=r"ba_term must have one number per joint pair, \(3,\).*got \(3, 1\)"):
            call(torch.zeros(3), torch.zeros(5), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="clip must be positive"):
        smile_estimate(torch.zeros(3), torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="decay must be"):
        mine_objective(torch.zeros(3), torch.zeros(3), decay=1.0)
