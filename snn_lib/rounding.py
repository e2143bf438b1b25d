"""Weights of few bits: how integer networks round them, and how training sees them rounded.

Training takes loss and gradients from the rounded weights, and changes those behind them, whose
small changes add up (Courbariaux, Bengio, David, 2015, arXiv 1511.00363).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WEIGHT_BITS = 2, 4, 8
ROUNDED = nn.Linear, nn.Conv2d
# By the largest integer, the least part of the largest weight that it may stand for. The fewer
# integers there are, the more large weights it pays to cut off.
LEAST_SHARES = {1: 5, 7: 25, 127: 25}  # of 50
EXACT = 1e-12  # square error, as a part of the squares, that is but the rounding of floats


def integer_weights(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers for weights ``(*, outputs, inputs)``, and what a 1 stands for in each output.

    If multiples of the smallest weight are exact, as for weights of 0 and 1, they are taken. Else
    the scale is the one with the least square error among those that fit parts of the largest
    weight, in steps of 2 %.

    Returns:
        The integers, in the dtype of the weights, and ``(*, outputs, 1)``.
    """
    most = (1 << (bits - 1)) - 1
    sizes = weights.abs()
    largest = sizes.amax(-1, keepdim=True)
    smallest = sizes.where(sizes > 0, torch.inf).amin(-1, keepdim=True)
    scale, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    shares = (share / 50 for share in range(LEAST_SHARES[most], 51))
    for candidate in (smallest, *(share * largest / most for share in shares)):
        candidate = candidate.where(largest > 0, 1.0)
        integers = (weights / candidate).round_().clamp_(-most, most)
        error = (weights - candidate * integers).square_().sum(-1, keepdim=True)
        scale, least = candidate.where(error < least, scale), least.minimum(error)
    return (weights / scale).round_().clamp_(-most, most), scale


def layers_to_round(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Every ``nn.Linear`` and ``nn.Conv2d`` of a model: their weights are rounded.

    Raises:
        ValueError: there is none, or one computes its weight, as pruned and parametrised ones do.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, ROUNDED)}
    if not layers:
        raise ValueError("the network has no nn.Linear and no nn.Conv2d, whose weights it rounds")
    for name, layer in layers.items():
        if "weight" not in {**layer._parameters, **layer._buffers}:
            raise ValueError(
                f"{f'layer {name}' if name else 'the network'} computes its weight from other "
                "parameters, which rounding does not reach: make the pruning, or the "
                "parametrisation, permanent first"
            )
    return list(layers.values())


def round_weights(model: nn.Module, bits: int) -> dict[Tensor, Tensor]:
    """Rounds the weights of a model in place, if there are so many bits, not 0.

    They are those of :func:`layers_to_round`, as in integer networks. What was rounded before stays
    the same in float32 and float64; in a shorter dtype the products are rounded, too.

    Returns:
        What each weight was before.

    Raises:
        ValueError: see :func:`layers_to_round`.
    """
    layers = layers_to_round(model) if bits else []
    kept = {layer.weight: layer.weight.detach().clone() for layer in layers}
    with torch.no_grad():
        for weight, own in kept.items():
            rows = own.flatten(1)
            if rows.dtype == torch.float16:  # in which squares of small weights are 0
                rows = rows.float()
            integers, scale = integer_weights(rows, bits)
            near = scale * integers
            error, size = ((one**2).sum(1, keepdim=True) for one in (near - rows, rows))
            weight.copy_(rows.where(error <= EXACT * size, near).view_as(weight))
    torch.clear_autocast_cache()  # which holds the weights as they were
    return kept


@contextmanager
def rounded_weights(model: nn.Module, bits: int) -> Iterator[None]:
    """A context in which the weights of a model are as :func:`round_weights` makes them.

    Take gradients inside the context, and an optimiser's step behind it.
    """
    kept = round_weights(model, bits)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in kept.items():
                weight.copy_(own)
        torch.clear_autocast_cache()
