"""What training minimises: the task's loss, and the penalty on the firing of hidden layers."""

from collections.abc import Mapping
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
    with collect_spikes(model) if settings.rate_penalty else nullcontext({}) as spikes:
        loss, sums = task_loss(task, trained, batch)
    if settings.rate_penalty:
        loss = loss + settings.rate_penalty * _penalties(model, spikes, batch, settings)
    _, world = distributed.rank_and_world()
    if world > 1:  # the last batch may not divide equally
        share = sums[task.mean_over]
        loss = loss * (share * world / (distributed.add(float(share))[0] or 1.0))
    return loss, sums


def _penalties(
    model: nn.Module, spikes: Mapping[str, Tensor], batch: Any, settings: Any
) -> Tensor | float:
    """The penalties of all hidden layers that ran on samples, of which the share may have none."""
    reached = hidden_layers(model)
    hidden = {name: spikes[name] for name in reached if name in spikes and spikes[name].shape[1]}
    costs = {name: reached[name] * layer[0, 0].numel() for name, layer in hidden.items()}
    total = 0.0
    for name, layer in hidden.items():
        share = costs[name] / max(costs.values()) if settings.penalty_by_cost else 1.0
        target = rate_penalty(layer, settings.target_rate, 0.0, batch.lengths)
        limit = rate_penalty(layer, 0.0, settings.rate_limit, batch.lengths)
        total = total + share * target + limit
    return total


def check_penalty(model: nn.Module, settings: Any) -> None:
    """Raises :class:`SettingsError` if there is a penalty, but no hidden layer to be penalised."""
    require(
        not settings.rate_penalty or bool(hidden_layers(model)),
        f"hyperparameters.rate_penalty is {settings.rate_penalty}, but the network has no hidden "
        "layer of neurons to be penalised",
        SettingsError,
    )
