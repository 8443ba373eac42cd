"""TracIn: the sums over checkpoints, whose samples and queries they are of, and that the training does not notice."""

import copy
import math
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks import TracInCallback, influence
from lightning_ext.functional import InfluenceObjective
from lightning_ext.testing import StatefulLoader, assert_observer, assert_resumes, ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available but not used")


def table(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator))


def train_loader(n=11):
    return DataLoader(table(n), batch_size=4, shuffle=True, drop_last=True)


def query_loader(n=5):
    return DataLoader(table(n, seed=2), batch_size=3)


class Net(LightningModule):
    """BatchNorm and Dropout, momentum and a schedule."""

    def __init__(self, net=None, lr=0.1, gamma=0.5):
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )  # fmt: skip
        self.lr, self.gamma = lr, gamma

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.gamma),
        }


class Snapshots(Callback):
    """Copies of the module at the end of every epoch."""

    def __init__(self):
        self.copies = []

    def on_train_epoch_end(self, trainer, pl_module):
        own = pl_module._trainer
        pl_module._trainer = None
        self.copies.append(copy.deepcopy(pl_module).eval())
        pl_module._trainer = own


def fit(callback, module=Net, train=None, queries=None, epochs=3, extra=(), **kwargs):
    """Train from one seed; ``module`` builds the module."""
    torch.manual_seed(0)
    trainer = Trainer(callbacks=[callback, *extra], **{**QUIET, "max_epochs": epochs, **kwargs})
    trainer.fit(module(), train_loader() if train is None else train, query_loader() if queries is None else queries)
    return trainer


def quietly(module=Net, **kwargs):
    """A module whose training draws nothing: it is the same whatever is evaluated beside it."""
    return lambda: module(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), **kwargs)


def in_order(n=11):
    return DataLoader(table(n), batch_size=4)


def gradients(module, dataset, value, include=""):
    """One row per item, by one backward pass each."""
    chosen = [p for name, p in module.named_parameters() if p.requires_grad and include in name]
    rows = []
    for x, y in dataset:
        total = value(module(x[None]), y[None]).sum()
        parts = torch.autograd.grad(total, chosen, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def by_hand(copies, rates, samples, queries, value=F.cross_entropy, include=""):
    """Scores and self-influence from copies of the module and the learning rates, numbers or rows of them."""
    scores, own = 0, 0
    for module, rate in zip(copies, rates, strict=True):
        train = gradients(module, samples, F.cross_entropy, include)
        scores = scores + (gradients(module, queries, value, include) * rate) @ train.mT
        own = own + (train.square() * rate).sum(1)
    return scores, own


def assert_near(ours, theirs, rtol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_scores_are_the_sum_over_epochs_with_the_rate_of_their_steps():
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, extra=[seen])
    scores, own = by_hand(seen.copies, [0.1, 0.05, 0.025], table(11), table(5, seed=2))
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own)
    assert callback.num_checkpoints == 3
    assert callback.scores.shape == (5, 11), "in the order of the data sets, with what drop_last leaves out"


def test_positive_is_helpful():
    """A step on a helpful sample lowers the query's loss, by the score."""
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, lambda: Net(nn.Linear(6, 3), lr=1e-3, gamma=1.0), epochs=1, extra=[seen])
    query, before = table(5, seed=2)[0], seen.copies[0]
    for index in range(11):
        stepped = copy.deepcopy(before)
        optimizer = torch.optim.SGD(stepped.parameters(), lr=1e-3)
        x, y = table(11)[index]
        F.cross_entropy(stepped(x[None]), y[None]).backward()
        optimizer.step()
        with torch.no_grad():
            losses = [F.cross_entropy(m(query[0][None]), query[1][None]).double() for m in (before, stepped)]
        assert float(losses[0] - losses[1]) == pytest.approx(float(callback.scores[0, index]), rel=0.01, abs=2e-7)


def test_every_nth_epoch_is_a_checkpoint():
    callback, seen = TracInCallback(every_n_epochs=2), Snapshots()
    fit(callback, epochs=5, extra=[seen])
    scores, _ = by_hand([seen.copies[1], seen.copies[3]], [0.05, 0.0125], table(11), table(5, seed=2))
    assert_near(callback.scores, scores)
    assert callback.num_checkpoints == 2


def test_a_training_that_max_steps_ends_is_a_checkpoint():
    callback = TracInCallback()
    trainer = fit(callback, epochs=-1, max_steps=3)
    assert trainer.global_step == 3
    assert callback.num_checkpoints == 2, "two steps an epoch, and the half epoch"


def test_only_the_included_parameters():
    callback, seen = TracInCallback(include=r"net\.4"), Snapshots()
    fit(callback, extra=[seen])
    scores, own = by_hand(seen.copies, [0.1, 0.05, 0.025], table(11), table(5, seed=2), include="net.4")
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own)


class Groups(Net):
    """Two optimizers and three groups, and a parameter that none has."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        groups = [{"params": [self.net[0].weight], "lr": 0.2}, {"params": [self.net[0].bias], "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1), torch.optim.Adam([self.net[2].weight], lr=0.01)


def test_every_parameter_has_its_own_rate_in_manual_optimisation_too():
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, quietly(Groups), epochs=2, extra=[seen])
    rate = torch.cat([torch.full((48,), 0.2), torch.full((8,), 0.02), torch.full((24,), 0.01), torch.zeros(3)])
    scores, own = by_hand(seen.copies, [rate] * 2, table(11), table(5, seed=2))
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own)


class Alternates(Groups):
    """The second optimizer steps in the first batch of an epoch alone; then its rate changes."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        if batch_idx == 0:
            second.step()
            second.optimizer.param_groups[0]["lr"] *= 0.5
        first.step()


class Shared(Groups):
    """Two optimizers step every parameter."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.02)


@pytest.mark.parametrize(("module", "rates"), [(Alternates, [0.01, 0.005]), (Shared, [0.12, 0.12])])
def test_each_optimizers_own_last_step_counts(module, rates):
    callback, seen = TracInCallback(include="net.2.weight"), Snapshots()
    fit(callback, quietly(module), epochs=2, extra=[seen])
    scores, own = by_hand(seen.copies, rates, table(11), table(5, seed=2), include="net.2.weight")
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own)


class Raw(Groups):
    """Steps past Lightning's optimizers, so that no hook tells."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.trainer.optimizers:
            optimizer.step()


def test_steps_past_lightning_count_with_the_rates_at_the_end():
    told, raw = TracInCallback(), TracInCallback()
    fit(told, quietly(Groups), epochs=2)
    fit(raw, quietly(Raw), epochs=2)
    assert torch.equal(told.scores, raw.scores)


def test_a_rate_of_zero_is_said():
    with pytest.warns(UserWarning, match="every chosen parameter has learning rate 0"):
        fit(TracInCallback(), quietly(lr=0.0), epochs=1)


class Tied(nn.Module):
    """A weight that two layers share, a frozen layer, and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        self.second.weight = self.first.weight
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.frozen(torch.tanh(self.norm(self.second(torch.tanh(self.first(x)))))))


def test_frozen_and_tied_parameters():
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, lambda: Net(Tied()), extra=[seen])
    scores, own = by_hand(seen.copies, [0.1, 0.05, 0.025], table(11), table(5, seed=2))
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own)


def test_the_objectives_measurement_is_scored():
    def margin(y, t):
        others = y.masked_fill(F.one_hot(t, 3).bool(), -math.inf).logsumexp(-1)
        return y.gather(-1, t[:, None])[:, 0] - others

    callback, seen = TracInCallback(InfluenceObjective(measurement="margin")), Snapshots()
    fit(callback, extra=[seen])
    scores, own = by_hand(seen.copies, [0.1, 0.05, 0.025], table(11), table(5, seed=2), value=margin)
    assert_near(callback.scores, scores)
    assert_near(callback.self_influence, own), "that of the loss"


class Named(Dataset):
    """Batches that are dicts."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"image": x, "label": y, "name": f"{index}"}


class NamedNet(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass


def image_of(module, batch):
    return module(batch["image"])


def test_batches_may_be_dicts():
    plain, named = TracInCallback(), TracInCallback(InfluenceObjective(forward="image", target="label"))
    fit(plain)
    loaders = DataLoader(Named(table(11)), 4, shuffle=True, drop_last=True), DataLoader(Named(table(5, seed=2)), 3)
    fit(named, NamedNet, *loaders)
    assert torch.equal(named.scores, plain.scores)
    fit(named := TracInCallback(InfluenceObjective(forward=image_of, target="label")), NamedNet, *loaders)
    assert torch.equal(named.scores, plain.scores)


def test_projections_are_right_on_average():
    exact = TracInCallback()
    fit(exact, epochs=2)
    runs = []
    for seed in range(40):
        callback = TracInCallback(project_dim=8, seed=seed)
        fit(callback, epochs=2)
        runs.append(callback.scores)
        assert torch.equal(callback.self_influence, exact.self_influence)
    runs = torch.stack(runs)
    error = (runs.mean(0) - exact.scores).abs()
    assert (error < 4.5 * runs.std(0) / 40**0.5 + 1e-7).all()
    assert runs.std(0).min() > 0
    wide = TracInCallback(project_dim=20_000)
    fit(wide, epochs=2)
    assert (wide.scores - exact.scores).norm() < 0.1 * exact.scores.norm()


def test_every_checkpoint_has_a_projection_of_its_own():
    once, twice = TracInCallback(project_dim=8), TracInCallback(project_dim=8)
    fit(once, quietly(lr=1e-9, gamma=1.0), epochs=1)
    fit(twice, quietly(lr=1e-9, gamma=1.0), epochs=2)
    torch.testing.assert_close(twice.self_influence, 2 * once.self_influence)
    assert (twice.scores - 2 * once.scores).norm() > 0.1 * once.scores.norm()


class Counted(Dataset):
    """Counts how often its items are read."""

    reads = 0

    def __len__(self):
        return 11

    def __getitem__(self, index):
        self.reads += 1
        return table(11)[index]


def test_blocks_of_queries_cost_passes_and_change_nothing(monkeypatch):
    def run():
        samples = Counted()
        callback = TracInCallback(samples=DataLoader(samples, 4))
        fit(callback, epochs=1)
        return callback, samples.reads

    whole, reads = run()
    assert reads == 1 + 11, "the look before the training, and one pass"
    monkeypatch.setattr(influence, "_BLOCK_NUMBERS", 250)  # two queries of 99 numbers; five come as 2, 1 and 2
    parts, reads = run()
    assert reads == 1 + 3 * 11
    assert_near(parts.scores, whole.scores, rtol=1e-6)
    assert torch.equal(parts.self_influence, whole.self_influence)


# -- samples and queries ----------------------------------------------------------------------------------------------


def test_queries_of_ones_own():
    expected, loader, batches = TracInCallback(), TracInCallback(queries=query_loader()), [*query_loader()]
    fit(expected)
    fit(loader, queries=DataLoader(table(3), 2))
    fit(listed := TracInCallback(queries=batches), queries=DataLoader(table(3), 2))
    fit(shuffled := TracInCallback(queries=DataLoader(table(5, seed=2), 3, shuffle=True)))
    for callback in (loader, listed, shuffled):
        assert torch.equal(callback.scores, expected.scores)


def test_several_validation_loaders_are_queries_one_after_the_other():
    expected, both = TracInCallback(), TracInCallback()
    fit(expected, quietly(), in_order())
    first, second = (torch.utils.data.Subset(table(5, seed=2), part) for part in ([0, 1, 2], [3, 4]))

    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    fit(both, quietly(Two), in_order(), [DataLoader(first, 3), DataLoader(second, 3)])
    assert torch.equal(both.scores, expected.scores)


@pytest.mark.parametrize("kwargs", [{"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}])
def test_validation_data_that_lightning_has_not_asked_for(kwargs):
    expected, callback = TracInCallback(), TracInCallback()
    fit(expected, quietly(), in_order())
    fit(callback, quietly(), in_order(), **kwargs)
    assert torch.equal(callback.scores, expected.scores)


def test_without_queries_there_is_self_influence():
    expected, alone = TracInCallback(), TracInCallback(queries=[])
    fit(expected)
    trainer = fit(alone)
    assert torch.equal(alone.self_influence, expected.self_influence)
    assert alone.scores.shape == (0, 11)
    assert {key for key in trainer.callback_metrics if "tracin" in key} == {"influence/tracin_self_mean"}


def test_without_self_influence_there_are_scores():
    expected, alone = TracInCallback(), TracInCallback(self_influence=False)
    fit(expected)
    trainer = fit(alone)
    assert alone.self_influence is None
    assert torch.equal(alone.scores, expected.scores)
    assert {key for key in trainer.callback_metrics if "tracin" in key} == {"influence/tracin_mean"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(table(8))


def test_a_sampler_that_takes_some_samples_is_refused_and_samples_help():
    data = train_loader().dataset
    some = DataLoader(data, 4, sampler=[0, 2, 4])
    with pytest.raises(MisconfigurationException, match=r"takes 3 of its 11 samples.*Subset"):
        fit(TracInCallback(), train=some)
    callback = TracInCallback(samples=DataLoader(Subset(data, [0, 2, 4]), 4))
    fit(callback, train=some)
    assert callback.scores.shape[1] == 3


def test_queries_are_batches():
    with pytest.raises(MisconfigurationException, match=r"gives samples. Pass DataLoader\(queries"):
        TracInCallback(queries=train_loader().dataset)
    with pytest.raises(MisconfigurationException, match=r"queries=\[batch\]"):
        TracInCallback(queries=tuple(next(iter(train_loader()))))


def test_a_stream_is_refused_and_samples_help():
    stream = DataLoader(Stream(), 4)
    with pytest.raises(MisconfigurationException, match=r"positions in a data set.*Stream.*Pass samples=DataLoader"):
        fit(TracInCallback(), train=stream)
    callback = TracInCallback(samples=DataLoader(table(11), 5))
    fit(callback, train=stream, epochs=1)
    assert callback.scores.shape == (5, 11)


def test_a_stream_of_queries_is_read_as_it_comes():
    callback, expected = TracInCallback(), TracInCallback()
    fit(callback, quietly(), in_order(), DataLoader(Stream(), 4))
    fit(expected, quietly(), in_order(), DataLoader(table(8), 4))
    assert torch.equal(callback.scores, expected.scores)


def test_several_training_loaders_are_refused():
    class Both(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(MisconfigurationException, match=r"the Trainer has 2\. Say which: samples="):
        fit(TracInCallback(), Both, {"a": train_loader(), "b": train_loader()})


class Doubles(Net):
    """Batches become what the module wants in its hooks; augmented while training."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + (torch.rand_like(batch[0]) if self.trainer.training else 1), batch[1]]


def test_batches_pass_the_modules_hooks_as_in_validation():
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, Doubles, extra=[seen])
    changed = [[(2 * x + 1, y) for x, y in data] for data in (table(11), table(5, seed=2))]
    scores, _ = by_hand(seen.copies, [0.1, 0.05, 0.025], *changed)
    assert_near(callback.scores, scores)


def test_the_modules_hooks_see_batches_of_the_trainers_precision():
    dtypes = set()

    class Looks(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            dtypes.add(batch[0].dtype)
            return batch

    fit(TracInCallback(), Looks, precision="64-true")
    assert dtypes == {torch.float64}


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1; got 0"),
        ({"project_dim": 0}, "project_dim must be at least 1, or None for exact products; got 0"),
        ({"queries": iter([])}, "pass loaders or lists, no iterators"),
        ({"samples": iter([])}, "pass loaders or lists, no iterators"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TracInCallback(**kwargs)


def test_what_does_not_fit_is_said_before_the_first_step():
    steps = []

    class Counts(Callback):
        def on_train_batch_start(self, *args):
            steps.append(args)

    loaders = DataLoader(Named(table(11)), 4), DataLoader(Named(table(5)), 3)
    with pytest.raises(ValueError, match=r"forward looks for batch\[0\], but the batch is a mapping"):
        fit(TracInCallback(), NamedNet, *loaders, extra=[Counts()])
    with pytest.raises(ValueError, match=r"forward looks for batch\[0\], but the batch is a mapping"):
        fit(TracInCallback(queries=[]), NamedNet, *loaders, extra=[Counts()])
    good = InfluenceObjective(forward="image", target="label")
    with pytest.raises(ValueError, match=r"forward looks for batch\['image'\]"):
        fit(TracInCallback(good, queries=query_loader()), NamedNet, *loaders, extra=[Counts()])
    with pytest.raises(ValueError, match="no parameter of Net is chosen: include='typo'"):
        fit(TracInCallback(include="typo"), extra=[Counts()])
    with pytest.raises(MisconfigurationException, match=r"validation data, and there is none. Pass queries="):
        Trainer(callbacks=[TracInCallback(), Counts()], max_epochs=1, **QUIET).fit(Net(), train_loader())
    assert not steps


def test_a_gradient_that_is_not_finite_names_the_samples():
    x, y = table(11).tensors
    x = x.clone()
    x[9, 2] = math.inf
    bad = DataLoader(TensorDataset(x, y), 4)
    with pytest.raises(ValueError, match=r"samples \[1\] of the batch.*The batch holds samples \[8, 9, 10\]"):
        fit(TracInCallback(samples=bad))


def test_sharded_strategies_are_refused_by_name():
    trainer = types.SimpleNamespace(strategy=submodule("strategies").FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="TracInCallback does not work with FSDPStrategy"):
        TracInCallback().setup(trainer, Net(), "fit")


def test_a_training_without_a_checkpoint_says_so():
    with pytest.warns(UserWarning, match="TracInCallback has no scores: no 9-th epoch"):
        fit(TracInCallback(every_n_epochs=9))


def test_other_data_than_before_is_refused(tmp_path):
    trainer = fit(TracInCallback(), epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    def resume(**kwargs):
        again = Trainer(callbacks=[TracInCallback()], **{**QUIET, "max_epochs": 2})
        again.fit(Net(), ckpt_path=tmp_path / "end.ckpt", weights_only=True, **kwargs)

    with pytest.raises(MisconfigurationException, match="resumes with scores of 11 samples, and there are 12 now"):
        resume(train_dataloaders=train_loader(12), val_dataloaders=query_loader())
    with pytest.raises(MisconfigurationException, match=r"\(5, 11\).*\(6, 11\)"):
        resume(train_dataloaders=train_loader(), val_dataloaders=query_loader(6))


# -- the training does not notice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"project_dim": 3}, {"queries": [], "include": r"weight$"}])
@pytest.mark.parametrize("net", [None, Tied], ids=["norm", "tied"])
def test_training_is_bit_identical_without_it(kwargs, net):
    assert_observer(
        lambda: TracInCallback(**kwargs), lambda: Net(net and net()), lambda: (train_loader(), query_loader())
    )


def test_queries_and_samples_of_ones_own_draw_nothing_from_the_global_generator():
    shuffled = DataLoader(table(5), 2, shuffle=True)
    assert_observer(
        lambda: TracInCallback(queries=shuffled, samples=train_loader()),
        Net,
        lambda: (train_loader(), query_loader()),
        check_val_every_n_epoch=2,
    )


class Jittered(Dataset):
    """Items that are drawn anew when they are read."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        x, y = table(11)[index]
        return x + 0.1 * torch.rand(6), y


def test_samples_that_draw_leave_the_global_generator_as_it_was():
    data = DataLoader(Jittered(), 4, shuffle=True)
    assert_observer(TracInCallback, Net, lambda: (data, DataLoader(Jittered(), 3)))


def test_the_trainer_goes_on_training():
    stages = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            stages.append(trainer.state.stage.value)

        on_train_epoch_end = on_train_start

    fit(TracInCallback(), extra=[Looks()], epochs=2)
    assert stages == ["train"] * 3


# -- state and results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpoint", "crash_at"), [("epoch", (2, 1)), ("step", (1, 1)), ("step", (2, 2))])
def test_a_resumed_run_has_the_same_scores(checkpoint, crash_at):
    samples = DataLoader(table(12), 4)
    assert_resumes(
        lambda: Net(nn.Linear(6, 3)),
        lambda: (StatefulLoader(table(12), 4), query_loader()),
        lambda: [TracInCallback(samples=samples, project_dim=5)],
        checkpoint=checkpoint,
        crash_at=crash_at,
        max_epochs=3,
    )


def test_the_rates_of_steps_before_a_crash_are_kept():
    samples = DataLoader(table(12), 4)
    assert_resumes(
        lambda: Alternates(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))),
        lambda: (StatefulLoader(table(12), 4), query_loader()),
        lambda: [TracInCallback(samples=samples)],
        crash_at=(1, 2),
    )


def test_a_new_training_starts_anew_and_a_longer_one_goes_on():
    callback = TracInCallback()
    trainer = fit(callback, epochs=2)
    once = callback.scores
    fit(callback, epochs=2)
    assert torch.equal(callback.scores, once)
    trainer = fit(callback, epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, train_loader(), query_loader())
    assert callback.num_checkpoints == 3
    assert not torch.equal(callback.scores, once)


def test_the_file_holds_the_results(tmp_path):
    callback = TracInCallback()
    logger = submodule("loggers").CSVLogger(tmp_path, name="run", version=0)
    fit(callback, logger=logger)
    saved = torch.load(tmp_path / "run" / "version_0" / "tracin.pt", weights_only=True)
    assert torch.equal(saved["scores"], callback.scores)
    assert torch.equal(saved["self_influence"], callback.self_influence)
    assert saved["num_checkpoints"] == 3


@pytest.mark.parametrize("kwargs", [{"fast_dev_run": True}, {}])
def test_no_file_where_none_is_wanted(tmp_path, kwargs):
    fit(TracInCallback(filename="tracin.pt" if kwargs else None), default_root_dir=tmp_path, **kwargs)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "tracin.pt").mkdir()
    with pytest.warns(UserWarning, match="scores could not be written"):
        fit(TracInCallback(), default_root_dir=tmp_path)


def test_the_means_are_logged():
    callback = TracInCallback()
    metrics = fit(callback).callback_metrics
    assert metrics["influence/tracin_mean"].item() == pytest.approx(callback.scores.mean().item(), rel=1e-6)
    assert metrics["influence/tracin_self_mean"].item() == pytest.approx(
        callback.self_influence.mean().item(), rel=1e-6
    )


def test_two_callbacks_stand_side_by_side(tmp_path):
    first, second = TracInCallback(), TracInCallback(include="net.4", filename="last.pt")
    trainer = fit(first, extra=[second], default_root_dir=tmp_path)
    assert first.state_key != second.state_key
    assert (first.scores - second.scores).norm() > 0.01 * first.scores.norm()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    assert torch.equal(states[second.state_key]["scores"], second.scores)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"tracin.pt", "last.pt"}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision):
    callback, seen = TracInCallback(), Snapshots()
    fit(callback, precision=precision, extra=[seen])
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert callback.scores.dtype == dtype
    samples, queries = ([(x.to(dtype), y) for x, y in data] for data in (table(11), table(5, seed=2)))
    scores, _ = by_hand([module.to(dtype) for module in seen.copies], [0.1, 0.05, 0.025], samples, queries)
    assert_near(callback.scores, scores, rtol={"bf16-mixed": 1e-4, "64-true": 1e-10, "bf16-true": 0.05}[precision])


# -- two processes ----------------------------------------------------------------------------------------------------


still = quietly(lr=1e-7)  # a step hardly moves it, so that one and two processes are at the same point


@pytest.mark.ddp
@pytest.mark.parametrize("n", [11, 12])
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch, n):
    save = torch.save

    def by_rank(*args):
        (tmp_path / f"rank{dist.get_rank()}.wrote").touch()
        save(*args)

    alone = TracInCallback()
    fit(alone, still, DataLoader(table(n), 3), epochs=2)

    class Saves(Callback):
        def on_train_end(self, trainer, pl_module):
            save((together.scores, together.self_influence), tmp_path / f"rank{trainer.global_rank}.pt")

    together = TracInCallback()
    monkeypatch.setattr(torch, "save", by_rank)
    logged = fit(
        together, still, DataLoader(table(n), 3), extra=[Saves()], default_root_dir=tmp_path,
        **ddp_trainer_kwargs(max_epochs=2, enable_checkpointing=False),
    )  # fmt: skip
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for one, two, expected in zip(*ranks, (alone.scores, alone.self_influence), strict=True):
        assert torch.equal(one, two), "every rank holds the same"
        assert_near(one, expected, rtol=1e-4)
    assert torch.equal(torch.load(tmp_path / "tracin.pt")["scores"], ranks[0][0])
    assert [path.name for path in tmp_path.glob("*.wrote")] == ["rank0.wrote"]
    assert logged.callback_metrics["influence/tracin_mean"].item() == pytest.approx(ranks[0][0].mean().item(), rel=1e-5)
