"""Runs experiments for the tests: in this process, or in one of their own where signals matter."""

import contextlib
import io
import itertools
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm

import snn_lib.kernels.cpu  # noqa: F401 (imported late otherwise, by every process)
import snn_mlp_1
from snn_lib import DualExponentialSynapse, Sequential, SpikingNeuron
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.training.command_line import main
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment, Stopped

tqdm.get_lock()  # of the server too: a process that is killed would leave its own behind

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "snn_mlp_1.py"
# Those that have a pretrained network, which scripts of users, who may keep them here, have not.
SCRIPTS = [s for s in (p.stem for p in ROOT.glob("*.py")) if any(ROOT.glob(f"*checkpoint/*_{s}"))]
# By name, the scripts' YAML files and the variants.
FILES = [*(ROOT / f"{script}.yaml" for script in SCRIPTS), *ROOT.glob("configs/*.yaml")]
YAML = {path.stem: path for path in sorted(FILES)}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = (
    "mnist_config.training_size=256",
    "mnist_config.validation_size=100",
    "mnist_config.test_size=100",
    "hyperparameters.length=6",
    "hyperparameters.epoch=2",
    # The default recipe may change, what the tests count on may not.
    "hyperparameters.weight_averaging=0",
    "optimizer.optimizer_choice=AdamW",
    "scheduler.scheduler_choice=OneCycleLR",
    "scheduler.OneCycleLR.max_lr=0.01",
    "device=cpu",
    f"dataset_path={ROOT / 'dataset'}",
)


def tiny(folder, *overrides):
    """Overrides for a run of a second on real digits, which writes under ``folder``."""
    other = any(one.startswith("scheduler.scheduler_choice=") for one in overrides)
    usual = [one for one in TINY if not (other and one.startswith("scheduler."))]
    return [*usual, f"runs_path={folder}/runs", "test_checkpoint_path=''", *overrides]


def the_run(folder, name="*"):
    """The folder of the one run under ``folder``."""
    (path,) = Path(folder).glob(f"runs/{name}/*/")
    return path


class SmallSNN(nn.Module):
    """784-20-10, quicker than the scripts' model."""

    def __init__(self, config):
        super().__init__()
        options = config.hyperparameters
        self.layers = Sequential(
            DualExponentialSynapse(
                784, options.tau_m, options.tau_s, constraint=options.constraint
            ),
            nn.Linear(784, 20),
            SpikingNeuron(20, options.tau_m, dropout=options.dropout),
            DualExponentialSynapse(20, options.tau_m, options.tau_s, constraint=options.constraint),
            nn.Linear(20, 10),
            SpikingNeuron(10, options.tau_m),
        )

    def forward(self, x, state=None):
        return self.layers(x, state)


class Answer(nn.Module):
    """Gives this output, whatever its input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@dataclass
class Finished:
    code: int
    out: str
    err: str


def run(*arguments, model=snn_mlp_1.SNN, task=None, initialise=None, script=SCRIPT):
    """Runs a script with this model and task in this process."""
    task = task or DigitClassification()
    return _finished(lambda: main(str(script), model, task, initialise, [*map(str, arguments)]))


def run_script(name, *arguments):
    """Runs one of the repository's scripts in this process, as ``python name arguments`` does."""
    with patch.object(sys, "argv", [str(name), *map(str, arguments)]):
        return _finished(lambda: runpy.run_path(str(ROOT / name), run_name="__main__"))


def _finished(work):
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            work()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        torch.set_num_threads(threads)
    return Finished(code, out.getvalue(), err.getvalue())


def experiment(overrides, stop_after=None, task=None):
    """An experiment with SmallSNN that is asked to stop after so many batches."""
    asked = itertools.count(1)
    config = load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), overrides, SCRIPT)
    task = task or DigitClassification()
    return Experiment(SmallSNN, task, config, stop_requested=lambda: next(asked) == stop_after)


def stopped(overrides, after, task=None):
    """The same, trained until it stopped."""
    trial = experiment(overrides, after, task)
    try:
        trial.train()
    except Stopped:
        return trial
    raise AssertionError(f"it was not stopped after {after} batches")


def prepared(kind, config, rank=0, world=1):
    """A task that is prepared on the CPU and takes a process's share of every batch."""
    task = kind()
    task.setup(config, torch.device("cpu"))
    task.share(rank, world)
    return task


def train(*arguments, **options):
    """Trains in this process and expects no trouble."""
    finished = run("--train", *arguments, **options)
    assert finished.code == 0, finished.err
    return finished


def accuracy(finished):
    """The test accuracy, in per cent, that a run without trouble printed."""
    assert finished.code == 0, finished.err
    (found,) = re.findall(r"test loss [\d.]+, accuracy ([\d.]+) %", finished.out)
    return float(found)


def refused(*arguments, script=SCRIPT, **options):
    """The one line with which bad input is refused, without the script's name."""
    finished = run(*arguments, script=script, **options)
    assert finished.code == 2, finished
    assert finished.err.startswith(f"{script.name}: ")
    assert finished.err.count("\n") == 1
    return finished.err.removeprefix(f"{script.name}: ").rstrip("\n")


def forkserver():
    """Makes processes of a server that has imported PyTorch, the tests' modules and the benchmarks'
    once, so that each starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["running", "measuring"])
    # Python 3.11 does not hand sys.path on to the server; what is not found is silently left out.
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        ensure_running()
    return context


class Process:
    """A script with SmallSNN in a process of its own; ``prepare`` is called there first."""

    def __init__(self, folder, *arguments, environment=None, prepare=None):
        self.files = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        self.process = forkserver().Process(
            target=_script, args=(self.files, arguments, environment or {}, prepare)
        )
        self.process.start()
        self.pid = self.process.pid

    def send(self, number):
        """Sends a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        """Ends it without its having a say."""
        self.send(signal.SIGKILL)

    def wait(self, timeout=120):
        """Waits for its end; a negative exit code is the signal that ended it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"no end after {timeout} s: {self.out}{self.err}")
        return Finished(self.process.exitcode, self.out, self.err)

    def wait_for(self, text, times=1):
        """Waits until it has printed the text so many times."""
        deadline = time.monotonic() + 120
        while self.out.count(text) < times:
            assert self.process.is_alive(), self.out + self.err
            assert time.monotonic() < deadline, self.out + self.err
            time.sleep(0.005)

    @property
    def out(self):
        """What it has printed so far."""
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def err(self):
        """The same of its error stream."""
        return self.files[1].read_text() if self.files[1].exists() else ""


def _script(files, arguments, environment, prepare):
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    # multiprocessing gives its children no standard streams of their own.
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    if prepare is not None:
        prepare()
    main(str(SCRIPT), SmallSNN, DigitClassification(), arguments=list(map(str, arguments)))


def shell(*command, **options):
    """Runs a command as a user would, from the folder of the scripts."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 240, **options}
    done = subprocess.run(list(map(str, command)), env=ONE_THREAD, check=False, **options)
    return Finished(done.returncode, done.stdout, done.stderr)


def load(path):
    """A checkpoint, as PyTorch reads it."""
    return torch.load(path, weights_only=True)


def assert_same_weights(one, other):
    """Whether two checkpoints hold the same weights, bit for bit."""
    one, other = load(one)["snn_state_dict"], load(other)["snn_state_dict"]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def metrics_of(folder):
    """The one metrics.csv under ``folder``, as rows without the columns that tell time."""
    text = (the_run(folder) / "metrics.csv").read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    kept = [i for i, name in enumerate(header) if name not in ("seconds", "data_seconds")]
    return [[row[i] for i in kept] for row in (header, *rows)]
