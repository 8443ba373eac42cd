"""APOPreconditioner as a torch optimizer: groups, state, scalers, modules, and what it refuses."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext.functional import ProximalObjective, ProximalStep, kronecker_meta_step, softmax_kl, squared_error
from lightning_ext.optim import APOPreconditioner
from tests.optim.test_apo import STRUCTURES, Zoo, classification, mlp, objective_for, train, zoo_batch

BATCHES = 24


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def through_a_file(state):
    """What a checkpoint does to a state, with the safe loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("meta_update", ["multiplicative", "adam"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("dtype", "precond_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")],
)
def test_resumed_equals_uninterrupted_bit_for_bit(structure, meta_update, dtype, precond_dtype):
    options = {"structure": structure, "meta_update": meta_update, "precond_dtype": precond_dtype, "every_n_steps": 3}
    batches = classification(BATCHES, dtype=dtype)
    whole, half = mlp().to(dtype), mlp().to(dtype)
    optimizer = APOPreconditioner(whole, 0.3, meta_lr=0.05, **options)
    train(whole, optimizer, batches[:10])
    train(whole, optimizer, batches[10:])

    before = APOPreconditioner(half, 0.3, meta_lr=0.05, **options)
    train(half, before, batches[:10])
    saved = through_a_file({"net": half.state_dict(), "optimizer": before.state_dict()})
    other = mlp().to(dtype)
    other.load_state_dict(saved["net"])
    after = APOPreconditioner(other, 0.9, structure=structure, every_n_steps=3)  # what was saved wins
    after.load_state_dict(saved["optimizer"])
    for state, kept in zip(after.state.values(), before.state.values(), strict=True):
        for name, value in kept.items():
            assert not isinstance(value, torch.Tensor) or state[name].dtype == value.dtype, name
    train(other, after, batches[10:])
    assert weights(other).equal(weights(whole))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_like_the_original(copied):
    net, batches = Zoo(), [zoo_batch(i) for i in range(8)]
    optimizer = APOPreconditioner(net, 0.3, every_n_steps=2)
    train(net, optimizer, batches[:4])
    other, twin = copied((net, optimizer))
    train(net, optimizer, batches[4:])
    assert not weights(net).equal(weights(other)), "the copy shares weights"
    train(other, twin, batches[4:])
    assert weights(net).equal(weights(other))
    assert twin.state[other.head.weight]["AA"].shape == (7, 7), "the bias was lost from the matrix"
    assert twin.last_meta_step == optimizer.last_meta_step


def test_the_state_follows_its_parameter_to_another_device():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    train(net, optimizer, classification(3))
    moved = mlp().to("meta")
    other = APOPreconditioner(moved, 0.1)
    other.load_state_dict(optimizer.state_dict())
    tensors = [v for state in other.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 14
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_groups_have_their_own_options():
    net = mlp()
    groups = [
        {"params": net[0], "structure": "ekfac", "lr": 0.5, "weight_decay": 0.1},
        {"params": net[2].parameters(), "meta_lr": 0.0, "momentum": 0.0},
    ]
    optimizer = APOPreconditioner(groups, 0.1, every_n_steps=1)
    train(net, optimizer, classification(4))
    first, second = optimizer.state[net[0].weight], optimizer.state[net[2].weight]
    assert first["S"].shape == (4, 6), "the bias of a module's group is a column"
    assert second["S"].shape == ()
    assert second["AA"].equal(torch.eye(4)), "parameters keep their biases apart"
    assert not first["A"].equal(torch.eye(6))
    assert "momentum" in first
    assert "momentum" not in second


def test_a_group_added_later_trains_and_keeps_the_count():
    net = mlp()
    optimizer = APOPreconditioner(net[0], 0.1, every_n_steps=3)
    train(net, optimizer, classification(4))
    optimizer.add_param_group({"params": net[2], "lr": 0.2, "structure": "diag"})
    assert [group["step"] for group in optimizer.param_groups] == [4, 4]
    before = net[2].weight.detach().clone()
    train(net, optimizer, classification(4))
    assert not net[2].weight.equal(before)
    assert set(optimizer.state[net[2].weight]) >= {"S", "norms", "momentum"}
    assert optimizer.param_groups[1]["reference_lr"] == 0.2


def test_a_refused_group_leaves_no_trace():
    net = mlp()
    optimizer = APOPreconditioner(net[0], 0.1)
    with pytest.raises(ValueError, match="lr must be above 0; got -1"):
        optimizer.add_param_group({"params": net[2], "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_clipping_comes_before_the_step():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1)
    F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1])).backward()
    before = weights(net)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    assert (weights(net) - before).norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_zero_grad_and_parameters_without_gradients():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1)
    optimizer.step()  # nothing has a gradient yet
    net[2](torch.ones(1, 4)).sum().backward()
    frozen = net[0].weight.detach().clone()
    optimizer.step()
    assert net[0].weight.equal(frozen)
    assert len(optimizer.state[net[0].weight]) == 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_half_of_a_pair_can_step_alone(name):
    layer = nn.Linear(3, 2)
    optimizer = APOPreconditioner(layer, 0.1)
    alone, still = getattr(layer, name), getattr(layer, "bias" if name == "weight" else "weight")
    alone.grad = torch.ones_like(alone)
    before = alone.detach().clone(), still.detach().clone()
    optimizer.state[layer.weight]["step"] = 0
    optimizer.step()
    torch.testing.assert_close(alone.detach(), before[0] - 0.1)
    assert still.equal(before[1])
    assert optimizer.state[layer.weight]["AA"].shape == (4, 4)


def test_frozen_parameters_stay_out():
    net = mlp()
    net[0].weight.requires_grad_(False)
    optimizer = APOPreconditioner(net, 0.1)
    train(net, optimizer, classification(2))
    assert all(p is not net[0].weight for p in optimizer.param_groups[0]["params"])
    assert set(optimizer.state[net[0].bias]) >= {"S"}, "without its weight a bias has a diagonal"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.out = nn.Linear(8, 7)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.second(self.first(self.embedding(tokens)).tanh()))[:, 0]


def test_tied_parameters_step_once():
    nets = [Tied(), Tied()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [APOPreconditioner(nets[0], 0.3, every_n_steps=1), torch.optim.SGD(nets[1].parameters(), 0.3)]
    tokens, labels = zoo_batch()
    for net, optimizer in zip(nets, optimizers, strict=True):
        F.cross_entropy(net(tokens), labels).backward()
        optimizer.step()
    assert weights(nets[0]).equal(weights(nets[1]))
    train(nets[0], optimizers[0], [zoo_batch(i) for i in range(4)])
    state = optimizers[0].state
    assert state[nets[0].first.weight]["AA"].shape == (9, 9)
    assert state[nets[0].second.bias]["S"].shape == (8,)
    assert state[nets[0].embedding.weight]["S"].shape == (7, 8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_transposed_convolutions_and_empty_parameters(structure):
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 3))
    net.register_parameter("empty", nn.Parameter(torch.zeros(0, 5)))
    optimizer = APOPreconditioner(net, 0.05, structure=structure, every_n_steps=2)
    x, y = torch.randn(12, 2, 4, 4), torch.arange(12) % 3
    net.empty.grad = torch.zeros(0, 5)
    before = weights(net)
    losses = train(net, optimizer, [(x, y)] * 20)
    assert losses[-1] < 0.5 * losses[0]
    assert (weights(net) != before).all()


def test_grad_scaler_skips_and_scales():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = weights(net)
    loss = F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1]))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    grads = torch.autograd.grad(F.cross_entropy(net(torch.ones(2, 5)), torch.tensor([0, 1])), list(net.parameters()))
    assert scaler.get_scale() == 16.0
    moved = weights(net)
    assert not moved.equal(before)
    for p in net.parameters():
        p.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert weights(net).equal(moved)
    assert optimizer.param_groups[0]["step"] == 1
    assert len(grads) == 4


def test_a_scaled_objective_gives_the_same_meta_step():
    factors = {}
    x, y = classification(1)[0]
    for scale in (1.0, 1024.0):
        net = mlp()
        optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
        F.cross_entropy(net(x), y).backward()
        objective = ProximalObjective(
            lambda net=net: F.cross_entropy(net(x), y), lambda net=net: net(x), softmax_kl, grad_scale=scale
        )
        objective.anchor()
        optimizer.step(look_ahead=objective)
        factors[scale] = optimizer.state[net[0].weight]["AA"]
    assert factors[1.0].equal(factors[1024.0])


def test_the_adam_rate_is_that_of_the_learning_rate_at_the_start():
    """A schedule changes the steps, and not how fast the preconditioner learns relative to itself."""
    scales = []
    for lr in (0.4, 0.1):
        net = mlp()
        optimizer = APOPreconditioner(net, 0.4, meta_update="adam", structure="diag", every_n_steps=1, meta_lr=0.01)
        optimizer.param_groups[0]["lr"] = lr
        x, y = classification(1)[0]
        F.cross_entropy(net(x), y).backward()
        optimizer.step(look_ahead=objective_for(net, (x, y)))
        scales.append(optimizer.state[net[0].weight]["S"] - 1)
    for scale in scales:
        torch.testing.assert_close(scale.abs(), torch.full((4, 5), 0.01 / 0.4**0.5), rtol=1e-2, atol=0)


def test_loading_a_state_made_for_other_shapes_is_refused():
    net, other = mlp(), mlp()
    optimizer = APOPreconditioner(net, 0.1)
    train(net, optimizer, classification(2))
    with pytest.raises(ValueError, match=r"has factors of shapes .* and this optimizer needs .* from the module"):
        APOPreconditioner(other.parameters(), 0.1).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0; got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0; got nan"),
        ({"lam_f": -1.0}, "lam_f must be at least 0; got -1.0"),
        ({"lam_w": float("inf")}, "lam_w must be at least 0; got inf"),
        ({"lam_f": 0.0, "lam_w": 0.0}, "lam_f and lam_w are both 0"),
        ({"structure": "shampoo"}, "structure must be one of 'kron', 'ekfac', 'diag'; got 'shampoo'"),
        ({"meta_update": "sgd"}, "meta_update must be one of 'multiplicative', 'adam'; got 'sgd'"),
        ({"meta_lr": -0.1}, "meta_lr must be at least 0; got -0.1"),
        ({"meta_lr": 0.5}, "meta_lr must be below 0.5 for structure 'kron'; got 0.5"),
        ({"meta_lr": 1.0, "structure": "ekfac"}, "meta_lr must be below 1 for structure 'ekfac'; got 1.0"),
        ({"apply": "now"}, "apply must be one of 'before', 'after'; got 'now'"),
        ({"momentum": 1.0}, "momentum must be below 1; got 1.0"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1; got 0"),
        ({"every_n_steps": 2.5}, "every_n_steps must be a whole number; got 2.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"max_dim": -1}, "max_dim must be at least 0"),
        ({"step_limit": 0.5}, "step_limit must be at least 1, or None for no limit; got 0.5"),
        ({"step_limit": float("nan")}, "step_limit must be at least 1, or None for no limit; got nan"),
        ({"precond_dtype": "int8"}, "precond_dtype must be one of None, 'float16', 'bfloat16'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        APOPreconditioner(mlp(), **options)


def test_a_large_meta_rate_is_adams_own_business():
    assert APOPreconditioner(mlp(), meta_update="adam", meta_lr=1.0).param_groups[0]["meta_lr"] == 1.0


@pytest.mark.parametrize("name", ["lam_f", "lam_w", "every_n_steps"])
def test_groups_share_one_objective(name):
    net = mlp()
    with pytest.raises(ValueError, match=f"{name} must be the same in all parameter groups; got 7 and"):
        APOPreconditioner([{"params": net[0]}, {"params": net[2], name: 7}], 0.1)


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match=r"complex parameters; got one of shape \(2, 3\)"):
        APOPreconditioner([nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))])
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = APOPreconditioner(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients; a parameter of shape \(5, 2\)"):
        optimizer.step()


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Sequential given as params has no parameter that requires"):
        APOPreconditioner(mlp().requires_grad_(False))


def test_the_default_rate_belongs_to_the_kind_of_meta_update():
    net = torch.nn.Linear(3, 2)
    rates = {
        kind: APOPreconditioner(net, meta_update=kind).param_groups[0]["meta_lr"] for kind in ("multiplicative", "adam")
    }
    assert rates == {"multiplicative": 0.3, "adam": 3e-3}


def test_while_the_rate_is_zero_nothing_is_learned():
    net = torch.nn.Linear(3, 2)
    optimizer = APOPreconditioner(net, every_n_steps=1)
    assert optimizer.meta_step_due
    optimizer.param_groups[0]["lr"] = 0.0
    assert not optimizer.meta_step_due


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_a_group_that_stands_still_learns_nothing(structure):
    net = mlp()
    groups = [{"params": net[0], "lr": 0.1}, {"params": net[2], "lr": 0.2}]
    optimizer = APOPreconditioner(groups, every_n_steps=1, structure=structure)
    optimizer.param_groups[1]["lr"] = 0.0
    before = net[2].weight.detach().clone()
    train(net, optimizer, classification(50))
    still, moving = (dict(optimizer.state[layer.weight]) for layer in (net[2], net[0]))
    assert net[2].weight.equal(before)
    assert still["S"].equal(torch.ones_like(still["S"])), "it moves nothing, so nothing judges it"
    assert not moving["S"].equal(torch.ones_like(moving["S"]))
    optimizer.param_groups[1]["lr"] = 0.2
    losses = train(net, optimizer, classification(50))
    assert not net[2].weight.equal(before)
    assert max(losses) < 1.5


def test_frozen_with_a_gradient_left_is_left_alone():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    train(net, optimizer, classification(2))
    net[0].requires_grad_(False)
    before = net[0].weight.detach().clone()
    batches = classification(2)
    for x, y in batches:
        net.zero_grad(set_to_none=False)
        F.cross_entropy(net(x), y).backward()
        optimizer.step(look_ahead=objective_for(net, (x, y)))
    assert net[0].weight.equal(before)


def test_a_state_saved_before_an_option_was_there_has_its_default():
    net = mlp()
    optimizer = APOPreconditioner(net, 0.1, every_n_steps=1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["step_limit"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["step_limit"] == 3.0
    train(net, optimizer, classification(2))


def test_an_overflow_of_the_loss_scale_is_no_broken_look_ahead():
    class Overflows(ProximalObjective):
        def gradient(self, *args, **kwargs):
            step = super().gradient(*args, **kwargs)
            return dataclasses.replace(step, gradient=[v * torch.inf for v in step.gradient])

    scales = []
    for grad_scale in (1.0, 256.0):
        torch.manual_seed(0)
        net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        optimizer = APOPreconditioner(net)
        net(x).square().sum().backward()
        objective = Overflows(lambda net=net, x=x: net(x).square().sum(), None, squared_error, grad_scale=grad_scale)
        objective.anchor()
        optimizer.step(look_ahead=objective)
        scales.append(optimizer.state[net.weight]["S"].item())
    assert scales == [pytest.approx(0.5**0.5), 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_sides_keep_their_size_and_the_scale_carries_the_length(dtype):
    """Left alone they drift; what is learned is the same, for only the product of all three means anything."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 6, bias=False).to(dtype)
    optimizer = APOPreconditioner(net, lr=0.1, momentum=0.0, every_n_steps=1)
    AA, BB = torch.eye(8, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    S, norms = torch.tensor(1.0, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(12):
        net.weight.grad = 0.01 * torch.randn_like(net.weight)
        cotangent = 0.01 * torch.randn_like(net.weight)
        optimizer.step(look_ahead=Chosen(cotangent))
        G, V = net.weight.grad.double(), cotangent.double()
        AA, BB, S, norms = kronecker_meta_step(G, V, AA, BB, S, norms, 0.3)
    state = optimizer.state[net.weight]
    for name, width in (("AA", 8), ("BB", 6)):
        assert state[name].norm().item() == pytest.approx(width**0.5, rel=1e-5)
    learned = state["S"].double() ** 2 * torch.kron(state["AA"].double(), state["BB"].double())
    expected = S**2 * torch.kron(AA, BB)
    error = (learned - expected).norm() / expected.norm()
    assert error < (1e-12 if dtype == torch.float64 else 0.02)


class Chosen:
    """A stand-in for an objective whose gradient was chosen."""

    loss_at_anchor, grad_scale = None, 1.0

    def __init__(self, cotangent):
        self.cotangent = cotangent

    def gradient(self, params, displacement, *, lam_f, lam_w):
        zero = torch.zeros(())
        return ProximalStep(zero, zero, zero, torch.zeros(1), zero, [self.cotangent])
