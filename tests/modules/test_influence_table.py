"""Scores in a folder: with and without a Trainer, gone on with, solved once, and told how they were solved."""

import logging

import pytest
import torch

from lightning_ext._lightning import Callback, Trainer
from lightning_ext.data import RowStore
from lightning_ext.modules import InfluenceModule
from lightning_ext.testing import ddp_trainer_kwargs
from tests.modules import influence_reference as ref
from tests.modules.influence_reference import N, classes, close, loader, matrix, network, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
SIZES = (4, 5, 3)
FOUND = "lightning_utilities.core.rank_zero"


def stored(folder, **kwargs):
    options = {"queries": ref.queries(), "damping": 0.1, "double": True, "tol": 1e-10, "output_dir": folder, **kwargs}
    return InfluenceModule(network(*SIZES), **options)


@pytest.fixture
def solves(monkeypatch):
    """The number of times that an inverse was built."""
    from lightning_ext.modules import _influence_engine

    count, build = [0], _influence_engine.build_inverse

    def counted(*args):
        count[0] += 1
        return build(*args)

    monkeypatch.setattr(_influence_engine, "build_inverse", counted)
    return count


RUNS = {
    "pairwise": lambda module: module.scores(loader(classes(), shuffle=True)),
    "self": lambda module: module.self_influence(loader(classes(), shuffle=True))[None],
}


@pytest.mark.parametrize("mode", RUNS)
def test_scores_without_a_trainer_stream_to_the_folder(mode, tmp_path):
    found = RUNS[mode](stored(tmp_path / "alone", mode=mode))
    close(RowStore(tmp_path / "alone").read().mT, found)
    close(found, RUNS[mode](stored(None, mode=mode)))
    close(matrix(predict(stored(tmp_path / "trainer", mode=mode), loader(classes()))), found)
    assert RowStore(tmp_path / "alone").fingerprint == RowStore(tmp_path / "trainer").fingerprint


@pytest.mark.parametrize("mode", RUNS)
def test_what_was_cut_off_without_a_trainer_goes_on(mode, tmp_path, monkeypatch):
    write, calls = RowStore.write, []

    def cut(self, indices, rows):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt("the power went")
        write(self, indices, rows)

    monkeypatch.setattr(RowStore, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        RUNS[mode](stored(tmp_path, mode=mode))
    assert len(RowStore(tmp_path).missing()) == N - 10
    found = RUNS[mode](stored(tmp_path, mode=mode))
    assert torch.cat(calls[3:]).tolist() == list(range(10, N)), "rows that were there were computed again"
    close(found, RUNS[mode](stored(None, mode=mode)))


def test_scores_of_another_mode_say_that_they_are_not_written(tmp_path):
    with pytest.warns(UserWarning, match=r"output_dir is for mode='pairwise'.*mode='self'.*not written"):
        stored(tmp_path / "rows").self_influence(loader(classes()))
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("options", [{}, {"mode": "self"}, {"mode": "gradients"}, {"rescale": True}], ids=str)
def test_a_complete_table_is_not_solved_again(options, tmp_path, solves, caplog):
    first = stored(tmp_path, solver="nystrom_cg", rank=20, **options)
    wanted = predict(first, loader(classes()))
    built, said = solves[0], first.report
    assert built == (options.get("mode") != "gradients"), "nothing was counted"
    again = stored(tmp_path, solver="nystrom_cg", rank=20, **options)
    with caplog.at_level(logging.INFO, logger=FOUND):
        found = predict(again, loader(classes()))
    assert solves[0] == built
    assert f"{N} of {N} rows were found in {tmp_path}: nothing is left to compute" in caplog.text
    assert again.report == said
    if options.get("mode") != "gradients":
        close(matrix(found), matrix(wanted), 1e-12)


@pytest.mark.parametrize("mode", RUNS)
def test_a_complete_table_is_not_solved_again_without_a_trainer(mode, tmp_path, solves):
    wanted = RUNS[mode](stored(tmp_path, mode=mode))
    assert solves[0] == 1
    close(RUNS[mode](stored(tmp_path, mode=mode)), wanted, 1e-12)
    assert solves[0] == 1


class Stop(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise KeyboardInterrupt("the power went")


def test_a_run_that_goes_on_says_what_it_found(tmp_path, solves, caplog):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(stored(tmp_path), loader(classes()), callbacks=[Stop()])
    with caplog.at_level(logging.INFO, logger=FOUND):
        predict(stored(tmp_path), loader(classes()))
    assert f"10 of {N} rows were found in {tmp_path}: the others are computed" in caplog.text
    assert solves[0] == 2


def test_the_report_of_a_table_is_the_worst_of_its_runs(tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(stored(tmp_path, mode="self", solver="cg"), loader(classes()), callbacks=[Stop()])
    store = RowStore(tmp_path)
    store.write_report({"iterations": 1000, "residual": 0.5, "converged": False})  # as the first run could have ended
    module = stored(tmp_path, mode="self", solver="cg")
    predict(module, loader(classes()))
    assert module.report["converged"] is True
    said = store.report
    assert (said["iterations"], said["residual"], said["converged"], said["solver"]) == (1000, 0.5, False, "cg")


# -- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.ddp
def test_the_report_comes_back_from_forked_ranks(tmp_path):
    kwargs = ddp_trainer_kwargs(enable_checkpointing=False)
    module = stored(tmp_path, solver="cg")
    assert module.report == {}
    Trainer(**{**ref.QUIET, **kwargs}).predict(module, loader(classes()), return_predictions=False)
    assert (module.report["solver"], module.report["converged"]) == ("cg", True)
    assert 0 <= module.report["residual"] <= 1e-10
    assert RowStore(tmp_path).report == module.report


class Refusing(InfluenceModule):
    """Does not come to an inverse."""

    @property
    def _prepared(self):
        engine = super()._prepared
        if engine._inverse is not None:
            raise AssertionError("solved again")
        return engine


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{}, {"mode": "self"}], ids=str)
def test_forked_ranks_do_not_solve_a_complete_table_again(options, tmp_path):
    options = {"queries": ref.queries(), "damping": 0.1, "solver": "cg", "output_dir": tmp_path, **options}
    for kind in (InfluenceModule, Refusing):
        trainer = Trainer(**{**ref.QUIET, **ddp_trainer_kwargs(enable_checkpointing=False)})
        trainer.predict(kind(network(*SIZES), **options), loader(classes(), 4), return_predictions=False)


KEPT = "kept nowhere.*output_dir"


def test_scores_that_nobody_keeps_are_warned_of(tmp_path, recwarn):
    for bar in (False, True):
        with pytest.warns(UserWarning, match=KEPT):
            predict(stored(None), loader(classes()), return_predictions=False, enable_progress_bar=bar)
    recwarn.clear()
    predict(stored(None), loader(classes()))
    predict(stored(tmp_path), loader(classes()), return_predictions=False)
    predict(stored(None), loader(classes()), return_predictions=False, callbacks=[Reader()])
    assert not [w for w in recwarn if "kept nowhere" in str(w.message)]


class Reader(Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        assert outputs["scores"].isfinite().all()


@pytest.mark.ddp
def test_forked_ranks_warn_of_scores_that_nobody_keeps():
    """Where warnings of this library are errors, the warning ends the run, and so it is seen from here."""
    with pytest.raises(Exception, match="kept nowhere"):
        Trainer(**{**ref.QUIET, **ddp_trainer_kwargs(enable_checkpointing=False)}).predict(
            stored(None, solver="cg"), loader(classes()), return_predictions=False
        )
