"""What every task has: data in batches, a loss and metrics.

A script makes the task, and the experiment prepares it with the configuration and the device.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral, Real
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.chunks import UnfitOutputError
from snn_lib.containers import Readout
from snn_lib.data.batches import Batch, Split, as_batch
from snn_lib.data.preparation import Preparation
from snn_lib.errors import InputError, RunError, SettingsError, limit_length, one_line, require
from snn_lib.inspection.activity import Activity
from snn_lib.readout import EVERY_STEP, at_least_float32
from snn_lib.seeds import EPOCHS, MOST_BATCHES, SPLITS, batch_seed, other_seeds
from snn_lib.settings import ExperimentConfig

READERS = {"readout", "answer", "logits", "loss"}  # attributes by which a loss reads the output


class Task:
    """The data, the loss and the metrics of an experiment.

    A subclass defines :meth:`make_split` and :meth:`loss`. Everything else has a default, which
    it may override.

    Args:
        config_class: the class of its settings, by default that of the task.

    Attributes:
        config_class: the same.
        unit: the word for samples, for the progress bar.
        mean_over: the name of the sum that counts the terms of the mean in the loss. It is the
            weight of this process's share of a batch.
        config, device: the experiment's, once the task is set up.
        preparation: makes the network's input of a user's values and of batches; ``None`` if
            batches are input as they are, and the task does not know how to prepare values.
        classes: the names of the classes, by number, if they have names.
        readout_name: what makes the answer of the output: a name of ``snn_lib.readout.READOUTS``,
            or ``snn_lib.readout.EVERY_STEP``, or ``None`` if it has no name.
        logit_scale: factor that makes the answer a logit, or ``None`` if it is not about classes.
        rank, world: this process's number, and the number of processes; 0 and 1 until
            :meth:`share`.
    """

    config_class: type[ExperimentConfig] = ExperimentConfig
    unit = "sequences"
    mean_over = "samples"
    preparation: Preparation | None = None
    classes: Sequence[str] = ()
    readout_name: str | None = None
    logit_scale: float | None = 1.0

    def __init__(self, config_class: type[ExperimentConfig] | None = None) -> None:
        self.config_class = config_class or self.config_class

    def setup(self, config: Any, device: torch.device) -> None:
        """Reads the data and prepares to run on a device, as if this were the only process.

        Raises:
            InputError: the data is missing, corrupt, or does not fit the configuration.
        """
        self.config, self.device = config, device
        self.share(0, 1)

    def share(self, rank: int, world: int) -> None:
        """From now on, this process takes share ``rank`` of ``world`` of every batch.

        The experiment calls it after it has found first weights. They are found on all the data,
        and so are the same for any number of processes.
        """
        self.rank, self.world = rank, world
        self._splits: dict[str, Split] = {}

    def make_split(self, split: str) -> Split:
        """The ``train``, ``validation`` or ``test`` samples.

        Their seed, workers, and this process's share of them are set by :meth:`split`.
        """
        raise NotImplementedError

    def encode(self, batch: Batch) -> Batch:
        """The batch as the model takes it, from one of :meth:`make_split` on the device."""
        return batch._replace(x=self.preparation.encode(batch.x)) if self.preparation else batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The mean loss of a batch, and sums over its samples.

        The sums are numbers, or tensors of one element, by name. ``samples`` counts the samples,
        and there is one of the name ``mean_over``. :meth:`metrics` reads them all, here ``loss``,
        the sum of the losses.
        """
        raise NotImplementedError

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics by name, of a split: plain numbers, computed from the sums of :meth:`loss`.

        The sums are added up over all batches and processes before.
        """
        return {"loss": sums["loss"] / sums["samples"]}

    def score(self, metrics: dict[str, float]) -> tuple[float, ...] | float:
        """The best epoch is the one with the highest score: here the lowest loss.

        Of two scores the first number counts, and where it is the same, the next.
        """
        return (-metrics["loss"],)

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Lines that ``--test`` prints beyond the metrics and firing rates."""
        return iter(())

    def usage(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, so that the network can be used without data.

        It holds neither a preparation nor a readout of a user's own. If ``encode`` is a user's own,
        the preparation serves ``build_model`` alone.
        """
        preparation, scale = self.preparation, self.logit_scale
        if not type(preparation).__module__.startswith("snn_lib."):
            preparation = None
        return {
            "preparation": preparation and preparation.to_dict(),
            "prepares": not self._is_of_the_user("encode"),
            "readout": self.readout_name if self.reads_out() else None,
            "logit_scale": None if scale is None else float(scale),  # NumPy's numbers, too
            "classes": [str(name) for name in self.classes],  # NumPy's names, too
        }

    def reads_out(self) -> bool:
        """Whether the readout of this name makes the answer, and nothing of a user's own.

        A loss of a user's own may read the output in its own way. It does not if its code, or that
        of the user's methods that it calls, has the name of what reads the output here, or calls
        the loss that it replaces.
        """
        if self._is_of_the_user("answer", "logits"):
            return False
        return self.readout_name == EVERY_STEP or self.loss_reads()

    def loss_reads(self) -> bool:
        """Whether the loss reads the output as this library does, see :meth:`reads_out`."""
        if not self._is_of_the_user("loss"):
            return True
        names, new = set(), names_in(self._method("loss"))
        while new:
            names |= new
            called = (name for name in new - {"loss"} if self._is_of_the_user(name))
            new = set().union(*(names_in(self._method(name)) for name in called)) - names
        return not READERS.isdisjoint(names)

    def _is_of_the_user(self, *names: str) -> bool:
        """Whether one of these methods is not the library's, but that of a user's subclass.

        It may also be set on the task.
        """
        methods = filter(callable, map(self._method, names))
        modules = (str(getattr(method, "__module__", "")) for method in methods)
        return any(not module.startswith("snn_lib.") for module in modules)

    def _method(self, name: str) -> Any:
        """The method of this name, or nothing; a property is not computed."""
        method = getattr(type(self), name, None)
        return vars(self).get(name, method) if callable(method) else None

    def check_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses to test or resume a network whose output or input had another meaning.

        A task adds to it what it finds in its data.

        Raises:
            InputError: the readout, the names of the classes, or the data, is not that of the
                checkpoint. Earlier versions wrote no names.
        """
        ours, theirs = self.readout_name, checkpoint.get("readout")
        require(
            None in (ours, theirs) or ours == theirs,
            f"the network was trained with the readout {theirs!r}, and the task has {ours!r}",
        )
        ours, theirs = [str(name) for name in self.classes], checkpoint.get("classes")
        require(
            not (ours and theirs) or ours == theirs,
            f"the network has learned the classes {limit_length(repr(theirs))}, and the data has "
            f"{limit_length(repr(ours))}: give it that, or run the network on this by snn_lib.load",
        )

    def divided(self) -> int:
        """How many samples are divided into those to train on and those that are held out.

        If there were more or fewer, other ones would be held out. It is 0 if nothing is divided,
        because the validation samples are a part of their own.
        """
        return self.split("train").count + self.split("validation").count

    def has(self, split: str) -> bool:
        """Whether there is data for a split; every task has training and validation data."""
        return True

    def split(self, split: str) -> Split:
        """The samples of a split, which is made at the first call.

        Raises:
            InputError: there is no such split, the task has no data yet, or :meth:`make_split`
                returns something else.
        """
        require(split in EPOCHS, f"split is {split!r}, expected one of {', '.join(EPOCHS)}")
        require(
            hasattr(self, "_splits"),
            f"the {type(self).__name__} has no data yet: an Experiment sets it up",
        )
        if split not in self._splits:
            with batch_seed(self.config.seed, SPLITS, EPOCHS[split]):
                made = self.make_split(split)
            kind = type(made).__name__
            require(isinstance(made, Split), f"make_split returned a {kind}, expected a Split")
            self._splits[split] = replace(
                made,
                seed=self.config.seed,
                rank=self.rank,
                world=self.world,
                workers=self.config.data_workers,
            )
        return self._splits[split]

    def batches(self, split: str, epoch: int | None = None, start: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of a split, encoded, on the device.

        Args:
            split: ``train``, ``validation`` or ``test``.
            epoch: of the training, from 0 on, by which order and random changes differ. Without it
                they are the same every time, but for what an ``encode`` of your own draws from
                PyTorch's generator.
            start: the number of the first batch.
        """
        samples, epoch = self.split(split), EPOCHS[split] if epoch is None else epoch
        made = samples.batches(epoch, start)
        return (self._encoded(batch, epoch, number) for number, batch in enumerate(made, start))

    def _encoded(self, batch: Batch, epoch: int, number: int) -> Batch:
        """A batch on the device, encoded alike in training and in evaluation.

        What a user's own ``encode`` draws from NumPy's and Python's generators follows from the
        seed, and is not what the data has drawn.
        """
        own, gradients = self._is_of_the_user("encode"), torch.is_grad_enabled()
        seed = self.config.seed + self.rank
        seeded = other_seeds(seed, epoch, number + MOST_BATCHES) if own else nullcontext()
        unmixed = torch.autocast(self.device.type, enabled=False)
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), unmixed, seeded:
            return as_batch(self.encode(batch.to(self.device)), "encode")


def names_in(function: Callable) -> set[str]:
    """The names of attributes and of globals in the code of a function and of those within it."""
    names, parts = set(), [getattr(inspect.unwrap(function), "__code__", None)]
    while parts:
        if inspect.iscode(code := parts.pop()):
            names.update(code.co_names)
            parts += code.co_consts
    return names


def output_of(model: nn.Module, x: Any, lengths: Tensor | None = None) -> Tensor:
    """The output of a model that returns it alone or together with a state.

    Args:
        model: the model, which is not told the lengths.
        x: ``(T, B, *features)``, or what else a model takes.
        lengths: of the sequences, if they are padded: then a readout within the model is refused.

    Raises:
        InputError: the model does not take sequences of these features, or returns no tensor, or
            nothing from which a next chunk could go on; or a readout in it has read the padding.
    """
    try:
        result = model(x)
    except UnfitOutputError as error:
        raise SettingsError(f"the model does not run in chunks: {error}") from error
    except (ValueError, RuntimeError) as error:
        if "(output, state)" in str(error):  # a layer returned a pair for an output, or no pair
            raise InputError(f"the model does not run: {one_line(error)}") from error
        if not any(word in str(error) for word in ("shape", "channels", "dimension")):
            raise
        found = f" of shape {tuple(x.shape)}" if isinstance(x, Tensor) else ""
        raise InputError(
            f"the model does not take batches (T, B, *features){found}: {one_line(error)}"
        ) from error
    output = result[0] if isinstance(result, tuple) else result
    require(
        isinstance(output, Tensor),
        f"the model returns a {type(output).__name__}, expected its output, or (output, state)",
    )
    if lengths is not None:
        _refuse_readouts(model, x, output, lengths)
    return output


def _refuse_readouts(model: nn.Module, x: Any, output: Tensor, lengths: Tensor) -> None:
    """Refuses a readout in the model, which perhaps has read the padding."""
    # The shapes come first, as a look at numbers on a device waits for it.
    if isinstance(x, Tensor):
        steps, batch = x.shape[:2]
    else:
        steps, batch = max(lengths.tolist(), default=0), len(lengths)
    if output.shape[:2] == (steps, batch) or (lengths >= steps).all():
        return
    for part in model.modules() if isinstance(model, nn.Module) else ():
        kind = type(part).__name__
        require(
            not isinstance(part, Readout),
            f"the sequences differ in length, and nobody knows whether the {kind} in the model is "
            "told their lengths: leave it out, and give its name to the task as the readout, or "
            f"call {kind}()(output, lengths) in your forward",
        )


def check_task(task: Any) -> None:
    """Refuses what is no task, and a task without a class of settings."""
    require(isinstance(task, Task), f"task is a {type(task).__name__}, expected a Task")
    kind = task.config_class
    require(
        isinstance(kind, type) and issubclass(kind, ExperimentConfig),
        f"{type(task).__name__} has the config_class {kind!r}, expected a class derived from "
        "ExperimentConfig",
    )


def add_sums(sums: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds the sums of one more batch, in place and without waiting for the device.

    A sum of a small type, such as a loss that autocast leaves in bfloat16, is added up in float32
    or int64, as it would soon stand still otherwise.
    """
    for key, value in more.items():
        if isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, Tensor):
            value = at_least_float32(value) if value.is_floating_point() else value.long()
        sums[key] = sums.get(key, 0) + value  # counts stay integers


def read_sums(sums: Mapping[str, Any]) -> dict[str, float]:
    """The sums as floats, which waits for the device.

    Raises:
        RunError: a sum is a tensor of several numbers.
    """
    for key, value in sums.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise RunError(f"sum {key!r} has shape {tuple(value.shape)}, expected a single number")
    return {key: float(value) for key, value in sums.items()}


def metrics_of(task: Task, sums: dict[str, float]) -> dict[str, int | float]:
    """The metrics of a task as plain numbers, from sums that are added up.

    Raises:
        RunError: a metric is no number.
    """
    try:
        return {key: plain_number(value) for key, value in task.metrics(sums).items()}
    except TypeError as error:
        raise RunError(f"a metric of {type(task).__name__}: {error}") from None


def plain_number(value: Any) -> int | float:
    """A metric as Python's own int or float, which checkpoints, JSON and CSV can hold.

    It may be any real number of Python, NumPy or PyTorch, in an array or tensor of no dimensions,
    too. ``True`` is 1. Anything else raises a TypeError.
    """
    number = value
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        number = value.item()
    if isinstance(number, Integral):
        return int(number)
    if isinstance(number, Real):
        return float(number)
    shown = shorten(repr(value), 60, placeholder="...")
    raise TypeError(f"{type(value).__name__} {shown} is no number, expected an int or a float")
