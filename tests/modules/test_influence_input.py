"""What is wrong with the input is said at once: which argument, which sample, what to do; never a silent number."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import LightningDataModule, MisconfigurationException, Trainer, submodule
from lightning_ext.callbacks import CurvatureCollector, TracInCallback
from lightning_ext.functional import ConvergenceWarning, InfluenceObjective
from lightning_ext.metrics import SelfInfluence
from lightning_ext.modules import InfluenceGapAnalyzer, InfluenceModule, PBRFModule, ResponseModule
from lightning_ext.modules._influence_data import Shard, batches_of
from lightning_ext.testing import ddp_trainer_kwargs
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import N, classes, close, loader, matrix, network, numbers, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
SIZES = (4, 5, 3)


def influence(base=None, *args, **kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, **kwargs}
    return InfluenceModule(network(*SIZES) if base is None else base, *args, **options)


ARGUMENTS = {
    "damping": [-0.1, float("nan"), float("inf"), "much", None],
    "weight_decay": [-0.1, float("nan"), float("inf")],
    "rank": [0, -1],
    "max_iterations": [0],
    "tol": [0.0, 1.0, -1.0, float("nan")],
    "normalize": ["relatif", True],
    "fisher": ["empirical", None],
    "curvature": ["fisher"],
    "solver": ["ldl"],
    "mode": ["group", None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ARGUMENTS.items() for value in values])
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        influence(**{name: value})


TAKES_AN_OBJECTIVE = {
    "InfluenceModule": lambda objective: influence(None, objective),
    "ResponseModule": lambda objective: ResponseModule(network(*SIZES), objective, remove=[0]),
    "PBRFModule": lambda objective: PBRFModule(network(*SIZES), objective, [0]),
    "InfluenceGapAnalyzer": lambda objective: InfluenceGapAnalyzer(network(*SIZES), objective, [0]),
    "TracInCallback": TracInCallback,
    "CurvatureCollector": CurvatureCollector,
    "SelfInfluence": lambda objective: SelfInfluence(objective=objective),
}


@pytest.mark.parametrize("what", TAKES_AN_OBJECTIVE)
def test_the_name_of_a_loss_is_no_objective(what):
    with pytest.raises(ValueError, match=r"got 'mse'.*InfluenceObjective\(\"mse\"\)"):
        TAKES_AN_OBJECTIVE[what]("mse")


@pytest.mark.parametrize("kind", [InfluenceModule, lambda base: PBRFModule(base, None, [0])], ids=["scores", "pbrf"])
def test_a_function_is_no_model(kind):
    with pytest.raises(ValueError, match=r"base must be a torch.nn.Module.*got function.*forward="):
        kind(lambda x: x)


def test_only_predict_runs():
    for entry in ("fit", "validate", "test"):
        with pytest.raises(MisconfigurationException, match=f"trainer.{entry}: .*trainer.predict"):
            getattr(Trainer(**{**ref.QUIET, "max_epochs": 1}), entry)(influence(), loader(classes()))


def test_gradients_need_a_folder():
    with pytest.raises(ValueError, match="output_dir"):
        influence(mode="gradients")


@pytest.mark.parametrize("curvature", ["hessian", "empirical_fisher"])
def test_only_a_gauss_newton_matrix_lets_samples_leave(curvature):
    with pytest.raises(ValueError, match="rescale"):
        influence(rescale=True, curvature=curvature)
    module = influence(curvature=curvature, damping=1.0)
    with pytest.raises(ValueError, match="rescale"):
        module.leave_out([[0]], loader(classes()))
    assert module.leave_out([[0]], loader(classes()), rescale=False).isfinite().all()


def test_a_hessian_has_no_automatic_damping():
    with pytest.raises(ValueError, match="auto"):
        influence(curvature="hessian", damping="auto").scores(loader(classes()))


# -- damping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "direct", "dual", "nystrom_cg", "cg", "ekfac", "kfac", "lanczos", "trak"])
def test_no_damping_with_more_parameters_than_outputs(solver):
    with pytest.raises(ValueError, match="damping"):
        influence(damping=0.0, solver=solver).scores(loader(classes(10)))


@pytest.mark.parametrize("solver", ["auto", "direct", "dual", "nystrom_cg", "nystrom", "trak"])
def test_no_damping_where_samples_repeat(solver):
    """As many outputs as parameters, but the same ones: only the factorisation can find out."""
    x, t = classes(1)[:]
    data = TensorDataset(x.expand(30, -1), t.expand(30))
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match="damping"):
        influence(damping=0.0, solver=solver, rank=60).scores(loader(data))


@pytest.mark.parametrize("solver", ["dual", "nystrom", "nystrom_cg"])
def test_solvers_that_divide_by_the_damping_say_so_before_they_sketch(solver):
    module = influence(network(4, 1), InfluenceObjective("mse"), queries=ref.queries(k=1), damping=0.0, solver=solver)
    with pytest.raises(ValueError, match=f"solver='{solver}' divides by the damping"):
        module.scores(loader(numbers()))


def test_inner_products_of_gradients_need_no_damping():
    assert influence(damping=0.0, solver="identity").scores(loader(classes(3))).isfinite().all()


def test_a_sample_that_carries_all_of_the_curvature_cannot_leave_it():
    base = nn.Linear(1, 1, bias=False)
    data = TensorDataset(torch.tensor([[1.0], [0.0], [0.0]]), torch.ones(3, 1))
    module = influence(base, InfluenceObjective("mse"), queries=[data[:1]], damping=0.0, rescale=True)
    with pytest.raises(ValueError, match="leverage"):
        module.scores(loader(data))


@pytest.mark.parametrize("solver", ["cg", "block_cg", "normal_cg", "nystrom_cg", "neumann"])
def test_a_solver_that_stops_too_soon_warns_and_says_so(solver):
    module = influence(solver=solver, damping=1e-4, tol=1e-10, max_iterations=1, rank=1)
    with pytest.warns(ConvergenceWarning, match="residual"):
        module.scores(loader(classes()))
    assert module.report["converged"] is False
    assert module.report["residual"] > 1e-10
    again = influence(solver=solver, damping=0.1, tol=1e-2, max_iterations=500)
    again.scores(loader(classes()))
    assert again.report["converged"] is True


# -- losses and networks ------------------------------------------------------------------------------------------


def sine(y, t):
    return (3 * y - t).sin().sum(1)


@pytest.mark.parametrize("solver", ["auto", "direct", "dual", "nystrom_cg", "ekfac"])
def test_a_loss_that_is_not_convex(solver):
    module = influence(network(4, 3, 1), InfluenceObjective(sine), queries=ref.queries(k=1), solver=solver)
    with pytest.raises(ValueError, match=r"convex|curvature"):
        module.scores(loader(numbers()))


def test_a_loss_that_is_not_convex_has_a_hessian():
    base, asked = network(4, 3, 1), ref.queries(k=1)
    module = influence(base, InfluenceObjective(sine), queries=asked, curvature="hessian", solver="normal_cg", tol=1e-9)
    dense = ref.Dense(base, numbers()[:], lambda y, t: (3 * y - t).sin().sum())
    close(module.scores(loader(numbers())), dense.scores(asked, 0.1, dense.hessian()), rtol=1e-4)


class Odd(nn.Module):
    """A layer that no Kronecker factor is known for."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(4, 5), nn.Bilinear(5, 5, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(self.mix(h, h))


@pytest.mark.parametrize("solver", ["ekfac", "kfac"])
def test_layers_without_factors_take_the_exact_diagonal(solver):
    torch.manual_seed(0)
    base = Odd()
    module = influence(base, solver=solver)
    with pytest.warns(UserWarning, match=r"2 of 6 parameters \(\d+% .*Kronecker.*: mix.weight, mix.bias"):
        found = module.scores(loader(classes()))
    assert module.report["diagonal"] == ["mix.weight", "mix.bias"]
    wanted = ref.Dense(base, classes()[:])
    exact = wanted.scores(ref.queries(), 0.1)
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.7
    only = influence(base, solver="ekfac", include="mix")
    dense = ref.Dense(base, classes()[:], keep=lambda name: "mix" in name)
    diagonal = dense.ggn().diagonal().diag()
    with pytest.warns(UserWarning, match="2 of 2 parameters"):
        close(only.scores(loader(classes())), dense.scores(ref.queries(), 0.1, diagonal))


def test_no_parameter_is_chosen():
    with pytest.raises(ValueError, match="decoder"):
        influence(include="decoder").scores(loader(classes()))


def test_half_precision_weights_without_a_trainer():
    with pytest.raises(MisconfigurationException, match=r"bfloat16.*double=True or base.float\(\)"):
        influence(network(*SIZES).bfloat16(), double=False).scores(loader(classes()))
    assert influence(network(*SIZES).bfloat16(), double=True).scores(loader(classes())).isfinite().all()


def test_a_strategy_that_shards_parameters_is_refused():
    strategy = submodule("strategies").FSDPStrategy

    class Fake:
        pass

    module = influence()
    trainer = Fake()
    trainer.strategy, trainer.predict_dataloaders = strategy.__new__(strategy), loader(classes())
    module._trainer = trainer
    with pytest.raises(MisconfigurationException, match="FSDP"):
        module.on_predict_start()


# -- samples ------------------------------------------------------------------------------------------------------


def spoiled(where, value=torch.nan, target=False):
    x, t = numbers()[:]
    (t if target else x)[where] = value
    return TensorDataset(x, t)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", ["direct", "dual", "nystrom_cg", "cg", "ekfac", "lanczos", "identity"])
def test_a_bad_sample_is_named_by_its_place_in_the_data_set(solver, value, target):
    """The seventeenth of the data set, fourth of its batch; nn.ReLU hides no infinity."""
    base = nn.Linear(4, 1)
    module = influence(base, InfluenceObjective("mse"), queries=ref.queries(k=1), solver=solver, rank=5)
    with pytest.raises(ValueError, match=r"Samples \[17\] of the data set"):
        module.scores(loader(spoiled(17, value, target), 7))


@pytest.mark.parametrize("mode", ["pairwise", "self"])
def test_a_bad_sample_is_named_under_a_trainer(mode):
    module = influence(nn.Linear(4, 1), InfluenceObjective("mse"), queries=ref.queries(k=1), mode=mode)
    with pytest.raises(ValueError, match=r"Samples \[3, 4\] of the data set"):
        predict(module, loader(spoiled([3, 4, 20], target=True), shuffle=False))
    with pytest.raises(ValueError, match=r"Samples \[(3|4|20)\] of the data set"):
        predict(module, loader(spoiled([3, 4, 20], target=True), 1, shuffle=True))


@pytest.mark.ddp
def test_a_bad_sample_is_named_on_the_rank_that_has_it():
    module = influence(nn.Linear(4, 1), InfluenceObjective("mse"), queries=ref.queries(k=1), solver="cg")
    with pytest.raises(Exception, match=r"Samples \[17\] of the data set|Connection closed|terminated"):
        predict(module, loader(spoiled(17), 4), **ddp_trainer_kwargs(timeout=10))


def test_self_influence_and_groups_name_a_bad_sample():
    module = influence(nn.Linear(4, 1), InfluenceObjective("mse"), queries=ref.queries(k=1))
    data = loader(spoiled(9, target=True), 4)
    with pytest.raises(ValueError, match=r"Samples \[9\]"):
        module.self_influence(data)
    with pytest.raises(ValueError, match=r"Samples \[9\]"):
        module.leave_out([[1, 2], [8, 9]], data)


def test_a_bad_query_is_named():
    asked = [ref.queries()[0], ref.queries(seed=3)[0]]
    asked[1][0][2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"batch 1 of the queries.*samples \[2\]"):
        influence(queries=asked).scores(loader(classes()))


def test_a_query_without_a_gradient_warns_and_scores_nothing():
    x, t = ref.queries()[0]
    asked = [(torch.cat([x, x[:1]]), torch.cat([t, t[:1]]))]
    objective = InfluenceObjective(measurement=lambda y, t: y[:, 0] * (torch.arange(len(y)) != 1))
    for solver in ("direct", "dual", "nystrom_cg", "cg", "neumann", "ekfac"):
        module = influence(None, objective, queries=asked, solver=solver, max_iterations=1000)
        with pytest.warns(UserWarning, match=r"no gradient at queries \[1\]"):
            found = module.scores(loader(classes()))
        assert (found[1] == 0).all()
        assert (found[[0, 2, 3]].abs().amax(1) > 0).all()
        close(found[3], found[0], rtol=1e-6)


def test_a_data_set_of_zero_gradients_scores_nothing():
    """A network that is right about everything: relative scores of nothing are nothing."""
    base = nn.Linear(4, 1)
    nn.init.zeros_(base.weight)
    nn.init.zeros_(base.bias)
    data = TensorDataset(numbers().tensors[0], torch.zeros(N, 1))
    for normalize in (None, "parameter", "loss"):
        module = influence(base, InfluenceObjective("mse"), queries=ref.queries(k=1), normalize=normalize)
        assert (module.scores(loader(data)) == 0).all()
    assert (module.self_influence(loader(data)) == 0).all()


# -- targets and outputs ------------------------------------------------------------------------------------------


def labelled(where, value):
    x, t = classes()[:]
    t[where] = value
    return TensorDataset(x, t)


@pytest.mark.parametrize("value", [3, -1])
@pytest.mark.parametrize("solver", ["direct", "dual", "block_cg", "ekfac", "identity"])
def test_a_class_that_there_is_not_is_named_with_its_sample(solver, value):
    with pytest.raises(ValueError, match=rf"samples \[8, 13\] are \[{value}\].*3 classes, 0 to 2"):
        influence(solver=solver).scores(loader(labelled([8, 13], value), 14))
    with pytest.raises(ValueError, match=rf"samples \[13\] are \[{value}\].*3 classes"):
        predict(influence(solver=solver), loader(labelled(13, value), shuffle=True))
    assert influence(solver=solver).scores(loader(labelled(13, -100))).isfinite().all(), "-100 is left out by the loss"


def test_groups_and_self_influence_name_a_class_that_there_is_not():
    for call in (lambda m, data: m.leave_out([[13]], data), lambda m, data: m.self_influence(data)):
        with pytest.raises(ValueError, match=r"samples \[13\] are \[7\]"):
            call(influence(), loader(labelled(13, 7)))


def test_class_numbers_that_are_no_integers():
    x, t = classes()[:]
    with pytest.raises(ValueError, match=r"class numbers must be integers.*long\(\)"):
        influence().scores(loader(TensorDataset(x, t.float())))
    soft = torch.nn.functional.one_hot(t, 3).float()
    assert influence().scores(loader(TensorDataset(x, soft))).isfinite().all()


def test_a_query_of_a_class_that_there_is_not():
    x, t = ref.queries()[0]
    asked = [(x, t), (x, torch.tensor([0, 3, 1]))]
    with pytest.raises(ValueError, match=r"batch 1 of the queries, .*samples \[1\] are \[3\].*3 classes"):
        influence(queries=asked).scores(loader(classes()))
    logit = InfluenceObjective(measurement=lambda y, t: y[:, 0])
    assert influence(None, logit, queries=asked).scores(loader(classes())).isfinite().all(), "it reads no targets"


class Words(nn.Module):
    """Logits of each position, laid out in several ways."""

    def __init__(self, lay):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.lay = nn.Embedding(7, 4), nn.Linear(4, 7), lay

    def forward(self, x):
        return self.lay(self.head(self.embedding(x)))


def words(n=8, length=5):
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(*torch.randint(7, (2, n, length), generator=generator))


LAYOUTS = {
    "flattened": (lambda y: y.flatten(0, 1), r"5 positions.*unflatten"),
    "classes first": (lambda y: y.mT, r"\(B, 7, 5\) have the classes in dimension 1.*movedim\(1, -1\)"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_of_sequences_in_another_layout(name):
    """The advice is followed, and then it works."""
    lay, message = LAYOUTS[name]
    remedies = {
        "flattened": lambda module, batch: module(batch[0]).unflatten(0, batch[1].shape),
        "classes first": lambda module, batch: module(batch[0]).movedim(1, -1),
    }
    queries = [words(2)[:]]
    with pytest.raises(ValueError, match=message):
        influence(Words(lay), queries=queries).scores(loader(words()))
    mended = influence(Words(lay), InfluenceObjective(forward=remedies[name]), queries=queries)
    plain = influence(Words(lambda y: y), queries=queries)
    close(mended.scores(loader(words())), plain.scores(loader(words())))


def test_sequences_of_several_lengths_are_all_right():
    """As many positions as classes in one of the batches: no layout is to be guessed from another batch's."""
    queries = [words(2)[:], words(2, 7)[:], words(2, 3)[:]]
    assert influence(Words(lambda y: y), queries=queries).scores(loader(words())).shape == (6, 8)


def test_a_module_that_takes_more_than_one_entry():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.part(x * mask)

    with pytest.raises(ValueError, match=r"Two was called with one entry.*'mask'.*pass forward="):
        influence(Two()).scores(loader(classes()))


@pytest.mark.parametrize("solver", ["identity", "direct"])
def test_samples_that_lack_what_queries_have(solver):
    objective = InfluenceObjective(forward="image", target="label")
    queries = [dict(zip(("image", "label"), *ref.queries(), strict=True))]
    samples = [{"pixels": x, "label": t} for x, t in classes()]
    with pytest.raises(ValueError, match=r"forward looks for batch\['image'\].*\['pixels', 'label'\]"):
        influence(None, objective, queries=queries, solver=solver).scores(loader(samples))


# -- loaders ------------------------------------------------------------------------------------------------------


class Parts:
    """A batch sampler that has no sampler."""

    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)


NOTHING = {
    "data set": lambda: loader(classes(0)),
    "batch sampler": lambda: DataLoader(classes(), batch_sampler=Parts([])),
}


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="The loader's data set is empty"):
        influence().scores(loader(classes(0)))


@pytest.mark.parametrize("what", NOTHING)
def test_a_loader_without_a_batch_is_not_passed_over(what):
    with pytest.raises(ValueError, match="The loader holds no batch"):
        predict(influence(), NOTHING[what]())
    data = LightningDataModule()
    data.predict_dataloader = NOTHING[what]
    with pytest.raises(ValueError, match="The loader holds no batch"):
        Trainer(**ref.QUIET).predict(influence(), datamodule=data)


def test_no_batch_was_wanted():
    assert Trainer(**ref.QUIET, limit_predict_batches=0).predict(influence(), loader(classes())) is None


class Unsized:
    def __iter__(self):
        return iter([range(N)])


@pytest.mark.parametrize("sampler", [[range(N)], ([0], range(1, N)), Unsized()], ids=["list", "tuple", "unsized"])
def test_batch_samplers_that_lightning_cannot_wrap_are_named(sampler):
    asked = DataLoader(classes(), batch_sampler=sampler)
    for given in (asked, [asked]):
        with pytest.raises(MisconfigurationException, match=rf"batch_sampler must .* got a {type(sampler).__name__}"):
            predict(influence(), given)


def test_batch_samplers_without_a_length_are_named():
    with pytest.raises(MisconfigurationException, match=r"batch_sampler must have a length.*got a Unsized"):
        influence().scores(DataLoader(classes(), batch_sampler=Unsized()))


def test_queries_without_a_sample():
    x, t = classes()[:]
    with pytest.raises(ValueError, match=r"In batch 1 of the queries, there is no sample"):
        influence(queries=[(x, t), (x[:0], t[:0])]).scores(loader(classes()))


def test_pairs_need_queries():
    for call in (lambda m: m.scores(loader(classes())), lambda m: predict(m, loader(classes())),
                 lambda m: m.leave_out([[0]], loader(classes()))):  # fmt: skip
        with pytest.raises(ValueError, match="queries is None"):
            call(influence(queries=None))


@pytest.mark.parametrize("queries", [iter(ref.queries()), (batch for batch in ref.queries())], ids=["iter", "yield"])
def test_queries_that_are_there_once_only_are_refused(queries):
    with pytest.raises(ValueError, match=r"gives them only once.*list\(queries\)"):
        influence(queries=queries)
    module = influence()
    module.queries = queries
    with pytest.raises(ValueError, match="only once"):
        module.scores(loader(classes()))


def test_queries_without_a_batch():
    with pytest.raises(ValueError, match="queries holds no batch"):
        influence(queries=[]).scores(loader(classes()))


@pytest.mark.parametrize("asked", ["shuffle", "batch_sampler"])
def test_queries_without_an_order_are_refused(asked):
    data = classes(3)
    options = {"shuffle": True, "batch_size": 2}
    if asked == "batch_sampler":
        sampler = torch.utils.data.RandomSampler(data)
        options = {"batch_sampler": torch.utils.data.BatchSampler(sampler, 2, drop_last=False)}
    with pytest.raises(MisconfigurationException, match="shuffle=False"):
        influence(queries=DataLoader(data, **options)).scores(loader(classes()))


@pytest.mark.parametrize("data", [None, [1, 2], "train"], ids=str)
def test_what_is_no_loader(data):
    with pytest.raises(MisconfigurationException, match="loader must be a DataLoader"):
        influence().scores(data)


def test_what_was_meant_is_said():
    data, asked = classes(), ref.queries()[0]
    with pytest.raises(MisconfigurationException, match=r"got a TensorDataset: pass DataLoader\(dataset"):
        influence().scores(data)
    with pytest.raises(ValueError, match=r"leave_out\(groups, loader\)"):
        influence().leave_out(loader(data), [[0]])
    with pytest.raises(MisconfigurationException, match=r"TensorDataset gives samples.*DataLoader\(queries"):
        influence(queries=data)
    for one in (asked, asked[0], {"x": asked[0]}):
        with pytest.raises(MisconfigurationException, match=r"queries=\[batch\]"):
            influence(queries=one)
    with pytest.raises(ValueError, match=r"\[\(x, t\)\] is one of a single batch"):
        influence(queries=list(asked)).scores(loader(data))


class Some(torch.utils.data.Sampler):
    """A sampler of one's own."""

    def __init__(self, chosen):
        self.chosen = chosen

    def __iter__(self):
        return iter(self.chosen)


class Counted(Some):
    def __len__(self):
        return len(self.chosen)


@pytest.mark.parametrize("run", [lambda m, data: m.scores(data), predict], ids=["scores", "predict"])
def test_a_sampler_of_ones_own_that_takes_some_samples(run):
    with pytest.raises(MisconfigurationException, match=rf"Counted takes 10 of its {N} samples.*Subset"):
        run(influence(), loader(classes(), sampler=Counted(range(10))))
    with pytest.raises(MisconfigurationException, match=rf"Counted takes {N + 1} of"):
        run(influence(), loader(classes(), sampler=Counted([0, *range(N)])))
    with pytest.raises(MisconfigurationException, match=r"Some, does not say how many.*Subset"):
        run(influence(), loader(classes(), sampler=Some(range(10))))
    run(influence(), loader(classes(), sampler=Counted(range(N)[::-1])))


@pytest.mark.parametrize("group", [[0, 0], [-1], [N], []], ids=str)
def test_groups_name_samples_once(group):
    with pytest.raises(ValueError, match=r"only once|0 to 22"):
        influence().leave_out([[1], group], loader(classes()))


def test_a_sampler_of_ones_own_that_deals_samples_out_to_ranks():
    """Of 23, one of two ranks has 12 and the other 11, or 12 too, one of them again."""
    for taken, refused in ((12, False), (11, False), (N, False), (10, True), (13, True)):
        context = pytest.raises(MisconfigurationException, match=f"takes {taken} of") if refused else nullcontext()
        with context:
            Shard(loader(classes(), sampler=Counted(range(taken))), lambda batch: batch, 0, 2)


def test_samples_that_change_from_pass_to_pass():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            x, t = classes()[i]
            return x + torch.randn(4), t

    module = influence(solver="cg", cache_bytes=0)
    with pytest.raises(ValueError, match="random transformations"):
        module.scores(loader(Augmented()))


def test_a_measurement_of_another_shape():
    module = influence(None, InfluenceObjective(measurement=lambda y, t: y))
    with pytest.raises(ValueError, match="one number per sample"):
        module.scores(loader(classes()))


def test_asked_before_anything_ran():
    module = influence()
    assert module.report == {}
    with pytest.raises(RuntimeError, match="first"):
        _ = module.view


def test_positions_that_the_loader_keeps_to_itself(monkeypatch):
    """A loader that was told to batch, but makes other batches than its sampler says."""

    class Halving(DataLoader):
        def __iter__(self):
            for x, t in super().__iter__():
                yield x[:2], t[:2]

    with pytest.raises(MisconfigurationException, match="which samples are in a batch"):
        predict(influence(), Halving(classes(), batch_size=5))


def test_scores_stay_finite_at_huge_gradients():
    x, t = classes()[:]
    data = TensorDataset(1e6 * x, t)
    found = matrix(predict(influence(), loader(data)))
    assert found.isfinite().all()


class Own(TensorDataset):
    """Not known to take several positions."""

    def __getitem__(self, index):
        assert isinstance(index, int)
        return super().__getitem__(index)


def collate(samples):
    return tuple(torch.stack(part) for part in zip(*samples, strict=True))


@pytest.fixture
def looked_up(monkeypatch):
    """Every position, or positions, that a TensorDataset itself is asked for."""
    asked, plainly = [], TensorDataset.__getitem__

    def noted(self, index):
        asked.append(index)
        return plainly(self, index)

    monkeypatch.setattr(TensorDataset, "__getitem__", noted)
    return asked


def same_batches(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_tensors_are_looked_up_at_once_and_everything_else_sample_by_sample(looked_up):
    tensors = classes().tensors
    kinds = {
        "at once": (loader(TensorDataset(*tensors)), 3),
        "own": (loader(Own(*tensors)), 11),
        "collated": (loader(TensorDataset(*tensors), collate_fn=collate), 11),
    }
    shards, found = {}, {}
    for name, (each, calls) in kinds.items():
        shards[name] = Shard(each, lambda batch: batch, 1, 2)
        found[name] = [(p, *batch) for p, batch in shards[name].indexed()]
        assert len(looked_up) == calls
        looked_up.clear()
    for name in ("own", "collated"):
        same_batches(found["at once"], found[name])
    assert torch.cat([p for p, *_ in found["own"]]).tolist() == list(range(1, N, 2))
    before = tensors[0].clone()
    for _, batch in shards["at once"].indexed():
        batch[0].zero_()
    assert torch.equal(tensors[0], before)  # a copy, as the loader's
    assert type(shards["at once"].get([2, 0])) is type(shards["own"].get([2, 0])) is list


def test_queries_are_looked_up_in_the_order_of_their_batch_sampler(looked_up):
    data, order = classes(), [(5, 2), [2, 0, 1], torch.tensor([7])]  # tuples and tensors name positions too
    asked = DataLoader(data, batch_sampler=order)
    wanted = list(asked)
    looked_up.clear()
    same_batches(batches_of(asked), wanted)
    assert len(looked_up) == 3
    by_twos = DataLoader(data, 2, sampler=range(4)[::-1])
    same_batches(batches_of(by_twos), list(by_twos))


def test_inner_products_of_gradients_ask_the_network_for_nothing_else():
    """Queries and samples; one of each to see what targets must be like, and one that layers explain it."""
    sizes, base = [], network(*SIZES)
    base.register_forward_hook(lambda module, args, outputs: sizes.append(len(outputs)))
    influence(base, double=False, solver="identity").scores(loader(classes(), N))
    assert sorted(sizes) == [1, 1, 1, 1, ref.Q, N]


def test_queries_of_other_loaders_come_as_these_give_them():
    class Doubled(DataLoader):
        def __iter__(self):
            return ([2 * x, t] for x, t in super().__iter__())

    data = classes()
    for asked in (
        Doubled(data, 5),
        loader(Own(*data.tensors)),
        loader(data, collate_fn=collate),
        DataLoader(data, batch_size=None),
        list(loader(data)),
    ):
        same_batches(batches_of(asked), list(asked))
