"""Scores in pieces: order, repetitions, and the extremes against a plain sort."""

import pytest
import torch

from lightning_ext.functional import keep_largest, ordered_scores


def plain(values, indices, k):
    """Row by row with dicts and tuples."""
    rows = []
    for row, names in zip(values.tolist(), indices.tolist(), strict=True):
        best = {}
        for value, name in zip(row, names, strict=True):
            best[name] = max(value, best.get(name, value))
        ranked = sorted((-value, name) for name, value in best.items())[:k]
        ranked += [(float("inf"), -1)] * (k - len(ranked))
        rows.append(ranked)
    negated, names = torch.tensor(rows).double().unbind(-1)
    return -negated, names.long()


def draw(seed, columns=40, names=25):
    """Rounded scores, so that many are equal; a sample that comes again has its score again."""
    generator = torch.Generator().manual_seed(seed)
    of_name = torch.randint(-4, 5, (3, names), generator=generator).double()
    indices = torch.randint(0, names, (3, columns), generator=generator)
    return of_name.gather(1, indices), indices


class TestKeepLargest:
    @pytest.mark.parametrize("k", [1, 4, 20, 60])
    @pytest.mark.parametrize("seed", range(5))
    def test_against_plain_python(self, seed, k):
        values, indices = draw(seed)
        ours, theirs = keep_largest(values, indices, k), plain(values, indices, k)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])

    @pytest.mark.parametrize("seed", range(5))
    def test_cutting_first_changes_nothing(self, seed):
        values, indices = draw(seed)
        parts = [keep_largest(values[:, a:b], indices[:, a:b], 6) for a, b in ((27, 40), (0, 3), (3, 27))]
        merged = keep_largest(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)), 6)
        assert all(map(torch.equal, merged, keep_largest(values, indices, 6)))

    def test_rounding_is_forgiven_and_the_larger_counts(self):
        values, indices = torch.tensor([[2.0, 3.0, 2.00001, 2.000005]]), torch.tensor([[5, 1, 5, 3]])
        ours = keep_largest(values, indices, 3)
        assert ours[0].tolist() == [[3.0, values[0, 2].item(), values[0, 3].item()]]
        assert ours[1].tolist() == [[1, 5, 3]]

    def test_inputs_are_left_alone(self):
        values, indices = torch.tensor([[1.0, 1.0]]), torch.tensor([[5, 5]])
        keep_largest(values, indices, 2)
        assert values.tolist() == [[1.0, 1.0]]
        assert indices.tolist() == [[5, 5]]

    def test_one_sample_with_two_scores(self):
        with pytest.raises(ValueError, match=r"sample 5 more than once with different scores, 2 and 1\. Score each"):
            keep_largest(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[5, 1, 5]]), 2)


class TestOrderedScores:
    def test_order_and_repetitions(self):
        scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [30.0, 10.0, 30.0, 20.0]])
        ordered, indices = ordered_scores(scores, torch.tensor([9, 0, 9, 4]))
        assert ordered.tolist() == [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
        assert indices.tolist() == [0, 4, 9]

    def test_nothing(self):
        scores, indices = ordered_scores(torch.zeros(2, 0), torch.zeros(0, dtype=torch.long))
        assert (scores.shape, indices.shape) == ((2, 0), (0,))

    def test_rounding_is_measured_by_the_largest_score_of_the_query(self):
        indices = torch.tensor([0, 1, 1])
        ordered, _ = ordered_scores(torch.tensor([[1.0, 1e-6, 2e-6]]), indices)
        assert ordered.shape == (1, 2)
        with pytest.raises(ValueError, match=r"sample 1 more than once .* 1e-06 and 2e-06"):
            ordered_scores(torch.tensor([[1.0, 0.5, 0.5], [1e-6, 1e-6, 2e-6]]), indices)

    def test_half_precision_rounds_more(self):
        scores = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
        assert ordered_scores(scores, torch.tensor([3, 3]))[0].shape == (1, 1)
