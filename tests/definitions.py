"""The cells by their equations, one time step after the other, for arrays and for tensors.

Arrays give the values, in float64. Tensors give the gradients as well, by autograd.
"""

import math

import numpy as np
import torch

from snn_lib.functional import iir_filter, spiking_neuron


class Spike(torch.autograd.Function):
    """A step at 1 whose derivative is the surrogate."""

    @staticmethod
    def forward(ctx, potential, derivative):
        ctx.save_for_backward(potential)
        ctx.derivative = derivative
        return (potential > 1).to(potential)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative(*ctx.saved_tensors), None


def gaussian(potential, sigma=0.4):
    return torch.exp(-((potential - 1) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)


class Triangle:
    """A surrogate of one's own."""

    def __init__(self, width=0.8):
        self.width = width

    def derivative(self, membrane):
        return torch.relu(1.0 - torch.abs(membrane - 1.0) / self.width)


def fire(potential, derivative=gaussian):
    if isinstance(potential, torch.Tensor):
        return Spike.apply(potential, derivative)
    return (potential > 1).astype(np.float64)


def stack(steps, like):
    if not len(steps):
        return like
    return torch.stack(steps) if isinstance(like, torch.Tensor) else np.stack(steps)


def filter_by_hand(x, alpha, beta, past_output, past_input):
    """F, and the last outputs and inputs."""
    outputs, inputs = list(past_output), list(past_input)
    for x_t in x:
        inputs.append(x_t)
        f = sum(b * past for b, past in zip(beta, inputs[::-1], strict=False))
        outputs.append(f + sum(a * past for a, past in zip(alpha, outputs[::-1], strict=False)))
    ends = outputs[len(x) :], inputs[len(x) :]
    return stack(outputs[len(alpha) :], x), stack(ends[0], past_output), stack(ends[1], past_input)


def neuron_by_hand(current, theta, strength, decay, membrane, reset, derivative=gaussian):
    """S, and the last V and R."""
    spikes = []
    for current_t in current:
        membrane = decay * membrane + current_t - reset
        spikes.append(fire(membrane, derivative))
        reset = theta * reset + strength * spikes[-1]
    return stack(spikes, current), membrane, reset


def traces_by_hand(current, *others, derivative=gaussian):
    """S, V and R of every step, of the arguments of ``neuron_by_hand``."""
    *coefficients, membrane, reset = others
    traces = []
    for step in current.split(1):
        before = reset
        spikes, membrane, reset = neuron_by_hand(step, *coefficients, membrane, reset, derivative)
        traces.append((spikes[0], membrane, before))
    return tuple(map(torch.stack, zip(*traces, strict=True)))


def gradients(function, inputs, which=None):
    """Gradients of a random projection of all outputs, for the inputs in ``which`` (all)."""
    which = range(len(inputs)) if which is None else which
    inputs = [t.detach().clone().requires_grad_(n in which) for n, t in enumerate(inputs)]
    generator = torch.Generator().manual_seed(1)
    loss = sum(0.0 * inputs[n].sum() for n in which)  # which all outputs without steps lack
    for output in function(*inputs):
        weights = torch.randn(output.shape, dtype=output.dtype, generator=generator)
        loss = loss + (weights * output).sum()
    return torch.autograd.grad(loss, [inputs[n] for n in which])


def with_channels_last(tensor, leading=2):
    """The same feature maps ``(..., C, H, W)`` with the channels side by side in memory."""
    return tensor.movedim(leading, -1).contiguous().movedim(-1, leading)


def filter_inputs(p=2, q=2, steps=6, batch=2, features=(3,), dtype=torch.float64):
    """x, alpha, beta, past_output, past_input; sum |alpha_p| < 1, so the filters are stable."""
    return (
        torch.randn(steps, batch, *features, dtype=dtype),
        (2 * torch.rand(p, *features, dtype=dtype) - 1) / max(p, 1),
        torch.randn(q + 1, *features, dtype=dtype),
        torch.randn(p, batch, *features, dtype=dtype),
        torch.randn(q, batch, *features, dtype=dtype),
    )


def neuron_inputs(steps=6, batch=2, features=(3,), dtype=torch.float64):
    """current, theta, v_reset, lambda, membrane, reset; neurons that fire now and then."""
    return (
        2 * torch.randn(steps, batch, *features, dtype=dtype),
        *(torch.rand(features, dtype=dtype) for _ in range(3)),
        *(torch.randn(batch, *features, dtype=dtype) for _ in range(2)),
    )


def run_filter(x, alpha, beta, past_output, past_input, **settings):
    """F and the state, in one flat tuple."""
    output, state = iir_filter(x, alpha, beta, (past_output, past_input), **settings)
    return output, *state


def run_neuron(current, theta, strength, decay, membrane, reset, **settings):
    spikes, state = spiking_neuron(current, theta, strength, decay, (membrane, reset), **settings)
    return spikes, *state
