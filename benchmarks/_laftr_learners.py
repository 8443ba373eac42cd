"""The methods of the LAFTR benchmark's accuracy rows, their grids of weights, and how each came through the tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from _laftr_problem import TASKS, Learner, Outcome, Penalized, average, learn
from _laftr_rivals import DER, FROMP

TUNING_SEED = 99
SEEDS = (0, 1, 2)
POINTS = 40  # stored for each task, or drawn for each penalty


@dataclass(frozen=True)
class Method:
    """A learner for a weight, the weights that it may choose from, and whose it is."""

    name: str
    make: Callable[[float], Learner]
    weights: tuple[float, ...]
    source: str = "lightning_ext"


def penalized(name: str, estimator: str, weights: tuple[float, ...], **options: object) -> Method:
    return Method(name, lambda weight: Penalized(estimator, weight, **options), weights)


def relu(name: str, **options: object) -> Method:
    return penalized(name, "laftr-relu", (1.0, 3.0, 10.0, 30.0), num_samples=POINTS, **options)


@cache
def chosen_weight(method: Method) -> float:
    """The best on a seed of its own."""
    if len(method.weights) == 1:
        return method.weights[0]
    return max(method.weights, key=lambda weight: learn(method.make(weight), TUNING_SEED).accuracy)


@cache
def reported(method: Method) -> Outcome:
    """Means over the other seeds."""
    return average([learn(method.make(chosen_weight(method)), seed) for seed in SEEDS])


RELU = (
    relu("laftr-relu by class"),
    relu("laftr-relu", class_conditional=False),
    relu("laftr-relu by class, diagonal", covariance="diag"),
)
MOMENTS = penalized("laftr-moments", "laftr-moments", (1.0, 10.0, 100.0), class_conditional=False)
EWC = penalized("EWC", "ewc", (1.0, 10.0, 100.0, 1e3))
EXACT = penalized(f"exact on {POINTS} samples per task", "coreset", (1.0, 10.0, 100.0, 1e3), size=POINTS)
FINETUNE = Method("fine-tuning", lambda weight: Learner(), (0.0,), "plain torch")
RIVALS = (
    Method("DER", lambda alpha: DER(alpha, size=POINTS * TASKS), (0.01, 0.03, 0.1, 0.3), "DER, written here"),
    Method("DER++", lambda alpha: DER(alpha, 1.0, size=POINTS * TASKS), (0.1, 0.3, 1.0, 3.0), "DER++, written here"),
    Method("FROMP", lambda tau: FROMP(tau, POINTS), (0.01, 0.1, 1.0, 10.0, 100.0), "FROMP, written here"),
)
METHODS = (*RELU, MOMENTS, EWC, EXACT, FINETUNE, *RIVALS)
