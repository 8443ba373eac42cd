"""Which divergence is found for which loss, and what is said where none can be told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import LightningModule, MisconfigurationException
from lightning_ext.callbacks import APOLearningRate
from lightning_ext.callbacks._apo_divergence import recognise
from lightning_ext.functional import bernoulli_kl, mean_squared_error, softmax_kl, squared_error
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def classes(*shape, n=4):
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(6))


def case(z, target, loss, name, divergence, x=None):
    return z, (draw(len(z), 7) if x is None else x, target), loss, name, divergence


def last(new, old):
    return softmax_kl(new, old)


def second(new, old):
    return softmax_kl(new, old, dim=1)


IMAGES = draw(6, 3, 4).sigmoid()
BITS = (draw(6, 5) > 0).float()
CASES = {
    "labels": case(draw(6, 4), classes(6), F.cross_entropy, "kl", last),
    "smoothed labels": case(
        draw(6, 4), classes(6), lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1), "kl", last
    ),
    "weighted labels": case(
        draw(6, 4), classes(6), lambda z, t: F.cross_entropy(z, t, weight=torch.arange(4.0)), "kl", last
    ),
    "log-probabilities": case(draw(6, 4).log_softmax(1), classes(6), F.nll_loss, "kl", last),
    "32-bit labels": case(draw(6, 4), classes(6).int(), lambda z, t: F.cross_entropy(z, t.long()), "kl", last),
    "language": case(
        draw(3, 5, 4), classes(3, 5), lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), "kl", last
    ),
    "flat language": case(
        draw(15, 4), classes(3, 5), lambda z, t: F.cross_entropy(z, t.flatten()), "kl", last, x=classes(3, 5)
    ),
    "segmentation": case(draw(2, 4, 5, 3), classes(2, 5, 3), F.cross_entropy, "kl", second),
    "mean squared error": case(draw(6, 5), draw(6, 5) + 1, F.mse_loss, "mse", mean_squared_error),
    "one output": case(draw(6, 1), draw(6) + 1, lambda z, t: F.mse_loss(z[:, 0], t), "mse", mean_squared_error),
    "half the sum of squares": case(
        draw(6, 5), draw(6, 5) + 1, lambda z, t: 0.5 * (z - t).square().sum(1).mean(), "squared_error", squared_error
    ),
    "counts": case(draw(6), classes(6, n=9), lambda z, t: F.mse_loss(z, t.float()), "mse", mean_squared_error),
    "bits": case(draw(6, 5), BITS, F.binary_cross_entropy_with_logits, "bernoulli_kl", bernoulli_kl),
    "squared error on bits": case(draw(6, 5), BITS, F.mse_loss, "mse", mean_squared_error),
    "autoencoder": case(
        draw(6, 3, 4), classes(6), lambda z, t: F.mse_loss(z, IMAGES), "mse", mean_squared_error, x=IMAGES
    ),
    "autoencoder of logits": case(
        draw(6, 3, 4),
        classes(6),
        lambda z, t: F.binary_cross_entropy_with_logits(z, IMAGES),
        "bernoulli_kl",
        bernoulli_kl,
        x=IMAGES,
    ),
    "regularised": case(draw(6, 4), classes(6), lambda z, t: F.cross_entropy(z, t) + 3.0, "kl", last),
    "absolute error": case(draw(6, 5), 3 * draw(6, 5), F.l1_loss, "mse", mean_squared_error),
}


@pytest.mark.parametrize("name", CASES)
def test_the_divergence_of_a_common_loss_is_found(name):
    z, batch, loss, wanted, divergence = CASES[name]
    found, factor, chosen = recognise(z, batch, loss(z, batch[1]))
    assert found == wanted
    assert 0.3 < factor < 3
    other = z + 0.3 * draw(*z.shape).flip(0)
    assert chosen(other, z).item() == pytest.approx(factor * divergence(other, z).item(), rel=1e-6)
    assert chosen(other, z) > 0


@pytest.mark.parametrize("times", [1e-3, 50.0])
def test_a_loss_on_another_scale_brings_its_scale(times):
    z, target = draw(6, 5), draw(6, 5) + 1
    found = recognise(z, (z, target), times * F.mse_loss(z, target))
    assert found.factor == pytest.approx(times, rel=1e-5)
    assert found.divergence(z + 1, z).item() == pytest.approx(times, rel=1e-5)
    assert f"{times:.3g} times divergence='mse'" in str(found)
    assert "which belongs to the loss" in str(recognise(z, (z, target), F.mse_loss(z, target)))


def test_inputs_alone_are_a_batch():
    z = draw(6, 4)
    assert recognise(z, z + 1, F.mse_loss(z, z + 1))[0] == "mse"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.005), (torch.float16, 0.005)])
def test_losses_in_half_precision_are_recognised(dtype, tolerance):
    z, target = draw(6, 5), draw(6, 5) + 1
    assert recognise(z, (z, target), (F.mse_loss(z, target) * (1 + tolerance)).to(dtype))[0] == "mse"
    half = 0.5 * (z - target).square().sum(1).mean()
    assert recognise(z, (z, target), (half * (1 + tolerance)).to(dtype))[0] == "squared_error"


AMBIGUOUS = {
    "bits or an error": (draw(6, 5), (draw(6, 7), BITS), torch.tensor(17.0), "bernoulli_kl and mse and squared_error"),
    "nothing fits": (draw(6, 4), (draw(6, 7), draw(6, 3)), torch.tensor(1.0), "no divergence fits"),
    "one class": (draw(6, 1), (draw(6, 7), classes(5)), torch.tensor(1.0), "no divergence fits"),
    "labels beyond the classes": (draw(6, 3), (draw(6, 7), classes(6) + 3), torch.tensor(1.0), "no divergence fits"),
    "labels or images": (IMAGES[:, :, 0], (IMAGES[:, :, 0], classes(6, n=3)), torch.tensor(9.0), "kl and mse"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_it_cannot_be_told_the_ways_out_are_named(name):
    z, batch, loss, said = AMBIGUOUS[name]
    with pytest.raises(MisconfigurationException, match=r"divergence='auto' cannot tell.*Pass divergence='kl'") as info:
        recognise(z, batch, loss)
    assert all(word in str(info.value) for word in said.split(" and "))
    assert str(tuple(z.shape)) in str(info.value)


class Any(LightningModule):
    """A linear map and a loss of one's own."""

    def __init__(self, outputs, loss):
        super().__init__()
        self.net, self.loss = nn.Linear(6, outputs), loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(target):
    return DataLoader(TensorDataset(draw(24, 6), target), 6)


@pytest.mark.parametrize(
    ("module", "target", "divergence"),
    [
        (lambda: Any(4, F.cross_entropy), classes(24), "kl"),
        (lambda: Any(3, F.mse_loss), draw(24, 3), "mse"),
        (lambda: Any(3, lambda z, t: 0.5 * (z - t).square().sum() / len(z)), draw(24, 3), "squared_error"),
        (lambda: Any(3, F.binary_cross_entropy_with_logits), (draw(24, 3) > 0).float(), "bernoulli_kl"),
        (lambda: Any(3, F.mse_loss), draw(24, 3), mean_squared_error),
    ],
    ids=["kl", "mse", "squared_error", "bernoulli_kl", "function"],
)
def test_auto_does_in_a_training_what_the_name_does(module, target, divergence):
    rates = []
    for asked in (divergence, "auto"):
        torch.manual_seed(0)
        _, seen = toys.fit(module(), loader(target), APOLearningRate(lam_f=5.0, divergence=asked, warmup_steps=4))
        rates.append(seen.rates)
    assert rates[0] == rates[1]
    assert len({r[0] for r in rates[0]}) == 4


def test_a_training_whose_loss_cannot_be_told_stops_at_the_first_look_ahead():
    module = Any(3, lambda z, t: 7 + F.binary_cross_entropy_with_logits(z, t))
    with pytest.raises(MisconfigurationException, match="divergence='auto' cannot tell"):
        toys.fit(module, loader((draw(24, 3) > 0).float()), APOLearningRate())
