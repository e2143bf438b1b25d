"""The experiment: trains and evaluates any model on any task, and can stop and resume anywhere."""

import dataclasses
import errno
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from snn_lib import distributed
from snn_lib.activity import Activity, count_activity
from snn_lib.checkpoints import (
    load_checkpoint,
    load_weights,
    remove_leftovers,
    save_checkpoint,
)
from snn_lib.config import ExperimentConfig, one_line, require
from snn_lib.errors import InputError, RunError
from snn_lib.metrics import add_sums
from snn_lib.optimizers import get_optimizer, parameter_groups
from snn_lib.resuming import (
    TIMES,
    Progress,
    check_alike,
    learning_settings,
    rng_state,
    set_rng_state,
)
from snn_lib.run_log import Row, RunLog, environment, new_folder
from snn_lib.schedulers import get_scheduler, steps_every_batch
from snn_lib.synapses import IIRSynapse

Batch = tuple[Tensor, Tensor]
Checkpoint = dict[str, Any]
BATCHES_PER_DISPLAY = 25
REMEDY = (
    "Start again with a lower learning rate, or resume with optimizer.gradient_clipping=1 or "
    "hyperparameters.constraint=stable: checkpoints of earlier epochs are untouched"
)


class Task(Protocol):
    """What an experiment is about: its data, its loss and its metrics."""

    config_class: type[ExperimentConfig]
    unit: str  # what a sample is, for the progress bar
    batches_per_epoch: int

    def __init__(self, config: Any, device: torch.device, rank: int, world: int) -> None: ...

    def train_batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """This process's share of the batches of an epoch, from number ``start`` on."""

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """The ``validation`` or ``test`` batches, the same every time."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The mean loss of a batch, and sums over its samples, ``samples`` among them."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from sums over many batches."""

    def score(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """What the best epoch is chosen by; higher is better."""

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Lines that ``--test`` prints beyond the metrics and firing rates."""


class Stopped(Exception):
    """The run was asked to stop, and its last checkpoint is written."""


class Experiment:
    """A model and its task, on one device of one process or of several.

    Args:
        build_model: makes the model from the configuration.
        task_class: the task.
        config: the configuration.
        stop_requested: asked after every batch whether to stop.

    Raises:
        InputError: the device does not exist, or the data is missing or corrupt.
    """

    def __init__(
        self,
        build_model: Callable[[Any], nn.Module],
        task_class: type[Task],
        config: Any,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.stop_requested = config, stop_requested
        self.settings = config.hyperparameters
        self.rank, self.world = distributed.rank_and_world()
        self.device = choose_device(config.device)
        self.task = task_class(config, self.device, self.rank, self.world)
        torch.manual_seed(config.seed)  # the same first weights in every process
        self.model = build_model(config).to(self.device)
        torch.manual_seed(config.seed + self.rank)  # other dropout in each
        self.synapses = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, IIRSynapse)
        }
        self.average: AveragedModel | None = None
        self.environment = environment(self.device, self.world)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        share = f", {self.world} processes" if self.world > 1 else ""
        self.say(
            f"{config.name}: {parameters:,} parameters on {self.device}{share}, batches of "
            f"{self.settings.batch_size}, seed {config.seed}"
        )

    def say(self, line: str) -> None:
        """Prints a line, once however many processes there are."""
        if self.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def checkpoint_path(self, which: str) -> Path:
        """Where the ``last`` or the ``best`` checkpoint of this run is."""
        return Path(self.config.checkpoint_base_path) / f"{self.config.name}_{which}"

    def train(self, checkpoint: Checkpoint | None = None, source: Path | None = None) -> Row:
        """Trains, from the start or on from a checkpoint, and prints a line an epoch.

        Args:
            checkpoint, source: a last checkpoint and its path.

        Returns:
            ``best``, the best epoch's row of metrics, and ``test``, its metrics on the test split.

        Raises:
            InputError: the checkpoint does not fit, or nothing can be written where the
                configuration says.
            RunError: a loss, gradient or weight is not finite, or the disk is full.
            Stopped: as ``stop_requested`` said; the last checkpoint continues from here.
        """
        self.trained = self.model
        if self.world > 1:
            self.trained = DistributedDataParallel(self.model)
        total_batches = self.settings.epoch * self.task.batches_per_epoch
        try:
            self.optimizer = get_optimizer(parameter_groups(self.model, self.config), self.config)
            self.scheduler = get_scheduler(self.optimizer, self.config, total_batches)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InputError(
                f"PyTorch refuses the options of optimizer.{self.config.optimizer.optimizer_choice}"
                f" or scheduler.{self.config.scheduler.scheduler_choice}: {one_line(error)}"
            ) from None
        if self.settings.weight_averaging:
            averaging = warmed_up_average(self.settings.weight_averaging)
            self.average = AveragedModel(self.model, multi_avg_fn=averaging)
        self.progress = Progress(batches=self.task.batches_per_epoch)
        if checkpoint is not None:
            self._restore(checkpoint, source, total_batches)
        self._open_log(resumed=checkpoint is not None)
        if self._ends_with_best_epoch():  # a resumed run, maybe killed before it had written that
            self._save_best()

        while self.progress.epoch < self.settings.epoch:
            self._train_epoch()
            self._finish_epoch()

        best = self._best_row()
        path = self.checkpoint_path("best")
        distributed.barrier()
        finished = self._load_best()
        if finished is None:
            raise RunError(f"{path} is not of this run: the best epoch was {best['epoch']}")
        load_weights(self.model, finished, path)
        self.average = None
        test, _ = self.evaluate("test")
        seconds, data_seconds = (sum(row[key] for row in self.progress.history) for key in TIMES)
        self.say(
            f"best epoch {best['epoch']}: validation {described(split_of(best, 'validation'))}; "
            f"test {described(test)}\n"
            f"trained for {seconds:.0f} s, {100 * data_seconds / max(seconds, 1e-9):.1f} % of it "
            f"preparing data; metrics in {self.progress.folder}, model in {path}"
        )
        return {"best": best, "test": test}

    @torch.inference_mode()
    def evaluate(self, split: str) -> tuple[dict[str, float], Activity]:
        """Metrics of a split, and how active the network was."""
        model = self._evaluated_model()
        model.eval()
        sums: dict[str, Any] = {}
        with count_activity(model) as activity, self.autocast():
            for batch in self.task.evaluation_batches(split):
                add_sums(sums, self._loss(model, batch)[1])
        activity.sum_over_processes(self.device)
        return self.task.metrics(distributed.total(sums, self.device)), activity

    def test(self, checkpoint: Checkpoint, source: Path) -> dict[str, float]:
        """Evaluates a checkpoint on the test split; prints its metrics and its activity.

        Raises:
            InputError: the checkpoint belongs to another model.
        """
        load_weights(self.model, checkpoint, source)
        begin = time.perf_counter()
        metrics, activity = self.evaluate("test")
        self.say(f"{source}, epoch {checkpoint.get('epoch', 'unknown')}: test {described(metrics)}")
        for name, rate in activity.firing_rates().items():
            self.say(f"layer {name}: {rate:.4f} spikes per neuron and step")
        with self.autocast():
            for line in self.task.report(self.model, activity):
                self.say(line)
        self.say(f"tested in {time.perf_counter() - begin:.1f} s")
        return metrics

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        loss, sums = self.task.loss(model, batch)
        if sums["samples"] == 0:  # this process's share of a small last batch: a mean of nothing
            return loss.nan_to_num(), dict.fromkeys(sums, 0.0)
        return loss, sums

    def _evaluated_model(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def autocast(self) -> torch.autocast:
        """The context of ``hyperparameters.precision`` for the matrix products."""
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _train_epoch(self) -> None:
        progress, total = self.progress, self.task.batches_per_epoch
        batches = self.task.train_batches(progress.epoch, progress.batch)
        self.trained.train()
        bar = tqdm(
            total=total,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}/{self.settings.epoch}",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=None if self.rank == 0 else True,  # None: shown on a terminal only
        )
        with bar:
            while progress.batch < total:
                begin = time.perf_counter()
                batch = next(batches)
                progress.data_seconds += time.perf_counter() - begin
                add_sums(progress.sums, self._train_batch(batch))
                progress.batch += 1
                progress.seconds += time.perf_counter() - begin
                bar.update()
                if progress.batch % BATCHES_PER_DISPLAY == 0 and not bar.disable:
                    shown = {key: float(value) for key, value in progress.sums.items()}
                    rate = shown["samples"] / progress.seconds
                    text = f"{described(self.task.metrics(shown))}, {rate:.0f} {self.task.unit}/s"
                    bar.set_postfix_str(text)
                stop = distributed.any_process(self.stop_requested(), self.device)
                if stop and progress.batch < total:  # else the epoch is finished first
                    self._check_weights()
                    self._save_last()
                    raise Stopped

    def _train_batch(self, batch: Batch) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, sums = self._loss(self.trained, batch)
        if self.world > 1:  # the last batch may not divide equally: weight each process's mean
            samples = distributed.total({"samples": sums["samples"]}, self.device)["samples"]
            loss = loss * (sums["samples"] * self.world / samples)
        loss.backward()
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in gradients])
        if not torch.isfinite(loss + norm):
            raise RunError(self._explain_numbers(loss, norm))
        if self.config.optimizer.gradient_clipping:
            limit = self.config.optimizer.gradient_clipping
            nn.utils.clip_grads_with_norm_(gradients, limit, norm)
        self.optimizer.step()
        if self.average is not None:
            # Averaged are the filters at work, not what a step makes of the parameters. Writing a
            # checkpoint pulls the average back as well: done every time, resuming changes nothing.
            for module in (*self.model.modules(), *self.average.modules()):
                if isinstance(module, IIRSynapse):
                    module.project_()
            self.average.update_parameters(self.model)
        if steps_every_batch(self.scheduler):
            self.scheduler.step()
        return sums

    def _explain_numbers(self, loss: Tensor, norm: Tensor) -> str:
        """Where the numbers went wrong, and what to change."""
        weights = dict(self.model.named_parameters())
        gradients = {f"gradient of {k}": p.grad for k, p in weights.items() if p.grad is not None}
        broken = not_finite({**weights, **gradients})
        if broken:
            cause = f"not finite: {broken}"
        elif not torch.isfinite(loss):
            cause = "not finite: the loss alone"
        else:  # its sum of squares overflows
            largest = max(gradients, key=lambda name: gradients[name].abs().max().item())
            cause = f"the largest is {gradients[largest].abs().max().item():g}, in the {largest}"
        radii = {
            name: synapse.pole_radius()
            for name, synapse in self.synapses.items()
            if torch.isfinite(synapse.alpha).all()
        }
        widest = max(radii, key=radii.get, default=None)
        poles = (
            f"; the largest pole radius is {radii[widest]:.4f}, in layer {widest}" if widest else ""
        )
        return (
            f"epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}: the loss is "
            f"{loss.item():g} and the gradient's norm {norm.item():g} ({cause}){poles}. {REMEDY}"
        )

    def _finish_epoch(self) -> None:
        progress = self.progress
        training = self.task.metrics(distributed.total(progress.sums, self.device))
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if self.scheduler is not None and not steps_every_batch(self.scheduler):
            self.scheduler.step()
        self._check_weights()
        validation, activity = self.evaluate("validation")
        rates = activity.firing_rates()
        radii = {name: synapse.pole_radius() for name, synapse in self.synapses.items()}
        self._warn(rates, radii)
        row = {
            "epoch": progress.epoch + 1,
            "learning_rate": learning_rate,
            **{f"train_{key}": value for key, value in training.items()},
            **{f"validation_{key}": value for key, value in validation.items()},
            **{f"firing_rate_{name}": rate for name, rate in rates.items()},
            **{f"pole_radius_{name}": radius for name, radius in radii.items()},
            "seconds": round(progress.seconds, 3),
            "data_seconds": round(progress.data_seconds, 3),
        }
        progress.history.append(row)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.sums, progress.seconds, progress.data_seconds = {}, 0.0, 0.0

        # The last first: of it the best can be written again, should the run be killed in between.
        self._save_last()
        is_best = self._ends_with_best_epoch()
        if is_best:
            self._save_best()
        if self.rank == 0:
            self.log.write(progress.history)
        self.say(
            f"epoch {row['epoch']}/{self.settings.epoch}: train {described(training)}; "
            f"validation {described(validation)}; {row['seconds']:.1f} s"
            + (" (best)" if is_best else "")
        )

    def _warn(self, rates: dict[str, float], radii: dict[str, float]) -> None:
        """Tells, once a run, of each layer that has gone silent, saturated or unstable."""
        every = ", ".join(f"{name} {rate:.4f}" for name, rate in rates.items())
        warnings = {}
        for name, rate in rates.items():
            if rate == 0 or rate > 0.95:
                key = f"layer {name} {'is silent' if rate == 0 else 'fires at almost every step'}"
                warnings[key] = f"{key}; firing rates, in spikes per neuron and step: {every}"
        for name, radius in radii.items():
            if radius >= 1:
                warnings[f"layer {name} is unstable"] = (
                    f"a filter of layer {name} is unstable, its pole radius is {radius:.4f}; "
                    "hyperparameters.constraint=stable prevents that"
                )
        for key, text in warnings.items():
            if key not in self.progress.warned:
                self.progress.warned.append(key)
                self.say(f"warning: epoch {self.progress.epoch + 1}: {text}")

    def _best_row(self) -> Row:
        """The best epoch's row of metrics, the earliest of equals."""
        return max(
            self.progress.history, key=lambda row: self.task.score(split_of(row, "validation"))
        )

    def _ends_with_best_epoch(self) -> bool:
        """Whether the weights are those of the best epoch so far."""
        history = self.progress.history
        return self.progress.batch == 0 and bool(history) and self._best_row() is history[-1]

    def _load_best(self) -> Checkpoint | None:
        """The best checkpoint, if it is there and that of this run's best epoch."""
        path = self.checkpoint_path("best")
        if not path.exists():
            return None
        checkpoint = load_checkpoint(path)
        found = checkpoint.get("metrics")
        # Without the times, which each process measures by itself; as text, since a file may hold
        # anything and nan differs from itself.
        row = {key: value for key, value in self._best_row().items() if key not in TIMES}
        same = isinstance(found, dict) and repr({key: found.get(key) for key in row}) == repr(row)
        return checkpoint if same else None

    def _check_weights(self) -> None:
        """Raises RunError if the last batch broke the weights, which no gradient has met since."""
        broken = not_finite(self.model.state_dict())
        if broken:
            raise RunError(f"epoch {self.progress.epoch + 1}: {broken} not finite. {REMEDY}")

    def _open_log(self, resumed: bool) -> None:
        if self.rank:
            return
        progress, runs = self.progress, Path(self.config.runs_path)
        try:
            Path(self.config.checkpoint_base_path).mkdir(parents=True, exist_ok=True)
            for which in ("last", "best"):
                self._check_writable(self.checkpoint_path(which))
            if not resumed:
                self._set_earlier_run_aside()
            folder = Path(progress.folder)
            if folder.parent != runs / self.config.name or not folder.is_dir():
                progress.folder = str(new_folder(runs / self.config.name))
            self.log = RunLog(
                Path(progress.folder),
                dataclasses.asdict(self.config),
                self.environment,
                self.config.tensorboard,
                progress.epoch,
            )
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename}: {error.strerror}; set runs_path and "
                "checkpoint_base_path to folders that can be written"
            ) from None
        if progress.history:
            self.log.write(progress.history)

    def _set_earlier_run_aside(self) -> None:
        """Renames what an earlier run of this name left, so that this one does not overwrite it."""
        paths = {which: self.checkpoint_path(which) for which in ("last", "best")}
        if not any(path.exists() for path in paths.values()):
            return
        name = f"{self.config.name}_previous"
        for which, path in paths.items():
            previous = path.with_name(f"{name}_{which}")
            previous.unlink(missing_ok=True)
            if path.exists():
                path.rename(previous)
        self.say(
            f"the earlier run of this name is {name} now: --train --resume name={name} goes on "
            "with it"
        )

    @staticmethod
    def _check_writable(path: Path) -> None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        remove_leftovers(path)
        probe = path.with_name(f"{path.name}.probe.tmp")
        probe.touch()
        probe.unlink()

    def _save_best(self) -> None:
        """Writes the finished model as it is after this epoch."""
        if self.rank:
            return
        row = self.progress.history[-1]
        save_checkpoint(
            self.checkpoint_path("best"),
            {
                "epoch": row["epoch"],
                "snn_state_dict": self._evaluated_model().state_dict(),
                "config": dataclasses.asdict(self.config),
                "environment": self.environment,
                "metrics": row,
            },
        )

    def _save_last(self) -> None:
        """Writes the checkpoint from which the run resumes to the same numbers."""
        rng = distributed.gather(rng_state(self.device))
        sums = distributed.total(self.progress.sums, self.device)
        if self.rank:
            return
        save_checkpoint(
            self.checkpoint_path("last"),
            {
                "epoch": self.progress.epoch,
                "snn_state_dict": self.model.state_dict(),
                "average_state_dict": self.average.state_dict() if self.average else None,
                "optimizer_state_dict": self.optimizer.state_dict(),
                "rng": rng,
                "config": dataclasses.asdict(self.config),
                "environment": self.environment,
                "metrics": self.progress.history,
                "progress": {**vars(self.progress), "sums": sums},
            },
        )

    def _restore(self, checkpoint: Checkpoint, source: Path, total_batches: int) -> None:
        if "optimizer_state_dict" not in checkpoint or "progress" not in checkpoint:
            raise InputError(
                f"{source} is a finished model, without the state of its training: resume from "
                "the checkpoint that ends in _last"
            )
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()  # shows what its state looks like; the weights come next
        load_weights(self.model, checkpoint, source)
        try:
            self.progress = Progress(**checkpoint["progress"])
            self.progress.check()
            optimizer = self.optimizer.state_dict()
            state = dict(checkpoint["optimizer_state_dict"])["state"]
            for number, values in state.items():
                check_alike(values, optimizer["state"][number], f"the optimiser's state {number}")
            self.optimizer.load_state_dict({**optimizer, "state": state})
            if self.average is not None:
                average = checkpoint["average_state_dict"]
                check_alike(average, self.average.state_dict(), "the average")
                self.average.load_state_dict(average)
            if self.rank < len(checkpoint["rng"]) == self.world:
                set_rng_state(checkpoint["rng"][self.rank], self.device)
            if self.progress.history:
                self._best_row()  # fails on the metrics of another task
            begun_with = dict(checkpoint["config"])
            planned = begun_with["hyperparameters"]["epoch"] * self.progress.batches
            own = learning_settings(begun_with)
        except Exception as error:  # whatever a file holds that is no checkpoint of such a run
            raise InputError(
                f"{source} cannot be resumed with this configuration: its optimiser, scheduler or "
                f"progress do not fit ({type(error).__name__}: {one_line(error)})"
            ) from None
        require(
            own == learning_settings(dataclasses.asdict(self.config)),
            "the options of optimizer and scheduler cannot change when a run is resumed, as their "
            "state goes on: start a new one (optimizer.gradient_clipping may change)",
        )
        require(
            planned == total_batches or not isinstance(self.scheduler, OneCycleLR),
            "OneCycleLR plans the whole run: hyperparameters.epoch, hyperparameters.batch_size and "
            "the number of samples cannot change when it is resumed",
        )
        require(
            self.progress.batches == self.task.batches_per_epoch
            or (self.progress.batch == 0 and not steps_every_batch(self.scheduler)),
            f"{source} stopped in the middle of an epoch of {self.progress.batches} batches, or "
            "its scheduler counts them: hyperparameters.batch_size and the number of samples "
            "cannot change now",
        )
        self.progress.batches = self.task.batches_per_epoch
        if self.scheduler is not None:  # its state is how often it stepped
            steps = self.progress.epoch
            if steps_every_batch(self.scheduler):
                steps = steps * self.progress.batches + self.progress.batch
            for _ in range(min(steps, total_batches)):
                self.scheduler.step()
        require(
            not self.progress.history
            or self._ends_with_best_epoch()
            or self._load_best() is not None,
            f"the best epoch so far is not at {self.checkpoint_path('best')}: put it there, or set "
            "checkpoint_base_path",
        )
        if self.rank:  # the sums of all processes go on in the first
            self.progress.sums = dict.fromkeys(self.progress.sums, 0.0)
        self.say(
            f"resumed from {source} after {self.progress.epoch} epochs and "
            f"{self.progress.batch} batches"
        )


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; other names are PyTorch's.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # every backend fails in its own way
        raise InputError(f"device={name!r} is not available here, use device=cpu") from None
    return device


def warmed_up_average(decay: float) -> Callable[..., None]:
    """An exponential moving average that forgets faster at first, when it has seen little.

    The decay of update n is min(decay, (1 + n) / (10 + n)).
    """

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        seen = float(count)
        get_ema_multi_avg_fn(min(decay, (1 + seen) / (10 + seen)))(averaged, current, count)

    return update


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The names of those that have an infinite or undefined element, separated by commas."""
    return ", ".join(k for k, values in tensors.items() if not torch.isfinite(values).all())


def split_of(row: Row, split: str) -> dict[str, float]:
    """The metrics of one split from an epoch's row."""
    return {
        key.removeprefix(f"{split}_"): value
        for key, value in row.items()
        if key.startswith(f"{split}_")
    }


def described(metrics: dict[str, float]) -> str:
    """Metrics as text: ``loss 0.0312, accuracy 99.12 %``."""
    shares = ("accuracy", "retrieval")
    return ", ".join(
        f"{key} {100 * value:.2f} %" if key in shares else f"{key} {value:.4f}"
        for key, value in metrics.items()
    )
