"""InfluenceScores: whole matrices, the two ends in bounded memory, and what trainer.predict returned."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import LightningModule
from lightning_ext.metrics import InfluenceScores
from lightning_ext.testing import run_ddp
from tests.conformance.entry import new_trainer

QUERIES, SAMPLES = 5, 300


def draw(seed=0):
    """A score matrix with ties, and the samples cut into batches in random order, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(QUERIES, SAMPLES, generator=generator).round(decimals=1)
    order = torch.randperm(SAMPLES, generator=generator)
    return scores, torch.cat([order, order[:40]]).split(47)


def updated(metric, scores, batches):
    for indices in batches:
        metric.update(scores[:, indices], indices)
    return metric


def ends(scores, k):
    """By a stable sort, which leaves equal scores in the order of their samples."""
    helpful, best = scores.sort(dim=1, descending=True, stable=True)
    harmful, worst = scores.sort(dim=1, stable=True)
    columns = helpful[:, :k].double(), best[:, :k], harmful[:, :k].double(), worst[:, :k]
    return dict(zip(("helpful_values", "helpful_indices", "harmful_values", "harmful_indices"), columns, strict=True))


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=0)


class TestMatrix:
    def test_columns_in_order_of_the_samples(self):
        scores, batches = draw()
        value = updated(InfluenceScores(QUERIES), scores, batches).compute()
        assert_equal(value, {"scores": scores, "indices": torch.arange(SAMPLES)})

    def test_a_part_of_the_training_set(self):
        scores, batches = draw()
        value = updated(InfluenceScores(QUERIES), scores, batches[:2]).compute()
        seen = torch.cat(batches[:2]).sort().values
        assert_equal(value, {"scores": scores[:, seen], "indices": seen})

    def test_precision(self):
        fine = torch.tensor([[1 + 1e-12]], dtype=torch.float64)
        metric = InfluenceScores(1, dtype="float64")
        metric.update(fine, torch.tensor([0]))
        metric.to(torch.bfloat16)
        assert metric.compute()["scores"].item() == fine.item()
        single = InfluenceScores(1)
        single.update(fine, torch.tensor([0]))
        single.to("cpu")
        assert single.compute()["scores"].dtype == torch.float32

    def test_pieces_are_copies(self):
        metric, scores, indices = InfluenceScores(2), torch.ones(2, 1), torch.tensor([0])
        metric.update(scores, indices)
        scores.fill_(7)
        indices.fill_(7)
        assert metric.compute()["scores"].tolist() == [[1.0], [1.0]]
        assert metric.compute()["indices"].item() == 0

    def test_a_sample_with_two_scores(self):
        metric = InfluenceScores(1)
        metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([3, 4]))
        metric.update(torch.tensor([[2.5]]), torch.tensor([4]))
        with pytest.raises(ValueError, match=r"sample 4 more than once with different scores, 2 and 2\.5\."):
            metric.compute()


class TestEnds:
    @pytest.mark.parametrize("k", [1, 7, SAMPLES - 1])
    def test_against_a_sort_of_everything(self, k):
        scores, batches = draw()
        assert_equal(updated(InfluenceScores(QUERIES, topk=k), scores, batches).compute(), ends(scores, k))

    def test_fewer_samples_than_asked_for(self):
        scores = draw()[0][:, :4]
        metric = updated(InfluenceScores(QUERIES, topk=10), scores, [torch.tensor([3, 1, 3]), torch.tensor([0, 2])])
        assert_equal(metric.compute(), ends(scores, 4))

    def test_memory_does_not_grow_and_is_what_the_documentation_says(self):
        scores, batches = draw()
        metric = InfluenceScores(QUERIES, topk=3)
        for seen in range(len(batches)):
            updated(metric, scores, batches[seen : seen + 1])
            assert sum(state.nbytes for state in metric.metric_state.values()) == 32 * QUERIES * 3
            assert len(pickle.dumps(metric)) < 6000

    def test_large_indices_and_half_precision_scores(self):
        metric = InfluenceScores(1, topk=1).to(torch.float16)
        metric.update(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), torch.tensor([5, 2**40 + 1]))
        assert metric.compute()["helpful_indices"].item() == 2**40 + 1

    def test_a_device_without_float64_refuses_indices_that_it_would_round(self, monkeypatch):
        monkeypatch.setattr("lightning_ext.metrics._precise.widest_float", lambda device: torch.float32)
        metric = InfluenceScores(1, topk=1)
        metric.update(torch.ones(1, 1), torch.tensor([2**24 - 1]))
        with pytest.raises(ValueError, match=r"indices must stay below 2\*\*24 on cpu"):
            metric.update(torch.ones(1, 1), torch.tensor([2**24 + 1]))

    def test_a_sample_with_two_scores(self):
        metric = InfluenceScores(1, topk=2)
        metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([3, 4]))
        with pytest.raises(ValueError, match=r"sample 4 more than once with different scores"):
            metric.update(torch.tensor([[2.5]]), torch.tensor([4]))

    @pytest.mark.ddp
    @pytest.mark.parametrize("share", [(3, 8), (0, 8), (8, 8)])
    def test_ranks_with_repeated_samples_agree(self, share):
        scores, batches = draw()
        shares = batches[: share[0]], batches[share[0] :] + batches[: share[0]][:1]

        def rank_value(rank):
            metric = InfluenceScores(QUERIES, topk=6)
            return updated(metric, scores, shares[rank]).compute()

        for value in run_ddp(rank_value):
            assert_equal(value, ends(scores, 6))


class TestGather:
    def predictions(self, scores, batches):
        return [{"scores": scores[:, indices], "indices": indices} for indices in batches]

    def test_matrix(self):
        scores, batches = draw()
        scores = scores.double()
        assert torch.equal(InfluenceScores.gather(self.predictions(scores, batches)), scores)
        assert torch.equal(InfluenceScores.gather(iter(self.predictions(scores, batches)), SAMPLES), scores)

    def test_what_a_trainer_returns(self):
        scores, _ = draw()

        class Scorer(LightningModule):
            def predict_step(self, batch, batch_idx):
                return {"scores": scores[:, batch[0]], "indices": batch[0]}

        loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=64)
        predictions = new_trainer(limit_predict_batches=1.0).predict(Scorer(), loader)
        assert torch.equal(InfluenceScores.gather(predictions), scores)

    @pytest.mark.ddp
    @pytest.mark.parametrize("cut", [4, 8])
    def test_every_rank_gets_the_shares_of_all(self, cut):
        scores, batches = draw()
        shares = self.predictions(scores, batches[:cut]), self.predictions(scores, batches[cut:])
        for matrix in run_ddp(lambda rank: InfluenceScores.gather(shares[rank])):
            assert torch.equal(matrix, scores)

    @pytest.mark.parametrize(
        ("indices", "num_samples", "message"),
        [
            ([0, 2, 5], None, r"no scores of 3 of 6 samples, the first of them \[1, 3, 4\]"),
            ([0, 1, 2], 5, r"no scores of 2 of 5 samples, the first of them \[3, 4\]\. Score the whole training set"),
            ([0, 1, 2], 2, "holds sample 2, but num_samples is 2"),
            ([0, 1, 1], None, "sample 1 more than once with different scores, 2 and 3"),
            ([0, 1, -1], None, "indices must be places in the training set, from 0, got -1"),
        ],
    )
    def test_ids(self, indices, num_samples, message):
        prediction = {"scores": torch.tensor([[1.0, 2.0, 3.0]]), "indices": torch.tensor(indices)}
        with pytest.raises(ValueError, match=message):
            InfluenceScores.gather([prediction], num_samples)

    @pytest.mark.parametrize(
        ("predictions", "message"),
        [
            ([], "predictions is empty; pass what trainer.predict"),
            ([[{"scores": torch.ones(1, 1)}]], "entry 0 is a list"),
            ([{"scores": torch.ones(1, 1)}], r"entry 0 is a dict of \['scores'\]"),
            (
                [{"scores": torch.ones(n, 1), "indices": torch.tensor([n])} for n in (1, 2)],
                r"scores must be floats \(1, 1\), .* got torch.float32 of shape \(2, 1\)",
            ),
            ([{"scores": torch.tensor([[torch.nan]]), "indices": torch.tensor([0])}], "scores must be finite, got nan"),
        ],
    )
    def test_other_forms(self, predictions, message):
        with pytest.raises(ValueError, match=message):
            InfluenceScores.gather(predictions)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
            ({"topk": 0}, "topk must be at least 1, or None to keep all scores, got 0"),
            ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'"),
        ],
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            InfluenceScores(**{"num_queries": 2, **arguments})

    @pytest.mark.parametrize("topk", [None, 2])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scores": torch.ones(3, 2)}, r"scores must be floats \(2, 3\), a row per query .* of shape \(3, 2\)"),
            ({"scores": torch.ones(2, 3).long()}, "scores must be floats .* got torch.int64"),
            ({"scores": torch.full((2, 3), torch.nan)}, r"scores must be finite, got nan at \(0, 0\), one of 6"),
            ({"indices": torch.ones(3)}, r"indices must be integers \(B,\), got torch.float32 of shape \(3,\)"),
            ({"indices": torch.ones(3).bool()}, "indices must be integers .* got torch.bool"),
            ({"indices": torch.arange(3)[None]}, r"indices must be integers \(B,\), got torch.int64 of shape \(1, 3\)"),
            ({"indices": torch.tensor([0, -2, 1])}, "from 0, got -2"),
        ],
    )
    def test_update(self, topk, change, message):
        with pytest.raises(ValueError, match=message):
            InfluenceScores(2, topk).update(**{"scores": torch.ones(2, 3), "indices": torch.arange(3), **change})

    @pytest.mark.parametrize("topk", [None, 2])
    def test_nothing_seen(self, topk):
        metric = InfluenceScores(2, topk)
        metric.update(torch.ones(2, 0), torch.zeros(0, dtype=torch.long))
        with pytest.raises(RuntimeError, match="InfluenceScores has seen no sample on any rank; call update"):
            metric.compute()


class TestPlot:
    @pytest.fixture(autouse=True)
    def _close(self):
        plt = pytest.importorskip("matplotlib.pyplot")
        yield
        plt.close("all")

    @pytest.mark.parametrize("topk", [None, 5])
    def test_bars_of_both_ends(self, topk):
        from matplotlib.colors import to_rgba

        scores, batches = draw()
        metric = updated(InfluenceScores(QUERIES, topk), scores, batches)
        _, axes = metric.plot(query=2, count=3)
        expected = ends(scores[2:3], 3)
        names = [*expected["helpful_indices"][0].tolist(), *expected["harmful_indices"][0].flip(0).tolist()]
        values = [*expected["helpful_values"][0].tolist(), *expected["harmful_values"][0].flip(0).tolist()]
        assert [text.get_text() for text in axes.get_yticklabels()] == [str(name) for name in names]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(values)
        assert axes.yaxis_inverted()
        assert axes.get_title() == "measurement of query 2"
        told = zip(axes.get_legend().get_texts(), axes.get_lines(), strict=False)
        colours = {text.get_text().split()[0]: line.get_color() for text, line in told}
        assert {bar.get_facecolor() for bar in axes.patches if bar.get_width() > 0} == {to_rgba(colours["rises"])}
        assert {bar.get_facecolor() for bar in axes.patches if bar.get_width() < 0} == {to_rgba(colours["falls"])}

    def test_few_samples_stand_once_and_given_axes_are_used(self):
        import matplotlib.pyplot as plt

        metric = InfluenceScores(1)
        metric.update(torch.tensor([[3.0, -1.0]]), torch.tensor([8, 2]))
        figure, given = plt.subplots()
        assert metric.plot(metric.compute(), ax=given) == (figure, given)
        assert [bar.get_width() for bar in given.patches] == [3.0, -1.0]

    @pytest.mark.parametrize("topk", [None, 1])
    def test_a_single_number(self, topk):
        metric = InfluenceScores(1, topk)
        metric.update(torch.tensor([[3.0]]), torch.tensor([8]))
        _, axes = metric.plot()
        assert [bar.get_width() for bar in axes.patches] == [3.0]

    def test_no_such_query(self):
        with pytest.raises(ValueError, match=r"query must lie in \[0, 4\], got 5"):
            updated(InfluenceScores(QUERIES), *draw()).plot(query=5)

    def test_without_matplotlib_the_error_has_the_pip_line(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[plot\]'"):
            updated(InfluenceScores(QUERIES), *draw()).plot()


def test_gather_misses_the_tail_of_what_predict_scored():
    entry = {"scores": torch.ones(2, 3), "indices": torch.arange(3), "num_samples": torch.tensor(5)}
    with pytest.raises(ValueError, match=r"no scores of 2 of 5 samples, the first of them \[3, 4\]"):
        InfluenceScores.gather([entry])


def test_gather_says_where_results_of_forked_processes_are():
    with pytest.raises(ValueError, match=r"predictions is None.*output_dir"):
        InfluenceScores.gather(None)
