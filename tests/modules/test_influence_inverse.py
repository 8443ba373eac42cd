"""What solvers do at the edges: no damping, sequences of many outputs, terms of a series, words about arguments."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ext.functional import ConvergenceWarning, InfluenceObjective
from lightning_ext.modules import InfluenceModule, _influence_problem
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import Dense, classes, close, loader, network


def influence(base=None, **kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, **kwargs}
    return InfluenceModule(network(4, 5, 3) if base is None else base, **options)


@pytest.mark.parametrize("solver", ["auto", "direct", "trak"])
def test_a_singular_curvature_without_damping_names_the_argument(solver):
    with pytest.raises(ValueError, match=r"definite with damping \+ weight_decay = 0: give a larger damping"):
        influence(solver=solver, damping=0.0, rank=60).scores(loader(classes(60)))  # softmax leaves some directions


@pytest.mark.parametrize("solver", ["cg", "block_cg", "normal_cg", "neumann"])
@pytest.mark.filterwarnings("ignore::lightning_ext.functional.ConvergenceWarning")
def test_iterations_without_damping_say_what_they_find(solver):
    with pytest.warns(UserWarning, match=f"solver='{solver}' gives the answer of its pseudo-inverse"):
        influence(solver=solver, damping=0.0, max_iterations=20).scores(loader(classes(60)))


def sequences(n=6, length=4, words=5):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(words, (n, length + 1), generator=generator)
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def language_model(words=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(words, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, words))


@pytest.mark.filterwarnings("ignore:.*have no Kronecker factors", "ignore:lissa stopped")
@pytest.mark.parametrize("options", [{"solver": "ekfac"}, {"solver": "kfac"}, {"solver": "lissa"}, {"damping": "auto"}])
def test_many_outputs_are_drawn_from_and_not_gone_through(options, monkeypatch):
    data = sequences()
    options = {"queries": [data[:2]], "max_iterations": 20, **options}
    exact = influence(language_model(), **options)
    exact.scores(loader(data, 3))
    forced = influence(language_model(), **options, fisher="mc")
    forced_scores = forced.scores(loader(data, 3))
    monkeypatch.setattr(_influence_problem, "EXACT_OUTPUTS", 19)  # twenty are one too many

    def every_column(self, y, t, at_once):
        raise AssertionError("went through all outputs")

    monkeypatch.setattr(type(InfluenceObjective().loss), "hessian_columns", every_column)
    options = {"solver": "block_cg", **options}
    drawn = influence(language_model(), **options)
    scores = drawn.scores(loader(data, 3))
    if "damping" not in options:
        torch.testing.assert_close(scores, forced_scores, rtol=1e-9, atol=1e-12)
    if "kfac" in options["solver"]:
        assert (exact.report["fisher"], drawn.report["fisher"]) == ("type2", "mc")
    if "damping" in options:
        assert drawn.report["damping"] == pytest.approx(exact.report["damping"], rel=0.5)
        assert drawn.report["damping"] != exact.report["damping"]


def test_a_matrix_whose_root_does_not_fit_comes_of_products(monkeypatch):
    data = sequences()
    monkeypatch.setattr(_influence_problem, "ROOT_BYTES", 0)
    module = influence(language_model(), queries=[data[:2]], solver="direct")
    found = module.scores(loader(data, 3))
    monkeypatch.setattr(_influence_problem, "ROOT_BYTES", 2**31)
    close(found, influence(language_model(), queries=[data[:2]], solver="direct").scores(loader(data, 3)))
    monkeypatch.setattr(_influence_problem, "ROOT_BYTES", 0)
    auto = influence(language_model(), queries=[data[:2]])
    auto.scores(loader(data, 3))
    assert auto.report["solver"] == "dual"


@pytest.mark.parametrize("solver", ["lissa", "neumann"])
def test_series_have_the_terms_that_the_damping_asks_for(solver):
    wanted = Dense(network(4, 5, 3), classes()[:]).scores(ref.queries(), 0.1)
    module = influence(solver=solver, tol=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the noise
        found = module.scores(loader(classes(), 23))
    assert module.report["residual"] < 0.3
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("solver", ["lissa", "neumann", "block_cg", "cg", "nystrom_cg", "normal_cg"])
def test_advice_names_arguments_that_exist(solver):
    with pytest.warns(ConvergenceWarning, match="raise max_iterations") as found:
        influence(solver=solver, max_iterations=1, damping=1e-3, tol=1e-6, rank=1).scores(loader(classes()))
    assert len(found) == 1
    assert not any(word in str(found[0].message) for word in ("depth", "repeats", "precondition"))


@pytest.mark.parametrize("name", ["rank", "max_iterations"])
def test_each_number_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1; got 0"):
        influence(**{name: 0})


@pytest.mark.parametrize("solver", ["ekfac", "kfac", "trak", "identity", "nystrom", "lanczos", "nystrom_cg"])
def test_rescaling_with_another_matrix_is_doubted_once(solver):
    module = influence(solver=solver, damping=1.0, rank=20, rescale=True, tol=1e-6)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module.leave_out([[0], [1, 2]], loader(classes()))
    doubts = [w for w in found if "rescale takes a sample's exact curvature" in str(w.message)]
    assert len(doubts) == (solver != "nystrom_cg")
