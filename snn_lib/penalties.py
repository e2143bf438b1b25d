"""Penalties on firing: terms of a loss that make a network sparse, and keep it from bursting.

with collected_spikes(model) as spikes:
    loss = criterion(model(x)[0], y)
loss = loss + 0.1 * sum(rate_penalty(s, target=0.02) for s in spikes.values())
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from snn_lib.neurons import SpikingNeuron


def rate_penalty(spikes: Tensor, target: float = 0.0, limit: float = 0.0) -> Tensor:
    """How far a layer fires off its target rate, and its neurons above a limit.

    With the mean rate r of a layer and r_n of each neuron, over steps and sequences,
        (r / target - 1)^2  +  mean over n of max(r_n / limit - 1, 0)^2,
    relative to what is aimed at, so that one weight serves layers of any rate.

    Args:
        spikes: ``(T, B, *features)``, with gradients.
        target: the rate aimed at, in spikes per neuron and step, 0 for none.
        limit: the rate above which a neuron is held down, 0 for none.

    Returns:
        A number, differentiable.

    Raises:
        ValueError: target or limit is negative.
    """
    for name, rate in (("target", target), ("limit", limit)):
        if not rate >= 0:  # nan too
            raise ValueError(f"{name} is {rate}, expected a rate >= 0")
    rates = spikes.to(torch.promote_types(spikes.dtype, torch.float32)).mean((0, 1))
    penalty = rates.new_zeros(())
    if target:
        penalty = penalty + (rates.mean() / target - 1).square()
    if limit:
        penalty = penalty + (rates / limit - 1).relu().square().mean()
    return penalty


@contextmanager
def collected_spikes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The spikes of every layer of neurons by name, with gradients, as the model runs.

    A layer that runs several times, over chunks of a sequence, say, has its spikes put together in
    time.
    """
    spikes: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: tuple) -> None:
        before = spikes.get(name)
        spikes[name] = output[0] if before is None else torch.cat([before, output[0]])

    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in model.named_modules()
        if isinstance(module, SpikingNeuron)
    ]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()
