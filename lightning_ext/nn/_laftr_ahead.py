"""Distances of chains of linear layers and ReLUs, with the reference run on the inputs of several draws at once."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext.functional import output_divergence, sequential_layers
from lightning_ext.nn._laftr_network import Heads, grown, outside_inference

MOST_DRAWS, MOST_BYTES = 128, 2**23
Address = tuple[int, ...]  # of a draw: its stream, and the position in it
_Watched = tuple[Sequence[str], Sequence[str]]  # a part, by the names that lead to it, and which attributes hold items
_Place = tuple[int, str, str]  # which of these parts, "_parameters" or "_buffers", the name there
_Pair = tuple[Tensor, Tensor | None]
_LEAVES = frozenset({nn.Linear, nn.ReLU, nn.Dropout, nn.Identity})  # none of their attributes makes another chain
_PLAIN = frozenset({bool, int, float, str, type(None)})
_BESIDE = frozenset(vars(nn.Module())) - {
    "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters",
}  # fmt: skip


class Rows(NamedTuple):
    """Inputs ``(n, S, *shape)`` of n draws, weights ``(S,)``; gates ``(n, S, *units)``, or none for the reference's."""

    x: Tensor
    weights: Tensor
    gates: Sequence[Tensor] = ()


Draw = Callable[[nn.Module, Sequence[Address]], Rows]


class _Block(NamedTuple):
    """Neighbouring draws of a stream, by address: inputs, gates and the divergence from the reference's outputs."""

    places: Mapping[Address, int]
    inputs: Sequence[Tensor]
    gates: Sequence[Sequence[Tensor]]
    divergences: Sequence[Callable[[Tensor], Tensor]]


class DrawnChain:
    """Distances from one reference of networks that are chains, without running the module itself.

    The chain is found by a run of the module, anew for each block of draws and whenever a part that took part in it
    looks different. Nothing is kept in copies and pickles.
    """

    def __init__(self) -> None:
        self._watched: list[_Watched] = [((), ())]
        self._look: list[object] | None = None
        self._settings: tuple[object, ...] = ()
        self._held: object = None
        self._layers: list[tuple[str, str | None]] = []
        self._places: list[tuple[_Place, _Place | None]] = []
        self._reference: list[_Pair] = []
        self._block: _Block | None = None
        self._refused = False

    def __reduce__(self) -> tuple[type["DrawnChain"], tuple[()]]:
        return DrawnChain, ()

    def distance(self, host: Any, module: nn.Module, draw: Draw, address: Address) -> Tensor | None:
        """The distance with the draw at an address; None where the module has to be run.

        Args:
            host: the estimator that holds the reference.
            module: the network.
            draw: what is drawn at some addresses, in the type and on the device of the module's parameters.
            address: of the draw; what stands before the first position of a stream is not drawn ahead.
        """
        if self._refused or address[-1] < 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # what is worked out within a transform is no good outside of it
        if torch.is_inference_mode_enabled():
            with outside_inference():
                return self.distance(host, module, draw, address)
        settings = (host.divergence, host.num_samples, host.seed, repr(host.heads))
        if self._held is not host._reference or self._settings != settings:
            self._held, self._settings, self._block = host._reference, settings, None
        parts, look = appearance(module, self._watched)
        block = self._block
        known = block is not None and address in block.places and look == self._look
        pairs = self._current(parts) if known else None
        if pairs is None:
            changed, self._look = look != self._look, None
            self._refused = not self._prepare(host, module, draw, address, changed=changed)
            if self._refused:
                return None
            parts, self._look = appearance(module, self._watched)
            block, pairs = self._block, self._current(parts)
        if pairs is None or block is None:
            return None
        kind, number = pairs[0][0].device.type, block.places[address]
        full = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        with full:
            h = block.inputs[number]
            for (weight, bias), gate in zip(pairs[:-1], block.gates[number], strict=True):
                h = F.linear(h, weight, bias).mul_(gate)
            return block.divergences[number](F.linear(h, *pairs[-1]))

    def _current(self, parts: Sequence[nn.Module]) -> list[_Pair] | None:
        """Weights and biases as they are, cut to the reference's shapes; None if one of them does not fit."""
        pairs: list[_Pair] = []
        for (place, offset), (kept, kept_offset) in zip(self._places, self._reference, strict=True):
            weight = _cut(parts, place, kept)
            bias = None if offset is None or kept_offset is None else _cut(parts, offset, kept_offset)
            if weight is None or (bias is None) != (kept_offset is None):
                return None
            pairs.append((weight, bias))
        return pairs

    @torch.no_grad()
    def _prepare(self, host: Any, module: nn.Module, draw: Draw, address: Address, *, changed: bool) -> bool:
        """Find the chain, and run the reference where it was not run; whether this can be done."""
        with host._quiet(module):
            host._require_same(module)
            rows = draw(module, [address])
            x, values = rows.x[0, :8], host.reference_values(module)
            layers, called = _layers(host, module, x)
            if len(layers) < 2 or any(name is not None and name not in values for names in layers for name in names):
                return False
            if (changed or layers != self._layers) and not _behaves(host, module, layers, x):
                return False
            self._find(module, called, [[host.values_of(module)[name] for name in names if name] for names in layers])
            reference = [(values[weight], None if bias is None else values[bias]) for weight, bias in layers]
            if any(weight.dtype != rows.x.dtype for weight, _ in reference):
                return False
            block, same = self._block, self._layers == layers and self._reference[0][0].dtype == rows.x.dtype
            if not same or block is None or address not in block.places:
                self._block, self._layers, self._reference = None, layers, reference
                width = sum(weight.shape[0] + weight.shape[1] for weight, _ in reference)
                most = MOST_BYTES // (rows.x.element_size() * rows.x.shape[1] * width)
                if most < 2:  # then it is the products that take the time
                    return False
                together = [(*address[:-1], number) for number in block_of(address[-1], min(MOST_DRAWS, most))]
                self._block = self._run(host, together, draw(module, together))
        return self._block is not None

    def _find(self, module: nn.Module, called: set[int], layers: Sequence[Sequence[Tensor]]) -> None:
        """Where the weights and biases are, and which parts took part."""
        places: dict[int, _Place] = {}
        wanted = {id(tensor) for layer in layers for tensor in layer}
        held_by: dict[str, dict[int, tuple[str, str]]] = {}
        parts = dict(module.named_modules())
        for name, part in parts.items():
            held = {
                id(tensor): (kind, key)
                for kind in ("_parameters", "_buffers")
                for key, tensor in getattr(part, kind).items()
                if id(tensor) in wanted
            }
            if not name or held or id(part) in called or type(part) in (nn.ModuleList, nn.ModuleDict):
                held_by[name] = held
                for end in (place for place, letter in enumerate(name) if letter == "."):
                    held_by.setdefault(name[:end], {})  # what holds it may hold other parts tomorrow
        self._watched = []
        for number, (name, held) in enumerate(held_by.items()):
            self._watched.append((name.split(".") if name else (), holders_of(parts[name])))
            places = {tensor: (number, *where) for tensor, where in held.items()} | places
        found = [[places[id(tensor)] for tensor in layer] for layer in layers]
        self._places = [(layer[0], layer[1] if len(layer) > 1 else None) for layer in found]

    def _run(self, host: Any, addresses: Sequence[Address], rows: Rows) -> _Block | None:
        """The reference on several draws; None where its outputs are not finite."""
        shape = rows.x.shape[:2]
        h, gates = rows.x.flatten(0, 1).flatten(1), []
        for number, (weight, bias) in enumerate(self._reference[:-1]):
            h = F.linear(h, weight, bias)
            if rows.gates:
                gate = rows.gates[number].reshape(h.shape)
                h.mul_(gate)
            else:
                gate = h.relu_().sign()
            gates.append(gate.view(*shape, -1).unbind())
        old = F.linear(h, *self._reference[-1]).view(*shape, -1)
        output_divergence(old[0], old[0], host.divergence, host.heads, rows.weights)  # refuses what it cannot compare
        if not bool(old.isfinite().all()):
            return None
        divergences = _divergences(old, host.divergence, host.heads, rows.weights)
        places = {address: number for number, address in enumerate(addresses)}
        return _Block(places, rows.x.flatten(2).unbind(), list(zip(*gates, strict=True)), divergences)


def appearance(module: nn.Module, watched: Sequence[_Watched]) -> tuple[list[nn.Module], list[object]]:
    """Some parts of a module, and what is another list when one of them has another attribute, part or hook.

    Or another item in an attribute that is a short list or dictionary; long ones are what a training collects.
    """
    parts: list[nn.Module] = []
    look: list[object] = []
    for path, holders in watched:
        part: nn.Module | None = module
        for name in path:
            part = part._modules.get(name) if part is not None else None
        if part is None:
            return [], []
        parts.append(part)
        held = part.__dict__
        look.append(type(part))
        look.append(len(held))
        if type(part) not in _LEAVES or "forward" in held:
            look += map(_mark, held.values())
        for name in holders:
            items = held.get(name)
            if items and len(items) <= 32:
                if isinstance(items, dict):
                    look += items
                    items = items.values()
                look += map(_mark, items)
    return parts, look


def _mark(value: object) -> object:
    """What tells it from another: ids of numbers are used again, and tensors come and go with the steps."""
    kind = type(value)
    return value if kind in _PLAIN else 0 if kind is Tensor else id(value)


def holders_of(part: nn.Module) -> list[str]:
    """The attributes that are lists or dictionaries, but for what PyTorch keeps of a part besides."""
    return [k for k, v in part.__dict__.items() if isinstance(v, (dict, list)) and k not in _BESIDE]


def block_of(position: int, most: int) -> range:
    """The draws that are made together with one: one, one, two, four, ..., then always as many, at most ``most``.

    They depend on nothing else, so that a stream that is entered anywhere gives the same numbers.
    """
    most = 1 << (most.bit_length() - 1)
    size = min(most, 1 << (position.bit_length() - 1)) if position else 1
    first = position // size * size
    return range(first, first + size)


def _layers(host: Any, module: nn.Module, x: Tensor) -> tuple[list[tuple[str, str | None]], set[int]]:
    """The chain's weights and biases by name, none where the module is no chain; and the parts that were called."""
    called: set[int] = set()

    def run(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        outputs: Tensor = host.run(module, values, x)
        return outputs

    # what is wrong with it is said where it is run in earnest
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        for part in module.modules():
            stack.callback(part.register_forward_pre_hook(lambda part, _: called.add(id(part))).remove)
        return sequential_layers(run, host.values_of(module), x), called
    return [], called


def _behaves(host: Any, module: nn.Module, layers: Sequence[tuple[str, str | None]], x: Tensor) -> bool:
    """Whether the module's outputs and gradients are those of its chain: a forward may cut gradients off."""
    now = host.values_of(module)
    values = {
        name: now[name].detach().clone().requires_grad_() for names in layers for name in names if name is not None
    }
    pairs = [(values[weight], None if bias is None else values[bias]) for weight, bias in layers]
    with contextlib.suppress(Exception), torch.enable_grad():
        outputs, h = host.run(module, values, x), x.flatten(1)
        for weight, bias in pairs[:-1]:
            h = F.linear(h, weight, bias).relu()
        expected = F.linear(h, *pairs[-1])
        if outputs.shape != expected.shape:
            return False
        cotangent = torch.linspace(-1, 2, outputs.numel(), dtype=x.dtype, device=x.device).view_as(outputs)
        inputs = list(values.values())
        found = [outputs, *torch.autograd.grad(outputs, inputs, cotangent, allow_unused=True)]
        wanted = [expected, *torch.autograd.grad(expected, inputs, cotangent)]
        rounding = 1e3 * torch.finfo(x.dtype).eps
        return all(
            a is not None and bool(torch.linalg.vector_norm(a - b) <= rounding * torch.linalg.vector_norm(b))
            for a, b in zip(found, wanted, strict=True)
        )
    return False


def _cut(parts: Sequence[nn.Module], place: _Place, kept: Tensor) -> Tensor | None:
    number, kind, name = place
    now: Tensor | None = getattr(parts[number], kind).get(name)
    if now is None or now.dtype != kept.dtype or now.device != kept.device:
        return None
    if now.shape == kept.shape:
        return now
    return now[: len(kept)] if grown(kept.shape, now.shape) else None


def _divergences(
    old: Tensor, divergence: str, heads: Heads | None, weights: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """``output_divergence`` from each of ``(n, S, C)`` finite outputs; what new ones do not change is done here."""
    if divergence != "kl":
        return [partial(_any, old=z, divergence=divergence, heads=heads, weights=weights) for z in old]
    wide = old.to(torch.promote_types(old.dtype, torch.float32))
    log_p = (wide if heads is None else wide[..., heads]).mT.contiguous().log_softmax(1)
    p = (log_p.exp() * weights.to(log_p)).flatten(1)
    return [partial(_kl, log_p=a, p=b, heads=heads) for a, b in zip(log_p, p, strict=True)]


def _any(new: Tensor, *, old: Tensor, divergence: str, heads: Heads | None, weights: Tensor) -> Tensor:
    return output_divergence(new, old, divergence, heads, weights)


def _kl(new: Tensor, *, log_p: Tensor, p: Tensor, heads: Heads | None) -> Tensor:
    new = new.to(log_p.dtype)
    # classes first: log_softmax along a short last dimension is several times slower
    log_q = (new if heads is None else new[..., heads]).mT.log_softmax(0)
    return torch.dot(p, (log_p - log_q).reshape(-1))
