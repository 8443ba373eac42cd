"""The callback with the estimators of the library: what is remembered, and odd modules and batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_ext._lightning import Callback
from lightning_ext._testing.bitwise import first_difference
from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import ContinualDataModule
from lightning_ext.testing import assert_resumes, ddp_trainer_kwargs
from tests.callbacks.laftr_toys import Anchor, Net, flat, loader, seeded_net, table, train
from tests.conformance import toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")


class Adam(Net):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def blobs(task):
    """Three classes in six dimensions, in other places for each task."""
    generator = torch.Generator().manual_seed(task)
    centres = 2 * torch.randn(3, 6, generator=generator)
    labels = torch.arange(90) % 3
    return centres[labels] + 0.5 * torch.randn(90, 6, generator=generator), labels


def rows():
    return ContinualDataModule([[blobs(task), blobs(task)] for task in range(3)], batch_size=10, seed=0)


def accuracies(module, data):
    with torch.no_grad():
        return [(module(x).argmax(-1) == t).float().mean().item() for x, t in map(blobs, range(data.num_tasks))]


@pytest.mark.parametrize(
    "chosen",
    [
        {"estimator": "laftr"},
        {"estimator": "laftr-sample"},
        {"estimator": "ewc", "weight": 100.0},
        {"estimator": "laftr", "consolidate": "last"},
        {"estimator": "laftr", "consolidate": "merge"},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_past_tasks_are_remembered(chosen):
    """The eight lines, and what they are for: over what plain fine-tuning forgets."""

    def learned(weight):
        data, module = rows(), seeded_net(Adam)
        regularizer = FunctionSpaceRegularizer(**{**chosen, "weight": weight})
        for task in range(data.num_tasks):
            data.set_task(task)
            regularizer.current_task = task
            train(module, [regularizer], data, max_epochs=10, limit_val_batches=0)
        assert regularizer.tasks == [0, 1, 2]
        return sum(accuracies(module, data)) / 3

    forgets = learned(0.0)
    assert forgets < 0.8
    assert learned(chosen.get("weight", 10.0)) > forgets + 0.1


class Dicts(Net):
    def forward(self, image, scale):
        return scale * self.net(image)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"], 2.0), batch["label"])


def collated(items):
    x, t = zip(*items, strict=True)
    return {"image": torch.stack(x), "label": torch.tensor(t)}


def test_batches_that_are_dicts():
    callback = FunctionSpaceRegularizer(
        "laftr", inputs="image", target="label", forward=lambda module, x: module(x, 2.0), log_every_n_steps=1
    )
    module = seeded_net(Dicts)
    for _ in range(2):
        trainer = train(module, [callback], DataLoader(table(12), 4, collate_fn=collated))
    assert trainer.callback_metrics["laftr/penalty"] > 0
    with pytest.raises(ValueError, match="inputs"):
        train(module, [FunctionSpaceRegularizer("laftr")], DataLoader(table(12), 4, collate_fn=collated))


class Tokens(Net):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))


def test_token_ids_are_refused_with_what_to_do():
    ids = [(torch.tensor([i % 9, i % 4]), i % 3) for i in range(12)]
    with pytest.raises((TypeError, ValueError), match="embedding"):
        train(seeded_net(Tokens), [FunctionSpaceRegularizer("laftr")], DataLoader(ids, 4))


def test_a_head_that_has_grown_is_compared_in_its_common_part():
    callback, module = FunctionSpaceRegularizer("laftr", estimator_options={"fixed_draws": True}), seeded_net()
    callback.end_task(None, module, loader())
    last = module.net[2]
    module.net[2] = nn.Linear(8, 5)
    with torch.no_grad():
        module.net[2].weight[:3], module.net[2].bias[:3] = last.weight, last.bias
    assert callback.penalty(module).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        module.net[2].bias[0] += 1.0
    assert callback.penalty(module).item() > 0.01
    train(module, [callback])
    assert callback.tasks == [0, 1]


def test_compiled_inner_network():
    torch._dynamo.reset()
    plain, compiled = seeded_net(), seeded_net()
    compiled.net = torch.compile(compiled.net, backend="eager")
    results = []
    for module in (plain, compiled):
        callback = FunctionSpaceRegularizer("laftr", weight=10.0, log_every_n_steps=1)
        for _ in range(2):
            trainer = train(module, [callback])
        results.append(trainer.callback_metrics["laftr/penalty"])
    torch._dynamo.reset()
    assert results[0] > 0
    torch.testing.assert_close(*results)
    torch.testing.assert_close(flat(plain), flat(compiled))


@pytest.mark.parametrize("estimator", ["laftr", "laftr-sample", "laftr-moments", "full", "ntk", "ewc", "l2"])
def test_a_network_that_is_compiled_after_it_was_learned(estimator):
    callback, module = FunctionSpaceRegularizer(estimator), seeded_net()
    callback.end_task(None, module, loader())
    with torch.no_grad():
        module.net[2].weight += 0.3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    plain = callback.penalty(module).item()
    torch._dynamo.reset()
    module.net = torch.compile(module.net, backend="eager")
    callback._draws = 0
    compiled = callback.penalty(module).item()
    torch._dynamo.reset()
    assert plain > 1e-3
    assert compiled == pytest.approx(plain, rel=1e-4)


class Looks(Callback):
    """Distances after every epoch."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("laftr/")})


def held_out():
    return loader(40, seed=3)


@pytest.mark.parametrize("loaders", [held_out(), lambda task: held_out() if task == 0 else None])
def test_the_estimate_is_held_against_the_truth(loaders):
    looks, module = Looks(), seeded_net()
    callback = FunctionSpaceRegularizer("laftr", weight=0.0, diagnostics_loader=loaders, log_every_n_steps=1)
    for seed in (1, 2):
        callback.end_task(None, module, loader(seed=seed))
    with torch.no_grad():
        reference = module(held_out().dataset.tensors[0]).log_softmax(-1)
    train(module, [callback, looks], loader(seed=5), max_epochs=20)
    with torch.no_grad():
        now = module(held_out().dataset.tensors[0]).log_softmax(-1)
    true = (reference.exp() * (reference - now)).sum(-1).mean().item()
    assert looks.found[-1]["laftr/true"] == pytest.approx(true, rel=1e-4)
    assert abs(looks.found[-1]["laftr/log_ratio"]) < 1.0
    assert callback._warned is False


def test_an_estimate_that_is_far_off_is_said_once():
    callback = FunctionSpaceRegularizer(Anchor(scale=1e4), weight=0.0, diagnostics_loader=held_out())
    module = seeded_net()
    callback.end_task(None, module, loader())
    with pytest.warns(UserWarning, match="the estimated distance on past tasks is .*, the true one") as caught:
        train(module, [callback], max_epochs=3)
    assert sum("estimated distance" in str(w.message) for w in caught) == 1


def test_a_diagnostics_loader_that_changes_is_refused():
    sizes = iter([8, 9])
    callback = FunctionSpaceRegularizer(Anchor(), diagnostics_loader=lambda task: loader(next(sizes)))
    module = seeded_net()
    callback.end_task(None, module, loader())
    with pytest.raises(ValueError, match="It must give the same samples each time"):
        train(module, [callback])


def three(module, consolidate, **options):
    callback = FunctionSpaceRegularizer("laftr", consolidate=consolidate, **options)
    for seed in range(3):
        callback.end_task(None, module, loader(12, seed=seed))
        with torch.no_grad():
            module.net[0].weight += 0.05
    return callback


def test_one_reference_for_all_tasks():
    """After each task all refer to its weights: there the penalty is 0, and one copy of the weights is kept."""
    module = seeded_net()
    every, last, merged = (three(seeded_net(), how) for how in ("all", "last", "merge"))
    with torch.no_grad():
        module.net[0].weight += 0.10
    assert every.penalty(module).item() > 1e-4
    assert last.penalty(module).item() == pytest.approx(0.0, abs=1e-6)
    assert merged.penalty(module).item() == pytest.approx(0.0, abs=1e-6)
    weights = flat(module).nbytes
    assert every.stats_bytes - last.stats_bytes == 2 * weights
    assert last.stats_bytes - merged.stats_bytes == 2 * (last.stats_bytes - weights) / 3


@pytest.mark.parametrize(("consolidate", "passes"), [("all", 6), ("last", 2), ("merge", 2)])
def test_passes_of_a_step(consolidate, passes):
    """Of reference and module: consolidated, a step does not know how many tasks there were."""
    calls, module = [], seeded_net()
    module.net[1] = nn.GELU()  # a chain of linear layers and ReLU is not run itself
    callback = three(module, consolidate, estimator_options={"num_samples": 60})
    callback.penalty(module)  # sees that it is none
    module.net.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    callback.penalty(module)
    assert len(calls) == passes
    assert sum(calls) == pytest.approx(60 * passes, rel=0.1)


def test_many_samples_of_all_tasks_in_one_pass_tend_to_the_mean_of_the_tasks():
    options = {"estimator_options": {"num_samples": 20_000}, "weight": 1.0}
    module = seeded_net()
    last = three(module, "last", **options)
    alone = list(last._memory._held)
    with torch.no_grad():
        module.net[2].weight += 0.3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = sum(e.distance(module).item() for e in alone) / 3
    assert last.penalty(module).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("consolidate", ["last", "merge"])
def test_consolidation_keeps_heads_apart_or_says_that_it_cannot(consolidate):
    module = seeded_net()
    callback = FunctionSpaceRegularizer("laftr", consolidate=consolidate, heads=[[0, 1], [1, 2]], weight=1.0)
    callback.end_task(None, module, loader(seed=0))
    if consolidate == "merge":
        with pytest.raises(ValueError, match="heads"):
            callback.end_task(None, module, loader(seed=1))
        return
    callback.end_task(None, module, loader(seed=1))
    with torch.no_grad():
        module.net[2].bias[2] += 1.0  # which the first task does not have
    alone = [estimator.distance(module).item() for estimator in callback._memory._held]
    assert alone[0] == pytest.approx(0.0, abs=1e-6)
    assert alone[1] > 0.01
    assert callback.penalty(module).item() == pytest.approx(alone[1] / 2, rel=0.1)


def test_merging_needs_an_estimator_that_can():
    with pytest.raises(ValueError, match="consolidate='merge' pools the statistics of tasks, and Anchor cannot"):
        FunctionSpaceRegularizer(Anchor(), consolidate="merge")


@pytest.mark.parametrize("consolidate", ["all", "last", "merge"])
def test_resumes_in_the_third_task_with_fresh_draws(consolidate):
    def callbacks():
        callback = FunctionSpaceRegularizer("laftr", consolidate=consolidate, weight=5.0)
        for seed in (1, 2):
            callback.end_task(None, seeded_net(toys.Plain, seed=seed), loader(seed=seed))
        return [callback]

    assert_resumes(lambda: seeded_net(toys.Plain), toys.loaders, callbacks, crash_at=(1, 1))


def test_ranks_find_the_statistics_of_one_process(tmp_path):
    one, two = (FunctionSpaceRegularizer("laftr", weight=0.0, memory_file=str(tmp_path / f"{n}.pt")) for n in (1, 2))
    a, b = seeded_net(), seeded_net()
    for module in (a, b):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
    train(a, [one], loader(11))
    train(b, [two], loader(11), **ddp_trainer_kwargs(max_epochs=1))
    two.setup(type("T", (), {"strategy": None})(), b, "fit")
    expected, found = (c._memory.state_dict()["estimators"][0]["_extra_state"] for c in (one, two))
    assert expected["kept"]["statistics.count"].sum() == 11
    assert first_difference(expected["reference"], found["reference"]) is None
    for name, value in expected["kept"].items():
        torch.testing.assert_close(found["kept"][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_consolidated_tasks_are_those_that_are_stored():
    """A task that ends again, and a memory that is loaded: nothing stale is asked, and one reference is held."""
    module = seeded_net()
    callback = three(module, "last", diagnostics_loader=held_out())
    callback.penalty(module)
    callback.current_task = 2
    callback.end_task(None, module, loader(seed=7))
    callback.current_task = None
    pool = callback._memory._one([0, 1, 2])
    assert all(a is b for a, b in zip(pool.estimators, callback._memory._held, strict=True))
    true = callback._diagnostics.distance(None, module, [0, 1, 2], lambda task: None)
    assert true == pytest.approx(0.0, abs=1e-6), "the outputs of the common reference are kept for every task"
    fresh = FunctionSpaceRegularizer("laftr", consolidate="last")
    fresh.load_state_dict(copy.deepcopy(callback.state_dict()))
    assert all(held._reference is fresh._memory._held[-1]._reference for held in fresh._memory._held)


def test_the_truth_is_the_same_on_two_ranks():
    found = []
    for kwargs in ({}, ddp_trainer_kwargs(max_epochs=1)):
        module = seeded_net()
        callback = FunctionSpaceRegularizer("laftr", weight=0.0, fit_at="manual", diagnostics_loader=held_out())
        callback.end_task(None, seeded_net(seed=4), loader())
        sampler = {"sampler": range(12)} if kwargs else {}
        trainer = train(module, [callback], loader(batch_size=6 if kwargs else 12, **sampler), **kwargs)
        found.append(trainer.callback_metrics["laftr/true"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)
