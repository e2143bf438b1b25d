"""Tasks on a user's own sequences: classes or numbers, of a sequence or of each of its steps.

    def data(config):
        return {"train": (x, y), "test": (x_test, y_test)}

    main(__file__, build_model, SequenceClassification(data, readout="mean"))

``x`` has the samples first, ``(samples, T, *features)``, or is a list of ``(T, *features)``. A
``torch.utils.data.Dataset`` of ``(sequence, target)`` serves as well. The network sees batches that
are time first, ``(T, B, *features)``, and padded with zeros to the longest sequence. The padding
changes neither the loss nor the metrics, unless the model averages over all steps of a batch, as
batch normalisation does in training, reads time backwards, or returns another number of steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from snn_lib.containers import Readout
from snn_lib.data.augmentation import AugmentationSettings, augment_sequences
from snn_lib.data.batches import Batch, Split, split_indices
from snn_lib.data.preparation import SequencePreparation
from snn_lib.data.sequences import SequenceDataset, collate, read_sample, sequence_dataset
from snn_lib.errors import InputError, SettingsError, require
from snn_lib.inspection.activity import Activity
from snn_lib.readout import EVERY_STEP, READOUTS, SpikeCount, at_least_float32, within
from snn_lib.seeds import batch_generator, batch_seed
from snn_lib.settings import TRAINING, ExperimentConfig, section
from snn_lib.tasks.base import Task, output_of
from snn_lib.tasks.classification import Classification, ClassificationConfig

ReadoutFunction = Callable[[Tensor, Tensor | None], Tensor]  # of an output and lengths
NO_LABEL = -1  # of a step that has none
VALIDATION_SHARE = 0.1  # of the training part, if there is no validation part


class SequenceTask(Task):
    """What tasks on sequences share: the data, its parts and their batches.

    Args:
        data: the parts by name, or a function of the configuration that returns them. There must be
            a part ``train``, and there may be ``validation`` and ``test``. A part is a data set of
            ``(sequence, target)``, or ``(x, y)``, or ``(x, y, lengths)`` with padded sequences.
            Without ``validation``, a tenth of ``train`` is held out, drawn by the seed, to choose
            the best epoch.
        readout: as in :class:`SequenceClassification`; ``None``: the output itself is the answer,
            and there is a target at every step.
        config_class: the class of the settings, by default that of the task.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]],
        readout: str | ReadoutFunction | None = None,
        *,
        config_class: type[ExperimentConfig] | None = None,
    ) -> None:
        super().__init__(config_class)
        self.data = data
        self.readout = find_readout(readout)
        self.targets_are_sequences = readout is None
        # A checkpoint can hold no readout but one that was given by its name.
        name = EVERY_STEP if readout is None else readout
        self.readout_name = name if isinstance(name, str) else None
        self._given = self.readout, self.readout_name

    def setup(self, config: Any, device: torch.device) -> None:
        """Reads the data; see :class:`Task`."""
        super().setup(config, device)
        self.preparation = type(self).preparation  # unless the function of the data makes one
        parts = self.read(config)
        require(
            isinstance(parts, Mapping),
            f"data is {type(parts).__name__}, expected the parts by name: {{'train': (x, y), ...}}",
        )
        unknown = parts.keys() - {"train", "validation", "test"}
        require(
            not unknown,
            f"data has a part {min(unknown, default='')!r}, expected train, validation and test",
        )
        require("train" in parts, "data has no part 'train'")
        self.parts: dict[str, Any] = {
            name: sequence_dataset(part, name, self.targets_are_sequences)
            for name, part in parts.items()
        }
        self.shapes: list[tuple[int, ...]] = []
        self.held_out = False  # whether the validation part was taken from the training part
        with batch_seed(config.seed, 0, 0):  # a data set may draw at random
            for name, part in self.parts.items():  # all of arrays, the first of a data set
                for index in range(len(part) if isinstance(part, SequenceDataset) else 1):
                    self.fetch(name, index)
        self.preparation = self.preparation or SequencePreparation(list(self.shapes[0]))
        if "validation" not in self.parts:
            self.parts.update(self._hold_out(self.parts["train"]))
            self.held_out = True
        if isinstance(self.readout, nn.Module):
            self.readout.to(device)

    def read(self, config: Any) -> Mapping[str, Any]:
        """The parts of the data by name."""
        return self.data(config) if callable(self.data) else self.data

    def _hold_out(self, whole: Any) -> dict[str, Dataset]:
        """Splits a data set into training and validation parts, drawn by the seed."""
        count = len(whole)
        validation = max(1, round(count * VALIDATION_SHARE))
        require(
            validation < count,
            f"{count} training sequences are too few to hold out {validation} for validation",
        )
        parts = split_indices(count, validation, self.config.seed)
        train, validation = (Subset(whole, part.tolist()) for part in parts)
        return {"train": train, "validation": validation}

    def has(self, split: str) -> bool:
        """See :class:`Task`; there need not be a ``test`` part."""
        return split in self.parts

    def divided(self) -> int:
        """See :class:`Task`."""
        return super().divided() if self.held_out else 0

    def fetch(self, part: str, index: int) -> tuple[Tensor, Tensor]:
        """Reads a sample of a part: a sequence ``(T, *features)`` and its target.

        Raises:
            InputError: the sample cannot be read, makes no sense, or has another shape than the
                sample that was read first. The message has its number in the user's own data.
        """
        data = self.parts[part]
        if self.held_out and part != "test":
            data, index, part = data.dataset, data.indices[index], "train"
        try:
            x, y = read_sample(data, index, self.targets_are_sequences)
            shapes = [tuple(x.shape[1:]), tuple(y.shape[self.targets_are_sequences :])]
            self.shapes = self.shapes or shapes
            require(
                shapes == self.shapes,
                f"features are {shapes[0]} and targets {shapes[1]}, expected {self.shapes[0]} and "
                f"{self.shapes[1]}, as in the sample that was read first",
            )
            y = self.read_target(y)
        except InputError as error:
            raise InputError(f"sample {index} of the {part} data: {error}") from error.__cause__
        return x, y

    def read_target(self, target: Tensor) -> Tensor:
        """A target in the type that losses take it in.

        Raises:
            InputError: it is not what the task needs.
        """
        return target

    def answer(self, output: Tensor, batch: Batch) -> Tensor:
        """What the readout makes of the model's output, or the output itself."""
        if self.readout is None:
            return output
        if isinstance(self.readout, Readout) and batch.lengths is not None:
            count = len(batch.lengths)
            require(
                output.shape[1:2] == (count,),
                f"the network's output has the shape {tuple(output.shape)}, expected (T, {count}, "
                "*): a value at every step, of which the readout makes the answer",
            )
        answer = self.readout(output, batch.lengths)
        require(
            isinstance(answer, Tensor) and answer.dim() > 0,
            f"the readout returns {shorten(repr(answer), 60, placeholder='...')}, expected a "
            "tensor (B, *): an answer for each sequence",
        )
        return answer

    def reads_out(self) -> bool:
        """See :class:`Task`; a subclass may have set another readout, without its name, since."""
        readout, name = self._given
        named = self.readout is readout or self.readout_name != name
        return named and super().reads_out()

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Changes a training batch at random, on the CPU; here it stays as it is."""
        return batch

    def mark_padding(self, batch: Batch) -> Batch:
        """Marks the targets of the padding as none; here they stay zeros."""
        return batch

    def make_split(self, split: str) -> Split:
        """See :class:`Task`."""
        require(split in self.parts, f"data has no part {split!r}")
        seed = self.config.seed

        def make_batch(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            mine = numbers[share].tolist()
            samples = [self.fetch(split, index) for index in mine or numbers[:1].tolist()]
            batch = collate(samples, self.targets_are_sequences)
            if split == "train":
                batch = self.augment(batch, batch_generator(seed + self.rank, epoch, number + 1))
            if mine:
                return self.mark_padding(batch)
            none = slice(0, 0)  # a small last batch has no sample for this process
            y = batch.y[:, none] if self.targets_are_sequences else batch.y[none]
            return Batch(batch.x[:, none], y)

        size = self.config.hyperparameters.batch_size
        return Split(len(self.parts[split]), size, make_batch, shuffle=split == "train")


@dataclass
class SequenceConfig(ClassificationConfig):
    """The configuration of a classification of sequences."""

    augmentation: AugmentationSettings = section(AugmentationSettings, TRAINING)


class SequenceClassification(SequenceTask, Classification):
    """A class for every sequence, or for every step of it: cross-entropy of the answer.

    The section ``augmentation`` of the settings says how training sequences are changed at random.

    Args:
        data: as in :class:`SequenceTask`; targets are class numbers, integers from 0 on. Without a
            readout there is one for each step, ``(T,)``. It is -1 where a step has no label: such
            steps count neither in the loss, which is the mean over all others of a batch, nor in
            the accuracy.
        readout: a name of ``snn_lib.readout.READOUTS`` (``count``, ``mean``, ``last``, ``maximum``,
            ``leaky``), or a function or module without parameters from ``(output, lengths)`` to
            ``(B, classes)``. ``lengths`` is ``None`` if all sequences of a batch have all its
            steps. A module is put into evaluation mode. ``None``: the network answers at every
            step.
        config_class: as in :class:`SequenceTask`.
        classes: the names of the classes, by number, for the use of the trained network.
    """

    config_class = SequenceConfig
    mean_over = ""  # labels, or samples with a readout, unless a user's class says otherwise
    _labels_seen, _highest = False, -1

    def __init__(
        self,
        data: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]],
        readout: str | ReadoutFunction | None = "count",
        *,
        config_class: type[ExperimentConfig] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(data, readout, config_class=config_class)
        self.classes = _names_of_classes(classes) or _names_of_classes(self.classes)
        self.counts_spikes = type(self.readout) is SpikeCount  # what derives from it may not count
        self.mean_over = self.mean_over or ("labels" if self.readout is None else "samples")

    def setup(self, config: ExperimentConfig, device: torch.device) -> None:
        """See :class:`SequenceTask`."""
        asked = self.readout is not None or self._is_of_the_user("loss")
        require(
            asked or not self._is_of_the_user("cross_entropy"),
            "with readout=None nobody asks a cross_entropy of your own: put it into a loss",
        )
        self._labels_seen, self._highest = False, -1  # of this data
        super().setup(config, device)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        """The answer, ``(B, classes)``, or ``(T, B, classes)`` at every step."""
        logits, labels = at_least_float32(self.answer(output, batch)) * self.logit_scale, batch.y
        outputs = logits.shape[-1]
        require(
            len(self.classes) in (0, outputs),
            f"there are {len(self.classes)} names of classes, but the network has {outputs} "
            "outputs",
        )
        require(len({*self.classes}) == len(self.classes), "classes has the same name twice")
        expected = f"({', '.join(map(str, labels.shape))}, classes)"
        require(
            logits.shape[:-1] == labels.shape,
            f"the answers have the shape {tuple(logits.shape)}, expected {expected}, of an output "
            "(T, B, classes)",
        )
        if labels.numel() and (labels.device.type == "cpu" or not self._labels_seen):
            self._labels_seen = True  # on a device only once, as looking waits for the device
            highest = max(labels.max().item(), self._highest)
            require(
                highest < outputs,
                f"there is a class {highest}, but the network has {outputs} outputs: classes count "
                f"from 0, so it needs {highest + 1}",
            )
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean cross-entropy of all sequences or labelled steps, and the sums of the metrics."""
        if self.readout is not None:
            return super().loss(model, batch)
        output = output_of(model, batch.x, batch.lengths)
        logits, labels = self.logits(output, batch), labels_of(batch)
        count = (labels >= 0).sum()
        total = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=NO_LABEL,
            reduction="sum",
            label_smoothing=self.smoothing(model),
        )
        return total / count.clamp(min=1), {
            "samples": labels.shape[1],
            "labels": count,
            "loss": total.detach(),
            "correct": (logits.detach().argmax(2) == labels).sum(),
        }

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Reports what every classification does, and the accuracy of the steps of each class."""
        yield from super().report(model, activity)
        judged = self.readout is None and self.loss_reads()  # else nobody knows what is right
        if judged and (accuracies := [*self._accuracies(model)]):
            yield f"accuracy by class: {', '.join(accuracies)}"

    @torch.no_grad()
    def _accuracies(self, model: nn.Module) -> Iterator[str]:
        """The share of each class's steps in the test split that are answered right, in words."""
        answered: Any = 0  # (classes, classes): how often each, by label
        for batch in self.batches("test"):
            # Only the user's loss knows what several labels or shares mean, how the model runs and
            # what its output is.
            if batch.y.dim() > 2 or batch.y.is_floating_point():
                return
            try:
                output = output_of(model, batch.x, batch.lengths)
                logits, labels = self.logits(output, batch), labels_of(batch)
            except Exception:
                if self._is_of_the_user("loss"):
                    return
                raise
            if logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
                return
            classes = logits.shape[2]
            pairs = (labels * classes + logits.argmax(2))[labels >= 0]
            answered = answered + pairs.bincount(minlength=classes**2).view(classes, classes)
        for number, row in enumerate(answered.tolist()):
            if any(row):
                name = self.classes[number] if self.classes else number
                yield f"{name}: {100 * row[number] / sum(row):.2f} %"

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Changes the sequences as the settings say; see :class:`SequenceTask`."""
        # A user's own class of settings need not have this section.
        settings = getattr(self.config, "augmentation", AugmentationSettings())
        if settings == AugmentationSettings():  # which changes nothing
            return batch
        return augment_sequences(batch, settings, generator, self.targets_are_sequences)

    def mark_padding(self, batch: Batch) -> Batch:
        """The labels of the padding are -1, if there is one at every step.

        Of targets of a user's own, probabilities of several classes, and true and false, are 0.
        """
        y, real = batch.y, batch.y.is_floating_point()
        if not self.targets_are_sequences or y.dtype == torch.bool or (real and y.dim() > 2):
            return batch
        return batch._replace(y=_mark(y if real else y.long(), batch.lengths))

    def read_target(self, target: Tensor) -> Tensor:
        """See :class:`SequenceTask`."""
        kind, whole = str(target.dtype).removeprefix("torch."), not target.is_floating_point()
        if self.readout is None:
            lowest = target.min().item()
            require(
                whole and target.dim() == 1 and lowest >= NO_LABEL,
                f"the target has shape {tuple(target.shape)} ({kind}) and begins at {lowest}, "
                "expected the number of a class for each step, an integer from 0 on, or -1 where "
                "there is none",
            )
            require(bool((target.long() >= 0).any()), "no step has a label: leave it out")
            self._highest = max(self._highest, int(target.max()))
            return target.long()
        single = target.dim() == 0
        found = f"is {target.item()}" if single else f"has shape {tuple(target.shape)}"
        require(
            whole and single and bool(target >= 0),
            f"the target {found} ({kind}), expected the number of a class, an integer from 0 on; "
            "for labels at every step, set readout=None",
        )
        self._highest = max(self._highest, int(target))
        return target.long()


class SequenceRegression(SequenceTask):
    """Numbers for every sequence, or for every step of it: mean squared error.

    Args:
        data: as in :class:`SequenceTask`. Targets have the shape of the network's answer, without
            the batch.
        readout: as in :class:`SequenceClassification`; ``None`` if there is a target at every step,
            ``(T, *targets)``.
        config_class: as in :class:`SequenceTask`.
    """

    mean_over = "elements"
    logit_scale = None

    def setup(self, config: ExperimentConfig, device: torch.device) -> None:
        """See :class:`SequenceTask`."""
        changes = getattr(config, "augmentation", None)
        changed = isinstance(changes, AugmentationSettings) and changes != AugmentationSettings()
        require(
            not changed or self._method("augment") is not SequenceTask.augment,
            "augmentation has no effect: the targets of a regression would have to change as well",
            SettingsError,
        )
        require(
            not getattr(config.hyperparameters, "label_smoothing", 0.0)
            or self._method("loss") is not SequenceRegression.loss,
            "hyperparameters.label_smoothing has no effect on the targets of a regression",
            SettingsError,
        )
        super().setup(config, device)

    def read_target(self, target: Tensor) -> Tensor:
        """See :class:`SequenceTask`; whole numbers become PyTorch's default precision."""
        return target.to(torch.get_default_dtype())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared error over a sequence's own steps, and sums."""
        output = self.answer(output_of(model, batch.x, batch.lengths), batch)
        require(
            output.shape == batch.y.shape,
            f"the network says {tuple(output.shape)}, the targets are {tuple(batch.y.shape)}",
        )
        own = torch.ones((), device=output.device)
        if self.readout is None and batch.lengths is not None:
            own = within(output, batch.lengths)
        targets = at_least_float32(batch.y)
        errors = (at_least_float32(output) - targets).square() * own
        elements = own.expand_as(errors).sum()
        several = not isinstance(batch.x, Tensor)  # inputs, of which any may be no sequence
        sums = {
            "samples": output.shape[self.readout is None] if several else batch.x.shape[1],
            "squares": errors.detach().sum(),
            "power": (targets.square() * own).sum(),
            "elements": elements,
        }
        return errors.sum() / elements, sums

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean squared error, and its share of the targets' power."""
        power = max(sums["power"], 1e-30)
        return {"loss": sums["squares"] / sums["elements"], "error": sums["squares"] / power}


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch at every step, int64 ``(T, B)``; -1 where a step has none."""
    return _mark(batch.y.long(), batch.lengths)


def _mark(labels: Tensor, lengths: Tensor | None) -> Tensor:
    """The same labels ``(T, B, *)``, but -1 in the padding."""
    if lengths is None:
        return labels
    return labels.masked_fill(~within(labels, lengths), NO_LABEL)


def _names_of_classes(classes: Sequence[str]) -> list[str]:
    """The names in a list.

    Raises:
        ValueError: they are letters, or in any order.
    """
    if isinstance(classes, (str, set, frozenset, dict)):
        raise ValueError(f"classes is {classes!r}, expected their names in a list, by number")
    return list(classes)


def find_readout(readout: str | ReadoutFunction | None) -> ReadoutFunction | None:
    """A readout by its name, or as it is; a module is put into evaluation mode.

    Raises:
        ValueError: there is none of that name, it has parameters, or it is no function.
    """
    if not isinstance(readout, str):
        if isinstance(readout, nn.Module) and any(True for _ in readout.parameters()):
            raise ValueError(
                f"readout {type(readout).__name__} has parameters, which only the model's are "
                "trained: put what has to learn into the model"
            )
        if readout is not None and (isinstance(readout, type) or not callable(readout)):
            raise ValueError(f"readout is {readout!r}, expected a function, a module or a name")
        return readout.eval() if isinstance(readout, nn.Module) else readout
    if readout not in READOUTS:
        raise ValueError(f"readout is {readout!r}, expected one of {', '.join(READOUTS)}")
    return READOUTS[readout]()
