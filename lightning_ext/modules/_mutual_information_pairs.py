"""What modules that learn from pairs (x, z) share: batches, noise, an optimizer, and metrics of an evaluation."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_ext.functional import DiagonalGaussian, seeded_draws
from lightning_ext.modules.mrvae_noise import AddressedNoise

MakeOptimizer = Callable[[Any], Optimizer]
LogDensity = Callable[[Tensor], Tensor]

standard_normal = DiagonalGaussian(0.0, 1.0)


def log_prior_of(prior: Distribution | None) -> LogDensity:
    """The density (B, d) to (B,) of a distribution over latents; the standard normal one where there is none."""
    if prior is None:
        return standard_normal
    if not isinstance(prior, Distribution):
        raise ValueError(
            f"prior must be a torch.distributions.Distribution over latents, or None; got {type(prior).__name__}."
        )

    def density(z: Tensor) -> Tensor:
        found: Tensor = prior.log_prob(z)
        return found if found.ndim < z.ndim else found.sum(-1)

    return density


class PairModule(AddressedNoise):
    """A LightningModule of pairs; see those that are public.

    Subclasses implement ``loss`` and ``measure``, and name their metrics in ``bounds``.
    """

    def __init__(self, optimizer: MakeOptimizer, seed: int | None, bounds: Mapping[str, Metric]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.bounds = nn.ModuleDict(dict(bounds))
        self._seed, self._seed_was_given = seed, seed is not None

    # -- what a subclass of yours may override ------------------------------------------------------------------------

    def get_pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Data ``(B, *event)`` and latents ``(B, d)`` of a batch ``(x, z)``; override for other batches."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
            raise ValueError(
                f"{type(self).__name__} needs batches (x, z) of two tensors; got {_described(batch)}. Override "
                "get_pair(batch) for others."
            )
        return batch[0], batch[1]

    def configure_optimizers(self) -> Any:
        """Build the optimizer of what is trained; override for a schedule."""
        return self.optimizer([p for p in self.parameters() if p.requires_grad])

    # -- what makes a module ------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, x: Tensor, z: Tensor, batch: Any) -> Tensor:
        """What training makes small."""

    @abstractmethod
    def measure(self, x: Tensor, z: Tensor) -> None:
        """Update ``bounds`` with a batch of an evaluation."""

    @abstractmethod
    def pointwise(self, x: Tensor, z: Tensor) -> Tensor:
        """What ``predict`` gives of each pair, ``(B,)``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch of pairs."""
        self.set_address("train", batch_idx)
        x, z = self._pair(batch)
        loss = self.loss(x, z, batch)
        if self._logs_now:
            self.log("train/loss", loss.detach(), batch_size=len(x))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Bounds on held-out pairs."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Bounds on held-out pairs."""
        self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """A number for each pair; see the class."""
        self.set_address("test", batch_idx)
        x, z = self._pair(batch)
        with torch.autocast(self.device.type, enabled=False):
            return self.pointwise(x, z)

    def on_validation_epoch_end(self) -> None:
        """Log the bounds of all batches and ranks."""
        self._log_bounds()

    def on_test_epoch_end(self) -> None:
        """Log the bounds of all batches and ranks."""
        self._log_bounds()

    def _pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, z = self.get_pair(batch)
        if z.ndim != 2 or len(z) != len(x) or not len(x):
            raise ValueError(
                f"there must be one z (B, d) for each x (B, ...); got x {tuple(x.shape)} and z {tuple(z.shape)}."
            )
        return x, z

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> None:
        self.set_address(stage, batch_idx)
        with torch.autocast(self.device.type, enabled=False):  # densities and scores lose nats to half precision
            self.measure(*self._pair(batch))

    def bound(self, name: str) -> Metric:
        """One of the metrics."""
        found = self.bounds[name]
        assert isinstance(found, Metric)
        return found

    def _log_bounds(self) -> None:
        for name in self.bounds:
            metric = self.bound(name)
            values = metric.compute()
            metric.reset()
            self.log_dict(
                {
                    f"mutual_information/{name}/{key}": value.to(torch.float32)
                    for key, value in values.items()
                    if key != "count"
                },
                sync_dist=True,
            )

    def log_mean_over_ranks(self, log_value: Tensor) -> Tensor:
        """Of a scalar, its exponential averaged."""
        if self._world_size == 1:
            return log_value
        gathered: Tensor = self.all_gather(log_value)  # type: ignore[assignment]
        return torch.logsumexp(gathered, 0) - torch.tensor(self._world_size, dtype=gathered.dtype).log()


def require_critic(critic: object) -> None:
    """Refuse what cannot score many latents for one x; one that is compiled can."""
    if not all(hasattr(critic, name) for name in ("embed", "score", "matrix")):
        raise ValueError(
            f"critic must be a PairCritic; got {type(critic).__name__}. Subclass it with score(embedded, z), T of data "
            "(B, h) and latents (..., B, d) as (..., B)."
        )


def distribution_of(proposal: nn.Module, x: Tensor) -> Distribution:
    """What a proposal gives for data, checked."""
    found, points = proposal(x), len(x)
    if not isinstance(found, Distribution) or found.batch_shape != (points,) or len(found.event_shape) != 1:
        shapes = (
            f" with batch {tuple(found.batch_shape)} and event {tuple(found.event_shape)}"
            if isinstance(found, Distribution)
            else ""
        )
        raise ValueError(
            f"a proposal must map x to a torch.distributions.Distribution with batch ({points},) and event (d,), as "
            f"GaussianProposal does; got {type(found).__name__}{shapes}. Independent(..., 1) makes a batch dimension "
            "an event."
        )
    return found


def reparametrised(proposal: Distribution, num: int, module: AddressedNoise) -> Tensor:
    """Samples ``(num, B, d)`` that the proposal's parameters have gradients through."""
    if not proposal.has_rsample:
        raise ValueError(
            f"{type(proposal).__name__} has no rsample, through which a proposal is trained: take a distribution that "
            "can be reparametrised, such as a Gaussian."
        )
    seed = int(torch.randint(2**62, (), generator=module.generator(torch.device("cpu"))))
    with seeded_draws(seed, module.device):  # flows have no mean whose device could be asked
        return proposal.rsample(torch.Size((num,)))


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(each).__name__ for each in batch)}"
    return type(batch).__name__
