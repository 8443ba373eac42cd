"""What estimators of function-space distance need of a network, its batches and its heads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ext.functional import Substitution

Heads = slice | Tensor | Sequence[int]
Reduce = Callable[[Tensor], Tensor]


@contextmanager
def outside_inference() -> Iterator[None]:
    """What is worked out in inference mode and kept could not be differentiated through later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def own_buffers(module: nn.Module) -> Iterator[set[str]]:
    """Let the module work on copies of its buffers; their plain names."""
    held = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    held = [(part, name, buffer) for part, name, buffer in held if buffer is not None]
    copies = {id(buffer): buffer.clone() for _, _, buffer in held}  # type: ignore[union-attr]
    for part, name, buffer in held:
        part._buffers[name] = copies[id(buffer)]
    try:
        yield {plain_name(name) for name, _ in module.named_buffers()}
    finally:
        for part, name, buffer in held:
            part._buffers[name] = buffer


@contextmanager
def unmoved(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put torch's random state back; what is given says whether it has moved so far."""
    devices = [device] if device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    with torch.random.fork_rng(devices):
        before = states()
        yield lambda: not all(map(torch.equal, before, states()))


def plain_name(name: str) -> str:
    """The name of a parameter, whether the part that holds it is compiled or not."""
    return name.replace("_orig_mod.", "")


def named_values(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their plain names; a tied one by its first."""
    return Substitution(module, plain_name).values()


def weight_of(module: nn.Module) -> Tensor:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError("the module has no floating-point parameter.")


def grown(kept: torch.Size, now: torch.Size) -> bool:
    return kept == now or (len(kept) == len(now) > 0 and kept[1:] == now[1:] and kept[0] < now[0])


def widened(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def require_batches(found: bool, module: nn.Module, reduce: Reduce | None) -> None:
    """Refuse on all ranks alike if one of them has no data: the others would wait for it."""
    counts = torch.tensor([float(found), 1.0], device=weight_of(module).device)
    having, ranks = (counts if reduce is None else reduce(counts)).long().tolist()
    if not having:
        raise ValueError("batches holds no batch: give a loader, or a list of batches.")
    if having < ranks:
        raise ValueError(f"{ranks - having} of {ranks} ranks have no batch: each needs a share of the data.")


def own_rank(reduce: Reduce | None) -> int:
    """Which of the ranks this is that take part in a fit."""
    return dist.get_rank() if reduce is not None and dist.is_initialized() else 0


def plain_heads(heads: Heads | None) -> Any:
    if heads is None:
        return None
    if isinstance(heads, slice):
        return {"slice": [heads.start, heads.stop, heads.step]}
    try:
        places = torch.as_tensor(heads)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"heads must be a slice, or a list of the outputs that count; got {heads!r}.") from error
    if places.ndim != 1 or places.is_floating_point() or not len(places):
        raise ValueError(f"heads must be a slice, or a list of the outputs that count; got {heads!r}.")
    found: list[int] = (places.nonzero().flatten() if places.dtype == torch.bool else places).tolist()
    return found


def require_heads(heads: Heads | None, outputs: int) -> None:
    """Refuse a choice of outputs that the network does not have, or of none."""
    if heads is None:
        return
    if isinstance(heads, slice):
        chosen: Sequence[int] = range(outputs)[heads]
    else:
        chosen = plain_heads(heads)
    if not len(chosen) or not all(-outputs <= place < outputs for place in chosen):
        raise ValueError(f"heads must choose at least one of {outputs} outputs, and none beyond them; got {heads!r}.")


def entry_of(batch: Any, chosen: str | Callable[[Any], Any] | None, place: int, argument: str) -> Any:
    if callable(chosen):
        return chosen(batch)
    if chosen is None and place == 0 and isinstance(batch, Tensor):
        return batch
    key: Any = place if chosen is None else chosen
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"a {type(batch).__name__} has no entry {key!r}: say with {argument}= where the network's {argument} are, "
            "by a key or a function of the batch."
        ) from error
