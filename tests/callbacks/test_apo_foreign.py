"""On modules that nobody here wrote, or wrote as others write them: a Transformer, a CNN, a GAN, dict batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ext._lightning import LightningModule, MisconfigurationException, submodule
from lightning_ext.callbacks import APOLearningRate
from lightning_ext.testing import assert_observer
from tests.callbacks import apo_toys as toys

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*nested tensors", "ignore:.*validation_step"
)
boring = submodule("demos.boring_classes")


# -- the demo Transformer ---------------------------------------------------------------------------------------------


class Sentences(Dataset):
    """A language of twelve words in which each word but the noise determines the next one."""

    def __init__(self, n=96, length=9):
        generator = torch.Generator().manual_seed(1)
        first = torch.randint(0, 12, (n, 1), generator=generator)
        step = torch.randint(1, 3, (n, length), generator=generator)
        self.words = torch.cat([first, first + step.cumsum(1)], 1) % 12

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        return self.words[index, :-1], self.words[index, 1:]


class Transformer(submodule("demos.transformer").LightningTransformer):
    """The demo with fewer units, no download, and a learning rate a thousand times too low; all else is its own."""

    def __init__(self, rate=1e-4):
        super().__init__(vocab_size=12)
        kind = submodule("demos.transformer").Transformer
        self.model, self.rate = kind(vocab_size=12, ninp=16, nhead=2, nhid=16, nlayers=1, dropout=0.1), rate

    def prepare_data(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.rate)


def read(module, batch):
    return module(batch[0], batch[1])


def words():
    return DataLoader(Sentences(), 12)


def test_the_demo_transformer_says_what_it_needs_and_learns():
    said = r"module\(batch\[0\]\) by default, and that failed.*'target'.*Pass output_fn"
    with pytest.raises(MisconfigurationException, match=said):
        toys.fit(Transformer(), words(), APOLearningRate())
    losses = []
    for callbacks in ([], [APOLearningRate(output_fn=read)]):
        torch.manual_seed(0)
        _, seen = toys.fit(Transformer(), words(), *callbacks, max_epochs=8)
        losses.append(sum(seen.losses[-8:]) / 8)
    assert seen.rates[-1][0] > 0.01
    assert losses[1] < losses[0] - 0.2
    assert seen.logged[-1]["apo/rejected"] == 0


def test_the_demo_transformer_is_left_alone_by_looking():
    assert_observer(lambda: APOLearningRate(meta_lr=0.0, output_fn=read), Transformer, words)


# -- the classic convolutional network --------------------------------------------------------------------------------


class CNN(LightningModule):
    """Two convolutions, pooling, dropout, two linear layers, log-softmax, as in everybody's first example."""

    def __init__(self, rate=1e-3):
        super().__init__()
        self.rate = rate
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.25)
        self.fc1, self.fc2 = nn.Linear(8 * 12 * 12, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv2(F.relu(self.conv1(x))))), 2)
        x = F.relu(self.fc1(self.dropout(x).flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.nll_loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.nll_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), lr=self.rate)


def images(n=160):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 10
    shapes = torch.rand(10, 1, 28, 28, generator=generator)
    return DataLoader(TensorDataset(shapes[labels] + 0.5 * torch.randn(n, 1, 28, 28, generator=generator), labels), 20)


@pytest.mark.parametrize("options", [{}, {"granularity": "layer", "fsd_batch": "loader"}], ids=["default", "layers"])
def test_the_classic_cnn_learns_from_a_start_far_too_low(options):
    losses = []
    for callbacks in ([], [APOLearningRate(**options)]):
        torch.manual_seed(0)
        _, seen = toys.fit(CNN(), images(), *callbacks, max_epochs=6)
        losses.append(sum(seen.losses[-8:]) / 8)
    assert losses[1] < 0.8 * losses[0]
    rates = {k: v for k, v in seen.logged[-1].items() if k.startswith("apo/lr")}
    assert len(rates) == (5 if options else 1)
    assert max(rates.values()) > 5e-3


def test_the_classic_cnn_is_left_alone_by_looking():
    assert_observer(lambda: APOLearningRate(meta_lr=0.0), CNN, lambda: (images(60), images(20)))


# -- a GAN with two optimizers under manual optimisation --------------------------------------------------------------


class GAN(LightningModule):
    """As in Lightning's own example: the two optimizers are toggled, and the noise is drawn first of all."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(16, 1))
        self.noise = []

    def draw(self, batch):
        z = torch.randn(len(batch[0]), 3)
        self.noise.append(z)
        return z

    def generator_loss(self, z):
        fake = self.discriminator(self.generator(z))
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))

    def discriminator_loss(self, z, x):
        real, fake = self.discriminator(x), self.discriminator(self.generator(z).detach())
        loss = F.binary_cross_entropy_with_logits
        return (loss(real, torch.ones_like(real)) + loss(fake, torch.zeros_like(fake))) / 2

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        z = self.draw(batch)
        losses = (lambda: self.generator_loss(z), lambda: self.discriminator_loss(z, batch[0]))
        for name, optimizer, loss_fn in zip("gd", optimizers, losses, strict=True):
            self.toggle_optimizer(optimizer)
            loss = loss_fn()
            self.log(f"{name}_loss", loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        return [generator, torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))]


def points():
    angle = 2 * torch.pi * torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(torch.cat([angle.cos(), angle.sin()], 1)), 8)


def gan_callbacks(**kwargs):
    return [
        APOLearningRate(
            optimizers=[0],
            loss_fn=lambda gan, batch: gan.generator_loss(gan.draw(batch)),
            output_fn=lambda gan, batch: gan.generator(torch.randn(len(batch[0]), 3)),
            divergence="squared_error",
            **kwargs,
        ),
        APOLearningRate(
            optimizers=[1],
            loss_fn=lambda gan, batch: gan.discriminator_loss(gan.draw(batch), batch[0]),
            output_fn=lambda gan, batch: gan.discriminator(batch[0]),
            divergence="bernoulli_kl",
            **kwargs,
        ),
    ]


def test_a_gan_with_one_callback_for_each_of_its_optimizers():
    callbacks, gan = gan_callbacks(every_n_steps=2, warmup_steps=4), GAN()
    trainer, seen = toys.fit(gan, points(), *callbacks, max_epochs=4)
    first, second = zip(*seen.rates, strict=True)
    assert len(set(first)) > 8
    assert len(set(second)) > 8
    assert {"apo/lr/0/0", "apo/Q", "apo/lr/1/0", "apo/Q/1"} <= set(seen.logged[-1])
    assert all(p.isfinite().all() and p.requires_grad for p in gan.parameters())
    keys = {callback.state_key for callback in callbacks}
    assert len(keys) == 2
    trainer.save_checkpoint("gan.ckpt")
    assert keys <= set(torch.load("gan.ckpt", weights_only=True)["callbacks"])


def test_the_look_ahead_of_a_gan_sees_the_noise_of_its_training_step():
    gan = GAN()
    toys.fit(gan, points(), *gan_callbacks(every_n_steps=1, warmup_steps=0))
    assert len(gan.noise) == 1 + 7 * 3, "the first batch has no other; then each look-ahead draws once"
    for batch in range(1, 8):
        training, *ahead = gan.noise[3 * batch - 2 : 3 * batch + 1]
        assert all(torch.equal(training, z) for z in ahead)
    assert not torch.equal(gan.noise[1], gan.noise[4])


def test_a_gan_is_left_alone_by_looking_and_says_what_it_needs():
    class Silent(GAN):
        def draw(self, batch):
            return torch.randn(len(batch[0]), 3)

    for index in (0, 1):
        assert_observer(lambda index=index: gan_callbacks(meta_lr=0.0)[index], Silent, points)
    with pytest.raises(MisconfigurationException, match=r"manual optimisation.*Pass loss_fn"):
        toys.fit(GAN(), points(), APOLearningRate(optimizers=[0]))


# -- batches of another kind ------------------------------------------------------------------------------------------


class InDicts(toys.Classifier):
    def forward(self, batch):
        return self.net(batch["features"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch["label"])


class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        features, label = toys.rows()[index]
        return {"features": features, "label": label}


def test_dict_batches_need_an_output_function_and_the_error_says_so():
    said = (
        r"module\(batch\[0\]\) by default, and this batch is a dict with keys \['features', 'label'\].*output_fn=\.\.\."
    )
    with pytest.raises(MisconfigurationException, match=said):
        toys.fit(InDicts(), DataLoader(Rows(), 6), APOLearningRate(divergence="kl"))
    rates = []
    for module, data, options in (
        (InDicts, DataLoader(Rows(), 6), {"output_fn": lambda module, batch: module(batch)}),
        (toys.Classifier, toys.loader(), {}),
    ):
        torch.manual_seed(0)
        _, seen = toys.fit(module(), data, APOLearningRate(**options))
        rates.append(seen.rates)
    assert rates[0] == rates[1], "the same rows, the same learning rates"


# -- Lightning's own test modules -------------------------------------------------------------------------------------


def test_boring_models():
    data = DataLoader(boring.RandomDataset(32, 64), 8)
    with pytest.raises(MisconfigurationException, match="StepLR"):
        toys.fit(boring.BoringModel(), data, APOLearningRate())
    options = {"on_scheduler": "multiply", "divergence": "mse"}
    callback = APOLearningRate(**options)
    toys.fit(boring.BoringModel(), data, callback)
    assert callback.state_dict()["optimizers"]["0"]["multiplier"].item() != 1.0
    callback = APOLearningRate(loss_fn=lambda module, batch: module.loss(module(batch)), **options)
    toys.fit(boring.ManualOptimBoringModel(), data, callback)
    assert callback.state_dict()["optimizers"]["0"]["multiplier"].item() != 1.0
    assert_observer(lambda: APOLearningRate(meta_lr=0.0, **options), boring.BoringModel, lambda: data)


def test_the_demo_model_of_several_inputs():
    class Pairs(boring.DemoModel):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-4)

    labels = torch.arange(48) % 10
    data = DataLoader(TensorDataset(F.one_hot(labels, 32).float(), labels), 8)
    _, seen = toys.fit(Pairs(), data, APOLearningRate(), max_epochs=4)
    assert seen.rates[-1][0] > 1e-3
    assert seen.losses[-1] < seen.losses[0]
