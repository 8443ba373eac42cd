"""Every public component passes every check of its kind; adding a component is one entry in ``registry.py``."""

import importlib
import inspect

import pytest
from torch import nn

from tests.conformance.checks import CHECKS
from tests.conformance.registry import NOT_COMPONENTS, REGISTRY, TOYS

CASES = [
    pytest.param(entry, name, marks=getattr(function, "pytestmark", []), id=f"{entry.id}-{name}")
    for entry in (*REGISTRY, *TOYS)
    for name, (kinds, function) in CHECKS.items()
    if entry.kind in kinds
]


@pytest.mark.parametrize(("entry", "name"), CASES)
def test_conformance(entry, name):
    if name in entry.skip:
        pytest.skip(entry.skip[name])
    CHECKS[name][1](entry)


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.id)
def test_what_does_not_apply_has_a_reason(entry):
    applying = {name for name, (kinds, _) in CHECKS.items() if entry.kind in kinds}
    assert set(entry.skip) <= applying, f"skip names checks that do not exist: {set(entry.skip) - applying}"
    assert all(isinstance(reason, str) and len(reason.split()) > 3 for reason in entry.skip.values())


def test_labels_are_unique():
    ids = [entry.id for entry in REGISTRY]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kind", ["callbacks", "modules", "metrics", "nn", "data"])
def test_every_public_name_is_registered(kind):
    package = importlib.import_module(f"lightning_ext.{kind}")
    public = {name for name in package.__all__ if inspect.isclass(getattr(package, name))}
    if kind == "nn":
        public = {name for name in public if issubclass(getattr(package, name), nn.Module)}
    registered = {name for entry in REGISTRY for name in entry.names}
    missing = public - registered - set(NOT_COMPONENTS)
    assert not missing, f"add an entry to tests/conformance/registry.py for {sorted(missing)}"


def test_exceptions_have_reasons_and_are_not_registered_as_well():
    registered = {name for entry in REGISTRY for name in entry.names}
    assert all(len(reason.split()) > 3 for reason in NOT_COMPONENTS.values())
    assert not registered & set(NOT_COMPONENTS)
