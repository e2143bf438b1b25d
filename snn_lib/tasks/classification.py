"""Classification: cross-entropy of what a network says, and accuracy."""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from snn_lib.data.batches import Batch
from snn_lib.settings import ExperimentConfig, Hyperparameters, require, setting
from snn_lib.tasks.base import Task


@dataclass
class ClassificationHyperparameters(Hyperparameters):
    """Hyperparameters of classification: the model and its training."""

    label_smoothing: float = setting(0.0, "share of the target that all classes have alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.label_smoothing < 1,
            f"hyperparameters.label_smoothing is {self.label_smoothing}, expected in [0, 1)",
        )


@dataclass
class ClassificationConfig(ExperimentConfig):
    """The configuration of a classification."""

    hyperparameters: ClassificationHyperparameters = field(
        default_factory=ClassificationHyperparameters
    )


class Classification(Task):
    """A class for every sequence; a subclass defines :meth:`logits`."""

    config_class: type[ExperimentConfig] = ClassificationConfig

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """How much speaks for each class, ``(B, classes)``."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean cross-entropy, and the sums that loss and accuracy are made of."""
        return self.judged(model, self.logits(model, batch), batch.y)

    def judged(
        self, model: nn.Module, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same of logits ``(B, classes)`` and labels ``(B,)``."""
        labels = labels.long()
        # Settings of one's own may do without it.
        smoothing = getattr(self.config.hyperparameters, "label_smoothing", 0.0)
        smoothing = smoothing if model.training else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss, {
            "samples": len(labels),
            "loss": loss.detach() * len(labels),
            "correct": (logits.detach().argmax(1) == labels).sum(),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {**super().metrics(sums), "accuracy": sums["correct"] / sums["samples"]}

    def score(self, metrics: dict[str, float]) -> tuple[float, ...]:
        """What the best epoch is chosen by, higher is better: accuracy, then a lower loss."""
        return metrics["accuracy"], -metrics["loss"]
