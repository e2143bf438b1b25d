"""The wrong changes in ``mutants`` can be tried at any time."""

import runpy
import subprocess

from running import ROOT

PATCHES = sorted((ROOT / "tests/mutants").glob("*.patch"))
RUN = runpy.run_path(str(ROOT / "tests/mutants/run.py"))


def test_every_change_applies_to_the_code():
    apply = ["git", "apply", "--check", "--recount"]
    done = {p.stem: subprocess.run([*apply, p], cwd=ROOT, capture_output=True) for p in PATCHES}
    assert not [name for name, process in done.items() if process.returncode]


def test_the_tests_that_ought_to_notice_a_change_exist():
    missing = []
    for patch in PATCHES:
        for test in RUN["tests_of"](patch):
            path, _, name = test.partition("[")[0].partition("::")
            source = (ROOT / path).read_text()
            if name and f"\ndef {name}(" not in source:
                missing.append(f"{patch.stem}: {test}")
    assert not missing
