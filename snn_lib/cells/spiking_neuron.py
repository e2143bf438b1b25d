"""The spiking neuron: a threshold whose reset is a decaying trace of its own spikes.

V[t] = I[t] - R[t]                   (membrane_filter off: the paper's experiments)
V[t] = lambda V[t-1] + I[t] - R[t]   (membrane_filter on)
S[t] = 1 if V[t] > 1 else 0
R[t+1] = theta R[t] + v_reset S[t],  R[0] = 0
with theta = lambda = exp(-1 / tau_m).

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.cells.cell import Cell
from snn_lib.containers import feature_shape
from snn_lib.functional import GAUSSIAN
from snn_lib.surrogate import Surrogate
from snn_lib.time_constants import PerChannel, decay_of, per_channel


class SpikingNeuron(Cell):
    """A layer of spiking neurons, driven by the output of an ``nn.Linear`` or ``nn.Conv2d``.

    Args:
        shape: the neurons: their number, or the feature shape such as ``(C, H, W)``; ``(C, 1, 1)``
            for maps of any size, whose positions share the coefficients.
        tau_m: time constant of the reset, and of the membrane if it filters, in steps; a number, a
            tensor with one for each neuron, or a function of the shape.
        membrane_filter: whether the membrane potential leaks with ``tau_m`` or has no memory.
        reset_strength: v_reset, by how much a spike lowers the next potential, given likewise.
        surrogate: the surrogate gradient of the spike: ``Gaussian``, ``FastSigmoid`` or any object
            with ``derivative(membrane)``, see :mod:`snn_lib.surrogate`.
        dropout: the probability, in training, that a spike is not passed on to the next layer. It
            is drawn for every neuron and time step. The other spikes are scaled by
            1 / (1 - dropout). The neuron's own reset sees all its spikes.
        train_decay, train_reset_strength: whether theta and lambda, and v_reset, are trained. The
            paper does not train them.

    Attributes:
        reset_decay, reset_strength, membrane_decay: theta, v_reset and lambda of every neuron.

    Shape:
        - x: the current, ``(T, B, *shape)``.
        - state: ``(membrane, reset)``, both ``(B, *shape)``: V of the last step and R of the next.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns spikes ``(T, B, *shape)`` and the new state.

    Raises:
        ValueError: ``tau_m`` is not positive, or so long that the decay rounds to 1, here or where
            the layer is converted to a lower precision, or is trained and above 1 - 1e-3; dropout
            is outside [0, 1); or a shape is wrong.
        TypeError: the surrogate has no ``derivative``, or a coefficient is no number.
    """

    states = ("membrane", "reset")
    coefficients = ("reset_decay", "reset_strength", "membrane_decay")
    decays = ("reset_decay", "membrane_decay")

    @staticmethod
    def step(x, state, coefficients, fire):
        """V[t] = lambda V[t-1] + I[t] - R[t];  R[t+1] = theta R[t] + v_reset S[t]."""
        membrane, reset = state
        reset_decay, reset_strength, membrane_decay = coefficients
        membrane = membrane_decay * membrane + x - reset
        spikes = fire(membrane)
        return spikes, (membrane, reset_decay * reset + reset_strength * spikes)

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: PerChannel,
        membrane_filter: bool = False,
        reset_strength: PerChannel = 1.0,
        surrogate: Surrogate = GAUSSIAN,
        dropout: float = 0.0,
        train_decay: bool = False,
        train_reset_strength: bool = False,
    ) -> None:
        channels = feature_shape(shape)
        decay = decay_of(per_channel(tau_m, channels, "tau_m"), "tau_m")
        super().__init__(
            shape,
            surrogate=surrogate,
            dropout=dropout,
            train=["reset_strength"] if train_reset_strength else (),
            train_decay=train_decay,
            reset_decay=decay,
            reset_strength=per_channel(reset_strength, channels, "reset_strength"),
            membrane_decay=decay if membrane_filter else 0.0,
        )

    def extra_repr(self) -> str:
        """The settings, from what the buffers hold, for ``print``."""
        return (
            f"{self.shape}, tau_m={_time_constant(self.reset_decay)}, "
            f"membrane_filter={self._membrane_filter()}, "
            f"surrogate={self.surrogate}, dropout={self.dropout}"
        )

    def _membrane_filter(self) -> bool | str:
        """Whether the membrane filters, or its time constant if that is not ``tau_m``."""
        if self.membrane_decay.is_meta:
            return "unknown"
        if torch.equal(self.membrane_decay, self.reset_decay):
            return True
        return bool(self.membrane_decay.any()) and _time_constant(self.membrane_decay)


def _time_constant(decay: Tensor) -> str:
    """tau = -1 / log(decay), in steps: one number or the range of them."""
    if decay.is_meta or decay.numel() == 0:
        return "unknown"
    first, last = (f"{tau:.4g}" for tau in (-1.0 / decay.float().log()).aminmax())
    return first if first == last else f"{first} to {last}"
