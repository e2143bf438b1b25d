"""The spiking neuron: a threshold whose reset is a decaying trace of its own spikes.

V[t] = I[t] - R[t]                   (membrane_filter off: the paper's experiments)
V[t] = lambda V[t-1] + I[t] - R[t]   (membrane_filter on)
S[t] = 1 if V[t] > 1 else 0
R[t+1] = theta R[t] + v_reset S[t],  R[0] = 0
with theta = lambda = exp(-1 / tau_m).

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.chunks import dropout_seed
from snn_lib.containers import Output, StatefulModule, feature_shape, last_steps
from snn_lib.functional import NeuronState, neuron_traces, spiking_neuron
from snn_lib.stability import check_rounding, refuse_rounding, round_decaying
from snn_lib.surrogate import Gaussian, Surrogate, check_surrogate
from snn_lib.time_constants import decay_of


class SpikingNeuron(StatefulModule):
    """A layer of spiking neurons, driven by the output of an ``nn.Linear`` or ``nn.Conv2d``.

    Args:
        shape: the neurons: their number, or the feature shape such as ``(C, H, W)``; ``(C, 1, 1)``
            for maps of any size, whose positions share the coefficients.
        tau_m: time constant of the reset, and of the membrane if it filters, in steps.
        membrane_filter: whether the membrane potential leaks with ``tau_m`` or has no memory.
        reset_strength: v_reset, by how much a spike lowers the next potential.
        surrogate: the surrogate gradient of the spike: ``Gaussian``, ``FastSigmoid`` or any object
            with ``derivative(membrane)``, see :mod:`snn_lib.surrogate`.
        dropout: the probability, in training, that a spike is not passed on to the next layer. It
            is drawn for every neuron and time step. The other spikes are scaled by
            1 / (1 - dropout). The neuron's own reset sees all its spikes.

    Attributes:
        reset_decay, reset_strength, membrane_decay: theta, v_reset and lambda of every neuron,
            buffers of ``shape``. The paper does not train them.

    Shape:
        - current: ``(T, B, *shape)``.
        - state: ``(membrane, reset)``, both ``(B, *shape)``: V of the last step and R of the next.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns spikes ``(T, B, *shape)`` and the new state.

    Raises:
        ValueError: ``tau_m`` is not positive, or so long that the decay rounds to 1, here or where
            the layer is converted to a lower precision; dropout is outside [0, 1); or a shape is
            wrong.
        TypeError: the surrogate has no ``derivative``.
    """

    takes_expanded = True

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: float,
        membrane_filter: bool = False,
        reset_strength: float = 1.0,
        surrogate: Surrogate = Gaussian(),  # noqa: B008 (immutable)
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        decay = decay_of(tau_m, "tau_m")
        round_decaying(decay)  # refuses one that rounds to 1
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
        check_surrogate(surrogate)
        self.shape = feature_shape(shape)
        self.surrogate, self.dropout = surrogate, dropout
        self.register_buffer("reset_decay", torch.full(self.shape, decay))
        self.register_buffer("reset_strength", torch.full(self.shape, float(reset_strength)))
        self.register_buffer(
            "membrane_decay", torch.full(self.shape, decay if membrane_filter else 0.0)
        )

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpikingNeuron":
        dtype = convert(self.reset_decay.new_empty(0)).dtype
        if dtype != self.reset_decay.dtype and not self.reset_decay.is_meta:
            for decay in (self.reset_decay, self.membrane_decay):
                check_rounding(decay[None], dtype)
        return super()._apply(convert, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        for name in ("reset_decay", "membrane_decay"):
            loaded = state_dict.get(prefix + name)
            loaded = loaded[None] if isinstance(loaded, Tensor) else loaded
            refuse_rounding(getattr(self, name), loaded, prefix + name, others[-1])

    def forward(
        self, current: Tensor, state: NeuronState | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Runs all time steps; see the class for shapes."""
        dropout = self.dropout if self.training else 0.0
        spikes, last = spiking_neuron(
            current,
            self.reset_decay,
            self.reset_strength,
            self.membrane_decay,
            state,
            self.surrogate,
            dropout,
            dropout_seed(current) if dropout else None,
        )
        if lengths is not None:
            last = self._state_after(lengths, current, state)
        return Output(spikes, last)

    def traces(
        self, current: Tensor, state: NeuronState | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes, membrane potential and reset at every step, for a loss on them for example.

        Returns:
            S, V and R, each ``(T, B, *shape)``, with gradients and before dropout. R[t] is already
            subtracted in V[t].
        """
        coefficients = self.reset_decay, self.reset_strength, self.membrane_decay
        return neuron_traces(current, *coefficients, state, self.surrogate)

    def _state_after(
        self, lengths: Tensor, current: Tensor, state: NeuronState | None
    ) -> NeuronState:
        """V of each sequence's own last step, and R of the next."""
        spikes, membrane, reset = self.traces(current, state)
        before = (spikes.new_zeros(spikes.shape[1:]),) * 2 if state is None else state
        after = membrane, self.reset_decay * reset + self.reset_strength * spikes  # of each step
        return tuple(
            last_steps(torch.cat([first[None], steps]), 1, lengths)[0]
            for first, steps in zip(before, after, strict=True)
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
        return self.membrane_decay.any().item() and _time_constant(self.membrane_decay)


def _time_constant(decay: Tensor) -> str:
    """tau = -1 / log(decay), in steps: one number or the range of them."""
    if decay.is_meta or decay.numel() == 0:
        return "unknown"
    first, last = (f"{tau:.4g}" for tau in (-1.0 / decay.float().log()).aminmax())
    return first if first == last else f"{first} to {last}"
