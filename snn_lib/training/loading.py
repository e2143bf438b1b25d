"""Loads a trained network: ready for use, without its training data.

    network = snn_lib.load("runs/rising/2026-11-26_15-07-00/best")
    names, scores = network.classify(x)

A checkpoint holds the weights, how input is prepared, the readout and the names of the classes. The
layers come from ``build_model``, which the script of the experiment hands over.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.data.preparation import Preparation, Prepared, preparation_from
from snn_lib.errors import InputError, one_line, require
from snn_lib.readout import READOUTS
from snn_lib.tasks.base import Task, output_of
from snn_lib.training.building import build
from snn_lib.training.checkpoints import Checkpoint, load_checkpoint, load_weights
from snn_lib.training.config import config_from_dict

BuildModel = Callable[[Any], nn.Module]


def load(path: str | Path, build_model: BuildModel | None = None) -> "TrainedNetwork":
    """Loads a trained network onto the CPU, in evaluation mode.

    Args:
        path: a checkpoint: ``best`` of a run, or a pretrained model.
        build_model: makes the layers from the configuration, as in the experiment. By default the
            script that wrote the checkpoint is looked for in the present folder and in those above
            the checkpoint, and run up to its call of ``main``.

    Raises:
        InputError: the checkpoint is missing, damaged or of another network, its weights are not
            finite, or its script is not found.
    """
    checkpoint = load_checkpoint(path)
    if build_model is not None:
        return trained_network(checkpoint, build_model)
    return trained_network(checkpoint, *_arguments_of_main(_find_script(checkpoint)))


def trained_network(
    checkpoint: Checkpoint, build_model: BuildModel, task: Task | None = None
) -> "TrainedNetwork":
    """The network of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        build_model: makes the layers from the configuration.
        task: the experiment's, whose class of settings gives settings that are newer than the
            checkpoint their defaults, and which ``build_model`` may ask about the data.

    Raises:
        InputError: as :func:`load`.
    """
    origin = checkpoint.origin
    values = checkpoint.get("config")
    require(isinstance(values, dict), f"{origin} does not hold the settings of its network")
    preparation = checkpoint.get("preparation")
    if preparation is not None:
        preparation = preparation_from(preparation)
    if task is None:
        config = _namespace(values)
    else:
        task.preparation, task.classes = preparation, checkpoint.get("classes", ())
        config = config_from_dict(task.config_class, values, [], origin)
    with torch.random.fork_rng(devices=[]):  # the first weights are replaced anyway
        try:
            model = build(build_model, config)
        except AttributeError as error:
            raise InputError(f"the layers of {origin} cannot be built: {error}") from error
    load_weights(model, checkpoint)
    answering = [checkpoint.get(key) for key in ("readout", "logit_scale", "classes")]
    return TrainedNetwork(model.cpu(), origin, preparation, *answering).eval()


class TrainedNetwork(nn.Module):
    """A trained model with what stands before and behind it.

    Attributes:
        model: the module as it was trained.
        preparation: makes its input of samples, see :mod:`snn_lib.data.preparation`.
        readout: a name of ``snn_lib.readout.READOUTS``.
        logit_scale: what the readout's value is multiplied by to be a logit.
        classes: the names of the classes, by number; empty if they have none.

    What the checkpoint does not hold, since an earlier version wrote it, say, is ``None``.

    Shape:
        As the model: input over time ``(T, B, *features)`` to its output, with its state if it has
        one.
    """

    def __init__(
        self,
        model: nn.Module,
        origin: str,
        preparation: Preparation | None = None,
        readout: str | None = None,
        logit_scale: float | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model, self._origin, self.preparation = model, origin, preparation
        self.readout, self.logit_scale, self.classes = readout, logit_scale, list(classes or ())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model as it was trained."""
        return self.model(*args, **kwargs)

    def prepare(self, samples: Any) -> Prepared:
        """Makes the network's input of samples, as in training but without augmentation.

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
        require(
            self.preparation is not None,
            f"{self._origin} does not hold how input is prepared: run network(x) on input of your "
            "own, (T, B, *features)",
        )
        return self.preparation(samples)

    @torch.inference_mode()
    def answer(self, samples: Any) -> Tensor:
        """What the readout makes of the output: ``(samples, *outputs)``, logits of a classifier.

        Raises:
            InputError: as :meth:`prepare`; or the network was trained without a readout, or with
                one that a checkpoint cannot hold.
        """
        require(
            self.readout in READOUTS,
            f"{self._origin} does not hold a readout: read network(x) out yourself",
        )
        x, lengths = self.prepare(samples)
        output = output_of(self.model, x)
        return READOUTS[self.readout]()(output, lengths).float() * self.logit_scale

    def classify(self, samples: Any) -> tuple[list[str], Tensor]:
        """The name of each sample's class, and the scores of all classes, ``(samples, classes)``.

        The scores of a sample add up to 1. Where classes have no names, their numbers serve.

        Raises:
            InputError: as :meth:`answer`.
        """
        scores = self.answer(samples).softmax(1)
        names = self.classes or [str(number) for number in range(scores.shape[1])]
        return [names[number] for number in scores.argmax(1).tolist()], scores


class Handover(BaseException):
    """Carries the arguments of ``main`` from a script to who reads it."""

    def __init__(self, build_model: BuildModel, task: Task) -> None:
        self.build_model, self.task = build_model, task


READING = ContextVar("READING", default=False)  # whether main is to hand over its arguments


def _arguments_of_main(script: Path) -> tuple[BuildModel, Task]:
    """Runs a script up to its call of ``main``."""
    token = READING.set(True)
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Handover as handover:
        return handover.build_model, handover.task
    except Exception as error:  # a user's script may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{script} fails before its call of main: {reason}") from error
    finally:
        sys.path.remove(str(script.parent))
        READING.reset(token)
    raise InputError(f"{script} does not call snn_lib.training.main: give load a build_model")


def _find_script(checkpoint: Checkpoint) -> Path:
    name, path = checkpoint.get("script"), checkpoint.path
    require(
        isinstance(name, str) and name == Path(name).name and name.endswith(".py"),
        f"checkpoint {path} does not name the script that wrote it: give load a build_model",
    )
    for folder in (Path.cwd(), *path.resolve().parents):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{name}, which wrote checkpoint {path}, is neither in the present folder nor above the "
        "checkpoint: start there, or give load a build_model"
    )


def _namespace(values: Any) -> Any:
    """A configuration's values as attributes."""
    if isinstance(values, dict):
        return SimpleNamespace(**{key: _namespace(value) for key, value in values.items()})
    return values
