"""What a batch becomes: loss, metrics, and what ``--test`` reports."""

from snn_lib.tasks.base import Task
from snn_lib.tasks.classification import ClassificationConfig
from snn_lib.tasks.sequences import SequenceClassification, SequenceConfig, SequenceRegression

__all__ = [
    "ClassificationConfig",
    "SequenceClassification",
    "SequenceConfig",
    "SequenceRegression",
    "Task",
]
