"""What training changes and a checkpoint holds: weights, average, optimiser, schedule, progress.

A file may hold anything, and PyTorch would compute with much of it. So the contents of a checkpoint
are checked here: :func:`check_alike` compares them with what this run would write itself.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from snn_lib.cells import Constrained, parameter_groups
from snn_lib.errors import InputError, SettingsError, one_line, out_of_memory, require
from snn_lib.rounding import rounded_weights
from snn_lib.settings import LOCAL_KEYS, TRAINING, OptimizerChoice, SchedulerChoice, needs_of
from snn_lib.tasks.base import Task
from snn_lib.training import diagnosis, distributed
from snn_lib.training.checkpoints import STATISTICS, Checkpoint, load_weights
from snn_lib.training.config import expand_home

Row = dict[str, Any]  # the metrics of an epoch
TIMES = ("seconds", "data_seconds")  # columns of the metrics that differ from run to run
SIZES = [f"{part}_{what}" for part in ("training", "validation") for what in ("size", "samples")]


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the current epoch
    batches: int = 0  # batches of an epoch
    divided: int = 0  # samples of which some are held out; 0 if none are, or nobody knows
    sums: dict[str, float] = field(default_factory=dict)  # over the finished batches
    seconds: float = 0.0  # time that the finished batches took
    data_seconds: float = 0.0  # the part of it that was spent waiting for data
    history: list[Row] = field(default_factory=list)  # one row of metrics per epoch
    warned: list[str] = field(default_factory=list)  # warnings that the run has printed

    def finish_epoch(self, row: Row) -> None:
        """Notes the epoch's metrics and begins the next epoch."""
        self.history.append(row)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.seconds, self.data_seconds = {}, 0.0, 0.0

    def best_row(self, task: Task) -> Row:
        """The metrics of the best epoch; of equally good epochs, the first."""

        def score(row: Row) -> tuple[float, ...]:
            return tuple(-math.inf if math.isnan(one) else one for one in score_of(row, task))

        return max(self.history, key=score)

    def times(self) -> list[float]:
        """The seconds of all epochs, and those of them that were spent waiting for data."""
        return [sum(row[key] for row in self.history) for key in TIMES]

    def is_at_best_epoch(self, task: Task) -> bool:
        """Whether the weights are those of the best epoch so far."""
        at_end = self.batch == 0 and bool(self.history)
        return at_end and self.best_row(task) is self.history[-1]

    def check(self) -> None:
        """Raises an error unless the values make sense, as those of a file may not."""
        example = Progress(
            sums=dict.fromkeys(self.sums, 0.0),
            history=[dict.fromkeys({"epoch", *TIMES, *row}, 0.0) for row in self.history],
            warned=[""] * len(self.warned),
        )
        check_alike(vars(self), vars(example), "the progress")
        rows = len(self.history)
        numbered = [row["epoch"] for row in self.history] == [*range(1, rows + 1)]
        require(self.epoch == rows and numbered, f"{self.epoch} epochs have other rows of metrics")
        require(0 <= self.batch <= self.batches, f"batch is {self.batch} of {self.batches}")
        for value in self.sums.values():  # a loss may be infinite or undefined
            require(not isinstance(value, int) or abs(value) <= 2**53, f"a sum is {value}")
        amounts = self.seconds, self.data_seconds, self.sums.get("samples", 0)
        positive = all(amount >= 0 for amount in amounts)  # and not nan
        require(positive, "a time or the number of samples is negative")


class TrainingState:
    """Model, optimiser, schedule, average and progress of a run.

    Args:
        model, config, device: the experiment's.
        batches: batches of an epoch.
        divided: the samples of which some are held out; 0 if the validation part is of its own.

    Raises:
        SettingsError: PyTorch refuses the options of optimiser or scheduler, or the model, which
            cannot be copied or has extra state, has ``weight_averaging``.
    """

    scheduler: LRScheduler | Any  # or None

    def __init__(
        self, model: nn.Module, config: Any, device: torch.device, batches: int, divided: int = 0
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.progress = Progress(batches=batches, divided=divided)
        self.total_batches = config.hyperparameters.epoch * batches
        try:
            section = config.optimizer
            learning_rate = getattr(section, section.optimizer_choice).lr
            groups = parameter_groups(model, learning_rate, section.coefficient_lr_scale)
            self.optimizer = get_optimizer(groups, config)
            self.scheduler = get_scheduler(
                self.optimizer, config, self.total_batches, learning_rate
            )
        except (ValueError, TypeError, ArithmeticError) as error:
            raise SettingsError(
                f"PyTorch refuses the options of optimizer.{config.optimizer.optimizer_choice}"
                f" or scheduler.{config.scheduler.scheduler_choice}: {one_line(error)}"
            ) from None
        decay = config.hyperparameters.weight_averaging
        for name, parameter in model.named_parameters() if decay else ():
            coarse = parameter.is_floating_point() and parameter.dtype.itemsize < 4
            require(
                not (coarse and parameter.requires_grad),
                f"hyperparameters.weight_averaging is {decay}, but {name} is {parameter.dtype}, in "
                "which an average stands still: build the model in float32",
                SettingsError,
            )
        for module in model.modules() if decay else ():
            require(
                type(module).get_extra_state is nn.Module.get_extra_state,
                f"hyperparameters.weight_averaging is {decay}, but an average has no extra state "
                f"(get_extra_state), as {type(module).__name__} has: keep it in a buffer",
                SettingsError,
            )
        try:
            self.average = MovingAverage(model, decay) if decay else None
        except Exception as error:  # it is pruned, for example, or holds a lock
            if out_of_memory(error):
                raise
            raise SettingsError(
                "hyperparameters.weight_averaging needs a copy of the model, which cannot be "
                f"copied: {one_line(error)}"
            ) from None

    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and saved as the best: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def step(self) -> None:
        """Updates the weights, their average and the learning rate after a batch."""
        self.learning_rate = self.optimizer.param_groups[0]["lr"]  # that of the last step
        self.optimizer.step()
        if self.average is not None:
            # Filters run with stable coefficients, so these are averaged. Writing a checkpoint
            # makes the average's coefficients stable too. Every step does the same, so that a
            # resumed run computes the same numbers as one that was never stopped.
            for module in (*self.model.modules(), *self.average.modules()):
                if isinstance(module, Constrained):
                    module.project_()
            self.average.update_parameters(self.model)
        if steps_every_batch(self.scheduler):
            self.scheduler.step()

    def end_epoch(self) -> None:
        """Updates the learning rate, if the schedule counts epochs."""
        if self.scheduler is not None and not steps_every_batch(self.scheduler):
            self.scheduler.step()

    def best_checkpoint(self) -> dict[str, Any]:
        """The finished model as it is after this epoch."""
        row, model = self.progress.history[-1], self.evaluated_model()
        with rounded_weights(model, self.config.hyperparameters.weight_bits):
            weights = copy.deepcopy(model.state_dict())
        return {"epoch": row["epoch"], "snn_state_dict": weights, "metrics": row}

    def last_checkpoint(self) -> dict[str, Any]:
        """What :meth:`restore` continues from; every process has to call this."""
        rng = distributed.gather(rng_state(self.device))
        sums = distributed.total(self.progress.sums)
        return {
            "epoch": self.progress.epoch,
            "snn_state_dict": self.model.state_dict(),
            "average_state_dict": self.average.state_dict() if self.average else None,
            "optimizer_state_dict": self._optimizer_state(),
            "metrics": self.progress.history,
            "progress": {**vars(self.progress), "sums": sums},
            "margins": self._margins(),
            "rng": rng,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, with an empty one for weights that have had no gradient yet."""
        found = self.optimizer.state_dict()
        numbers = [number for group in found["param_groups"] for number in group["params"]]
        return {**found, "state": {number: found["state"].get(number, {}) for number in numbers}}

    def _margins(self) -> dict[str, float]:
        """How far inside the stable set each layer keeps its filters."""
        return {name: synapse.margin for name, synapse in diagnosis.synapses(self.model).items()}

    def restore(self, checkpoint: Checkpoint, task: Task) -> None:
        """Continues from a last checkpoint; the schedule repeats its steps.

        Raises:
            InputError: the checkpoint is not that of such a run, or a setting has changed that must
                not change.
        """
        path = checkpoint.path
        require(
            "optimizer_state_dict" in checkpoint and "progress" in checkpoint,
            f"{path} is a finished model without the state of its training: resume from the "
            f"checkpoint named last, or start a new run with first_weights={path}",
        )
        rank, _ = distributed.rank_and_world()
        with fitting(path):
            progress = progress_of(checkpoint, task)
            theirs = self._fixed_settings(checkpoint["config"], progress)
        counted = {key: getattr(self.progress, key) for key in ("batches", "divided")}
        now = dataclasses.replace(progress, **counted)
        ours = self._fixed_settings(dataclasses.asdict(self.config), now)
        for what, value in ours.items():
            require(
                theirs.get(what, value) == value,
                f"{what} cannot change when {path} is resumed, because its training so far depends "
                "on it, or the validation by which its best epoch is chosen: keep it, or start a "
                "new run",
            )
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()  # makes a state to compare with; the weights are loaded next
        load_weights(self.model, checkpoint, averaged=False)
        with fitting(path):
            self._restore_state(checkpoint)
        if rank:  # the first process continues the sums of all
            progress.sums = dict.fromkeys(progress.sums, 0)
        self.progress = dataclasses.replace(progress, **counted)
        every_batch = steps_every_batch(self.scheduler)
        steps = progress.epoch
        if every_batch:
            steps = steps * counted["batches"] + progress.batch
        for _ in range(min(steps, self.total_batches) if self.scheduler else 0):
            self.scheduler.step()  # the scheduler's state is the number of its steps

    def _fixed_settings(self, config: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """What cannot change when a run is resumed, and its value in a configuration."""
        optimizer, scheduler = config["optimizer"], config["scheduler"]
        choice, plan = optimizer["optimizer_choice"], scheduler["scheduler_choice"]
        scale, settings = optimizer["coefficient_lr_scale"], config["hyperparameters"]
        fixed = {
            "the optimizer with its options": (choice, optimizer[choice], scale),
            "the scheduler with its options": (plan, scheduler.get(plan)),
            "hyperparameters.train_coefficients": settings["train_coefficients"],
            # which moves filters even when they are loaded
            "hyperparameters.constraint": settings["constraint"],
            # which weights are evaluated: theirs, or their average
            "hyperparameters.weight_averaging": settings["weight_averaging"] > 0,
        }
        if plan == "OneCycleLR":  # it plans the whole run
            fixed["hyperparameters.epoch"] = settings["epoch"]
        if plan in ("OneCycleLR", "CyclicLR") or progress.batch:  # the scheduler counts batches
            batches = progress.batches, settings["batch_size"]
            fixed["hyperparameters.batch_size or the number of samples"] = batches
        for key in decisive_settings(self.config):
            *sections, name = key.split(".")
            section = reduce(lambda outer, inner: outer.get(inner, {}), sections, config)
            if name in section:  # not of an earlier version, which also kept the ~ of a path
                fixed[key] = expand_home(section[name])
        if progress.divided:  # of more, other ones would be held out
            fixed["the number of samples"] = progress.divided
        return fixed

    def _restore_state(self, checkpoint: Checkpoint) -> None:
        """Restores optimiser, average and random generators."""
        own = self._optimizer_state()
        # Earlier versions wrote no empty states, which weights that are not trained have.
        untrained = {number: {} for number, full in own["state"].items() if not full}
        state = untrained | checkpoint["optimizer_state_dict"]["state"]
        full = {number: one if state.get(number) else {} for number, one in own["state"].items()}
        check_alike(state, full, "the optimiser")
        # A copy, as PyTorch would train in the checkpoint's own tensors.
        self.optimizer.load_state_dict({**own, "state": copy.deepcopy(state)})
        if self.average is not None:
            average = checkpoint["average_state_dict"]
            check_alike(average, self.average.state_dict(), "the average")
            self.average.load_state_dict(average)
        margins = checkpoint.get("margins", self._margins())  # earlier versions wrote none
        check_alike(margins, self._margins(), "the margins")
        for name, margin in margins.items():
            require(0 < margin < 1, f"a margin is {margin}")
            for model in (self.model, self.evaluated_model()):
                diagnosis.synapses(model)[name].margin = float(margin)
        rank, world = distributed.rank_and_world()
        require(len(checkpoint["rng"]) > 0, "there is no state of a random generator")
        if rank < len(checkpoint["rng"]) == world:
            set_rng_state(checkpoint["rng"][rank], self.device)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Says in one line that a checkpoint does not fit this run, whatever went wrong with it."""
    try:
        yield
    except Exception as error:  # a file may hold anything
        raise InputError(
            f"{path} cannot be resumed with this configuration: its optimiser, scheduler or "
            f"progress do not fit ({type(error).__name__}: {one_line(error)})"
        ) from None


def progress_of(checkpoint: Checkpoint, task: Task) -> Progress:
    """How far the run of a last checkpoint has come; it fails if that makes no sense."""
    values = copy.deepcopy(dict(checkpoint["progress"]))  # which goes on
    for name in ("folder", "samples", "held_out"):  # earlier versions wrote them
        values.pop(name, None)
    progress = Progress(**values)
    progress.check()
    # Whole numbers go on as such: with a device's counts, floats would add up in float32.
    whole = {key: int(value) for key, value in progress.sums.items() if value % 1 == 0}
    progress.sums |= whole
    if progress.history:
        progress.best_row(task)  # fails on the metrics of another task
    if progress.batch:
        with suppress(ArithmeticError, ValueError):  # samples in few batches, to divide by sums
            task.metrics(dict(progress.sums))  # fails if a sum is missing
    return progress


def get_optimizer(params: Iterable[Any], conf: Any) -> Optimizer:
    """The chosen optimiser over ``params``.

    Args:
        params: parameters or parameter groups.
        conf: a configuration with ``optimizer.optimizer_choice`` and a section of that name with
            its options, such as ``optimizer.Adam.lr``.

    Raises:
        ValueError: the choice is none of ``settings.OptimizerChoice``.
    """
    choice, options = _chosen(conf.optimizer, "optimizer_choice", get_args(OptimizerChoice))
    groups = Optimizer(params, {}).param_groups  # lists, whatever form they are given in
    is_complex = any(one.is_complex() for group in groups for one in group["params"])
    otherwise = choice == "SGD" or options.get("foreach") or options.get("differentiable")
    fused = {} if otherwise or is_complex else {"fused": True}
    return getattr(torch.optim, choice)(groups, **{**fused, **options})


def get_scheduler(
    optimizer: Optimizer, conf: Any, total_batches: int = 0, lr: float | None = None
) -> LRScheduler | None:
    """The chosen scheduler, or ``None`` for the choice ``none``.

    Args:
        optimizer: the optimiser whose learning rates it changes. Each group keeps the ratio of its
            learning rate to ``lr``, except that all groups have the same eta_min.
        conf: a configuration with ``scheduler.scheduler_choice`` and a section of that name with
            its options.
        total_batches: batches of the whole run, which OneCycleLR needs.
        lr: the learning rate of the weights, by default that of the first group.

    Raises:
        ValueError: the choice is none of ``settings.SchedulerChoice``.
    """
    if conf.scheduler.scheduler_choice in (None, "none"):
        return None
    choice, options = _chosen(conf.scheduler, "scheduler_choice", get_args(SchedulerChoice))
    rates = [group["lr"] for group in optimizer.param_groups]
    scales = [rate / (rates[0] if lr is None else lr) for rate in rates]
    for bound in ("base_lr", "max_lr"):
        if bound in options:
            options[bound] = [options[bound] * scale for scale in scales]
    if choice == "OneCycleLR":
        options["total_steps"] = total_batches
        if options["pct_start"] * total_batches == 1:  # a rise of one step: PyTorch divides by 0
            options["pct_start"] = 0.0
    if choice in ("OneCycleLR", "CyclicLR"):
        options.setdefault("cycle_momentum", False)
    return getattr(lr_scheduler, choice)(optimizer, **options)


def steps_every_batch(scheduler: LRScheduler | None) -> bool:
    """Whether the scheduler counts batches; the others count epochs."""
    return isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))


def _chosen(section: Any, key: str, choices: tuple[str, ...]) -> tuple[str, dict]:
    """The name that a section chooses, and the options under this name.

    The section is a dataclass, or a mapping that OmegaConf has read from a YAML file of 2020.
    """
    choice = getattr(section, key)
    if choice not in choices:
        raise ValueError(f"{key} is {choice!r}, expected one of {', '.join(choices)}")
    options = getattr(section, choice)
    if OmegaConf.is_config(options):  # whose lists are not Python's, and would go into checkpoints
        options = OmegaConf.to_container(options, resolve=True, throw_on_missing=True)
    return choice, dict(options if isinstance(options, Mapping) else vars(options))


class MovingAverage(AveragedModel):
    """An exponential moving average of the weights, which forgets faster at first.

    It averages the running statistics of normalisations as well. It copies all other buffers, and
    parameters that are whole numbers. The decay of update n is min(decay, (1 + n) / (10 + n)).
    Unlike PyTorch's own, this class counts updates on the CPU and copies no count to the device, so
    that no update waits for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Adds a set of weights to the average.

        Raises:
            SettingsError: a buffer was made, resized or dropped since the model was copied.
        """
        changed = {name for name, _ in _buffer_shapes(self.module) ^ _buffer_shapes(model)}
        require(
            not changed,
            "hyperparameters.weight_averaging needs buffers of fixed shapes, but the model made, "
            f"resized or dropped {', '.join(sorted(changed))} as it ran: make buffers in __init__, "
            "as large as they will be",
            SettingsError,
        )
        number = int(self.n_averaged)
        # The first set replaces the initial average.
        decay = min(self.decay, (1 + number) / (10 + number)) if number else 0.0
        averaged, given = [], []
        with torch.no_grad():
            for kept, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
                if kept.is_floating_point() or kept.is_complex():
                    averaged.append(kept)
                    given.append(parameter)
                else:  # an order or a mask
                    kept.copy_(parameter)
            get_ema_multi_avg_fn(decay)(averaged, given, self.n_averaged)
            buffers = zip(self.module.named_buffers(), model.buffers(), strict=True)
            for (name, kept), buffer in buffers:
                # The statistics of a normalisation belong to the weights that they were taken with.
                # Other buffers may be constants, even infinite ones, and have no mean.
                if name.endswith(STATISTICS):
                    kept.lerp_(buffer, 1 - decay)
                else:
                    kept.copy_(buffer)
        self.n_averaged += 1


def _buffer_shapes(model: nn.Module) -> set[tuple[str, torch.Size]]:
    return {(name, buffer.shape) for name, buffer in model.named_buffers()}


def score_of(row: Row, task: Task) -> tuple[float, ...]:
    """The score of an epoch's validation metrics; a task may give a single number."""
    score = task.score(split_of(row, "validation"))
    return tuple(score) if isinstance(score, (tuple, list)) else (score,)


def split_of(row: Row, split: str) -> dict[str, float]:
    """The metrics of one split from an epoch's row."""
    return {
        key.removeprefix(f"{split}_"): value
        for key, value in row.items()
        if key.startswith(f"{split}_")
    }


def check_alike(found: Any, own: Any, name: str) -> None:
    """Raises ValueError unless ``found`` has the form of ``own``, and its tensors are finite.

    They have the same form if types, keys, lengths of lists and shapes of tensors are the same. A
    whole number may stand for a float. What is infinite or undefined in ``own`` may be so in
    ``found``.
    """
    parts: Iterable[Any] = ()
    match own:
        case Tensor():
            alike = isinstance(found, Tensor) and _form(found) == _form(own)
            if alike:
                own = own.cpu()
                same = (found == own) | (found.isnan() & own.isnan())
                alike = bool((torch.isfinite(found) | same).all())
        case dict():
            alike, parts = isinstance(found, dict) and found.keys() == own.keys(), own.items()
        case list():
            alike, parts = isinstance(found, list) and len(found) == len(own), enumerate(own)
        case float():
            alike = isinstance(found, (int, float))
        case _:
            alike = isinstance(found, type(own))
    if not alike:
        raise ValueError(f"{name} is not what it should be, or not finite")
    for part, one in parts:
        check_alike(found[part], one, f"{name}, {part}")


_form = attrgetter("shape", "dtype", "layout")


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of PyTorch's generators, from which dropout draws its seeds."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts the generators into a state that :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that tells PyTorch which device is meant; for MPS there is none."""
    return () if device.type == "mps" else (device,)


def decisive_settings(config: Any) -> Iterator[str]:
    """The keys of the settings that decide what the validation says of a network.

    They are those that act without training, and those that decide which samples are held out. The
    numbers of steps and of sequences that run at once change no more than the rounding.
    """
    own = (f"hyperparameters.{name}" for name in ("epoch", "batch_size", "chunk"))
    left_out = {"name", *LOCAL_KEYS, *own}
    for key, needs in needs_of(config):
        name = key.rpartition(".")[2]
        of_others = key in left_out or name.startswith("test_") or name.endswith("path")
        if of_others or is_dataclass(attrgetter(key)(config)):
            continue
        if TRAINING not in needs or name in SIZES:
            yield key
