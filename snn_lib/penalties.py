"""Penalties on firing: terms of a loss that make a network sparse, and keep it from bursting.

with collect_spikes(model) as spikes:
    loss = criterion(model(x)[0], y)
loss = loss + 0.1 * sum(rate_penalty(s, target=0.02) for s in spikes.values())
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.cells import Constrained, Recurrent, is_spiking
from snn_lib.containers import Sequential, holds_weights, is_weighted
from snn_lib.functional import check_tensor
from snn_lib.observing import observe_layers, state_given
from snn_lib.pytorch_private import version
from snn_lib.readout import within
from snn_lib.recomputing import Chunk, current_chunk

CHAINS = Sequential, nn.Sequential


def rate_penalty(
    spikes: Tensor, target: float = 0.0, limit: float = 0.0, lengths: Tensor | None = None
) -> Tensor:
    """Penalises a layer's firing rate off its target, and its neurons' rates above a limit.

    With the mean rate r of the layer and r_n of each neuron, over steps and sequences, it is
        (r / target - 1)^2  +  mean over n of max(r_n / limit - 1, 0)^2.
    It is relative to the target and the limit, so one weight serves layers of any rate.

    Args:
        spikes: ``(T, B, *features)``, with gradients.
        target: the rate aimed at, in spikes per neuron and step; 0 for none.
        limit: the rate above which a neuron is penalised; 0 for none.
        lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
            Padding does not count. If all lengths are 0, so is the rate.

    Returns:
        A number, differentiable.

    Raises:
        ValueError: target or limit is negative, or there are no steps or no sequences.
    """
    for name, rate in (("target", target), ("limit", limit)):
        if not rate >= 0:  # nan too
            raise ValueError(f"{name} is {rate}, expected a rate >= 0")
    check_tensor("spikes", spikes)
    if spikes.shape[0] * spikes.shape[1] == 0:
        raise ValueError(
            f"spikes have the shape {tuple(spikes.shape)}, expected a step and a sequence"
        )
    spikes = spikes.to(torch.promote_types(spikes.dtype, torch.float32))
    if lengths is None:
        rates = spikes.mean((0, 1))
    else:
        mask = within(spikes, lengths)
        rates = (spikes * mask).sum((0, 1)) / mask.sum().clamp(min=1)
    penalty = rates.new_zeros(())
    if target:
        penalty = penalty + (rates.mean() / target - 1).square()
    if limit:
        penalty = penalty + (rates / limit - 1).relu().square().mean()
    return penalty


def network_penalty(
    model: nn.Module,
    spikes: Mapping[str, Tensor],
    target: float = 0.0,
    limit: float = 0.0,
    lengths: Tensor | None = None,
    by_cost: bool = False,
) -> Tensor | float:
    """The sum of the penalties of all hidden layers that ran on a sequence.

    Args:
        model: the network.
        spikes: of its layers, as :func:`collect_spikes` gives them.
        target, limit, lengths: as in :func:`rate_penalty`.
        by_cost: whether the distance from the target counts less for a layer whose spikes make
            fewer operations at the weights.

    Raises:
        ValueError: there are no spikes of a hidden layer, or as :func:`penalised_layers` and
            :func:`rate_penalty`.
    """
    reached = penalised_layers(model)
    if not reached.keys() & spikes.keys():
        raise ValueError(
            f"no spikes of the hidden layers {', '.join(reached)} are given: collect those of this "
            "model as it runs, before it is wrapped or compiled"
        )
    hidden = {name: spikes[name] for name in reached if name in spikes and spikes[name].shape[1]}
    costs = {name: reached[name] * layer.shape[2:].numel() for name, layer in hidden.items()}
    total = 0.0
    for name, layer in hidden.items():
        share = costs[name] / max(costs.values()) if by_cost else 1.0
        off_target = rate_penalty(layer, target, 0.0, lengths)
        total = total + share * off_target + rate_penalty(layer, 0.0, limit, lengths)
    return total


class CollectedSpikes(Mapping[str, Tensor]):
    """The spikes of layers, by name. The chunks of a sequence are joined when they are read."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[tuple[Tensor, int]]] = {}  # and their versions
        self._last: dict[str, Chunk | None] = {}  # that of each layer's last call

    def keep(self, name: str, spikes: Tensor, begins: bool) -> None:
        """Keeps what a layer has returned, as the next steps or as those of a new sequence."""
        chunks, chunk = self.chunks.setdefault(name, []), current_chunk()
        if begins:
            chunks.clear()
        elif chunk is not None and self._last.get(name) is chunk and len(spikes) == chunk.steps:
            chunks.pop()  # of two runs over a chunk the later counts, as it does without chunks
        chunks.append((spikes, version(spikes)))
        self._last[name] = chunk

    def __getitem__(self, name: str) -> Tensor:
        chunks = self.chunks[name]
        if any(kept != version(spikes) for spikes, kept in chunks):
            raise ValueError(
                f"a layer changes the spikes of {name} in place: give it inplace=False, so that "
                "they can be penalised"
            )
        if len(chunks) > 1:
            whole = torch.cat([spikes for spikes, _ in chunks])
            chunks[:] = [(whole, version(whole))]
        return chunks[0][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)


@contextmanager
def collect_spikes(model: nn.Module) -> Iterator[CollectedSpikes]:
    """Collects the spikes of every layer of neurons by name, with gradients, as the model runs.

    A layer that is called with a state continues a sequence in chunks. A layer that is called
    without one begins a new sequence, which replaces the one before. So of a layer that a network
    runs several times the last run counts, and each needs a layer of its own to be penalised.
    """
    spikes = CollectedSpikes()

    def keep(name: str, layer: nn.Module, given: dict[str, Any], output: Tensor) -> None:
        spikes.keep(name, output, begins=state_given(layer, given) is None)

    with observe_layers(model, is_spiking, keep):
        yield spikes


def penalised_layers(model: nn.Module) -> dict[str, int]:
    """The :func:`hidden_layers`, for a penalty on each of them.

    Raises:
        ValueError: there is none, or the same neurons are at several places of a chain.
    """
    places: dict[nn.Module, str] = {}
    for name, module, is_link in _walk(model, set()):
        fires = is_link and (is_spiking(module) or isinstance(module, Recurrent))
        if fires and (other := places.setdefault(module, name)) != name:
            raise ValueError(
                f"layers {other} and {name} of {type(model).__name__} are the same neurons: give "
                "each place its own, so that each is penalised"
            )
    if not (reached := hidden_layers(model)):
        raise ValueError(f"{type(model).__name__} has no hidden layer of neurons to be penalised")
    return reached


def _walk(
    module: nn.Module,
    seen: set[nn.Module],
    name: str = "",
    chain: set[nn.Module] | None = None,
) -> Iterator[tuple[str, nn.Module, bool]]:
    """All parts of a module by name, and whether they are links of a chain.

    A part that has several names comes once, but at each of its places within one chain, whose
    parts so far are in ``chain``.
    """
    if module in seen and module not in (chain or ()):
        return
    seen.add(module)
    if chain is not None:
        chain.add(module)
    yield name, module, chain is not None
    inner = (set() if chain is None else chain) if isinstance(module, CHAINS) else None
    for child, part in module._modules.items():
        if part is not None:
            yield from _walk(part, seen, f"{name}.{child}".lstrip("."), inner)


def hidden_layers(model: nn.Module) -> dict[str, int]:
    """The layers of neurons that have weights after them: how many of these a spike reaches.

    They are in the model's order, by name. What is defined next is taken for what receives the
    spikes, as in a chain. Of branches and of several heads that need not be so. The spikes of the
    last layer are the answer, unless a layer of weights weighs them.
    """
    reached: dict[str, int] = {}
    fed_back: dict[nn.Module, str] = {}  # by the weights in a Recurrent, the layer of its neurons
    waiting: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    for _, module, _ in _walk(model, set()):
        name, weights = names[module], _weights_reached(module)
        if isinstance(module, Recurrent):
            parts = [part for part in module.weights.modules() if _weights_reached(part)]
            fed_back |= dict.fromkeys(parts, "")
            fed_back |= dict.fromkeys(parts[:1], f"{name}.neuron".removeprefix("."))
        elif is_spiking(module):
            waiting.append(name)
            reached.setdefault(name, 0)
        elif module in fed_back:
            if layer := fed_back[module]:
                reached[layer] = reached.get(layer, 0) + weights
        elif weights:
            reached |= {layer: reached[layer] + weights for layer in waiting}
            waiting = []
    return {name: weights for name, weights in reached.items() if weights}


def _weights_reached(module: nn.Module) -> int:
    """How many of a module's own weights an input reaches; 0 if it has none."""
    own = module.weight if is_weighted(module) else None
    if own is None and not isinstance(module, (Constrained, nn.LayerNorm)):
        own = next(filter(holds_weights, module.parameters(recurse=False)), None)
    if own is None:
        return 0
    if getattr(module, "transposed", False):
        return own[0].numel()
    return own[:, 0].numel() // getattr(module, "groups", 1)
