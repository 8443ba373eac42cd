"""Influence formulas against ridge regression, where leave-one-out is known exactly, in float64."""

import pytest
import torch

from lightning_ext.functional import (
    group_scores,
    influence_scores,
    leave_out_step,
    relative_influence,
    self_influence,
)


@pytest.fixture
def ridge():
    """J = mean (x theta - y)^2 / 2 + wd |theta|^2 / 2 at its minimum; N = 50, d = 4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(50, generator=generator, dtype=torch.float64)
    curvature = x.T @ x / 50 + 0.1 * torch.eye(4, dtype=torch.float64)
    theta = torch.linalg.solve(curvature, x.T @ y / 50)
    gradients = (x @ theta - y)[:, None] * x
    return x, y, curvature, theta, gradients


def left_out(x, y, keep):
    """Minimum of the objective that lost samples but kept N and its weight decay."""
    curvature = x[keep].T @ x[keep] / 50 + 0.1 * torch.eye(4, dtype=torch.float64)
    return torch.linalg.solve(curvature, x[keep].T @ y[keep] / 50)


def test_ridge_leave_one_out_is_the_step_over_one_minus_leverage(ridge):
    x, y, curvature, theta, gradients = ridge
    inverse = torch.linalg.inv(curvature)
    for i in range(50):
        keep = torch.arange(50) != i
        exact = left_out(x, y, keep) - theta
        first_order = inverse @ gradients[i] / 50
        leverage = x[i] @ inverse @ x[i] / 50
        torch.testing.assert_close(first_order, exact * (1 - leverage), atol=1e-12, rtol=1e-10)
        factor = x[i : i + 1] / 50**0.5
        step = leave_out_step(inverse @ gradients[i], factor, factor @ inverse, num_samples=50)
        torch.testing.assert_close(step, exact, atol=1e-12, rtol=1e-10)


def test_a_group_leaves_exactly(ridge):
    x, y, curvature, theta, gradients = ridge
    inverse = torch.linalg.inv(curvature)
    group = torch.tensor([3, 7, 20, 41])
    keep = ~torch.isin(torch.arange(50), group)
    factor = x[group] / 50**0.5
    step = leave_out_step(inverse @ gradients[group].sum(0), factor, factor @ inverse, num_samples=50)
    torch.testing.assert_close(step, left_out(x, y, keep) - theta, atol=1e-12, rtol=1e-10)


def test_positive_scores_are_helpful_samples(ridge):
    x, y, curvature, theta, gradients = ridge
    query_x, query_y = torch.ones(4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    query = (query_x @ theta - query_y) * query_x
    scores = influence_scores(torch.linalg.solve(curvature, query)[None], gradients, 50)[0]

    def change(i):
        without = left_out(x, y, torch.arange(50) != i)
        return 0.5 * (query_x @ without - query_y) ** 2 - 0.5 * (query_x @ theta - query_y) ** 2

    actual = torch.stack([change(i) for i in range(50)])
    assert torch.corrcoef(torch.stack([scores, actual]))[0, 1] > 0.99
    assert (scores.sign() == actual.sign()).float().mean() > 0.95


def test_groups_add_up():
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = group_scores(scores, [[0, 5], [], [1, 2, 3, 4]])
    assert torch.allclose(found[:, 0], scores[:, 0] + scores[:, 5])
    assert torch.equal(found[:, 1], torch.zeros(3))
    assert torch.allclose(found.sum(1), scores.sum(1))
    assert group_scores(scores, []).shape == (3, 0)


def test_self_influence_falls_with_damping_and_obeys_cauchy_schwarz(ridge):
    gradients, curvature = ridge[4], ridge[2]
    before = torch.full((50,), torch.inf, dtype=torch.float64)
    for damping in (0.0, 0.1, 1.0, 10.0):
        solved = torch.linalg.solve(curvature + damping * torch.eye(4, dtype=torch.float64), gradients.T).T
        own = self_influence(gradients, solved)
        assert (own >= 0).all()
        assert (own < before).all()
        assert damping == 0 or (own <= torch.linalg.vector_norm(gradients, dim=1).square() / damping).all()
        pairs = 50 * influence_scores(solved, gradients, 50)
        assert (pairs.abs() <= (own[:, None] * own).sqrt() + 1e-12).all()
        torch.testing.assert_close(pairs, pairs.T)
        before = own


def test_a_sample_without_gradient_has_no_relative_score():
    scores = torch.tensor([[2.0, 0.0], [4.0, 0.0]])
    assert torch.equal(relative_influence(scores, torch.tensor([2.0, 0.0])), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"solved and gradients must be \(Q, D\) and \(B, D\)"):
        influence_scores(torch.ones(2, 3), torch.ones(2, 4), 1)
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        influence_scores(torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match="one shape"):
        self_influence(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"groups\[1\] must name samples 0 to 3, each at most once; got \[1, 1\]"):
        group_scores(torch.ones(2, 4), [[0], [1, 1]])
    with pytest.raises(ValueError, match=r"groups\[0\]"):
        group_scores(torch.ones(2, 4), [[4]])
    with pytest.raises(ValueError, match="Raise damping"):
        leave_out_step(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1), 1)
    with pytest.raises(ValueError, match="must be"):
        leave_out_step(torch.ones(2), torch.ones(1, 1), torch.ones(1, 1), 1)
