"""What all errors have in common that a user can mend, and those of training."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can mend: what was given, what was expected, where, and what to do.

    The verbs show the message in one line and end with status 1.
    """


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says why and what to do."""
