"""Responses to removal against closed forms: spec's ground truths 1, 2, 3, 4, 6 and 10."""

import pytest
import torch
from torch import nn

from lightning_ext.functional import (
    BernoulliCrossEntropy,
    CallableLoss,
    DataTerm,
    RemovalTerm,
    ResponseObjective,
    ResponseTerms,
    SoftmaxCrossEntropy,
    SquaredError,
    influence_gaps,
    leave_out_step,
    removal_gradients,
    removal_losses,
    response_terms,
    response_terms_and_gradients,
)

HALF = SquaredError(0.5, "sum")
LAMBDA, WD = 0.05, 0.02


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net(outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


class Problem:
    """A module with data, as flat vectors: what every formula below is written in."""

    def __init__(self, module, x, t, loss, groups):
        self.module, self.x, self.t, self.loss, self.groups = module, x, t, loss, groups
        self.reference = {name: p.detach() for name, p in module.named_parameters()}
        self.flat = self.join(self.reference)
        width = max(map(len, groups))
        index = torch.tensor([[*g, *[0] * (width - len(g))] for g in groups])
        weights = torch.tensor([[1 / len(x)] * len(g) + [0.0] * (width - len(g)) for g in groups])
        self.removal = RemovalTerm(lambda params, i: self.call(params, x[i]), t, index, weights)
        self.data = DataTerm(lambda params: self.call(params, x), t, self.call(self.reference, x))

    def call(self, params, x):
        return torch.func.functional_call(self.module, params, (x,))

    def join(self, tensors, leading=0):
        return torch.cat([value.reshape(*value.shape[:leading], -1) for value in tensors.values()], -1)

    def split(self, rows):
        parts = rows.split([v.numel() for v in self.reference.values()], -1)
        return {
            name: part.reshape(*rows.shape[:-1], *v.shape)
            for part, (name, v) in zip(parts, self.reference.items(), strict=True)
        }

    def outputs(self, flat):
        return self.call(self.split(flat), self.x)

    def ggn(self):
        jacobian = torch.func.jacrev(self.outputs)(self.flat)
        y = self.outputs(self.flat)
        one = torch.func.hessian(lambda row, t: self.loss.value(row[None], t[None])[0])
        hessian = torch.func.vmap(one)(y, self.t)
        return torch.einsum("bkd,bkl,ble->de", jacobian, hessian, jacobian) / len(self.x)

    def gradient_of(self, group):
        """Mean over all samples' worth of one group: (1/N) sum of the losses' gradients."""

        def total(flat):
            return self.loss.value(self.outputs(flat), self.t)[group].sum() / len(self.x)

        return torch.func.grad(total)(self.flat)

    def evaluate(self, objective, change, data=None, **kwargs):
        terms, gradients = response_terms_and_gradients(
            objective, self.split(change), self.reference, data or self.data, self.removal, **kwargs
        )
        return terms, self.join(gradients, 1)

    def minimise(self, objective, metric, steps=60, start=None):
        """Fixed-point steps behind a matrix close to the Hessian."""
        change = torch.zeros(len(self.groups), len(self.flat)) if start is None else start
        for _ in range(steps):
            _, gradient = self.evaluate(objective, change)
            change = change - torch.linalg.solve(metric, gradient.mT).mT
        assert self.evaluate(objective, change)[1].norm() < 1e-9 * gradient.numel()
        return change


def classification(groups=([1], [0, 3, 4]), samples=12):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(samples, 4, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    return Problem(net(), x, t, SoftmaxCrossEntropy(), list(groups))


def regression(samples=50, groups=([0], [7], [3, 9])):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    t = x @ torch.randn(4, 1, generator=generator) + 0.3 * torch.randn(samples, 1, generator=generator)
    return Problem(nn.Linear(4, 1, bias=False), x, t, HALF, list(groups))


LOSSES = {
    "softmax": (SoftmaxCrossEntropy(), lambda g: torch.randint(0, 3, (12,), generator=g)),
    "bernoulli": (BernoulliCrossEntropy(), lambda g: torch.rand(12, 3, generator=g)),
    "mse": (SquaredError(), lambda g: torch.randn(12, 3, generator=g)),
    "callable": (CallableLoss(lambda y, t: (y - t).pow(4).sum(1)), lambda g: torch.randn(12, 3, generator=g)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_reference_the_pbo_has_minus_the_removed_gradient_and_the_damped_ggn(name):
    loss, draw = LOSSES[name]
    generator = torch.Generator().manual_seed(2)
    problem = Problem(net(), torch.randn(12, 4, generator=generator), draw(generator), loss, [[1], [0, 3, 4]])
    objective = ResponseObjective(loss, "pbrf", LAMBDA, WD)
    zero = torch.zeros(2, len(problem.flat))
    terms, gradient = problem.evaluate(objective, zero)
    assert terms.data.abs().max() < 1e-14
    for row, group in zip(gradient, problem.groups, strict=True):
        torch.testing.assert_close(row, -problem.gradient_of(group), rtol=1e-10, atol=1e-12)

    def without_removal(flat):
        return response_terms(objective, problem.split(flat[None]), problem.reference, problem.data).total[0]

    hessian = torch.func.jacrev(torch.func.jacrev(without_removal))(zero[0])
    expected = problem.ggn() + (LAMBDA + WD) * torch.eye(len(problem.flat))
    torch.testing.assert_close(hessian, expected, rtol=1e-9, atol=1e-10)
    full = torch.func.hessian(lambda flat: loss.value(problem.outputs(flat), problem.t).mean())(problem.flat)
    assert torch.linalg.eigvalsh(full)[0] < -1e-2, "the case is too easy: here the Hessian is the GGN"


def test_retraining_objectives_are_the_training_loss_without_the_group():
    problem = classification()
    change = 0.1 * torch.randn(2, len(problem.flat))
    stays = [[i for i in range(12) if i not in group] for group in problem.groups]

    def training_loss(flat, kept):
        return problem.loss.value(problem.outputs(flat), problem.t)[kept].sum() / 12 + WD / 2 * flat.square().sum()

    for response, damping in (("cold", 0.0), ("warm", 0.0), ("proximal", LAMBDA)):
        terms, gradient = problem.evaluate(ResponseObjective(problem.loss, response, LAMBDA, WD), change)
        for g, kept in enumerate(stays):

            def total(delta, kept=kept, damping=damping):
                return training_loss(problem.flat + delta, kept) + damping / 2 * delta.square().sum()

            torch.testing.assert_close(terms.total[g], total(change[g]))
            torch.testing.assert_close(gradient[g], torch.func.grad(total)(change[g]))


def test_weights_choose_the_samples_of_each_copy():
    problem = classification()
    mask = torch.rand(2, 12) < 0.5
    objective = ResponseObjective(problem.loss, "warm")
    data = DataTerm(problem.data.function, problem.t, weights=mask * 12 / mask.sum(1, keepdim=True))
    zero = problem.split(torch.zeros(2, len(problem.flat)))
    terms = response_terms(objective, zero, problem.reference, data)
    losses = problem.loss.value(problem.outputs(problem.flat), problem.t)
    torch.testing.assert_close(terms.data, torch.stack([losses[row].mean() for row in mask]))
    assert isinstance(terms, ResponseTerms)
    assert terms.removed.abs().max() == 0


def test_copies_do_not_mix_and_chunks_change_nothing():
    problem = classification([[0], [1], [2], [1, 2, 3]])
    objective = ResponseObjective(problem.loss, "pbrf", LAMBDA)
    change = 0.1 * torch.randn(4, len(problem.flat))
    terms, gradient = problem.evaluate(objective, change)
    chunked_terms, chunked = problem.evaluate(objective, change, chunk_size=3)
    torch.testing.assert_close(chunked, gradient)
    torch.testing.assert_close(chunked_terms.total, terms.total)
    other = change.clone()
    other[0] += 1.0
    _, moved = problem.evaluate(objective, other)
    assert torch.equal(moved[1:], gradient[1:])
    assert not torch.equal(moved[0], gradient[0])


def test_ridge_leave_one_out_is_exact_and_influence_is_smaller_by_the_leverage():
    problem = regression(groups=([0], [7]))
    x, n = problem.x, 50
    curvature = x.mT @ x / n + WD * torch.eye(4)
    optimum = torch.linalg.solve(curvature, x.mT @ problem.t[:, 0] / n)
    problem.module.weight.data = optimum[None]
    problem = Problem(problem.module, x, problem.t, HALF, problem.groups)
    retrained = problem.minimise(ResponseObjective(HALF, "warm", weight_decay=WD), curvature)
    rows = problem.join(removal_gradients(HALF, problem.reference, problem.removal), 1)
    influence = torch.linalg.solve(curvature, rows.mT).mT
    for g, (i,) in enumerate(problem.groups):
        solved = torch.linalg.solve(curvature, x[i])
        h, residual = x[i] @ solved / n, problem.t[i, 0] - x[i] @ optimum
        torch.testing.assert_close(retrained[g], -solved * residual / (n * (1 - h)), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(influence[g], -solved * residual / n, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(influence[g].norm() / retrained[g].norm(), 1 - h, rtol=1e-10, atol=0.0)


def test_pbrf_of_a_linear_model_is_exact_wherever_the_reference_lies():
    problem = regression()
    x, n = problem.x, 50
    damped = x.mT @ x / n + (LAMBDA + WD) * torch.eye(4)
    change = problem.minimise(ResponseObjective(HALF, "pbrf", LAMBDA, WD), damped)
    for g, group in enumerate(problem.groups):
        out, gradient = x[group], problem.gradient_of(group)
        exact = torch.linalg.solve(damped - out.mT @ out / n, gradient)
        torch.testing.assert_close(change[g], exact, rtol=1e-10, atol=1e-12)
        factor = out / n**0.5
        solved = torch.linalg.solve(damped, gradient * n)
        step = leave_out_step(solved, factor, torch.linalg.solve(damped, factor.mT).mT, n)
        torch.testing.assert_close(change[g], step, rtol=1e-10, atol=1e-12)


def test_the_linearization_error_is_of_first_order():
    errors = []
    for epsilon in (1e-2, 1e-3, 1e-4):
        problem = classification([[1]])
        weights = torch.full((1, 1), epsilon)
        problem.removal = RemovalTerm(problem.removal.function, problem.t, problem.removal.index, weights)
        damped = problem.ggn() + (LAMBDA + WD) * torch.eye(len(problem.flat))
        change = problem.minimise(ResponseObjective(problem.loss, "pbrf", LAMBDA, WD), damped, steps=200)
        rows = problem.join(removal_gradients(problem.loss, problem.reference, problem.removal), 1)
        linear = torch.linalg.solve(damped, rows[0])
        errors.append(((change[0] - linear).norm() / linear.norm()).item())
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.1)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.02)


def correlation(a, b):
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def test_logistic_regression_retrained_without_each_sample_and_its_influence():
    """Ground truth 10: 400 trainings at once; the paper's claim for a strongly convex model."""
    data = pytest.importorskip("sklearn.datasets").load_breast_cancer()
    x, t = torch.tensor(data.data), torch.tensor(data.target)[:, None].double()
    x = torch.cat([(x - x[:400].mean(0)) / x[:400].std(0, correction=0), torch.ones(len(x), 1)], 1)
    n, wd, model = 400, 1e-2, nn.Linear(31, 1, bias=False)
    (x, test_x), (t, test_t) = x.split([n, 169]), t.split([n, 169])
    loss, every = BernoulliCrossEntropy(), [[i] for i in range(n)]
    model.weight.data.zero_()
    for _ in range(12):
        problem = Problem(model, x, t, loss, every)
        curvature = problem.ggn() + wd * torch.eye(31)
        slope = problem.gradient_of(list(range(n))) + wd * problem.flat
        model.weight.data -= torch.linalg.solve(curvature, slope)
    assert slope.abs().max() < 1e-14
    retrained = problem.minimise(ResponseObjective(loss, "warm", weight_decay=wd), curvature, steps=80)

    gradients = n * problem.join(removal_gradients(loss, problem.reference, problem.removal), 1)
    solved = torch.linalg.solve(curvature, gradients.mT).mT
    roots = ((p := problem.outputs(problem.flat).sigmoid()) * (1 - p) / n).sqrt() * x
    solved_roots = torch.linalg.solve(curvature, roots.mT).mT
    exact = torch.stack([leave_out_step(solved[i], roots[i, None], solved_roots[i, None], n) for i in range(n)])

    slopes = torch.func.jacrev(lambda flat: loss.value(test_x @ flat[:, None], test_t))(problem.flat)
    losses = torch.stack([loss.value(test_x @ (problem.flat + d)[:, None], test_t) for d in retrained], 1)
    actual = losses - loss.value(test_x @ problem.flat[:, None], test_t)[:, None]
    influence, rescaled = slopes @ solved.mT / n, slopes @ exact.mT
    assert correlation(influence, actual).mean() == pytest.approx(0.978, abs=0.002)
    assert correlation(influence.mean(0), actual.mean(0)) == pytest.approx(0.980, abs=0.002)
    assert (influence - actual).norm() / actual.norm() == pytest.approx(0.233, abs=0.005)
    assert correlation(rescaled, actual).mean() == pytest.approx(0.995, abs=0.002)
    assert (rescaled - actual).norm() / actual.norm() == pytest.approx(0.076, abs=0.005)


def test_removed_losses_are_those_of_the_copies():
    problem = classification()
    change = 0.1 * torch.randn(2, len(problem.flat))
    found = removal_losses(problem.loss, problem.split(change), problem.reference, problem.removal)
    for g, group in enumerate(problem.groups):
        losses = problem.loss.value(problem.outputs(problem.flat + change[g]), problem.t)
        torch.testing.assert_close(found[g], losses[group].sum() / 12)


def test_small_responses_survive_float32():
    """The stored change keeps what adding it to parameters and subtracting again would lose."""
    torch.set_default_dtype(torch.float32)
    problem = classification([[1]])
    objective = ResponseObjective(problem.loss, "pbrf", LAMBDA)
    change = 1e-4 * torch.randn(1, len(problem.flat), generator=torch.Generator().manual_seed(3))
    terms, gradient = problem.evaluate(objective, change)
    torch.set_default_dtype(torch.float64)
    exact = Problem(net().double(), problem.x.double(), problem.t, problem.loss, [[1]])
    for parameter, value in zip(exact.module.parameters(), problem.reference.values(), strict=True):
        parameter.data = value.double()
    exact = Problem(exact.module, exact.x, exact.t, exact.loss, [[1]])
    wide_terms, wide = exact.evaluate(objective, change.double())
    torch.testing.assert_close(terms.data.double(), wide_terms.data, rtol=1e-2, atol=0.0)
    torch.testing.assert_close(gradient.double(), wide, rtol=1e-3, atol=1e-6)


def test_gaps_telescope():
    names = ("cold", "warm", "proximal", "pbrf", "linear", "estimate")
    stages = {name: torch.randn(3, 7) * 10.0**-place for place, name in enumerate(names)}
    gaps = influence_gaps(stages)
    assert list(gaps) == ["warm-start", "proximity", "non-convergence", "linearization", "solver"]
    total = torch.stack(list(gaps.values())).sum(0)
    torch.testing.assert_close(total, stages["cold"] - stages["estimate"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gaps["non-convergence"], stages["proximal"] - stages["pbrf"])


def test_without_damping_there_is_no_proximity_gap():
    problem = classification()
    change = torch.randn(2, len(problem.flat))
    warm, proximal = (
        problem.evaluate(ResponseObjective(problem.loss, response, 0.0, WD), change)[1]
        for response in ("warm", "proximal")
    )
    assert torch.equal(warm, proximal)


def test_at_the_optimum_of_a_linear_model_retraining_nearby_is_the_pbrf():
    """No non-convergence gap where the reference is the minimum and the loss is quadratic."""
    problem = regression()
    curvature = problem.x.mT @ problem.x / 50
    problem.module.weight.data = torch.linalg.solve(curvature, problem.x.mT @ problem.t[:, 0] / 50)[None]
    problem = Problem(problem.module, problem.x, problem.t, HALF, problem.groups)
    damped = curvature + LAMBDA * torch.eye(4)
    near = [problem.minimise(ResponseObjective(HALF, response, LAMBDA), damped) for response in ("proximal", "pbrf")]
    torch.testing.assert_close(*near, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HALF, "hot"), "response must be one of"),
        ((HALF, "warm", -1.0), "at least 0"),
        ((HALF, "warm", 0.0, -1.0), "at least 0"),
        ((HALF, "warm", float("nan")), "at least 0"),
        ((HALF, "pbrf"), "must be positive for the PBRF"),
        ((CallableLoss(lambda y, t: y.sum(1).cos(), convex=False), "pbrf", 0.1), "convex"),
    ],
)
def test_bad_objectives_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResponseObjective(*arguments)


def test_missing_parts_are_named():
    problem = classification()
    data = DataTerm(problem.data.function, problem.t)
    with pytest.raises(ValueError, match="reference_outputs"):
        problem.evaluate(ResponseObjective(problem.loss, "pbrf", 0.1), torch.zeros(2, len(problem.flat)), data)
    with pytest.raises(ValueError, match="stages must hold"):
        influence_gaps({"cold": torch.zeros(2)})
