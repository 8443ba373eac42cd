"""MutualInformationGap: against scikit-learn on the same bins, at its two extremes, on one and two ranks."""

import pickle

import numpy as np
import pytest
import torch

from lightning_ext.metrics import MutualInformationGap
from lightning_ext.testing import check_metric, run_ddp

SIZES = [3, 5]


def draw(n, seed=0):
    torch.manual_seed(seed)
    factors = torch.stack([torch.randint(0, s, (n,)) for s in SIZES], 1)
    z = torch.randn(n, 4) * 2
    z[:, 1] = factors[:, 0] - 1 + 0.2 * torch.randn(n)
    z[:, 2] = 0.7 * factors[:, 1] + 0.6 * torch.randn(n)
    return z, factors


def by_scikit_learn(batches, bins=20, low=-4.0, high=4.0):
    score = pytest.importorskip("sklearn.metrics").mutual_info_score
    z, factors = (torch.cat(column) for column in zip(*batches, strict=True))
    inner = np.linspace(low, high, bins + 1)[1:-1]  # the outer bins are open
    codes = np.digitize(z.double().numpy(), inner)
    matrix = torch.tensor(
        [[score(codes[:, j], factors[:, f]) for f in range(2)] for j in range(z.shape[1])], dtype=torch.float64
    )
    entropy = torch.tensor([score(factors[:, f], factors[:, f]) for f in range(2)], dtype=torch.float64)
    top = matrix.sort(0, descending=True).values
    gap = (top[0] - top[1]) / entropy
    return {"mutual_information": matrix, "gap": gap, "mig": gap.mean()}


class TestValues:
    def test_every_way_of_cutting_saving_and_spreading_the_data(self):
        batches = [draw(n, seed) for seed, n in enumerate((64, 31, 90, 48))]
        check_metric(lambda: MutualInformationGap(SIZES, 4), batches, by_scikit_learn)

    @pytest.mark.parametrize(("bins", "span"), [(20, (-4.0, 4.0)), (7, (-1.0, 2.5)), (2, (0.0, 1.0))])
    def test_against_scikit_learn(self, bins, span):
        batches = [draw(700, 1), draw(300, 2)]
        metric = MutualInformationGap(SIZES, 4, bins, span)
        for batch in batches:
            metric.update(*batch)
        expected = by_scikit_learn(batches, bins, *span)
        for key, value in metric.compute().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-13)

    def test_disentangled_is_near_one_and_entangled_near_zero(self):
        torch.manual_seed(0)
        factors = torch.stack([torch.randint(0, 4, (20_000,)) for _ in range(3)], 1)
        centred = factors - 1.5
        clean = torch.cat([centred + 0.02 * torch.randn(20_000, 3), torch.randn(20_000, 2)], 1)
        # every factor is told equally well by two latents
        doubled = torch.cat([centred, centred], 1) + 0.02 * torch.randn(20_000, 6)
        for z, low, high in ((clean, 0.97, 1.0), (doubled, 0.0, 0.01)):
            metric = MutualInformationGap([4, 4, 4], z.shape[1])
            metric.update(z, factors)
            value = metric.compute()
            assert low <= value["mig"].item() <= high
            assert value["gap"].shape == (3,)
            assert value["mutual_information"].shape == (z.shape[1], 3)
            assert value["mutual_information"].max().item() == pytest.approx(np.log(4), abs=5e-3)

    def test_outer_bins_are_open_ended(self):
        metric = MutualInformationGap([2], 2, num_bins=4, z_range=(-1.0, 1.0))
        z = torch.tensor([[-9.0, 0.0], [-0.6, 0.49], [0.6, 0.5], [7e9, 0.999]])
        metric.update(z, torch.zeros(4, 1, dtype=torch.long))
        assert metric.counts[:, :, 0].tolist() == [[2, 0, 0, 2], [0, 0, 2, 2]]

    def test_half_precision_module_and_counts(self):
        metric = MutualInformationGap(SIZES, 4).to(torch.bfloat16)
        metric.update(*draw(50))
        assert metric.counts.dtype == torch.long
        assert metric.compute()["mig"].dtype == torch.float64

    def test_a_constant_factor_is_named_and_left_out(self):
        z, factors = draw(400)
        factors[:, 1] = 2
        metric = MutualInformationGap(SIZES, 4)
        metric.update(z, factors)
        with pytest.warns(UserWarning, match="factor 1 took a single value"):
            value = metric.compute()
        assert value["gap"].isnan().tolist() == [False, True]
        assert value["mig"].item() == pytest.approx(value["gap"][0].item())

    def test_only_constant_factors(self):
        metric = MutualInformationGap([2, 2], 2)
        metric.update(torch.randn(5, 2), torch.ones(5, 2, dtype=torch.long))
        with pytest.warns(UserWarning, match="factor 0 took a single value.* factor 1 took"):
            value = metric.compute()
        assert value["mig"].isnan()
        assert not value["mutual_information"].any()


class TestStates:
    def test_pickle_merge_and_reset(self):
        first, second, whole = (MutualInformationGap(SIZES, 4) for _ in range(3))
        first.update(*draw(60, 1))
        second.update(*draw(45, 2))
        whole.update(*draw(60, 1))
        whole.update(*draw(45, 2))
        revived = pickle.loads(pickle.dumps(first))
        revived.merge_state(second)
        assert torch.equal(revived.counts, whole.counts)
        revived.reset()
        assert not revived.counts.any()

    @pytest.mark.ddp
    def test_two_ranks_equal_one(self):
        batches = [draw(n, seed) for seed, n in enumerate((50, 20, 31))]

        def rank_value(rank):
            metric = MutualInformationGap(SIZES, 4)
            for batch in batches[rank::2]:
                metric.update(*batch)
            return metric.compute()

        expected = by_scikit_learn(batches)
        for value in run_ddp(rank_value):
            for key in value:
                torch.testing.assert_close(value[key], expected[key], rtol=1e-10, atol=1e-13)

    def test_no_update_at_all(self):
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(RuntimeError, match="has seen no sample on any rank"),
        ):
            MutualInformationGap(SIZES, 4).compute()


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"factor_sizes": []}, "factor_sizes must be a non-empty sequence"),
            ({"factor_sizes": [3, 0]}, r"positive sizes, got \[3, 0\]"),
            ({"latent_dim": 1}, "latent_dim and num_bins must be at least 2, got 1 and 20"),
            ({"num_bins": 1}, "got 4 and 1"),
            ({"z_range": (1.0, 1.0)}, "low < high"),
            ({"z_range": (-1.0, float("inf"))}, "z_range must be two finite numbers"),
        ],
    )
    def test_constructor(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            MutualInformationGap(**{"factor_sizes": SIZES, "latent_dim": 4, **kwargs})

    @pytest.mark.parametrize(
        ("z", "factors", "message"),
        [
            (torch.zeros(2, 3), [[0, 0], [0, 0]], r"z must have shape \(B, 4\), got \(2, 3\)"),
            (torch.zeros(2, 4), [[0], [0]], r"factors must have shape \(2, 2\), .* got \(2, 1\)"),
            (torch.zeros(2, 4), [[0.0, 0.0], [0.0, 1.0]], "factors must be integers .* factors.long()"),
            (torch.zeros(2, 4), [[0, 0], [0, 5]], r"factors\[:, 1\] must lie in \[0, 4\], got values from 0 to 5"),
            (torch.zeros(2, 4), [[-1, 0], [0, 0]], r"factors\[:, 0\] must lie in \[0, 2\], got values from -1"),
            (torch.full((2, 4), float("nan")), [[0, 0], [0, 0]], "z has values that are not finite"),
        ],
    )
    def test_update(self, z, factors, message):
        with pytest.raises(ValueError, match=message):
            MutualInformationGap(SIZES, 4).update(z, torch.tensor(factors))


class TestPlot:
    @pytest.fixture(autouse=True)
    def _close(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        yield
        plt.close("all")

    def test_heat_map(self):
        metric = MutualInformationGap(SIZES, 4)
        metric.update(*draw(300))
        value = metric.compute()
        _, axes = metric.plot(factor_names=["shape", "size"])
        shown = torch.as_tensor(axes.images[0].get_array())
        torch.testing.assert_close(shown, value["mutual_information"])
        assert [t.get_text() for t in axes.texts] == [
            f"{v:.2f}" for v in value["mutual_information"].flatten().tolist()
        ]
        assert axes.get_xticklabels()[0].get_text() == f"shape\ngap {value['gap'][0]:.2f}"
        assert axes.get_title() == f"MIG {value['mig']:.3f}"

    def test_a_single_factor(self):
        metric = MutualInformationGap([3], 4)
        z, factors = draw(300)
        metric.update(z, factors[:, :1])
        _, axes = metric.plot()
        assert len(axes.get_xticklabels()) == 1

    def test_wrong_names(self):
        metric = MutualInformationGap(SIZES, 4)
        metric.update(*draw(30))
        with pytest.raises(ValueError, match="must name 2 factors, got 1"):
            metric.plot(factor_names=["shape"])

    def test_without_matplotlib_the_error_has_the_pip_line(self, monkeypatch):
        metric = MutualInformationGap(SIZES, 4)
        metric.update(*draw(30))
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            metric.plot()
