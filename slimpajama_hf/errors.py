"""Errors that a user can cause: each is one sentence and an exit code."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix. The message says what was found, what was expected and what to type next.

    The command line prints the message alone (no traceback) and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(UserError):
    """A flag or a configuration key that cannot be understood."""

    exit_code = 2


class SaidByTheFirst(UserError):
    """An error of the first of several processes, which prints it. The others raise this to end without a word."""


def one_line(error: BaseException) -> str:
    """The words of an error in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
