"""Measures of attributions: against scipy, scikit-learn, brute force over orders, and real retraining."""

import itertools
import math

import pytest
import torch
from scipy import stats

from lightning_ext.functional import (
    average_ranks,
    linear_datamodeling_scores,
    mislabel_detection,
    random_subsets,
    row_correlation,
    topk_overlap,
)

INF, NAN = math.inf, math.nan


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestCorrelation:
    @pytest.mark.parametrize("levels", [2, 5, 1000])
    def test_ranks_are_those_of_scipy(self, levels):
        values = torch.randint(0, levels, (4, 3, 60), generator=torch.Generator().manual_seed(levels))
        torch.testing.assert_close(average_ranks(values), torch.from_numpy(stats.rankdata(values, axis=-1)))

    def test_ranks_of_nothing(self):
        assert average_ranks(torch.zeros(2, 0)).shape == (2, 0)

    @pytest.mark.parametrize(("kind", "oracle"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
    @pytest.mark.parametrize("scale", [1.0, 1e-200, 1e120])
    def test_against_scipy_at_any_scale(self, kind, oracle, scale):
        x, y = normal(5, 40).round(decimals=1), 3 + normal(5, 40, seed=1)  # with ties in x
        expected = torch.tensor([oracle(a, b).statistic for a, b in zip(x, y, strict=True)])
        torch.testing.assert_close(row_correlation(scale * x, y, kind), expected.double())

    def test_leading_dimensions(self):
        x, y = normal(2, 3, 9), normal(2, 3, 9, seed=1)
        torch.testing.assert_close(row_correlation(x, y)[1, 2], row_correlation(x[1, 2], y[1, 2]))

    @pytest.mark.parametrize("kind", ["pearson", "spearman"])
    def test_constant_rows_have_none(self, kind):
        constant = torch.full((7,), 0.1)  # its mean is rounded, so that centring leaves a remainder
        varied = torch.arange(7.0)
        x, y = torch.stack([constant, varied, varied]), torch.stack([varied, constant, varied])
        assert row_correlation(x, y, kind).isnan().tolist() == [True, True, False]
        assert row_correlation(torch.ones(2, 1), torch.ones(2, 1), kind).isnan().all()
        assert row_correlation(torch.ones(2, 0), torch.ones(2, 0), kind).isnan().all()

    def test_equal_and_opposite_rows_are_exactly_one(self):
        x = normal(20, 11)
        assert row_correlation(x, x).tolist() == [1.0] * 20
        assert row_correlation(x, -x, "spearman").tolist() == [-1.0] * 20

    @pytest.mark.parametrize(
        ("x", "y", "kind", "message"),
        [
            ([[1.0, 2.0]], [[1.0], [2.0]], "pearson", r"one shape \(..., N\), got \(1, 2\) and \(2, 1\)"),
            (1.0, 1.0, "pearson", "one shape"),
            ([1.0, 2.0], [1.0, 2.0], "kendall", "kind must be 'pearson' or 'spearman', got 'kendall'"),
            ([[1.0, 2.0], [NAN, INF]], [[1.0, 1.0]] * 2, "pearson", r"x must be finite, got nan at \(1, 0\), one of 2"),
            ([1.0, 2.0], [1.0, -INF], "spearman", r"y must be finite, got -inf at \(1,\), one of 1 such"),
        ],
    )
    def test_errors(self, x, y, kind, message):
        with pytest.raises(ValueError, match=message):
            row_correlation(torch.tensor(x), torch.tensor(y), kind)


class TestSubsets:
    @pytest.mark.parametrize(("fraction", "size"), [(0.5, 5), (0.25, 2), (0.001, 1), (0.999, 9)])
    def test_sizes(self, fraction, size):
        masks = random_subsets(40, 10, fraction)
        assert masks.dtype == torch.bool
        assert masks.sum(1).tolist() == [size] * 40

    def test_every_sample_is_as_likely_and_the_seed_decides(self):
        masks = random_subsets(4000, 8)
        assert (masks.double().mean(0) - 0.5).abs().max() < 4 * 0.5 / 4000**0.5
        before = torch.get_rng_state()
        assert torch.equal(random_subsets(4000, 8), masks)
        assert not torch.equal(random_subsets(4000, 8, seed=1), masks)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 5), "num_subsets must be at least 1 and num_samples 2, got 0 and 5"),
            ((5, 1), "got 5 and 1"),
            ((5, 5, 1.0), r"fraction must lie in \(0, 1\), got 1.0"),
            ((5, 5, NAN), r"fraction must lie in \(0, 1\)"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            random_subsets(*arguments)


class TestLinearDatamodeling:
    masks = random_subsets(30, 12)

    def test_perfect_scores_give_one_and_their_opposites_minus_one(self):
        scores = normal(4, 12)
        outcomes = 7 + (~self.masks).double() @ scores.mT  # m(S) = m + sum of removal effects
        assert linear_datamodeling_scores(scores, self.masks, outcomes).tolist() == [1.0] * 4
        assert linear_datamodeling_scores(-scores, self.masks, outcomes).tolist() == [-1.0] * 4

    def test_by_sums_within_the_subset(self):
        scores, outcomes = normal(3, 12), normal(30, 3, seed=1)
        expected = [
            stats.spearmanr([-scores[q, m].sum() for m in self.masks], outcomes[:, q]).statistic for q in range(3)
        ]
        actual = linear_datamodeling_scores(scores.float(), self.masks, outcomes)
        torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=0, atol=1e-6)

    def test_orientation_on_models_that_were_retrained(self):
        """Removal effects of ridge regression predict the test losses of ridge regressions on half the data."""
        x, t, queries, answers = normal(60, 3), normal(60, seed=1), normal(8, 3, seed=2), normal(8, seed=3)
        t, answers = x.sum(1) + t, queries.sum(1) + answers

        def losses(kept):
            inside = x[kept]
            weights = torch.linalg.solve(inside.mT @ inside + 0.1 * torch.eye(3).double(), inside.mT @ t[kept])
            return (queries @ weights - answers).square() / 2

        everything = torch.ones(60, dtype=torch.bool)
        leave_one_out = [everything.index_fill(0, torch.tensor([i]), False) for i in range(60)]
        scores = torch.stack([losses(kept) - losses(everything) for kept in leave_one_out], dim=1)
        masks = random_subsets(80, 60)
        outcomes = torch.stack([losses(mask) for mask in masks])
        assert linear_datamodeling_scores(scores, masks, outcomes).mean() > 0.8
        helpful = scores.mean(0).topk(10).indices
        assert losses(everything.index_fill(0, helpful, False)).mean() > losses(everything).mean()

    def test_constant_outcomes_have_none(self):
        outcomes = torch.stack([torch.ones(30), torch.arange(30.0)], dim=1)
        assert linear_datamodeling_scores(normal(2, 12), self.masks, outcomes).isnan().tolist() == [True, False]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"subset_masks": torch.ones(30, 12)}, r"subset_masks must be a bool tensor \(M, N\), got torch.float32"),
            ({"subset_masks": torch.ones(30).bool()}, r"got torch.bool \(30,\)"),
            ({"scores": torch.ones(2, 11)}, r"scores must be \(Q, 12\), .* got \(2, 11\)"),
            ({"scores": torch.ones(12)}, r"scores must be \(Q, 12\)"),
            ({"outcomes": torch.ones(2, 30)}, r"outcomes must be \(M, Q\) = \(30, 2\), .* got \(2, 30\)"),
            ({"outcomes": torch.full((30, 2), NAN)}, "outcomes must be finite"),
            ({"scores": torch.full((2, 12), INF)}, "scores must be finite"),
        ],
    )
    def test_errors(self, change, message):
        good = {"scores": normal(2, 12), "subset_masks": self.masks, "outcomes": normal(30, 2)}
        with pytest.raises(ValueError, match=message):
            linear_datamodeling_scores(**{**good, **change})


class TestMislabelDetection:
    @pytest.mark.parametrize("levels", [3, 20, 10**6])
    @pytest.mark.parametrize("seed", range(3))
    def test_areas_are_those_of_scikit_learn(self, levels, seed):
        oracle = pytest.importorskip("sklearn.metrics")
        generator = torch.Generator().manual_seed(seed)
        flipped = torch.rand(80, generator=generator) < 0.2
        suspicion = torch.randint(0, levels, (80,), generator=generator) + levels / 3 * flipped
        result = mislabel_detection(suspicion, flipped)
        assert result.auc.item() == pytest.approx(oracle.roc_auc_score(flipped, suspicion))
        assert result.average_precision.item() == pytest.approx(oracle.average_precision_score(flipped, suspicion))
        assert result.prevalence.item() == pytest.approx(flipped.double().mean().item())

    def test_equal_suspicions_count_in_expectation_over_their_orders(self):
        suspicion, flipped = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([0, 1, 0, 1, 1])
        orders = [[0, *middle, 4] for middle in itertools.permutations([1, 2, 3])]
        for inspected in range(6):
            found = [flipped[torch.tensor(order[:inspected]).long()].sum().item() / 3 for order in orders]
            fraction = max(inspected / 5, 1e-12)
            recall = mislabel_detection(suspicion, flipped, fraction).recall.item()
            assert recall == pytest.approx(sum(found) / len(orders), abs=1e-9)

    def test_curve(self):
        result = mislabel_detection(torch.tensor([4.0, 3.0, 3.0, 1.0]), torch.tensor([True, True, False, False]))
        assert result.inspected.tolist() == [0, 0.25, 0.75, 1]
        assert result.found.tolist() == [0, 0.5, 1, 1]
        assert result.recall.item() == pytest.approx(0.4)  # four fifths of the first sample

    def test_perfect_random_and_worst(self):
        flipped = torch.arange(50) % 5 == 0
        assert mislabel_detection(flipped.float(), flipped)[:3] == (1, 1, 1)
        random = mislabel_detection(torch.zeros(50), flipped, fraction=0.3)
        assert [v.item() for v in random[:4]] == pytest.approx([0.5, 0.3, 0.2, 0.2])
        assert mislabel_detection(-flipped.float(), flipped).auc == 0

    def test_none_and_all_flipped(self):
        none = mislabel_detection(torch.arange(3.0), torch.zeros(3))
        assert [bool(v.isnan().any()) for v in none] == [True, True, True, False, False, True]
        everything = mislabel_detection(torch.arange(3.0), torch.ones(3), fraction=0.5)
        assert everything.auc.isnan()
        assert everything.recall.item() == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("suspicion", "flipped", "fraction", "message"),
        [
            (torch.ones(3), torch.ones(2), 0.2, r"one shape \(B,\), got \(3,\) and \(2,\)"),
            (torch.ones(3, 1), torch.ones(3, 1), 0.2, r"one shape \(B,\)"),
            (torch.tensor([1.0, NAN]), torch.ones(2), 0.2, "suspicion must be finite, got nan"),
            (torch.ones(2), torch.tensor([0.0, NAN]), 0.2, "is_flipped must be True where a label was flipped"),
            (torch.ones(2), torch.tensor([0, 2]), 0.2, "is_flipped must be True"),
            (torch.ones(2), torch.ones(2), 0.0, r"fraction must lie in \(0, 1\], got 0.0"),
            (torch.ones(2), torch.ones(2), 1.1, r"fraction must lie in \(0, 1\]"),
        ],
    )
    def test_errors(self, suspicion, flipped, fraction, message):
        with pytest.raises(ValueError, match=message):
            mislabel_detection(suspicion, flipped, fraction)


class TestTopKOverlap:
    def test_against_sets(self):
        x, y = normal(20, 30), normal(20, 30, seed=1)
        for k in (1, 7, 30):
            expected = [len({*x[q].topk(k).indices.tolist()} & {*y[q].topk(k).indices.tolist()}) / k for q in range(20)]
            torch.testing.assert_close(topk_overlap(x, y, k), torch.tensor(expected).double())

    def test_of_equal_scores_the_first_count_as_larger(self):
        ties = torch.zeros(1, 500)
        first = -torch.arange(500.0)[None]
        assert topk_overlap(ties, first, 20).tolist() == [1.0]

    @pytest.mark.parametrize(
        ("scores", "reference", "k", "message"),
        [
            (torch.ones(2, 3), torch.ones(2, 4), 1, r"one shape \(Q, N\), got \(2, 3\) and \(2, 4\)"),
            (torch.ones(3), torch.ones(3), 1, r"one shape \(Q, N\)"),
            (torch.ones(2, 3), torch.ones(2, 3), 4, r"k must lie in \[1, 3\], the number of samples, got 4"),
            (torch.ones(2, 3), torch.ones(2, 3), 0, r"k must lie in \[1, 3\]"),
            (torch.full((2, 3), NAN), torch.ones(2, 3), 1, "scores must be finite"),
            (torch.ones(2, 3), torch.full((2, 3), NAN), 1, "reference must be finite"),
        ],
    )
    def test_errors(self, scores, reference, k, message):
        with pytest.raises(ValueError, match=message):
            topk_overlap(scores, reference, k)
