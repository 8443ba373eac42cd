"""Experiments B, C and D of the APO reproduction: the preconditioner in plain loops, against torch's optimizers."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext._resources import load_script
from lightning_ext.data import DigitsDataModule
from lightning_ext.functional import ProximalObjective, softmax_kl, squared_error
from lightning_ext.optim import APOPreconditioner

training = load_script(Path(__file__).with_name("_apo_training.py"))

SOAP_PACKAGE = "pytorch_optimizer"
ORACLE_STEPS = 100
KAPPAS = (1e5, 1e10)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: the measured loss after some of its steps, and the processor seconds that training took up to there."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, step: int) -> float:
        """The loss at the last measurement up to ``step``; infinite where the run broke down."""
        return [loss for at, loss in zip(self.steps, self.losses, strict=True) if at <= step][-1]

    def after(self, seconds: float) -> float:
        """The loss at the last measurement within some seconds."""
        return [loss for at, loss in zip(self.seconds, self.losses, strict=True) if at <= seconds][-1]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised.

    Attributes:
        model: The network.
        loss: Loss of a batch.
        outputs: Outputs for a batch.
        divergence: Between two outputs.
        batches: An endless supply of B and B'.
        measure: The figure that is reported.
    """

    model: nn.Module
    loss: Callable[[Any], Tensor]
    outputs: Callable[[Any], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    batches: Iterator[tuple[Any, Any]]
    measure: Callable[[], float]


Factory = Callable[[Problem], Any]


@contextlib.contextmanager
def _breakdowns_are_counted() -> Iterator[None]:
    """The optimizer's own warning about them would stand in the middle of the table."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="APOPreconditioner left out a step")
        yield


@_breakdowns_are_counted()
def minimise(
    problem: Problem,
    make: Factory,
    steps: int,
    every: int,
    on_step: Callable[[], object],
    clock: Callable[[], float] = time.process_time,
) -> Curve:
    """Train in a plain loop; a run whose loss is not finite ends there and counts as infinite."""
    optimizer = make(problem)
    found: list[tuple[int, float, float]] = []
    spent, start = 0.0, clock()

    def measure(step: int) -> float:
        with torch.no_grad():
            loss = problem.measure()
        found.append((step, loss if math.isfinite(loss) else math.inf, spent))
        return loss

    for step, (batch, other) in zip(range(steps), problem.batches, strict=False):
        if step % every == 0:
            spent += clock() - start
            if not math.isfinite(measure(step)):
                break
            start = clock()
        optimizer.zero_grad()
        loss = problem.loss(batch)
        loss.backward()
        if getattr(optimizer, "meta_step_due", False):
            objective = ProximalObjective(
                functools.partial(problem.loss, batch), functools.partial(problem.outputs, other), problem.divergence,
                loss_at_anchor=loss.detach(),
            )  # fmt: skip
            objective.anchor()
            optimizer.step(look_ahead=objective)
        else:
            optimizer.step()
        on_step()
    else:
        spent += clock() - start
        measure(steps)
    return Curve(*zip(*found, strict=True))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``runs[method][setting]`` is a list with one curve per seed; methods with several settings were searched."""

    runs: Mapping[str, Mapping[str, Sequence[Curve]]]

    def middle(self, method: str, setting: str, step: int) -> float:
        """Median loss over the seeds."""
        return statistics.median(curve.at(step) for curve in self.runs[method][setting])

    def last(self, method: str) -> int:
        """The last step that was measured."""
        return max(curve.steps[-1] for curves in self.runs[method].values() for curve in curves)

    def best(self, method: str, step: int) -> str:
        """The setting with the smallest loss at ``step``."""
        return min(self.runs[method], key=lambda setting: self.middle(method, setting, step))

    def at(self, method: str, step: int) -> float:
        """The loss of the setting that is best at ``step``."""
        return self.middle(method, self.best(method, step), step)


def compare(
    title: str,
    methods: Mapping[str, Mapping[str, Factory]],
    problem: Callable[[int], Problem],
    seeds: Sequence[int],
    steps: int,
    every: int,
    clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Run every setting of every method from the same initial weights on the same batches."""
    progress = training.Progress(title, steps * len(seeds) * sum(map(len, methods.values())))
    runs = {}
    for method, settings in methods.items():
        with progress.run(method), training.one_thread():
            runs[method] = {
                setting: [minimise(problem(seed), make, steps, every, progress.bar.update, clock) for seed in seeds]
                for setting, make in settings.items()
            }
    progress.close()
    return Comparison(runs)


def rates(kind: Callable[..., Any], *values: float, **options: Any) -> dict[str, Factory]:
    """One setting per learning rate of an optimizer that takes parameters."""
    return {
        f"lr {value:g}": lambda problem, value=value: kind(problem.model.parameters(), lr=value, **options)
        for value in values
    }


def apo(**options: Any) -> Factory:
    """APO-P on all parameters of a model."""
    return lambda problem: APOPreconditioner(problem.model, **options)


# -- B: ill-conditioned regression ----------------------------------------------------------------------------------


def regression(seed: int, kappa: float) -> Problem:
    """A two-layer linear network against a linear map of condition number ``kappa``; B is all data, B' 200 of them."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(10, 6))[0], torch.linalg.qr(normal(6, 6))[0]
    matrix = 10 * left @ torch.diag(torch.logspace(0, -math.log10(kappa), 6, dtype=torch.float64)) @ right.T
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 10, bias=False)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * normal(*weight.shape))
    x = normal(1000, 6)
    target = x @ matrix.T

    def loss(inputs: Tensor) -> Tensor:
        return squared_error(model(inputs), target)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield x, x[torch.randint(len(x), (200,), generator=draw)]

    return Problem(model, loss, model, squared_error, batches(), lambda: float(loss(x)))


class GaussNewton:
    """The dense damped Gauss-Newton step, an oracle for a tiny linear network on one batch.

    Outputs are linear in the inputs, so as many probes as there are inputs, of the same second moment, give the matrix.
    """

    def __init__(self, problem: Problem, damping: float = 1e-6) -> None:
        x, _ = next(problem.batches)
        moment = x.T @ x / len(x)
        self.probes = math.sqrt(x.shape[1]) * torch.linalg.cholesky(moment).T
        self.model, self.damping = problem.model, damping
        self.params = dict(problem.model.named_parameters())

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Solve for the step."""

        def outputs(params: Mapping[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.model, params, (self.probes,))

        jacobian = torch.func.jacfwd(outputs)({name: p.detach() for name, p in self.params.items()})
        columns = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).flatten(0, 1)
        matrix = columns.T @ columns / len(self.probes)
        matrix.diagonal().add_(self.damping)
        step = torch.linalg.solve(matrix, torch.cat([p.grad.flatten() for p in self.params.values()]))
        for p, move in zip(self.params.values(), step.split([p.numel() for p in self.params.values()]), strict=True):
            p.sub_(move.view_as(p))


REGRESSION: dict[str, dict[str, Factory]] = {
    "SGD": rates(torch.optim.SGD, 3e-3, 1e-2, 3e-2, 0.1),
    "Adam": rates(torch.optim.Adam, 1e-3, 3e-3, 1e-2, 3e-2),
    "APO-P additive": {
        f"meta-lr {rate:g}": apo(
            lr=0.01, lam_f=1.0, lam_w=0.0, structure="ekfac", meta_update="adam", meta_lr=rate, momentum=0.0,
            every_n_steps=1,
        )
        for rate in (3e-3, 1e-2)
    },
    "APO-P kron": {
        "meta-lr 0.03": apo(
            lr=0.01, lam_f=1.0, lam_w=0.0, structure="kron", meta_lr=0.03, momentum=0.0, every_n_steps=1
        )
    },
    "APO-P ekfac": {
        "meta-lr 0.03": apo(
            lr=0.01, lam_f=1.0, lam_w=0.0, structure="ekfac", meta_lr=0.03, momentum=0.0, every_n_steps=1
        )
    },
}  # fmt: skip


def ill_conditioned(kappa: float, seeds: Sequence[int], steps: int) -> Comparison:
    """Experiment B at one condition number; the oracle makes at most a hundred steps."""
    title, make = f"B, κ = {kappa:.0e}", functools.partial(regression, kappa=kappa)
    found = compare(title, REGRESSION, make, seeds, steps, 50)
    oracle = compare(title, {"Gauss-Newton": {"dense": GaussNewton}}, make, seeds, min(ORACLE_STEPS, steps), 5)
    return Comparison({**found.runs, **oracle.runs})


# -- C: digits autoencoder ------------------------------------------------------------------------------------------


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = DigitsDataModule(binarize=False)
    data.setup()
    return (*data.train_set.tensors, *data.held_out_set.tensors)


def perceptron(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers = [[nn.Linear(a, b), activation()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain.from_iterable(layers))[:-1]


def _with_previous(batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """B' is the batch before."""
    return itertools.pairwise(batches)  # type: ignore[return-value]


def autoencoder(seed: int, batch_size: int | None = 500) -> Problem:
    """Grey digits through a bottleneck of 8; a batch of ``None`` is all of them."""
    torch.manual_seed(seed)
    model = perceptron((64, 48, 24, 8, 24, 48, 64), nn.Tanh)
    x = _digits()[0]
    draw = torch.Generator().manual_seed(seed)

    def loss(inputs: Tensor) -> Tensor:
        return squared_error(model(inputs), inputs)

    batches = (x[torch.randperm(len(x), generator=draw)[:batch_size]] for _ in itertools.count())
    swapped = ((new, old) for old, new in _with_previous(batches))
    return Problem(model, loss, model, squared_error, swapped, lambda: float(loss(x)))


def soap(*values: float) -> dict[str, dict[str, Factory]]:
    """SOAP at these learning rates, where its package is installed."""
    if importlib.util.find_spec(SOAP_PACKAGE) is None:
        return {}
    kind = importlib.import_module(SOAP_PACKAGE).SOAP
    return {"SOAP": rates(kind, *values)}


AUTOENCODER: dict[str, dict[str, Factory]] = {
    "SGDm": rates(torch.optim.SGD, 0.03, 0.1, 0.3, momentum=0.9),
    "Adam": rates(torch.optim.Adam, 3e-3, 1e-2, 3e-2),
    "APO-P, K = 1": {
        f"meta-lr {rate:g}": apo(lam_f=3.0, momentum=0.9, meta_lr=rate, every_n_steps=1) for rate in (0.1, 0.2, 0.4)
    },
    "APO-P, K = 10": {f"meta-lr {rate:g}": apo(lam_f=2.0, meta_lr=rate, every_n_steps=10) for rate in (0.1, 0.3, 0.45)},
}


def autoencoders(seeds: Sequence[int], steps: int) -> Comparison:
    """Experiment C."""
    return compare("C, autoencoder", {**AUTOENCODER, **soap(3e-3, 1e-2, 3e-2)}, autoencoder, seeds, steps, 25)


OTHER_BATCH = {
    "APO-P, K = 1": {
        f"λ_F {lam_f:g}": apo(lam_f=lam_f, momentum=0.9, meta_lr=0.4, every_n_steps=1) for lam_f in (1.0, 3.0)
    }
}


def other_batches(batch_size: int | None, seeds: Sequence[int], steps: int) -> Comparison:
    """Experiment C against SOAP alone, with batches of another size."""
    title = f"C, batches of {batch_size or 'everything'}"
    problem = functools.partial(autoencoder, batch_size=batch_size)
    return compare(title, {**OTHER_BATCH, **soap(3e-3, 1e-2)}, problem, seeds, steps, 25)


# -- D: bfloat16 ----------------------------------------------------------------------------------------------------


def half_precision(seed: int, dtype: torch.dtype) -> Problem:
    """The digits classifier with all weights in ``dtype``."""
    torch.manual_seed(seed)
    model = perceptron((64, 64, 64, 10), nn.ReLU).to(dtype)
    x, y = _digits()[0].to(dtype), _digits()[1]
    draw = torch.Generator().manual_seed(seed)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    chosen = (torch.randperm(len(x), generator=draw)[:100] for _ in itertools.count())
    batches = (((x[new], y[new]), (x[old], y[old])) for old, new in itertools.pairwise(chosen))
    return Problem(model, loss, lambda batch: model(batch[0]), softmax_kl, batches, lambda: float(loss((x, y))))


@dataclasses.dataclass(frozen=True)
class Precision:
    """Final training loss and held-out accuracy by seed, at one precision of weights and preconditioner."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


def precision_run(
    structure: str, weights: torch.dtype, preconditioner: str, seeds: Sequence[int], steps: int
) -> Precision:
    """Experiment D for one combination."""
    title = f"D, {structure}, weights {str(weights).removeprefix('torch.')}, preconditioner {preconditioner}"
    progress = training.Progress(title, steps * len(seeds))
    make = apo(lam_f=2.0, structure=structure, precond_dtype=preconditioner)
    losses, accuracies = [], []
    with progress.run("all seeds"), training.one_thread():
        for seed in seeds:
            problem = half_precision(seed, weights)
            losses.append(minimise(problem, make, steps, steps, progress.bar.update).losses[-1])
            x, y = _digits()[2].to(weights), _digits()[3]
            with torch.no_grad():
                accuracies.append(float((problem.model(x).argmax(1) == y).float().mean()))
    progress.close()
    return Precision(tuple(losses), tuple(accuracies))


def refused_in_half() -> list[str]:
    """The decompositions that torch does not offer in bfloat16 on a CPU."""
    matrix = torch.eye(3, dtype=torch.bfloat16)
    tried = {
        "inv": torch.linalg.inv,
        "cholesky": torch.linalg.cholesky,
        "eigh": torch.linalg.eigh,
        "qr": torch.linalg.qr,
        "solve": lambda m: torch.linalg.solve(m, m),
    }
    refused = []
    for name, function in tried.items():
        try:
            function(copy.copy(matrix))
        except (RuntimeError, NotImplementedError):
            refused.append(name)
    return refused
