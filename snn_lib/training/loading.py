"""Loads a trained network: ready for use, without its training data.

    network = snn_lib.load("runs/rising/2026-11-26_15-07-00/best")
    names, scores = network.classify(x)

A checkpoint holds the weights, how input is prepared, the readout and the names of the classes. It
names ``build_model``, which makes the layers, and the class of the settings.
"""

import importlib
import runpy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.data.preparation import NetworkInput, Preparation, preparation_from
from snn_lib.errors import InputError, one_line, refusing, require
from snn_lib.readout import EVERY_STEP, READOUTS, at_least_float32
from snn_lib.rounding import WEIGHT_BITS, round_weights
from snn_lib.tasks.base import output_of
from snn_lib.training.building import BuildModel, build
from snn_lib.training.checkpoints import Checkpoint, load_checkpoint, load_weights
from snn_lib.training.config import config_from_dict

LIBRARY = Path(__file__).parents[1]
LOADING = threading.RLock()  # all threads share their modules and generators


def load(
    path: str | Path, build_model: BuildModel | None = None, config_class: type | None = None
) -> "TrainedNetwork":
    """Loads a trained network onto the CPU, in evaluation mode.

    Args:
        path: a checkpoint: ``best`` or ``last`` of a run, or a pretrained model.
        build_model: makes the layers from the configuration, as in the experiment. By default it is
            imported beside the script that wrote the checkpoint, which is looked for in the folders
            above the checkpoint, the nearest first, and in the current folder. Threads wait for
            each other while it runs, so it starts none that load networks.
        config_class: the class of the settings, if ``build_model`` reads more of them than the
            checkpoint holds, such as properties or newer ones. Without a ``build_model`` it is
            imported, too.

    Raises:
        InputError: the checkpoint is missing, damaged or of another network, its weights are not
            finite, or its script is not found.
    """
    if not Path(path).exists():
        raise InputError(
            f"there is no file {path}, seen from {Path.cwd()}; the pretrained models are in a "
            "clone of the repository and are not installed with the library"
        )
    checkpoint = load_checkpoint(path)
    if build_model is not None:
        with LOADING:
            return trained_network(checkpoint, build_model, config_class)
    script = find_script(checkpoint)
    # The script may seed PyTorch's generator, and build_model may import as well.
    with importing_from(script.resolve().parent) as own, torch.random.fork_rng(devices=[]):
        try:
            maker = imported(checkpoint.get("build_model"), own)
            config_class = config_class or imported(checkpoint.get("config_class"), own)
            if maker is None:  # earlier versions named none
                maker, task, _ = arguments_of_main(script)
                config_class = config_class or task.config_class
        except (Exception, SystemExit) as error:  # a user's script may raise anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"{script} does not give its build_model: {reason}") from error
        return trained_network(checkpoint, maker, config_class)


def trained_network(
    checkpoint: Checkpoint, build_model: BuildModel, config_class: type | None = None
) -> "TrainedNetwork":
    """The network of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        build_model: makes the layers from the configuration. If it takes the task as well, it is
            given something with the ``preparation`` and the ``classes`` of the training.
        config_class: the class of the settings, which has the defaults of those that are newer than
            the checkpoint.

    Raises:
        InputError: as :func:`load`.
    """
    values, origin, usage = checkpoint.get("config"), checkpoint.origin, usage_of(checkpoint)
    prepares = usage.pop("prepares")
    if not isinstance(values, dict):
        raise InputError(
            f"{origin} does not hold the settings of its network: build it, and load its weights "
            "by snn_lib.training.checkpoints.load_weights"
        )
    try:
        config = _namespace(values)
        if config_class is not None:
            config = config_from_dict(config_class, values, [], origin)
        model = build(build_model, config, SimpleNamespace(**usage))
    except InputError:
        raise
    except Exception as error:  # the user's code may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, AttributeError) and "NoneType" in reason and not usage["preparation"]:
            reason += "; the checkpoint does not hold the preparation of its task"
        elif isinstance(error, AttributeError) and config_class is None:
            reason += "; its settings may need their class: give load the config_class"
        raise InputError(f"the layers of {origin} cannot be built: {reason}") from error
    load_weights(model, checkpoint)
    bits = getattr(getattr(config, "hyperparameters", None), "weight_bits", 0)
    with refusing(f"{origin} has weights of {bits} bits, but ", InputError):
        # Those of a last checkpoint are not rounded yet.
        round_weights(model, bits if bits in WEIGHT_BITS else 0)
    if not prepares:  # it has served build_model
        usage["preparation"] = None
    model.eval()  # which may be a method of the user's own
    return TrainedNetwork(model.cpu(), origin, **usage).eval()


def usage_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of the use of its network, see ``Task.usage``.

    A file may hold anything, so all of it is checked here, before the network is used.

    Raises:
        InputError: it is not what a task of this version writes.
    """
    usage = {
        "preparation": checkpoint.get("preparation"),
        "prepares": checkpoint.get("prepares", True),  # earlier versions did not say
        "readout": checkpoint.get("readout"),
        "logit_scale": checkpoint.get("logit_scale", 1.0),
        "classes": checkpoint.get("classes", []),
    }
    preparation, prepares, readout, scale, classes = usage.values()
    finite = isinstance(scale, (int, float)) and abs(scale) <= torch.finfo(torch.float32).max
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    try:
        if preparation is not None:
            usage["preparation"] = preparation_from(preparation)
        require(isinstance(prepares, bool), "it does not say whether its preparation is all")
        require(readout in (None, EVERY_STEP, *READOUTS), "its readout is unknown")
        require(scale is None or finite, "its logit_scale is no finite number")
        usage["logit_scale"] = scale and float(scale)  # PyTorch takes no whole number so large
        require(named, "its classes are no list of names")
    except InputError as error:
        raise InputError(
            f"{checkpoint.origin} is damaged, or of another version: {error}"
        ) from None
    return usage


class TrainedNetwork(nn.Module):
    """A trained model, with the preparation of its input and the readout of its output.

    Args:
        model: the module as it was trained.
        origin: the checkpoint that it comes from, in words.
        preparation, readout, logit_scale, classes: as :func:`usage_of` returns them; no preparation
            if the task of the training had an ``encode`` of its own.

    Attributes:
        model: the same.
        preparation: makes its input of samples, see :mod:`snn_lib.data.preparation`.
        readout: what makes the answer of the output: a name of ``snn_lib.readout.READOUTS``, or
            ``snn_lib.readout.EVERY_STEP`` if the output is the answer. A function of your own,
            which no checkpoint holds, can be set here.
        logit_scale: factor that makes the answer a logit; ``None`` if it is not about classes.
        classes: the names of the classes, by number; empty if they have none.

    What the checkpoint does not hold is ``None``, for example if an earlier version wrote it.

    Shape:
        As the model: input over time ``(T, B, *features)`` to its output, with its state if it has
        one.
    """

    def __init__(
        self,
        model: nn.Module,
        origin: str,
        preparation: Preparation | None,
        readout: Any,
        logit_scale: float | None,
        classes: Sequence[str],
    ) -> None:
        super().__init__()
        self.model, self._origin, self.preparation = model, origin, preparation
        self.readout, self.logit_scale, self.classes = readout, logit_scale, classes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model as it was trained."""
        return self.model(*args, **kwargs)

    def prepare(self, samples: Any) -> NetworkInput:
        """Makes the network's input from samples, as in training but without augmentation.

        Args:
            samples: what the network was trained on, samples first: images ``(samples, 28, 28)``,
                sequences ``(samples, T, *features)`` or a list of them that differ in T, or a list
                of :class:`snn_lib.data.events.Events`.

        Returns:
            ``x``, ``(T, B, *features)``, and ``lengths``, int64 ``(B,)`` or ``None``.

        Raises:
            InputError: a sample has another shape or an undefined number, or the checkpoint does
                not hold how input is prepared.
        """
        if self.preparation is None:
            raise InputError(
                f"{self._origin} does not say how to prepare input: run network(x) on input of "
                "your own, (T, B, *features)"
            )
        return self.preparation(samples)

    @torch.no_grad()
    def answer(self, samples: Any) -> Tensor:
        """Runs the network and reads its output: ``(samples, *outputs)``, logits of a classifier.

        If there is an answer at every step, it is ``(samples, T, *outputs)``; the steps after a
        sample's own end mean nothing. The network runs on the device of its weights, and on input
        of their dtype if they have one. Random spikes come from PyTorch's generator.

        Raises:
            InputError: as :meth:`prepare`; or the checkpoint names no readout, because the network
                was trained with a function of the user's own.
        """
        return self._answer(samples)[0]

    def _answer(self, samples: Any) -> tuple[Tensor, Tensor | None]:
        """What :meth:`answer` returns, and the number of steps of each sample if they differ."""
        readout = READOUTS[self.readout]() if self.readout in READOUTS else self.readout
        require(
            readout == EVERY_STEP or isinstance(readout, Callable),
            f"{self._origin} does not hold a readout: set network.readout to that of the training, "
            "or read network(x) out yourself",
        )
        if isinstance(readout, nn.Module):
            readout.eval()  # also one that was set after the network was put into evaluation mode
        x, lengths = self.prepare(samples)
        like = [p for p in self.model.parameters() if p.is_floating_point()] or [x]
        dtypes = {p.dtype for p in like}
        dtype = like[0].dtype if len(dtypes) == 1 else x.dtype  # which is that of the training
        output = output_of(self.model, x.to(like[0].device, dtype), lengths)
        if readout == EVERY_STEP:
            answer = output.transpose(0, 1)
        else:
            answer = readout(output, None if lengths is None else lengths.to(like[0].device))
        answer = at_least_float32(answer)
        return answer if self.logit_scale is None else answer * self.logit_scale, lengths

    @torch.no_grad()
    def classify(self, samples: Any) -> tuple[list[Any], Tensor]:
        """The name of each sample's class, and the scores of all classes, ``(samples, classes)``.

        If the network answers at every step, there is a list of names for each sample, one for each
        of its own steps, and the scores are ``(samples, T, classes)``; the steps after a sample's
        own end mean nothing. The scores of an answer add up to 1. If the classes have no names,
        their numbers are used.

        Raises:
            InputError: as :meth:`answer`, or the network predicts numbers and not classes, or has a
                single output.
        """
        (logits, lengths), every_step = self._answer(samples), self.readout == EVERY_STEP
        require(
            self.logit_scale is not None and logits.dim() == 2 + every_step,
            f"{self._origin} predicts numbers, not classes: call answer",
        )
        scores, outputs = logits.softmax(-1), logits.shape[-1]
        require(outputs > 1, f"{self._origin} has one output, which tells no classes: call answer")
        names = self.classes or [str(number) for number in range(outputs)]
        require(
            len(names) == outputs,
            f"{self._origin} has {len(names)} names of classes and {outputs} outputs",
        )
        answers = scores.argmax(-1)
        if not every_step:
            return [names[number] for number in answers.tolist()], scores
        ends = [None] * len(answers) if lengths is None else lengths.tolist()
        own = (row[:end].tolist() for row, end in zip(answers, ends, strict=True))
        return [[names[number] for number in steps] for steps in own], scores


def imported(name: str | None, own: set[str]) -> Any:
    """What ``run_folder.name_of`` has named, in one of these modules or in the library."""
    if name is None:
        return None
    module, _, name = name.partition(":")
    beside = module.partition(".")[0] in own | {"snn_lib"}
    why = "has a dot in its name" if module in own else "does not lie beside it"
    require(beside, f"{module} {why}: give load a build_model")
    return getattr(importlib.import_module(module), name)


# While arguments_of_main runs a script, the list that main leaves its arguments in and then exits.
GIVEN: ContextVar[list[Any] | None] = ContextVar("GIVEN", default=None)


def arguments_of_main(script: Path) -> list[Any]:
    """What a script gives ``main``: build_model, task and initialise. It ends there.

    A sweep asks for them, and whoever loads a checkpoint that does not name its build_model.

    Raises:
        InputError: the script is not found, is none of Python's, or does not call ``main``.
    """
    require(script.is_file(), f"there is no script {script}")
    ending = script.suffix in ("", ".py", ".pyw")  # a flat YAML file would run as annotations
    require(ending, f"{script} is no script, expected a file that ends in .py")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it runs
            compile(script.read_bytes(), str(script), "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{script} cannot be read as Python: {one_line(error)}") from None
    given: list[Any] = []
    token = GIVEN.set(given)
    try:
        with importing_from(script.resolve().parent):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        require(bool(given), f"{script} ends before its call of main: {end}")
    finally:
        GIVEN.reset(token)
    require(bool(given), f"{script} does not call snn_lib.training.main")
    return given


@contextmanager
def importing_from(folder: Path) -> Iterator[set[str]]:
    """A context in which a folder's modules are imported, as by a script that lies there.

    Modules from elsewhere that have their names, such as another project's ``model.py``, are back
    afterwards. The context gives the names of the folder's modules. Other threads wait for its end.
    """
    with LOADING:
        own = {path.stem for path in folder.glob("*.py")}
        own |= {path.parent.name for path in folder.glob("*/__init__.py")}
        # Python imports a folder without __init__.py, unless a package elsewhere has its name.
        elsewhere = [one for one in sys.path if Path(one).resolve() != folder]
        for name in {path.parent.name for path in folder.glob("*/*.py")} - own:
            found = PathFinder.find_spec(name, elsewhere)
            own |= {name} if found is None or found.origin is None else set()
        own -= {"__main__", "snn_lib"}

        def loaded() -> dict[str, ModuleType]:
            modules = sys.modules.items()
            return {name: one for name, one in modules if name.partition(".")[0] in own}

        before = loaded()
        for name, module in before.items():
            file = getattr(module, "__file__", None)
            if file is None or not Path(file).resolve().is_relative_to(folder):
                del sys.modules[name]
        sys.path.insert(0, str(folder))
        try:
            yield own
        finally:
            sys.path.remove(str(folder))
            for name in loaded():
                del sys.modules[name]
            sys.modules.update(before)


def find_script(checkpoint: Checkpoint) -> Path:
    """Finds the script that wrote a checkpoint: in a folder above it, here, or in the library.

    Folders above a link come before those above what it leads to.

    Raises:
        InputError: the checkpoint names none, or it is not there.
    """
    name, path = checkpoint.get("script", ""), checkpoint.path
    require(
        isinstance(name, str) and name == Path(name).name and name.endswith(".py"),
        f"checkpoint {path} does not name the script that wrote it: give load a build_model, or "
        "train in a script that calls main",
    )
    above = *path.absolute().parents, *path.resolve().parents
    for folder in (*above, Path.cwd(), LIBRARY):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{name}, which wrote checkpoint {path}, is neither above the checkpoint nor in the "
        "current folder: start there, or give load a build_model"
    )


def _namespace(values: Any) -> Any:
    """A configuration's values as attributes."""
    if isinstance(values, dict):
        return SimpleNamespace(**{key: _namespace(value) for key, value in values.items()})
    return values
