"""The two ways in which an experiment ends early, each with one line for its user."""


class InputError(Exception):
    """The user's input is wrong: the message says what, and how to mend it (exit code 2)."""


class RunError(Exception):
    """The run failed though the input was fine (exit code 1)."""


def require(condition: bool, message: str) -> None:
    """Raises :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
