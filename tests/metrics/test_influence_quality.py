"""Metrics of influence scores: one number per query and its mean, detection of flipped labels, and their figures.

Plain references, ranks, copies and merges are checked through the conformance registry.
"""

import warnings

import pytest
import torch

from lightning_ext.functional import random_subsets
from lightning_ext.metrics import LinearDatamodelingScore, LOOCorrelation, MislabelDetection, TopKOverlap
from lightning_ext.testing import run_ddp

MASKS = random_subsets(12, 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def subsets():
    return LinearDatamodelingScore(MASKS)


PER_QUERY = [
    pytest.param(subsets, lambda n: (normal(n, 8), normal(12, n, seed=1)), id="subsets"),
    pytest.param(lambda: TopKOverlap(3), lambda n: (normal(n, 8), normal(n, 8, seed=1)), id="overlap"),
    pytest.param(LOOCorrelation, lambda n: (normal(n, 8), normal(n, 8, seed=1)), id="removals"),
]


@pytest.mark.parametrize(("build", "batch"), PER_QUERY)
class TestMeansOverQueries:
    def test_a_single_query_has_no_standard_error(self, build, batch):
        metric = build()
        metric.update(*batch(1))
        with pytest.warns(UserWarning, match=r"'standard_error' is NaN: it takes two queries") as caught:
            value = metric.compute()
        assert len(caught) == 1
        assert value["standard_error"].isnan()
        assert value[next(iter(value))].isfinite()
        assert value["num_queries"] == 1

    def test_nothing_seen(self, build, batch):
        with (
            pytest.warns(UserWarning, match="before the ``update``"),
            pytest.raises(RuntimeError, match="on any rank; call update before compute"),
        ):
            build().compute()

    @pytest.mark.parametrize("place", [0, 1])
    def test_nan_is_refused_by_the_name_of_the_argument(self, build, batch, place):
        arguments = list(batch(3))
        arguments[place][2, 1] = torch.nan
        names = {"TopKOverlap": ("scores", "reference"), "LOOCorrelation": ("predicted", "actual")}
        metric = build()
        name = names.get(type(metric).__name__, ("scores", "outcomes"))[place]
        with pytest.raises(ValueError, match=rf"{name} must be finite, got nan at \(2, 1\)"):
            metric.update(*arguments)

    def test_results_carry_no_gradient(self, build, batch):
        metric = build()
        value = metric(*(tensor.requires_grad_() for tensor in batch(3)))
        assert not any(tensor.requires_grad for tensor in value.values())
        states = [torch.cat(state) if isinstance(state, list) else state for state in metric.metric_state.values()]
        assert not any(state.requires_grad for state in states)


class TestLinearDatamodelingScore:
    def test_queries_without_a_number_are_left_out_and_counted(self):
        metric = subsets()
        scores, outcomes = normal(4, 8), normal(12, 4, seed=1)
        outcomes[:, 1] = 3.0
        scores[2] = 0.0
        metric.update(scores, outcomes)
        with pytest.warns(UserWarning, match="2 of 4 queries are NaN and left out: their predictions or outcomes"):
            value = metric.compute()
        rest = subsets()
        rest.update(scores[[0, 3]], outcomes[:, [0, 3]])
        assert value == rest.compute()

    def test_nothing_left(self):
        metric = subsets()
        metric.update(torch.zeros(2, 8), normal(12, 2))
        with pytest.warns(UserWarning, match=r"2 of 2 queries are NaN .* 'lds' and 'standard_error' are NaN"):
            value = metric.compute()
        assert value["lds"].isnan()
        assert value["num_queries"] == 0

    def test_forward_is_quiet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert subsets()(torch.zeros(2, 8), normal(12, 2))["lds"].isnan()

    def test_other_subsets_do_not_merge(self):
        other = LinearDatamodelingScore(~MASKS)
        with pytest.raises(ValueError, match="Only metrics over equal subset_masks merge"):
            subsets().merge_state(other)

    @pytest.mark.parametrize("masks", [MASKS.float(), MASKS[0], MASKS[:1]])
    def test_masks(self, masks):
        with pytest.raises(ValueError, match=r"subset_masks must be a bool tensor \(M, N\) with at least two subsets"):
            LinearDatamodelingScore(masks)

    def test_memory_does_not_grow(self):
        metric = subsets()
        for seed in range(5):
            metric.update(normal(50, 8, seed=seed), normal(12, 50, seed=seed))
            assert sum(state.nbytes for state in metric.metric_state.values()) == 48
        assert not metric.state_dict()  # the checkpoint of a module that owns it stays as it was


class TestTopKOverlap:
    @pytest.mark.parametrize(("kind", "expected"), [("helpful", 0.0), ("harmful", 0.5), ("absolute", 1.0)])
    def test_kinds(self, kind, expected):
        metric = TopKOverlap(2, kind)
        scores, reference = torch.tensor([[5.0, 3.0, 1.0, -4.0, -9.0]]), torch.tensor([[-10.0, 1.0, 2.0, 3.0, -12.0]])
        reference = torch.cat([reference, scores])
        metric.update(torch.cat([scores, scores]), reference)
        assert metric.compute()["overlap"].item() == (expected + 1) / 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((0,), "k must be at least 1, got 0"), ((1, "largest"), "kind must be .* got 'largest'")],
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            TopKOverlap(*arguments)

    def test_k_beyond_the_samples(self):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 3\], the number of samples, got 4"):
            TopKOverlap(4).update(torch.ones(1, 3), torch.ones(1, 3))


class TestLOOCorrelation:
    def test_constant_rows_are_nan_with_a_warning(self):
        metric = LOOCorrelation()
        predicted, actual = normal(4, 6), normal(4, 6, seed=1)
        predicted[1], actual[3] = 0.1, 0.0
        metric.update(predicted, actual)
        with pytest.warns(UserWarning, match="2 of 4 queries are NaN and left out: their effects are constant"):
            value = metric.compute()
        assert value["per_query"].isnan().tolist() == [False, True, False, True]
        assert value["correlation"].item() == pytest.approx(value["per_query"][[0, 2]].mean().item())

    @pytest.mark.parametrize("kind", ["pearson", "spearman"])
    def test_kind(self, kind):
        metric = LOOCorrelation(kind)
        x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 1.0, 2.0]])
        metric.update(x, x.exp())
        exact = 1.0 if kind == "spearman" else torch.corrcoef(torch.stack([x[0], x[0].exp()]))[0, 1].item()
        assert metric.compute()["per_query"][0].item() == pytest.approx(exact)

    def test_other_queries_than_before(self):
        metric = LOOCorrelation()
        metric.update(normal(3, 2), normal(3, 2))
        with pytest.raises(ValueError, match=r"the same Q queries as rows .* got 3 and 4 rows"):
            metric.update(normal(4, 2), normal(4, 2))

    @pytest.mark.ddp
    def test_other_queries_than_another_rank(self):
        def rank_value(rank):
            metric = LOOCorrelation()
            metric.update(normal(2 + rank, 6), normal(2 + rank, 6))
            return metric.compute()

        with pytest.raises(RuntimeError, match="got 2 and 3 rows"):
            run_ddp(rank_value)

    @pytest.mark.ddp
    @pytest.mark.parametrize("removals", [(2, 5), (0, 7)])
    def test_effects_of_all_ranks(self, removals):
        predicted, actual = normal(3, 7), normal(3, 7, seed=1)

        def rank_value(rank):
            metric = LOOCorrelation()
            mine = slice(0, removals[0]) if rank == 0 else slice(removals[0], 7)
            if removals[rank]:
                metric.update(predicted[:, mine], actual[:, mine])
            return metric.effects(), metric.effects(), metric.predicted

        for rank, (once, again, mine) in enumerate(run_ddp(rank_value)):
            for effects in (once, again):
                assert torch.equal(effects[0], predicted)
                assert torch.equal(effects[1], actual)
            assert sum(map(len, mine)) == 3 * removals[rank]  # unsynced again

    @pytest.mark.parametrize("shapes", [((3, 2), (2, 3)), ((3,), (3,)), ((0, 2), (0, 2))])
    def test_shapes(self, shapes):
        with pytest.raises(ValueError, match=r"predicted and actual must have one shape \(Q, B\)"):
            LOOCorrelation().update(*(torch.ones(shape) for shape in shapes))

    def test_constructor(self):
        with pytest.raises(ValueError, match="kind must be 'pearson' or 'spearman', got 'kendall'"):
            LOOCorrelation("kendall")


class TestMislabelDetection:
    @pytest.mark.parametrize(
        ("flipped", "message", "known"),
        [
            ([0, 0, 0], "no label is flipped", {"prevalence", "inspected"}),
            ([1, 1, 1], "all labels are flipped", {"recall", "average_precision", "prevalence", "inspected", "found"}),
        ],
    )
    def test_nothing_to_tell_apart(self, flipped, message, known):
        metric = MislabelDetection()
        metric.update(torch.arange(3.0), torch.tensor(flipped))
        with pytest.warns(UserWarning, match=message):
            value = metric.compute()
        assert {name for name, number in value.items() if number.isfinite().all()} == known

    def test_fraction(self):
        suspicion, flipped = torch.arange(10.0), torch.arange(10) >= 6
        for fraction, recall in ((0.1, 0.25), (0.25, 0.625), (1.0, 1.0)):
            metric = MislabelDetection(fraction)
            metric.update(suspicion, flipped)
            assert metric.compute()["recall"].item() == pytest.approx(recall)

    def test_suspicions_keep_float64(self):
        metric = MislabelDetection().to(torch.bfloat16)
        metric.update(torch.tensor([1 + 1e-12, 1.0], dtype=torch.float64), torch.tensor([True, False]))
        metric.to(torch.float16)
        assert metric.compute()["auc"] == 1

    def test_nothing_seen(self):
        metric = MislabelDetection()
        metric.update(torch.zeros(0), torch.zeros(0))
        with pytest.raises(RuntimeError, match="MislabelDetection has seen no sample on any rank"):
            metric.compute()

    def test_errors(self):
        with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got 0"):
            MislabelDetection(0)
        metric = MislabelDetection()
        with pytest.raises(ValueError, match="suspicion must be finite, got nan"):
            metric.update(torch.tensor([torch.nan]), torch.tensor([True]))
        with pytest.raises(ValueError, match="is_flipped must be True where"):
            metric.update(torch.ones(1), torch.tensor([2]))


class TestFigures:
    @pytest.fixture(autouse=True)
    def _close(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        yield
        plt.close("all")

    def detection(self, noise=0.0):
        metric, flipped = MislabelDetection(), torch.arange(40) % 4 == 0
        metric.update(flipped + noise * normal(40), flipped)
        return metric

    def labels(self, axes):
        return [text.get_text() for text in axes.get_legend().get_texts()]

    def test_detection_over_random_and_perfect_order(self):
        _, axes = self.detection().plot(label="self-influence")
        curve, perfect, random = axes.lines
        assert self.labels(axes) == ["self-influence (AUC 1.000)", "perfect order", "random order"]
        assert curve.get_xydata().tolist() == [[0, 0], [0.25, 1], [1, 1]]
        assert perfect.get_xydata().tolist() == curve.get_xydata().tolist()
        assert random.get_xydata().tolist() == [[0, 0], [1, 1]]

    def test_several_detections_in_one_axes(self):
        import matplotlib.pyplot as plt

        values = {"influence": self.detection().compute(), "loss": self.detection(0.5).compute()}
        _, together = self.detection().plot(values)
        figure, given = plt.subplots()
        for name, value in values.items():
            assert self.detection().plot(value, ax=given, label=name) == (figure, given)
        for axes in (together, given):
            curves = [line for line in axes.lines if "AUC" in line.get_label()]
            assert len({line.get_color() for line in curves}) == len(curves) == 2
            assert len(axes.lines) == 4  # random and perfect order once
        assert self.labels(together) == self.labels(given)
        assert self.labels(given)[2:] == ["perfect order", "random order"]

    def test_no_detection_to_draw(self):
        metric = MislabelDetection()
        metric.update(torch.arange(3.0), torch.zeros(3))
        with (
            pytest.warns(UserWarning, match="no label is flipped"),
            pytest.raises(ValueError, match="'found' has no curve to draw: no label is flipped"),
        ):
            metric.plot()
        with pytest.raises(ValueError, match="at least one computed value"):
            metric.plot({})

    def removals(self, slope):
        metric, predicted = LOOCorrelation(), normal(3, 9)
        metric.update(predicted, slope * predicted)
        return metric, predicted

    def test_effects_of_the_mean_query_and_of_one(self):
        import matplotlib.pyplot as plt

        figure, given = plt.subplots()
        for slope, name in ((2.0, "cold"), (-1.0, "warm")):
            metric, predicted = self.removals(slope)
            assert metric.plot(ax=given, label=name) == (figure, given)
        cold, warm = given.collections
        mean = predicted.mean(0)
        torch.testing.assert_close(torch.tensor(cold.get_offsets().tolist()).double(), torch.stack([mean, 2 * mean], 1))
        assert warm.get_offsets()[:, 1].tolist() == pytest.approx((-mean).tolist())
        assert self.labels(given) == ["cold, mean r = 1.000", "warm, mean r = -1.000", "equal"]
        _, axes = metric.plot(query=1)
        assert axes.collections[0].get_offsets()[:, 0].tolist() == pytest.approx(predicted[1].tolist())
        assert (self.labels(axes), axes.get_title()) == (["r = -1.000", "equal"], "query 1")

    @pytest.mark.parametrize(("kind", "symbol"), [("pearson", "r"), ("spearman", "\u03c1")])
    def test_the_figure_has_the_number_that_compute_gives(self, kind, symbol):
        metric = LOOCorrelation(kind)
        metric.update(normal(3, 9), normal(3, 9).exp())
        _, axes = metric.plot()
        found = metric.compute()
        assert self.labels(axes)[0] == f"mean {symbol} = {found['correlation']:.3f}"
        assert axes.get_title() == "mean over 3 queries"
        _, axes = metric.plot(query=2)
        assert self.labels(axes)[0] == f"{symbol} = {found['per_query'][2]:.3f}"

    def test_an_effect_far_out_does_not_flatten_the_others(self):
        metric, actual = LOOCorrelation(), torch.arange(10.0)[None] - 4
        actual[0, 3] = -1e31
        metric.update(torch.arange(10.0)[None], actual)
        _, axes = metric.plot()
        drawn = axes.collections[0].get_offsets()[:, 1].tolist()
        assert drawn.pop(3) == pytest.approx(-6.0)  # a fifth beyond the largest of the others
        assert drawn == [-4, -3, -2, 0, 1, 2, 3, 4, 5]
        assert "(1 far out, at edge)" in self.labels(axes)[0]

    def overlap(self):
        metric = TopKOverlap(k=1)
        metric.update(torch.eye(4), torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).float())
        return metric

    def subsets(self):
        masks = torch.eye(6).bool()
        metric = LinearDatamodelingScore(masks)
        metric.update(normal(1, 6), normal(6, 1))
        return metric

    def test_means_over_queries_side_by_side(self):
        import matplotlib.pyplot as plt

        figure, given = plt.subplots()
        assert self.overlap().plot(ax=given, label="EK-FAC") == (figure, given)
        value = {"overlap": torch.tensor(0.25), "standard_error": torch.tensor(0.1)}
        assert self.overlap().plot(value, ax=given) == (figure, given)
        assert [label.get_text() for label in given.get_xticklabels()] == ["EK-FAC", "TopKOverlap"]
        first, second = given.containers
        (point, _, (bar,)), mean = first, self.overlap().compute()
        assert point.get_xydata().tolist() == [[0, 0.75]]
        low, high = bar.get_segments()[0][:, 1]
        assert ((low + high) / 2, (high - low) / 2) == pytest.approx((0.75, mean["standard_error"].item()))
        assert second[0].get_xydata()[0].tolist() == pytest.approx([1, 0.25])
        assert given.get_ylim() == (0, 1)

    def test_the_mean_of_one_query_has_no_error(self):
        with pytest.warns(UserWarning, match="standard_error"):
            _, axes = self.subsets().plot()
        assert not axes.containers[0].has_yerr
        assert axes.get_ylabel().startswith("lds")
        assert axes.get_ylim() == (-1, 1)

    @pytest.mark.parametrize(
        "metric", [lambda self: self.detection(), lambda self: self.removals(1.0)[0], lambda self: self.overlap()]
    )
    def test_without_matplotlib_the_error_has_the_pip_line(self, metric, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            metric(self).plot()
