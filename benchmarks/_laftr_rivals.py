"""DER, DER++ and FROMP, written from their papers: what a continual learner would use in place of LAFTR.

- DER and DER++: Buzzega, Boschini, Porrello, Abati & Calderara 2020 (arXiv:2004.07211), algorithms 1 and 2; the buffer
  is filled by reservoir sampling (Vitter 1985, algorithm R).
- FROMP: Pan, Swaroop, Immer, Eschenhagen, Turner & Khan 2020 (arXiv:2004.14070).
"""

import torch
from _laftr_problem import Learner, Pair
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, mse_loss


class Reservoir:
    """A sample of all rows seen so far, each of them in it with the same probability.

    Args:
        size: rows that it holds.
        seed: of which rows are kept, and which are drawn.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seen = size, 0
        self.columns: tuple[Tensor, ...] = ()
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def add(self, *rows: Tensor) -> None:
        """The k-th row replaces a row at random with probability size / k."""
        if not self.columns:
            self.columns = tuple(part.new_empty((self.size, *part.shape[1:])) for part in rows)
        count = torch.arange(self.seen, self.seen + len(rows[0]))
        places = (torch.rand(len(count), generator=self.generator, dtype=torch.float64) * (count + 1)).long()
        places = torch.where(count < self.size, count, places)
        for row in (places < self.size).nonzero().flatten().tolist():  # one by one: two may meet in a place
            for column, part in zip(self.columns, rows, strict=True):
                column[places[row]] = part[row]
        self.seen += len(count)

    def draw(self, number: int) -> tuple[Tensor, ...]:
        """Different rows, at most as many as there are."""
        index = torch.randperm(len(self), generator=self.generator)[:number]
        return tuple(column[index] for column in self.columns)

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns)


class DER(Learner):
    r"""Dark experience replay: stored logits are to stay what they were.

    .. math:: \ell(f(x), y) + \alpha \, \lVert f(x') - z' \rVert^2 / C \; [+ \beta \, \ell(f(x''), y'')]

    averaged over batches; x', z' (and x'', y'', a second draw, for DER++) come from the buffer.

    Args:
        alpha: weight of the logits.
        beta: weight of the labels, above 0 for DER++.
        size: samples in the buffer.
        seed: of the buffer.
    """

    def __init__(self, alpha: float, beta: float = 0.0, size: int = 200, seed: int = 0) -> None:
        self.alpha, self.beta = alpha, beta
        self.buffer = Reservoir(size, seed)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        loss = cross_entropy(outputs, y)
        if len(self.buffer):
            images, logits = self.buffer.draw(len(x))[:2]
            loss = loss + self.alpha * mse_loss(model(images), logits)
            if self.beta > 0:
                images, _, labels = self.buffer.draw(len(x))
                loss = loss + self.beta * cross_entropy(model(images), labels)
        labels = (y,) if self.beta > 0 else ()
        self.buffer.add(x, outputs.detach(), *labels)
        return loss

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes


class FROMP(Learner):
    r"""Functional regularisation of the memorable past: a Gaussian process over stored points, one for each output.

    .. math:: \tfrac1\tau \ell(f(x), y) + \tfrac12 \sum_{s < t} \sum_c r_{sc}^\top K_{sc}^{-1} r_{sc}, \qquad
        r_{sc} = p_c(X_s; \theta) - p_c(X_s; \theta_{t-1}), \quad K_{sc} = J_c \Sigma J_c^\top + \epsilon I

    with the probabilities' Jacobians J at :math:`\theta_{t-1}`, and :math:`\Sigma = (F + \delta)^{-1}` with the
    diagonal F of the Gauss-Newton matrix, summed over all data so far. The points of a task are those of each class
    with the largest trace of the softmax Hessian, :math:`\sum_c p_c (1 - p_c)`.

    Args:
        tau: temperature; the larger, the more the past counts.
        points: stored for each task, shared out among classes.
        delta: precision of the prior.
        jitter: :math:`\epsilon`.
    """

    keeps_optimizer = False
    max_norm = 1.0

    def __init__(self, tau: float, points: int = 40, delta: float = 1e-3, jitter: float = 1e-5) -> None:
        self.tau, self.points, self.delta, self.jitter = tau, points, delta, jitter
        self.curvature: dict[str, Tensor] = {}
        self.images: list[Tensor] = []
        self.before = self.inverses = torch.empty(0)  # (S, n, C), (S, C, n, n), of all past tasks

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(model, x, y) / self.tau
        return loss + self.penalty(model) if self.images else loss

    def penalty(self, model: nn.Module) -> Tensor:
        now = model(torch.cat(self.images)).softmax(1).view_as(self.before)
        rest = (now - self.before).movedim(2, 1)[..., None]
        return 0.5 * (rest * (self.inverses @ rest)).sum()

    def end_task(self, model: nn.Module, data: Pair) -> None:
        for name, value in gauss_newton_diagonal(model, data[0]).items():
            self.curvature[name] = self.curvature.get(name, 0) + value
        self.images.append(memorable(model, data, self.points))
        with torch.no_grad():
            found = [model(images).softmax(1) for images in self.images]
        self.before = torch.stack(found)
        self.inverses = torch.stack([self._inverses(model, images) for images in self.images])

    def _inverses(self, model: nn.Module, images: Tensor) -> Tensor:
        """Of the kernels, by Cholesky factors in float64."""
        rows = jacobians(model, images, torch.nn.functional.softmax)
        spread = torch.cat([(1 / (self.curvature[name] + self.delta)).flatten() for name in rows]).double()
        flat = torch.cat([part.flatten(2) for part in rows.values()], 2).double().movedim(1, 0)  # (C, n, P)
        kernels = (flat * spread) @ flat.mT + self.jitter * torch.eye(len(images), dtype=torch.float64)
        return torch.cholesky_inverse(torch.linalg.cholesky(kernels)).to(images.dtype)

    @property
    def nbytes(self) -> int:
        """Points and curvature; the rest follows from them and the weights before a task."""
        return sum(part.nbytes for part in (*self.images, *self.curvature.values()))


def jacobians(model: nn.Module, images: Tensor, of=lambda outputs, dim: outputs) -> dict[str, Tensor]:
    """Of a function of the outputs, by name, ``(n, C, *parameter)``."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def outputs(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return of(functional_call(model, values, (image[None],))[0], dim=0)

    return vmap(jacrev(outputs), in_dims=(None, 0))(parameters, images)


def gauss_newton_diagonal(model: nn.Module, images: Tensor, chunk: int = 100) -> dict[str, Tensor]:
    """The diagonal of J^T H J for the softmax cross-entropy, summed over samples."""
    total: dict[str, Tensor] = {}
    for part in images.split(chunk):
        with torch.no_grad():
            p = model(part).softmax(1)
        for name, rows in jacobians(model, part).items():
            share = p.view(*p.shape, *[1] * (rows.ndim - 2))
            mean = (share * rows).sum(1)
            total[name] = total.get(name, 0) + (share * rows.square()).sum((0, 1)) - mean.square().sum(0)
    return total


@torch.no_grad()
def memorable(model: nn.Module, data: Pair, number: int) -> Tensor:
    """As many of each class that occurs; of those the network is least sure of."""
    images, labels = data
    p = model(images).softmax(1)
    unsure = (p * (1 - p)).sum(1)
    classes = labels.unique()
    chosen = []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        chosen.append(members[unsure[members].topk(min(number // len(classes), len(members))).indices])
    return images[torch.cat(chosen)]
