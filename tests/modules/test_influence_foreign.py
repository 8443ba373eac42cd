"""Influence in networks that nobody here wrote: transformers, convolutions, recurrences, frozen and tied weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ext._lightning import LightningModule, submodule
from lightning_ext.functional import InfluenceObjective
from lightning_ext.modules import Classifier, InfluenceModule
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import Dense, classes, close, loader, matrix, network, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*have no Kronecker factors")


def finite_difference(base, value, direction, size=1e-5):
    """The derivative of ``value()`` along a direction of the base's parameters that require gradients."""
    params = [p for p in base.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in params]
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            parts = torch.split(direction, [p.numel() for p in params])
            for p, s, d in zip(params, start, parts, strict=True):
                p.copy_(s + sign * size * d.view_as(s))
            found.append(value())
    with torch.no_grad():
        for p, s in zip(params, start, strict=True):
            p.copy_(s)
    return (found[0] - found[1]) / (2 * size)


def check_scores(base, objective, data, asked, solver="nystrom_cg", **kwargs):
    """Scores are derivatives of every training loss along the solved queries, which solve the damped system."""
    options = {"damping": 0.1, "double": True, "tol": 1e-9, "rank": 20, **kwargs}
    module = InfluenceModule(base, objective, asked, solver=solver, **options)
    found = matrix(predict(module, data), len(data.dataset))
    batch = torch.utils.data.default_collate([data.dataset[i] for i in range(len(data.dataset))])
    double = module.base.eval()
    batch = double_precision(batch)

    def losses():
        return module.objective.losses(module.objective.outputs(double, batch), module.objective.targets(batch))

    for q, row in enumerate(module.solved):
        close(found[q], finite_difference(double, losses, row) / len(data.dataset), rtol=1e-5)
    if solver != "ekfac":
        check_solved(module, batch, double_precision(next(iter(asked))))
    return module, found


def check_solved(module, batch, asked, damping=0.1):
    """(G + damping I) s = g_m: J s by differences, H by autograd of the losses, J^T by a backward pass."""
    base, objective = module.base, module.objective
    params = [p for p in base.parameters() if p.requires_grad]

    def pulled(outputs, cotangent):
        found = torch.autograd.grad(outputs, params, cotangent, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    y = objective.outputs(base, asked)
    measured = objective.losses(y, objective.targets(asked))
    gradients = [pulled(measured, torch.eye(len(measured), dtype=y.dtype)[q]) for q in range(len(measured))]
    for row, gradient in zip(module.solved, gradients, strict=True):
        tangent = finite_difference(base, lambda: objective.outputs(base, batch), row)
        y = objective.outputs(base, batch)
        total = F.cross_entropy(y.flatten(0, -2), objective.targets(batch).flatten(), reduction="sum")
        (slope,) = torch.autograd.grad(total, y, create_graph=True)
        (curved,) = torch.autograd.grad(slope, y, tangent, retain_graph=True)
        tokens = y[0].numel() // y.shape[-1]  # a sample's loss is the mean over them
        close(pulled(y, curved) / (tokens * len(y)) + damping * row, gradient, rtol=1e-5)


def double_precision(batch):
    if isinstance(batch, dict):
        return {k: double_precision(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return [double_precision(v) for v in batch]
    return batch.double() if torch.is_floating_point(batch) else batch


# -- a transformer ------------------------------------------------------------------------------------------------

TOKENS = 11


class Sentences(Dataset):
    def __init__(self, n=8, keyed=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens, self.keyed = torch.randint(TOKENS, (n, 6), generator=generator), keyed

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        source, target = self.tokens[i, :-1], self.tokens[i, 1:]
        return {"source": source, "labels": target} if self.keyed else (source, target)


def transformer():
    torch.manual_seed(0)
    kind = submodule("demos").Transformer
    return kind(vocab_size=TOKENS, ninp=8, nhead=2, nhid=8, nlayers=1, dropout=0.3)


def next_token(module, batch):
    """The demo flattens its tokens; samples come first here."""
    source, target = (batch["source"], batch["labels"]) if isinstance(batch, dict) else batch
    return module(source, target).view(*target.shape, TOKENS)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("solver", ["nystrom_cg", "ekfac"])
def test_the_demo_transformer(keyed, solver):
    base = transformer().train()
    data = DataLoader(Sentences(keyed=keyed), batch_size=3, shuffle=True)
    asked = DataLoader(Sentences(2, keyed=keyed, seed=1), batch_size=2)
    objective = InfluenceObjective("cross_entropy", forward=next_token, target="labels" if keyed else None)
    module, found = check_scores(base, objective, data, asked, solver=solver)
    assert base.training
    if solver == "nystrom_cg":
        assert module.report["converged"]
        close(module.scores(data), found)


def test_the_demo_transformers_curvature_by_a_dense_matrix():
    base = transformer().double().eval()
    head = [name for name, _ in base.named_parameters() if name.startswith("decoder")]
    data = Sentences()
    sources, targets = torch.stack([data[i][0] for i in range(8)]), torch.stack([data[i][1] for i in range(8)])

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base

        def forward(self, pair):
            source, target = pair[..., :5], pair[..., 5:]
            return self.base(source, target).view(len(pair), 5, TOKENS)

    def loss(y, t):
        return F.cross_entropy(y, t)

    class Tokens(Dense):
        def output_hessian(self, i):
            y = self.output(self.params, self.x[i])
            return torch.func.hessian(lambda flat: loss(flat.view_as(y), self.t[i]))(y.flatten())

        def slope(self, x, t):
            return torch.func.grad(lambda p: loss(self.output(p, x), t))(self.params)

        def jacobian(self, i):
            found = torch.func.jacrev(lambda p: self.output(p, self.x[i]).flatten())(self.params)
            return torch.cat([found[n].flatten(1) for n in self.params], dim=1)

    pairs = torch.cat([sources, targets], dim=1)
    dense = Tokens(Wrapped(), (pairs, targets), loss, keep=lambda name: name.removeprefix("base.") in head)
    dense.x = pairs  # class numbers
    asked = (pairs[:2].flip(1), targets[:2])
    g = dense.gradients()
    m = torch.stack([dense.flat(dense.slope(x, t)) for x, t in zip(*asked, strict=True)])
    wanted = m @ dense.inverse(0.1) @ g.mT / 8
    module = InfluenceModule(Wrapped(), queries=[asked], damping=0.1, include=r"^base\.decoder")
    close(module.scores(loader(TensorDataset(pairs, targets), 3)), wanted)


# -- convolutions, normalisation, dropout -------------------------------------------------------------------------


def convolutions():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5),
        nn.Conv2d(3, 2, 2, stride=2, bias=False), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3),
    ]  # fmt: skip
    base = nn.Sequential(*layers)
    base.train()(torch.randn(20, 1, 4, 4))  # running statistics that say something
    return base


def images(n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=generator), torch.randint(3, (n,), generator=generator))


@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "dual"])
def test_a_convolutional_network_with_batch_statistics(solver):
    base, asked = convolutions(), [images(2, seed=5)[:]]
    before = {k: v.clone() for k, v in base.state_dict().items()}
    dense = Dense(base.eval(), images()[:])
    wanted = dense.scores(asked, 0.1)
    base.train()
    module = InfluenceModule(base, queries=asked, damping=0.1, double=True, solver=solver, tol=1e-10)
    close(matrix(predict(module, loader(images(), 4, shuffle=False)), 9), wanted, rtol=1e-7)
    assert base.training
    assert all(part.training for part in base)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
    assert module.base.training, "the copy's mode was not put back"


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "trak", "identity"])
def test_approximate_solvers_of_a_convolutional_network(solver):
    base, asked = convolutions(), [images(2, seed=5)[:]]
    wanted = Dense(base.eval(), images()[:]).scores(asked, 0.1)
    module = InfluenceModule(base.train(), queries=asked, damping=0.1, double=True, solver=solver, rank=64)
    found = module.scores(loader(images(), 4))
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.7
    assert base.training


# -- batches of other forms ---------------------------------------------------------------------------------------


class Keyed(Dataset):
    def __init__(self, n=23, seed=1):
        self.data = classes(n, seed=seed)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return {"x": self.data[i][0], "label": self.data[i][1], "name": f"sample {i}"}


def test_batches_that_are_mappings():
    wanted = Dense(network(4, 5, 3), classes()[:]).scores(ref.queries(), 0.1)
    objective = InfluenceObjective(forward="x", target="label")
    module = InfluenceModule(
        network(4, 5, 3), objective, DataLoader(Keyed(3, seed=9), batch_size=2), damping=0.1, double=True
    )
    close(matrix(predict(module, loader(Keyed(), shuffle=True))), wanted)
    assert module.leave_out([[1, 2]], loader(Keyed())).shape == (3, 1)


def test_the_default_objective_says_which_argument_fits_a_mapping():
    module = InfluenceModule(network(4, 5, 3), queries=DataLoader(Keyed(3)), damping=0.1)
    with pytest.raises(ValueError, match="forward="):
        predict(module, loader(Keyed()))
    module.objective = InfluenceObjective(forward="x")
    with pytest.raises(ValueError, match="target="):
        predict(module, loader(Keyed()))


# -- frozen, tied, recurrent, compiled ----------------------------------------------------------------------------


def test_frozen_parameters_stay_out():
    base = network(4, 5, 3)
    base[0].weight.requires_grad_(False)
    some = Dense(base, classes()[:], keep=lambda name: name != "0.weight")
    for solver in ("direct", "nystrom_cg", "ekfac"):
        module = InfluenceModule(base, queries=ref.queries(), damping=0.1, double=True, solver=solver, tol=1e-9)
        found = module.scores(loader(classes()))
        assert module.report["parameters"] == 5 + 15 + 3
        if solver != "ekfac":
            close(found, some.scores(ref.queries(), 0.1), rtol=1e-7)


class Tied(nn.Module):
    """One weight for two layers, and once by itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))) + F.linear(x, self.a.weight))


@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "ekfac", "identity"])
def test_tied_parameters_count_once(solver):
    torch.manual_seed(0)
    base = Tied()
    module = InfluenceModule(base, queries=ref.queries(), damping=0.1, double=True, solver=solver, tol=1e-9)
    found = module.scores(loader(classes()))
    assert module.report["parameters"] == 16 + 4 + 4 + 12 + 3
    dense = Dense(base, classes()[:])
    assert "b.weight" not in dense.params
    wanted = dense.scores(ref.queries(), 0.1)
    if solver in ("direct", "nystrom_cg"):
        close(found, wanted, rtol=1e-7)
    elif solver == "identity":
        close(found, dense.gradients(*ref.queries()[0]) @ dense.gradients().mT / 23)
    else:
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.7


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "ekfac"])
def test_a_recurrent_network(solver):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(7, 4, 2), torch.randint(2, (7,)))
    asked = [(torch.randn(2, 4, 2), torch.tensor([0, 1]))]
    check_scores(Recurrent(), InfluenceObjective(), loader(data, 3), asked, solver=solver)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_a_compiled_network(how):
    wanted = Dense(network(4, 5, 3), classes()[:]).scores(ref.queries(), 0.1)
    base = network(4, 5, 3)
    if how == "torch.compile":
        base = torch.compile(base, backend="eager")
    else:
        base.compile(backend="eager")
    for solver in ("direct", "nystrom_cg"):
        module = InfluenceModule(base, queries=ref.queries(), damping=0.1, solver=solver, tol=1e-6)
        close(matrix(predict(module, loader(classes()))), wanted, rtol=2e-5)


class Plain(LightningModule):
    """Logs and saves, as people's modules do."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.net = network(4, 5, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["lightning", "classifier"])
def test_a_lightning_module_after_its_training(kind):
    base = Plain() if kind == "lightning" else Classifier(network(4, 5, 3))
    data = classes()
    from lightning_ext._lightning import Trainer

    Trainer(**ref.QUIET, max_epochs=2).fit(base, loader(data, shuffle=True))
    wanted = Dense(base, data[:]).scores(ref.queries(), 0.1)
    module = InfluenceModule(base, queries=ref.queries(), damping=0.1)
    close(matrix(predict(module, loader(data))), wanted, rtol=1e-4)
    Trainer(**ref.QUIET, max_epochs=1).fit(base, loader(data))
    close(matrix(predict(module, loader(data))), Dense(base, data[:]).scores(ref.queries(), 0.1), rtol=1e-4)
