"""Classification: cross-entropy and accuracy of a network's logits or of its spike counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_lib.chunks import Chunked
from snn_lib.data.batches import Batch
from snn_lib.errors import SettingsError, require
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.operations import CountedNetwork, Operations
from snn_lib.readout import READOUTS, at_least_float32, first_lead, within
from snn_lib.settings import TRAINING, ExperimentConfig, Hyperparameters, Settings, section, setting
from snn_lib.tasks.base import Task, output_of


@dataclass
class LabelSmoothing(Settings):
    """How sure the targets of a classification are."""

    label_smoothing: float = setting(
        0.0,
        "share of the target that is spread evenly over all classes",
        TRAINING,
        at_least=0,
        below=1,
    )


@dataclass
class ClassificationHyperparameters(LabelSmoothing, Hyperparameters):
    """Hyperparameters of classification: the model and its training."""


@dataclass
class ClassificationConfig(ExperimentConfig):
    """The configuration of a classification."""

    hyperparameters: ClassificationHyperparameters = section(ClassificationHyperparameters)


class Classification(Task):
    """A class for every sequence; a subclass has a ``readout_name`` or its own :meth:`answer`.

    Attributes:
        counts_spikes: whether the answer is the class whose output neuron spikes most. Such a
            network can answer before a sequence ends.
    """

    config_class: type[ExperimentConfig] = ClassificationConfig
    readout_name: str
    logit_scale: float
    counts_spikes = False

    def answer(self, output: Tensor, batch: Batch) -> Tensor:
        """What the readout makes of the network's output, ``(B, classes)``."""
        return READOUTS[self.readout_name]()(output, batch.lengths)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        """The answer as logits, ``(B, classes)``."""
        return at_least_float32(self.answer(output, batch)) * self.logit_scale

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean cross-entropy, and the sums that :meth:`metrics` needs."""
        logits = self.logits(output_of(model, batch.x, batch.lengths), batch)
        return self.cross_entropy(model, logits, batch.y)

    def cross_entropy(
        self, model: nn.Module, logits: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Mean cross-entropy of logits ``(B, classes)``, and sums.

        Targets are labels, ``(B,)``, or the probabilities of all classes, ``(B, classes)``. With
        probabilities, the right answer is the most probable class.
        """
        labels = right_classes(targets)
        targets = labels if targets.dim() == 1 else targets
        loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing(model))
        return loss, {
            "samples": len(labels),
            "loss": loss.detach() * len(labels),
            "correct": (logits.detach().argmax(1) == labels).sum(),
        }

    def smoothing(self, model: nn.Module) -> float:
        """The share of the target that is spread evenly over all classes.

        It is 0 but in training, so that validation losses can be compared between settings.
        """
        # A user's own class of settings may lack this one.
        smoothing = getattr(self.config.hyperparameters, "label_smoothing", 0.0)
        return smoothing if model.training else 0.0

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss and accuracy, over what ``mean_over`` counts."""
        count = max(sums[self.mean_over], 1)  # augmentation may leave an epoch without labels
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}

    def score(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """The best epoch is the most accurate one; of equally accurate ones, the lowest loss."""
        return metrics["accuracy"], -metrics["loss"]

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Reports spikes, operations, those of a dense network, and accuracy at every few steps."""
        sample = self.unit.removesuffix("s")
        try:
            counted, accuracy, stopped = self.stop_early(model, (1, 2, 3))
        except ValueError as error:
            yield f"operations are not counted: {error}"
            return
        work, dense = counted.operations(), counted.dense_operations()
        dense_work = Operations(0, dense, 0, 0)
        yield (
            f"{counted.spikes():,.0f} spikes and {counted.synaptic_operations():,.0f} synaptic "
            f"operations per {sample} ({work.additions:,.0f} additions and "
            f"{work.multiply_accumulates:,.0f} multiply-accumulates); a dense network of this size "
            f"takes {dense:,.0f} multiply-accumulates per step"
        )
        yield (
            f"filters and neurons: {work.filters:,.0f} and {work.neurons:,.0f} "
            f"multiply-accumulates per {sample}; all arithmetic by estimate "
            f"{describe_energy(work)} per {sample} (45 nm, without memory), the dense network's "
            f"{describe_energy(dense_work)} per step"
        )
        if not accuracy:
            return
        stride = 5 * -(-len(accuracy) // 25)
        early = ", ".join(
            f"{step}: {100 * accuracy[step - 1]:.2f} %"
            for step in range(stride, len(accuracy) + 1, stride)
        )
        if early:
            yield f"accuracy if the output is read after so many steps: {early}"
        for row in stopped:
            lead = "1 spike" if row["lead"] == 1 else f"{row['lead']} spikes"
            yield (
                f"stopped when one class is {lead} ahead: "
                f"{100 * row['accuracy']:.2f} % after {row['steps']:.1f} steps and "
                f"{row['operations']:,.0f} synaptic operations"
            )

    @torch.no_grad()
    def stop_early(
        self, model: nn.Module, leads: Sequence[float] = ()
    ) -> tuple[CountedNetwork, list[float], list[dict[str, float]]]:
        """Counts operations on the test split, and tests whether the answers are known early.

        Returns:
            The network with its counts. And, if the network counts spikes and answers at every
            step, no code of a user's own reads its output, and one class is right: the accuracy if
            they are counted up to each step (a sequence that has ended keeps its answer), and for
            each of the ``leads`` a row with the accuracy, the mean number of steps and of synaptic
            operations, if each sequence stops when one class has this lead. (There are no rows if
            its outputs are no whole numbers, of which nobody knows what a lead of 1 means.)

        Raises:
            ValueError: the operations cannot be counted, see :class:`CountedNetwork`.
        """
        counted = CountedNetwork(model.eval())
        run = Chunked(counted, model.steps) if isinstance(model, Chunked) else counted
        means = ("accuracy", "steps", "operations")
        counts = self.counts_spikes and self.reads_out()
        leads = leads if counts else ()
        rows = [{"lead": lead, **dict.fromkeys(means, 0.0)} for lead in leads]
        curves, are_whole = [], True
        for batch in self.batches("test"):
            total, count = batch.x.shape[:2]
            output, _ = run(batch.x, lengths=batch.lengths)
            # An output has no cost of its own, and a single one has no rival.
            if not counts or len(output) != total or output.shape[-1] < 2:
                continue
            if batch.y.dim() > 1 and self._is_of_the_user("loss", "cross_entropy"):
                continue  # only the user's loss knows which of several classes are right
            labels, lengths = right_classes(batch.y), batch.lengths
            if lengths is None:
                lengths = torch.full((count,), total, device=batch.x.device)
            output = at_least_float32(output) * within(output, lengths)
            are_whole = are_whole and torch.equal(output, output.round())
            decisions = output.cumsum(0).argmax(2)  # (T, B)
            curves.append((decisions == labels).sum(1))
            cost = counted.per_step.cumsum(0)
            for row in rows:
                answers, steps = first_lead(output, row["lead"])
                steps = steps.minimum(lengths)
                row["accuracy"] += (answers == labels).sum().item()
                row["steps"] += steps.sum().item()
                row["operations"] += cost.gather(0, steps[None] - 1).sum().item()
        rows = rows if curves and are_whole else []
        rows = [{**row, **{key: row[key] / counted.sequences for key in means}} for row in rows]
        longest = max(map(len, curves), default=0)
        whole = [torch.cat([c, c[-1:].expand(longest - len(c))]) for c in curves]
        correct = torch.stack(whole).sum(0).tolist() if whole else []
        return counted, [n / counted.sequences for n in correct], rows


def right_classes(targets: Tensor) -> Tensor:
    """The right class of each sequence, int64 ``(B,)``: of probabilities the most probable one."""
    return targets.argmax(1) if targets.dim() == 2 else targets.long()


def describe_energy(operations: Operations) -> str:
    """The energy of operations as text: ``1.25 uJ``, or ``2,300 pJ`` if it is below 0.1 uJ."""
    energy = operations.energy()
    return f"{1e6 * energy:,.2f} uJ" if energy >= 1e-7 else f"{1e12 * energy:,.0f} pJ"


@dataclass
class SpikeCounting(Settings):
    """Settings of a classification that counts output spikes."""

    dropout: float = setting(
        0.3, "share of hidden spikes dropped in training", TRAINING, at_least=0, below=1
    )
    logit_per_spike: float = setting(1.0, "what an output spike adds to its class's logit", above=0)
    early_answers: float = setting(
        0.0, "weight of the loss after every step, 0: none", TRAINING, at_least=0
    )


class CountClassification(Classification):
    """Answers with the class whose output neuron spikes most; see :class:`SpikeCounting`."""

    counts_spikes = True
    readout_name = "count"

    def setup(self, config: Any, device: torch.device) -> None:
        """See :class:`Task`."""
        own = self._is_of_the_user("answer", "logits") and not self._is_of_the_user("loss")
        require(
            not (own and config.hyperparameters.early_answers),
            "hyperparameters.early_answers does not know what your own logits or answer make of "
            "the output: leave it at 0, and add such a term to a loss of your own",
            SettingsError,
        )
        super().setup(config, device)
        self.logit_scale = config.hyperparameters.logit_per_spike

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy of the output neurons' spike counts; see :class:`Classification`.

        The setting ``early_answers`` is the weight of a second term: the mean over all steps of the
        cross-entropy of the counts up to this step.
        """
        output = output_of(model, batch.x, batch.lengths)  # (T, B, classes)
        loss, sums = self.cross_entropy(model, self.logits(output, batch), batch.y)
        weight = self.config.hyperparameters.early_answers
        if model.training and weight:
            logits = at_least_float32(output).cumsum(0) * self.logit_scale
            targets = batch.y.expand(len(logits), *batch.y.shape)
            logits, targets = logits.flatten(0, 1), targets.flatten(0, 1)
            if batch.lengths is not None:
                shown = within(output, batch.lengths).flatten()
                logits, targets = logits[shown], targets[shown]
            early, _ = self.cross_entropy(model, logits, targets)
            loss = loss + weight * early
        return loss, sums
