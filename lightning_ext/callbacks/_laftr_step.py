"""A module's ``training_step`` with something added to its loss, for the time of a fit."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_ext._lightning import LightningModule

Term = Callable[[], Tensor]


def _itself(step: Any) -> Any:
    return step


class PenalizedStep:
    """Stands in for ``training_step`` as an attribute of the module itself, one for all callbacks that add terms.

    It pickles and copies as the step that it stands in for: a copy of the module is a module without added terms.
    """

    def __init__(self, step: Callable[..., Any], *, own: bool) -> None:
        functools.update_wrapper(self, step)
        self.__wrapped__ = getattr(step, "__wrapped__", step)  # Lightning reads the signature one layer down
        self.step, self.own = step, own  # own: the module had it as an attribute of itself before
        self.terms: dict[int, Term] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.step(*args, **kwargs)
        for term in list(self.terms.values()):
            output = _plus(output, term)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.step,)


def _plus(output: Any, term: Term) -> Any:
    if isinstance(output, Tensor):
        return output + term()
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + term()}
    return output  # None skips the batch; what is no loss is refused by Lightning, in its own words


def add_term(pl_module: LightningModule, owner: object, term: Term) -> None:
    """Add ``term()`` to the loss that ``training_step`` returns, until :func:`remove_term`."""
    step = vars(pl_module).get("training_step")
    if not isinstance(step, PenalizedStep):
        step = PenalizedStep(pl_module.training_step, own="training_step" in vars(pl_module))
        pl_module.training_step = step  # type: ignore[method-assign]
    step.terms[id(owner)] = term


def remove_term(pl_module: LightningModule, owner: object) -> None:
    """Take the owner's term out; with the last one the module has its own ``training_step`` again."""
    step = vars(pl_module).get("training_step")
    if not isinstance(step, PenalizedStep):
        return
    step.terms.pop(id(owner), None)
    if not step.terms:
        if step.own:
            pl_module.training_step = step.step  # type: ignore[method-assign]
        else:
            del pl_module.training_step
