"""Scores of training samples on queries, collected from batches and ranks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ext.functional.influence_quality import check_finite
from lightning_ext.functional.influence_ranking import keep_largest, ordered_scores
from lightning_ext.metrics._precise import ConcatenatingMetric
from lightning_ext.metrics.influence_plot import plot_extremes

__all__ = ["InfluenceScores"]


class InfluenceScores(ConcatenatingMetric):
    r"""Influence scores of training samples, put in order of the samples, or only the most helpful and most harmful.

    Scores are removal effects :math:`\tau_{qz}`: the change of measurement q when training sample z is removed,
    positive for a helpful sample where the measurement is a loss.

    ``update(scores, indices)`` takes

    - ``scores``: ``(Q, B)``, finite;
    - ``indices``: ``(B,)``, the place of each column's sample in the training set, integers from 0.

    ``compute()`` returns a dict of tensors. Without ``topk``:

    - ``scores``: ``(Q, N)``, columns by ascending index, each sample once;
    - ``indices``: ``(N,)``, int64, the samples that were seen.

    With ``topk``, and :math:`k' = \min(k, N)` where fewer samples were seen:

    - ``helpful_values``, ``helpful_indices``: ``(Q, k')``, the largest scores, descending;
    - ``harmful_values``, ``harmful_indices``: ``(Q, k')``, the smallest scores, ascending. Of equal scores, those of
      lower index come first. Nothing is said about signs: with few harmful samples, the last ones may be helpful.

    Samples that a distributed sampler repeats count once.

    Args:
        num_queries: Q, at least 1.
        topk: Keep this many samples at either end of each query's ranking; at least 1. Default: keep all scores.
        dtype: Of the scores that are kept without ``topk``; the two ends are always kept in float64.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input, and for a sample that comes back with another score: from
            ``compute``, or with ``topk`` from the update that brings it, as long as the sample is among those kept.
        RuntimeError: From ``compute`` when no rank saw a sample.

    Source: Koh and Liang 2017 (arXiv 1703.04730); sign and scale as in Bae et al. 2022 (arXiv 2209.05364).

    Note:
        Memory: with ``topk`` 32 Q k bytes, whatever the size of the training set; without, 4 Q + 8 bytes per sample in
        float32, on every rank at ``compute``. The results do not depend on the order of samples, batches or ranks.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import InfluenceScores
        >>> metric = InfluenceScores(num_queries=1, topk=1)
        >>> metric.update(torch.tensor([[0.5, -2.0]]), torch.tensor([7, 3]))
        >>> metric.update(torch.tensor([[1.5, -2.0]]), torch.tensor([4, 3]))
        >>> value = metric.compute()
        >>> value["helpful_indices"].item(), value["harmful_indices"].item(), value["harmful_values"].item()
        (4, 3, -2.0)
    """

    higher_is_better: bool | None = None

    kept: Tensor

    def __init__(
        self,
        num_queries: int,
        topk: int | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}.")
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be at least 1, or None to keep all scores, got {topk}.")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
        self.num_queries, self.topk = num_queries, topk
        if topk is None:
            self.add_pieces("scores", getattr(torch, dtype))
            self.add_pieces("indices", torch.long)
        else:  # (end, query, place, value or index); harmful values are negated, so that both ends are maxima
            kept = self.float_state(2, num_queries, topk, 2) - 1
            kept[..., 0] = -torch.inf
            self.add_state("kept", kept, dist_reduce_fx=_merge_kept)

    def update(self, scores: Tensor, indices: Tensor) -> None:
        """Add the scores of some training samples; see the class for the arguments."""
        check_scores(scores, indices, self.num_queries)
        if self.topk is None:
            self.append(scores=scores.mT, indices=indices)
        else:
            self._keep(scores.detach(), indices)

    def compute(self) -> dict[str, Tensor]:
        """What was seen so far, over all ranks; see the class for the keys."""
        value = self._everything() if self.topk is None else self._extremes()
        if value[next(iter(value))].shape[1] == 0:
            raise RuntimeError("InfluenceScores has seen no sample on any rank; call update before compute.")
        return value

    @staticmethod
    def gather(predictions: Iterable[Mapping[str, Tensor]] | None, num_samples: int | None = None) -> Tensor:
        """The score matrix from what ``trainer.predict`` returned.

        Under several ranks ``trainer.predict`` returns each rank its own share. All shares are gathered, so call this
        on every rank; every rank gets the whole matrix. Strategies that fork or spawn their processes return rank 0's
        share alone, which is refused as incomplete.

        Args:
            predictions: Dicts with ``scores`` ``(Q, B)`` and ``indices`` ``(B,)``, one per batch.
            num_samples: N. Default: ``num_samples`` of the dicts, or one more than the largest index.

        Returns:
            ``(Q, N)``, column i for training sample i, on the CPU.

        Raises:
            ValueError: Entries of another form, samples without a score, or one sample with two different scores.

        Example:
            >>> first = {"scores": torch.tensor([[0.3, 0.1]]), "indices": torch.tensor([2, 0])}
            >>> second = {"scores": torch.tensor([[0.2]]), "indices": torch.tensor([1])}
            >>> InfluenceScores.gather([first, second])
            tensor([[0.1000, 0.2000, 0.3000]])
        """
        if predictions is None:
            raise ValueError(
                "predictions is None, as trainer.predict returns with return_predictions=False, without a batch, and "
                "from processes that it forks or spawns. Give InfluenceModule an output_dir and read the table there."
            )
        predictions = list(predictions)
        if num_samples is None:
            told = [entry for entry in predictions if isinstance(entry, Mapping) and "num_samples" in entry]
            num_samples = int(told[0]["num_samples"]) if told else None
        pieces = _all_ranks([_piece(entry, place) for place, entry in enumerate(predictions)])
        if not pieces:
            raise ValueError("predictions is empty; pass what trainer.predict(module, train_loader) returned.")
        for scores, indices in pieces:
            check_scores(scores, indices, len(pieces[0][0]))
        scores, indices = ordered_scores(*(torch.cat(part, dim=-1) for part in zip(*pieces, strict=True)))
        largest = int(indices[-1]) if len(indices) else -1
        count = largest + 1 if num_samples is None else num_samples
        if largest >= count:
            raise ValueError(f"predictions holds sample {largest}, but num_samples is {count}, so indices end before.")
        absent = torch.ones(count, dtype=torch.bool).index_fill(0, indices, False).nonzero()[:, 0].tolist()
        if absent:
            raise ValueError(
                f"predictions has no scores of {len(absent)} of {count} samples, the first of them {absent[:5]}. Score "
                "the whole training set, with a loader that neither drops samples nor limits batches; on several "
                "ranks, with a strategy that neither forks nor spawns, and call gather on each."
            )
        return scores

    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Any = None, query: int = 0, count: int = 10
    ) -> tuple[Any, Any]:
        """Draw the most helpful and the most harmful training samples of one query as bars.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            query: The row to draw.
            count: At most this many samples at either end.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value: Mapping[str, Tensor] = self.compute() if val is None else val
        if not 0 <= query < self.num_queries:
            raise ValueError(f"query must lie in [0, {self.num_queries - 1}], got {query}.")
        if "scores" in value:  # torchmetrics drops the dimensions of a single number, hence reshape
            row = value["scores"].reshape(self.num_queries, -1)[query]
            return plot_extremes(_ends(row, value["indices"].reshape(-1), count), query, ax)
        return plot_extremes({n: v.reshape(self.num_queries, -1)[query, :count] for n, v in value.items()}, query, ax)

    def _keep(self, scores: Tensor, indices: Tensor) -> None:
        if self.kept.dtype == torch.float32 and bool((indices >= 2**24).any()):
            raise ValueError(f"indices must stay below 2**24 on {self.device}, which has no float64 to hold them.")
        both = torch.stack([scores, -scores]).to(self.kept.dtype)
        useful = (both >= self.kept[..., -1:, 0]).any(dim=0).any(dim=0)  # the rest cannot enter for any query
        both, columns = both[..., useful], indices[useful].to(self.kept.dtype)
        self.kept = _merge([self.kept, torch.stack([both, columns.expand_as(both)], dim=-1)], self.kept.shape[2])

    def _everything(self) -> dict[str, Tensor]:
        scores, indices = ordered_scores(self.joined("scores").reshape(-1, self.num_queries).mT, self.joined("indices"))
        return {"scores": scores, "indices": indices}

    def _extremes(self) -> dict[str, Tensor]:
        found = int((self.kept[0, 0, :, 1] >= 0).sum())
        (helpful, harmful), (best, worst) = self.kept[..., :found, 0], self.kept[..., :found, 1].long()
        return _named_ends(helpful, best, -harmful, worst)


def check_scores(scores: Tensor, indices: Tensor, num_queries: int) -> None:
    """Raise a ValueError that names what is wrong with scores ``(num_queries, B)`` and indices ``(B,)``."""
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers (B,), got {indices.dtype} of shape {tuple(indices.shape)}.")
    if scores.shape != (num_queries, len(indices)) or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floats {(num_queries, len(indices))}, a row per query and a column per entry of indices, "
            f"got {scores.dtype} of shape {tuple(scores.shape)}."
        )
    if bool((indices < 0).any()):
        raise ValueError(f"indices must be places in the training set, from 0, got {indices.min().item()}.")
    check_finite(scores=scores)


def _piece(entry: Any, place: int) -> tuple[Tensor, Tensor]:
    if not isinstance(entry, Mapping) or not {"scores", "indices"} <= entry.keys():
        told = f"a dict of {sorted(entry)}" if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
        raise ValueError(
            "predictions must be a list of dicts with 'scores' and 'indices', as trainer.predict returns for one "
            f"loader of training samples; entry {place} is {told}."
        )
    return entry["scores"].detach().cpu(), entry["indices"].detach().cpu()


def _all_ranks(pieces: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The pieces of all ranks; as objects, since a rank may have none and the back end may refuse tensors of a CPU."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return pieces
    shares: list[Sequence[tuple[Tensor, Tensor]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, pieces)
    return [piece for share in shares for piece in share]


def _ends(scores: Tensor, indices: Tensor, k: int) -> dict[str, Tensor]:
    k = min(k, scores.shape[-1])
    helpful, best = keep_largest(scores, indices, k)
    harmful, worst = keep_largest(-scores, indices, k)
    return _named_ends(helpful, best, -harmful, worst)


def _named_ends(helpful: Tensor, best: Tensor, harmful: Tensor, worst: Tensor) -> dict[str, Tensor]:
    return {
        "helpful_values": helpful,
        "helpful_indices": best,
        "harmful_values": harmful,
        "harmful_indices": worst,
    }


def _merge(parts: Sequence[Tensor], k: int) -> Tensor:
    values, indices = torch.cat(list(parts), dim=2).unbind(-1)
    return torch.stack(keep_largest(values, indices, k), dim=-1)


def _merge_kept(parts: Tensor) -> Tensor:
    return _merge(list(parts), parts.shape[3])
