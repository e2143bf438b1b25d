"""What training minimises: the task's loss, and the penalty on the firing of hidden layers."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from snn_lib.errors import SettingsError, require
from snn_lib.penalties import collect_spikes, hidden_layers, rate_penalty
from snn_lib.tasks.base import Task
from snn_lib.training import distributed

Loss = tuple[Tensor, dict[str, Any]]  # and the sums that metrics are made of


def task_loss(task: Task, model: nn.Module, batch: Any) -> Loss:
    """The mean loss of this process's share of a batch, which may be empty, and its sums."""
    loss, sums = task.loss(model, batch)
    missing = {"samples", task.mean_over} - sums.keys()
    require(not missing, f"{type(task).__name__}.loss returns no sum {min(missing, default='')!r}")
    if sums["samples"] == 0:  # a mean of nothing
        return loss.nan_to_num(), dict.fromkeys(sums, 0)
    return loss, sums


def training_loss(task: Task, model: nn.Module, trained: nn.Module, batch: Any) -> Loss:
    """The loss of this process's share, weighted so that the processes' mean is the batch's.

    ``trained`` is the model as training runs it: in chunks, in several processes. The penalty is on
    the hidden layers of ``model``.
    """
    settings = task.config.hyperparameters
    with collect_spikes(model) if settings.rate_penalty else nullcontext() as spikes:
        loss, sums = task_loss(task, trained, batch)
    if settings.rate_penalty:
        rates = settings.target_rate, settings.rate_limit
        hidden = [spikes[name] for name in hidden_layers(model) if name in spikes]  # that ran
        penalties = (  # the share of a small last batch may be empty
            rate_penalty(layer, *rates, batch.lengths) for layer in hidden if layer.shape[1]
        )
        loss = loss + settings.rate_penalty * sum(penalties)
    _, world = distributed.rank_and_world()
    if world > 1:  # the last batch may not divide equally
        share = sums[task.mean_over]
        loss = loss * (share * world / (distributed.add(float(share))[0] or 1.0))
    return loss, sums


def check_penalty(model: nn.Module, settings: Any) -> None:
    """Raises :class:`SettingsError` if there is a penalty, but no hidden layer to be penalised."""
    require(
        not settings.rate_penalty or bool(hidden_layers(model)),
        f"hyperparameters.rate_penalty is {settings.rate_penalty}, but the network has no hidden "
        "layer of neurons to be penalised",
        SettingsError,
    )
