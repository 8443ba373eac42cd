"""Pure mathematics: tensors in, tensors out; imports torch only."""

from lightning_ext.functional.activation_replay import RecordActivations, ReplayActivations
from lightning_ext.functional.activation_sites import ActivationSite, gates
from lightning_ext.functional.annealed_sampling import (
    AISResult,
    Transition,
    ais_forward,
    ais_reverse,
    hmc_kernel,
    linear_schedule,
    sigmoid_schedule,
)
from lightning_ext.functional.apo import (
    ProximalObjective,
    ProximalStep,
    inner_products,
    rmsprop_log_step,
    secant_log_step,
    sgd_log_step,
    trust_region_weight,
)
from lightning_ext.functional.apo_preconditioner import (
    MetaStep,
    PreconditionerGradients,
    apply_preconditioner,
    multiplicative_meta_step,
    preconditioner_gradients,
    rotate_gradient,
)
from lightning_ext.functional.batches import batch_size, concatenate, differentiable, map_tensors, select, select_traced
from lightning_ext.functional.counter_rng import fold_in, seeded_generator
from lightning_ext.functional.curvature import EmpiricalFisherOperator, GGNOperator, HessianOperator
from lightning_ext.functional.curvature_operator import CurvatureOperator
from lightning_ext.functional.divergences import (
    bernoulli_kl,
    divergence_named,
    mean_squared_error,
    softmax_kl,
    softmax_squared_error,
    squared_error,
)
from lightning_ext.functional.elementwise_losses import BernoulliCrossEntropy, GaussianNLL, PoissonNLL, SquaredError
from lightning_ext.functional.embedding_rows import EmbeddingRows
from lightning_ext.functional.influence import (
    group_scores,
    influence_scores,
    leave_out_step,
    relative_influence,
    self_influence,
)
from lightning_ext.functional.influence_objective import InfluenceObjective, evaluating
from lightning_ext.functional.influence_quality import (
    MislabelResult,
    average_ranks,
    linear_datamodeling_scores,
    mislabel_detection,
    random_subsets,
    row_correlation,
    topk_overlap,
)
from lightning_ext.functional.influence_ranking import keep_largest, ordered_scores
from lightning_ext.functional.influence_response import (
    DataTerm,
    RemovalTerm,
    ResponseObjective,
    ResponseTerms,
    influence_gaps,
    removal_gradients,
    removal_losses,
    response_terms,
    response_terms_and_gradients,
)
from lightning_ext.functional.influence_tracin import tracin_self_influence
from lightning_ext.functional.input_statistics import InputModel, InputStatistics
from lightning_ext.functional.kronecker import KroneckerBlock, KroneckerCurvature, kronecker_curvature
from lightning_ext.functional.kronecker_statistics import KroneckerLayer, KroneckerStatistics
from lightning_ext.functional.krylov import conjugate_gradients
from lightning_ext.functional.laftr import gated_distance, output_divergence
from lightning_ext.functional.laftr_chain import sequential_layers
from lightning_ext.functional.laftr_continual import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from lightning_ext.functional.laftr_hessians import class_hessians
from lightning_ext.functional.laftr_loss import DivergenceLoss
from lightning_ext.functional.laftr_mean_gate import mean_gate_distance, mean_gate_moments
from lightning_ext.functional.laftr_moments import OutputMoments, ReferenceMoments, joint_moments, moment_distance
from lightning_ext.functional.layer_gradients import ExplicitRows, GradientBlock, LayerGradients, OuterProducts
from lightning_ext.functional.layer_products import LayerFactors, LayerProducts
from lightning_ext.functional.layer_recorder import LayerRecorder, RecordedLayer
from lightning_ext.functional.linear_system import (
    BlockProduct,
    ConvergenceWarning,
    LinearSystem,
    SolveInfo,
    fixed_direction,
)
from lightning_ext.functional.linearized import LinearizedBatch, LinearizedGradient, PullBack
from lightning_ext.functional.log_mean_exp import StreamingLogMeanExp, log_mean_exp, widest_float
from lightning_ext.functional.low_rank import NystromApproximation, lanczos, nystrom, nystrom_cg
from lightning_ext.functional.mrvae import (
    at_least_float32,
    bernoulli_distortion,
    beta_grid,
    free_bits_rate,
    gate_activation,
    gaussian_distortion,
    gaussian_kl,
    kl_weight,
    sigma_vae_distortion,
    squared_error_distortion,
    standardize_beta,
    stratified_uniform,
    total_correlation_terms,
    unstandardize_beta,
)
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
from lightning_ext.functional.neumann_series import lissa, lissa_scale, neumann, power_iteration
from lightning_ext.functional.output_loss_protocol import OutputLoss, exponential_remainder, log_partition_divergence
from lightning_ext.functional.output_losses import CallableLoss, SoftmaxCrossEntropy, output_loss
from lightning_ext.functional.parameters import ParameterView, Substitution
from lightning_ext.functional.per_sample import SampleGradients, per_sample_gradients
from lightning_ext.functional.sampling import (
    AnnealingPath,
    DiagonalGaussian,
    HMCInfo,
    LogDensity,
    PathState,
    hmc_transition,
)
from lightning_ext.functional.sketch import Projection
from lightning_ext.functional.solvers import block_cg, cg, direct, direct_dual, normal_cg
from lightning_ext.functional.step_size import DualAveraging, tune_step_sizes

__all__ = [
    "AISResult",
    "ActivationSite",
    "AnnealingPath",
    "BernoulliCrossEntropy",
    "BlockProduct",
    "CallableLoss",
    "ConvergenceWarning",
    "CurvatureOperator",
    "DataTerm",
    "DiagonalGaussian",
    "DivergenceLoss",
    "DualAveraging",
    "EmbeddingRows",
    "EmpiricalFisherOperator",
    "ExplicitRows",
    "GGNOperator",
    "GatedLinear",
    "GaussianNLL",
    "GradientBlock",
    "HMCInfo",
    "HessianOperator",
    "InfluenceObjective",
    "InputModel",
    "InputStatistics",
    "KroneckerBlock",
    "KroneckerCurvature",
    "KroneckerLayer",
    "KroneckerStatistics",
    "LayerFactors",
    "LayerGradients",
    "LayerProducts",
    "LayerRecorder",
    "LinearGates",
    "LinearOptimum",
    "LinearSystem",
    "LinearizedBatch",
    "LinearizedGradient",
    "LogDensity",
    "MIGResult",
    "MetaStep",
    "MislabelResult",
    "NystromApproximation",
    "OuterProducts",
    "OutputLoss",
    "OutputMoments",
    "ParameterView",
    "PathState",
    "PoissonNLL",
    "PreconditionerGradients",
    "Projection",
    "ProximalObjective",
    "ProximalStep",
    "PullBack",
    "RecordActivations",
    "RecordedLayer",
    "ReferenceMoments",
    "RemovalTerm",
    "ReplayActivations",
    "ResponseObjective",
    "ResponseTerms",
    "SampleGradients",
    "SoftmaxCrossEntropy",
    "SolveInfo",
    "SquaredError",
    "StreamingLogMeanExp",
    "Substitution",
    "Transition",
    "active_units",
    "ais_forward",
    "ais_reverse",
    "apply_preconditioner",
    "at_least_float32",
    "average_accuracy",
    "average_ranks",
    "backward_transfer",
    "batch_size",
    "bernoulli_distortion",
    "bernoulli_kl",
    "best_response",
    "beta_for_distortion",
    "beta_for_rate",
    "beta_grid",
    "block_cg",
    "cg",
    "class_hessians",
    "concatenate",
    "conjugate_gradients",
    "differentiable",
    "direct",
    "direct_dual",
    "divergence_named",
    "evaluating",
    "exponential_remainder",
    "fixed_direction",
    "fold_in",
    "forgetting",
    "forward_transfer",
    "free_bits_rate",
    "gate_activation",
    "gated_distance",
    "gates",
    "gaussian_distortion",
    "gaussian_kl",
    "group_scores",
    "hmc_kernel",
    "hmc_transition",
    "hypervolume",
    "influence_gaps",
    "influence_scores",
    "inner_products",
    "joint_exact_gates",
    "joint_moments",
    "keep_largest",
    "kl_weight",
    "kronecker_curvature",
    "lanczos",
    "learning_accuracy",
    "leave_out_step",
    "linear_datamodeling_scores",
    "linear_schedule",
    "linear_vae_optimum",
    "linear_vae_terms",
    "lissa",
    "lissa_scale",
    "log_mean_exp",
    "log_partition_divergence",
    "map_tensors",
    "mean_gate_distance",
    "mean_gate_moments",
    "mean_squared_error",
    "merge_moments",
    "mislabel_detection",
    "moment_distance",
    "moments_variance",
    "multiplicative_meta_step",
    "mutual_information_gap",
    "neumann",
    "normal_cg",
    "nystrom",
    "nystrom_cg",
    "ordered_scores",
    "output_divergence",
    "output_loss",
    "pareto_front",
    "per_sample_gradients",
    "power_iteration",
    "preconditioner_gradients",
    "random_subsets",
    "rate_at",
    "rate_distortion_auc",
    "relative_influence",
    "removal_gradients",
    "removal_losses",
    "response_terms",
    "response_terms_and_gradients",
    "reverse_waterfilling",
    "rmsprop_log_step",
    "rotate_gradient",
    "row_correlation",
    "secant_log_step",
    "seeded_generator",
    "select",
    "select_traced",
    "self_influence",
    "sequential_layers",
    "sgd_log_step",
    "sigma_vae_distortion",
    "sigmoid_schedule",
    "slope_error",
    "softmax_kl",
    "softmax_squared_error",
    "squared_error",
    "squared_error_distortion",
    "standardize_beta",
    "stratified_uniform",
    "theorem1_gates",
    "topk_overlap",
    "total_correlation_terms",
    "tracin_self_influence",
    "trust_region_weight",
    "tune_step_sizes",
    "unstandardize_beta",
    "update_moments",
    "widest_float",
]
