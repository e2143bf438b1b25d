"""The errors that end an experiment, and the line that it then prints."""

import contextlib
import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

LIBRARIES = f"{Path(__file__).parent}{os.sep}", sysconfig.get_path("stdlib"), "<frozen"
INSTALLED = {"site-packages", "dist-packages"}  # wherever pip or the system puts packages
CYTHON = ".pyx", ".pxd", ".pxi"


class InputError(Exception):
    """The user's input is wrong. The message says what, and how to mend it (exit code 2)."""


class SettingsError(InputError):
    """A setting is allowed by itself, but does not fit another one, a layer or the data."""


class BusyError(InputError):
    """The run is being trained already."""


class RunError(Exception):
    """The run failed although the input was right (exit code 1)."""


class WriteError(RunError):
    """A file cannot be written, whatever the settings are."""


def require(condition: bool, message: str, error: type[Exception] = InputError) -> None:
    """Raises ``error`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise error(message)


@contextlib.contextmanager
def refusing(words: str, kind: type[InputError] = SettingsError) -> Iterator[None]:
    """A context in which what a layer or backend refuses becomes a line that begins so."""
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        raise kind(f"{words}{error}") from None


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def place_of(error: BaseException) -> str:
    """Names the innermost line of the user's own code from which an error came."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(LIBRARIES)
        and not frame.filename.endswith(CYTHON)  # which names no folder
        and not INSTALLED & {*Path(frame.filename).parts}
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that PyTorch or Python could not allocate memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "size calculation overflowed")
    )


def limit_length(message: str) -> str:
    """A message, without its middle if it is very long, because it names a very long path, say."""
    return message if len(message) <= 1000 else f"{message[:500]} ... {message[-500:]}"
