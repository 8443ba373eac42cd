"""The curvature that is collected: of what, when, and where it is kept; and that the training does not notice."""

import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks import CurvatureCollector, influence_curvature
from lightning_ext.functional import InfluenceObjective, ParameterView, evaluating, kronecker_curvature
from lightning_ext.testing import StatefulLoader, assert_observer, assert_resumes, ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
KEYS = {"influence/trace", "influence/lambda_max", "influence/effective_dimension"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*have no Kronecker"
)


def table(n=11):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def loader(n=11):
    return DataLoader(table(n), batch_size=4, shuffle=True, drop_last=True)


class Net(LightningModule):
    """BatchNorm and Dropout."""

    def __init__(self, net=None, lr=0.1):
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )  # fmt: skip
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Tied(nn.Module):
    """A weight that two layers share, a frozen layer, and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        self.second.weight = self.first.weight
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.frozen(torch.tanh(self.norm(self.second(torch.tanh(self.first(x)))))))


def fit(callback, module=Net, train=None, epochs=2, extra=(), **kwargs):
    torch.manual_seed(0)
    trainer = Trainer(callbacks=[callback, *extra], **{**QUIET, "max_epochs": epochs, **kwargs})
    trainer.fit(module(), loader() if train is None else train)
    return trainer


def exact_trace(module, include=""):
    """Of the mean Gauss-Newton matrix over the data set, one output's backward pass after another."""
    chosen = [p for name, p in module.named_parameters() if p.requires_grad and include in name]
    total = 0.0
    with evaluating(module):
        for x, _ in table():
            y = module(x[None])[0]
            rows = []
            for output in y:
                parts = torch.autograd.grad(output, chosen, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([part.flatten() for part in parts]))
            J, p = torch.stack(rows), y.detach().softmax(0)
            total += torch.trace(J @ J.mT @ (p.diag() - torch.outer(p, p))).item()
    return total / len(table())


def summary(trainer):
    return {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("influence/")}


def probe(curvature, seed=5):
    return torch.randn(4, curvature.size, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours, theirs, rtol=0.0):
    rows = probe(ours)
    torch.testing.assert_close(ours(rows), theirs(rows), rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.solve(rows, 0.1), theirs.solve(rows, 0.1), rtol=rtol, atol=10 * rtol)


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [None, Tied], ids=["norm", "tied"])
@pytest.mark.parametrize("include", [None, "weight"])
def test_the_trace_is_that_of_the_trained_network_over_all_samples(net, include):
    callback = CurvatureCollector(include=include)
    trainer = fit(callback, lambda: Net(net and net()))
    assert summary(trainer)["influence/trace"] == pytest.approx(
        exact_trace(trainer.lightning_module, include or ""), rel=1e-5
    )


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_it_is_the_functional_curvature_in_eval_mode(method, fisher):
    callback = CurvatureCollector(method=method, fisher=fisher, damping=0.03)
    trainer = fit(callback)
    module, data = trainer.lightning_module, DataLoader(table(), batch_size=11)
    expected = kronecker_curvature(
        module, InfluenceObjective(), data, ParameterView(module), corrected=method == "ekfac", fisher=fisher
    )
    rows = probe(expected)
    torch.testing.assert_close(callback.curvature(rows), expected(rows), rtol=1e-4, atol=1e-5)
    values = expected.eigenvalues()
    assert summary(trainer) == {
        "influence/trace": pytest.approx(values.sum().item(), rel=1e-4),
        "influence/lambda_max": pytest.approx(values.max().item(), rel=1e-4),
        "influence/effective_dimension": pytest.approx((values / (values + 0.03)).sum().item(), rel=1e-3),
    }


def test_solving_inverts_the_gauss_newton_matrix_where_it_is_a_kronecker_product():
    class Regression(Net):
        def training_step(self, batch, batch_idx):
            return 0.5 * (self(batch[0]) - 1).square().sum(1).mean()

    callback = CurvatureCollector(
        InfluenceObjective("half_squared_error", target=lambda batch: torch.ones(len(batch[1]), 2))
    )
    fit(callback, lambda: Regression(nn.Linear(6, 2, bias=False)))
    x = table().tensors[0]
    G = torch.kron(torch.eye(2), x.mT @ x / len(x))
    rows = probe(callback.curvature)
    damped = G + 0.1 * torch.eye(12)
    torch.testing.assert_close(
        callback.curvature.solve(rows, 0.1), torch.linalg.solve(damped, rows.mT).mT, rtol=1e-4, atol=1e-4
    )


def test_drawn_labels_depend_on_the_seed():
    runs = [CurvatureCollector(fisher="mc", seed=seed) for seed in (0, 0, 1)]
    for callback in runs:
        fit(callback)
    rows = probe(runs[0].curvature)
    first, again, other = (callback.curvature(rows) for callback in runs)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


class Named(Dataset):
    """Batches that are dicts."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        x, y = table()[index]
        return {"image": x, "label": y}


def test_batches_may_be_dicts():
    class NamedNet(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    plain, named = CurvatureCollector(), CurvatureCollector(InfluenceObjective(forward="image", target="label"))
    fit(plain)
    fit(named, NamedNet, DataLoader(Named(), 4, shuffle=True, drop_last=True))
    assert_equal(named.curvature, plain.curvature)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(table(8))


def test_samples_of_ones_own():
    part = torch.utils.data.Subset(table(), [0, 3, 4, 7])
    callback = CurvatureCollector(samples=DataLoader(part, 3, shuffle=True))
    trainer = fit(callback, train=DataLoader(Stream(), 4))
    module = trainer.lightning_module
    expected = kronecker_curvature(module, InfluenceObjective(), DataLoader(part, 4))
    rows = probe(expected)
    torch.testing.assert_close(callback.curvature(rows), expected(rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(MisconfigurationException, match=r"CurvatureCollector names samples.*Stream.*Pass samples="):
        fit(CurvatureCollector(), train=DataLoader(Stream(), 4))


# -- when -------------------------------------------------------------------------------------------------------------


class Log(submodule("loggers").Logger):
    """Keeps what it is given."""

    name, version = "log", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if KEYS & metrics.keys():
            self.rows.append((step, {key: metrics[key] for key in KEYS}))


@pytest.mark.parametrize(("every", "steps"), [(None, [9]), (2, [3, 7, 9]), (5, [9])])
def test_at_every_nth_epoch_and_the_last(every, steps):
    logger = Log()
    fit(CurvatureCollector(every_n_epochs=every), epochs=5, logger=logger)
    assert [step for step, _ in logger.rows] == steps
    assert len({row["influence/trace"] for _, row in logger.rows}) == len(steps)


def test_at_the_end_that_max_steps_makes():
    logger = Log()
    trainer = fit(CurvatureCollector(), epochs=-1, max_steps=3, logger=logger)
    assert trainer.global_step == 3
    assert len(logger.rows) == 1
    assert summary(trainer).keys() == KEYS, "logged in the epoch, so that its checkpoint has them"
    assert logger.rows[0][1]["influence/trace"] == pytest.approx(exact_trace(trainer.lightning_module), rel=1e-5)


class Stops(Callback):
    """Ends the training after all other callbacks have seen the epoch's end."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_at_an_end_that_comes_after_the_epoch():
    logger = Log()
    trainer = fit(CurvatureCollector(), epochs=9, extra=[Stops()], logger=logger)
    ((step, row),) = logger.rows
    assert step == trainer.global_step == 2
    assert row.keys() == KEYS
    assert row["influence/trace"] == pytest.approx(exact_trace(trainer.lightning_module), rel=1e-5)


def test_an_epoch_that_is_known_to_be_the_last_has_it_in_its_checkpoint():
    class StopsEarlier(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer.should_stop = True

    trainer = fit(CurvatureCollector(), epochs=9, extra=[StopsEarlier()])
    assert trainer.current_epoch == 1
    assert summary(trainer).keys() == KEYS


class Averages(Callback):
    """Puts other weights into the module when the training ends, as weight averaging does."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.5)


def test_weights_that_a_callback_puts_in_at_the_end_are_collected():
    torch.manual_seed(0)
    callback, logger = CurvatureCollector(), Log()
    trainer = Trainer(callbacks=[Averages(), callback], **{**QUIET, "max_epochs": 2, "logger": logger})
    trainer.fit(Net(), loader())
    assert len(logger.rows) == 2
    trace = callback.curvature.eigenvalues().sum().item()
    assert trace == pytest.approx(exact_trace(trainer.lightning_module), rel=1e-5)


def test_a_new_training_starts_anew():
    callback, logger = CurvatureCollector(), Log()
    fit(callback)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(callback.curvature)

    fit(callback, extra=[Look()], logger=logger)
    assert seen == [None]
    assert len(logger.rows) == 1


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "foof"}, "method must be 'ekfac' or 'kfac'; got 'foof'"),
        ({"fisher": "true"}, "fisher must be 'type2', 'mc' or 'empirical'; got 'true'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, or None for the end alone; got 0"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"samples": iter([])}, "pass a loader, no iterator"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CurvatureCollector(**kwargs)


class Outside(nn.Module):
    """Uses a layer's weight where no hook sees it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x) + x @ self.layer.weight.square()))


def test_what_does_not_fit_is_said_before_the_first_step():
    steps = []

    class Counts(Callback):
        def on_train_batch_start(self, *args):
            steps.append(args)

    with pytest.raises(ValueError, match=r"Kronecker factors need layers that explain.*net\.layer\.weight"):
        fit(CurvatureCollector(), lambda: Net(Outside()), extra=[Counts()])
    with pytest.raises(ValueError, match="no parameter of Net is chosen: include='typo'"):
        fit(CurvatureCollector(include="typo"), extra=[Counts()])
    with pytest.raises(ValueError, match=r"forward looks for batch\['image'\]"):
        fit(CurvatureCollector(InfluenceObjective(forward="image")), extra=[Counts()])
    assert not steps


def test_sharded_strategies_are_refused_by_name():
    trainer = types.SimpleNamespace(strategy=submodule("strategies").FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="CurvatureCollector does not work with FSDPStrategy"):
        CurvatureCollector().setup(trainer, Net(), "fit")


# -- the training does not notice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{"every_n_epochs": 1}, {"fisher": "mc", "method": "kfac"}])
@pytest.mark.parametrize("net", [None, Tied], ids=["norm", "tied"])
def test_training_is_bit_identical_without_it(kwargs, net):
    assert_observer(lambda: CurvatureCollector(**kwargs), lambda: Net(net and net()), loader)


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
def test_the_checkpoint_of_the_last_epoch_holds_it(tmp_path, method):
    callback = CurvatureCollector(method=method)
    saver = submodule("callbacks").ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(callback, lambda: Net(Tied()), extra=[saver], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    fresh = CurvatureCollector(method=method)
    fresh.load_state_dict(state)
    assert fresh.curvature.size == callback.curvature.size
    assert_equal(fresh.curvature, callback.curvature)
    rows = probe(fresh.curvature)
    if method == "kfac":
        ours, theirs = (c.curvature.solve(rows, 0.1, factored=True) for c in (fresh, callback))
        assert torch.equal(ours, theirs), "the factors are kept"


def test_a_resumed_run_has_the_same_curvature():
    for checkpoint, crash_at in (("epoch", (1, 1)), ("step", (1, 2))):
        assert_resumes(
            lambda: Net(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))),
            lambda: StatefulLoader(table(12), 4),
            lambda: [CurvatureCollector(samples=loader(12), every_n_epochs=1, fisher="mc")],
            checkpoint=checkpoint,
            crash_at=crash_at,
        )


def test_a_folder_gets_a_file(tmp_path):
    callback = CurvatureCollector(output_dir=str(tmp_path / "here"))
    fit(callback, lambda: Net(Tied()))
    assert_equal(CurvatureCollector.load(tmp_path / "here" / "curvature.pt"), callback.curvature)
    assert callback.state_dict()["curvature"] is not None


def test_what_is_large_goes_to_a_file_and_comes_back_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(influence_curvature, "_STATE_BYTES", 100)
    callback = CurvatureCollector()
    trainer = fit(callback, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["curvature"] is None
    fresh = CurvatureCollector()
    fresh.load_state_dict(state)
    assert_equal(fresh.curvature, callback.curvature)
    (tmp_path / "curvature.pt").unlink()
    with pytest.warns(UserWarning, match=r"in .*curvature\.pt, which is gone"):
        fresh.load_state_dict(state)
    assert fresh.curvature is None


def test_no_file_where_none_is_wanted(tmp_path):
    fit(CurvatureCollector(), default_root_dir=tmp_path)
    fit(CurvatureCollector(output_dir=str(tmp_path)), fast_dev_run=True)
    assert not list(tmp_path.rglob("*"))


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "curvature.pt").mkdir()
    callback = CurvatureCollector(output_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="curvature could not be written"):
        fit(callback)
    assert callback.curvature is not None


def test_two_callbacks_stand_side_by_side():
    first, second = CurvatureCollector(), CurvatureCollector(method="kfac", include="net.4")
    fit(first, extra=[second])
    assert first.state_key != second.state_key
    assert first.curvature.size > second.curvature.size


# -- two processes ----------------------------------------------------------------------------------------------------


def still():
    """A step hardly moves it, so that one and two processes are at the same point."""
    return Net(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), lr=1e-7)


@pytest.mark.ddp
@pytest.mark.parametrize(("method", "n"), [("ekfac", 11), ("kfac", 12), ("ekfac", 1)])
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, method, n):
    save = torch.save

    def by_rank(*args):
        (tmp_path / f"rank{dist.get_rank()}.wrote").touch()
        save(*args)

    samples = DataLoader(table(n), 3)
    alone = CurvatureCollector(method=method, samples=samples)
    expected = summary(fit(alone, still, DataLoader(table(), 4)))

    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            save(together.state_dict(), tmp_path / f"rank{trainer.global_rank}.pt")

    together = CurvatureCollector(method=method, samples=samples, output_dir=str(tmp_path))
    options = ddp_trainer_kwargs(max_epochs=2, enable_checkpointing=False)
    monkeypatch.setattr(torch, "save", by_rank)
    trainer = fit(together, still, DataLoader(table(), 4), extra=[Saves()], **options)
    ranks = [CurvatureCollector(), CurvatureCollector()]
    for rank, callback in enumerate(ranks):
        callback.load_state_dict(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True))
    assert_equal(ranks[0].curvature, ranks[1].curvature)
    assert [path.name for path in tmp_path.glob("*.wrote")] == ["rank0.wrote"]
    assert_equal(CurvatureCollector.load(tmp_path / "curvature.pt"), ranks[0].curvature)
    assert_equal(ranks[0].curvature, alone.curvature, rtol=1e-4)
    assert summary(trainer) == pytest.approx(expected, rel=1e-4)
