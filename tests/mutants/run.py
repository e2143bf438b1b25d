"""Applies wrong changes to the code, one at a time, and says whether the tests notice.

    python tests/mutants/run.py                    # all of them
    python tests/mutants/run.py lose_a_state sign  # those whose names contain one of these words

Each ``*.patch`` here is a unified diff with a head: a sentence that says what is then wrong for the
user, and a line ``tests:`` with the files, or single tests, that ought to fail. They run in a copy
of the working tree. First they run without any of the changes, since tests that fail anyway notice
nothing. The exit code is 1 unless every change is caught.

A patch that no longer applies, because the code has become another, is to be made anew from its
sentence.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as in the suite, before PyTorch is imported

# Imported here, and not by the process of each change.
import hypothesis  # noqa: F401
import numba  # noqa: F401
import pytest
import scipy.signal  # noqa: F401
import torchvision  # noqa: F401

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERDICTS = {0: "NOT CAUGHT", 1: "caught"}  # by pytest's exit code


def main() -> int:
    words = sys.argv[1:] or [""]
    patches = [p for p in sorted(HERE.glob("*.patch")) if any(word in p.stem for word in words)]
    if not patches:
        print("no change has such a name")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        every_test = sorted({test for patch in patches for test in tests_of(patch)})
        code, printed = run_tests(copy, every_test)
        if code:
            print(f"{printed[-3000:]}the tests fail without any of the changes")
            return 1
        verdicts = [tell(copy, patch) for patch in patches]
    print(f"{verdicts.count('caught')} of {len(patches)} changes are caught")
    return int(set(verdicts) != {"caught"})


def copy_tree(copy: Path) -> None:
    """Copies what git keeps or does not ignore, as it is in the working tree."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    copy_files(ROOT, copy, [name for name in names.split("\0") if (ROOT / name).is_file()])


def copy_files(origin: Path, copy: Path, names: list[str]) -> None:
    """Copies files with their times, by which Python and Numba know what they have compiled."""
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin / name, copy / name)


def tests_of(patch: Path) -> list[str]:
    """What the patch's head says ought to fail."""
    lines = patch.read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith("tests: "))


def run_tests(copy: Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests in the copy until one fails; returns pytest's exit code and what it has printed.

    The process is a fork of this one, which has imported the large packages already.
    """
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            os.chdir(copy)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(printed.fileno(), stream.fileno())
            code = pytest.main(["-q", "-x", "-n", "0", *tests])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(status), printed.read().decode(errors="replace")


def tell(copy: Path, patch: Path) -> str:
    """Applies a patch to the copy, runs its tests, takes the patch back and prints the verdict."""
    lines = patch.read_text().splitlines()
    changed = [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ b/")]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder)
        copy_files(copy, before, [name for name in changed if (copy / name).is_file()])
        apply = ["git", "apply", "--recount", patch]
        if subprocess.run(apply, cwd=copy, check=False, capture_output=True).returncode:
            verdict = "does not apply"
        else:
            code, _ = run_tests(copy, tests_of(patch))
            verdict = VERDICTS.get(code, f"pytest ends with {code}")
        copy_files(before, copy, [name for name in changed if (before / name).is_file()])
    print(f"{verdict:15} {patch.stem}", flush=True)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
