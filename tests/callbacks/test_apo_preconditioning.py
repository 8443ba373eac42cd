"""The callback that feeds the preconditioner: which objective, when, and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext._lightning import Callback, MisconfigurationException, submodule
from lightning_ext.callbacks import APOPreconditioning
from lightning_ext.functional import ProximalObjective, softmax_kl
from lightning_ext.optim import APOPreconditioner
from lightning_ext.testing import assert_resumes, ddp_trainer_kwargs
from tests.callbacks import apo_toys as toys

WHOLE = {"fsd_fraction": 1.0, "divergence": "kl"}


def net():
    torch.manual_seed(3)
    return toys.Classifier(lambda p: APOPreconditioner(p, lr=0.1, every_n_steps=2, meta_lr=0.1))


def batches(n=12, rows=6):
    x, labels = toys.rows(n * rows).tensors
    return [(x[i : i + rows], labels[i : i + rows]) for i in range(0, n * rows, rows)]


def by_hand(module, data, rows=None):
    """The plain loop of the optimizer's documentation, with the objective's loss on the first rows of a batch."""
    (optimizer,) = [module.configure_optimizers()]
    previous = None
    for x, t in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), t)
        loss.backward()
        if optimizer.meta_step_due and previous is not None:
            objective = ProximalObjective(
                lambda x=x[:rows], t=t[:rows]: F.cross_entropy(module(x), t),
                lambda previous=previous: module(previous),
                softmax_kl,
                loss_at_anchor=loss.detach() if rows is None else None,
            )
            objective.anchor()
            optimizer.step(look_ahead=objective)
        else:
            optimizer.step()
        previous = x
    return module


class Plain(toys.Classifier):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def plain(**kwargs):
    torch.manual_seed(3)
    return Plain(lambda p: APOPreconditioner(p, lr=0.1, every_n_steps=2, meta_lr=0.1, **kwargs)).double()


def wide(data):
    return [(x.double(), t) for x, t in data]


def test_with_the_loss_on_a_part_of_the_batch():
    data, module = wide(batches()), plain()
    expected = by_hand(plain(), data, rows=2)
    toys.fit(module, toys.as_they_are(*data), APOPreconditioning(loss_fraction=0.3, **WHOLE))
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    whole = by_hand(plain(), data)
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_it_is_the_plain_loop(structure):
    data = wide(batches())
    expected = by_hand(plain(structure=structure), data)
    module = plain(structure=structure)
    toys.fit(module, toys.as_they_are(*data), APOPreconditioning(**WHOLE))
    untouched = plain(structure=structure)
    toys.fit(untouched, toys.as_they_are(*data))
    for (name, p), q, r in zip(module.named_parameters(), expected.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)
        assert not torch.allclose(p, r, rtol=1e-6), "without the callback the preconditioner would not have moved"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_before_is_the_one_of_the_training_step(accumulate):
    """Looked at through what the optimizer reports, against an evaluation of its own."""
    found, own = [], []

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            objective = optimizer.look_ahead
            if objective is not None:
                found.append(float(objective.loss_at_anchor))
                with torch.no_grad():
                    own.append(float(objective.loss_fn()))

    toys.fit(
        plain(), toys.as_they_are(*wide(batches())), APOPreconditioning(**WHOLE), Looks(),
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert found
    assert found == pytest.approx(own, rel=1e-12)


def test_the_loss_scale_is_taken_out_of_it():
    found, own = [], []

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer.look_ahead is not None:
                found.append(float(optimizer.look_ahead.loss_at_anchor))
                with torch.no_grad():
                    own.append(float(optimizer.look_ahead.loss_fn()))

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = submodule("plugins.precision").MixedPrecision("16-mixed", "cpu", scaler=scaler)
    toys.fit(plain().float(), toys.as_they_are(*batches()), APOPreconditioning(**WHOLE), Looks(), plugins=[plugin])
    assert found == pytest.approx(own, rel=1e-2)
    assert found


def test_batch_norm_dropout_and_modes_are_left_alone():
    """A meta learning rate of zero, so that only a disturbance could make a difference."""

    def run(*callbacks):
        torch.manual_seed(3)
        module = toys.Classifier(lambda p: APOPreconditioner(p, lr=0.1, every_n_steps=2, meta_lr=0.0))
        toys.fit(module, toys.loader(48), *callbacks)
        return module.state_dict()

    ours, alone = run(APOPreconditioning(divergence="kl")), run()
    assert all(torch.equal(ours[key], alone[key]) for key in alone)


@pytest.mark.parametrize("fsd_batch", ["previous", "loader"])
def test_of_the_other_batch_a_quarter_is_used_but_no_few_rows(fsd_batch):
    seen = set()

    def output_fn(module, batch):
        seen.add(len(batch[0]))
        return module(batch[0])

    for rows, used in ((6, 6), (200, 128), (1000, 250)):
        seen.clear()
        callback = APOPreconditioning(fsd_batch, output_fn=output_fn, divergence="kl")
        toys.fit(net().float(), toys.loader(3 * rows, rows), callback)
        assert seen == {used}
    seen.clear()
    toys.fit(
        net().float(), toys.loader(18, 6), APOPreconditioning(fsd_batch, 0.5, output_fn=output_fn, divergence="kl")
    )
    assert seen == {3}


def test_what_is_logged():
    _, seen = toys.fit(plain(), toys.as_they_are(*wide(batches())), APOPreconditioning(**WHOLE))
    assert {"apo/Q", "apo/loss_lookahead", "apo/fsd", "apo/wsd", "apo/rejected"} <= set(seen.logged[-1])
    last = seen.logged[-1]
    expected = last["apo/loss_lookahead"] + 10.0 * last["apo/fsd"] + 1e-3 * last["apo/wsd"]
    assert last["apo/Q"] == pytest.approx(expected, rel=1e-6)


def test_it_refuses_what_it_cannot_feed():
    with pytest.raises(MisconfigurationException, match=r"feeds an APOPreconditioner.*optimizers are SGD.*APOLearning"):
        toys.fit(toys.Classifier(), toys.loader(), APOPreconditioning())
    with pytest.raises(MisconfigurationException, match="module has 1 of them, counted from 0"):
        toys.fit(plain(), toys.loader(), APOPreconditioning(optimizers=[1]))
    with pytest.raises(ValueError, match=r"'all' or a list of indices from 0 on, each once; got \[\]"):
        APOPreconditioning(optimizers=[])
    with pytest.raises(ValueError, match=r"fsd_fraction must be in \(0, 1\]; got 0"):
        APOPreconditioning(fsd_fraction=0)
    with pytest.raises(ValueError, match=r"loss_fraction must be in \(0, 1\]; got 1.5"):
        APOPreconditioning(loss_fraction=1.5)
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        kind = getattr(submodule("strategies"), name)

        class Of:
            strategy = object.__new__(kind)

        with pytest.raises(MisconfigurationException, match=name):
            APOPreconditioning().setup(Of(), None, "fit")


def test_a_used_callback_can_be_copied():
    callback = APOPreconditioning(**WHOLE)
    toys.fit(plain(), toys.as_they_are(*wide(batches())), callback)
    twin = copy.deepcopy(callback)
    assert twin.state_dict().keys() == callback.state_dict().keys()
    assert callback.state_dict()["previous"][0] is not None, "the batch before the end is part of the state"


class Spread(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        states = trainer.optimizers[0].state.values()
        tensors = [p.detach() for p in pl_module.parameters()]
        tensors += [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
        flat = torch.cat([t.reshape(-1).double() for t in tensors])
        gathered = trainer.strategy.all_gather(flat)
        assert torch.equal(gathered[0], gathered[1])


@pytest.mark.ddp
def test_weights_and_preconditioner_are_equal_on_two_ranks():
    module = plain().float()
    before = [p.detach().clone() for p in module.parameters()]
    kwargs = {**toys.QUIET, **ddp_trainer_kwargs(max_epochs=2)}
    from lightning_ext._lightning import Trainer

    Trainer(callbacks=[APOPreconditioning(divergence="kl"), Spread()], **kwargs).fit(module, toys.loader(48))
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("crash_at", [(1, 1), (1, 2)])
@pytest.mark.parametrize("fsd_fraction", [0.25, 0.5, 1.0])
def test_resumed_training_ends_as_if_it_had_never_stopped(fsd_fraction, crash_at):
    from lightning_ext.testing import StatefulLoader

    assert_resumes(
        lambda: net().float(),
        lambda: StatefulLoader(toys.rows(24), batch_size=6),
        lambda: [APOPreconditioning(divergence="kl", fsd_fraction=fsd_fraction)],
        crash_at=crash_at,
    )
