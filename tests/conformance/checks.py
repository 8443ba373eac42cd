"""The checks that every component must pass: ``CHECKS`` maps a name to the kinds it is for and the function.

A check takes an :class:`entry.Entry` and raises when something is wrong.
"""

from tests.conformance import checks_parts, checks_processes, checks_training
from tests.conformance.suite import CHECKS

__all__ = ["CHECKS", "checks_parts", "checks_processes", "checks_training"]
