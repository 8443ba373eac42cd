"""One block of an APO preconditioner: the parameters it covers, its factors, and what a step does with them."""

from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional.apo_preconditioner import (
    apply_preconditioner,
    multiplicative_meta_step,
    preconditioner_gradients,
    rotate_gradient,
)

_SHRINKAGE = 0.5**0.5  # of S at a rejected meta-step: half the learning rate
_HALF = (torch.float16, torch.bfloat16)
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what must neither underflow nor stop moving: scales, norms and moments."""
    return torch.promote_types(dtype, torch.float32)


def has_gradient(p: Tensor) -> bool:
    """Whether there is anything to step along."""
    return p.grad is not None and p.numel() > 0


def _dense_gradient(p: Tensor) -> Tensor:
    if p.grad is None or p.grad.layout != torch.strided:
        raise RuntimeError(
            f"APOPreconditioner does not support sparse gradients; a parameter of shape {tuple(p.shape)} has one. Use "
            "nn.Embedding(..., sparse=False)."
        )
    return p.grad


class Prepared:
    r"""The factors of a block made ready for many steps, while they stay what they are.

    They are brought to the dtype of the products, and those of a Kronecker block are multiplied out,
    :math:`s^2 BB^\top` and :math:`AA^\top`. For a side of d that costs :math:`d^3` per meta-step and saves
    :math:`d^2 \cdot \text{other}` per step, so a side much wider than the other one is left as it is.
    """

    def __init__(
        self, factors: tuple[Tensor | None, Tensor | None, Tensor], dtype: torch.dtype, every_n_steps: int
    ) -> None:
        self._factors = factors
        self._versions = _versions(factors)
        (A, B), S = _in_dtype(factors[:2], dtype), factors[2]
        self._working = (A, B, S)
        self._left: tuple[Tensor, ...] = ()
        self._right: tuple[Tensor, ...] = ()
        self._scale = S.square()
        if S.ndim == 0 and factors[0] is not None and factors[1] is not None:
            (A, size_a), (B, size_b) = _normalised(factors[0], dtype), _normalised(factors[1], dtype)
            self._scale = self._scale * (size_a * size_b).square()
            self._right = self._side(A, len(B), every_n_steps)
            self._left = self._side(B, len(A), every_n_steps)
            if dtype not in _HALF:  # one product less per step; in 16 bits the scale waits for the result
                self._left = ((self._left[0] * self._scale).to(dtype), *self._left[1:])
                self._scale = torch.ones_like(self._scale)

    @staticmethod
    def _side(factor: Tensor, other: int, every_n_steps: int) -> tuple[Tensor, ...]:
        if factor.ndim == 1:
            return (factor.square(),)
        return (factor, factor.mT) if len(factor) > every_n_steps * other else (factor @ factor.mT,)

    def made_from(self, factors: tuple[Tensor | None, Tensor | None, Tensor]) -> bool:
        """Whether these factors, with the values they have now, are the ones that were prepared."""
        same = all(old is new for old, new in zip(self._factors, factors, strict=True))
        return same and self._versions == _versions(factors)

    def __call__(self, gradient: Tensor) -> Tensor:
        """Precondition a gradient matrix."""
        if not self._left:
            return apply_preconditioner(gradient, *self._working)
        for factor in self._right:
            gradient = gradient @ factor if factor.ndim == 2 else gradient * factor
        for factor in reversed(self._left):
            gradient = factor @ gradient if factor.ndim == 2 else factor[:, None] * gradient
        return (gradient * self._scale).to(gradient.dtype) if gradient.dtype in _HALF else gradient


def _normalised(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In 16 bits a factor of the size of the identity, and what it was divided by: the two may drift apart."""
    size = torch.linalg.vector_norm(factor) / len(factor) ** 0.5
    if dtype not in _HALF:
        return factor.to(dtype), torch.ones_like(size)
    return (factor / size).to(dtype), size


def _versions(factors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(-1 if factor is None else factor._version for factor in factors)


def _in_dtype(factors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if factor is None else factor.to(dtype) for factor in factors]


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
        self._rotated: Tensor | None = None
        if "S" not in state:
            state.update(self._identity())

    @staticmethod
    def factor_shapes(weight: Tensor, bias: Tensor | None, structure: str, max_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors of a parameter."""
        if structure == "diag":
            return {"S": tuple(weight.shape)}
        out, rest = len(weight), weight[0].numel() + (bias is not None)
        shapes: dict[str, tuple[int, ...]] = {"S": () if structure == "kron" else (out, rest)}
        for name, width in (("A", rest), ("B", out)):
            if width <= max_dim:
                shapes[name] = (width, width)
            elif structure == "kron":  # a scale of shape (out, in) holds any diagonal factor already
                shapes[name] = (width,)
        return shapes

    def _identity(self) -> dict[str, Any]:
        options: dict[str, Any] = {"dtype": at_least_single(self._dtype), "device": self.weight.device}
        state: dict[str, Any] = {}
        shapes = self.factor_shapes(self.weight, self.bias, self.structure, self.group["max_dim"])
        for name, shape in shapes.items():
            square = name != "S" and len(shape) == 2
            state[name] = torch.eye(shape[0], **options) if square else torch.ones(shape, **options)
        if self.group["meta_update"] == "multiplicative":
            state["norms"] = torch.zeros(3, **options)
        return state

    @property
    def _factors(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        return self.state.get("A"), self.state.get("B"), self.state["S"]

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
        matrix = (torch.zeros_like(self.weight) if weight is None else weight).reshape(len(self.weight), -1)
        if self.bias is not None:
            bias = by_id.get(id(self.bias))
            matrix = torch.cat([matrix, (torch.zeros_like(self.bias) if bias is None else bias)[:, None]], 1)
        return matrix.to(self._dtype)

    def _parts(self, matrix: Tensor) -> list[Tensor]:
        """Undo :meth:`_matrix`."""
        if self.structure == "diag":
            return [matrix]
        weight = matrix if self.bias is None else matrix[:, :-1]
        parts = [weight.reshape(p.shape) if p is self.weight else matrix[:, -1] for p in self.params]
        # 16-bit numbers are added with another rounding where they are strided.
        return [part.contiguous() for part in parts] if matrix.dtype in _HALF else parts

    def precondition(self, values: list[Tensor], cache: dict[Tensor, Prepared]) -> list[Tensor]:
        """Apply the preconditioner to one value per live parameter."""
        if self.weight not in cache or not cache[self.weight].made_from(self._factors):
            cache[self.weight] = Prepared(self._factors, self._dtype, self.group["every_n_steps"])
        return self._parts(cache[self.weight](self._matrix(values)))

    def look_ahead(self, values: list[Tensor]) -> list[Tensor]:
        """Apply the preconditioner, and keep the rotated gradient for the meta-step."""
        A, B = _in_dtype(self._factors[:2], self._dtype)
        gradient = self._matrix(values)
        self._rotated = rotate_gradient(gradient, A, B)
        return self._parts(apply_preconditioner(gradient, A, B, self.state["S"], rotated=self._rotated))

    def shrink(self) -> None:
        """Halve the preconditioner."""
        self._rotated = None
        if self.group["meta_lr"] > 0:
            self.state["S"].mul_(_SHRINKAGE)

    def meta_step(self, values: list[Tensor], cotangents: list[Tensor]) -> None:
        """Update the factors by the gradient of the objective at the look-ahead point."""
        rotated, self._rotated = self._rotated, None
        if self.group["meta_lr"] == 0:
            return
        if self.group["meta_update"] == "adam":
            self._adam_step(self._matrix(values), self._matrix(cotangents))
        elif rotated is not None:
            self._multiplicative_step(rotated, self._matrix(cotangents))

    def _multiplicative_step(self, M: Tensor, cotangent: Tensor) -> None:
        A, B, S = self._factors
        N = rotate_gradient(cotangent, *_in_dtype((A, B), cotangent.dtype))
        magnitude: float | Tensor = 1.0
        if M.dtype in _HALF:  # products of two gradients underflow
            size_m, size_n = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (M, N))
            tiny = torch.finfo(torch.float32).tiny
            M, N = ((x / size.clamp_min(tiny)).to(x.dtype) for x, size in ((M, size_m), (N, size_n)))
            magnitude = size_m * size_n
        step = multiplicative_meta_step(M, N, A, B, S, self.state["norms"], self.group["meta_lr"], magnitude=magnitude)
        self.state.update({name: value for name, value in step._asdict().items() if value is not None})

    def _adam_step(self, gradient: Tensor, cotangent: Tensor) -> None:
        wide = at_least_single(gradient.dtype)
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
