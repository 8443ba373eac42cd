"""The checks that every component must pass: ``CHECKS`` maps a name to the kinds it is for and the function.

A check takes an :class:`entry.Entry` and raises when something is wrong.
"""

import checks_parts
import checks_processes
import checks_training
from suite import CHECKS

__all__ = ["CHECKS", "checks_parts", "checks_processes", "checks_training"]
