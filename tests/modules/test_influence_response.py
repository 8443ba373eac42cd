"""Stacked retraining against networks trained one by one, and the Bregman response against its closed form."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import MisconfigurationException, submodule
from lightning_ext.data import DigitsDataModule, EpochSampler, IndexedDataset
from lightning_ext.functional import InfluenceObjective
from lightning_ext.modules import Classifier, PBRFModule, ResponseModule
from lightning_ext.testing import StatefulLoader, ddp_trainer_kwargs
from tests.conformance.entry import new_trainer

N, LAMBDA, WD, LR = 12, 0.05, 0.02, 0.3
GROUPS = [1, [0, 3, 4]]
HALF = InfluenceObjective("half_squared_error")


def samples(n=N, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def loader(dataset=None, batch_size=N, **kwargs):
    return DataLoader(samples() if dataset is None else dataset, batch_size=batch_size, **kwargs)


def fit(module, data=None, **kwargs):
    kwargs = {"limit_train_batches": None, "max_epochs": 5, **kwargs}
    trainer = new_trainer(**kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning.pytorch")
        trainer.fit(module, loader() if data is None else data)
    return trainer


def flat(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def train_one(start, reference, group, batches, response, steps_per_epoch=None):
    """What one copy is: a network of its own, SGD with momentum on the objective as it is written down."""
    model, frozen = copy.deepcopy(start), copy.deepcopy(reference)
    anchor = [p.detach().clone() for p in reference.parameters()]
    data = samples()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for x, t in batches:
        gone = sum(F.cross_entropy(model(data[i][0][None]), data[i][1][None]) for i in group) / N
        square = sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor, strict=True))
        if response == "pbrf":
            new, old = model(x).log_softmax(1), frozen(x).detach().log_softmax(1)
            loss = (old.exp() * (old - new)).sum(1).mean() + (LAMBDA + WD) / 2 * square
        else:
            loss = F.cross_entropy(model(x), t) + WD / 2 * sum(p.square().sum() for p in model.parameters())
            loss = loss + (LAMBDA / 2 * square if response == "proximal" else 0.0)
        optimizer.zero_grad()
        (loss - gone).backward()
        optimizer.step()
    return flat(model) - flat(reference)


@pytest.mark.parametrize("response", ["cold", "warm", "proximal", "pbrf"])
@pytest.mark.parametrize("batch_size", [N, 4])
def test_each_copy_is_a_network_trained_by_itself(response, batch_size):
    base = net()
    module = ResponseModule(base, None, response, GROUPS, damping=LAMBDA, weight_decay=WD, lr=LR, seed=7)
    data = samples()
    sampler = EpochSampler(data, seed=3)
    fit(module, loader(data, batch_size, sampler=sampler))
    batches = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        batches += list(loader(data, batch_size, sampler=sampler))
    start = base
    if response == "cold":
        start = copy.deepcopy(base)
        torch.manual_seed(7)
        start[0].reset_parameters()
        start[2].reset_parameters()
    for found, group in zip(module.response(), ([1], [0, 3, 4]), strict=True):
        expected = train_one(start, base, group, batches, response)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    assert torch.equal(flat(module.base), flat(base)), "the reference moved"


def standing_still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def linear_problem():
    torch.manual_seed(0)
    x = torch.randn(N, 3, dtype=torch.float64)
    data = TensorDataset(x, torch.randn(N, 1, dtype=torch.float64))
    return nn.Linear(3, 1, bias=False).double(), data, x


def exact_pbrf(base, data, group):
    x, t = data.tensors
    gone = x[group]
    gradient = ((base(gone) - t[group]) * gone).sum(0).detach() / N
    matrix = (x.mT @ x - gone.mT @ gone) / N + (LAMBDA + WD) * torch.eye(3, dtype=x.dtype)
    return torch.linalg.solve(matrix, gradient)


def test_the_pbrf_of_a_linear_model_reaches_its_closed_form():
    base, data, _ = linear_problem()
    module = PBRFModule(base, HALF, GROUPS, LAMBDA, WD, lr=0.05, tolerance=1e-5)
    trainer = fit(module, loader(data), max_epochs=2000)
    for found, group in zip(module.response(), ([1], [0, 3, 4]), strict=True):
        torch.testing.assert_close(found, exact_pbrf(base, data, group), rtol=1e-3, atol=1e-7)
    assert module.gradient_ratio.max() <= 1e-5
    assert trainer.global_step < 2000, "it did not stop when it was good enough"
    assert trainer.callback_metrics["pbrf/loss"] < 0
    assert set(trainer.callback_metrics) == {
        "pbrf/loss", "pbrf/bregman", "pbrf/prox", "pbrf/removed_loss", "pbrf/grad_rel"
    }  # fmt: skip


def test_minibatches_reach_it_too_and_the_ratio_is_that_of_the_whole_set():
    base, data, _ = linear_problem()
    module = PBRFModule(base, HALF, GROUPS, LAMBDA, WD, lr=0.03, tolerance=0.05, check_every_n_epochs=5)
    trainer = fit(module, loader(data, 5, shuffle=True), max_epochs=400)
    assert trainer.current_epoch % 5 == 0
    assert 0 < trainer.current_epoch < 400, "it did not stop when it was good enough"
    full = PBRFModule(base, HALF, GROUPS, LAMBDA, WD, optimizer=standing_still, tolerance=0.05)
    full.change.data.copy_(module.change)
    fit(full, loader(data), max_epochs=1)
    torch.testing.assert_close(module.gradient_ratio, full.gradient_ratio)


def test_it_ends_where_the_gradient_was_found_small_enough():
    """Not one step farther, which nobody has looked at: with momentum that may lead out again."""
    base, data, _ = linear_problem()

    def restless(parameters):
        return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)

    settings = {"objective": HALF, "remove": GROUPS, "damping": LAMBDA, "weight_decay": WD, "tolerance": 0.2}
    module = PBRFModule(base, optimizer=restless, schedule="constant", **settings)
    fit(module, loader(data), max_epochs=200)
    after = PBRFModule(base, optimizer=standing_still, **settings)
    after.change.data.copy_(module.change)
    fit(after, loader(data), max_epochs=1)
    torch.testing.assert_close(after.gradient_ratio, module.gradient_ratio, rtol=1e-9, atol=0.0)


def test_an_unfinished_response_says_so():
    module = PBRFModule(net(), None, GROUPS, LAMBDA)
    with pytest.warns(UserWarning, match=r"stopped at a relative gradient of \d"):
        fit(module, max_epochs=2)
    assert module.gradient_ratio.max() > 1e-2


def test_a_removed_loss_that_runs_away_is_reported():
    module = PBRFModule(net(), None, [list(range(11))], damping=1e-3, lr=0.1, schedule="constant", tolerance=None)
    with pytest.warns(UserWarning, match="rose more than tenfold for copies"):
        fit(module, max_epochs=80)


class Live(nn.Module):
    """Dropout and BatchNorm, whose training behaviour would spoil any response."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))

    def forward(self, x):
        return self.net(x)


def test_dropout_is_off_and_batchnorm_frozen_all_along():
    torch.manual_seed(0)
    base = Live()
    base.net[1].running_mean += 0.5
    buffers = {name: b.clone() for name, b in base.named_buffers()}
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = ResponseModule(base, None, "warm", GROUPS, lr=0.05).train()
        fit(module, loader(batch_size=4), max_epochs=2)
        assert not any(part.training for part in module.base.modules())
        assert all(torch.equal(b, buffers[name]) for name, b in module.base.named_buffers())
        runs.append(module.response())
    assert torch.equal(*runs)
    assert base.training, "the user's module was touched"


def test_measurements_are_those_of_networks_with_the_moved_parameters():
    base = net()
    objective = InfluenceObjective(measurement="margin")
    module = ResponseModule(base, objective, "warm", GROUPS, lr=LR)
    trainer = fit(module)
    queries = samples(7, seed=5)
    batches = loader(queries, 3)
    x, t = queries.tensors
    for g, change in enumerate(module.response()):
        moved = copy.deepcopy(base)
        nn.utils.vector_to_parameters(flat(base) + change, moved.parameters())
        torch.testing.assert_close(module.outputs(batches)[g], moved(x))
        expected = objective.measure(moved(x), t) - objective.measure(base(x), t)
        torch.testing.assert_close(module.measure(batches)[g], expected.detach(), rtol=1e-4, atol=1e-5)
    predicted = torch.cat(trainer.predict(module, batches))
    assert torch.equal(predicted.mT, module.measure(batches)[:, : len(predicted)])


def test_chunks_bound_the_copies_at_once_and_change_nothing(monkeypatch):
    chunks, vmap = set(), torch.func.vmap

    def watched(function, in_dims=0, chunk_size=None, **kwargs):
        chunks.add(chunk_size)
        return vmap(function, in_dims, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(torch.func, "vmap", watched)
    runs = []
    for chunk_size in (None, 2):
        chunks.clear()
        module = PBRFModule(net(), None, [0, 1, [2, 3], 4, 5], LAMBDA, tolerance=None, chunk_size=chunk_size)
        fit(module, loader(batch_size=5))
        runs.append((module.response(), module.measure(loader())))
        assert chunks == {chunk_size}
    torch.testing.assert_close(*runs)


def test_clipping_is_each_copys_own():
    """Clipped in a stack or alone, a copy takes the same steps."""
    runs = []
    for groups in ([[0, 1, 2, 3], [5]], [[5]]):
        module = ResponseModule(net(), None, "warm", groups, lr=LR)
        fit(module, gradient_clip_val=0.05)
        runs.append(module.response()[-1])
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-7)
    unclipped = ResponseModule(net(), None, "warm", [[5]], lr=LR)
    fit(unclipped)
    assert unclipped.response().norm() > 2 * runs[0].norm()
    by_value = ResponseModule(net(), None, "warm", GROUPS, lr=1.0, momentum=0.0)
    fit(by_value, max_epochs=1, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert by_value.response().abs().max() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("batch_size", [N, 4])
def test_keep_trains_on_subsets(batch_size):
    keep = [[0, 2, 5, 7], [1, 3, 4, 6, 8, 9, 10, 11]]
    mask = torch.zeros(2, N, dtype=torch.bool)
    for row, kept in zip(mask, keep, strict=True):
        row[kept] = True
    runs = []
    for chosen in (keep, mask):
        module = ResponseModule(net(), None, "warm", keep=chosen, lr=LR, momentum=0.0)
        fit(module, loader(IndexedDataset(samples()), batch_size), max_epochs=1)
        runs.append(module.response())
    assert torch.equal(*runs)
    for found, kept in zip(runs[0], keep, strict=True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for x, t in loader(batch_size=batch_size):
            place = [i for i, row in enumerate(x) if any(torch.equal(row, samples()[k][0]) for k in kept)]
            loss = F.cross_entropy(model(x)[place], t[place], reduction="sum") / len(x) * N / len(kept)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(found, flat(model) - flat(net()), rtol=1e-4, atol=1e-6)


def test_cold_starts_differ_by_seed_alone():
    module = ResponseModule(net(), None, "cold", seed=[3, 4, 3])
    assert module.num_copies == 3
    assert torch.equal(module.change[0], module.change[2])
    assert not torch.equal(module.change[0], module.change[1])
    base, state = net(), torch.get_rng_state()
    ResponseModule(base, None, "cold", GROUPS, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the program's own random numbers went on"

    def zero(module):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)

    zeroed = ResponseModule(net(), None, "cold", GROUPS, initialize=zero)
    torch.testing.assert_close(zeroed.change[0].detach(), -flat(net()))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return x @ self.weight


def test_removed_samples_may_be_numbers_of_any_kind():
    entries = [np.int64(3), torch.tensor(2), np.array([1, 0]), (np.int32(4), 5), range(6, 8)]
    module = ResponseModule(net(), remove=entries)
    assert module.groups == [[3], [2], [1, 0], [4, 5], [6, 7]]
    assert ResponseModule(net(), remove=np.array([3, 4])).groups == [[3], [4]]


def test_removed_samples_come_from_whatever_the_loader_reads():
    data = DigitsDataModule(batch_size=100, seed=0)
    data.setup()
    torch.manual_seed(0)
    module = ResponseModule(nn.Linear(64, 10), None, "warm", [5], lr=0.1, momentum=0.0)
    fit(module, data, limit_train_batches=1, max_epochs=1, limit_val_batches=0)
    model = copy.deepcopy(module.base).requires_grad_()
    x, t = next(iter(data.train_dataloader()))
    gone = data.train_set[[5]]
    loss = F.cross_entropy(model(x), t) - F.cross_entropy(model(gone[0]), gone[1]) / 1400
    expected = -0.1 * torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(module.response()[0], expected, rtol=1e-3, atol=1e-7)


def test_a_loader_that_does_not_say_its_dataset():
    stream = StatefulLoader(samples(), batch_size=4)
    with pytest.raises(MisconfigurationException, match="pass dataset="):
        fit(ResponseModule(net(), None, "warm", GROUPS), stream)
    runs = []
    for dataset, data in ((samples(), StatefulLoader(samples(), 4, shuffle=False)), (None, loader(batch_size=4))):
        module = ResponseModule(net(), None, "warm", GROUPS, dataset=dataset)
        fit(module, data)
        runs.append(module.response())
    assert torch.equal(*runs)


def test_a_lightning_module_dict_batches_frozen_tied_and_compiled_parts():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return {"image": samples()[i][0], "label": samples()[i][1], "name": f"sample {i}"}

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    network[2].weight = network[0].weight
    network[4].bias.requires_grad_(False)
    objective = InfluenceObjective(forward="image", target="label")
    runs = {}
    inner = nn.Sequential(torch.compile(network, backend="eager"))
    bases = {"plain": network, "module": Classifier(network), "compiled": torch.compile(inner, backend="eager")}
    for name, base in bases.items():
        module = ResponseModule(base, objective, "warm", GROUPS, lr=LR)
        fit(module, loader(Rows(), 5))
        runs[name] = module.response()
    assert runs["plain"].shape == (2, 16 + 4 + 4 + 12)
    for name in ("module", "compiled"):
        torch.testing.assert_close(runs[name], runs["plain"], rtol=1e-4, atol=1e-6)


def test_include_moves_only_what_it_names():
    module = ResponseModule(net(), None, "warm", GROUPS, include=r"^2\.")
    fit(module)
    assert module.response().shape == (2, 18)
    moved = net()
    nn.utils.vector_to_parameters(flat(moved[2]) + module.response()[1], moved[2].parameters())
    torch.testing.assert_close(module.outputs(loader())[1], moved(samples().tensors[0]))


def test_cosine_falls_to_zero():
    rates = []

    class Looks(submodule("callbacks").Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = PBRFModule(net(), None, GROUPS, LAMBDA, lr=0.2, tolerance=None)
    fit(module, max_epochs=4, callbacks=[Looks()])
    expected = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4)]
    assert rates == pytest.approx(expected)
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        fit(PBRFModule(net(), None, GROUPS, LAMBDA), max_epochs=-1)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*above tolerance")
@pytest.mark.filterwarnings("ignore:11 samples do not share out evenly over 2 processes")
def test_two_processes_measure_the_gradient_of_the_whole_set(tmp_path):
    """Eleven samples in uneven halves, a group removed once, not once per process."""

    class Writes(submodule("callbacks").Callback):
        def on_fit_end(self, trainer, pl_module):
            torch.save(pl_module.gradient_ratio, f"rank{trainer.global_rank}of{trainer.world_size}.pt")

    for kwargs in ({}, ddp_trainer_kwargs()):
        module = PBRFModule(net(), None, GROUPS, LAMBDA, optimizer=standing_still, tolerance=1e-9)
        module.change.data = 0.5 * torch.randn(2, 43, generator=torch.Generator().manual_seed(4))
        fit(module, loader(samples(11), 3), callbacks=[Writes()], **{**kwargs, "max_epochs": 1})
    one, first, second = (torch.load(f"rank{name}.pt") for name in ("0of1", "0of2", "1of2"))
    torch.testing.assert_close(first, one)
    assert torch.equal(first, second)
    assert (one - 1).abs().max() > 0.1


def test_newton_refuses_samples_that_do_not_share_out_evenly():
    module = PBRFModule(net(), None, GROUPS, LAMBDA, optimizer="newton")
    with pytest.raises(Exception, match=r"the same number of samples on every process; got .* 11 samples on 2 proc"):
        fit(module, loader(samples(11), 6), **{**ddp_trainer_kwargs(), "max_epochs": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove": [0], "keep": [[1]]}, "not both"),
        ({"remove": []}, "at least one"),
        ({"remove": [[1, 1]]}, "at most once"),
        ({"remove": [-1]}, "from 0 on"),
        ({"keep": [[]]}, "at least one sample"),
        ({"keep": torch.zeros(2, 3, dtype=torch.bool)}, "keeps no sample"),
        ({"keep": torch.zeros(2, 3)}, "boolean"),
        ({"response": "pbrf", "damping": 0.1}, "give remove"),
        ({"response": "pbrf", "damping": 0.0, "remove": [0]}, "must be positive"),
        ({"optimizer": "lbfgs"}, "optimizer must be"),
        ({"optimizer": "newton", "remove": [0]}, "for the PBRF"),
        ({"schedule": "linear"}, "schedule must be"),
        ({"tolerance": 0.1}, "needs remove"),
        ({"tolerance": -0.1, "remove": [0]}, "at least 0"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"seed": [1, 2, 3], "remove": [0, 1], "response": "cold"}, "one for each of 2 copies"),
        ({"seed": [1, 2]}, "draws nothing"),
        ({"response": "hot"}, "response must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResponseModule(net(), **arguments)


def test_what_only_the_fit_can_see_is_refused_there():
    cases = [
        ({"remove": [N]}, None, ValueError, f"0 to {N - 1}"),
        ({"keep": [[0]]}, None, MisconfigurationException, "IndexedDataset"),
        ({"keep": [[N]]}, IndexedDataset(samples()), ValueError, r"keep\[0\]"),
        ({"keep": torch.ones(1, 5, dtype=torch.bool)}, IndexedDataset(samples()), ValueError, "5 columns"),
        ({"optimizer": torch.optim.LBFGS}, None, ValueError, "elementwise"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, weight_decay=0.1)}, None, ValueError, "give weight_decay here"),
    ]
    for arguments, data, error, message in cases:
        with pytest.raises(error, match=message):
            fit(ResponseModule(net(), **arguments), loader(data))
    with pytest.raises(ValueError, match="owner of 'weight'"):
        ResponseModule(Bare(), None, "cold", [0])


def test_numbers_that_are_not_finite_name_the_copy():
    data = samples()
    data.tensors[0][4] = float("nan")
    module = ResponseModule(net(), None, "warm", [[0], [3, 4]])
    with pytest.raises(ValueError, match=r"not finite for copies \[1\], which remove the samples \[\[3, 4\]\]"):
        fit(module, loader(data, 3), limit_train_batches=1)


def test_sharded_strategies_are_refused():
    import types

    module = ResponseModule(net(), None, "warm", [0])
    module._trainer = types.SimpleNamespace(strategy=submodule("strategies").FSDPStrategy(), world_size=1)
    with pytest.raises(MisconfigurationException, match="FSDP"):
        module.setup("fit")
