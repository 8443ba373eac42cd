"""RateDistortionCurve: against plain averages, on one and two ranks, and what it says of incomplete data."""

import copy
import pickle
import warnings

import pytest
import torch

from lightning_ext.functional import (
    hypervolume,
    rate_distortion_auc,
    reverse_waterfilling,
    slope_error,
    widest_float,
)
from lightning_ext.metrics import RateDistortionCurve
from lightning_ext.testing import check_metric, run_ddp

BETAS = [0.05, 0.2, 0.8, 3.0]
SPECTRUM = torch.tensor([6, 3, 1.5, 0.8, 0.4], dtype=torch.float64)


def make(**kwargs):
    kwargs = {"latent_dim": 3, "reference_point": (40.0, 80.0), **kwargs}
    return RateDistortionCurve(BETAS, **kwargs)


def draw(n, seed=0):
    """A mixed batch: index, rate, distortion, mu, with rate falling and distortion rising along the grid."""
    torch.manual_seed(seed)
    index = torch.randint(0, len(BETAS), (n,))
    rate = 20 - 5 * index + torch.rand(n)
    distortion = 10 + 10 * index + torch.rand(n)
    mu = 4 + torch.randn(n, 3) * torch.tensor([1.0, 0.3, 0.05])
    mu[:, 2] += seed  # inactive within a batch, active across batches
    return index, rate, distortion, mu


def by_hand(batches):
    index, rate, distortion, mu = (torch.cat(column) for column in zip(*batches, strict=True))
    groups = [index == k for k in range(len(BETAS))]
    expected = {
        "beta": torch.tensor(BETAS),
        "count": torch.stack([g.sum() for g in groups]),
        "rate": torch.stack([rate[g].double().mean() for g in groups]),
        "distortion": torch.stack([distortion[g].double().mean() for g in groups]),
        "active_units": torch.stack([(mu[g].double().var(0, unbiased=True) >= 0.01).sum() for g in groups]),
    }
    expected["elbo"] = -(expected["rate"] + expected["distortion"])
    expected["loss"] = expected["distortion"] + torch.tensor(BETAS) * expected["rate"]
    expected["hypervolume"] = hypervolume(expected["rate"], expected["distortion"], (40.0, 80.0))
    expected["auc"] = rate_distortion_auc(expected["rate"], expected["distortion"])
    return expected


def assert_same(ours, other):
    assert ours.keys() == other.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], other[key], rtol=1e-10, atol=1e-12, equal_nan=True)


class TestValues:
    def test_every_way_of_cutting_saving_and_spreading_the_data(self):
        batches = [draw(n, seed) for seed, n in enumerate((64, 31, 90, 48))]
        check_metric(make, batches, by_hand)

    def test_split_batches_equal_one_update(self):
        whole, split = make(), make()
        batch = draw(200)
        whole.update(*batch)
        for part in torch.arange(200).split(23):
            split.update(*(column[part] for column in batch))
        assert_same(split.compute(), whole.compute())

    def test_int_index_equals_a_tensor_of_one_value(self):
        by_int, by_tensor = make(), make()
        for k in range(4):
            index, rate, distortion, mu = draw(20, seed=k)
            by_int.update(k, rate, distortion, mu)
            by_tensor.update(torch.full_like(index, k, dtype=torch.int32), rate, distortion, mu)
        assert_same(by_int.compute(), by_tensor.compute())

    def test_active_units_are_those_of_torch_var_with_an_offset(self):
        metric = RateDistortionCurve([1.0], latent_dim=40)
        scale = torch.logspace(-2, 0, 40, dtype=torch.float64)
        mu = 1e4 + scale * torch.randn(500, 40, dtype=torch.float64)
        for part in mu.split(33):
            metric.update(0, torch.ones(len(part)), torch.ones(len(part)), part)
        with pytest.warns(UserWarning, match="slope_error is NaN"):
            value = metric.compute()
        active = int((mu.var(0, unbiased=True) >= 0.01).sum())
        assert 0 < active < 40
        assert value["active_units"].item() == active

    def test_staircase(self):
        metric = RateDistortionCurve([0.1, 0.5, 2.0], reference_point=(5.0, 5.0), rate_interval=(1.5, 3.0))
        metric.update(torch.arange(3), torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
        value = metric.compute()
        assert value["hypervolume"].item() == 11.0
        assert value["auc"].item() == pytest.approx(2.0)
        assert value["elbo"].tolist() == [-5.0, -4.0, -5.0]  # weight 1, whatever beta
        assert value["loss"].tolist() == pytest.approx([1.4, 3.0, 6.0])
        assert bool(value["monotone"])

    def test_optimum_of_a_linear_vae(self):
        betas = torch.logspace(-1.0, -0.45, 7, dtype=torch.float64)
        metric = RateDistortionCurve(betas.tolist())
        rate, distortion = reverse_waterfilling(SPECTRUM, betas)
        metric.update(torch.arange(7), rate, distortion)
        value = metric.compute()
        assert value["slope_error"].item() < 1e-12
        metric.reset()
        metric.update(torch.arange(7), rate, 2 * distortion)
        assert metric.compute()["slope_error"].item() == pytest.approx(0.6931471805599453)
        assert slope_error(rate, 2 * distortion, betas).item() == pytest.approx(0.6931471805599453)

    @pytest.mark.parametrize(
        ("rate", "distortion"), [([4.0, 1.0, 2.0], [1.0, 2.0, 4.0]), ([4.0, 2.0, 1.0], [3.0, 2.0, 4.0])]
    )
    def test_a_bump_is_not_monotone(self, rate, distortion):
        metric = RateDistortionCurve([0.1, 0.5, 2.0])
        metric.update(torch.arange(3), torch.tensor(rate), torch.tensor(distortion))
        assert not bool(metric.compute()["monotone"])

    def test_optional_keys(self):
        metric = RateDistortionCurve(BETAS)
        metric.update(*draw(50)[:3])
        assert not {"hypervolume", "active_units"} & metric.compute().keys()

    def test_sums_keep_float64_for_half_precision_inputs_and_modules(self):
        metric = RateDistortionCurve([0.5, 1.0, 2.0])
        module = torch.nn.Sequential(torch.nn.Linear(1, 1))
        module.metric = metric
        module.to(torch.bfloat16).half()
        values = torch.full((300,), 1.0, dtype=torch.bfloat16)
        for _ in range(10):
            metric.update(0, values, values)  # bfloat16 cannot count beyond 256
        module.to(torch.bfloat16)
        assert metric.sum_rate.dtype == torch.float64
        assert metric.sum_rate[0].item() == 3000
        metric.reset()
        assert metric.sum_rate.dtype == torch.float64

    def test_a_device_without_float64_sums_in_float32(self):
        assert widest_float(torch.device("mps")) == torch.float32
        assert widest_float(torch.device("cuda")) == torch.float64

    def test_moving_to_a_device_without_float64(self, monkeypatch):
        def dtype(device):
            return torch.float32 if device.type == "meta" else torch.float64

        monkeypatch.setattr("lightning_ext.metrics._precise.widest_float", dtype)
        metric = make().to("meta")
        for _ in range(2):
            assert metric.sum_rate.dtype == metric.moments.dtype == torch.float32
            assert metric.count.dtype == torch.long
            assert metric.sum_rate.device.type == "meta"
            metric.reset()

    def test_results_and_states_carry_no_gradient(self):
        metric = make()
        index, *values = draw(40)
        value = metric(index, *(v.requires_grad_() for v in values))
        assert not any(v.requires_grad for v in value.values())
        assert not any(getattr(metric, name).requires_grad for name in ("sum_rate", "sum_distortion", "moments"))

    def test_inputs_are_left_alone(self):
        batch = draw(30)
        before = copy.deepcopy(batch)
        make().update(*batch)
        torch.testing.assert_close(batch, before, rtol=0, atol=0)


class TestStates:
    def test_reset_pickle_and_merge(self):
        first, second, whole = make(), make(), make()
        first.update(*draw(60, 1))
        second.update(*draw(45, 2))
        for seed, n in ((1, 60), (2, 45)):
            whole.update(*draw(n, seed))
        assert whole.compute()["active_units"].tolist() == [3.0] * 4
        assert first.compute()["active_units"].tolist() == [2.0] * 4
        revived = pickle.loads(pickle.dumps(first))
        revived.merge_state(second)
        assert_same(revived.compute(), whole.compute())
        revived.merge_state(make())  # one that saw nothing
        assert_same(revived.compute(), whole.compute())
        second.reset()
        second.update(*draw(60, 1))
        assert_same(second.compute(), first.compute())

    def test_only_curves_over_equal_betas_merge(self):
        with pytest.raises(ValueError, match=r"equal betas merge, got \[1.0, 2.0\] into \[0.1, 2.0\]"):
            RateDistortionCurve([0.1, 2.0]).merge_state(RateDistortionCurve([1.0, 2.0]))

    @pytest.mark.ddp
    @pytest.mark.parametrize("shares", [((0, 1), (2, 3, 4)), ((0, 1, 2, 3, 4), ())])
    def test_two_ranks_equal_one(self, shares):
        batches = [draw(n, seed) for seed, n in enumerate((50, 20, 31, 8, 64))]
        whole = make()
        for batch in batches:
            whole.update(*batch)

        def rank_value(rank):
            metric = make()
            for b in shares[rank]:
                metric.update(*batches[b])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was called before the ``update``.*")
                return metric.compute(), metric.count.sum().item()

        results = run_ddp(rank_value)
        for rank, (value, seen) in enumerate(results):
            assert_same(value, whole.compute())
            assert seen == sum(len(batches[b][0]) for b in shares[rank])  # unsynced again after compute

    @pytest.mark.ddp
    def test_ranks_may_see_different_betas(self):
        def rank_value(rank):
            metric = RateDistortionCurve([0.1, 1.0])
            metric.update(rank, torch.tensor([2.0 - rank]), torch.tensor([1.0 + rank]))
            return metric.compute()["rate"]

        for value in run_ddp(rank_value):
            assert value.tolist() == [2.0, 1.0]


class TestIncompleteData:
    def test_one_warning_names_the_betas_and_the_rest_counts(self):
        metric = RateDistortionCurve([0.1, 0.2, 0.5, 1.0, 2.0, 4.0], latent_dim=2, reference_point=(9.0, 9.0))
        index = torch.tensor([0, 1, 1, 3, 4, 4, 5, 5])
        rate = torch.tensor([5.0, 4.0, 4.0, 3.0, 2.0, float("inf"), 1.0, 1.0])
        distortion = torch.tensor([1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 5.0])
        mu = torch.randn(8, 2)
        mu[6, 1] = float("nan")
        metric.update(index, rate, distortion, mu)
        with pytest.warns(UserWarning, match="no sample at beta 0.5, where") as caught:
            value = metric.compute()
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "not finite at beta 2, where" in message
        assert "(one sample, or not finite) at beta 0.1, 1, 4, where" in message
        assert value["rate"].isnan().tolist() == [False, False, True, False, True, False]
        assert value["distortion"].isnan().tolist() == value["rate"].isnan().tolist()
        assert value["active_units"].isnan().tolist() == [True, False, True, True, False, True]
        rest = torch.tensor([5.0, 4.0, 3.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 5.0])
        assert value["hypervolume"].item() == hypervolume(*rest, (9.0, 9.0)).item()
        assert value["auc"].item() == pytest.approx(rate_distortion_auc(*rest).item())
        assert value["slope_error"].isfinite()

    def test_a_collapsed_curve_says_why_it_has_no_slope(self):
        metric = RateDistortionCurve([0.1, 1.0, 2.0], rate_interval=(1.0, 2.0))
        metric.update(torch.arange(3), torch.zeros(3), torch.ones(3))
        with pytest.warns(UserWarning, match="slope_error is NaN: .* ignores beta.") as caught:
            value = metric.compute()
        assert r"auc is NaN: interval [1.0, 2.0] lies outside the measured rates, [0, 0]" in str(caught[0].message)
        assert value["auc"].isnan()
        assert value["rate"].tolist() == [0.0, 0.0, 0.0]

    def test_nothing_finite(self):
        metric = RateDistortionCurve([0.1, 1.0, 2.0], reference_point=(1.0, 1.0))
        metric.update(torch.arange(3), torch.full((3,), float("nan")), torch.ones(3))
        with pytest.warns(UserWarning, match="not finite at beta 0.1, 1, 2"):
            value = metric.compute()
        assert all(bool(value[k].isnan().all()) for k in ("rate", "distortion", "auc", "slope_error", "hypervolume"))

    def test_forward_is_quiet_about_what_its_batch_leaves_out(self):
        metric = RateDistortionCurve([0.1, 1.0, 2.0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = metric(1, torch.tensor([2.0]), torch.tensor([3.0]))
        assert value["rate"].isnan().tolist() == [True, False, True]
        with pytest.warns(UserWarning, match=r"no sample at beta 0.1, 2, where"):
            metric.compute()

    def test_no_update_at_all(self):
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(RuntimeError, match="has seen no sample on any rank; call update"),
        ):
            make().compute()
        metric = RateDistortionCurve(BETAS)
        metric.update(0, torch.zeros(0), torch.zeros(0))  # an empty batch is no sample either
        with pytest.raises(RuntimeError, match="has seen no sample"):
            metric.compute()


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"betas": []}, "non-empty sequence of positive, finite numbers"),
            ({"betas": [0.0, 1.0]}, r"positive, finite numbers, got \[0.0, 1.0\]"),
            ({"betas": [1.0, float("nan")]}, "positive, finite"),
            ({"betas": [1.0, 0.1]}, "ascending order without duplicates"),
            ({"betas": [0.1, 0.1]}, "ascending order without duplicates"),
            ({"latent_dim": 0}, "latent_dim must be at least 1"),
            ({"reference_point": (1.0,)}, "reference_point must be two finite numbers"),
            ({"reference_point": (1.0, float("inf"))}, "reference_point must be two finite numbers"),
            ({"rate_interval": (2.0, 1.0)}, "rate_interval must be .* low <= high"),
            ({"nonsense": 1}, "Unexpected keyword arguments: `nonsense`"),
        ],
    )
    def test_constructor(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            RateDistortionCurve(**{"betas": BETAS, **kwargs})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"index": torch.tensor([0, 1, 4])}, r"index must lie in \[0, 3\], .* from 0 to 4"),
            ({"index": -1}, r"index must lie in \[0, 3\]"),
            ({"index": torch.tensor([0, 1])}, r"index must be an int or match rate \(3,\), got \(2,\)"),
            ({"index": torch.ones(3)}, "index must be integers, .* got torch.float32"),
            ({"index": 0.5}, "index must be integers"),
            ({"rate": torch.ones(2)}, r"got shapes \(2,\) and \(3,\)"),
            ({"rate": torch.ones(3, 1), "distortion": torch.ones(3, 1)}, r"vectors of one length \(B,\)"),
            ({"mu": None}, "latent_dim is set, so update needs mu"),
            ({"mu": torch.ones(3, 2)}, r"mu must have shape \(3, 3\), got \(3, 2\)"),
        ],
    )
    def test_update(self, change, message):
        batch = {"index": 0, "rate": torch.ones(3), "distortion": torch.ones(3), "mu": torch.ones(3, 3)}
        with pytest.raises(ValueError, match=message):
            make().update(**{**batch, **change})

    def test_mu_without_latent_dim(self):
        with pytest.raises(ValueError, match="latent_dim is not set"):
            RateDistortionCurve(BETAS).update(0, torch.ones(3), torch.ones(3), torch.ones(3, 3))


class TestPlot:
    @pytest.fixture(autouse=True)
    def _close(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        yield
        plt.close("all")

    def curve(self):
        metric = RateDistortionCurve([0.01, 0.1, 1.0, 10.0])
        metric.update(torch.arange(4), torch.tensor([9.0, 6.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 4.0, 9.0]))
        return metric

    def test_points_colours_and_best_elbo(self, tmp_path):
        figure, axes = self.curve().plot(baselines={"beta-VAE": ([8.0, 1.0], [2.0, 8.0]), "one": (4.0, 4.0)})
        points, best, several, single = axes.collections
        assert points.get_offsets().tolist() == [[9.0, 1.0], [6.0, 2.0], [3.0, 4.0], [0.0, 9.0]]
        assert points.get_array().tolist() == pytest.approx([0.01, 0.1, 1.0, 10.0])
        assert best.get_offsets().tolist() == [[3.0, 4.0]]
        assert several.get_offsets().tolist() == [[8.0, 2.0], [1.0, 8.0]]
        assert single.get_offsets().tolist() == [[4.0, 4.0]]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["curve", "best ELBO -7.0 at β = 1", "beta-VAE", "one"]
        assert "nats" in axes.get_xlabel() + axes.get_ylabel()
        figure.savefig(tmp_path / "curve.png")
        assert (tmp_path / "curve.png").stat().st_size > 5000

    def test_given_axes_several_curves_and_gaps(self):
        import matplotlib.pyplot as plt

        metric = self.curve()
        early = metric.compute()
        late = {**early, "rate": torch.tensor([9.0, float("nan"), 3.0, 0.0])}
        given_figure, given = plt.subplots()
        figure, axes = metric.plot([early, late], ax=given)
        assert (figure, axes) == (given_figure, given)
        assert len(axes.collections[0].get_offsets()) == 3  # the gap is left out
        assert axes.lines[0].get_xdata().tolist() == [9.0, 6.0, 3.0, 0.0]

    def test_a_single_beta(self):
        metric = RateDistortionCurve([1.0])
        metric.update(0, torch.ones(2), torch.ones(2))
        with pytest.warns(UserWarning, match="slope_error is NaN"):
            _, axes = metric.plot()
        assert axes.collections[0].get_offsets().tolist() == [[1.0, 1.0]]

    def test_nothing_to_draw(self):
        nan = torch.full((2,), float("nan"))
        with pytest.raises(ValueError, match="no finite point"):
            self.curve().plot({"beta": torch.tensor([0.1, 1.0]), "rate": nan, "distortion": nan})
        with pytest.raises(ValueError, match="at least one computed curve"):
            self.curve().plot([])

    def test_without_matplotlib_the_error_has_the_pip_line(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            self.curve().plot()
