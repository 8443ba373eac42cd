"""Streaming moments against ``torch.var`` and the information gap against scikit-learn."""

import math

import pytest
import torch

from lightning_ext.functional import merge_moments, moments_variance, mutual_information_gap, update_moments


def moments_of(x):
    return torch.stack([torch.full_like(x[0], len(x)), x.mean(0), (x - x.mean(0)).square().sum(0)], -1)


class TestMoments:
    @pytest.mark.parametrize("offset", [0.0, 1e6])
    def test_merge_equals_the_whole(self, offset):
        torch.manual_seed(0)
        x = torch.randn(101, 4, dtype=torch.float64) * torch.tensor([1, 0.01, 5, 1e-3]) + offset
        parts = torch.stack([moments_of(p) for p in x.split([1, 60, 40])])
        merged = merge_moments(parts)
        close = {"rtol": 1e-12 if offset == 0 else 1e-7, "atol": 1e-12 if offset == 0 else 0}
        torch.testing.assert_close(merged, moments_of(x), **close)
        torch.testing.assert_close(moments_variance(merged), x.var(0, unbiased=True), **close)
        nested = merge_moments(torch.stack([parts[2], merge_moments(parts[:2])]))
        torch.testing.assert_close(nested, merged, **close)

    def test_empty_parts_add_nothing(self):
        part = moments_of(torch.randn(5, 2, dtype=torch.float64) + 100)
        empty = torch.zeros_like(part)
        for stack in ([part, empty], [empty, part], [empty, part, empty]):
            torch.testing.assert_close(merge_moments(torch.stack(stack)), part, rtol=1e-14, atol=0)
        assert not merge_moments(torch.stack([empty, empty])).any()

    def test_groups_in_mixed_batches(self):
        torch.manual_seed(1)
        x = torch.randn(300, 3, dtype=torch.float64) + 7
        group = torch.randint(0, 4, (300,))
        group[group == 2] = 3  # group 2 stays empty
        moments = torch.zeros(4, 3, 3, dtype=torch.float64)
        for part in torch.arange(300).split(37):
            moments = update_moments(moments, group[part], x[part])
        variance = moments_variance(moments)
        for k in (0, 1, 3):
            torch.testing.assert_close(moments[k], moments_of(x[group == k]), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(variance[k], x[group == k].var(0, unbiased=True), rtol=1e-11, atol=0)
        assert not moments[2].any()
        assert bool(variance[2].isnan().all())

    def test_nan_stays_in_its_group_and_column(self):
        x = torch.tensor([[1.0, 2.0], [math.nan, 4.0], [3.0, 6.0]])
        moments = update_moments(torch.zeros(2, 2, 3), torch.tensor([0, 1, 0]), x)
        assert moments[..., 1].isnan().tolist() == [[False, False], [True, False]]

    def test_variance_of_one_sample_is_nan(self):
        assert math.isnan(moments_variance(torch.tensor([1.0, 3.0, 0.0])).item())

    def test_error(self):
        with pytest.raises(ValueError, match=r"do not fit: got \(2, 3, 3\), \(4,\), \(4, 2\)"):
            update_moments(torch.zeros(2, 3, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4, 2))


class TestInformationGap:
    def test_against_scikit_learn(self):
        score = pytest.importorskip("sklearn.metrics").mutual_info_score
        torch.manual_seed(2)
        bins, sizes, n = 6, [3, 5], 400
        factors = torch.stack([torch.randint(0, s, (n,)) for s in sizes], 1)
        codes = torch.stack([(factors[:, 0] * 2 + torch.randint(0, 2, (n,))), torch.randint(0, bins, (n,))], 1)
        counts = torch.zeros(2, bins, 8, dtype=torch.long)
        for code, factor in zip(codes.tolist(), factors.tolist(), strict=True):
            for latent in range(2):
                counts[latent, code[latent], factor[0]] += 1
                counts[latent, code[latent], 3 + factor[1]] += 1
        result = mutual_information_gap(counts, sizes)
        expected = torch.tensor(
            [[score(codes[:, j], factors[:, f]) for f in range(2)] for j in range(2)], dtype=torch.float64
        )
        torch.testing.assert_close(result.mutual_information, expected, rtol=1e-12, atol=1e-14)
        entropy = torch.tensor([score(factors[:, f], factors[:, f]) for f in range(2)], dtype=torch.float64)
        torch.testing.assert_close(result.entropy, entropy, rtol=1e-12, atol=0)
        top = expected.sort(0, descending=True).values
        gap = (top[0] - top[1]) / entropy
        torch.testing.assert_close(result.gap, gap, rtol=1e-12, atol=0)
        assert result.mig.item() == pytest.approx(gap.mean().item())

    def test_extremes(self):
        told, silent = torch.eye(4, dtype=torch.long) * 10, torch.full((4, 4), 10)
        assert mutual_information_gap(torch.stack([told, silent]), [4]).mig.item() == pytest.approx(1.0)
        assert mutual_information_gap(torch.stack([told, told]), [4]).mig.item() == 0.0
        assert mutual_information_gap(torch.stack([told, silent]), [4]).entropy.item() == pytest.approx(math.log(4))

    def test_a_constant_factor_is_left_out(self):
        informative = torch.tensor([[3, 0, 3, 0], [0, 3, 3, 0]])  # the second factor is always 0
        silent = torch.tensor([[3, 3, 6, 0], [0, 0, 0, 0]])
        result = mutual_information_gap(torch.stack([informative, silent]), [2, 2])
        assert result.gap.isnan().tolist() == [False, True]
        assert result.mig.item() == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            (torch.ones(1, 2, 2), "at least 2 latents"),
            (torch.ones(2, 2, 3), r"got \(2, 2, 3\)"),
            (torch.zeros(2, 2, 2), "at least one positive entry"),
            (-torch.ones(2, 2, 2), "non-negative"),
            (torch.tensor([[[3, 0], [2, 0]]]).repeat(2, 1, 1), "single value"),
        ],
    )
    def test_errors(self, counts, message):
        with pytest.raises(ValueError, match=message):
            mutual_information_gap(counts, [2])
