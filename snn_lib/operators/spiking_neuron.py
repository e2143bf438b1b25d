"""The spiking neuron as a custom operator, with its derivatives; equations are in ``eager``."""

from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import backend_for, eager
from snn_lib.operators.checks import (
    check_operands,
    check_shape,
    check_time_first,
)
from snn_lib.operators.transforms import (
    can_skip_dispatch,
    fill_tangents,
    refuse_second,
    register_vmap,
    run_backward,
    save,
)
from snn_lib.pytorch_private import is_transformed
from snn_lib.surrogate import SURROGATES

NeuronState = tuple[Tensor, Tensor]
NEURON = (
    "Tensor current, Tensor reset_decay, Tensor reset_strength, Tensor membrane_decay, "
    "Tensor membrane, Tensor reset, "
    "str surrogate, float width, Tensor? slope, float dropout, Tensor? seed"
)
NEURON_BACKWARD = (
    f"Tensor grad_spikes, Tensor grad_membrane, Tensor grad_reset, {NEURON}, bool[] needed"
)


def run_neuron(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a neuron; takes and returns what ``eager.neuron_forward`` does, and a surrogate.

    The arguments are those of the schema ``NEURON``; their shapes and dtypes are checked already.
    """
    if is_transformed():
        return _SpikingNeuron.apply(*inputs)
    *tensors, _, _, _, dropout, seed = inputs
    if not dropout and can_skip_dispatch(tensors):  # with dropout, the operator checks the seed
        return backend_for(tensors[0]).neuron_forward(*tensors, dropout, seed)
    return torch.ops.snn.spiking_neuron(*inputs)


def check_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None,
) -> None:
    """Raises a ValueError if a shape does not fit the current's."""
    shape = current.shape
    check_time_first(shape, "current")
    features = shape[2:]
    for name, coefficient in (
        ("reset_decay", reset_decay),
        ("reset_strength", reset_strength),
        ("membrane_decay", membrane_decay),
    ):
        if coefficient.shape != features:
            raise ValueError(
                f"{name} has shape {tuple(coefficient.shape)}, expected {tuple(features)} "
                f"for current of shape {tuple(shape)} (T, B, *features)"
            )
    if state is not None:
        membrane, reset = state
        check_shape("state membrane", membrane, shape[1:])
        check_shape("state reset", reset, shape[1:])


def _check_neuron_operands(
    current, reset_decay, reset_strength, membrane_decay, membrane, reset, dropout, seed, **others
):
    check_operands(
        current=current,
        reset_decay=reset_decay,
        reset_strength=reset_strength,
        membrane_decay=membrane_decay,
        membrane=membrane,
        reset=reset,
        **others,
    )
    check_neuron(current, reset_decay, reset_strength, membrane_decay, (membrane, reset))
    if seed is None and not dropout:
        return
    given = (tuple(seed.shape), seed.dtype, seed.device) if seed is not None else (None,) * 3
    if given != ((2,), torch.int64, current.device):
        raise ValueError(
            "seed is {} in {} on {}, ".format(*given)
            + f"expected (2,) in torch.int64 on {current.device}"
        )


@torch.library.custom_op(
    "snn::spiking_neuron", mutates_args=(), schema=f"({NEURON}) -> (Tensor, Tensor, Tensor)"
)
def _neuron_forward(*inputs):
    *tensors, _, _, _, dropout, seed = inputs
    _check_neuron_operands(*tensors, dropout, seed)
    return backend_for(tensors[1]).neuron_forward(*tensors, dropout, seed)


@_neuron_forward.register_fake
def _(current, reset_decay, reset_strength, membrane_decay, membrane, reset, *settings):
    _check_neuron_operands(
        current, reset_decay, reset_strength, membrane_decay, membrane, reset, *settings[-2:]
    )
    return tuple(reset_decay.new_empty(like.shape) for like in (current, membrane, reset))


@torch.library.custom_op(
    "snn::spiking_neuron_backward",
    mutates_args=(),
    schema=f"({NEURON_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _neuron_backward(grad_spikes, grad_membrane, grad_reset, *inputs):
    *tensors, surrogate, _, slope, dropout, seed, _ = inputs
    current, reset_decay, _, _, membrane, _ = tensors
    if surrogate not in SURROGATES and (surrogate != "given" or slope is None):
        names = ", ".join(SURROGATES)
        raise ValueError(f"surrogate is {surrogate!r}, expected {names}, or given with a slope")
    sequences = {"grad_spikes": grad_spikes} | ({} if slope is None else {"slope": slope})
    states = {"grad_membrane": grad_membrane, "grad_reset": grad_reset}
    _check_neuron_operands(*tensors, dropout, seed, **sequences, **states)
    for name, tensor in sequences.items():
        check_shape(name, tensor, current.shape)
    for name, tensor in states.items():
        check_shape(name, tensor, membrane.shape)
    return backend_for(reset_decay).neuron_backward(grad_spikes, grad_membrane, grad_reset, *inputs)


@_neuron_backward.register_fake
def _(grad_spikes, grad_membrane, grad_reset, *inputs):
    *inputs, needed = inputs
    return tuple(
        tensor.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(inputs[:6], needed, strict=True)
    )


register_vmap(torch.ops.snn.spiking_neuron, dropout_at=-2)
register_vmap(torch.ops.snn.spiking_neuron_backward, dropout_at=-3)


class _SpikingNeuron(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # by name, since torch.compile would take a context for the first of ``*inputs``
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        reset,
        surrogate,
        width,
        slope,
        dropout,
        seed,
    ):
        tensors = current, reset_decay, reset_strength, membrane_decay, membrane, reset
        return torch.ops.snn.spiking_neuron(*tensors, surrogate, width, slope, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.surrogate, ctx.width, slope, ctx.dropout, seed = inputs
        save(ctx, *tensors, slope, seed)

    @staticmethod
    def inputs(ctx):
        *tensors, slope, seed = ctx.saved_tensors
        return *tensors, ctx.surrogate, ctx.width, slope, ctx.dropout, seed

    @staticmethod
    def backward(ctx, *gradients):
        needed, inputs = list(ctx.needs_input_grad[:6]), _SpikingNeuron.inputs(ctx)
        backward = torch.ops.snn.spiking_neuron_backward
        gradients = run_backward(backward, needed, *gradients, *inputs)
        return *gradients, *[None] * 5  # for the settings

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = _SpikingNeuron.inputs(ctx)
        tangents = fill_tangents(tangents[:6], inputs[:6])
        name = "snn.spiking_neuron_jvp"
        return refuse_second(name, eager.neuron_jvp, *tangents, *inputs)


_neuron_forward.register_autograd(
    _SpikingNeuron.backward, setup_context=_SpikingNeuron.setup_context
)
