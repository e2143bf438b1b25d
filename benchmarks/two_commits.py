"""What a change costs or gains: two commits in one run, in turns.

    python benchmarks/two_commits.py main HEAD
    python benchmarks/two_commits.py main HEAD --threads 1 --rows "T = 25" stream

Both commits are unpacked into temporary folders, where this file's own benchmarks take the place of
theirs. A process of each stays alive and is asked for one timing after the other, A B B A and so
on, so a drift of the machine hits both alike. A ratio below 1 means that B is faster. It is that of
the two visits of a round; printed are its median and quartiles over all rounds.

``beyond the dense network`` is what a training step takes more than one of a dense network of the
same matrix products, in parts of that step. ``first use`` is a process that imports the library and
takes one small step where no compiled code is kept yet, and ``again`` is the same once more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from measuring import ROOT, Trial
from networks import DIGITS, FLOOR, MEMORY, PIXELS, SNN, Network, Variant

import snn_lib
from snn_lib.inference import compiled

ROUNDS, SECONDS = 16, 0.3  # visits to each commit, and how long each measure of one lasts at least
FIRST_ROUNDS = 2
STEPS = 200  # of a stream that are timed at once

Visit = dict[str, list[float]]  # the seconds of all runs of each measure


class Training:
    """Training steps of a network and of the dense network of the same products."""

    def __init__(self, network: Network, precision: str, small: bool) -> None:
        network = network.small() if small else network
        variants = {"step": Variant("", SNN), "dense": FLOOR}
        self.trials = {
            name: Trial(replace(variant, precision=precision), network, "cpu")
            for name, variant in variants.items()
        }

    def visit(self, seconds: float) -> Visit:
        return {name: trial.visit("training", seconds) for name, trial in self.trials.items()}


class Stream:
    """Steps of a compiled pretrained network, on random input."""

    def __init__(self, name: str, small: bool) -> None:
        self.network = compiled(snn_lib.load(ROOT / "checkpoint" / f"pretrained_{name}"))
        shape = (3 if small else STEPS, *self.network.before)
        self.x = (np.random.default_rng(0).random(shape) < 0.1).astype(self.network.dtype)

    def visit(self, seconds: float) -> Visit:
        durations: list[float] = []
        while sum(durations) * len(self.x) < seconds or not durations:
            self.network.reset()
            start = time.perf_counter()
            for x in self.x:
                self.network.step(x)
            durations.append((time.perf_counter() - start) / len(self.x))
        return {"step": durations}


ROWS: dict[str, Callable[[bool], Training | Stream]] = {
    f"training, T = {network.steps}, {precision}": partial(Training, network, precision)
    for network in (DIGITS, MEMORY, PIXELS)
    for precision in ("float32", "bfloat16")
} | {
    f"stream, {name}": partial(Stream, name)
    for name in ("sequential_mnist", "snn_mlp_1", "event_vision")
}
FIRST = ("training, T = 25, float32", "stream, sequential_mnist")


def serve(small: bool) -> None:
    """What a process does: it answers requests, a line each, and holds one row at a time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    subject, held = None, None
    for line in sys.stdin:
        row, seconds = json.loads(line)
        if row != held:
            subject = None  # its memory is free before the next row is built
            subject, held = ROWS[row](small), row
            subject.visit(0.0)
        print(json.dumps(subject.visit(seconds)), file=answers, flush=True)


class Side:
    """One of the two commits, unpacked into a folder, and its process."""

    def __init__(self, commit: str, folder: Path) -> None:
        self.commit, self.folder, self.process = commit, folder, None
        unpack(commit, folder)

    def command(self, threads: int, *arguments: str) -> dict:
        return {
            "args": [sys.executable, "benchmarks/two_commits.py", *arguments],
            "cwd": self.folder,
            "env": {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""},
            "text": True,
        }

    def start(self, threads: int, small: bool) -> None:
        command = self.command(threads, "--serve", *["--smoke"] * small)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(**command, **pipes)

    def visit(self, row: str, seconds: float) -> Visit:
        print(json.dumps([row, seconds]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"commit {self.commit} cannot run {row!r}: see above")
        return json.loads(answer)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def unpack(commit: str, folder: Path) -> None:
    """Writes the files of a commit, with the benchmarks of this file's folder in place of its."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise SystemExit(f"{commit!r} is no commit: {archive.stderr.decode().strip()}")
    folder.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    (folder / "benchmarks").mkdir()
    for path in Path(__file__).parent.glob("*.py"):
        shutil.copy(path, folder / "benchmarks")


def in_turns(count: int) -> list[tuple[int, int]]:
    """The order of both sides in each round: A B, B A, A B, ..."""
    return [(0, 1) if number % 2 == 0 else (1, 0) for number in range(count)]


def compare(a: Sequence[Visit], b: Sequence[Visit]) -> dict[str, float]:
    """Medians of both in seconds, the quartiles of B / A, and what each costs beyond dense."""
    steps = [[statistics.median(visit["step"]) for visit in side] for side in (a, b)]
    ratio = np.quantile(np.divide(steps[1], steps[0]), (0.25, 0.5, 0.75))
    found = dict(zip(("a", "b"), map(statistics.median, steps), strict=True))
    found |= dict(zip(("ratio_q25", "ratio", "ratio_q75"), map(float, ratio), strict=True))
    if "dense" in a[0]:
        for name, side, own in (("a", a, steps[0]), ("b", b, steps[1])):
            dense = [statistics.median(visit["dense"]) for visit in side]
            found[f"beyond_{name}"] = float(np.median(np.divide(own, dense))) - 1
    return found


def show(row: str, threads: int, found: dict[str, float]) -> None:
    """Prints the line of a row."""
    unit, scale = ("us", 1e6) if found["a"] < 1e-3 else ("ms", 1e3)
    spread = f"({found['ratio_q25']:.3f} to {found['ratio_q75']:.3f})"
    line = f"{row:30} {threads} thread{'s' * (threads > 1):1}"
    line += f"{scale * found['a']:9.1f} {scale * found['b']:9.1f} {unit}"
    line += f"   B / A {found['ratio']:.3f} {spread}"
    if "beyond_a" in found:
        line += f"   beyond the dense network {found['beyond_a']:.2f} {found['beyond_b']:.2f}"
    print(line, flush=True)


def first_use(commits: Sequence[str], row: str, folder: Path, chosen: argparse.Namespace) -> None:
    """Prints how long a process takes for a small step, without and with compiled code."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for number, order in enumerate(in_turns(1 if chosen.smoke else FIRST_ROUNDS)):
        for index in order:
            side = Side(commits[index], folder / f"{row} {number} {index}")  # nothing is kept here
            command = side.command(1, "--serve", "--smoke")
            command["env"] |= {
                name: str(side.folder / "cache") for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
            }
            for kind in ("first use", "again"):
                start = time.perf_counter()
                subprocess.run(
                    **command, input=json.dumps([row, 0.0]), stdout=subprocess.PIPE, check=True
                )
                seconds.setdefault((kind, index), []).append(time.perf_counter() - start)
            shutil.rmtree(side.folder)
    for kind in ("first use", "again"):
        a, b = (statistics.median(seconds[kind, index]) for index in (0, 1))
        print(f"{kind}, {row:40} {a:6.1f} {b:6.1f} s   B / A {b / a:.2f}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="A and B")
    parser.add_argument("--rows", nargs="+", default=[""], help="parts of the rows' names")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to see that it runs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not chosen.serve and len(chosen.commits) != 2:
        parser.error("name two commits")
    return chosen


def main() -> None:
    chosen = parse()
    if chosen.serve:
        serve(chosen.smoke)
        return
    rows = [row for row in ROWS if any(part in row for part in chosen.rows)]
    rounds, seconds = (2, 0.0) if chosen.smoke else (chosen.rounds, SECONDS)
    print("A, B:", *chosen.commits, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(c, Path(folder) / name) for c, name in zip(chosen.commits, "AB", strict=True)]
        for threads in chosen.threads:
            try:
                for side in sides:
                    side.start(threads, chosen.smoke)
                for row in rows:
                    visits: tuple[list[Visit], list[Visit]] = ([], [])
                    for order in in_turns(rounds):
                        for index in order:
                            visits[index].append(sides[index].visit(row, seconds))
                    show(row, threads, compare(*visits))
            finally:
                for side in sides:
                    side.stop()
        for row in FIRST:
            if row in rows:
                first_use(chosen.commits, row, Path(folder), chosen)


if __name__ == "__main__":
    main()
