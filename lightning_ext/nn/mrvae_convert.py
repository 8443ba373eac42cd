"""Turn an ordinary encoder and decoder into multi-rate ones, in place.

Source: Bae et al., *Multi-Rate VAE*, ICLR 2023, arXiv 2212.03905, sections 3.2 and 4.1.
"""

import contextlib
import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional.mrvae import GateActivation
from lightning_ext.nn.mrvae import RateContext
from lightning_ext.nn.mrvae_gates import (
    GatedFiLM,
    GateInit,
    LogVarianceGate,
    PosteriorGate,
    RateConditioner,
    RateFiLM,
    RateGate,
    apply_conditioner,
)

__all__ = ["convert_to_multirate", "dry_run", "posterior_parameters", "reconstruction_parameters"]

Layout = Literal["paper", "public", "table1"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATEABLE = (nn.Linear, *_CONVOLUTIONS)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_NORMS = (*_BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_UNMATCHED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)

_Factory = Callable[..., RateConditioner]


def posterior_parameters(output: Any) -> tuple[Tensor, Tensor]:
    """Read ``(mu, logvar)`` from whatever an encoder returned.

    Args:
        output: a pair ``(mu, logvar)``, one tensor ``(B, 2 k)`` holding both halves, or an object with ``embedding``
            and ``log_covariance`` (pythae's ``ModelOutput``).

    Returns:
        Two tensors of equal shape.

    Raises:
        ValueError: none of the three.
    """
    if isinstance(output, Tensor):
        if output.dim() < 2 or output.shape[1] % 2:
            raise ValueError(
                f"the encoder returned one tensor of shape {tuple(output.shape)}, which does not split into mu and "
                "logvar: return (mu, logvar), or a vector of 2 * latent_dim numbers per sample."
            )
        mu, logvar = output.chunk(2, dim=1)
        return mu, logvar
    if isinstance(output, Mapping) and "embedding" in output and "log_covariance" in output:
        return output["embedding"], output["log_covariance"]
    if isinstance(output, Sequence) and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
        mu, logvar = output
        if mu.shape == logvar.shape:
            return mu, logvar
        raise ValueError(f"mu and logvar must have equal shapes; got {tuple(mu.shape)} and {tuple(logvar.shape)}.")
    raise ValueError(
        f"the encoder returned {type(output).__name__}, which is not (mu, logvar), one tensor (B, 2 * latent_dim), or "
        "an output with .embedding and .log_covariance."
    )


def reconstruction_parameters(output: Any) -> Tensor:
    """Read the tensor of reconstruction parameters from whatever a decoder returned.

    Args:
        output: a tensor, or an object with ``reconstruction`` (pythae's ``ModelOutput``).

    Returns:
        The tensor.

    Raises:
        ValueError: neither.
    """
    if isinstance(output, Mapping) and "reconstruction" in output:
        output = output["reconstruction"]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the decoder returned {type(output).__name__}; it must return a tensor or an output with .reconstruction."
        )
    return output


@dataclasses.dataclass
class _Call:
    """One execution of a layer or norm in the traced forward pass."""

    name: str
    module: nn.Module
    input_memory: int
    output: Tensor

    @property
    def output_memory(self) -> int:
        return self.output.untyped_storage().data_ptr()


@contextlib.contextmanager
def dry_run(network: nn.Module) -> Iterator[None]:
    """Run a network in here without a trace: in eval mode, without gradients, the random state put back afterwards."""
    modes = {module: module.training for module in network.modules()}
    device = _place(network)[0]
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _traced(network: nn.Module, example: Any) -> tuple[list[_Call], Any]:
    """Run once in eval mode without gradients; list gateable layers and norms in the order they ran."""
    calls: list[_Call] = []
    handles = []

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # The output is kept alive, so that no later tensor can reuse its memory and look like it.
            calls.append(_Call(name, module, inputs[0].untyped_storage().data_ptr(), output))

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            raise ValueError(f"layer {name!r} is lazy: run the network once on real data before converting it.")
        if isinstance(module, (*_GATEABLE, *_NORMS)):
            handles.append(module.register_forward_hook(record(name)))
    try:
        with dry_run(network):
            output = network(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters(), None)
    return (torch.device("cpu"), torch.float32) if parameter is None else (parameter.device, parameter.dtype)


def _channel_dim(module: nn.Module) -> int:
    return -1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1


def _num_features(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return int(module.out_channels if isinstance(module, _CONVOLUTIONS) else module.num_features)  # type: ignore[arg-type]


def _attach(module: nn.Module, conditioner: RateConditioner) -> None:
    module.add_module("rate_gate", conditioner.to(*_place(module)))
    # A child and a hook instead of a wrapper, so that the layer keeps its keys in the state dict.
    module.register_forward_hook(apply_conditioner)


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatch.fnmatch(name, pattern) for pattern in include):
        return False
    return not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)


def _heads(calls: list[_Call], output: Any, needed: bool) -> list[_Call]:
    """The layers whose outputs are mu and logvar themselves, in this order; a joint head stands there twice."""
    found = []
    for part in posterior_parameters(output):
        memory = part.untyped_storage().data_ptr()
        found += [c for c in calls if isinstance(c.module, _GATEABLE) and c.output_memory == memory][-1:]
    if needed and len(found) < 2:
        raise ValueError(
            "the layers that produce mu and logvar were not found: gate_heads=False, log_variance='add' and layouts "
            "other than 'paper' need an encoder that returns the outputs of its last layers as they are."
        )
    return found


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _check_unconverted(*networks: nn.Module) -> None:
    for network in networks:
        for name, module in network.named_modules():
            if isinstance(module, RateConditioner):
                raise ValueError(f"the network is multi-rate already (layer {name!r}); convert an ordinary one.")


def _normalises_each_channel(norm: nn.Module) -> bool:
    """Whether the norm sees one channel of one sample at a time, and so divides any gate before it out again."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups == norm.num_channels
    return isinstance(norm, nn.modules.instancenorm._InstanceNorm)


class _Planner:
    """Collects where conditioners go before anything is changed, so that an error leaves the networks untouched."""

    def __init__(self, make: _Factory, layout: Layout, selected: Callable[[str], bool]) -> None:
        self.make = make
        self.layout = layout
        self.selected = selected
        self.places: dict[nn.Module, RateConditioner] = {}
        self.before_norm: list[str] = []
        self.cancelled: list[str] = []

    def gate(self, calls: list[_Call], left_alone: list[_Call], is_encoder: bool) -> None:
        untouched = {call.module for call in left_alone}
        for call in calls:
            if isinstance(call.module, _GATEABLE) and call.module not in untouched and self.selected(call.name):
                target = self._target(call, calls)
                if target not in self.places:
                    self.places[target] = self.make(target, is_encoder)

    def _target(self, call: _Call, calls: list[_Call]) -> nn.Module:
        norm = next((c for c in calls if isinstance(c.module, _NORMS) and c.input_memory == call.output_memory), None)
        if norm is None:
            return call.module
        over_space = isinstance(norm.module, nn.LayerNorm) and len(norm.module.normalized_shape) > 1
        if self.layout != "paper" and not over_space:
            return norm.module
        if _normalises_each_channel(norm.module):
            self.cancelled.append(call.name)
        if isinstance(norm.module, _BATCH_NORMS):
            self.before_norm.append(call.name)
        return call.module

    def shift_log_variance(self, mean_head: nn.Module, variance_head: nn.Module, context: RateContext) -> None:
        dim = _channel_dim(variance_head)
        if variance_head is mean_head:
            latents = _num_features(variance_head) // 2
            mean = self.make(variance_head, True, latents) if variance_head in self.places else None
            conditioner: RateConditioner = PosteriorGate(mean, LogVarianceGate(latents, context, dim))
        else:
            conditioner = LogVarianceGate(_num_features(variance_head), context, dim)
        self.places[variance_head] = conditioner

    def condition_batch_norms(self, context: RateContext, init: GateInit) -> None:
        for module, gate in self.places.items():
            if isinstance(module, _BATCH_NORMS):
                affine = RateFiLM(_num_features(module), context, _channel_dim(module), init=init)
                self.places[module] = GatedFiLM(gate, affine)


def convert_to_multirate(
    encoder: nn.Module,
    decoder: nn.Module,
    context: RateContext,
    example_input: Tensor,
    *,
    conditioning: Literal["gate", "film"] = "gate",
    layout: Layout = "paper",
    encoder_activation: GateActivation = "sigmoid",
    decoder_activation: GateActivation = "sqrt",
    init: GateInit = "identity",
    gate_heads: bool = True,
    gate_output: bool = False,
    log_variance: Literal["multiply", "add"] = "multiply",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    one_beta_per_batch: bool = False,
    hierarchical: bool = False,
) -> list[str]:
    r"""Make both networks depend on :math:`\beta`, **in place**, by gating the layers that a forward pass runs through.

    Every matched ``Linear``, ``Conv1-3d`` and ``ConvTranspose1-3d`` gets a child module ``rate_gate`` and a forward
    hook. The keys of the state dict do not change, so a checkpoint of the ordinary network loads with
    ``strict=False``; the missing keys are the gates. Layers are found by running both networks once on
    ``example_input`` in eval mode, so the output layer is the one that runs last, whatever the order of registration.

    Args:
        encoder: returns ``(mu, logvar)``, one tensor ``(B, 2 k)`` or a pythae output.
        decoder: takes ``z`` and returns a tensor or a pythae output.
        context: where the gates will read beta.
        example_input: a batch of inputs ``(B, *)``; only its shape matters.
        conditioning: ``"gate"`` (two numbers per channel) or ``"film"`` (two small networks per layer).
        layout: ``"paper"`` gates every layer directly (Eq. 6-9); ``"public"`` (the authors' released code) gates
            after a norm that follows, and leaves heads and the decoder's first linear layer alone; ``"table1"`` is
            ``"public"`` plus a beta-conditioned affine map on every BatchNorm (the parameter counts of Table 1).
        encoder_activation: squashing function of the encoder's gates.
        decoder_activation: squashing function of the decoder's gates.
        init: ``"identity"`` or ``"paper"``, see :class:`RateGate`.
        gate_heads: gate the layers that produce mu and logvar (``"paper"`` layout only).
        gate_output: gate the decoder's last layer too.
        log_variance: ``"add"`` replaces the multiplicative gate of logvar by :class:`LogVarianceGate`; with
            ``encoder_activation="sqrt"`` that is the family in which a linear VAE is jointly exact for every beta.
        include: shell patterns of layer names to gate (``"encoder.*"`` style, relative to each network); empty: all.
        exclude: shell patterns of layer names to leave alone.
        one_beta_per_batch: training will use one beta for a whole batch; then a BatchNorm right after a gate cancels it
            and a warning says so.
        hierarchical: the decoder takes whatever the encoder returns, and heads are inside the decoder: they are gated
            like its other layers.

    Returns:
        Names of the conditioned layers, ``"encoder.<name>"`` and ``"decoder.<name>"``.

    Raises:
        ValueError: an unknown choice, no layer matched, the encoder's output does not split into mu and logvar, a layer
            is lazy, the networks are multi-rate already, or the heads cannot be found where ``gate_heads=False`` or
            ``log_variance="add"`` needs them. The networks are unchanged then.
    """
    _check_choice("conditioning", conditioning, ("gate", "film"))
    _check_choice("layout", layout, ("paper", "public", "table1"))
    _check_choice("log_variance", log_variance, ("multiply", "add"))
    if hierarchical and (log_variance == "add" or not gate_heads):
        raise ValueError("a hierarchical decoder holds the heads: gate_heads and log_variance do not apply to it.")
    _check_unconverted(encoder, decoder)
    encoder_calls, posterior = _traced(encoder, example_input.to(*_place(encoder)))
    latent = posterior if hierarchical else posterior_parameters(posterior)[0].to(*_place(decoder))
    decoder_calls, _ = _traced(decoder, latent)

    def make(module: nn.Module, is_encoder: bool, features: int | None = None) -> RateConditioner:
        features = _num_features(module) if features is None else features
        if conditioning == "film":
            return RateFiLM(features, context, _channel_dim(module), init=init)
        activation = encoder_activation if is_encoder else decoder_activation
        return RateGate(features, context, _channel_dim(module), activation, init)

    planner = _Planner(make, layout, lambda name: _selected(name, include, exclude))
    needs_heads = log_variance == "add" or not gate_heads or layout != "paper"
    heads = [] if hierarchical else _heads(encoder_calls, posterior, needs_heads)
    planner.gate(encoder_calls, [] if gate_heads and layout == "paper" else heads, is_encoder=True)
    planner.gate(decoder_calls, _untouched_decoder_layers(decoder_calls, layout, gate_output), is_encoder=False)
    if log_variance == "add" and planner.selected(heads[1].name):
        planner.shift_log_variance(heads[0].module, heads[1].module, context)
    if layout == "table1":
        planner.condition_batch_norms(context, init)
    if not planner.places:
        raise ValueError(
            "no layer matched: convert_to_multirate gates Linear, Conv1-3d and ConvTranspose1-3d layers that the "
            f"forward pass runs through; include={list(include)}, exclude={list(exclude)}."
        )
    _warn(encoder, decoder, planner.before_norm if one_beta_per_batch else [], planner.cancelled)
    names = {module: name for name, module in nn.ModuleDict({"encoder": encoder, "decoder": decoder}).named_modules()}
    for module, conditioner in planner.places.items():
        _attach(module, conditioner)
    return [names[module] for module in planner.places]


def _untouched_decoder_layers(calls: list[_Call], layout: Layout, gate_output: bool) -> list[_Call]:
    layers = [call for call in calls if isinstance(call.module, _GATEABLE)]
    untouched = [] if gate_output else layers[-1:]
    if layout != "paper":
        untouched += [call for call in layers[:1] if isinstance(call.module, nn.Linear)]
    return untouched


def _warn(encoder: nn.Module, decoder: nn.Module, before_norm: list[str], cancelled: list[str]) -> None:
    for side, network in (("encoder", encoder), ("decoder", decoder)):
        names = [name or side for name, module in network.named_modules() if isinstance(module, _UNMATCHED)]
        if names:
            warnings.warn(
                f"recurrent and attention layers are not gated: {', '.join(names)} of the {side} stay the same for "
                "every beta.",
                stacklevel=3,
            )
    if cancelled:
        warnings.warn(
            f"an InstanceNorm (or a GroupNorm of single channels) follows the gates of {', '.join(cancelled)} and "
            "divides them out again: use layout='public' (gate after the norm).",
            stacklevel=3,
        )
    if before_norm:
        warnings.warn(
            f"a BatchNorm follows the gates of {', '.join(before_norm)}: with one beta per batch it divides them out "
            "again. Use layout='public' (gate after the norm) or one beta per sample.",
            stacklevel=3,
        )
