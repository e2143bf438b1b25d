"""The experiment: trains and evaluates any model on any task, and can stop and resume anywhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snn_lib.chunks import Chunked
from snn_lib.containers import BATCH_NORMALISATIONS, tensors_in
from snn_lib.errors import InputError, RunError, SettingsError, refusing, require
from snn_lib.inspection.activity import Activity, count_activity
from snn_lib.kernels import use_backend
from snn_lib.penalties import collect_spikes, network_penalty, penalised_layers
from snn_lib.rounding import layers_to_round, rounded_weights
from snn_lib.seeds import DATA, EVALUATION, FIRST_WEIGHTS, batch_seed, other_seeds
from snn_lib.settings import ExperimentConfig
from snn_lib.stability import without_warning
from snn_lib.tasks.base import Task, add_sums, check_task, metrics_of, read_sums
from snn_lib.training import diagnosis, display, distributed
from snn_lib.training.building import BuildModel, build, choose_device
from snn_lib.training.checkpoints import (
    Checkpoint,
    check_readable,
    load_checkpoint,
    load_weights,
    unchanged_if_refused,
)
from snn_lib.training.config import attributes_of, config_from_dict
from snn_lib.training.display import describe, introduction
from snn_lib.training.run_folder import (
    RunFolder,
    begin_run,
    continue_run,
    environment,
    name_of,
    newest,
)
from snn_lib.training.state import TIMES, Progress, Row, TrainingState, split_of


class Stopped(Exception):
    """The run was asked to stop, and its last checkpoint is written."""


class Experiment:
    """A model and its task, on one device of one process or of several.

    Args:
        build_model: makes the model from the configuration: ``build_model(config)``, or
            ``build_model(config, task)`` if its layers depend on what the task has read.
        task: the task that the model learns, which no other experiment may have.
        config: the configuration, by default that of the task with its defaults. It is copied: what
            you change in it afterwards has no effect.
        initialise: called as ``initialise(model, task)`` if training starts from scratch and not
            from ``config.first_weights``, to find first weights on the training data. The task
            then gives every process all of the data. The model and the task's batches are on the
            device. If it trains the network alone, without epochs, it may return sums as those of
            ``Task.loss``, over training samples that were each answered by a fit without it: they
            give the validation metrics.
        stop_requested: called after every batch; returns whether to stop.

    Attributes:
        model: the model, on its device. After training it has the weights of the best epoch.
        run: the folder of the run; ``None`` before training.
        script: the name of the script, which is written into checkpoints.

    Raises:
        InputError: the device or the backend cannot be used, PyTorch's default device is another
            one than the CPU, the data is missing or corrupt, a setting is wrong or does not fit the
            data or the model, ``build_model`` makes none that can be trained, or ``torchrun`` has
            started this process, which has not joined the others.
    """

    def __init__(
        self,
        build_model: BuildModel,
        task: Task,
        config: Any = None,
        initialise: Callable[[Any, Any], Any] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.task, self.initialise, self.stop_requested = task, initialise, stop_requested
        check_task(task)
        config = task.config_class() if config is None else config
        require(
            isinstance(config, ExperimentConfig),
            f"config is a {type(config).__name__}, expected a {task.config_class.__name__}",
        )
        # A configuration that was made in Python has not been checked yet.
        self.config = config_from_dict(type(config), attributes_of(config), [])
        self.settings = self.config.hyperparameters
        require(
            torch.get_default_device().type == "cpu",
            "an experiment takes its device from its settings: leave PyTorch's default device at "
            "the CPU",
        )
        distributed.check_joined()
        self.rank, self.world = distributed.rank_and_world()
        self.device = choose_device(self.config.device)
        seed = self.config.seed
        with self._apart():
            with batch_seed(seed, DATA, 0):
                torch.manual_seed(seed)  # of all devices
                task.setup(self.config, self.device)
            torch.manual_seed(seed)  # of all devices, too
            model = build(build_model, self.config, task)
        self.set_up_with = task.config
        self.build_model = build_model
        self.model = model.to(self.device)
        self._in_chunks(self.model)  # refuses a model that cannot run in chunks
        if self.settings.rate_penalty:
            with refusing("hyperparameters.rate_penalty: "):
                penalised_layers(self.model)
        if bits := self.settings.weight_bits:
            with refusing(f"hyperparameters.weight_bits is {bits}, but "):
                layers_to_round(self.model)
        self.has_first_weights = True  # until something is loaded or trained
        self.state: TrainingState | Any = None  # while it trains
        self.run: RunFolder | Any = None  # once it trains
        self.script = ""
        with refusing(f"backend={self.config.backend}: ", InputError), self.backend():
            line = introduction(self.model, self.config, self.device, self.world)
        self.say(line)

    def train(self, checkpoint: Checkpoint | Path | str | None = None) -> Row:
        """Trains, from the start or from a last checkpoint, and prints a line for each epoch.

        Args:
            checkpoint: a last checkpoint, as ``load_checkpoint`` returns it, or its path.

        Returns:
            ``best``, the best epoch's row of metrics, and ``test``, its metrics on the test split,
            or ``None`` if there is none.

        Raises:
            InputError: the checkpoint or that of ``config.first_weights`` does not fit, the run's
                folder is in use or cannot be written, a setting does not fit the data or the model,
                ``initialise`` changes what is trained, there is no checkpoint and the model no
                longer has its first weights, nothing would be trained, or another experiment has
                the task.
            RunError: a loss, gradient or weight is not finite, or the disk is full.
            Stopped: ``stop_requested`` returned True; the last checkpoint continues from here.
        """
        self._check_task()
        if checkpoint is not None:
            checkpoint = load_checkpoint(checkpoint, "last")
        require(
            checkpoint is not None or self.has_first_weights,
            "this experiment's model has been trained or loaded already: make a new Experiment to "
            "train from the start, or give train() a last checkpoint to continue from",
        )
        with self._apart():
            return self._train(checkpoint) if self.settings.epoch else self._fit(checkpoint)

    def _train(self, checkpoint: Checkpoint | None) -> Row:
        """Trains the epochs that are left."""
        before, self.has_first_weights = (self.state, self.has_first_weights), False
        try:
            with unchanged_if_refused(self.model):
                self._begin(checkpoint)
        except InputError:
            self.state, self.has_first_weights = before  # a new state may average other weights
            raise
        with self.run, without_warning():  # _finish_epoch warns of unstable filters
            while self.progress.epoch < self.settings.epoch:
                stop = self._train_epoch()
                self._finish_epoch()
                if stop and self.progress.epoch < self.settings.epoch:
                    raise Stopped
        best, seconds, data_seconds = self.progress.best_row(self.task), *self.progress.times()
        return self._conclude(
            best,
            f"best epoch {best['epoch']}",
            f"trained for {seconds:.0f} s, {100 * data_seconds / max(seconds, 1e-9):.1f} % of it "
            "preparing data; ",
        )

    def _fit(self, checkpoint: Checkpoint | None) -> Row:
        """Trains without epochs: ``initialise`` solves the task, and nothing is resumed."""
        require(
            checkpoint is None and not self.config.first_weights,
            "hyperparameters.epoch is 0, so nothing would be trained from these weights: set it to "
            "the number of epochs of the whole run",
            SettingsError,
        )
        self.has_first_weights = False
        sums = self._find_first_weights()
        self.task.share(self.rank, self.world)
        if isinstance(sums, Mapping) and "samples" in sums:  # of all data, in every process
            validation = metrics_of(self.task, read_sums(sums))
        else:
            validation, _ = self.evaluate("validation")
        found = {f"validation_{key}": value for key, value in validation.items()}
        row = {"epoch": 0, **found, **dict.fromkeys(TIMES, 0.0)}
        with begin_run(self.config, self._made_by()) as self.run, self._rounded(self.model):
            weights = self.model.state_dict()
            self.run.write(self.run.best, {"epoch": 0, "snn_state_dict": weights, "metrics": row})
            self.run.write_metrics([row])
        return self._conclude(row, "trained without epochs")

    def _begin(self, checkpoint: Checkpoint | None) -> None:
        """Makes everything ready for the next batch: weights, optimiser and the run's folder."""
        chunk = self.settings.chunk
        normalises = any(isinstance(m, BATCH_NORMALISATIONS) for m in self.model.modules())
        require(
            not (chunk and normalises),
            f"hyperparameters.chunk is {chunk}, but a layer normalises over all steps",
            SettingsError,
        )
        batches = self.task.split("train")
        require(
            self.settings.batch_size <= batches.count,
            f"hyperparameters.batch_size is {self.settings.batch_size}, there are "
            f"{batches.count} {self.task.unit} to train on: set it to that or less",
            SettingsError,
        )
        if checkpoint is None and self.config.first_weights:
            load_weights(self.model, self.config.first_weights)
        elif checkpoint is None:
            self._find_first_weights()
        require(
            any(p.requires_grad for p in self.model.parameters()),
            "the model has no parameter that is trained (requires_grad)",
            SettingsError,
        )
        # Up to here every process has seen all the data, so all have found the same weights.
        self.task.share(self.rank, self.world)
        torch.manual_seed(self.config.seed + self.rank)  # each process draws its own dropout
        trained = self._in_chunks(self.model)
        self.trained = DistributedDataParallel(trained) if self.world > 1 else trained
        held_out = self.task.split("validation").count
        amounts = len(batches), self.task.divided()
        self.state = TrainingState(self.model, self.config, self.device, *amounts)
        self.finite_check = diagnosis.FiniteCheck(self.model, self.device)
        if checkpoint is not None:
            self.task.check_data(checkpoint)
            self.state.restore(checkpoint, self.task)
        unit = self.task.unit
        self.say(f"{batches.count:,} {unit} to train on, {held_out:,} to validate on")
        if checkpoint is None:
            self.run = begin_run(self.config, self._made_by())
        else:
            self.run = continue_run(self.state, self.task, checkpoint, self._made_by())
            self.say(
                f"resumed from {checkpoint.path} after {self.progress.epoch} epochs and "
                f"{self.progress.batch} batches"
            )

    def _find_first_weights(self) -> dict[str, Any] | None:
        """Calls ``initialise``, on all the data in every process, and returns what it returns."""
        seeded = batch_seed(self.config.seed, FIRST_WEIGHTS, 0)
        trained = [parameter.requires_grad for parameter in self.model.parameters()]
        shapes = self._shapes()
        with seeded, torch.no_grad(), self.backend(), diagnosis.blaming("first weights"):
            torch.manual_seed(self.config.seed)  # as in earlier versions, whose numbers repeat
            found = self.initialise(self.model, self.task) if self.initialise else None
        require(
            shapes == self._shapes(),
            "initialise changes the layers and not only their weights, but is not called when a "
            "run is resumed or tested: do so in build_model",
            RunError,  # as nobody can put the weights back
        )
        require(
            trained == [parameter.requires_grad for parameter in self.model.parameters()],
            "initialise changes which parameters are trained (requires_grad), but is not called "
            "when a run is resumed: do so in build_model",
        )
        return found

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.model.named_parameters()}

    def _made_by(self) -> Row:
        """What decides the numbers of a run, and how its network is used."""
        made_by = {
            "script": self.script,
            "build_model": name_of(self.build_model, self.script),
            "config_class": name_of(type(self.config), self.script),
            "environment": environment(self.device, self.world),
            **self.task.usage(),
        }
        check_readable({**made_by, "snn_state_dict": self.model.state_dict()})
        return made_by

    def _check_task(self) -> None:
        """Raises an error if the task has been set up anew, by another experiment for example."""
        require(
            self.task.config is self.set_up_with,
            "this task has been set up for something else since, so it has other data and "
            "settings: give each Experiment a task of its own",
        )

    def _train_epoch(self) -> bool:
        """Trains on the remaining batches of an epoch.

        Returns:
            Whether the run was asked to stop after the last of them: the epoch is finished first.
        """
        progress, total = self.progress, len(self.task.split("train"))
        batches = self.task.batches("train", progress.epoch, progress.batch)
        self.trained.train()
        saved, stop = time.monotonic(), False
        with display.show_epoch(progress, self.task, self.config, self.rank > 0) as advance:
            while progress.batch < total:
                begin = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    raise RunError(f"the data ended after {progress.batch} of {total} batches")
                progress.data_seconds += time.perf_counter() - begin
                add_sums(progress.sums, self._train_batch(batch))
                if not progress.history and progress.batch == 0:
                    # A task of the user's that lacks a sum fails before an epoch is spent. Too few
                    # samples for a metric are no reason.
                    with contextlib.suppress(ArithmeticError, ValueError):
                        self.task.score(self._metrics(progress.sums))
                progress.batch += 1
                progress.seconds += time.perf_counter() - begin
                advance()
                due = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
                stop, due = distributed.any_process(self.stop_requested(), due)
                if (stop or due) and progress.batch < total:
                    self._save_last()
                    saved = time.monotonic()
                    if stop:
                        raise Stopped
        return stop

    def _train_batch(self, batch: Any) -> dict[str, Any]:
        """Forward, backward, and a step of the optimiser; returns the batch's sums."""
        state, limit = self.state, self.config.optimizer.gradient_clipping
        if not self.model.training:  # stop_requested may have evaluated it
            self.trained.train()
        state.optimizer.zero_grad(set_to_none=True)
        # A loss of the user's own may draw from other generators than PyTorch's, whose state is
        # kept. The data of this batch is drawn with other numbers.
        own = self.config.seed + self.rank, self.progress.epoch, -1 - self.progress.batch
        with self._rounded(self.model), self.backend(), other_seeds(*own):
            with self.autocast():
                loss, sums = self._training_loss(batch)
            loss.backward()
        weights = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        self.finite_check.watch(self.progress.epoch + 1, self.progress.batch + 1, loss, norm)
        if limit:
            nn.utils.clip_grads_with_norm_(weights, limit, norm)
        state.step()
        return sums

    def _training_loss(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """The loss of this process's share of a batch, the penalty on firing rates, and the sums.

        The loss is weighted so that the mean over all processes is that of the batch, but for the
        penalty, which each computes on its share.
        """
        settings, penalised = self.settings, self.settings.rate_penalty > 0
        with collect_spikes(self.model) if penalised else contextlib.nullcontext({}) as spikes:
            loss, sums = self._task_loss(self.trained, batch)
        if penalised:
            rates = settings.target_rate, settings.rate_limit
            options = *rates, batch.lengths, settings.penalty_by_cost
            with refusing("hyperparameters.rate_penalty: "):
                penalty = network_penalty(self.model, spikes, *options)
            loss = loss + settings.rate_penalty * penalty
        if self.world > 1:  # the last batch may not divide equally
            share = float(sums[self.task.mean_over])
            loss = loss * (share * self.world / (distributed.add(share)[0] or 1.0))
        return loss, sums

    def _task_loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        """The task's mean loss of this process's share of a batch, which may be empty, and sums."""
        returned = self.task.loss(model, batch)
        require(
            isinstance(returned, Sequence)
            and len(returned) == 2
            and isinstance(returned[0], Tensor)
            and returned[0].numel() == 1
            and isinstance(returned[1], Mapping),
            f"{type(self.task).__name__}.loss returns no pair of a loss, a tensor of one number, "
            "and a dictionary of sums",
        )
        loss, sums = returned[0].reshape(()), returned[1]
        missing = {"samples", self.task.mean_over} - sums.keys()
        require(
            not missing,
            f"{type(self.task).__name__}.loss returns no sum {min(missing, default='')!r}",
        )
        if sums["samples"] == 0:  # a mean of nothing
            return loss.nan_to_num(), dict.fromkeys(sums, 0)
        return loss, sums

    def _finish_epoch(self) -> None:
        """Evaluates the model, writes checkpoints and metrics, and prints a line."""
        progress = self.progress
        training = self._metrics(progress.sums)
        self.state.end_epoch()
        self.finite_check.check_weights(progress.epoch + 1)
        kept = self.state.evaluated_model()
        # The first process writes its own buffers, so all evaluate those.
        distributed.share_buffers(kept)
        validation, activity = self.evaluate("validation")
        rates = activity.firing_rates()
        radii = {name: layer.pole_radius() for name, layer in diagnosis.synapses(kept).items()}
        for key, text in diagnosis.troubled_layers(rates, radii):
            if key not in progress.warned:  # once a run
                progress.warned.append(key)
                self.say(f"warning: epoch {progress.epoch + 1}: {text}")
        row = {
            "epoch": progress.epoch + 1,
            "learning_rate": self.state.learning_rate,
            **{f"train_{key}": value for key, value in training.items()},
            **{f"validation_{key}": value for key, value in validation.items()},
            **{f"firing_rate_{name}": rate for name, rate in rates.items()},
            **{f"pole_radius_{name}": radius for name, radius in radii.items()},
            "seconds": round(progress.seconds, 3),
            "data_seconds": round(progress.data_seconds, 3),
        }
        progress.finish_epoch(row)
        is_best = progress.is_at_best_epoch(self.task)
        # The last checkpoint comes first: if the run is killed before it has written the best one,
        # the resumed run writes the best one from the last.
        self._save_last()
        if is_best:
            self.run.write(self.run.best, self.state.best_checkpoint())
        self.run.write_metrics(progress.history)
        self.say(
            f"epoch {row['epoch']}/{self.settings.epoch}: train {describe(training)}; "
            f"validation {describe(validation)}; {row['seconds']:.1f} s"
            + (" (best)" if is_best else "")
        )

    def _save_last(self) -> None:
        """Writes the checkpoint from which the run can be resumed to the same numbers."""
        self.finite_check.check_weights(self.progress.epoch + 1)
        self.run.write(self.run.last, self.state.last_checkpoint())
        distributed.barrier()  # until then the first process may be writing it

    def _conclude(self, best: Row, title: str, times: str = "") -> Row:
        """Tests the best epoch, and prints what was found."""
        distributed.barrier()  # the first process may still be writing it
        load_weights(self.model.eval(), self.run.best)
        self.state = None  # from now on the model itself is evaluated
        test = self._evaluate_test()[0] if self.task.has("test") else None
        found = f"validation {describe(split_of(best, 'validation'))}"
        found += f"; test {describe(test)}" if test else ""
        where = f"metrics in {self.run.path}, model in {self.run.best}"
        self.say(f"{title}: {found}\n{times}{where}")
        return {"best": best, "test": test}

    def _evaluate_test(self) -> tuple[dict[str, float], Activity]:
        """Runs the model on the test split; a loss or layers that draw do so alike every time."""
        torch.manual_seed(self.config.seed + self.rank)
        return self.evaluate("test")

    @torch.no_grad()  # and not in inference mode, whose tensors a model could not keep
    def evaluate(self, split: str) -> tuple[dict[str, float], Activity]:
        """Runs the model on the ``validation`` or ``test`` split.

        Returns:
            Its metrics, and the network's activity.
        """
        self._check_task()
        model = self.model if self.state is None else self.state.evaluated_model()
        model.eval()
        sums: dict[str, Any] = {}
        in_chunks, rounded = self._in_chunks(model), self._rounded(model)
        seeds = other_seeds(self.config.seed + self.rank, EVALUATION, 0)
        with rounded, seeds, count_activity(model) as activity, self.autocast(), self.backend():
            for batch in self.task.batches(split):
                x, *_ = tensors_in(batch.x)
                activity.begin(batch.lengths, len(x))
                add_sums(sums, self._task_loss(in_chunks, batch)[1])
        activity.sum_by(distributed.total)
        return self._metrics(sums), activity

    def test(self, checkpoint: Checkpoint | Path | str | None = None) -> dict[str, float]:
        """Evaluates a checkpoint on the test split; prints its metrics and its activity.

        Args:
            checkpoint: as ``load_checkpoint`` returns it, or its path; by default the best of this
                run, or of the newest run of this name.

        Raises:
            InputError: the checkpoint belongs to another model or to other data, or another
                experiment has the task.
        """
        self._check_task()
        best = self.run.best if self.run else None
        checkpoint = load_checkpoint(checkpoint or best or newest(self.config, "best"))
        self.task.check_data(checkpoint)
        load_weights(self.model, checkpoint)
        self.has_first_weights = False
        self.state = None  # a training that was stopped has an average of other weights
        begin = time.perf_counter()
        with self._apart():
            metrics, activity = self._evaluate_test()
            epoch = checkpoint.get("epoch", "unknown")
            self.say(f"{checkpoint.path}, epoch {epoch}: test {describe(metrics)}")
            for name, rate in activity.firing_rates().items():
                self.say(f"layer {name}: {rate:.4f} spikes per neuron and step")
            with self._rounded(self.model), self.autocast(), self.backend():
                for line in self.task.report(self._in_chunks(self.model), activity):
                    self.say(line)
        self.say(f"tested in {time.perf_counter() - begin:.1f} s")
        return metrics

    @property
    def progress(self) -> Progress:
        """How far the training has come."""
        return self.state.progress

    def say(self, line: str) -> None:
        """Prints a line, once however many processes there are."""
        if self.rank == 0:
            display.say(line)

    def autocast(self) -> torch.autocast:
        """The context of ``hyperparameters.precision`` for the matrix products."""
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """The context in which no mode of the caller's counts, and that draws for itself."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            yield

    def backend(self) -> contextlib.AbstractContextManager[None]:
        """The context of ``backend`` for the kernels."""
        name = self.config.backend
        return contextlib.nullcontext() if name == "auto" else use_backend(name)

    def _rounded(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The context in which the weights have ``hyperparameters.weight_bits``."""
        return rounded_weights(model, self.settings.weight_bits)

    def _in_chunks(self, model: nn.Module) -> nn.Module:
        """The model as tasks run it: ``hyperparameters.chunk`` time steps at a time."""
        chunk = self.settings.chunk
        with refusing(f"hyperparameters.chunk is {chunk}: "):
            return Chunked(model, chunk) if chunk else model

    def _metrics(self, sums: dict[str, Any]) -> dict[str, int | float]:
        """The task's metrics from the sums of all processes."""
        return metrics_of(self.task, distributed.total(sums))
