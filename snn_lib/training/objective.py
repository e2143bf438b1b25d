"""What training minimises: the task's loss, and the penalty on the firing of hidden layers."""

from typing import Any

from torch import Tensor, nn

from snn_lib.errors import require
from snn_lib.penalties import collect_spikes, hidden_layers, rate_penalty
from snn_lib.tasks.base import Task
from snn_lib.training import distributed

Loss = tuple[Tensor, dict[str, Any]]  # and the sums that metrics are made of


def task_loss(task: Task, model: nn.Module, batch: Any) -> Loss:
    """The mean loss of this process's share of a batch, which may be empty, and its sums."""
    loss, sums = task.loss(model, batch)
    if sums["samples"] == 0:  # a mean of nothing
        return loss.nan_to_num(), dict.fromkeys(sums, 0.0)
    return loss, sums


class TrainingLoss:
    """The loss of a training batch over all processes.

    Args:
        task: what the model learns.
        model: whose hidden layers are penalised.
        config: the configuration.

    Raises:
        InputError: there is a penalty, but no hidden layer.
    """

    def __init__(self, task: Task, model: nn.Module, config: Any) -> None:
        self.task, self.model, self.settings = task, model, config.hyperparameters
        self.hidden = hidden_layers(model)
        require(
            not self.settings.rate_penalty or bool(self.hidden),
            f"hyperparameters.rate_penalty is {self.settings.rate_penalty}, but the network has no "
            "hidden layer of neurons to be penalised",
        )

    def __call__(self, trained: nn.Module, batch: Any) -> Loss:
        """The loss of this process's share, so weighted that the processes' mean is the batch's.

        Args:
            trained: the model as training runs it: in chunks, in several processes.
            batch: this process's share.
        """
        loss, sums = self._penalised(trained, batch)
        _, world = distributed.rank_and_world()
        if world > 1:  # the last batch may not divide equally
            share = sums[self.task.mean_over]
            loss = loss * (share * world / distributed.total({"": share})[""])
        return loss, sums

    def _penalised(self, trained: nn.Module, batch: Any) -> Loss:
        settings = self.settings
        if not settings.rate_penalty:
            return task_loss(self.task, trained, batch)
        with collect_spikes(self.model) as spikes:
            loss, sums = task_loss(self.task, trained, batch)
        rates = settings.target_rate, settings.rate_limit
        hidden = [spikes[name] for name in self.hidden]
        penalties = (  # the share of a small last batch may be empty
            rate_penalty(layer, *rates, batch.lengths) for layer in hidden if layer.shape[1]
        )
        return loss + settings.rate_penalty * sum(penalties), sums
