"""Pure mathematics: tensors in, tensors out; imports torch only."""

from lightning_ext.functional.mrvae_curve import (
    active_units,
    beta_for_distortion,
    beta_for_rate,
    hypervolume,
    pareto_front,
    rate_at,
    rate_distortion_auc,
    slope_error,
)
from lightning_ext.functional.mrvae_linear import (
    LinearOptimum,
    best_response,
    linear_vae_optimum,
    linear_vae_terms,
    reverse_waterfilling,
)
from lightning_ext.functional.mrvae_linear_gates import GatedLinear, LinearGates, joint_exact_gates, theorem1_gates
from lightning_ext.functional.mrvae_moments import (
    MIGResult,
    merge_moments,
    moments_variance,
    mutual_information_gap,
    update_moments,
)

__all__ = [
    "GatedLinear",
    "LinearGates",
    "LinearOptimum",
    "MIGResult",
    "active_units",
    "best_response",
    "beta_for_distortion",
    "beta_for_rate",
    "hypervolume",
    "joint_exact_gates",
    "linear_vae_optimum",
    "linear_vae_terms",
    "merge_moments",
    "moments_variance",
    "mutual_information_gap",
    "pareto_front",
    "rate_at",
    "rate_distortion_auc",
    "reverse_waterfilling",
    "slope_error",
    "theorem1_gates",
    "update_moments",
]
