"""One block of an APO preconditioner: the parameters it covers, its factors, and what a step does with them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext.functional.apo_preconditioner import (
    KroneckerStep,
    MetaStep,
    apply_preconditioner,
    kronecker_meta_step,
    multiplicative_meta_step,
    multiply_left,
    multiply_right,
    preconditioner_gradients,
    rotate_gradient,
)

_SHRINKAGE = 0.5**0.5  # of S at a rejected meta-step: half the learning rate
_HALF = (torch.float16, torch.bfloat16)
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8
# Products a column wider than this run up to 40 % slower than products that are a whole multiple wide.
_COLUMNS = 8


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what must neither underflow nor stop moving: scales, norms and moments."""
    return torch.promote_types(dtype, torch.float32)


def has_gradient(p: Tensor) -> bool:
    """Whether there is anything to step along; a frozen parameter may have an old gradient left."""
    return p.requires_grad and p.grad is not None and p.numel() > 0


def _dense_gradient(p: Tensor) -> Tensor:
    if p.grad is None or p.grad.layout != torch.strided:
        raise RuntimeError(
            f"APOPreconditioner does not support sparse gradients; a parameter of shape {tuple(p.shape)} has one. Use "
            "nn.Embedding(..., sparse=False)."
        )
    return p.grad


Factors = tuple[Tensor | None, Tensor | None, Tensor]


class Prepared:
    """What a block multiplies gradients with, in the dtype of the products, kept while the factors stay the same."""

    def __init__(self, factors: Factors, dtype: torch.dtype, padding: int) -> None:
        self._factors = factors
        self._versions = _versions(factors)
        A, B, self._scale = _padded(factors, padding)
        self._sides = _in_dtype((A, B), dtype)

    def made_from(self, factors: Factors) -> bool:
        """Whether these factors, with the values they have now, are the ones that were prepared."""
        same = all(old is new for old, new in zip(self._factors, factors, strict=True))
        return same and self._versions == _versions(factors)

    def __call__(self, gradient: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Precondition a gradient matrix; with it, what a meta-step need not calculate again."""
        A, B = self._sides
        rotated = rotate_gradient(gradient, A, B)
        return apply_preconditioner(gradient, A, B, self._scale, rotated=rotated), (rotated,)


class PreparedKronecker(Prepared):
    """The two sides of a Kronecker block."""

    def __call__(self, gradient: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Precondition a gradient matrix; with it, the two products as they are without the scale."""
        AA, BB = self._sides
        left = multiply_left(BB, gradient)
        both = multiply_right(left, AA)
        return (both * self._scale.square()).to(both.dtype), (left, both)


def _length(step: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(step, dtype=at_least_single(step.dtype))
    return length


def _size(side: Tensor) -> Tensor:
    """1 for the identity."""
    size: Tensor = torch.linalg.vector_norm(side) / len(side) ** 0.5
    return size


def _of_unit_size(
    first: tuple[Tensor, ...], second: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], float | Tensor]:
    """In 16 bits products of two gradients underflow: divide each group by the norm of its first, and return both's."""
    if first[0].dtype not in _HALF:
        return first, second, 1.0
    norms = [torch.linalg.vector_norm(group[0], dtype=torch.float32) for group in (first, second)]
    tiny = torch.finfo(torch.float32).tiny
    scaled = [
        tuple((x / norm.clamp_min(tiny)).to(x.dtype) for x in group)
        for group, norm in zip((first, second), norms, strict=True)
    ]
    return scaled[0], scaled[1], norms[0] * norms[1]


def _versions(factors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(-1 if factor is None else factor._version for factor in factors)


def _in_dtype(factors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if factor is None else factor.to(dtype) for factor in factors]


def _padded(factors: Factors, padding: int) -> Factors:
    """Append columns of zeros to the matrix, which change nothing: zeros at the end of A's axes and of S's second."""
    A, B, S = factors
    if padding == 0:
        return factors
    A = A if A is None else F.pad(A, (0, padding) * A.ndim)
    return A, B, F.pad(S, (0, padding)) if S.ndim else S


def _cropped(side: Tensor, width: int) -> Tensor:
    return side if len(side) == width else side[(slice(width),) * side.ndim].clone()


class Block:
    """A weight with the bias that shares its preconditioner, or a parameter of its own.

    Args:
        weight: parameter whose state holds the factors.
        bias: parameter that is the last input column of the weight's matrix, or ``None``.
        structure: ``"kron"``, ``"ekfac"`` or ``"diag"``.
        group: options.
        state: state of the weight; filled with identity factors where it is empty.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, structure: str, group: dict[str, Any], state: dict[str, Any]
    ) -> None:
        self.weight, self.bias, self.structure, self.group, self.state = weight, bias, structure, group, state
        self.params = [p for p in (weight, bias) if p is not None and has_gradient(p)]
        self.gradients = [_dense_gradient(p) for p in self.params]
        self._squared = structure == "kron" and group["meta_update"] == "multiplicative"
        self._kept: tuple[Tensor, ...] = ()
        self._length: Tensor | None = None
        if "S" not in state:
            state.update(self._identity())

    @staticmethod
    def factor_shapes(
        weight: Tensor, bias: Tensor | None, structure: str, group: dict[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors of a parameter."""
        if structure == "diag":
            return {"S": tuple(weight.shape)}
        out, rest = len(weight), weight[0].numel() + (bias is not None)
        shapes: dict[str, tuple[int, ...]] = {"S": () if structure == "kron" else (out, rest)}
        squared = structure == "kron" and group["meta_update"] == "multiplicative"
        for name, width in (("AA" if squared else "A", rest), ("BB" if squared else "B", out)):
            if width <= group["max_dim"]:
                shapes[name] = (width, width)
            elif structure == "kron":  # a scale of shape (out, in) holds any diagonal factor already
                shapes[name] = (width,)
        return shapes

    def _identity(self) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": at_least_single(self._dtype), "device": self.weight.device}
        state: dict[str, Any] = {}
        shapes = self.factor_shapes(self.weight, self.bias, self.structure, self.group)
        for name, shape in shapes.items():
            square = name != "S" and len(shape) == 2
            state[name] = torch.eye(shape[0], **options) if square else torch.ones(shape, **options)
        if self.group["meta_update"] == "multiplicative":
            state["norms"] = torch.zeros(3, **options)
        return state

    @property
    def _factors(self) -> Factors:
        names = ("AA", "BB") if self._squared else ("A", "B")
        return self.state.get(names[0]), self.state.get(names[1]), self.state["S"]

    @property
    def _width(self) -> int:
        return self.weight[0].numel() + (self.bias is not None)

    @property
    def _padding(self) -> int:
        return 0 if self.structure == "diag" else -self._width % _COLUMNS

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the products; what is accumulated has at least 32 bits."""
        name = self.group["precond_dtype"]
        dtype: torch.dtype = getattr(torch, name) if name else self.weight.dtype
        return dtype

    def _matrix(self, values: list[Tensor]) -> Tensor:
        """Arrange one value per live parameter as the matrix that the factors multiply."""
        if self.structure == "diag":
            return values[0].to(self._dtype)
        by_id = {id(p): value for p, value in zip(self.params, values, strict=True)}
        weight = by_id.get(id(self.weight))
        parts = [(torch.zeros_like(self.weight) if weight is None else weight).reshape(len(self.weight), -1)]
        if self.bias is not None:
            bias = by_id.get(id(self.bias))
            parts.append((torch.zeros_like(self.bias) if bias is None else bias)[:, None])
        if self._padding:
            parts.append(parts[0].new_zeros(len(self.weight), self._padding))
        return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).to(self._dtype)

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`_matrix`."""
        if self.structure == "diag":
            return [matrix]
        width = self.weight[0].numel()
        parts = [matrix[:, :width].reshape(p.shape) if p is self.weight else matrix[:, width] for p in self.params]
        # 16-bit numbers are added with another rounding where they are strided.
        return [part.contiguous() for part in parts] if matrix.dtype in _HALF else parts

    def precondition(self, values: list[Tensor], cache: dict[Tensor, Prepared], *, keep: bool = False) -> list[Tensor]:
        """Apply the preconditioner to one value per live parameter; ``keep`` the products for the meta-step."""
        matrix = self._matrix(values)
        result, products = self._prepared(cache)(matrix)
        if keep:
            self._kept = (matrix, *products)
            self._length = _length(result)
        else:
            self._shorten(result)
        return self._parts(result)

    def _shorten(self, step: Tensor) -> None:
        """Between meta-steps nothing judges a step: a batch unlike the others could undo the training."""
        limit, measured = self.group["step_limit"], self.state.get("length")
        if limit is None or measured is None:
            return
        ratio = limit * measured / _length(step).clamp_min(torch.finfo(measured.dtype).tiny)
        ratio = torch.where(measured > 0, ratio.clamp_max(1.0), 1.0)  # no gradient then is no measure for now
        step.mul_(ratio.to(step.dtype))

    def _prepared(self, cache: dict[Tensor, Prepared]) -> Prepared:
        if self.weight not in cache or not cache[self.weight].made_from(self._factors):
            kind: type[Prepared] = PreparedKronecker if self._squared else Prepared
            cache[self.weight] = kind(self._factors, self._dtype, self._padding)
        return cache[self.weight]

    @property
    def _learns(self) -> bool:
        return bool(self.group["meta_lr"] > 0 and self.group["lr"] > 0)  # nothing judges what moves nothing

    def shrink(self) -> None:
        """Halve the preconditioner."""
        self._kept = ()
        if self._learns:
            self.state["S"].mul_(_SHRINKAGE)
            if "length" in self.state:
                self.state["length"].mul_(_SHRINKAGE**2)

    def meta_step(self, cotangents: list[Tensor]) -> None:
        """Update the factors by the gradient of the objective at the look-ahead point."""
        (gradient, *products), self._kept = self._kept, ()
        if not self._learns:
            return
        self.state["length"] = self._length
        cotangent = self._matrix(cotangents)
        if self.group["meta_update"] == "adam":
            self._adam_step(gradient, cotangent)
            return
        step: MetaStep | KroneckerStep
        if self._squared:
            step = self._kronecker_step(gradient, cotangent, products)
        else:
            step = self._multiplicative_step(products[0], cotangent)
        self.state.update({name: value for name, value in step._asdict().items() if value is not None})

    def _multiplicative_step(self, M: Tensor, cotangent: Tensor) -> MetaStep:
        A, B, S = _padded(self._factors, self._padding)
        N = rotate_gradient(cotangent, *_in_dtype((A, B), cotangent.dtype))
        (M,), (N,), magnitude = _of_unit_size((M,), (N,))
        A, B, S, norms = multiplicative_meta_step(
            M, N, A, B, S, self.state["norms"], self.group["meta_lr"], magnitude=magnitude
        )
        if self._padding:
            A, S = A if A is None else _cropped(A, self._width), S[:, : self._width].contiguous()
        return MetaStep(A, B, S, norms)

    def _kronecker_step(self, gradient: Tensor, cotangent: Tensor, products: list[Tensor]) -> KroneckerStep:
        AA, BB, S = _padded(self._factors, self._padding)
        assert AA is not None
        assert BB is not None
        (gradient, left, both), (cotangent,), magnitude = _of_unit_size((gradient, *products), (cotangent,))
        AA, BB, S, norms = kronecker_meta_step(
            gradient, cotangent, AA, BB, S, self.state["norms"], self.group["meta_lr"],
            products=(left, both), magnitude=magnitude,
        )  # fmt: skip
        AA = _cropped(AA, self._width)
        # Only the product of all three means anything; left alone the sides shrink for ever, and the scale overflows.
        size_a, size_b = _size(AA), _size(BB)
        size = size_a * size_b
        return KroneckerStep(AA.div_(size_a), BB.div_(size_b), S * size.sqrt(), norms / size)

    def _adam_step(self, gradient: Tensor, cotangent: Tensor) -> None:
        wide = at_least_single(gradient.dtype)
        if self._padding:
            gradient, cotangent = gradient[:, : self._width], cotangent[:, : self._width]
        A, B, S = (None if factor is None else factor.to(wide) for factor in self._factors)
        assert S is not None
        found = preconditioner_gradients(gradient.to(wide) * float(self.group["lr"]), cotangent.to(wide), A, B, S)
        self.state["meta_step"] = count = self.state.get("meta_step", 0) + 1
        for name, slope in found._asdict().items():
            if slope is None:
                continue
            # The paper's scale starts at sqrt(lr), this one at 1.
            unit = self.group["reference_lr"] ** 0.5 if name == "S" else 1.0
            self.state[name].sub_(self._adam_direction(name, slope / unit, count), alpha=self.group["meta_lr"] / unit)

    def _adam_direction(self, name: str, slope: Tensor, count: int) -> Tensor:
        first: Tensor = self.state.setdefault(f"{name}_exp_avg", torch.zeros_like(slope))
        second: Tensor = self.state.setdefault(f"{name}_exp_avg_sq", torch.zeros_like(slope))
        first.lerp_(slope, 1 - _ADAM_BETAS[0])
        second.mul_(_ADAM_BETAS[1]).addcmul_(slope, slope, value=1 - _ADAM_BETAS[1])
        unbiased = (second / (1 - _ADAM_BETAS[1] ** count)).sqrt_().add_(_ADAM_EPS)
        return first / (1 - _ADAM_BETAS[0] ** count) / unbiased
