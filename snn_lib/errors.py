"""The two ways in which an experiment ends early, and the one line that it prints then."""


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


def limit_length(message: str, longest: int = 1000) -> str:
    """A message without its middle if it is very long, as when a name has thousands of letters."""
    half = longest // 2
    return message if len(message) <= longest else f"{message[:half]} ... {message[-half:]}"
