"""APOPreconditioner against plain references: its steps, its meta-steps, its safeguards."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_ext.functional import ProximalObjective, ProximalStep, apply_preconditioner, softmax_kl, squared_error
from lightning_ext.optim import APOPreconditioner
from lightning_ext.testing import run_ddp

STRUCTURES = ("kron", "ekfac", "diag")


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Zoo(nn.Module):
    """One layer of each kind: token indices in, three logits out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        hidden = self.conv(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.norm(hidden)).mean(1) * self.scale)


def zoo_batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (16, 5), generator=draw), torch.randint(0, 3, (16,), generator=draw)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def objective_for(net, batch, before=None, *, loss_known=True):
    """The proximal objective of a classifier, anchored."""
    x, y = batch
    objective = ProximalObjective(
        lambda: F.cross_entropy(net(x), y), lambda: net(x if before is None else before), softmax_kl
    )
    objective.anchor(evaluate_loss=loss_known)
    return objective


def train(net, optimizer, batches, *, meta=True):
    """Plain torch loop; returns the losses."""
    losses, previous = [], None
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        if meta and previous is not None and optimizer.meta_step_due:
            optimizer.step(look_ahead=objective_for(net, (x, y), previous))
        else:
            optimizer.step()
        losses.append(loss.item())
        previous = x
    return losses


def classification(count=20, size=32, seed=0, dtype=None):
    draw = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 3, generator=draw)
    batches = []
    for _ in range(count):
        x = torch.randn(size, 5, generator=draw)
        batches.append((x.to(dtype or torch.get_default_dtype()), (x @ teacher).argmax(1)))
    return batches


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_first_step_is_that_of_sgd_bit_for_bit(structure, dtype):
    nets = [Zoo().to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [APOPreconditioner(nets[0], 0.3, structure=structure), torch.optim.SGD(nets[1].parameters(), 0.3)]
    tokens, labels = zoo_batch()
    for net, optimizer in zip(nets, optimizers, strict=True):
        F.cross_entropy(net(tokens), labels).backward()
        optimizer.step()
    for name, value in nets[0].state_dict().items():
        assert value.equal(nets[1].state_dict()[name]), name


def test_a_scheduler_scales_the_steps():
    net = mlp()
    optimizer = APOPreconditioner(net, lr=0.2, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: [1.0, 0.5, 0.0][epoch])
    for factor in (1.0, 0.5, 0.0):
        optimizer.zero_grad()
        before = [p.clone() for p in net.parameters()]
        F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
        optimizer.step()
        for old, p in zip(before, net.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), old.detach() - 0.2 * factor * p.grad)
        if factor:
            scheduler.step()


def test_momentum_is_a_bias_corrected_average():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = APOPreconditioner([p], lr=0.1, momentum=0.8)
    grads, expected = torch.randn(5, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(5):
        p.grad = grads[t].clone()
        optimizer.step()
        weights = 0.2 * 0.8 ** torch.arange(t, -1, -1.0, dtype=torch.float64) / (1 - 0.8 ** (t + 1))
        expected -= 0.1 * weights @ grads[: t + 1]
        torch.testing.assert_close(p.detach(), expected)


def test_weight_decay_is_decoupled():
    p, q = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(2))
    optimizers = [APOPreconditioner([p], 0.1, weight_decay=0.5), torch.optim.AdamW([q], 0.1, weight_decay=0.5)]
    for parameter, optimizer in zip((p, q), optimizers, strict=True):
        parameter.grad = torch.zeros(2, 2)
        optimizer.step()
    torch.testing.assert_close(p, q)


def reference_run(net, batches, structure, lr, meta_lr, lam_f, lam_w, decay, momentum):
    """The paper's parametrisation, S from sqrt(lr), by autograd through the whole look-ahead and torch's own Adam."""
    layers = [net[0], net[2]]
    blocks = []
    for layer in layers:
        out, inputs = layer.out_features, layer.in_features + 1
        S = torch.full(() if structure == "kron" else (out, inputs), math.sqrt(lr))
        blocks.append([f.requires_grad_() for f in (torch.eye(inputs), torch.eye(out), S)])
    meta = torch.optim.Adam([f for fs in blocks for f in fs], meta_lr)
    averages = [torch.zeros(layer.out_features, layer.in_features + 1) for layer in layers]
    previous = None
    for t, (x, y) in enumerate(batches):
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        for i in (0, 1):
            G = torch.cat([grads[2 * i], grads[2 * i + 1][:, None]], 1)
            averages[i] = momentum * averages[i] + (1 - momentum) * G
        unbiased = [m / (1 - momentum ** (t + 1)) for m in averages]

        def displacements(unbiased=unbiased):
            for layer, m, (A, B, S) in zip(layers, unbiased, blocks, strict=True):
                P = apply_preconditioner(m, A, B, S)
                yield -P[:, :-1] - lr * decay * layer.weight.detach()
                yield -P[:, -1] - lr * decay * layer.bias.detach()

        if previous is not None:
            moved = {n: p.detach() + d for (n, p), d in zip(net.named_parameters(), displacements(), strict=True)}
            q = F.cross_entropy(torch.func.functional_call(net, moved, (x,)), y)
            q = q + lam_f * softmax_kl(torch.func.functional_call(net, moved, (previous,)), net(previous))
            q = q + lam_w / 2 * sum(d.square().sum() for d in displacements())
            meta.zero_grad()
            q.backward(inputs=[f for fs in blocks for f in fs])
            meta.step()
        with torch.no_grad():
            for p, d in zip(net.parameters(), list(displacements()), strict=True):
                p += d
        previous = x


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_a_run_equals_the_paper_written_out_with_autograd(structure):
    """Order of the step, batches, momentum, bias column, weight decay, parametrisation and Adam, all at once."""
    nets, batches = [mlp(), mlp()], classification(8)
    optimizer = APOPreconditioner(
        nets[0],
        0.4,
        structure=structure,
        meta_update="adam",
        meta_lr=0.01,
        lam_f=0.5,
        lam_w=0.2,
        momentum=0.9,
        weight_decay=0.1,
        every_n_steps=1,
    )
    train(nets[0], optimizer, batches)
    reference_run(nets[1], batches, structure, 0.4, 0.01, 0.5, 0.2, 0.1, 0.9)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("_double")
def test_the_report_is_the_objective_at_the_look_ahead_with_the_old_preconditioner():
    net, (batch, other) = mlp(), classification(2)
    optimizer = APOPreconditioner(net, 0.3, lam_f=0.5, lam_w=0.2, every_n_steps=1)
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    before, old = [p.detach().clone() for p in net.parameters()], net(other[0]).detach()
    loss_before = F.cross_entropy(net(batch[0]), batch[1]).item()
    optimizer.step(look_ahead=objective_for(net, batch, other[0]))
    moved = {n: b - 0.3 * p.grad for (n, p), b in zip(net.named_parameters(), before, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(net, moved, (batch[0],)), batch[1]).item()
    fsd = softmax_kl(torch.func.functional_call(net, moved, (other[0],)), old).item()
    wsd = 0.5 * sum((0.3 * p.grad).square().sum() for p in net.parameters()).item()
    report = optimizer.last_meta_step
    assert report["rejected"] == 0
    assert report["slope"] < 0  # a step of lr 0.3 is far too short here
    expected = {"loss": loss, "fsd": fsd, "wsd": wsd, "value": loss + 0.5 * fsd + 0.2 * wsd, "loss_before": loss_before}
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, rel=1e-12), name
    for p, b in zip(net.parameters(), before, strict=True):
        assert not p.equal(b - 0.3 * p.grad), "the step was made with the old preconditioner"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_meta_step_lowers_the_objective_of_the_next_look_ahead(structure):
    net, (batch, other) = mlp(), classification(2)
    options = {"structure": structure, "momentum": 0.0, "every_n_steps": 1, "meta_lr": 0.1, "lam_f": 2.0}
    optimizer = APOPreconditioner(net, 0.01, **options)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    values = []
    for _ in range(20):  # from the same weights every time: only the preconditioner changes
        net.load_state_dict(start)
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step(look_ahead=objective_for(net, batch, other[0]))
        values.append(optimizer.last_meta_step["value"])
    assert all(b < a for a, b in itertools.pairwise(values[:8]))
    assert values[-1] < values[0] - 0.05


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_parameter_trains(structure):
    net = Zoo()
    optimizer = APOPreconditioner(net, 0.3, structure=structure, every_n_steps=2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = train(net, optimizer, [zoo_batch()] * 30)
    for name, p in net.named_parameters():
        changed = (p.detach() != before[name]).float().mean()
        assert changed == 1, f"{name}: {changed}"
    assert losses[-1] < 0.7 * losses[0]
    sides = {"AA", "BB"} if structure == "kron" else {"A", "B"}
    expected = {"embedding.weight": {"S"}, "conv.weight": {"S"} | sides, "conv.bias": set(), "norm.weight": {"S"}}
    if structure == "diag":
        expected |= {"conv.weight": {"S"}, "conv.bias": {"S"}}
    for name, keys in expected.items():
        assert {"A", "B", "AA", "BB", "S"} & set(optimizer.state[net.get_parameter(name)]) == keys, name
    if structure != "diag":
        assert optimizer.state[net.conv.weight][min(sides)].shape == (8 * 3 + 1, 8 * 3 + 1)


@pytest.mark.parametrize(("structure", "sides"), [("kron", {"AA": (9,), "BB": (6, 6)}), ("ekfac", {"B": (6, 6)})])
def test_a_wide_side_has_a_diagonal_factor_or_none(structure, sides):
    net = nn.Linear(8, 6)
    optimizer = APOPreconditioner(net, 0.2, structure=structure, max_dim=7, every_n_steps=1)
    x = torch.randn(30, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = squared_error(net(x), x[:, :6])
        loss.backward()
        objective = ProximalObjective(lambda: squared_error(net(x), x[:, :6]), lambda: net(x), squared_error)
        objective.anchor()
        optimizer.step(look_ahead=objective)
        losses.append(loss.item())
    state = optimizer.state[net.weight]
    assert {k: tuple(v.shape) for k, v in state.items() if k in ("A", "B", "AA", "BB")} == sides
    assert losses[-1] < 0.1 * losses[0]
    if structure == "kron":
        assert not state["AA"].equal(torch.ones(9))


def test_factors_that_are_set_by_hand_are_those_of_the_next_step():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(3, 40, dtype=torch.float64))
    optimizer = APOPreconditioner([w], 1.0, momentum=0.0)
    w.grad = torch.randn(3, 40, dtype=torch.float64)
    optimizer.step()
    A, B = (torch.randn(n, n, dtype=torch.float64) for n in (40, 3))
    optimizer.state[w]["AA"].copy_(A @ A.T)  # in place, as loading into an existing tensor would
    optimizer.state[w]["BB"] = B @ B.T
    optimizer.state[w]["S"].fill_(0.5)
    before = w.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        before - w, apply_preconditioner(w.grad, A, B, torch.tensor(0.5)), rtol=1e-10, atol=1e-10
    )


class Exploding:
    """A stand-in for an objective; the look-ahead gives what it is told to give."""

    def __init__(self, value, loss_before=1.0, cotangent=0.0):
        self.value, self.loss_at_anchor, self.cotangent = value, torch.tensor(loss_before), cotangent
        self.grad_scale = 1.0
        self.seen = None

    def gradient(self, params, displacement, *, lam_f, lam_w):
        self.seen = [p.detach().clone() for p in params]
        value, zero = torch.tensor(self.value), torch.tensor(0.0)
        slopes = [torch.tensor(self.cotangent, dtype=p.dtype).expand(p.shape) for p in params]  # as autograd may do
        return ProximalStep(value, zero, zero, torch.zeros(len(params)), value, slopes)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("value", "cotangent"), [(1.5, 1.0), (math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, math.inf)]
)
def test_a_worse_or_broken_look_ahead_halves_the_step(structure, value, cotangent):
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, structure=structure, every_n_steps=1)
    x, y = classification(1)[0]
    F.cross_entropy(net(x), y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    objective = Exploding(value, cotangent=cotangent)
    optimizer.step(look_ahead=objective)
    assert optimizer.last_meta_step["rejected"] == 1
    for p, seen, old in zip(net.parameters(), objective.seen, before, strict=True):
        torch.testing.assert_close(seen, old - 0.1 * p.grad)
        torch.testing.assert_close(p.detach(), old - 0.05 * p.grad)
    state = optimizer.state[net[0].weight]
    assert state["S"].mean().item() == pytest.approx(math.sqrt(0.5))
    assert structure == "diag" or state["AA" if structure == "kron" else "A"].equal(torch.eye(6))


@pytest.mark.parametrize(
    ("before", "value", "rejected"),
    [(1.0, 1.09, False), (1.0, 1.11, True), (-1.0, -0.91, False), (-1.0, -0.89, True), (None, 99.0, False)],
)
def test_a_rise_of_less_than_a_tenth_is_left_to_the_meta_step(before, value, rejected):
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
    objective = Exploding(value, loss_before=0.0 if before is None else before, cotangent=1.0)
    if before is None:
        objective.loss_at_anchor = None
    optimizer.step(look_ahead=objective)
    assert optimizer.last_meta_step["rejected"] == rejected
    assert optimizer.state[net[0].weight]["AA"].equal(torch.eye(6)) == rejected


@pytest.mark.filterwarnings("ignore:APOPreconditioner:UserWarning")
def test_a_real_explosion_is_tamed():
    torch.manual_seed(0)
    x = 10 * torch.randn(64, 5)
    net = nn.Linear(5, 1)
    y = x.sum(1, keepdim=True)
    losses = {}
    for meta in (False, True):
        nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
        optimizer = APOPreconditioner(net, 0.1, every_n_steps=1, momentum=0.0)  # five times too large
        for _ in range(40):
            optimizer.zero_grad()
            loss = squared_error(net(x), y)
            loss.backward()
            objective = ProximalObjective(lambda: squared_error(net(x), y), lambda: net(x), squared_error)
            objective.anchor()
            optimizer.step(look_ahead=objective if meta else None)
        losses[meta] = squared_error(net(x), y).item()
    assert not losses[False] < 1e6, "not too large a step"
    assert losses[True] < 1.0


def test_parameters_are_restored_if_the_objective_fails():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    x, y = classification(1)[0]
    F.cross_entropy(net(x), y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    objective = objective_for(net, (x, y))
    objective.loss_fn = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(look_ahead=objective)
    assert all(p.equal(old) for p, old in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_step_aloud(bad):
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1)
    F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
    net[2].bias.grad[1] = bad
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.warns(UserWarning, match="left out a step: a gradient is not finite"):
        optimizer.step()
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert optimizer.param_groups[0]["step"] == 0
    assert "momentum" not in optimizer.state[net[0].weight]
    net[2].bias.grad.zero_()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_meta_steps_come_due_every_n_steps_and_change_nothing_in_between():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=3)
    due, changes, previous = [], [], None
    for x, y in classification(8):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        due.append(optimizer.meta_step_due)
        optimizer.step(look_ahead=objective_for(net, (x, y)))
        assert optimizer.look_ahead is None
        current = optimizer.state[net[0].weight]["AA"].clone()
        changes.append(previous is None or not current.equal(previous))
        previous = current
    assert due == changes == [True, False, False, True, False, False, True, False]


@pytest.mark.filterwarnings("ignore:APOPreconditioner was due:UserWarning")
def test_no_meta_rate_means_no_influence():
    runs = {}
    for meta in (False, True):
        net = mlp()
        optimizer = APOPreconditioner(net, 0.3, meta_lr=0.0, every_n_steps=1)
        train(net, optimizer, classification(10), meta=meta)
        runs[meta] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert optimizer.last_meta_step is not None
    assert runs[True].equal(runs[False])


def test_who_forgets_the_objective_is_told_once():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=2)
    with pytest.warns(UserWarning, match="was due for a meta-step 3 times without an objective") as caught:
        train(net, optimizer, classification(14), meta=False)
    assert len(caught) == 1
    assert "APOPreconditioning" in str(caught[0].message)
    assert "look_ahead" in str(caught[0].message)


def test_the_closure_runs_once_with_gradients_and_may_bring_the_objective():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    batch = classification(1)[0]
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizer.look_ahead = objective_for(net, batch)
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert optimizer.look_ahead is None
    assert optimizer.last_meta_step["loss_before"] == pytest.approx(loss.item())


def one_meta_step(structure, apply, weight_decay, objective_of):
    """Two steps, the second with a look-ahead unless ``apply`` is None."""
    net, ((x, y), (x2, y2)) = mlp(), classification(2)
    optimizer = APOPreconditioner(
        net, 0.3, structure=structure, every_n_steps=1, weight_decay=weight_decay, apply=apply or "before"
    )
    train(net, optimizer, [(x, y)], meta=False)
    optimizer.zero_grad()
    F.cross_entropy(net(x2), y2).backward()
    optimizer.step(look_ahead=apply and objective_of(net, x2, y2))
    return weights(net), optimizer


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_applied_after_the_step_the_step_is_the_look_ahead_itself(structure, weight_decay):
    seen = []

    def objective_of(net, x, y):
        objective = ProximalObjective(
            lambda: seen.append(weights(net)) or F.cross_entropy(net(x), y), lambda: net(x), softmax_kl
        )
        objective.anchor()
        return objective

    runs = {apply: one_meta_step(structure, apply, weight_decay, objective_of) for apply in ("before", "after", None)}
    ends = {apply: end for apply, (end, _) in runs.items()}
    assert ends["after"].equal(ends[None]), "it is not the step that an optimizer without an objective makes"
    assert seen[-1].equal(ends["after"]), "the loss was taken elsewhere than the step ended"
    assert not ends["before"].equal(ends["after"])
    states = [runs[apply][1].state_dict()["state"] for apply in ("before", "after", None)]
    assert states[0][0]["S"].equal(states[1][0]["S"]), "the preconditioner learned is the same"
    assert not states[1][0]["S"].equal(states[2][0]["S"])


def test_applied_after_the_step_a_rejected_look_ahead_is_taken_back():
    ends = [one_meta_step("kron", apply, 0.1, lambda *_: Exploding(math.nan))[0] for apply in ("before", "after")]
    assert ends[0].equal(ends[1])


def lengths_of_steps(gradients, rates=None, *, look_ahead_at=(0,), rejected_at=(), **options):
    """How far each step moves a weight with its bias, per unit of learning rate."""
    net = nn.Linear(3, 2)
    optimizer = APOPreconditioner(net, 0.1, momentum=0.0, every_n_steps=1, lam_w=0.1, **options)
    found = []
    for i, size in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = rate = 0.1 if rates is None else rates[i]
        for p in net.parameters():
            p.grad = torch.full_like(p, size)
        objective = Exploding(math.nan if i in rejected_at else 0.5, cotangent=-1e-3)
        before = weights(net)
        optimizer.step(look_ahead=objective if i in (*look_ahead_at, *rejected_at) else None)
        found.append((torch.linalg.vector_norm(weights(net) - before) / rate).item())
    return found


@pytest.mark.filterwarnings("ignore:APOPreconditioner was due:UserWarning")
@pytest.mark.parametrize("apply", ["before", "after"])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_no_step_goes_much_further_than_the_last_that_was_judged(structure, apply):
    options = {"structure": structure, "apply": apply, "meta_lr": 1e-6}
    unit = 8**0.5
    expected = [unit, 2 * unit, 3 * unit, 3 * unit]
    assert lengths_of_steps([1.0, 2.0, 100.0, -1e4], **options) == pytest.approx(expected, rel=1e-4)
    rates = [0.1, 0.5, 0.01, 1.0]  # a schedule is nobody's outlier
    assert lengths_of_steps([1.0, 2.0, 100.0, -1e4], rates, **options) == pytest.approx(expected, rel=1e-4)
    assert lengths_of_steps([1.0, 2.0], step_limit=1.5, **options)[1] == pytest.approx(1.5 * unit, rel=1e-4)
    assert lengths_of_steps([1.0, 100.0], step_limit=None, **options)[1] == pytest.approx(100 * unit, rel=1e-4)
    assert lengths_of_steps([1.0, 100.0], **{**options, "meta_lr": 0.0})[1] == pytest.approx(100 * unit, rel=1e-4)


@pytest.mark.filterwarnings("ignore:APOPreconditioner was due:UserWarning")
def test_what_was_judged_too_far_is_no_measure():
    unit = 8**0.5
    found = lengths_of_steps([1.0, 100.0, 100.0, 100.0], rejected_at=(1,), look_ahead_at=(0, 3), meta_lr=1e-6)
    assert found == pytest.approx([unit, 1.5 * unit, 1.5 * unit, 50 * unit], rel=1e-4)  # the last was judged
    assert lengths_of_steps([1.0, 100.0], rejected_at=(0,), look_ahead_at=())[1] == pytest.approx(50 * unit, rel=1e-4)
    assert lengths_of_steps([0.0, 100.0], meta_lr=1e-6)[1] == pytest.approx(100 * unit, rel=1e-4)  # no gradient then


@pytest.mark.filterwarnings("ignore:APOPreconditioner:UserWarning")
def test_a_batch_unlike_the_others_is_not_the_end():
    x = torch.randn(200, 5)
    y = x @ torch.randn(5, 1)
    ends = {}
    for limit in (3.0, None):
        net = nn.Sequential(nn.Linear(5, 1))
        nn.init.zeros_(net[0].weight), nn.init.zeros_(net[0].bias)
        optimizer = APOPreconditioner(net, step_limit=limit)
        for i in range(100):
            optimizer.zero_grad()
            scale = 300.0 if i == 95 else 1.0
            loss = squared_error(net(scale * x), scale * y)
            loss.backward()
            objective = ProximalObjective(
                lambda net=net: squared_error(net(x), y), lambda net=net: net(x), squared_error
            )
            objective.anchor()
            optimizer.step(look_ahead=objective)
        ends[limit] = squared_error(net(x), y).item()
    assert ends[3.0] < 1e-2 < 1.0 < ends[None]


@pytest.mark.parametrize("seed", [3, 5])
def test_batches_far_smaller_than_the_network_are_not_its_end(seed):
    """2 410 weights and 32 digits, a fifth with wrong labels: with ``lam_f=2`` the loss ends above 1.6."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor((images - images.mean(0)) / (images.std(0) + 1e-6), dtype=torch.float32), torch.tensor(labels)
    draw = torch.Generator().manual_seed(5)
    y = torch.where(torch.rand(len(y), generator=draw) < 0.2, torch.randint(0, 10, y.shape, generator=draw), y)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    draws = (torch.randint(0, len(x), (32,), generator=draw.manual_seed(seed)) for seed in range(1000))
    train(net, APOPreconditioner(net), ((x[chosen], y[chosen]) for chosen in draws))
    assert F.cross_entropy(net(x), y).item() < 1.2


@pytest.mark.parametrize("max_dim", [4096, 5, 3])
@pytest.mark.parametrize("meta_update", ["multiplicative", "adam"])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_columns_of_zeros_that_round_up_a_matrix_change_nothing(structure, meta_update, max_dim, monkeypatch):
    ends = []
    for columns in (1, 4):  # the layers have 6 and 5 columns
        monkeypatch.setattr("lightning_ext.optim._apo_blocks._COLUMNS", columns)
        net = mlp().double()
        options = {"structure": structure, "meta_update": meta_update, "max_dim": max_dim}
        optimizer = APOPreconditioner(net, 0.3, every_n_steps=2, **options)
        train(net, optimizer, classification(30, dtype=torch.float64))
        state = optimizer.state[net[0].weight]
        ends.append([weights(net), *(state[name] for name in ("A", "AA", "B", "BB", "S") if name in state)])
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in ends[-1])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def test_the_additive_update_of_a_kronecker_structure_has_the_factors_themselves():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, meta_update="adam", every_n_steps=1)
    train(net, optimizer, classification(3))
    state = optimizer.state[net[0].weight]
    assert "AA" not in state
    assert not state["A"].equal(torch.eye(6))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_as_well_as_single(structure, dtype):
    losses = {}
    for kind in (torch.float32, dtype):
        net = mlp().to(kind)
        optimizer = APOPreconditioner(net, 0.5, structure=structure, every_n_steps=2, meta_lr=0.1)
        losses[kind] = sum(train(net, optimizer, classification(200, dtype=kind))[-50:]) / 50
        assert all(p.dtype == kind and p.isfinite().all() for p in net.parameters())
    assert optimizer.last_meta_step is not None
    assert optimizer.state[net[0].weight]["S"].dtype == torch.float32, "small steps of the factors would be lost"
    assert losses[dtype] < 1.3 * losses[torch.float32]
    assert losses[torch.float32] < 0.3


def test_tiny_gradients_in_float16_still_teach():
    net = mlp().half()
    optimizer = APOPreconditioner(net, 1.0, every_n_steps=1, momentum=0.0)
    x, y = classification(1, dtype=torch.float16)[0]
    (1e-4 * F.cross_entropy(net(x), y)).backward()
    objective = ProximalObjective(lambda: 1e-4 * F.cross_entropy(net(x), y), lambda: net(x), softmax_kl)
    objective.anchor()
    optimizer.step(look_ahead=objective)
    for layer in (net[0], net[2]):
        for name in ("AA", "BB"):
            factor = optimizer.state[layer.weight][name]
            assert factor.isfinite().all()
            assert not factor.equal(torch.eye(len(factor))), "the products underflowed"


@pytest.mark.ddp
def test_two_ranks_keep_one_preconditioner_and_reject_together():
    def work(rank):
        net = mlp()
        optimizer = APOPreconditioner(net, 0.3, every_n_steps=1, structure="ekfac")
        rejected = []
        for t, batch in enumerate(classification(12, seed=10 + rank)):
            optimizer.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            for p in net.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= 2
            objective = objective_for(net, batch)
            if t == 5 and rank == 1:
                objective.loss_fn = lambda: torch.tensor(math.nan) * net[0].weight.sum()
            optimizer.step(look_ahead=objective)
            rejected.append(optimizer.last_meta_step["rejected"])
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return list(net.state_dict().values()), state, rejected, optimizer.last_meta_step

    first, second = run_ddp(work)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert a.equal(b)
    assert first[2] == second[2]
    assert first[2][5] == 1
    assert sum(first[2]) < 6
    assert first[3] == second[3]
    alone = mlp()
    optimizer = APOPreconditioner(alone, 0.3, every_n_steps=1, structure="ekfac")
    train(alone, optimizer, classification(12, seed=10))
    assert not optimizer.state[alone[0].weight]["A"].equal(first[1][0]), "ranks did not hear of each other"


@pytest.mark.ddp
def test_the_average_over_ranks_is_the_average():
    def work(rank):
        net = mlp().bfloat16()
        net[2].float()
        optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        objective = Exploding(0.25 + rank, loss_before=2.0, cotangent=float(rank))
        optimizer.step(look_ahead=objective)
        return optimizer.last_meta_step

    first, second = run_ddp(work)
    assert first == second
    assert first["value"] == 0.75
    assert first["slope"] == pytest.approx(-0.1 * 0.5 * sum(p.numel() for p in mlp().parameters()), rel=1e-2)


@pytest.mark.parametrize("kappa", [1e5, 1e10])
def test_ill_conditioned_regression(kappa):
    """Where the best Adam is above 1e-6 after 1000 steps: multiplicative meta-steps let the condition of P grow."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    U, V = torch.linalg.qr(torch.randn(10, 6, **double))[0], torch.linalg.qr(torch.randn(6, 6, **double))[0]
    target = 10 * U @ torch.diag(torch.logspace(0, -math.log10(kappa), 6, **double)) @ V.T
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 10, bias=False)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(1000, 6, **double)
    y = x @ target.T
    optimizer = APOPreconditioner(net, 0.01, lam_f=1.0, lam_w=0.0, meta_lr=0.03, momentum=0.0, every_n_steps=1)
    for _ in range(1000):
        some = x[torch.randint(0, 1000, (200,))]
        optimizer.zero_grad()
        loss = squared_error(net(x), y)
        loss.backward()
        objective = ProximalObjective(
            lambda: squared_error(net(x), y), lambda some=some: net(some), squared_error, loss_at_anchor=loss.detach()
        )
        objective.anchor()
        optimizer.step(look_ahead=objective)
    assert squared_error(net(x), y) < 1e-8
