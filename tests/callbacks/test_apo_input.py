"""Bad input: one clear error that says which argument, what came and what to do; and edges that are none."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_ext._lightning import MisconfigurationException, submodule
from lightning_ext.callbacks import APOLearningRate, HypergradientLR
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*dataloader_iter", "ignore:.*configure_optimizers. returned"
)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(toys.rows())


ARGUMENTS = [
    ({"lam_f": -1.0}, "lam_f must be at least 0 and finite; got -1.0"),
    ({"lam_f": math.nan}, "lam_f must be at least 0 and finite; got nan"),
    ({"lam_f": "automatic"}, "lam_f must be a number of at least 0 or 'auto'; got 'automatic'"),
    ({"lam_w": -0.1}, "lam_w must be at least 0 and finite; got -0.1"),
    ({"lam_w": math.inf}, "lam_w must be at least 0 and finite; got inf"),
    ({"lam_f": 0, "lam_w": 0}, "lam_f and lam_w are both 0.*HypergradientLR"),
    ({"trust_radius": 0.0}, "trust_radius must be above 0; got 0.0"),
    ({"every_n_steps": 0}, "every_n_steps must be at least 1; got 0"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0; got -1"),
    ({"meta_lr": -0.1}, "meta_lr must be at least 0 and finite; got -0.1"),
    ({"meta_lr": math.nan}, "meta_lr must be at least 0 and finite; got nan"),
    ({"max_log_step": 0.0}, "max_log_step must be above 0; got 0.0"),
    ({"lr_bounds": (1.0, 0.1)}, r"lr_bounds must be \(low, high\) with 0 < low < high; got \(1.0, 0.1\)"),
    ({"lr_bounds": (0.0, 0.1)}, r"lr_bounds must be .*; got \(0.0, 0.1\)"),
    ({"meta_optimizer": "adam"}, "meta_optimizer must be one of 'rmsprop', 'sgd', 'secant'; got 'adam'"),
    ({"granularity": "tensor"}, "granularity must be one of 'global', 'group', 'layer'; got 'tensor'"),
    ({"apply": "during"}, "apply must be one of 'before', 'after'; got 'during'"),
    ({"loss_batch": "last"}, "loss_batch must be one of 'same', 'next'; got 'last'"),
    ({"loss_batch": "next"}, "loss_batch='next' .* needs lam_f=0; got lam_f="),
    ({"loss_batch": "next", "lam_f": 0, "meta_optimizer": "secant"}, "meta_optimizer='secant' .* loss_batch='same'"),
    ({"on_scheduler": "replace"}, "on_scheduler must be one of 'error', 'multiply'; got 'replace'"),
    ({"optimizers": []}, r"optimizers must be 'all' or a list of indices from 0 on, each once; got \[\]"),
    ({"optimizers": [-1]}, r"optimizers must be 'all' or a list of indices from 0 on, each once; got \[-1\]"),
    ({"optimizers": "first"}, "optimizers must be 'all' or a list of indices from 0 on, each once; got 'first'"),
    ({"fsd_fraction": 0.0}, r"fsd_fraction must be in \(0, 1\]; got 0.0"),
    ({"loss_fraction": 0.0}, r"loss_fraction must be in \(0, 1\]; got 0.0"),
    ({"fsd_fraction": 1.5}, r"fsd_fraction must be in \(0, 1\]; got 1.5"),
    ({"fsd_batch": "next"}, "fsd_batch must be 'previous', 'loader' or a DataLoader; got 'next'"),
    ({"fsd_batch": [1]}, r"fsd_batch must be 'previous', 'loader' or a DataLoader; got \[1\]"),
    ({"divergence": "l1"}, "divergence must be one of 'mse', .*'bernoulli_kl', or a function; got 'l1'"),
    ({"divergence": 3}, r"divergence must be a name or a function \(new, old\) -> scalar; got 3"),
]


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS, ids=[str(a) for a, _ in ARGUMENTS])
def test_an_argument_out_of_range_is_refused_where_the_callback_is_made(arguments, said):
    with pytest.raises(ValueError, match=said):
        APOLearningRate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"meta_lr": -1.0}, "meta_lr"), ({"lr_bounds": (1, 0)}, "lr_bounds"), ({"optimizers": []}, "optimizers")],
)
def test_hypergradient_refuses_the_same(arguments, said):
    with pytest.raises(ValueError, match=said):
        HypergradientLR(**arguments)


def test_a_stream_cannot_be_drawn_from():
    with pytest.raises(MisconfigurationException, match=r"map-style dataset; got an IterableDataset.*'previous'"):
        APOLearningRate(fsd_batch=DataLoader(Stream()))


# -- what a training brings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [APOLearningRate, HypergradientLR])
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharding_strategies_are_refused_by_name(kind, name):
    strategy = getattr(submodule("strategies"), name)
    trainer = types.SimpleNamespace(strategy=type("Made", (strategy,), {"__init__": lambda self: None})())
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} does not work with {name}.*strategy='ddp'"):
        kind().setup(trainer, toys.Classifier(), "fit")
    kind().setup(trainer, toys.Classifier(), "test")


def refused(said, module=None, data=None, error=MisconfigurationException, **arguments):
    with pytest.raises(error, match=said):
        toys.fit(module or toys.Classifier(), toys.loader() if data is None else data, APOLearningRate(**arguments))


def test_optimizers_that_are_not_there():
    refused(r"optimizers=\[0, 2\], but the module has 1 of them, counted from 0", optimizers=[0, 2])
    module = toys.Classifier()
    module.configure_optimizers = lambda: None
    refused("the module has no optimizer; return one from configure_optimizers", module)


def test_nothing_to_train():
    module = toys.Classifier()
    for p in module.parameters():
        p.requires_grad_(False)
    refused("optimizer 0 has no trainable parameter", module)


@pytest.mark.parametrize("rate", [0.0, 1e-9, 20.0])
def test_a_start_outside_the_bounds(rate):
    module = toys.Classifier(lambda p: torch.optim.SGD(p, lr=rate))
    refused(r"starts with lr=\[.*\], outside lr_bounds=\(1e-08, 10.0\)", module)


def test_manual_optimisation_needs_a_loss():
    refused(
        r"under manual optimisation .*Pass loss_fn=\.\.\., a function \(module, batch\) -> scalar loss", toys.Manual()
    )
    _, seen = toys.fit(toys.Manual(), toys.loader(), APOLearningRate(loss_fn=toys.cross_entropy))
    assert seen.rates[-1][0] != 0.05


def test_a_step_that_takes_the_iterator_needs_a_loss():
    class Iterates(toys.Classifier):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return toys.cross_entropy(self, batch)

    refused("takes dataloader_iter cannot be run twice.*loss_fn", Iterates())


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), r"a tensor of shape \(6,\) and torch.float32"),
        (lambda m, b: None, "loss_fn must return a scalar loss; got None"),
        (lambda m, b: {"nll": m(b[0]).sum()}, r"got a dict with keys \['nll'\]"),
        (lambda m, b: 3.0, "got a float"),
    ],
)
def test_a_loss_that_is_none(loss_fn, said):
    refused(said, loss_fn=loss_fn, divergence="kl")


@pytest.mark.parametrize(
    ("output_fn", "said"),
    [
        (lambda m, b: (m(b[0]), 1), "output_fn must return a floating-point tensor.*got a tuple"),
        (lambda m, b: None, "output_fn must return a floating-point tensor.*got None"),
        (lambda m, b: m(b[0]).argmax(1), r"got a tensor of shape \(\d,\) and torch.int64"),
        (lambda m, b: m(b[0])[:0], r"got a tensor of shape \(0, 3\)"),
    ],
)
def test_outputs_that_are_none(output_fn, said):
    refused(said, output_fn=output_fn, divergence="kl")


class TwoInputs(toys.Classifier):
    def forward(self, x, scale):
        return scale * self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0], 2.0), batch[1])


def test_a_forward_that_needs_more_than_the_inputs():
    refused("module.batch.0.. by default, and that failed: .*'scale'.*Pass output_fn", TwoInputs())
    callback = APOLearningRate(output_fn=lambda module, batch: module(batch[0], 2.0))
    assert toys.fit(TwoInputs(), toys.loader(), callback)[1].rates[-1][0] != 0.05


def test_an_error_inside_the_network_is_not_taken_for_a_missing_argument():
    class Broken(toys.Classifier):
        def forward(self, x):
            if not torch.is_grad_enabled():
                raise RuntimeError("a shape that does not fit")
            return self.net(x)

    refused("a shape that does not fit", Broken(), error=RuntimeError)


def one_logit():
    class One(toys.Classifier):
        def forward(self, x):
            return self.net(x)[:, 0]

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).float())

    return One()


def test_a_divergence_of_classes_needs_classes():
    refused("at least two classes.*bernoulli_kl", one_logit(), error=ValueError, divergence="kl")
    _, seen = toys.fit(one_logit(), toys.loader(), APOLearningRate(divergence="bernoulli_kl"))
    assert seen.rates[-1][0] != 0.05


# -- batches ----------------------------------------------------------------------------------------------------------


def test_the_first_batch_has_no_other_and_one_batch_is_no_training_to_adapt():
    _, seen = toys.fit(toys.Classifier(), toys.loader(6), APOLearningRate(**toys.EVERY_STEP))
    assert seen.rates == [[0.05]]
    assert seen.logged == [{}]


def test_a_stream_works_with_the_previous_batch_only():
    data = DataLoader(Stream(), 6)
    _, seen = toys.fit(toys.Classifier(), data, APOLearningRate())
    assert len({r[0] for r in seen.rates}) == 4
    refused("got an IterableDataset. Use fsd_batch='previous'", data=data, fsd_batch="loader")


def test_several_loaders_work_with_the_previous_batch_only():
    class Both(toys.Classifier):
        def training_step(self, batch, batch_idx):
            return sum(toys.cross_entropy(self, part) for part in batch.values())

    data = {"a": toys.loader(), "b": toys.loader(seed=3)}
    refused("needs one DataLoader over a map-style dataset; got a dict", Both(), data, fsd_batch="loader",
            output_fn=lambda m, b: m(b["a"][0]), divergence="kl")  # fmt: skip
    callback = APOLearningRate(output_fn=lambda m, b: m(b["a"][0]), divergence="kl")
    assert toys.fit(Both(), data, callback)[1].rates[-1][0] != 0.05


def test_a_batch_of_one_with_batch_norm_fails_in_the_training_itself():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        toys.fit(toys.Classifier(norm=True), toys.loader(3, 1))
    refused("more than 1 value per channel", toys.Classifier(norm=True), toys.loader(3, 1), error=ValueError)
    _, seen = toys.fit(toys.Classifier(), toys.loader(3, 1), APOLearningRate())
    assert seen.rates[-1][0] != 0.05, "without normalisation one example is a batch"


@pytest.mark.parametrize("fsd_batch", ["previous", "loader"])
def test_a_drawn_batch_has_at_least_two_rows(fsd_batch):
    """So that a fraction of a small batch does not stop a network with BatchNorm."""
    callback = APOLearningRate(fsd_batch=fsd_batch, fsd_fraction=0.1)
    _, seen = toys.fit(toys.Classifier(norm=True), toys.loader(), callback)
    assert seen.rates[-1][0] != 0.05


def test_a_short_last_batch_is_no_trouble():
    data = DataLoader(toys.rows(20), 6)
    for fsd_batch in ("previous", "loader"):
        _, seen = toys.fit(toys.Classifier(norm=True), data, APOLearningRate(fsd_batch=fsd_batch, fsd_fraction=0.5))
        assert len(seen.rates) == 4
