"""What is asked of a model: its outputs for a batch, the loss it was trained with, the measurement of interest."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ext.functional.batches import batch_size, concatenate, differentiable, select
from lightning_ext.functional.output_losses import OutputLoss, SoftmaxCrossEntropy, output_loss
from lightning_ext.functional.parameters import ParameterView, Substitution

__all__ = ["InfluenceObjective", "batch_size", "concatenate", "differentiable", "evaluating", "select"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Hold a module in evaluation mode, and put each submodule's own mode back afterwards.

    The flags are set without calling ``train``, in which some modules do more, such as merge weights.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    modes = [(part, part.training) for part in module.modules()]
    for part, training in modes:
        if training:
            _set_mode(part, False)
    try:
        yield module
    finally:
        for part, training in modes:
            if part.training != training:
                _set_mode(part, training)


def _set_mode(part: nn.Module, training: bool) -> None:
    if "training" in vars(part):
        vars(part)["training"] = training  # a module's own assignment costs ten times as much
    else:
        part.training = training  # a scripted one keeps it elsewhere


@contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def _every_derivative(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Choose the kernels that have all derivatives.

    Fused attention has no forward mode and no second derivative; cuDNN's recurrent layers have no second one, and in
    evaluation mode not even a first.
    """
    cudnn = torch.backends.cudnn.enabled and not any(isinstance(part, nn.RNNBase) for part in module.modules())
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(device.type, enabled=False),
            _cudnn(cudnn),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class InfluenceObjective:
    r"""How to get outputs, targets, training loss and measurement from a module and a batch.

    The loss is that of the data alone: regularisation such as weight decay does not belong to it.

    Args:
        loss: the training loss per sample, see :func:`lightning_ext.functional.output_loss`; default
            ``"cross_entropy"``.
        forward: what the module says about a batch. ``None``: ``module(batch[0])``; a string:
            ``module(batch[forward])``; a function: ``forward(module, batch)``. The outputs must be a tensor with the
            samples first.
        target: the targets. ``None``: ``batch[1]``; a string: ``batch[target]``; a function: ``target(batch)``.
        measurement: what influence is measured on. ``"loss"``: the training loss; ``"logit"``: the correct class's
            logit :math:`y_t`; ``"margin"``: :math:`y_t - \operatorname{logsumexp}_{k \ne t} y_k`; the last two are
            means over a sample's positions and for softmax cross-entropy only; or a function ``(y, t) -> (B,)``.

    >>> objective = InfluenceObjective("mse")
    >>> batch = (torch.ones(2, 1), torch.zeros(2, 1))
    >>> objective.losses(objective.outputs(nn.Identity(), batch), objective.targets(batch))
    tensor([1., 1.])
    """

    def __init__(
        self,
        loss: OutputLoss | str | nn.Module | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        forward: Callable[[nn.Module, Any], Tensor] | str | None = None,
        target: Callable[[Any], Tensor] | str | None = None,
        measurement: str | Callable[[Tensor, Tensor], Tensor] = "loss",
    ) -> None:
        self.loss = output_loss(loss)
        self.forward, self.target, self.measurement = forward, target, measurement
        if isinstance(measurement, str) and measurement not in ("loss", "margin", "logit"):
            raise ValueError(f"measurement must be 'loss', 'margin', 'logit' or a function; got {measurement!r}.")
        if measurement in ("margin", "logit") and not isinstance(self.loss, SoftmaxCrossEntropy):
            raise ValueError(f"measurement={measurement!r} is about softmax classes; the loss is {self.loss}.")

    @classmethod
    def of(cls, objective: "InfluenceObjective | None") -> "InfluenceObjective":
        """Return the objective, or the default for None.

        Raises:
            ValueError: If it is something else, such as the name of a loss.
        """
        if objective is None:
            return cls()
        if not isinstance(objective, InfluenceObjective):
            raise ValueError(
                f"objective must be an InfluenceObjective; got {objective!r}. A loss or its name goes into one: "
                'InfluenceObjective("mse").'
            )
        return objective

    def __repr__(self) -> str:
        return f"InfluenceObjective({self.loss}, {self.forward!r}, {self.target!r}, {self.measurement!r})"

    def outputs(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the module's outputs for the batch, ``(B, ...)``.

        Raises:
            ValueError: If the batch does not fit ``forward``, or the outputs are not a tensor of one entry per sample.
        """
        if callable(self.forward):
            outputs = self.forward(module, batch)
        else:
            outputs = _called(module, _entry(batch, 0 if self.forward is None else self.forward, "forward"))
        if not isinstance(outputs, Tensor) or not outputs.ndim:
            raise ValueError(
                f"the outputs must be a tensor with the samples first; got {_described(outputs)}. Pass "
                "forward=function(module, batch) that returns it."
            )
        return outputs

    def targets(self, batch: Any) -> Tensor:
        """Return the batch's targets.

        Raises:
            ValueError: If the batch does not fit ``target``, or the targets are no tensor.
        """
        targets = (
            self.target(batch)
            if callable(self.target)
            else _entry(batch, 1 if self.target is None else self.target, "target")
        )
        if not isinstance(targets, Tensor):
            raise ValueError(f"the targets must be a tensor; got {_described(targets)}. Pass target=function(batch).")
        return targets

    def function(self, module: nn.Module, view: ParameterView, batch: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
        r"""Return :math:`\theta \mapsto f(\theta, x)`, the outputs as a function of the chosen parameters alone.

        Frozen parameters and buffers stay as they are in the module. The function can be differentiated any number of
        times, forwards and backwards, and under inference mode: attention runs in its plain form, autocast is off.

        Raises:
            ValueError: Now and when called, if a part of the module is in training mode. When called: as
                :meth:`outputs`, or if there are not as many outputs as samples.
        """
        _require_evaluation(module)
        size, substitution = batch_size(batch), Substitution(module)
        with differentiable(batch) as plain:
            pass

        def function(params: Mapping[str, Tensor]) -> Tensor:
            _require_evaluation(module)  # again: the module may have been put back since
            with _every_derivative(module, view.device), substitution(params):
                outputs = self.outputs(module, plain)
            if len(outputs) != size:
                raise ValueError(f"a batch of {size} samples must give {size} outputs; got {tuple(outputs.shape)}.")
            return outputs

        return function

    def check_targets(self, y: Tensor, t: Tensor, names: Sequence[int]) -> None:
        """Refuse targets that are no classes of a cross-entropy; nothing is asked of other losses.

        Args:
            y: the outputs of one sample, ``(1, ...)``.
            t: the targets of a batch.
            names: what its samples are called in the message, B numbers.

        Raises:
            ValueError: If class numbers are floats or out of range, with the samples and the number of classes; or if
                the outputs have positions in the place of samples, or classes anywhere but in the last dimension.
        """
        if not isinstance(self.loss, SoftmaxCrossEntropy) or y.ndim < 2:
            return
        _check_layout(y, t)
        if t.is_floating_point():
            if t.shape[1:] != y.shape[1:] and t.shape[1:] == y.shape[1:-1]:
                raise ValueError(
                    f"the targets are {_described(t)}: class numbers must be integers, so return targets.long(), and "
                    f"probabilities of the {y.shape[-1]} classes must have the outputs' shape."
                )
            return
        outside = ((t < 0) | (t >= y.shape[-1])) & (t != self.loss.ignore_index)
        rows = outside.reshape(len(t), -1).any(1).nonzero().flatten().tolist()
        if rows:
            found = sorted(set(t[outside].tolist()))[:10]
            raise ValueError(
                f"the targets of samples {[int(names[row]) for row in rows[:20]]} are {found}, and the outputs have "
                f"{y.shape[-1]} classes, 0 to {y.shape[-1] - 1}."
            )

    def losses(self, y: Tensor, t: Tensor) -> Tensor:
        """Return the training losses, ``(B,)``."""
        return self.loss.value(y, t)

    def measure(self, y: Tensor, t: Tensor) -> Tensor:
        """Return the measurements, ``(B,)``.

        Raises:
            ValueError: If a measurement function returns another shape.
        """
        if self.measurement == "loss":
            return self.losses(y, t)
        if isinstance(self.measurement, str):
            return _class_score(y, t, self.loss, against_others=self.measurement == "margin")
        values = self.measurement(y, t)
        if values.shape != y.shape[:1]:
            raise ValueError(
                f"the measurement must be one number per sample, {tuple(y.shape[:1])}; got {tuple(values.shape)}."
            )
        return values


def _class_score(y: Tensor, t: Tensor, loss: OutputLoss, *, against_others: bool) -> Tensor:
    """Return the correct class's logit, or its margin, averaged over the positions that count."""
    if not isinstance(loss, SoftmaxCrossEntropy) or t.is_floating_point():
        raise ValueError(f"the measurements 'margin' and 'logit' need class numbers as targets; got {_described(t)}.")
    labels, weights = loss.labels(y, t), loss.weights(y, t)
    chosen = labels.masked_fill(labels == loss.ignore_index, 0).long().unsqueeze(-1)
    scores = y.gather(-1, chosen).squeeze(-1)
    if against_others:
        scores = scores - y.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    return (weights * scores).reshape(len(y), -1).sum(1)


def _described(thing: Any) -> str:
    return f"a tensor {tuple(thing.shape)} of {thing.dtype}" if isinstance(thing, Tensor) else type(thing).__name__


def _called(module: nn.Module, entry: Any) -> Any:
    try:
        return module(entry)
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__} was called with one entry of the batch and raised: {error}. Where it needs more, "
            "pass forward=function(module, batch)."
        ) from error


def _check_layout(y: Tensor, t: Tensor) -> None:
    if len(y) != 1 and t[:1].numel() == len(y):
        raise ValueError(
            f"one sample of {len(y)} positions gives outputs {tuple(y.shape)}, positions in the place of samples. Keep "
            "them apart: forward=lambda module, batch: module(batch[0]).unflatten(0, batch[1].shape)."
        )
    if not t.is_floating_point() and t.shape[1:] != y.shape[1:-1] and t.shape[1:] == y.shape[2:]:
        raise ValueError(
            f"the outputs (B, {', '.join(map(str, y.shape[1:]))}) have the classes in dimension 1, and cross-entropy "
            "wants them last: forward=lambda module, batch: module(batch[0]).movedim(1, -1)."
        )


def _entry(batch: Any, key: int | str, argument: str) -> Any:
    if isinstance(batch, Mapping) is isinstance(key, str) and not isinstance(batch, Tensor):
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError):
            pass
    found = f"a mapping with {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(
        f"{argument} looks for batch[{key!r}], but the batch is {found}. Pass {argument}= as the key of a mapping, or "
        "as a function of the batch; and where a list of batches is asked for, [(x, t)] is one of a single batch."
    )


def _require_evaluation(module: nn.Module) -> None:
    live = [(name or "the module itself", part) for name, part in module.named_modules() if part.training]
    if not live:
        return
    random = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    name, part = next((entry for entry in live if isinstance(entry[1], random)), live[0])
    raise ValueError(
        f"{name} ({type(part).__name__}) is in training mode, where outputs may depend on chance or on the rest of the "
        "batch. Use `with evaluating(module):` or module.eval()."
    )
