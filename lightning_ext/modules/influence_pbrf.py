"""The proximal Bregman response: the question that damped Gauss-Newton influence answers."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_ext.functional import InfluenceObjective
from lightning_ext.modules._influence_removal import Groups
from lightning_ext.modules.influence_response import OptimizerChoice, ResponseModule

__all__ = ["PBRFModule"]


class PBRFModule(ResponseModule):
    r"""The proximal Bregman response to the removal of samples: what damped Gauss-Newton influence estimates.

    .. math:: \theta_{pbrf} = \arg\min_\theta \frac1N \sum_{i=1}^N D_L\bigl(f(\theta, x_i), f(\theta^s, x_i)\bigr)
        - \frac1N \sum_{z \in S} L\bigl(f(\theta, x_z), t_z\bigr)
        + \frac{\lambda + w}2 \lVert \theta - \theta^s \rVert^2

    Remove S, but keep the predictions on the training set and the weights near the trained ones. :math:`D_L` is the
    Bregman divergence of the loss in the outputs: for softmax cross-entropy :math:`\mathrm{KL}(p_{\theta^s} \Vert
    p_\theta)`, for half the squared error half the squared distance. Many copies at once, see :class:`ResponseModule`.

    Args:
        base: the trained network.
        objective: see :class:`ResponseModule`.
        remove: for each copy one position in the training data set, or a list of them.
        damping: :math:`\lambda \ge 0`; ``damping + weight_decay`` must be positive.
        weight_decay: L2 coefficient w of the training objective; its own divergence adds it to the damping.
        optimizer: ``"adam"``, on full batches or minibatches; ``"newton"`` takes a few steps on one full batch; or as
            in :class:`ResponseModule`.
        lr: of Adam.
        schedule: ``"cosine"`` to 0, or ``"constant"``.
        tolerance: relative norm of the gradient at which training stops; a warning says if it was not reached.
        check_every_n_epochs: see :class:`ResponseModule`.
        include: see :class:`ResponseModule`.
        dataset: see :class:`ResponseModule`.
        chunk_size: see :class:`ResponseModule`.

    Logs ``pbrf/loss`` (at the start minus the removed samples' share of the mean loss, then less), ``pbrf/bregman``,
    ``pbrf/prox``, ``pbrf/removed_loss`` and ``pbrf/grad_rel``. Warns if the loss of removed samples rises more than
    tenfold.

    Raises:
        ValueError: no damping; a loss that is not convex in the outputs; and as :class:`ResponseModule`.

    Source: Bae et al. 2022, arXiv 2209.05364 (the proximal Bregman objective); Grosse et al. 2023, arXiv 2308.03296,
    section 2.1.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lightning_ext._lightning import Trainer
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> base = nn.Linear(1, 1, bias=False)
    >>> _ = base.weight.data.fill_(1.0)
    >>> data = TensorDataset(x, torch.zeros(2, 1))
    >>> settings = {"damping": 0.5, "optimizer": "newton", "tolerance": 1e-4}
    >>> pbrf = PBRFModule(base, InfluenceObjective("half_squared_error"), remove=[1], **settings)
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    >>> trainer = Trainer(accelerator="cpu", max_epochs=30, enable_model_summary=False, **quiet)
    >>> trainer.fit(pbrf, DataLoader(data, batch_size=2))
    >>> round(pbrf.response().item(), 2)  # gradient 4/2 over what curvature stays, 1/2, and damping
    2.0
    """

    def __init__(
        self,
        base: nn.Module,
        objective: InfluenceObjective | None = None,
        remove: Groups | Tensor | None = None,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        optimizer: OptimizerChoice = "adam",
        lr: float = 1e-3,
        schedule: Literal["constant", "cosine"] = "cosine",
        tolerance: float | None = 1e-2,
        check_every_n_epochs: int = 10,
        include: str | None = None,
        dataset: Dataset[Any] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(
            base,
            objective,
            "pbrf",
            remove,
            damping=damping,
            weight_decay=weight_decay,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            tolerance=tolerance,
            check_every_n_epochs=check_every_n_epochs,
            include=include,
            dataset=dataset,
            chunk_size=chunk_size,
        )
