"""Writing files so that a crash leaves the old content or the new, never half of it."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snn_lib.errors import RunError


def write_atomically(path: Path, content: bytes, sync: bool = True) -> None:
    """Writes a file beside ``path``, then renames it to ``path``.

    The file is synced before the renaming, so whatever happens, ``path`` holds its old content or
    the new, never part of one.

    Args:
        path: the file.
        content: what is to be in it.
        sync: leave it out for one of very many files, which a checksum tells from what a failure of
            power has left of it.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes what a process that was killed while it wrote ``path`` has left beside it."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows atomically; a column for every key, empty where a row lacks it."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
