"""The peers of the influence benchmark, each one function from a problem to scores, queries by training samples.

Everything that a package needs is inside: fitting, gradients, solving, scoring. Its batch size is the fastest of 50,
100, 250, 500 and 1,000 for kronfluence and captum, else all samples.
"""

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from _influence_problem import DAMPING, Problem, gradients, loader
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class MissingPeerError(Exception):
    """The peer cannot be imported here; the message says how to have it."""


@dataclass(frozen=True)
class Method:
    """A way to score; ``package`` is None for ours."""

    name: str
    package: str | None
    function: Callable[[Problem], Tensor]

    def version(self) -> str | None:
        try:
            return self.package and version(self.package)
        except PackageNotFoundError:
            return None

    def scores(self, problem: Problem) -> Tensor:
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return self.function(problem)
        except ImportError as error:
            raise MissingPeerError(f"{error}; `make bench` installs it") from error


def kronfluence(problem: Problem, strategy: str = "ekfac") -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            images, labels = batch
            logits = model(images)
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Classification()
    train, queries = TensorDataset(*problem.train), TensorDataset(*problem.queries)
    batch = min(len(train), 100)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "bench", prepare_model(copy.deepcopy(problem.model), task), task, cpu=True, disable_tqdm=True,
            output_dir=folder, log_level=logging.ERROR,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=batch, factor_args=FactorArguments(strategy=strategy)
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, train, per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch, score_args=ScoreArguments(damping_factor=DAMPING),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def captum_tracin(problem: Problem) -> Tensor:
    """One checkpoint, with the sum-reduced loss that its fast per-sample gradients ask for."""
    from captum.influence import TracInCP

    tracin = TracInCP(
        problem.model, TensorDataset(*problem.train), ["trained"], lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=len(problem.train[0]),
        sample_wise_grads_per_batch=True,
    )  # fmt: skip
    return tracin.influence(problem.queries)


def captum_arnoldi(problem: Problem) -> Tensor:
    """Its defaults: 50 eigenvectors of the Hessian out of a Krylov space of 200."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    arnoldi = ArnoldiInfluenceFunction(
        problem.model, TensorDataset(*problem.train), "trained", lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=len(problem.train[0]),
        sample_wise_grads_per_batch=True,
        hessian_reg=DAMPING * len(problem.train[0]),
    )  # fmt: skip
    return arnoldi.influence(problem.queries)


def pydvl(problem: Problem, method: str) -> Tensor:
    """The Hessian, its default: what it calls Gauss-Newton is the empirical Fisher matrix.

    Its CG with all queries at once takes no preconditioner, and never converges on an indefinite Hessian: ten steps.
    """
    from pydvl.influence.torch import CgInfluence, EkfacInfluence, NystroemSketchInfluence

    make = {
        "EK-FAC": lambda model, loss: EkfacInfluence(model, update_diagonal=True, hessian_regularization=DAMPING),
        "Nystrom": lambda model, loss: NystroemSketchInfluence(model, loss, regularization=DAMPING, rank=100),
        "CG": lambda model, loss: CgInfluence(
            model, loss, regularization=DAMPING, rtol=1e-2, maxiter=10, solve_simultaneously=True
        ),
    }[method]
    influence = make(copy.deepcopy(problem.model), nn.functional.cross_entropy).fit(loader(problem.train))
    return influence.influences(*problem.queries, *problem.train).detach()


def dattri(problem: Problem, method: str) -> Tensor:
    """Its EK-FAC is of the empirical Fisher matrix, its CG of the Hessian, with its default of ten iterations."""
    from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
    from dattri.task import AttributionTask

    model = copy.deepcopy(problem.model)

    def loss(parameters, data):
        images, labels = (
            part.unsqueeze(0) if part.ndim < full else part for part, full in zip(data, (2, 1), strict=True)
        )
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (images,)), labels)

    task = AttributionTask(loss, model, model.state_dict())
    if method == "EK-FAC":
        attributor = IFAttributorEKFAC(task, damping=DAMPING)
    else:
        attributor = IFAttributorCG(task, max_iter=10, regularization=DAMPING)
    train, queries = loader(problem.train), loader(problem.queries)
    attributor.cache(train)
    return attributor.attribute(train, queries).T


def curvlinops_ekfac(problem: Problem) -> Tensor:
    """Its inverse; gradients and inner products, which it does not offer, by vmap and a product."""
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

    operator = EKFACLinearOperator(
        problem.model, nn.CrossEntropyLoss(), list(problem.model.parameters()), [problem.train],
        fisher_type="type-2", check_deterministic=False, separate_weight_and_bias=False,
    )  # fmt: skip
    inverse = KFACInverseLinearOperator(operator, damping=DAMPING, use_exact_damping=True)
    rows = gradients(problem.model, problem.queries)
    return (inverse @ rows.mT).mT @ gradients(problem.model, problem.train).mT


KRONFLUENCE = Method("kronfluence EK-FAC", "kronfluence", kronfluence)
TRACIN = Method("captum TracInCP", "captum", captum_tracin)
ARNOLDI = Method("captum Arnoldi", "captum", captum_arnoldi)
CURVLINOPS = Method("curvlinops EK-FAC", "curvlinops-for-pytorch", curvlinops_ekfac)
PYDVL_EKFAC, PYDVL_NYSTROM, PYDVL_CG = (
    Method(f"pyDVL {name}", "pyDVL", partial(pydvl, method=name)) for name in ("EK-FAC", "Nystrom", "CG")
)
DATTRI_EKFAC, DATTRI_CG = (
    Method(f"dattri {name}", "dattri", partial(dattri, method=name)) for name in ("EK-FAC", "CG")
)
PEERS = (
    KRONFLUENCE, TRACIN, ARNOLDI, CURVLINOPS, PYDVL_EKFAC, PYDVL_NYSTROM, PYDVL_CG, DATTRI_EKFAC, DATTRI_CG,
)  # fmt: skip
