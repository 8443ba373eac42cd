"""A peer that is not there has rows that say so; what stands in for unused packages goes again."""

import importlib
import sys

import pytest


@pytest.fixture
def peers(scripts):
    pytest.importorskip("sklearn")
    import _laftr_peers

    return _laftr_peers


def test_packages_that_a_peer_does_not_need_are_stood_in_for_while_it_is_imported(peers, monkeypatch):
    monkeypatch.setattr(peers, "UNUSED", ("package_of_nobody",))
    finders = list(sys.meta_path)
    with peers.stand_ins():
        deep = importlib.import_module("package_of_nobody.transforms.functional")
        assert isinstance(deep.Compose(1, size=2), deep.Compose)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("another_package_of_nobody")
    assert sys.meta_path == finders
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("package_of_nobody")


def test_rows_of_an_absent_peer_say_why(peers, monkeypatch):
    import laftr

    monkeypatch.setattr(peers, "avalanche_version", lambda: None)
    rows = laftr.avalanche_steps()
    assert len(rows) == 4
    assert {row.met for row in rows} == {None}
    assert all("make bench" in row.why for row in rows)
