"""Small networks, one for each way in which a layer can meet its samples; all end in (B, 3) outputs."""

import torch
import torch.nn.functional as F
from torch import nn

B = 5


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mean_tokens():
    return Lambda(lambda x: x.mean(1))


def mean_positions():
    return Lambda(lambda x: x.flatten(2).mean(2))


class Twice(nn.Module):
    """One layer called twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Flattened(nn.Module):
    """Tokens of all samples in one dimension, each sample's together."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, (len(x), -1)).mean(1))


class TimeFirst(nn.Module):
    """Tokens before samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.inner(x.transpose(0, 1))))).mean(0)


class Interleaved(Flattened):
    """Tokens of all samples in one dimension, the samples of each token together: hooks cannot know."""

    def forward(self, x):
        hidden = torch.tanh(self.inner(x.transpose(0, 1).flatten(0, 1)))
        return self.head(hidden.unflatten(0, (-1, len(x))).mean(0))


class OutsideItsLayer(nn.Module):
    """A weight that is used by its layer and once more by hand."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(self.inner(x), self.inner.weight)))


class OwnParameter(nn.Module):
    """A parameter that belongs to no layer, and one that no output depends on."""

    def __init__(self):
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.scale * x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    """An LSTM: vmap cannot trace it."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def _image(*layers, channels=4, side=5, dims=2):
    return nn.Sequential(*layers, nn.Tanh(), mean_positions(), nn.LazyLinear(3)), torch.randn(
        B, channels, *[side] * dims
    )


def _vector(*layers, width=6):
    return nn.Sequential(nn.Linear(4, width), *layers, nn.Linear(width, 3)), torch.randn(B, 4)


CASES = {
    "mlp": lambda: _vector(nn.ReLU(inplace=True), nn.Linear(6, 6, bias=False), nn.Tanh()),
    "linear": lambda: (nn.Linear(4, 3), torch.randn(B, 4)),
    "tokens": lambda: (
        nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3), mean_tokens()),
        torch.randn(B, 2, 4),
    ),
    "many-tokens": lambda: (
        nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True), nn.Linear(2, 3), mean_tokens()),
        torch.randn(B, 7, 4),
    ),
    "image-tokens": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Lambda(lambda x: x.mean((1, 2)))),
        torch.randn(B, 3, 2, 4),
    ),
    "conv2d": lambda: _image(nn.Conv2d(4, 6, 3)),
    "conv2d-all": lambda: _image(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2)),
    "conv2d-same": lambda: _image(nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2), bias=False)),
    "conv2d-reflect": lambda: _image(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", stride=2)),
    "conv2d-valid": lambda: _image(nn.Conv2d(4, 4, 3, padding="valid")),
    "depthwise": lambda: _image(nn.Conv2d(4, 8, 3, groups=4)),
    "conv1d": lambda: _image(nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), dims=1),
    "conv3d": lambda: _image(nn.Conv3d(2, 2, (1, 2, 3), padding=(0, 1, 1)), channels=2, side=3, dims=3),
    "batchnorm": lambda: _image(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "batchnorm1d": lambda: _vector(nn.BatchNorm1d(6), nn.Tanh()),
    "groupnorm": lambda: _image(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6)),
    "instancenorm": lambda: _image(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(inplace=True)),
    "layernorm": lambda: _vector(nn.LayerNorm(6), nn.Tanh()),
    "layernorm-wide": lambda: (
        nn.Sequential(nn.LayerNorm((3, 4)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(B, 3, 4),
    ),
    "rmsnorm": lambda: _vector(nn.RMSNorm(6), nn.Tanh()),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3), mean_tokens()),
        torch.randint(0, 7, (B, 6)),
    ),
    "embedding-one": lambda: (
        nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 3)),
        torch.randint(0, 4, (B,)),
    ),
    "twice": lambda: (Twice(), torch.randn(B, 4)),
    "flattened": lambda: (Flattened(), torch.randn(B, 3, 4)),
    "time-first": lambda: (TimeFirst(), torch.randn(B, 3, 4)),
    "tied": lambda: (Tied(), torch.randn(B, 4)),
    "own-parameter": lambda: (OwnParameter(), torch.randn(B, 4)),
    "attention": lambda: (Attention(), torch.randn(B, 3, 4)),
    "recurrent": lambda: (Recurrent(), torch.randn(B, 3, 4)),
    "frequency-scaled": lambda: (
        nn.Sequential(nn.Embedding(4, 3, scale_grad_by_freq=True), mean_tokens(), nn.Linear(3, 3)),
        torch.randint(0, 4, (B, 3)),
    ),
    "weight-norm": lambda: _vector(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh()),
    "interleaved": lambda: (Interleaved(), torch.randn(B, 3, 4)),
    "outside": lambda: (OutsideItsLayer(), torch.randn(B, 4)),
}


def build(name, seed=0):
    """Return a float64 module in eval mode, of random norm statistics and scales, and (inputs, labels)."""
    torch.manual_seed(seed)
    module, x = CASES[name]()
    module(x)  # lazy layers
    module = module.double().eval()
    x = x.double() if x.is_floating_point() else x
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
        if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
    with torch.no_grad():
        if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Embedding):
            module[0].weight.normal_()  # the padding row too: its gradient is zero, its value is not
    return module, (x, torch.arange(B) % 3)
