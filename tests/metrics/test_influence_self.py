"""SelfInfluence against closed forms, on batches in any order, on one and two ranks, inside a training loop."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Trainer
from lightning_ext.callbacks import CurvatureCollector
from lightning_ext.data import IndexedDataset
from lightning_ext.functional import InfluenceObjective, ParameterView, kronecker_curvature
from lightning_ext.metrics import SelfInfluence
from lightning_ext.modules import Classifier, InfluenceModule
from lightning_ext.testing import ddp_trainer_kwargs, run_ddp
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import Dense, N, classes, close, network

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
SIZES = (4, 5, 3)


@pytest.fixture(scope="module")
def gradients():
    return Dense(network(*SIZES), classes()[:]).gradients()


def updated(metric, module=None, data=None, size=5, order=None):
    module = network(*SIZES).double() if module is None else module
    x, t = (data or classes())[:]
    order = torch.arange(len(x)) if order is None else order
    for part in torch.split(order, size):
        metric.update(module, (x[part].to(next(module.parameters()).dtype), t[part]), part)
    return metric


def test_without_a_curvature_it_is_the_squared_gradient_over_the_damping(gradients):
    found = updated(SelfInfluence(damping=0.3)).compute()
    close(found["values"], gradients.square().sum(1) / 0.3, rtol=1e-12)
    assert found["indices"].tolist() == list(range(N))
    assert found["values"].dtype == torch.float64


def test_a_function_stands_for_the_inverse_curvature(gradients):
    inverse = Dense(network(*SIZES), classes()[:]).inverse(0.1)
    found = updated(SelfInfluence(lambda rows: rows @ inverse)).compute()
    close(found["values"], (gradients @ inverse * gradients).sum(1), rtol=1e-12)


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_fitted_factors(gradients, damping):
    base, data = network(*SIZES).double().eval(), classes()
    x, t = data[:]
    view = ParameterView(base)
    fitted = kronecker_curvature(base, InfluenceObjective(), [(x.double(), t)], view, corrected=True)
    found = updated(SelfInfluence(fitted, damping)).compute()["values"]
    close(found, (gradients * fitted.solve(gradients, damping)).sum(1), rtol=1e-12)
    module = InfluenceModule(network(*SIZES), solver="ekfac", damping=damping, double=True)
    close(found, module.self_influence(DataLoader(data, batch_size=5)), rtol=1e-9)


def test_linear_regression_in_closed_form():
    """s = r^2 x A^-1 x, the leverage times N times the squared residual."""
    x, y = ref.numbers(40)[:]
    x, y = x.double(), y.double()
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    inverse = torch.linalg.inv(x.mT @ x / 40 + 0.1 * torch.eye(4, dtype=torch.float64))
    metric = SelfInfluence(lambda rows: rows @ inverse, objective=InfluenceObjective("half_squared_error"))
    metric.update(layer, (x, y))
    residual = (layer(x) - y).detach()[:, 0]
    close(metric.compute()["values"], residual.square() * (x @ inverse * x).sum(1), rtol=1e-12)


def test_order_batches_and_repetitions_do_not_matter(gradients):
    wanted = gradients.square().sum(1) / 0.01
    metric = updated(SelfInfluence(), size=4, order=torch.randperm(N))
    updated(metric, size=3, order=torch.tensor([5, 2, 7, 5]))
    found = metric.compute()
    close(found["values"], wanted, rtol=1e-12)
    assert found["indices"].tolist() == list(range(N))


def test_without_positions_samples_are_numbered_as_they_come(gradients, recwarn):
    metric, (x, t) = SelfInfluence(), classes()[:]
    module = network(*SIZES).double()
    first, *others = [(x[part].double(), t[part]) for part in torch.split(torch.arange(N), 6)]
    with pytest.warns(UserWarning, match=r"without positions.*shuffles.*IndexedDataset"):
        metric.update(module, first)
    for batch in others:
        metric.update(module, batch)
    assert not [w for w in recwarn if "positions" in str(w.message)], "once is enough"
    close(metric.compute()["values"], gradients.square().sum(1) / 0.01, rtol=1e-12)
    metric.reset()
    metric.update(module, (x[:2].double(), t[:2]))
    assert metric.compute()["indices"].tolist() == [0, 1]


def test_a_batch_may_bring_its_positions(gradients, recwarn):
    metric, module = SelfInfluence(), network(*SIZES)
    for batch in DataLoader(IndexedDataset(classes()), batch_size=6, shuffle=True):
        metric.update(module, batch)
    found = metric.compute()
    close(found["values"], gradients.square().sum(1) / 0.01, rtol=1e-4)
    assert found["indices"].tolist() == list(range(N))
    assert not [w for w in recwarn if "positions" in str(w.message)]
    metric.reset()
    metric.update(module, next(iter(DataLoader(IndexedDataset(classes()), batch_size=2))), torch.tensor([7, 9]))
    assert metric.compute()["indices"].tolist() == [7, 9]


def test_the_batchs_own_value_comes_back_from_forward(gradients):
    metric, (x, t) = SelfInfluence(damping=1.0), classes()[:]
    module = network(*SIZES).double()
    value = metric(module, (x[3:5].double(), t[3:5]), torch.tensor([3, 4]))
    close(value["values"], gradients[3:5].square().sum(1), rtol=1e-12)
    metric(module, (x[:2].double(), t[:2]), torch.tensor([0, 1]))
    assert metric.compute()["indices"].tolist() == [0, 1, 3, 4]


def test_a_sample_that_changed_between_two_sights_is_refused():
    metric = updated(SelfInfluence(), size=23)
    other = network(*SIZES, seed=3).double()
    updated(metric, other, order=torch.tensor([4]))
    with pytest.raises(ValueError, match="4"):
        metric.compute()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(copied, gradients):
    metric = updated(SelfInfluence(), order=torch.arange(10))
    twin = updated(copied(metric), order=torch.arange(10, N))
    close(twin.compute()["values"], gradients.square().sum(1) / 0.01, rtol=1e-12)
    assert len(metric.compute()["values"]) == 10


def test_state_goes_through_a_checkpoint(gradients):
    metric = SelfInfluence()
    metric.persistent(True)
    updated(metric, order=torch.arange(10))
    fresh = SelfInfluence()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    updated(fresh, order=torch.arange(10, N))
    close(fresh.compute()["values"], gradients.square().sum(1) / 0.01, rtol=1e-12)


def test_two_metrics_merge(gradients):
    a, b = updated(SelfInfluence(), order=torch.arange(0, N, 2)), updated(SelfInfluence(), order=torch.arange(1, N, 2))
    a.merge_state(b)
    close(a.compute()["values"], gradients.square().sum(1) / 0.01, rtol=1e-12)


def test_the_module_is_left_as_it_was():
    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)).train()
    before, state = {k: v.clone() for k, v in base.state_dict().items()}, torch.get_rng_state()
    updated(SelfInfluence(), base)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in base.modules())
    assert all(p.grad is None for p in base.parameters())
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


# -- ranks and loops ----------------------------------------------------------------------------------------------


@pytest.mark.ddp
def test_two_ranks_put_their_samples_together(gradients):
    def rank_main(rank):
        orders = (torch.tensor([8, 1, 3, 0]), torch.tensor([2, 4, 5, 6, 7, 3]))  # the 3 on both
        return updated(SelfInfluence(), order=orders[rank]).compute()

    for found in run_ddp(rank_main):
        assert found["indices"].tolist() == list(range(9))
        close(found["values"], gradients[:9].square().sum(1) / 0.01, rtol=1e-12)


@pytest.mark.ddp
def test_a_rank_may_see_nothing(gradients):
    def rank_main(rank):
        metric = SelfInfluence()
        return (updated(metric) if rank else metric).compute()

    for found in run_ddp(rank_main):
        close(found["values"], gradients.square().sum(1) / 0.01, rtol=1e-12)


class Watched(Classifier):
    """Self-influence of the validation set, from its own step."""

    def __init__(self):
        super().__init__(network(*SIZES))
        self.suspicion = SelfInfluence()

    def validation_step(self, batch, batch_idx):
        self.suspicion.update(self, batch[:2], batch[2])

    def on_validation_epoch_end(self):
        found = self.suspicion.compute()
        assert found["indices"].tolist() == list(range(N))
        self.log("suspicion", found["values"].mean())
        self.suspicion.reset()


@pytest.mark.parametrize("options", [
    {}, {"inference_mode": False}, {"precision": "bf16-mixed"}, {"precision": "64-true"},
    pytest.param({"ddp": True}, marks=pytest.mark.ddp),
], ids=str)  # fmt: skip
def test_in_a_validation_step(options, gradients):
    x, t = classes()[:]
    data = DataLoader(TensorDataset(x, t, torch.arange(N)), batch_size=4)
    kwargs = ddp_trainer_kwargs(enable_checkpointing=False) if options.get("ddp") else {**ref.QUIET, **options}
    trainer = Trainer(**kwargs)
    trainer.validate(Watched(), data, verbose=False)
    wanted = float(gradients.square().sum(1).mean() / 0.01)
    assert float(trainer.callback_metrics["suspicion"]) == pytest.approx(wanted, rel=1e-5)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf"), 0.0])
def test_damping_out_of_range(damping):
    with pytest.raises(ValueError, match="damping"):
        SelfInfluence(damping=damping)


def test_what_is_no_curvature():
    """What a collector has before its training is not taken for the identity."""
    collector = CurvatureCollector()
    with pytest.raises(ValueError, match=r"got None.*collector.curvature, once its training is over"):
        SelfInfluence(collector.curvature)
    with pytest.raises(ValueError, match=r"got .*CurvatureCollector.*pass its .curvature"):
        SelfInfluence(collector)


def test_the_largest_are_drawn():
    plt = pytest.importorskip("matplotlib.pyplot")
    metric = updated(SelfInfluence())
    _, axes = metric.plot(count=3)
    value = metric.compute()
    best = value["values"].argsort(descending=True)[:3].tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in best]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(value["values"][best].tolist())
    given = plt.subplots()
    assert metric.plot(value, ax=given[1]) == given
    assert len(given[1].patches) == 20
    plt.close("all")


def test_a_damping_of_zero_goes_with_a_curvature(gradients):
    found = updated(SelfInfluence(lambda rows: 2 * rows, damping=0.0)).compute()
    close(found["values"], 2 * gradients.square().sum(1), rtol=1e-12)


def test_positions_must_fit_the_batch():
    x, t = classes()[:]
    with pytest.raises(ValueError, match=r"\(23,\)"):
        SelfInfluence().update(network(*SIZES), (x, t), torch.arange(4))


def test_a_gradient_that_is_not_finite_is_refused_and_nothing_kept():
    x, t = classes()[:]
    x[3, 0] = torch.nan
    metric = SelfInfluence()
    with pytest.raises(ValueError, match=r"samples \[3\]"):
        metric.update(network(*SIZES), (x, t))
    with pytest.raises(RuntimeError, match="no sample"):
        metric.compute()


def test_a_curvature_of_other_parameters_is_refused():
    base = network(*SIZES).eval()
    some = kronecker_curvature(base, InfluenceObjective(), [classes()[:]], ParameterView(base, "^2"), corrected=True)
    with pytest.raises(ValueError, match=r"\(R, 18\)"):
        SelfInfluence(some).update(base, classes()[:])


def test_nothing_seen():
    with pytest.warns(UserWarning, match="before"), pytest.raises(RuntimeError, match="no sample"):
        SelfInfluence().compute()
