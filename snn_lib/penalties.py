"""Penalties on firing: terms of a loss that make a network sparse, and keep it from bursting.

with collect_spikes(model) as spikes:
    loss = criterion(model(x)[0], y)
loss = loss + 0.1 * sum(rate_penalty(s, target=0.02) for s in spikes.values())
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.chunks import is_recomputing
from snn_lib.containers import bind_call
from snn_lib.initialisation import WEIGHTED
from snn_lib.neurons import SpikingNeuron
from snn_lib.readout import within


def rate_penalty(
    spikes: Tensor, target: float = 0.0, limit: float = 0.0, lengths: Tensor | None = None
) -> Tensor:
    """How far a layer fires off its target rate, and its neurons above a limit.

    With the mean rate r of a layer and r_n of each neuron, over steps and sequences,
        (r / target - 1)^2  +  mean over n of max(r_n / limit - 1, 0)^2,
    relative to what is aimed at, so that one weight serves layers of any rate.

    Args:
        spikes: ``(T, B, *features)``, with gradients.
        target: the rate aimed at, in spikes per neuron and step, 0 for none.
        limit: the rate above which a neuron is held down, 0 for none.
        lengths: steps of each sequence, int64 ``(B,)``, those after them being padding, which has
            no rate; ``None`` if every sequence has T.

    Returns:
        A number, differentiable.

    Raises:
        ValueError: target or limit is negative, or there is no step of any sequence.
    """
    for name, rate in (("target", target), ("limit", limit)):
        if not rate >= 0:  # nan too
            raise ValueError(f"{name} is {rate}, expected a rate >= 0")
    if spikes.shape[0] * spikes.shape[1] == 0:
        raise ValueError(
            f"spikes have the shape {tuple(spikes.shape)}, expected a step and a sequence"
        )
    spikes = spikes.to(torch.promote_types(spikes.dtype, torch.float32))
    if lengths is None:
        rates = spikes.mean((0, 1))
    else:
        rates = (spikes * within(spikes, lengths)).sum((0, 1)) / lengths.sum()
    penalty = rates.new_zeros(())
    if target:
        penalty = penalty + (rates.mean() / target - 1).square()
    if limit:
        penalty = penalty + (rates / limit - 1).relu().square().mean()
    return penalty


@contextmanager
def collect_spikes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The spikes of every layer of neurons by name, with gradients, as the model runs.

    A layer that is called with a state goes on: the spikes of a sequence in chunks are put together
    in time. Without one it begins anew.
    """
    spikes: dict[str, Tensor] = {}

    def keep(
        name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple
    ) -> None:
        if is_recomputing():
            return
        goes_on = bind_call(layer, args, kwargs).get("state") is not None and name in spikes
        spikes[name] = torch.cat([spikes[name], output[0]]) if goes_on else output[0]

    handles = [
        module.register_forward_hook(partial(keep, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, SpikingNeuron)
    ]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()


def hidden_layers(model: nn.Module) -> list[str]:
    """The names of the layers of neurons behind which there are weights, in the model's order.

    The spikes of the last one are the answer, unless a layer of weights weighs them.
    """
    found, waiting = [], []
    for name, module in model.named_modules():
        if isinstance(module, SpikingNeuron):
            waiting.append(name)
        elif isinstance(module, WEIGHTED):
            found += waiting
            waiting = []
    return found
