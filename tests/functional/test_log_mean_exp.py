"""Means of exponentials: at once, in pieces, and at the infinities."""

import math

import pytest
import torch

from lightning_ext.functional import StreamingLogMeanExp, log_mean_exp

INF = torch.inf


def test_it_is_the_logarithm_of_the_mean():
    x = torch.randn(50, 4, 3, dtype=torch.float64)
    for dim in (0, 1, -1):
        torch.testing.assert_close(log_mean_exp(x, dim), x.exp().mean(dim).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_mean_exp(x + 1e5), log_mean_exp(x) + 1e5, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("x", "value"), [([-INF, -INF], -INF), ([INF, 0.0], INF), ([INF, -INF], INF), ([3.0], 3.0)])
def test_infinities_stay_what_they_are(x, value):
    assert log_mean_exp(torch.tensor(x)).item() == value
    assert StreamingLogMeanExp(()).add(torch.tensor(x[:1])).add(torch.tensor(x[1:])).value().item() == value


def test_gradients_are_finite_beside_weights_of_zero():
    x = torch.tensor([[0.0, 1.0], [-INF, 2.0]], requires_grad=True)
    log_mean_exp(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.softmax(x.detach(), 0))


def test_pieces_add_up_to_the_whole():
    x = 30 * torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    running, other = StreamingLogMeanExp((2,)), StreamingLogMeanExp((2,))
    for piece in x[:60_000].split(777):
        running.add(piece)
    other.add(x[60_000:]).add(x[:0])
    running.merge(other)
    assert running.count == len(x)
    assert running.value().dtype == torch.float64
    torch.testing.assert_close(running.value(), log_mean_exp(x.double()), rtol=1e-12, atol=1e-12)


def test_a_million_equal_numbers_lose_nothing():
    running = StreamingLogMeanExp(())
    for _ in range(100):
        running.add(torch.full((10_000,), 1e4))
    assert running.value().item() == pytest.approx(1e4, abs=1e-9)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match=r"at least one number along dim=0; got shape \(0, 2\)"):
        log_mean_exp(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="nothing was added"):
        StreamingLogMeanExp(()).value()
    with pytest.raises(ValueError, match=r"chunk must have shape \(k, \*\(2,\)\); got \(3, 1\)"):
        StreamingLogMeanExp((2,)).add(torch.zeros(3, 1))
    assert math.isinf(StreamingLogMeanExp(()).add(torch.tensor([-INF])).value().item())
