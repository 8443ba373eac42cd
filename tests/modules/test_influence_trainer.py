"""Scores through trainer.predict: every sample under its own id, whatever the loader, the precision and the ranks."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset, RandomSampler

from lightning_ext._lightning import Callback, LightningDataModule, MisconfigurationException, Trainer
from lightning_ext.data import ResumableDataModule, RowStore
from lightning_ext.functional import InfluenceObjective
from lightning_ext.metrics import InfluenceScores
from lightning_ext.modules import InfluenceModule
from lightning_ext.testing import ddp_trainer_kwargs
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import N, classes, close, loader, matrix, network, predict

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using the plain ModelCheckpoint"),
]
SIZES = (4, 5, 3)


def influence(**kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, "tol": 1e-10, **kwargs}
    return InfluenceModule(network(*SIZES), **options)


@pytest.fixture(scope="module")
def exact():
    dense = ref.Dense(network(*SIZES), classes()[:])
    return dense.scores(ref.queries(), 0.1)


@pytest.fixture(scope="module")
def exact_self():
    dense = ref.Dense(network(*SIZES), classes()[:])
    g = dense.gradients()
    return (g @ dense.inverse(0.1) * g).sum(1)[None]


# -- loaders ------------------------------------------------------------------------------------------------------


class Indexed(Dataset):
    """Gives whole batches at once, as the library's own data sets do."""

    def __init__(self, data):
        self.data, self.whole = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]

    def __getitems__(self, indices):
        self.whole += 1
        return [self.data[i] for i in indices]


class Pairs:
    """A batch sampler of unequal batches that has no batch size to ask for."""

    def __init__(self, data):
        self.batches = [[7], [0, 3, 22], [1, 2], [4, 5, 6, *range(8, 22)]]

    def __iter__(self):
        return iter([list(batch) for batch in self.batches])

    def __len__(self):
        return len(self.batches)


LOADERS = {
    "in order": lambda data: loader(data),
    "shuffled": lambda data: loader(data, shuffle=True),
    "dropping": lambda data: loader(data, drop_last=True),
    "shuffled and dropping": lambda data: loader(data, shuffle=True, drop_last=True),
    "one batch": lambda data: loader(data, 50),
    "one by one": lambda data: loader(data, 1),
    "a worker": lambda data: loader(data, shuffle=True, num_workers=1),
    "__getitems__": lambda data: loader(Indexed(data), shuffle=True),
    "batch sampler": lambda data: loader(data, 1, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "own batch sampler": lambda data: loader(data, 1, batch_sampler=Pairs(data)),
    "own collate": lambda data: loader(data, collate_fn=lambda pairs: [torch.stack(c) for c in zip(*pairs, strict=1)]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_sample_has_its_own_score(name, exact):
    found = predict(influence(), LOADERS[name](classes()))
    seen = torch.cat([entry["indices"] for entry in found])
    assert sorted(seen.tolist()) == list(range(N))
    if "shuffled" in name:
        assert seen.tolist() != sorted(seen.tolist()), "the loader did not shuffle, so nothing was shown"
    close(matrix(found), exact)
    torch.testing.assert_close(InfluenceScores.gather(found), matrix(found), rtol=0, atol=0)


def test_a_data_set_that_gives_whole_batches_is_asked_for_them():
    data = Indexed(classes())
    predict(influence(), loader(data))
    assert data.whole >= 10  # five batches of curvature, five of scores


class Module(ResumableDataModule):
    def predict_dataloader(self):
        return self.loader(Whole(), shuffle=True)


class Whole(Dataset):
    """Batches by one index, not collated."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return classes()[i]

    def __getitems__(self, indices):
        return classes()[indices]


def test_a_data_modules_own_loader(exact):
    found = Trainer(**ref.QUIET).predict(influence(), datamodule=Module(batch_size=6))
    assert torch.cat([entry["indices"] for entry in found]).tolist() != list(range(N))
    close(matrix(found), exact)


def test_a_plain_data_module(exact):
    class Plain(LightningDataModule):
        def predict_dataloader(self):
            return loader(classes(), shuffle=True)

    close(matrix(Trainer(**ref.QUIET).predict(influence(), datamodule=Plain())), exact)


@pytest.mark.parametrize("limit", [2, 0.4])
def test_fewer_batches_are_scored_with_the_curvature_of_all(limit, exact):
    found = predict(influence(), loader(classes(), shuffle=True), limit_predict_batches=limit)
    assert len(found) == 2
    scores = matrix(found)
    seen = ~scores.isnan().any(0)
    assert int(seen.sum()) == 10
    close(scores[:, seen], exact[:, seen])


def test_fast_dev_run_scores_one_batch(exact):
    (found,) = predict(influence(), loader(classes()), fast_dev_run=True)
    close(found["scores"], exact[:, :5])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(classes())


class Counted(Stream):
    """It says how many there are, but not which."""

    def __len__(self):
        return N


REFUSED = {
    "no positions": (lambda: loader(Stream()), "a data set with a length"),
    "positions without names": (lambda: loader(Counted()), "a data set with a length"),
    "two loaders": (lambda: [loader(classes()), loader(classes())], "one loader"),
    "two named loaders": (lambda: {"a": loader(classes()), "b": loader(classes())}, "a DataLoader"),
    "batches of the data set": (lambda: loader([classes()[:5], classes()[5:]], batch_size=None), "batch_size=None"),
    "a list of batches": (lambda: [classes()[:5], classes()[5:]], "one loader"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_loaders_that_do_not_tell_their_samples_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=message):
        predict(influence(), make())


# -- precision and modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("solver", ["direct", "nystrom_cg", "ekfac"])
def test_precision_of_the_trainer(solver, precision, inference_mode, exact):
    module = influence(double=False, solver=solver, tol=1e-6)
    found = predict(module, loader(classes()), precision=precision, inference_mode=inference_mode)
    scores = matrix(found)
    assert scores.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    if solver == "ekfac":
        alone = InfluenceModule(network(*SIZES), queries=ref.queries(), damping=0.1, solver="ekfac", double=True)
        exact = alone.scores(loader(classes()))
    close(scores, exact, rtol=2e-5)


def test_half_precision_weights_are_refused():
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        predict(influence(double=False), loader(classes()), precision="bf16-true")


@pytest.mark.parametrize("inference_mode", [True, False])
def test_what_comes_back_can_be_used(inference_mode, exact):
    """After predict the module answers without a Trainer, and its solutions can be differentiated through."""
    module = influence()
    predict(module, loader(classes()), inference_mode=inference_mode)
    close(module.scores(loader(classes())), exact)
    assert not module.solved.is_inference()
    assert module.report["solver"] == "direct"


def test_self_influence_with_and_without_a_trainer(exact_self):
    found = predict(influence(mode="self", queries=None), loader(classes(), shuffle=True))
    close(matrix(found), exact_self)
    close(influence(queries=None).self_influence(loader(classes(), shuffle=True))[None], exact_self)


def test_the_report_reaches_the_logger():
    told = {}

    class Logger(ref.logger_class()):
        def log_metrics(self, metrics, step=None):
            told.update(metrics)

    predict(influence(solver="nystrom_cg"), loader(classes()), logger=Logger())
    assert told["influence/damping"] == pytest.approx(0.1)
    assert 0 <= told["influence/residual"] <= 1e-10


# -- stores -------------------------------------------------------------------------------------------------------


class Stop(Callback):
    def __init__(self, after):
        self.after = after

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 == self.after:
            raise KeyboardInterrupt("the power went")


class Counting(InfluenceModule):
    """Counts the batches whose gradients are taken while scoring."""

    scored = 0

    def _rows(self, *args):
        self.scored += 1
        return super()._rows(*args)


def stored(folder, **kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, "tol": 1e-10, "output_dir": folder, **kwargs}
    return Counting(network(*SIZES), **options)


def test_scores_stream_to_a_folder(tmp_path, exact):
    module = stored(tmp_path / "scores")
    assert predict(module, loader(classes(), shuffle=True), return_predictions=False) is None
    store = RowStore(tmp_path / "scores")
    assert store.dim == len(exact)
    close(store.read(torch.arange(N)).mT, exact)


@pytest.mark.parametrize("options", [{}, {"mode": "self"}, {"rescale": True}, {"mode": "gradients"}], ids=str)
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, options):
    whole = stored(tmp_path / "whole", **options)
    predict(whole, loader(classes()), return_predictions=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(stored(tmp_path / "cut", **options), loader(classes()), callbacks=[Stop(2)])
    assert RowStore(tmp_path / "cut").missing().tolist() == list(range(10, N))
    again = stored(tmp_path / "cut", **options)
    found = predict(again, loader(classes()))
    assert again.scored == 3, "batches that were done were computed again, or others not"
    assert (whole.scored, len(found)) == (5, 5)
    a, b = (RowStore(tmp_path / name).read(torch.arange(N)) for name in ("whole", "cut"))
    close(b, a, rtol=1e-12)
    if options.get("mode") != "gradients":
        close(matrix(found), a.mT, rtol=1e-12)


def test_another_order_of_batches_may_finish_a_run(tmp_path, exact):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(stored(tmp_path / "cut"), loader(classes()), callbacks=[Stop(3)])
    found = predict(stored(tmp_path / "cut", cache_bytes=0), loader(classes(), 7, shuffle=True))
    close(matrix(found), exact)


def test_a_killed_process_leaves_what_it_did(tmp_path, exact):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, torch
            torch.set_num_threads(1)
            from tests.modules.test_influence_trainer import Stop, classes, loader, predict, stored
            class Kill(Stop):
                def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
                    if batch_idx + 1 == self.after:
                        os.kill(os.getpid(), signal.SIGKILL)
            predict(stored({str(tmp_path / "cut")!r}), loader(classes()), callbacks=[Kill(3)])
            """
        )
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RowStore(tmp_path / "cut").missing().tolist() == list(range(15, N))
    again = stored(tmp_path / "cut")
    close(matrix(predict(again, loader(classes()))), exact)
    assert again.scored == 2


def changed_network():
    module = network(*SIZES)
    with torch.no_grad():
        module[2].bias[0] += 1e-3
    return module


OTHERS = {
    "damping": lambda folder: stored(folder, damping=0.2),
    "queries": lambda folder: stored(folder, queries=ref.queries(seed=10)),
    "network": lambda folder: Counting(changed_network(), **kept(folder)),
    "parameters that are not chosen": lambda folder: Counting(changed_network(), **kept(folder, include="weight")),
    "mode": lambda folder: stored(folder, mode="self"),
    "measurement": lambda folder: stored(folder, objective=InfluenceObjective(measurement="margin")),
    "solver": lambda folder: stored(folder, solver="identity"),
    "double": lambda folder: stored(folder, double=False, tol=1e-6),
}


def kept(folder, **kwargs):
    return {"queries": ref.queries(), "damping": 0.1, "double": True, "tol": 1e-10, "output_dir": folder, **kwargs}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_holds_the_scores_of_one_question(name, tmp_path):
    first = {"include": "weight"} if name == "parameters that are not chosen" else {}
    predict(stored(tmp_path / "scores", **first), loader(classes()))
    with pytest.raises(ValueError, match="Choose another folder"):
        predict(OTHERS[name](tmp_path / "scores"), loader(classes()))


@pytest.mark.parametrize("mode", ["self", "gradients"])
def test_a_folder_of_another_loss_is_refused(tmp_path, mode):
    """Without queries nothing but the training loss tells the two apart."""
    for loss, context in (("mse", None), ("half_squared_error", pytest.raises(ValueError, match="another folder"))):
        module = InfluenceModule(
            network(4, 1), InfluenceObjective(loss), mode=mode, damping=0.1, output_dir=tmp_path / "scores"
        )
        if context is None:
            predict(module, loader(ref.numbers()))
        else:
            with context:
                predict(module, loader(ref.numbers()))


def test_another_data_set_is_refused(tmp_path):
    predict(stored(tmp_path / "scores"), loader(classes()))
    with pytest.raises(ValueError, match="Choose another folder"):
        predict(stored(tmp_path / "scores"), loader(classes(seed=5)))


def test_stored_gradients_answer_queries_to_come(tmp_path, exact):
    predict(stored(tmp_path / "gradients", mode="gradients", queries=None), loader(classes(), shuffle=True))
    module = influence()
    direct = module.scores(loader(classes()))
    store = RowStore(tmp_path / "gradients")
    close(store.scores(module.solved) / N, direct, rtol=1e-12)
    close(direct, exact)


# -- reuse --------------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """The number of rows multiplied by a curvature so far."""
    from lightning_ext.functional import GGNOperator

    count = [0]
    plain = GGNOperator.__call__

    def counted(self, rows):
        count[0] += len(rows)
        return plain(self, rows)

    monkeypatch.setattr(GGNOperator, "__call__", counted)
    return count


def test_other_queries_use_the_inverse_that_is_there(products):
    module, data = influence(solver="nystrom_cg", rank=20), classes()
    predict(module, loader(data))
    first = products[0]
    assert first > 20, "nothing was counted"
    predict(module, loader(data, shuffle=True))
    assert products[0] == first, "the same queries were solved again"
    module.queries = ref.queries(seed=10)
    found = predict(module, loader(data))
    assert first < products[0] < first + 20 + 3, "the sketch was made again"
    close(matrix(found), ref.Dense(network(*SIZES), data[:]).scores(ref.queries(seed=10), 0.1))


@pytest.mark.parametrize("include", [None, "weight"])
def test_a_network_that_was_trained_on_is_solved_anew(include):
    """Also where what moved is not among the chosen parameters."""
    base, data = network(*SIZES).double(), classes()
    module = InfluenceModule(base, queries=ref.queries(), damping=0.1, include=include)
    predict(module, loader(data))
    with torch.no_grad():
        (base[2].bias if include else base[0].weight).add_(0.3)
    keep = (lambda name: "weight" in name) if include else (lambda name: True)
    wanted = ref.Dense(base, data[:], keep=keep).scores(ref.queries(), 0.1)
    close(matrix(predict(module, loader(data))), wanted)


# -- ranks --------------------------------------------------------------------------------------------------------


RANKS = {
    "block_cg": {"solver": "block_cg"},
    "nystrom_cg": {"solver": "nystrom_cg", "rank": 10},
    "cg": {"solver": "cg"},
    "ekfac": {"solver": "ekfac"},
    "identity": {"solver": "identity"},
    "auto": {"damping": "auto"},
    "self": {"mode": "self", "solver": "nystrom_cg", "rank": 10},
    "self, ekfac": {"mode": "self", "solver": "ekfac"},
    "rescale": {"rescale": True, "solver": "cg"},
    "relative": {"normalize": "parameter", "solver": "cg"},
    "trak": {"solver": "trak", "rank": 8},
    "lanczos": {"solver": "lanczos", "rank": 10},
    "gradients": {"mode": "gradients"},
    "lissa": {"solver": "lissa", "max_iterations": 30},
}


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:lissa stopped")
@pytest.mark.parametrize(("name", "samples"), [*((name, 7) for name in RANKS), ("self", N), ("rescale", N)])
def test_two_ranks_find_what_one_finds(name, samples, tmp_path):
    """Seven samples in batches of two: one rank has two batches, the last of two, the other two with one at the end."""
    batch_size = 2 if samples == 7 else 4  # 23 in fours: three batches on either rank
    data = classes(samples)
    for folder, kwargs in (("one", {}), ("two", ddp_trainer_kwargs(enable_checkpointing=False))):
        module = stored(tmp_path / folder, **RANKS[name])
        Trainer(**{**ref.QUIET, **kwargs}).predict(module, loader(data, batch_size), return_predictions=False)
    one, two = (RowStore(tmp_path / folder) for folder in ("one", "two"))
    assert not len(two.missing())
    close(two.read(torch.arange(samples)), one.read(torch.arange(samples)), rtol=1e-8)


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{"mode": "self"}, {"rescale": True}], ids=str)
def test_a_rank_with_a_batch_less_goes_on_helping(options, tmp_path):
    """Five samples in batches of one: three batches on one rank, two on the other, and every solve needs both."""
    data = classes(5)
    for folder, kwargs in (("one", {}), ("two", ddp_trainer_kwargs(enable_checkpointing=False))):
        module = stored(tmp_path / folder, solver="cg", **options)
        Trainer(**{**ref.QUIET, **kwargs}).predict(module, loader(data, 1), return_predictions=False)
    one, two = (RowStore(tmp_path / folder).read(torch.arange(5)) for folder in ("one", "two"))
    close(two, one, rtol=1e-8)


@pytest.mark.ddp
def test_two_ranks_finish_what_one_began(tmp_path):
    """Some batches are there, on one rank more than on the other."""
    data = classes(9)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(stored(tmp_path / "cut", mode="self", solver="cg"), loader(data, 1), callbacks=[Stop(3)])
    module = stored(tmp_path / "cut", mode="self", solver="cg")
    kwargs = ddp_trainer_kwargs(enable_checkpointing=False)
    Trainer(**kwargs).predict(module, loader(data, 1), return_predictions=False)
    dense = ref.Dense(network(*SIZES), data[:])
    g = dense.gradients()
    close(RowStore(tmp_path / "cut").read(torch.arange(9))[:, 0], (g @ dense.inverse(0.1) * g).sum(1))


@pytest.mark.ddp
def test_gather_on_two_ranks(exact):
    class Gather(Callback):  # forked ranks keep no predictions
        def on_predict_start(self, trainer, pl_module):
            self.found = []

        def on_predict_batch_end(self, trainer, pl_module, outputs, *args):
            self.found.append(outputs)

        def on_predict_end(self, trainer, pl_module):
            assert (trainer.world_size, len(self.found)) == (2, 3)
            close(InfluenceScores.gather(self.found), exact)

    predict(influence(solver="cg"), loader(classes(), 4), **ddp_trainer_kwargs(callbacks=[Gather()]))
