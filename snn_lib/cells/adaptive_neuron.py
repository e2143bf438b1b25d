"""The adaptive neuron: each of its spikes raises its threshold, for longer than its reset lasts.

V[t] = lambda V[t-1] + I[t] - R[t]
S[t] = 1 if V[t] > 1 + A[t] else 0
R[t+1] = theta R[t] + v_reset S[t],  A[t+1] = rho A[t] + strength S[t]
with theta = lambda = exp(-1 / tau_m) and rho = exp(-1 / tau_adaptation); lambda = 0 without a
membrane filter.

Source: the neurons of LSNN, Bellec et al., NeurIPS 2018, arXiv 1803.09574, with this library's
filtered reset.
"""

from collections.abc import Sequence
from typing import Any

from snn_lib.cells.cell import Cell
from snn_lib.containers import feature_shape
from snn_lib.time_constants import PerChannel, decay_of, per_channel


class AdaptiveNeuron(Cell):
    """A layer of spiking neurons whose thresholds adapt: 1 + A, and each spike raises A.

    Args:
        shape: as in :class:`snn_lib.Cell`, and so are ``options``, such as ``train_decay=True``.
        tau_m, membrane_filter, reset_strength: as in :class:`snn_lib.SpikingNeuron`.
        tau_adaptation: the time constant of the threshold's rise, in steps.
        adaptation_strength: by how much a spike raises the threshold.

    Shape:
        As in :class:`snn_lib.Cell`; the state is ``(membrane, reset, adaptation)``.

    Raises:
        ValueError: a time constant is not positive or too long, or as :class:`snn_lib.Cell`.
    """

    states = ("membrane", "reset", "adaptation")
    coefficients = (
        *("reset_decay", "reset_strength", "membrane_decay"),
        *("adaptation_decay", "adaptation_strength"),
    )
    decays = ("reset_decay", "membrane_decay", "adaptation_decay")

    @staticmethod
    def step(x, state, coefficients, fire):
        """S[t], and the states after it; ``fire`` compares V[t] - A[t] with 1."""
        membrane, reset, adaptation = state
        reset_decay, reset_strength, membrane_decay, rho, strength = coefficients
        membrane = membrane_decay * membrane + x - reset
        spikes = fire(membrane - adaptation)
        reset = reset_decay * reset + reset_strength * spikes
        return spikes, (membrane, reset, rho * adaptation + strength * spikes)

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: PerChannel,
        tau_adaptation: PerChannel,
        adaptation_strength: PerChannel,
        membrane_filter: bool = False,
        reset_strength: PerChannel = 1.0,
        **options: Any,
    ) -> None:
        channels = feature_shape(shape)
        decay = decay_of(per_channel(tau_m, channels, "tau_m"), "tau_m")
        rho = decay_of(per_channel(tau_adaptation, channels, "tau_adaptation"), "tau_adaptation")
        super().__init__(
            shape,
            **options,
            reset_decay=decay,
            reset_strength=per_channel(reset_strength, channels, "reset_strength"),
            membrane_decay=decay if membrane_filter else 0.0,
            adaptation_decay=rho,
            adaptation_strength=per_channel(adaptation_strength, channels, "adaptation_strength"),
        )
