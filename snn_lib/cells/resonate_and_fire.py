"""The resonate-and-fire neuron: its membrane rings, so it prefers input of its own frequency.

Z[t] = r exp(i w) (Z[t-1] + I[t] - R[t]),  Z = X + i Y
S[t] = 1 if Y[t] > 1 else 0
R[t+1] = theta R[t] + v_reset S[t]
with r = exp(-1 / tau_m), w = 2 pi frequency and theta = exp(-1 / tau_reset). X is the current-like
part of the membrane and Y the voltage-like one.

Source: Izhikevich, Neural Networks 2001, doi 10.1016/S0893-6080(01)00078-8, with this library's
filtered reset in place of a reset to a fixed point.
"""

import math
from collections.abc import Sequence
from typing import Any

from snn_lib.cells.cell import Cell
from snn_lib.containers import feature_shape
from snn_lib.time_constants import PerChannel, cycles_per_step, decay_of, per_channel


class ResonateAndFireNeuron(Cell):
    """A layer of spiking neurons whose membranes oscillate while they decay.

    Args:
        shape: as in :class:`snn_lib.Cell`, and so are ``options``, such as ``train_decay=True``.
        tau_m: the time constant of the membrane's decay, in steps.
        frequency: of its oscillation, in cycles per step, 0 to 0.5.
        tau_reset: the time constant of the reset, in steps; ``tau_m`` if ``None``.
        reset_strength: v_reset, by how much a spike lowers the next input.

    Shape:
        As in :class:`snn_lib.Cell`; the state is ``(current, membrane, reset)``, X, Y and R.

    Raises:
        ValueError: a time constant is not positive or too long, the frequency lies outside
            [0, 0.5], or as :class:`snn_lib.Cell`.
    """

    states = ("current", "membrane", "reset")
    coefficients = ("reset_decay", "reset_strength", "membrane_decay", "cosine", "sine")
    decays = ("reset_decay", "membrane_decay")

    @staticmethod
    def step(x, state, coefficients, fire):
        """S[t], and the states after it."""
        current, membrane, reset = state
        reset_decay, reset_strength, r, cosine, sine = coefficients
        driven = current + x - reset
        current = r * (cosine * driven - sine * membrane)
        membrane = r * (sine * driven + cosine * membrane)
        spikes = fire(membrane)
        return spikes, (current, membrane, reset_decay * reset + reset_strength * spikes)

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: PerChannel,
        frequency: PerChannel,
        tau_reset: "PerChannel | None" = None,
        reset_strength: PerChannel = 1.0,
        **options: Any,
    ) -> None:
        channels = feature_shape(shape)
        decay = decay_of(per_channel(tau_m, channels, "tau_m"), "tau_m")
        reset_decay = decay
        if tau_reset is not None:
            reset_decay = decay_of(per_channel(tau_reset, channels, "tau_reset"), "tau_reset")
        angle = 2 * math.pi * cycles_per_step(frequency, channels)
        super().__init__(
            shape,
            **options,
            reset_decay=reset_decay,
            reset_strength=per_channel(reset_strength, channels, "reset_strength"),
            membrane_decay=decay,
            cosine=angle.cos(),
            sine=angle.sin(),
        )
