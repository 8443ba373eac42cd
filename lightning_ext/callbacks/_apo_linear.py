"""Whether an optimizer's step is linear in its learning rate, so that it can be rescaled after it was made."""

from typing import Any, cast

import torch
from torch.optim import Optimizer

from lightning_ext._lightning import MisconfigurationException

_KNOWN = frozenset(
    getattr(torch.optim, name, None)
    for name in (
        *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax"),
        *("NAdam", "RAdam", "Adafactor", "Muon"),
    )
) - {None}
_REFUSED = {
    "ASGD": "its averaging depends on the learning rate in another way",
    "Rprop": "it adapts a step size of its own and uses lr only at the start",
    "LBFGS": "it evaluates the loss several times within one step",
    "SparseAdam": "a look-ahead needs dense gradients",
    "APOPreconditioner": "it learns the length of its steps itself",
}
_OWN_RATE = {  # by package, and by name in collections of optimizers
    "schedulefree": "it keeps averaged weights and evaluates elsewhere",
    "prodigy": "it estimates a learning rate of its own",
    "dadapt": "it estimates a learning rate of its own",
}


def check_linear(optimizer: Optimizer, who: str) -> None:
    r"""Refuse an optimizer whose step is not :math:`-\eta d` with :math:`d` free of :math:`\eta`.

    The known ones pass by class; any other takes a few steps on a tiny tensor with its own options.
    """
    kind = type(optimizer)
    if kind in _KNOWN:
        return
    reason = next((_REFUSED[base.__name__] for base in kind.__mro__ if base.__name__ in _REFUSED), None)
    described = " ".join(f"{base.__module__.partition('.')[0]} {base.__name__}".lower() for base in kind.__mro__)
    reason = reason or next((why for name, why in _OWN_RATE.items() if name in described), None)
    reason = reason or _probe(optimizer)
    if reason is not None:
        raise MisconfigurationException(
            f"{who}: the step of {kind.__name__} cannot be rescaled: {reason}. Use an optimizer whose step is linear "
            "in lr, such as torch.optim.SGD, Adam, AdamW, RMSprop or Muon, or leave it out with optimizers=[...]."
        )


def _probe(optimizer: Optimizer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    options["lr"] = 0.01
    start = param.detach().clone()
    try:
        moved = []
        for rate in (0.01, 0.005):
            twin = torch.nn.Parameter(start.clone())
            trial: Optimizer = cast(Any, type(optimizer))([{**options, "params": [twin]}])
            generator.manual_seed(1)
            for step in range(4):  # the same path for both, and only the last step at another rate
                trial.param_groups[0]["lr"] = rate if step == 3 else 0.01
                before = twin.detach().clone()
                twin.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
                trial.step()
            moved.append(twin.detach() - before)
    except Exception as error:  # whatever a foreign optimizer may raise
        return f"whether it is linear in lr could not be tried out ({type(error).__name__}: {error})"
    if torch.allclose(moved[0], 2 * moved[1], rtol=1e-6, atol=0.0) and moved[0].abs().max() > 0:
        return None
    return "half the learning rate did not give half the step"
