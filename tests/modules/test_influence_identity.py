"""A stored table is continued by the same question about the same data only; single samples are checked as many are."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.functional import ConvergenceWarning, InfluenceObjective
from lightning_ext.modules import InfluenceModule
from lightning_ext.modules._influence_identity import described
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import N, classes, loader, network, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def stored(folder, objective=None, base=None):
    base = network(4, 5, 3) if base is None else base
    return InfluenceModule(base, objective, ref.queries(), damping=0.1, output_dir=folder)


def changed(data, index, tensor):
    tensors = [t.clone() for t in data.tensors]
    tensors[tensor][index] = tensors[tensor][index] + 1 if tensor == 0 else (tensors[tensor][index] + 1) % 3
    return TensorDataset(*tensors)


@pytest.mark.parametrize("index", [0, N - 1])
@pytest.mark.parametrize("tensor", [0, 1], ids=["an input", "a label"])
def test_one_changed_sample_is_another_data_set(index, tensor, tmp_path):
    predict(stored(tmp_path), loader(classes()))
    with pytest.raises(ValueError, match=r"data: now.*Choose another folder"):
        predict(stored(tmp_path), loader(changed(classes(), index, tensor)))


def test_other_batch_sizes_are_the_same_data_set(tmp_path):
    first = stored(tmp_path)
    predict(first, loader(classes()))
    second = stored(tmp_path)
    predict(second, DataLoader(classes(), batch_size=4))
    torch.testing.assert_close(second.store.read(torch.arange(N)), first.store.read(torch.arange(N)), rtol=0, atol=0)


def scaled(factor):
    return InfluenceObjective(forward=lambda module, batch: factor * module(batch[0]))


def forward(module, batch, factor=1.0):
    return factor * module(batch[0])


OBJECTIVES = {
    "another constant": (
        lambda: InfluenceObjective(forward=lambda module, batch: module(batch[0])),
        lambda: InfluenceObjective(forward=lambda module, batch: 3 * module(batch[0])),
    ),
    "what a function holds on to": (lambda: scaled(1.0), lambda: scaled(2.0)),
    "arguments of a partial": (
        lambda: InfluenceObjective(forward=functools.partial(forward, factor=1.0)),
        lambda: InfluenceObjective(forward=functools.partial(forward, factor=2.0)),
    ),
    "another measurement": (
        lambda: InfluenceObjective(measurement=lambda y, t: y[:, 0]),
        lambda: InfluenceObjective(measurement=lambda y, t: y[:, 1]),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_functions_are_known_by_what_they_do(name, tmp_path):
    one, other = OBJECTIVES[name]
    predict(stored(tmp_path, one()), loader(classes()))
    predict(stored(tmp_path, one()), loader(classes()))  # the same text, another object
    with pytest.raises(ValueError, match=r"objective: now.*Choose another folder"):
        predict(stored(tmp_path, other()), loader(classes()))


def through_a_module(power):
    import torch.nn.functional as functional

    return lambda y, t: functional.softmax(y, 1)[:, 0] ** power


def test_functions_that_hold_modules_sets_or_themselves_are_described_at_once():
    def again(n):
        return again(n - 1) if n else {"alpha", "beta", "gamma"}

    assert described(through_a_module(2)) == described(through_a_module(2))
    assert described(through_a_module(2)) != described(through_a_module(3))
    assert described(again).count("alpha") == 1
    assert described({"alpha", "beta"}) == described({"beta", "alpha"})


SCALE = 1.0


def test_what_a_function_reads_is_part_of_it(monkeypatch):
    def reading(module, batch):
        return SCALE * module(batch[0])

    before = described(reading)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert described(reading) != before


def test_another_network_with_the_same_parameters_is_another(tmp_path):
    def net(activation):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)).double()

    predict(stored(tmp_path, base=net(nn.Tanh())), loader(classes()))
    with pytest.raises(ValueError, match=r"module: now.*Choose another folder"):
        predict(stored(tmp_path, base=net(nn.ReLU())), loader(classes()))


class Tied(nn.Module):
    """A weight that a layer explains only in part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(7, 5), nn.Linear(5, 5)

    def forward(self, tokens):
        hidden = torch.tanh(self.inner(self.embedding(tokens))).mean(1)
        return nn.functional.linear(hidden, self.embedding.weight)


@pytest.mark.parametrize("sizes", [(1, 12), (12, 1), (11, 12), (1, 1)])
def test_batches_of_one_are_checked_too(sizes):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randint(0, 7, (12, 3), generator=generator), torch.randint(0, 7, (12,), generator=generator)
    )
    base = Tied().double().eval()

    def scores(train, queries):
        module = InfluenceModule(base, queries=DataLoader(data, batch_size=queries), damping=0.1)
        return module.scores(DataLoader(data, batch_size=train))

    torch.testing.assert_close(scores(*sizes), scores(12, 12), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", [SubsetRandomSampler(range(4)), WeightedRandomSampler(torch.ones(4), 4)])
def test_queries_that_are_drawn_are_refused(sampler):
    queries = DataLoader(classes(), batch_size=4, sampler=sampler)
    with pytest.raises(MisconfigurationException, match=f"{type(sampler).__name__}.*no sampler"):
        InfluenceModule(network(4, 5, 3), queries=queries, damping=0.1)


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(4)), WeightedRandomSampler(torch.ones(N), N), RandomSampler(range(N), num_samples=4)],
)
@pytest.mark.parametrize("way", ["scores", "predict"])
def test_samplers_that_choose_are_refused(sampler, way):
    module = InfluenceModule(network(4, 5, 3), queries=ref.queries(), damping=0.1)
    chosen = DataLoader(classes(), batch_size=4, sampler=sampler)
    with pytest.raises(
        MisconfigurationException, match=f"{type(sampler).__name__} takes .* of its {N} samples.*Subset"
    ):
        module.scores(chosen) if way == "scores" else predict(module, chosen)


def test_a_shuffling_loader_is_the_whole_data_set():
    module = InfluenceModule(network(4, 5, 3), queries=ref.queries(), damping=0.1)
    shuffled = module.scores(DataLoader(classes(), batch_size=5, shuffle=True))
    torch.testing.assert_close(shuffled, module.scores(loader(classes())))


def test_lanczos_without_damping_is_refused():
    module = InfluenceModule(network(4, 1), InfluenceObjective("mse"), ref.queries(), damping=0.0, solver="lanczos")
    with pytest.raises(ValueError, match="'lanczos' divides by the damping"):
        module.scores(loader(ref.numbers()))


@pytest.mark.parametrize("damping", [0.1, 1e-2, 1e-3])
def test_squared_systems_report_the_residual_of_the_system_itself(damping):
    options = {"queries": ref.queries(), "damping": damping, "double": True}
    module = InfluenceModule(network(4, 5, 3), solver="normal_cg", tol=1e-3, max_iterations=2000, **options)
    solved = module.solve(loader(classes()))
    matrix = torch.linalg.inv(ref.Dense(network(4, 5, 3), classes()[:]).inverse(damping))
    gradients = InfluenceModule(network(4, 5, 3), solver="identity", **options).solve(loader(classes()))
    residual = (solved @ matrix - gradients).norm(dim=1) / gradients.norm(dim=1)
    assert module.report["converged"]
    assert residual.max() <= 1.01e-3
    assert module.report["residual"] == pytest.approx(float(residual.max()), rel=1e-3)


def test_squared_systems_warn_where_the_system_itself_is_not_solved():
    module = InfluenceModule(
        network(4, 5, 3), queries=ref.queries(), damping=1e-4, solver="normal_cg", tol=1e-6, max_iterations=5
    )
    with pytest.warns(ConvergenceWarning, match="raise max_iterations"):
        module.solve(loader(classes()))
    assert not module.report["converged"]


class Masking(nn.Module):
    """A missing input leaves the outputs finite, and the first layer's gradient not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(torch.nan_to_num(self.first(x))))


@pytest.mark.parametrize("solver", ["identity", "direct", "block_cg"])
def test_a_missing_input_behind_finite_outputs_is_named(solver):
    x, t = (tensor.clone() for tensor in classes().tensors)
    x[7, 0] = torch.nan
    module = InfluenceModule(Masking().double(), queries=ref.queries(), damping=0.1, solver=solver)
    with pytest.raises(ValueError, match=r"Samples \[7\]"):
        module.scores(loader(TensorDataset(x, t)))
