"""What a user can cause, said in one sentence, with the exit code that goes with it."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend: says what was found, what was expected and what to type next.

    The command line prints the message alone (no traceback) and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(UserError):
    """A flag or a configuration key that cannot be understood."""

    exit_code = 2


class SaidByTheFirst(UserError):
    """An error of the first of several processes, which says it: the others end with it and say nothing."""
