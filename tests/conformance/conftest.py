"""The checks are not test files, but their bare asserts should explain themselves just as well."""

import pytest

for name in ("suite", "checks_parts", "checks_processes", "checks_training"):
    pytest.register_assert_rewrite(f"tests.conformance.{name}")
