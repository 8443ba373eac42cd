"""The rivals of the LAFTR benchmark compute what their papers say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy


@pytest.fixture
def rivals(scripts):
    pytest.importorskip("sklearn")
    import _laftr_rivals

    return _laftr_rivals


@pytest.fixture
def problem(scripts):
    pytest.importorskip("sklearn")
    import _laftr_problem

    return _laftr_problem


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def data(number=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(number) % 3


# -- the buffer --------------------------------------------------------------------------------------------------------


def test_a_reservoir_keeps_all_rows_while_there_is_room(rivals):
    reservoir = rivals.Reservoir(5)
    reservoir.add(torch.tensor([1.0, 2.0]), torch.tensor([10, 20]))
    reservoir.add(torch.tensor([3.0]), torch.tensor([30]))
    assert len(reservoir) == 3
    values, labels = reservoir.draw(9)
    assert sorted(values.tolist()) == [1.0, 2.0, 3.0]
    assert labels.tolist() == [10 * value for value in values.tolist()]


@pytest.mark.parametrize("batch", [1, 7])
def test_every_row_stays_in_a_reservoir_with_the_same_probability(rivals, batch):
    hits, runs = torch.zeros(30), 2000
    for seed in range(runs):
        reservoir = rivals.Reservoir(6, seed)
        for part in torch.arange(30).split(batch):
            reservoir.add(part)
        assert len(reservoir.columns[0].unique()) == 6
        hits[reservoir.columns[0]] += 1
    expected = runs * 6 / 30
    assert (hits - expected).abs().max() < 4.5 * (expected * (1 - 6 / 30)) ** 0.5
    early, late = hits[:6].mean(), hits[-6:].mean()
    assert abs(early - late) < 4.5 * (2 / 6 * expected) ** 0.5


# -- DER ---------------------------------------------------------------------------------------------------------------


def filled(rivals, beta, model, size=8):
    """A learner whose buffer holds the rows of one batch, as an older network answered them."""
    learner = rivals.DER(alpha=0.7, beta=beta, size=size)
    learner.loss(net(seed=3), *data(size))
    return learner


def test_the_first_step_of_der_is_plain_and_stores_what_the_network_said(rivals):
    model, (x, y) = net(), data(8)
    learner = rivals.DER(alpha=0.7, size=8)
    assert learner.nbytes == 0
    torch.testing.assert_close(learner.loss(model, x, y), cross_entropy(model(x), y))
    images, logits = learner.buffer.draw(8)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model(images).detach())
    assert learner.nbytes == 8 * (4 + 3) * 8


def test_der_keeps_the_logits_of_the_time_they_were_stored(rivals):
    model, (x, y) = net(), data(8, seed=2)
    learner = filled(rivals, 0.0, model)
    images, logits = learner.buffer.columns  # eight rows, all of them drawn in a batch of eight
    expected = cross_entropy(model(x), y) + 0.7 * (model(images) - logits).square().sum(1).mean() / 3
    assert (model(images) - logits).abs().max() > 0.1
    torch.testing.assert_close(learner.loss(model, x, y), expected.detach(), check_dtype=False)


def test_derpp_adds_the_labels_of_a_second_draw(rivals):
    model, (x, y) = net(), data(8, seed=2)
    learner = filled(rivals, 0.3, model)
    images, logits, labels = (column.clone() for column in learner.buffer.columns)
    expected = cross_entropy(model(x), y) + 0.7 * (model(images) - logits).square().mean()
    expected = expected + 0.3 * cross_entropy(model(images), labels)
    torch.testing.assert_close(learner.loss(model, x, y), expected)

    draws = []
    original = learner.buffer.draw
    learner.buffer.draw = lambda number: draws.append(original(number)) or draws[-1]
    learner.loss(model, *data(3, seed=5))
    assert len(draws) == 2
    assert not torch.equal(draws[0][0], draws[1][0])


# -- FROMP -------------------------------------------------------------------------------------------------------------


def test_memorable_points_are_those_of_each_class_that_the_network_is_least_sure_of(rivals):
    model, (x, y) = net(), data(24)
    chosen = rivals.memorable(model, (x, y), 6)
    p = model(x).softmax(1).detach()
    trace = torch.stack([torch.trace(torch.diag(row) - torch.outer(row, row)) for row in p])
    expected = {
        tuple(x[i].tolist())
        for label in range(3)
        for i in sorted((y == label).nonzero().flatten().tolist(), key=lambda i: -trace[i])[:2]
    }
    assert {tuple(row.tolist()) for row in chosen} == expected


def dense_jacobian(model, x, c):
    """Of output c's probability, ``(n, P)``, one backward pass for each sample."""
    rows = []
    for row in x:
        grads = torch.autograd.grad(model(row[None]).softmax(1)[0, c], list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def test_the_curvature_is_the_diagonal_of_the_gauss_newton_matrix(rivals):
    model, (x, _) = net(), data(7)
    total = 0
    for row in x:
        logits = model(row[None])[0]
        jacobian = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(z, list(model.parameters()), retain_graph=True)])
            for z in logits
        ])  # fmt: skip
        p = logits.softmax(0).detach()
        total = total + torch.diag(jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian)
    found = rivals.gauss_newton_diagonal(model, x, chunk=3)
    torch.testing.assert_close(torch.cat([part.flatten() for part in found.values()]), total)


def test_fromp_follows_the_gradient_of_its_paper(rivals):
    """J_c(theta)^T K_c^-1 (p_c(theta) - p_c(theta before)), summed over tasks and outputs."""
    before, tasks = net(), [data(12, seed=1), data(12, seed=2)]
    learner = rivals.FROMP(tau=2.0, points=6, delta=1e-3, jitter=1e-5)
    learner.end_task(net(seed=9), tasks[0])
    learner.end_task(before, tasks[1])
    first, second = (rivals.gauss_newton_diagonal(m, t[0]) for m, t in zip((net(9), before), tasks, strict=True))
    spread = torch.cat([(1 / (first[name] + second[name] + 1e-3)).flatten() for name in first])

    model = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    expected = 0
    for points in learner.images:
        for c in range(3):
            j = dense_jacobian(before, points, c)
            kernel = (j * spread) @ j.T + 1e-5 * torch.eye(len(points), dtype=torch.float64)
            rest = model(points).softmax(1)[:, c] - before(points).softmax(1)[:, c]
            expected = expected + dense_jacobian(model, points, c).T @ torch.linalg.solve(kernel, rest.detach())
    found = torch.autograd.grad(learner.penalty(model), list(model.parameters()))
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), expected, rtol=1e-6, atol=1e-8)

    x, y = data(5, seed=7)
    total = cross_entropy(model(x), y) / 2 + learner.penalty(model)
    torch.testing.assert_close(learner.loss(model, x, y), total)


def test_fromp_asks_nothing_where_nothing_moved(rivals):
    model = net()
    learner = rivals.FROMP(tau=1.0, points=6)
    x, y = data(12)
    torch.testing.assert_close(learner.loss(model, x, y), cross_entropy(model(x), y))
    learner.end_task(model, (x, y))
    assert learner.penalty(model).item() == 0.0
    assert learner.nbytes == 8 * (6 * 4 + sum(parameter.numel() for parameter in model.parameters()))


# -- the loop that all share -------------------------------------------------------------------------------------------


def test_a_gradient_is_cut_where_the_learner_says_so(problem):
    class Steep(problem.Learner):
        max_norm = 1.0

        def loss(self, model, x, y):
            return 1e3 * super().loss(model, x, y)

    moved = []
    for learner in (Steep(), problem.Learner()):
        model = net()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        problem.training_step(learner, model, torch.optim.SGD(model.parameters(), lr=1.0), data(8))
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved.append(float((after - before).norm()))
    assert moved[0] == pytest.approx(1.0, rel=1e-3)
    assert moved[1] != pytest.approx(1.0, rel=1e-3)


def test_tasks_permute_pixels_that_are_centred_and_scaled_as_a_whole(problem):
    first, second = problem.tasks(2)
    images, labels = first.train
    assert images.shape == (1400, 64)
    assert abs(images.mean().item()) < 1e-5
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(second.train[1], labels)
    torch.testing.assert_close(second.train[0].sort(1).values, images.sort(1).values)
    torch.testing.assert_close(second.test[0].sort(1).values, first.test[0].sort(1).values)
    assert not torch.equal(second.train[0], images)


def test_tasks_in_a_row_are_measured_after_each(problem, monkeypatch):
    """Fine-tuning for an epoch on two tasks forgets; the accuracies are those of the networks after each task."""
    models = []

    class Watching(problem.Learner):
        def end_task(self, model, data):
            models.append(copy.deepcopy(model))

    outcome = problem.learn(Watching(), seed=0, number=2, epochs=4)
    (first, second), row = models, problem.tasks(2)

    def right(model, task):
        x, y = row[task].test
        return float((model(x).argmax(1) == y).double().mean())

    assert outcome.accuracy == pytest.approx((right(second, 0) + right(second, 1)) / 2)
    assert outcome.transfer == pytest.approx(right(second, 0) - right(first, 0))
    assert outcome.transfer < 0
    assert outcome.nbytes == 0


def test_a_penalty_is_the_weighted_mean_over_tasks(problem):
    learner = problem.Penalized("full", 3.0)
    x, y = data(8)
    model = net()
    for seed in (1, 2):
        learner.end_task(net(seed), data(8, seed))
    single = [estimator.distance(model) for estimator in learner.past]
    torch.testing.assert_close(learner.loss(model, x, y), cross_entropy(model(x), y) + 3 * (single[0] + single[1]) / 2)
    assert learner.nbytes == sum(estimator.nbytes for estimator in learner.past) > 0
