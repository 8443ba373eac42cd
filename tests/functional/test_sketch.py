"""Projections: unbiased, of the variance that their definition gives, and determined by the seed."""

import math
import re

import pytest
import torch

from lightning_ext.functional import Projection
from lightning_ext.functional import sketch as sketches

KINDS = ["rademacher", "gaussian", "countsketch"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, the last one not full."""
    monkeypatch.setattr(sketches, "_DENSE_BLOCK", 40)
    monkeypatch.setattr(sketches, "_SPARSE_BLOCK", 5)


def matrices(kind, size, dim, seeds):
    return torch.stack([Projection(size, dim, kind, seed)(torch.eye(size, dtype=torch.float64)) for seed in seeds])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_blocks")
class TestMoments:
    def test_the_mean_of_the_gram_matrix_is_the_identity(self, kind):
        P = matrices(kind, 12, 8, range(1500))
        gram = (P @ P.mT).mean(0)
        torch.testing.assert_close(gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=5 * math.sqrt(2 / 8 / 1500))

    def test_variance_of_inner_products(self, kind):
        torch.manual_seed(0)
        x, y = torch.randn(2, 12, dtype=torch.float64)
        P = matrices(kind, 12, 8, range(1500))
        products = ((x @ P) * (y @ P)).sum(1)
        c = 0 if kind == "gaussian" else 2
        variance = (x.norm() ** 2 * y.norm() ** 2 + (x @ y) ** 2 - c * (x**2 * y**2).sum()) / 8
        assert products.mean().item() == pytest.approx((x @ y).item(), abs=5 * math.sqrt(variance / 1500))
        assert products.var().item() == pytest.approx(variance.item(), rel=0.2)

    def test_entries(self, kind):
        P = matrices(kind, 13, 8, range(3))
        if kind == "rademacher":
            assert torch.equal(P.abs(), torch.full_like(P, 8**-0.5))
        if kind == "countsketch":
            assert ((P != 0).sum(2) == 1).all()
            assert (P.abs().sum(2) == 1).all()
        assert not torch.equal(P[0], P[1])


@pytest.mark.parametrize("kind", KINDS)
class TestLaws:
    def test_linear_and_the_same_each_time(self, kind):
        torch.manual_seed(0)
        rows = torch.randn(3, 5000, dtype=torch.float64)
        project = Projection(5000, 32, kind, seed=7)
        before = torch.random.get_rng_state()
        once = project(rows)
        assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
        assert torch.equal(once, Projection(5000, 32, kind, seed=7)(rows))
        weights = torch.randn(2, 3, dtype=torch.float64)
        torch.testing.assert_close(project(weights @ rows), weights @ once)
        torch.testing.assert_close(project(rows.float()).double(), once, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(once, Projection(5000, 32, kind, seed=8)(rows))

    def test_inner_products_of_many_vectors_survive(self, kind):
        torch.manual_seed(0)
        rows = torch.nn.functional.normalize(torch.randn(40, 20_000))
        sketch = Projection(20_000, 2048, kind)(rows)
        assert (sketch @ sketch.T - rows @ rows.T).abs().max().item() < 5 / math.sqrt(2048)

    def test_half_precision_rows_are_projected_in_float32(self, kind):
        rows = torch.ones(1, 500, dtype=torch.bfloat16)
        project = Projection(500, 16, kind)
        assert project(rows).dtype == torch.float32
        assert torch.equal(project(rows), project(rows.float()))
        exact = project(torch.linspace(0, 1, 500)[None])
        lifted = project.transpose(exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(project(torch.linspace(0, 1, 500)[None]), exact)
            assert torch.equal(project.transpose(exact), lifted)


def test_a_matrix_of_ten_gigabytes_is_never_made():
    # 5 million by 512 in float32; a block of it is 16 MiB. Two rows, most of them zero, keep the test short.
    project = Projection(5_000_000, 512, "countsketch")
    rows = torch.zeros(2, 5_000_000)
    rows[0, 3], rows[1, 4_999_999] = 2.0, -3.0
    sketch = project(rows)
    assert sketch.abs().sum(1).tolist() == [2.0, 3.0]
    widths = [part.stop - part.start for part, _ in Projection(5_000_000, 512)._blocks(torch.device("cpu"))]
    assert sum(widths) == 5_000_000
    assert max(widths) * 512 * 4 <= 2**24


def test_errors():
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        Projection(0, 3)
    with pytest.raises(ValueError, match=r"kind must be .* got 'fft'"):
        Projection(4, 3, "fft")
    with pytest.raises(ValueError, match=re.escape("rows must have shape (R, 4), got (2, 5)")):
        Projection(4, 3)(torch.ones(2, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_blocks")
def test_the_way_back_has_the_same_entries(kind):
    project = Projection(12, 8, kind, seed=3)
    P = project(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(project.transpose(torch.eye(8, dtype=torch.float64)), P.mT)
    with pytest.raises(ValueError, match=r"rows must have shape \(R, 8\), got \(1, 12\)"):
        project.transpose(torch.ones(1, 12))
