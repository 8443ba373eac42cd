"""The public components, one entry each; ``test_conformance.py`` runs every check of its kind over every entry."""

import functools

import torch
from torch.utils.data import DataLoader

from lightning_ext import callbacks, data, metrics, modules, nn
from tests.conformance import (
    components,
    continual_batches,
    curvature_batches,
    estimators,
    influence_batches,
    influence_responses,
    laftr_regularizers,
    mutual_information_batches,
    pair_modules,
    toys,
)
from tests.conformance.entry import Entry

NOT_COMPONENTS = {
    "BaseVAE": "abstract: BetaVAE, FreeBitsVAE, SigmaVAE, GECOVAE and MultiRateVAE are it",
    "RateDistortion": "a dataclass of tensors that modules return",
    "AddressedNoise": "abstract: the noise of every VAE here, checked through all of them",
    "FunctionSpaceEstimator": "abstract: LAFTREstimator and its rivals are it",
    "MeanDistance": "what FunctionSpaceEstimator.pool returns; tests/nn/test_laftr.py has it",
    "AtBeta": "a view that MultiRateVAE.at_beta returns",
    "ResumableDataModule": "abstract: DigitsDataModule is one",
    "MNISTDataModule": "its files cannot be shipped; tests/data/test_mnist.py trains on files that it writes",
    "DSpritesDataModule": "its file cannot be shipped; tests/data/test_dsprites.py trains on one that it writes",
    "InfluenceGapAnalyzer": "a runner around Trainers; tests/modules/test_influence_gaps.py runs it",
    "InfluenceGaps": "a dataclass of tensors that InfluenceGapAnalyzer returns",
    "MutualInformationSandwich": "a collection of registered ones; tests/metrics/test_mutual_information_ais.py",
    "IndexedDataset": "wraps a dataset; tests/data/test_indexed.py iterates loaders over it",
    "IndexedBatch": "a named tuple that a loader over IndexedDataset gives",
    "InfluenceModule": "it predicts and is not trained; tests/modules/test_influence*.py run it through the Trainer",
    "LAFTRInfluence": "it predicts and is not trained; tests/modules/test_laftr.py runs it through the Trainer",
    "CIFARImages": "its files cannot be shipped; tests/data/test_cifar.py reads files that it writes",
    "CIFARLayout": "a description of a file format; tests/data/test_cifar.py reads both",
    "RowStore": "a file format; tests/data/test_row_store.py kills a writer and reopens its table",
    "PairLoader": "an iterable; tests/data/test_mutual_information.py stops and resumes it",
    "LatentModel": "abstract: GaussianDecoderModel and BernoulliDecoderModel are it",
    "DistributionModel": "a LatentModel without parameters; tests/nn/test_mutual_information.py",
    "FiniteModel": "a LatentModel without parameters; tests/nn/test_mutual_information_known.py",
    "LinearGaussianModel": "a LatentModel without parameters; tests/nn/test_mutual_information_known.py",
    "Proposal": "two functions; tests/nn/test_mutual_information.py draws from every kind",
    "ImplicitBound": "a dataclass of tensors that measure_implicit_bound returns",
    "PairCritic": "abstract: ConcatenatedCritic, QuadraticCritic and SeparableCritic are it",
    "MutualInformationMeasurement": "a dataclass of tensors that measure_mutual_information returns",
    "RateConditioner": "abstract: RateGate, RateFiLM, LogVarianceGate, PosteriorGate and GatedFiLM are it",
}

_NO_RECIPE = "a baseline or a building block: the recipe is the one of its method"
_VAE = {"networks": ("encoder", "decoder"), "dataset": components.pixels, "quiet": components.without_noise}
_PER_RANK = "the batch of one rank, not the global one, enters the loss nonlinearly; stated in its docstring"

_METHOD = [
    Entry(["MultiRateVAE"], "module", components.multi_rate, recipe="mrvae", **_VAE),
    Entry(
        ["MultiRateVAE"],
        "module",
        lambda: components.multi_rate(beta_range=(0.5, 0.5)),
        label="MultiRateVAE-one-beta",
        skip={"cli_recipe": _NO_RECIPE},
        **_VAE,
    ),
    *(
        Entry(
            ["MultiRateVAE"],
            "module",
            lambda chosen=chosen: components.multi_rate(**chosen),
            label="MultiRateVAE-" + "-".join(chosen.values()),
            skip={"cli_recipe": _NO_RECIPE},
            **_VAE,
        )
        for chosen in ({"conditioning": "film"}, {"conditioning": "none"}, {"beta_sampling": "sample"})
    ),
    Entry(
        ["MultiRateVAE"],
        "module",
        components.multi_rate_concat,
        label="MultiRateVAE-concat",
        skip={"cli_recipe": _NO_RECIPE},
        **_VAE,
    ),
    Entry(
        ["MultiRateVAE"],
        "module",
        components.multi_rate_ladder,
        label="MultiRateVAE-hierarchical",
        skip={"cli_recipe": _NO_RECIPE},
        **_VAE,
    ),
    Entry(
        ["MultiRateVAE"],
        "module",
        lambda: components.multi_rate(objective="tcvae", dataset_size=12, beta_sampling="batch"),
        label="MultiRateVAE-tcvae",
        skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": _PER_RANK},
        **_VAE,
    ),
    Entry(["MultiRateMixin"], "module", components.OwnMultiRate, skip={"cli_recipe": _NO_RECIPE}, **_VAE),
]

_BASELINES = [
    Entry(["BetaVAE"], "module", components.beta_vae, skip={"cli_recipe": _NO_RECIPE}, **_VAE),
    Entry(
        ["FreeBitsVAE"],
        "module",
        lambda: components.single(modules.FreeBitsVAE),
        skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": _PER_RANK},
        **_VAE,
    ),
    Entry(
        ["SigmaVAE"],
        "module",
        lambda: components.single(modules.SigmaVAE),
        skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": _PER_RANK},
        **_VAE,
    ),
    Entry(
        ["GECOVAE"],
        "module",
        lambda: components.single(modules.GECOVAE, target_distortion=2.0),
        skip={"cli_recipe": _NO_RECIPE},
        **_VAE,
    ),
]

_CALLBACKS = [
    Entry(
        ["RateDistortionCallback"],
        "callback-observer",
        lambda: callbacks.RateDistortionCallback(num_betas=3),
        other=lambda: callbacks.RateDistortionCallback(betas=[0.1, 1.0], reference_point=[50.0, 50.0]),
        module=lambda: components.multi_rate(beta_range=(0.05, 2.0)),
        recipe="mrvae",
        not_finite=["mrvae/slope_error"],
        **_VAE,
    ),
    Entry(
        ["MutualInformationCallback"],
        "callback-observer",
        lambda: callbacks.MutualInformationCallback(**components.SHORT_CHAINS),
        other=lambda: callbacks.MutualInformationCallback(bounds=["ais"], name="ais_alone", **components.SHORT_CHAINS),
        module=components.beta_vae,
        recipe="mutual_information",
        skip={
            "ddp_equals_one_process": "ranks simulate different pairs, so that the sums are over the pairs of all",
        },
        **_VAE,
    ),
    *(
        Entry(
            ["KLSchedule"],
            "callback-method",
            lambda chosen=chosen: callbacks.KLSchedule(**chosen),
            module=components.beta_vae,
            label="KLSchedule-" + "-".join(chosen.values()),
            skip={
                "cli_recipe": _NO_RECIPE,
                "fsdp_is_refused_or_stated": "it sets one plain attribute of the module and touches no parameter",
            },
            **_VAE,
        )
        for chosen in ({"schedule": "monotonic"}, {"schedule": "cyclical", "interval": "step"})
    ),
]

_WHOLE = {"fsd_fraction": 1.0, "every_n_steps": 2, "warmup_steps": 1}  # all of B', so that two halves make one batch
_NEEDS_LOSS = "it cannot run a manual training_step and says so; the entry with a loss function of its own is checked"

_ALONE = "two of them on one optimizer are refused; tests/callbacks/test_apo_foreign.py has one for each of two"

_APO = [
    Entry(
        ["APOLearningRate"],
        "callback-method",
        lambda: callbacks.APOLearningRate(**_WHOLE),
        other=lambda: callbacks.APOLearningRate(optimizers=[0]),
        module=components.Unscheduled,
        recipe="apo",
        skip={"manual_optimisation": _NEEDS_LOSS, "two_instances": _ALONE},
    ),
    *(
        Entry(
            ["APOLearningRate"],
            "callback-method",
            lambda chosen=chosen: callbacks.APOLearningRate(loss_fn=components.cross_entropy, **_WHOLE, **chosen),
            other=lambda chosen=chosen: callbacks.APOLearningRate(optimizers=[0], **chosen),
            module=module,
            label=f"APOLearningRate-{label}",
            skip={"cli_recipe": _NO_RECIPE, "two_instances": _ALONE},
        )
        for label, module, chosen in (
            ("own-loss", components.Unscheduled, {"lam_f": "auto"}),
            ("layers", components.Unscheduled, {"granularity": "layer", "meta_optimizer": "secant"}),
            ("scheduler", toys.Plain, {"on_scheduler": "multiply"}),
        )
    ),
    Entry(
        ["HypergradientLR"],
        "callback-method",
        callbacks.HypergradientLR,
        other=lambda: callbacks.HypergradientLR(optimizers=[0], multiplicative=True),
        module=components.Unscheduled,
        skip={"cli_recipe": _NO_RECIPE, "two_instances": _ALONE},
    ),
    Entry(
        ["APOPreconditioning"],
        "callback-method",
        lambda: callbacks.APOPreconditioning(fsd_fraction=1.0, loss_fn=components.cross_entropy),
        other=lambda: callbacks.APOPreconditioning(optimizers=[0], fsd_batch="previous", fsd_fraction=0.5),
        module=components.Preconditioned,
        skip={"cli_recipe": _NO_RECIPE},
    ),
    Entry(
        ["Classifier"],
        "module",
        components.small_classifier,
        dataset=components.pixels,
        networks=["network"],
        recipe="apo",
    ),
]

_RESPONSE = {
    "dataset": components.pixels,
    "networks": (),
    "skip": {
        "cli_recipe": "it starts from a trained network, which a recipe does not have",
        "gradient_clipping": "each copy is clipped by its own norm; tests/modules/test_influence_response.py",
        "compiled_inner_network": "compiled parts run uncompiled; tests/modules/test_influence_response.py has some",
        "fsdp_shards": "it refuses sharded strategies by name; tests/modules/test_influence_response.py",
    },
}

_RESPONSES = [
    *(
        Entry(
            ["ResponseModule"],
            "module",
            lambda response=response, chosen=chosen: influence_responses.retrained(response, **chosen),
            label=f"ResponseModule-{response}",
            **_RESPONSE,
        )
        for response, chosen in (
            ("cold", {"seed": [1, 2], "optimizer": "adam", "lr": 0.01, "schedule": "cosine"}),
            ("warm", {}),
            ("proximal", {"chunk_size": 1}),
        )
    ),
    Entry(["PBRFModule"], "module", influence_responses.bregman, **_RESPONSE),
]

_INFLUENCE = [
    *(
        Entry(
            ["TracInCallback"],
            "callback-observer",
            lambda chosen=chosen: callbacks.TracInCallback(samples=DataLoader(toys.rows(), 5), **chosen),
            other=lambda: callbacks.TracInCallback(samples=DataLoader(toys.rows(), 5), filename="other.pt"),
            module=toys.Plain,
            label=f"TracInCallback{label}",
            recipe="influence",
        )
        for label, chosen in (("", {}), ("-projected", {"project_dim": 7, "include": "weight"}))
    ),
    *(
        Entry(
            ["CurvatureCollector"],
            "callback-observer",
            lambda chosen=chosen: callbacks.CurvatureCollector(samples=DataLoader(toys.rows(), 5), **chosen),
            other=lambda: callbacks.CurvatureCollector(samples=DataLoader(toys.rows(), 5), include="bias"),
            module=toys.Plain,
            label=f"CurvatureCollector-{chosen['method']}",
            recipe="influence",
        )
        for chosen in ({"method": "ekfac", "every_n_epochs": 1}, {"method": "kfac", "output_dir": "curvature"})
    ),
]

_ENDS = "what these processes collect ends with them, which it says; collected by hand in another entry"

_LAFTR = [
    Entry(
        ["FunctionSpaceRegularizer"],
        "callback-method",
        laftr_regularizers.remembering,
        other=lambda: laftr_regularizers.remembering(consolidate="last"),
        module=toys.Plain,
        recipe="laftr",
        skip={
            "manual_optimisation": "it cannot add to a loss that it does not see and says so; see the next entries",
            "ddp_ranks_agree": _ENDS,
            "ddp_equals_one_process": _ENDS,
        },
    ),
    *(
        Entry(
            ["FunctionSpaceRegularizer"],
            "callback-method",
            lambda chosen=chosen: laftr_regularizers.remembering(fit_at="manual", **chosen),
            other=lambda: laftr_regularizers.remembering(consolidate="merge", add_to_loss=False),
            module=toys.Plain,
            label=f"FunctionSpaceRegularizer-{label}",
            skip={"cli_recipe": _NO_RECIPE, **skip},
        )
        for label, chosen, skip in (
            (
                "same-draws",
                {"estimator_options": {"fixed_draws": True}},
                {"manual_optimisation": "it cannot add to a loss that it does not see and says so"},
            ),
            (
                "own-sum",
                {"add_to_loss": False},
                {"ddp_equals_one_process": "ranks draw different samples, so that their mean has the samples of all"},
            ),
        )
    ),
]

_ONE_HOT = {
    data.FiniteJointDataModule: {
        "ddp_ranks_agree": "sums of unit vectors do not tell two draws apart; the tests in tests/data do"
    }
}

_DATA = [
    Entry(
        ["DigitsDataModule", "EpochSampler", "ResumableLoader"],
        "data",
        lambda: data.DigitsDataModule(batch_size=16),
        other=lambda: data.DigitsDataModule(batch_size=8, binarize=False),
        module=components.digits_vae,
        networks=("encoder", "decoder"),
        recipe="mrvae",
        skip={"ddp_equals_one_process": "Lightning shards its loaders with a shuffling sampler of its own"},
    ),
    Entry(
        ["ContinualDataModule"],
        "data",
        continual_batches.permuted,
        other=continual_batches.pairs,
        module=components.digits_vae,
        networks=("encoder", "decoder"),
        skip={
            "ddp_equals_one_process": "Lightning shards its loaders with a shuffling sampler of its own",
            "cli_recipe": "tests/data/test_continual.py builds every scenario on the command line",
        },
    ),
    *(
        Entry(
            [kind.__name__],
            "data",
            functools.partial(kind, *chosen, **components.FEW_PAIRS),
            module=components.ReadsX,
            skip={
                "ddp_equals_one_process": "ranks draw pairs of their own",
                "cli_recipe": "its recipe comes with the card of its method",
                **_ONE_HOT.get(kind, {}),
            },
        )
        for kind, *chosen in (
            (data.SimulatedPairsDataModule, components.Pairs()),
            (data.CorrelatedGaussianDataModule, 6),
            (data.LinearGaussianDataModule, torch.ones(6, 2)),
            (data.FiniteJointDataModule, torch.arange(1.0, 37.0).view(6, 6) / 666),
        )
    ),
]

_METRICS = [
    Entry(
        ["FunctionSpaceDistance"],
        "metric",
        metrics.FunctionSpaceDistance,
        other=lambda: metrics.FunctionSpaceDistance("mse"),
        batches=continual_batches.outputs,
        reference=continual_batches.distance_reference,
    ),
    Entry(
        ["LAFTRStatistics"],
        "metric",
        lambda: metrics.LAFTRStatistics([3], num_groups=2),
        other=lambda: metrics.LAFTRStatistics([3], num_groups=2, covariance="diag"),
        batches=continual_batches.grouped_inputs,
        reference=continual_batches.groups_reference,
    ),
    Entry(
        ["ContinualMetrics"],
        "metric",
        lambda: metrics.ContinualMetrics(continual_batches.TASKS),
        other=lambda: metrics.ContinualMetrics(continual_batches.TASKS, baseline=[0.3, 0.3]),
        batches=continual_batches.tested_tasks,
        reference=continual_batches.matrix_reference,
    ),
    Entry(
        ["RateDistortionCurve"],
        "metric",
        lambda: metrics.RateDistortionCurve([0.1, 1.0, 5.0], latent_dim=2, reference_point=(9.0, 9.0)),
        other=lambda: metrics.RateDistortionCurve([0.1, 1.0, 5.0], latent_dim=2),
        batches=components.curve_batches,
        reference=components.curve_reference,
    ),
    Entry(
        ["MutualInformationGap"],
        "metric",
        lambda: metrics.MutualInformationGap([2, 3], latent_dim=2, num_bins=4),
        batches=components.factor_batches,
        metric_options={"empty_rank": True},
    ),
    Entry(
        ["InfluenceScores"],
        "metric",
        lambda: metrics.InfluenceScores(num_queries=2),
        batches=influence_batches.scored_samples,
        reference=influence_batches.ordered_reference,
        metric_options={"row_split": False},  # samples are columns
    ),
    Entry(
        ["InfluenceScores"],
        "metric",
        lambda: metrics.InfluenceScores(num_queries=2, topk=2),
        label="InfluenceScores-topk",
        batches=influence_batches.scored_samples,
        reference=influence_batches.extremes_reference,
        metric_options={"row_split": False},
    ),
    Entry(
        ["LinearDatamodelingScore"],
        "metric",
        lambda: metrics.LinearDatamodelingScore(influence_batches.MASKS),
        batches=influence_batches.retrained_subsets,
        reference=influence_batches.subsets_reference,
        metric_options={"row_split": False},  # queries are rows of one argument and columns of the other
    ),
    Entry(
        ["LOOCorrelation"],
        "metric",
        lambda: metrics.LOOCorrelation("spearman"),
        batches=influence_batches.removals,
        reference=influence_batches.removals_reference,
        metric_options={"row_split": False},  # removals are columns
    ),
    Entry(
        ["MislabelDetection"],
        "metric",
        metrics.MislabelDetection,
        batches=influence_batches.suspicions,
        reference=influence_batches.detection_reference,
    ),
    Entry(
        ["TopKOverlap"],
        "metric",
        lambda: metrics.TopKOverlap(3, kind="harmful"),
        batches=influence_batches.two_scores,
        reference=influence_batches.overlap_reference,
    ),
    Entry(
        ["KroneckerFactors"],
        "metric",
        lambda: metrics.KroneckerFactors(curvature_batches.NETWORK, curvature_batches.OBJECTIVE),
        batches=curvature_batches.updates,
        reference=curvature_batches.factors_reference,
    ),
    Entry(
        ["SelfInfluence"],
        "metric",
        lambda: metrics.SelfInfluence(damping=0.5, objective=curvature_batches.OBJECTIVE),
        batches=curvature_batches.numbered_updates,
        reference=curvature_batches.self_influence_reference,
    ),
    Entry(["EigenCorrection"], "metric", curvature_batches.correction, batches=curvature_batches.updates),
]

_COLUMNS = {"row_split": False}  # pairs are columns

_MUTUAL_INFORMATION = [
    Entry(["KSGEstimate"], "metric", lambda: metrics.KSGEstimate(1), batches=mutual_information_batches.sample_pairs),
    *(
        Entry(
            [name],
            "metric",
            functools.partial(getattr(metrics, name), *chosen),
            label="-".join([name, *chosen[:1]]),
            batches=functools.partial(mutual_information_batches.draws, **shapes),
            reference=getattr(mutual_information_batches, reference),
            metric_options=_COLUMNS,
        )
        for name, chosen, reference, shapes in mutual_information_batches.METRICS
    ),
    Entry(
        ["InfoNCE"],
        "metric",
        metrics.InfoNCE,
        batches=mutual_information_batches.square_scores,
        reference=mutual_information_batches.in_batch,
        metric_options=_COLUMNS,
    ),
]

_PAIRS = {"dataset": pair_modules.pairs}
_DRAWS = "ranks draw samples of their own"

_PAIR_MODULES = [
    *(
        Entry(
            ["CriticModule"],
            "module",
            lambda objective=objective: modules.CriticModule(
                pair_modules.critic(), objective, gather_negatives=True, optimizer=pair_modules.SGD
            ),
            label=f"CriticModule-{objective}",
            networks=("critic",),
            skip={"cli_recipe": _NO_RECIPE},
            **_PAIRS,
        )
        for objective in ("infonce", "dv", "mine", "nwj", "js", "smile")
    ),
    Entry(
        ["CriticModule"],
        "module",
        lambda: modules.CriticModule(pair_modules.critic(), num_negatives=1),
        label="CriticModule-one-negative",
        networks=("critic",),
        skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": "each x meets its neighbour on its rank"},
        **_PAIRS,
    ),
    Entry(
        ["BarberAgakovModule"],
        "module",
        lambda: modules.BarberAgakovModule(pair_modules.proposal()),
        label="BarberAgakovModule-lower",
        networks=("lower",),
        skip={"cli_recipe": _NO_RECIPE},
        **_PAIRS,
    ),
    Entry(
        ["BarberAgakovModule"],
        "module",
        pair_modules.barber_agakov,
        networks=("lower", "upper"),
        skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": _DRAWS},
        **_PAIRS,
    ),
    *(
        Entry(
            ["GIWAEModule"],
            "module",
            lambda detach=detach: modules.GIWAEModule(
                pair_modules.proposal(), pair_modules.critic(), num_samples=4, detach_negatives=detach
            ),
            label=f"GIWAEModule{'-detached' if detach else ''}",
            networks=("proposal", "critic"),
            skip={"cli_recipe": _NO_RECIPE, "ddp_equals_one_process": _DRAWS},
            **_PAIRS,
        )
        for detach in (False, True)
    ),
    *(
        Entry(
            ["MINEAISModule"],
            "module",
            lambda chosen=chosen, proposal=proposal: modules.MINEAISModule(
                pair_modules.critic(), proposal and proposal(), **chosen, **pair_modules.CHAINS
            ),
            label=f"MINEAISModule-{chosen['chain_init']}",
            networks=("critic",) if proposal is None else ("critic", "proposal"),
            dataset=dataset,
            skip={
                "cli_recipe": _NO_RECIPE,
                "ddp_equals_one_process": _DRAWS,
                "fsdp_shards": "refused by name; tests/modules/test_mutual_information_mine_ais.py",
            },
        )
        for chosen, proposal, dataset in (
            ({"chain_init": "data"}, None, pair_modules.pairs),
            ({"chain_init": "base", "measure_in_validation": True}, pair_modules.proposal, pair_modules.pairs),
            ({"chain_init": "persistent"}, pair_modules.proposal, pair_modules.indexed_pairs),
        )
    ),
]

_NN = [
    *(
        Entry(
            [kind],
            "nn",
            build,
            inputs=lambda: (torch.ones(3, pair_modules.X), torch.ones(3, pair_modules.Z)),
            call=pair_modules.scores,
        )
        for kind, build in (
            ("ConcatenatedCritic", pair_modules.critic),
            ("SeparableCritic", pair_modules.separable),
            ("QuadraticCritic", lambda: nn.QuadraticCritic(pair_modules.X, pair_modules.Z)),
        )
    ),
    Entry(
        ["GaussianProposal"],
        "nn",
        pair_modules.proposal,
        inputs=lambda: (torch.ones(3, pair_modules.X),),
        call=lambda module, inputs: module(*inputs).mean,
    ),
    Entry(["MLP"], "nn", lambda: nn.MLP([6, 5, 2]), inputs=lambda: (torch.ones(3, 6),)),
    Entry(["MLPEncoder"], "nn", lambda: nn.MLPEncoder([6], [5], 2), inputs=lambda: (torch.ones(3, 6),)),
    Entry(["MLPDecoder"], "nn", lambda: nn.MLPDecoder(2, [5], [6]), inputs=lambda: (torch.ones(3, 2),)),
    Entry(["ResNetEncoder"], "nn", lambda: nn.ResNetEncoder(2, 4), inputs=lambda: (torch.ones(2, 1, 28, 28),)),
    Entry(["ResNetDecoder"], "nn", lambda: nn.ResNetDecoder(2, 4), inputs=lambda: (torch.ones(2, 2),)),
    Entry(["LadderEncoder"], "nn", lambda: nn.LadderEncoder([6], 5), inputs=lambda: (torch.ones(3, 6),)),
    Entry(
        ["LadderDecoder"],
        "nn",
        lambda: nn.LadderDecoder(5, [2, 3], [6]),
        inputs=lambda: ((torch.ones(3, 5), torch.ones(3, 5)), torch.zeros_like),
    ),
    Entry(
        ["LogUniformBeta"],
        "nn",
        lambda: nn.LogUniformBeta(0.1, 2.0),
        inputs=lambda: (torch.tensor([0.1, 0.5, 2.0]),),
        call=lambda module, inputs: module.standardize(*inputs),
        skip={
            "fsdp_shards": "it has a buffer of two numbers and no parameter",
            "compiled": "it has no forward: a distribution, called through its methods",
        },
    ),
    *(
        Entry(
            [kind.__name__],
            "nn",
            functools.partial(components.decoder_model, kind, *chosen),
            inputs=lambda: (torch.ones(3, 6), torch.ones(4, 3, 2)),
            call=lambda model, inputs: model.log_likelihood(*inputs),
            skip={
                "compiled": "it has no forward: a density, called through its methods",
                "fsdp_shards": "it has no forward: a density, called through its methods",
            },
        )
        for kind, *chosen in ((nn.GaussianDecoderModel, -1.0), (nn.BernoulliDecoderModel,))
    ),
    *(
        Entry([name], "nn", build, inputs=lambda: (torch.ones(3, 4),), call=components.at_two_betas)
        for name, build in components.CONDITIONERS.items()
    ),
    *(
        Entry(
            [name],
            "nn",
            functools.partial(estimators.fitted, stem),
            inputs=lambda: (estimators.network(0.1),),
            call=estimators.distance,
            skip={
                "fsdp_shards": "it has no parameter: what it keeps is moved and saved by itself",
                "two_modules": "it has no parameter to share",
                "compiled": "it has no forward; tests/nn/test_laftr_modules.py compiles the network that it measures",
            },
        )
        for name, stem in estimators.NAMES.items()
    ),
]

REGISTRY = [
    *_METHOD,
    *_BASELINES,
    *_CALLBACKS,
    *_APO,
    *_RESPONSES,
    *_INFLUENCE,
    *_LAFTR,
    *_DATA,
    *_METRICS,
    *_MUTUAL_INFORMATION,
    *_PAIR_MODULES,
    *_NN,
]

TOYS = [
    Entry(
        ["Norm"],
        "callback-observer",
        toys.Norm,
        other=lambda: toys.Norm(2),
        module=toys.Plain,
        skip={
            "cli_recipe": "a toy of the tests has no recipe",
            "fsdp_is_refused_or_stated": "a toy of the tests, planted only where this is the fault",
        },
    ),
    Entry(["Plain"], "module", toys.Plain, skip={"cli_recipe": "a toy of the tests has no recipe"}),
    Entry(
        ["Mean"], "metric", toys.Mean, batches=lambda: [(torch.arange(n + 1.0),) for n in range(3)], label="Mean-toy"
    ),
    Entry(["Linear"], "nn", lambda: torch.nn.Linear(4, 2), inputs=lambda: (torch.ones(3, 4),), label="Linear-toy"),
]
