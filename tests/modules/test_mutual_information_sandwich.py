"""The information of models where it is known lies between the bounds, on one rank and on two."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Exponential,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
)

from lightning_ext.functional import finite_joint_information, linear_gaussian_information
from lightning_ext.modules import measure_mutual_information
from lightning_ext.nn import (
    BernoulliDecoderModel,
    DistributionModel,
    FiniteModel,
    GaussianDecoderModel,
    LinearGaussianModel,
    MLPDecoder,
    MLPEncoder,
)
from lightning_ext.testing import run_ddp

JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]])


def linear(dtype=torch.float32):
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return LinearGaussianModel(weight, torch.ones(8, dtype=dtype), 0.5)


def decoder(encoder=True):
    torch.manual_seed(0)
    nets = MLPDecoder(2, [16], [9]), MLPEncoder([9], [16], 2) if encoder else None
    return GaussianDecoderModel(nets[0], -2.0, 2, encoder=nets[1]).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
def test_known_information_lies_between(dtype, schedule):
    model = linear(dtype)
    truth = linear_gaussian_information(model.weight, 0.5).item()
    values = measure_mutual_information(
        model, num_points=1000, num_samples=500, num_chains=8, num_steps=60, schedule=schedule, seed=1
    ).values
    for bound in ("iwae", "ais"):
        lower, upper = (values[f"{bound}/{side}"].item() for side in ("lower", "upper"))
        assert lower - 3 * values[f"{bound}/lower_stderr"] < truth < upper + 3 * values[f"{bound}/upper_stderr"]
        assert lower < upper
        assert values[f"{bound}/gap"].item() == pytest.approx(upper - lower, rel=1e-6)
        assert values[f"{bound}/gap_stderr"] < values[f"{bound}/upper_stderr"]  # pairs share their noise
    assert values["iwae/lower"] <= math.log(500)
    assert 0.4 < values["ais/accept"] < 0.98
    assert values["ais/divergent"] < 0.01
    assert 1 <= values["ais/ess"] <= 8


def test_from_the_exact_posterior_nothing_is_left_to_bound():
    model = linear(torch.float64)
    values = measure_mutual_information(model, num_points=200, num_samples=3, num_steps=4, proposal="model").values
    for bound in ("iwae", "ais"):
        assert values[f"{bound}/gap"].abs() < 1e-9
    truth = linear_gaussian_information(model.weight, 0.5).item()
    assert values["ais/lower"].item() == pytest.approx(truth, abs=4 * values["ais/lower_stderr"].item())


def test_integer_latents_have_samples_alone():
    model = FiniteModel(JOINT)
    values = measure_mutual_information(model, bounds=["iwae"], num_points=5000, num_samples=50).values
    truth = finite_joint_information(JOINT).item()
    assert values["iwae/lower"] - 0.03 < truth < values["iwae/upper"] + 0.03
    assert values["iwae/gap"] < 0.03
    with pytest.raises(ValueError, match=r"latents are discrete.*bounds=\('iwae',\)"):
        measure_mutual_information(model)


def test_it_repeats_leaves_random_states_alone_and_runs_in_inference_mode():
    model = decoder()
    options = {"num_points": 6, "num_samples": 10, "num_chains": 3, "num_steps": 4, "num_leapfrog": 2}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = measure_mutual_information(model, **options).values
    with torch.inference_mode():
        second = measure_mutual_information(model, **options).values
    with torch.autocast("cpu", torch.bfloat16):
        third = measure_mutual_information(model, **options).values
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in (second, third):
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert measure_mutual_information(model, seed=1, **options).values["ais/lower"] != first["ais/lower"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_chunks_take_less_memory_and_measure_the_same_thing():
    options = {"num_points": 300, "num_chains": 8, "num_steps": 40, "bounds": ["ais"]}
    whole, pieces = (measure_mutual_information(linear(), chunk_size=size, **options).values for size in (None, 3))
    for side in ("lower", "upper"):
        assert whole[f"ais/{side}"].item() == pytest.approx(pieces[f"ais/{side}"].item(), abs=0.3)
        assert whole[f"ais/{side}"] != pieces[f"ais/{side}"]


def _on_two_ranks(rank):
    options = {"num_points": 401, "num_samples": 200, "num_chains": 4, "num_steps": 30}
    return {name: value.item() for name, value in measure_mutual_information(linear(), **options).values.items()}


def _own_pairs(rank):
    found = measure_mutual_information(linear(), bounds=["iwae"], num_points=8, num_samples=10)
    return found.metrics["iwae"].moments[:, 0, 1].tolist()  # this rank's means


def test_ranks_simulate_pairs_of_their_own():
    first, second = run_ddp(_own_pairs)
    assert all(mine != theirs for mine, theirs in zip(first, second, strict=True))


def test_two_ranks_share_the_pairs():
    first, second = run_ddp(_on_two_ranks)
    assert first == second
    assert first["ais/count"] == first["iwae/count"] == 401
    truth = linear_gaussian_information(linear().weight, 0.5).item()
    assert first["ais/lower"] - 0.3 < truth < first["ais/upper"] + 0.3


def test_the_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = measure_mutual_information(linear(), num_points=20, num_samples=5, num_chains=2, num_steps=4)
    figure, axes = found.plot(truth=4.3)
    assert [label.get_text() for label in axes.get_yticklabels()]
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": []}, "bounds must be some of 'iwae', 'ais'; got"),
        ({"bounds": ["mine"]}, "bounds must be some of"),
        ({"bounds": "ais"}, "bounds must be some of"),
        ({"bounds": ["ais", "ais"]}, "bounds must be some of"),
        ({"num_points": 1}, "num_points must be an integer of at least 2; got 1"),
        ({"num_points": 2.5}, r"num_points must be an integer of at least 2; got 2\.5"),
        ({"num_chains": 0}, "num_chains must be an integer of at least 1"),
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"num_samples": -1}, "num_samples must be an integer of at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, or None"),
        ({"schedule": "cosine"}, "schedule must be 'sigmoid' or 'linear'; got 'cosine'"),
        ({"proposal": "encoder"}, "proposal must be 'prior' or 'model'"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"target_accept": 1.0}, "target_accept must be between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure_mutual_information(linear(), **options)


def test_models_without_a_fixed_density_or_a_proposal_are_refused():
    noisy = GaussianDecoderModel(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)), 0.0, 2)
    with pytest.raises(ValueError, match=r"decoder.1 \(Dropout\) is in training mode"):
        measure_mutual_information(noisy)
    with pytest.raises(ValueError, match="proposal='model' needs one, and this GaussianDecoderModel has none"):
        measure_mutual_information(decoder(encoder=False), proposal="model")


def test_a_decoder_that_is_no_number_far_out_is_survived_or_named():
    class Cliff(nn.Module):
        def forward(self, z):
            return torch.where(z.abs() > self.edge, torch.nan, z)

    cliff = Cliff()
    model = GaussianDecoderModel(cliff, -3.0, 2).eval()
    cliff.edge = 6.0  # beyond the prior's samples, within a leap's reach
    values = measure_mutual_information(model, num_points=20, num_chains=4, num_steps=10, num_samples=20).values
    assert all(value.isfinite() for value in values.values())
    cliff.edge = 1.0
    with pytest.raises(ValueError, match="data points that GaussianDecoderModel simulates are not finite"):
        measure_mutual_information(model, num_points=20, num_steps=4)


def _information(log_prior, low, high, scale):
    """Of z and z + scale * noise, by quadrature."""
    z = torch.linspace(low, high, 4001, dtype=torch.float64)
    x = torch.linspace(low - 8 * scale, high + 8 * scale, 4001, dtype=torch.float64)
    joint = log_prior(z).exp() * Normal(z, scale).log_prob(x[:, None]).exp()
    p = torch.trapezoid(joint, z)
    return -torch.trapezoid(torch.special.xlogy(p, p), x) - Normal(0.0, torch.tensor(scale)).entropy()


@pytest.mark.parametrize(
    "prior",
    [Uniform(0.0, 1.0), Exponential(1.0), Exponential(1.0, validate_args=False)],
    ids=["uniform", "exponential", "unchecked"],
)
def test_priors_with_an_edge(prior):
    # torch raises outside of a support, or where it may not look, goes on; a uniform density has no gradient
    scale, end = 0.2, 1.0 if isinstance(prior, Uniform) else 40.0
    truth = float(_information(prior.log_prob, 0.0, end, scale))
    wide = prior.expand([1])
    for one in (wide, Independent(wide, 1)):
        model = DistributionModel(one, lambda z: Normal(z, scale))
        found = measure_mutual_information(
            model, num_points=1000, num_chains=8, num_steps=60, num_samples=200, seed=1
        ).values
        for bound in ("iwae", "ais"):
            assert float(found[f"{bound}/lower"] - 4 * found[f"{bound}/lower_stderr"]) < truth
            assert float(found[f"{bound}/upper"] + 4 * found[f"{bound}/upper_stderr"]) > truth
            assert float(found[f"{bound}/gap"]) < 0.2


def test_priors_without_gradients_are_refused_by_name():
    bits = Independent(Bernoulli(torch.full((3,), 0.5)), 1)
    for prior in (bits, Categorical(torch.ones(3))):
        model = DistributionModel(prior, lambda z: Normal(z.float(), 1.0))
        with pytest.raises(ValueError, match="the model's latents are discrete"):
            measure_mutual_information(model)
    found = measure_mutual_information(
        DistributionModel(bits, lambda z: Normal(z, 0.05)), bounds=["iwae"], num_points=500, num_samples=500
    ).values
    assert float(found["iwae/upper"]) == pytest.approx(3 * math.log(2), abs=0.1)


@pytest.mark.parametrize(
    "likelihood",
    [lambda z: Normal(z.pow(3), 0.5), lambda z: Normal(z, z.exp()), lambda z: Poisson((3 * z).exp())],
    ids=["cubic", "scale", "rate"],
)
def test_chains_that_leave_what_distributions_take_are_rejected(likelihood):
    Distribution.set_default_validate_args(True)  # whatever torch.compile has left behind in this process
    for prior in (Normal(torch.zeros(2), 1.0), MultivariateNormal(torch.zeros(2), torch.eye(2))):
        model = DistributionModel(prior, likelihood)
        values = measure_mutual_information(model, num_points=32, num_chains=4, num_steps=20, num_samples=50).values
        assert all(value.isfinite() for value in values.values())
        assert Distribution._validate_args  # on again


def test_half_precision_is_no_precision():
    with pytest.raises(ValueError, match=r"the model is in torch.bfloat16, whose rounding is larger"):
        measure_mutual_information(decoder().bfloat16())


def test_pixels_that_are_certain_stay_so():
    network = nn.Sequential(nn.Linear(2, 4), nn.Sigmoid())
    with torch.no_grad():
        network[0].weight[2:], network[0].bias[2:] = 0.0, torch.tensor([-200.0, 200.0])
    model = BernoulliDecoderModel(network, 2, logits=False).eval()
    x, z = model.simulate(20)
    assert x[:, 2:].tolist() == [[0.0, 1.0]] * 20
    leaf = z.requires_grad_()
    found = model.log_likelihood(x, leaf)
    torch.testing.assert_close(found, Bernoulli(network(z)[:, :2]).log_prob(x[:, :2]).sum(1))
    assert torch.autograd.grad(found.sum(), leaf)[0].isfinite().all()
    assert model.log_likelihood(1 - x, z.detach()).tolist() == [-math.inf] * 20


def test_few_samples_at_once_where_memory_is_short():
    class Counting(nn.Module):
        most = 0

        def forward(self, z):
            self.most = max(self.most, len(z))
            return z

    counting = Counting()
    model = GaussianDecoderModel(counting, 0.0, 2).eval()
    for size, most in ((None, 200), (3, 12)):
        counting.most = 0
        measure_mutual_information(model, bounds=["iwae"], num_points=4, num_samples=50, chunk_size=size)
        assert counting.most == most


def test_autocasting_around_it_changes_nothing():
    options = {"num_points": 8, "num_chains": 2, "num_steps": 4, "num_samples": 10}
    plain = measure_mutual_information(decoder(), **options).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = measure_mutual_information(decoder(), **options).values
    assert {name: float(value) for name, value in plain.items()} == {name: float(v) for name, v in within.items()}
