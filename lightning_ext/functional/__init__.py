"""Pure mathematics: tensors in, tensors out; imports torch only."""

from lightning_ext.functional.mrvae_linear import (
    LinearOptimum,
    best_response,
    linear_vae_optimum,
    linear_vae_terms,
    reverse_waterfilling,
)
from lightning_ext.functional.mrvae_linear_gates import GatedLinear, LinearGates, joint_exact_gates, theorem1_gates

__all__ = [
    "GatedLinear",
    "LinearGates",
    "LinearOptimum",
    "best_response",
    "joint_exact_gates",
    "linear_vae_optimum",
    "linear_vae_terms",
    "reverse_waterfilling",
    "theorem1_gates",
]
