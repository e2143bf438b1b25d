"""The two ways in which an experiment ends early, each with one line for its user."""


class InputError(Exception):
    """The user's input is wrong: the message says what, and how to mend it (exit code 2)."""


class RunError(Exception):
    """The run failed though the input was fine (exit code 1)."""
