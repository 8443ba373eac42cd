"""Summaries of rate-distortion curves, against hand-computed values, brute force and the linear closed form."""

import math

import pytest
import torch

from lightning_ext.functional import (
    active_units,
    beta_for_distortion,
    beta_for_rate,
    hypervolume,
    pareto_front,
    rate_at,
    rate_distortion_auc,
    reverse_waterfilling,
    slope_error,
)

STAIRS = (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([4.0, 2.0, 1.0]))
SPECTRUM = torch.tensor([6, 3, 1.5, 0.8, 0.4, 0.2, 0.1, 0.05], dtype=torch.float64)


def optimum(betas):
    return reverse_waterfilling(SPECTRUM, betas, 5)


def grid(n=20, low=-2, high=1):
    return torch.logspace(low, high, n, dtype=torch.float64)


class TestParetoFront:
    def test_against_brute_force_with_ties(self):
        for seed in range(30):
            points = torch.randint(0, 6, (12, 2), generator=torch.Generator().manual_seed(seed)).double()
            better = (points[None] <= points[:, None]).all(-1) & (points[None] < points[:, None]).any(-1)
            expected = {
                tuple(p) for p, beaten in zip(points.tolist(), better.any(1).tolist(), strict=True) if not beaten
            }
            front = pareto_front(*points.T)
            assert {tuple(p) for p in points[front].tolist()} == expected
            assert len(front) == len(expected)  # equal points once
            assert bool((points[front, 0].diff() > 0).all())

    def test_of_equal_points_the_first_is_kept(self):
        assert pareto_front(torch.ones(3), torch.ones(3)).tolist() == [0]

    @pytest.mark.parametrize(
        ("rate", "distortion", "message"),
        [
            (torch.ones(2), torch.ones(3), r"\(2,\) and \(3,\)"),
            (torch.ones(0), torch.ones(0), "non-empty"),
            (torch.tensor([math.nan]), torch.ones(1), "must be finite"),
        ],
    )
    def test_errors(self, rate, distortion, message):
        with pytest.raises(ValueError, match=message):
            pareto_front(rate, distortion)


class TestHypervolume:
    def test_staircase(self):
        assert hypervolume(*STAIRS, (5.0, 5.0)).item() == 11.0

    def test_order_dominated_and_outlying_points_do_not_matter(self):
        rate = torch.tensor([4.0, 3.0, 1.0, 2.0, 6.0, 0.5])
        distortion = torch.tensor([1.0, 4.0, 4.0, 2.0, 0.1, 9.0])
        assert hypervolume(rate, distortion, (5.0, 5.0)).item() == 11.0

    def test_nothing_inside_the_reference(self):
        assert hypervolume(*STAIRS, (0.5, 5.0)).item() == 0.0
        assert hypervolume(*STAIRS, (5.0, 0.5)).item() == 0.0

    def test_against_monte_carlo(self):
        torch.manual_seed(4)
        points, draws = torch.rand(15, 2), torch.rand(200_000, 2)
        covered = (draws[:, None] >= points).all(-1).any(1).double().mean().item()
        assert hypervolume(*points.T, (1.0, 1.0)).item() == pytest.approx(covered, abs=5e-3)

    @pytest.mark.parametrize("reference", [(1.0,), (1.0, math.nan)])
    def test_errors(self, reference):
        with pytest.raises(ValueError, match="reference must be two finite numbers"):
            hypervolume(*STAIRS, reference)


class TestAUC:
    @pytest.mark.parametrize(
        ("interval", "mean"), [(None, 6.0), ((1.0, 2.0), 7.0), ((3.0, 3.0), 4.0), ((0.5, 4.0), 5.5)]
    )
    def test_straight_line_is_exact(self, interval, mean):
        rate = torch.tensor([4.0, 0.0, 1.5, 3.25], dtype=torch.float64)
        assert rate_distortion_auc(rate, 10 - 2 * rate, interval).item() == pytest.approx(mean, abs=1e-14)

    def test_corner_inside_the_interval(self):
        # (1, 4) to (2, 2) to (4, 1): areas 3 and 3 over a length of 3; from 1.5 to 3, areas 1.25 and 1.75
        assert rate_distortion_auc(*STAIRS).item() == pytest.approx(2.0)
        assert rate_distortion_auc(*STAIRS, (1.5, 3.0)).item() == pytest.approx((1.25 + 1.75) / 1.5)

    @pytest.mark.parametrize(
        ("curve", "mean"),
        [
            (
                "118.9,51.8 114.2,51.7 109.2,51.8 103.7,51.8 97.9,51.9 91.8,52.1 85.4,52.5 78.7,53.2 71.9,54.2 "
                "64.8,55.7 57.6,58 50.1,61.3 42.4,66.3 34.4,73.4 26.1,84.3 17.9,99.3 10.2,120.2 4.3,143.3 1.8,157.1 "
                ".9,164.4",
                66.97,
            ),
            ("121.5,51.7 106.3,52.4 89.8,53.7 72.5,56.4 53,62.2 33.7,75.6 18.2,100.5 5.4,137.2 .7,165.7", 69.00),
            ("123,51.1 107.4,52.1 91.4,53.5 74.2,55.8 54.4,62.3 35,75.9 19.4,97.7 5.7,136 .7,165.4", 69.26),
        ],
        ids=["MR-VAE", "beta-VAE", "beta-VAE annealed"],
    )
    def test_published_omniglot_curves(self, curve, mean):
        """Read off Fig. 5 of the paper: the multi-rate network needs 2 nats less distortion at equal rates."""
        points = torch.tensor([[float(x) for x in p.split(",")] for p in curve.split()], dtype=torch.float64)
        assert rate_distortion_auc(*points.T, (6.0, 118.0)).item() == pytest.approx(mean, abs=5e-3)

    def test_overfitted_end_is_flat(self):
        rate, distortion = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([4.0, 2.0, 3.5])
        assert rate_distortion_auc(rate, distortion).item() == pytest.approx((6.0 + 4.0) / 4)

    def test_collapsed_curve(self):
        assert rate_distortion_auc(torch.zeros(3), torch.tensor([3.0, 2.0, 5.0])).item() == 2.0

    def test_closed_form(self):
        """With one latent D(R) = exp(-2R)/2 * lambda, whose mean is known."""
        betas = grid(4000, -2, 0)
        rate, distortion = reverse_waterfilling(torch.ones(1, dtype=torch.float64), betas)
        top = rate.max().item()
        exact = (1 - math.exp(-2 * top)) / (4 * top)
        assert rate_distortion_auc(rate, distortion).item() == pytest.approx(exact, rel=1e-6)

    @pytest.mark.parametrize(
        ("interval", "message"),
        [
            ((0.5, 3.0), r"interval \[0.5, 3.0\] lies outside the measured rates, \[1, 4\]"),
            ((2.0, 5.0), "lies outside"),
            ((3.0, 2.0), "low <= high"),
            ((1.0, 2.0, 3.0), "low <= high"),
            ((math.nan, 2.0), "low <= high"),
        ],
    )
    def test_errors(self, interval, message):
        with pytest.raises(ValueError, match=message):
            rate_distortion_auc(*STAIRS, interval)


class TestSlopeError:
    def test_zero_between_collapses(self):
        betas = grid(15, math.log10(0.81), math.log10(1.49))  # three latents in use throughout
        assert slope_error(*optimum(betas), betas).item() < 1e-11

    def test_small_on_the_optimum_across_collapses(self):
        coarse, fine = (slope_error(*optimum(b), b).item() for b in (grid(20, -2, 0.7), grid(20_000, -2, 0.7)))
        assert coarse < 0.25
        assert fine < coarse  # only the kinks are left

    @pytest.mark.parametrize("factor", [0.5, 2.0, 64.0])
    def test_a_wrong_scale_shows_as_its_logarithm(self, factor):
        betas = grid(15, math.log10(0.81), math.log10(1.49))
        rate, distortion = optimum(betas)
        assert slope_error(rate, distortion * factor, betas).item() == pytest.approx(abs(math.log(factor)), abs=1e-10)

    def test_order_does_not_matter(self):
        betas = grid()
        shuffled = betas[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
        assert slope_error(*optimum(shuffled), shuffled) == slope_error(*optimum(betas), betas)

    def test_collapsed_end_is_left_out(self):
        betas = torch.cat([grid(9, -1, 0), torch.tensor([7.0, 8.0, 9.0, 10.0])])
        rate, distortion = optimum(betas)
        noisy = distortion.clone()
        noisy[-2:] -= 5.0  # only points with no rate on either side see these two
        assert slope_error(rate, noisy, betas) == slope_error(rate, distortion, betas)
        assert slope_error(rate + 0.1 * torch.arange(13).flip(0), noisy, betas).item() == math.inf

    def test_overfitting_is_infinite(self):
        betas = torch.tensor([0.1, 0.3, 1.0])
        assert slope_error(torch.tensor([9.0, 6.0, 3.0]), torch.tensor([5.0, 4.0, 3.0]), betas).item() == math.inf
        assert slope_error(torch.tensor([9.0, 6.0, 3.0]), torch.tensor([4.0, 4.0, 4.0]), betas).item() == math.inf

    @pytest.mark.parametrize(
        ("rate", "betas", "message"),
        [
            (torch.tensor([2.0, 1.0]), torch.tensor([0.1, 1.0]), "at least three betas, got 2"),
            (torch.full((3,), 4.0), torch.tensor([0.1, 0.5, 1.0]), "collapsed or the network ignores beta"),
            (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.1, 1.0, 1.0]), "positive and distinct"),
            (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 0.5, 1.0]), "positive and distinct"),
            (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.5, 1.0]), "one length"),
        ],
    )
    def test_errors(self, rate, betas, message):
        with pytest.raises(ValueError, match=message):
            slope_error(rate, rate.flip(0), betas)


class TestTargets:
    def test_round_trip_on_the_closed_form(self):
        betas = grid(4000, -2, 0.7)
        rate, distortion = optimum(betas)
        wanted = torch.tensor([0.05, 0.5, 1.0, 2.5], dtype=torch.float64)
        exact = optimum(wanted)
        torch.testing.assert_close(beta_for_rate(betas, rate, exact[0]), wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(beta_for_distortion(betas, distortion, exact[1]), wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(rate_at(betas, rate, wanted), exact[0], rtol=1e-5, atol=0)

    def test_inverse_of_each_other_on_a_coarse_shuffled_grid(self):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        betas = grid(8, -2, 0.7)[order]
        rate, _ = optimum(betas)
        targets = torch.linspace(rate.min().item(), rate.max().item(), 33, dtype=torch.float64)
        torch.testing.assert_close(rate_at(betas, rate, beta_for_rate(betas, rate, targets)), targets)

    def test_grid_points_are_hit(self):
        betas = grid(8, -2, 0.7)
        rate, distortion = optimum(betas)
        torch.testing.assert_close(beta_for_rate(betas, rate, rate), betas)
        torch.testing.assert_close(beta_for_distortion(betas, distortion, distortion), betas)

    def test_flat_parts_give_the_cheaper_end(self):
        betas = torch.tensor([0.01, 0.1, 1.0, 10.0])
        assert beta_for_rate(betas, torch.tensor([5.0, 2.0, 0.0, 0.0]), 0.0).item() == pytest.approx(1.0)
        assert beta_for_distortion(betas, torch.tensor([3.0, 3.0, 7.0, 9.0]), 3.0).item() == pytest.approx(0.1)

    def test_measured_bumps(self):
        betas = torch.tensor([0.01, 0.1, 1.0, 10.0])
        assert rate_at(betas, torch.tensor([6.0, 2.0, 3.0, 1.0]), 1.0).item() == 2.0
        # overfitted: 6 at .01 costs more rate than the same distortion further right
        found = beta_for_distortion(betas, torch.tensor([6.0, 4.0, 5.0, 7.0]), torch.tensor([6.0, 4.5]))
        assert found.tolist() == pytest.approx([10**0.5, 10**-0.5], rel=1e-5)

    def test_a_single_point(self):
        assert rate_at(torch.tensor([1.0]), torch.tensor([2.0]), 1.0).item() == 2.0
        assert beta_for_rate(torch.tensor([1.0]), torch.tensor([2.0]), 2.0).item() == 1.0

    def test_ends_survive_rounding(self):
        betas = torch.logspace(-2, 1, 20)
        rate = torch.linspace(9, 1, 20)
        assert rate_at(betas, rate, 0.01).item() == pytest.approx(9.0, abs=1e-4)
        nearly = torch.tensor([0.01 * (1 + 1e-9), 1.0, 10 * (1 - 1e-9)], dtype=torch.float64)
        assert rate_at(nearly, torch.tensor([9.0, 5.0, 1.0]).double(), torch.tensor([0.01, 10.0])).tolist() == [
            9.0,
            1.0,
        ]
        assert rate_at(betas, rate, 10.0).item() == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda b, r: beta_for_rate(b, r, 6.0), r"rate 6.0 lies outside the curve's rates, \[1, 5\]"),
            (lambda b, r: beta_for_rate(b, r, torch.tensor([2.0, 0.5])), "lies outside the curve's rates"),
            (lambda b, r: beta_for_distortion(b, r.flip(0), 0.5), r"outside the curve's distortions, \[1, 5\]"),
            (lambda b, r: rate_at(b, r, 3.0), r"beta 3.0 lies outside the grid of betas, \[0.1, 2\]"),
            (lambda b, r: beta_for_rate(b, r * math.nan, 3.0), "must be finite"),
            (lambda b, r: beta_for_rate(b, r, math.nan), "lies outside"),
            (lambda b, r: beta_for_rate(b[:1].repeat(3), r, 3.0), "positive and distinct"),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([0.1, 1.0, 2.0]), torch.tensor([5.0, 3.0, 1.0]))


def test_active_units_include_the_threshold_and_not_nan():
    variance = torch.tensor([[0.01, 0.5, 0.0099], [math.nan, 0.0, 1.0]], dtype=torch.float64)
    assert active_units(variance).tolist() == [2, 1]
    assert active_units(variance, threshold=0.6).tolist() == [0, 1]
