"""Synapses: IIR filters that turn each channel's spikes into a post-synaptic potential (PSP).

F[t] = sum_{p=1..P} alpha_p F[t-p] + sum_{q=0..Q} beta_q x[t-q]

Every channel has its own coefficients. They start from time constants, and are then parameters
beside the weights. PyTorch derives their gradient from :meth:`IIRSynapse.step`. The positions of a
feature map ``(C, H, W)`` may share the coefficients of their channel, given as ``(C, 1, 1)``. A
time constant is a number for all channels, a tensor of their shape, or a function of the shape such
as :func:`snn_lib.time_constants.log_spaced`.

Trained filters can become unstable. ``constraint="stable"`` prevents that in any training loop: the
layer does not filter with the parameter alpha itself, but with the stable filter next to it,
:func:`snn_lib.stability.stabilise`. The next forward pass in training sets the parameter to it.

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.cells.cell import Cell, first_values, straight_through
from snn_lib.containers import feature_shape
from snn_lib.functional import Call, FilterState
from snn_lib.stability import (
    MARGIN,
    MARGINS,
    MAX_ORDER,
    largest_margin,
    poles_of,
    refuse_clusters,
    round_decaying,
    stabilise,
    warn_if_learning_unstable,
)
from snn_lib.time_constants import PerChannel, cycles_per_step, decay_of, decays_of, per_channel

CONSTRAINTS = ("none", "stable")


class IIRSynapse(Cell):
    """An IIR filter of any order for every channel.

    Args:
        shape: the channels: their number, or the feature shape such as ``(C, H, W)``. A dimension
            of 1 behind the first, as in ``(C, 1, 1)``, fits maps of any size.
        alpha: the P weights of past outputs, alpha_1 first, each a number or a tensor ``(*shape)``.
        beta: the Q + 1 weights of the present and past inputs, beta_0 first, likewise.
        train_alpha, train_beta: which of them are parameters; the others are buffers.
        constraint: ``"none"``, or ``"stable"`` to keep all poles inside the unit circle, which is
            possible up to P = 8.
        margin: how far inside the stable set ``"stable"`` keeps them, in [1e-6, 1). ``None`` takes
            the largest of 1e-3, half of it, and so on, that leaves stable first filters unchanged.
            If the first filters are random, that margin may differ from start to start. Stable
            filters that ``load_state_dict`` brings make it smaller if they need to, and stay as
            they are too. A number fixes it, and filters nearer to the edge are then moved.

    Attributes:
        alpha: ``(P, *shape)``.
        beta: ``(Q + 1, *shape)``.

    Shape:
        - x: ``(T, B, *shape)``.
        - state: ``(past_output, past_input)``: the last P outputs ``(P, B, *shape)`` and the last Q
          inputs ``(Q, B, *shape)``, oldest first.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns the PSP ``(T, B, *shape)`` and the new state. Under autocast the PSP of a float32
          synapse is in autocast's dtype, to which the matrix product after it would round it.

    Raises:
        ValueError: ``beta`` is empty, the constraint is unknown, the margin is outside [1e-6, 1), a
            stable filter is too near the edge to be kept, or its poles too close together, its
            order is too high to keep it stable, or a shape is wrong. The synapses below also raise
            it, when they are built or converted to a lower precision, if a time constant is so long
            that its filter no longer decays once it is rounded.
        TypeError: ``alpha`` or ``beta`` is a number and no list, or as :class:`snn_lib.Cell`.
    """

    states = ("past_output", "past_input")
    coefficients = ("alpha", "beta")

    @staticmethod
    def step(x, state, coefficients, fire):
        """F[t] = sum_q beta_q x[t-q] + sum_p alpha_p F[t-p]; past values come oldest first."""
        (past_output, past_input), (alpha, beta) = state, coefficients
        f = beta[0] * x
        for weight, past in zip(beta[1:], past_input[::-1], strict=True):
            f = f + weight * past
        for weight, past in zip(alpha, past_output[::-1], strict=True):
            f = f + weight * past
        return f, ((*past_output, f)[1:], (*past_input, x)[1:])

    def __init__(
        self,
        shape: int | Sequence[int],
        alpha: Sequence[PerChannel],
        beta: Sequence[PerChannel],
        train_alpha: bool = True,
        train_beta: bool = True,
        constraint: str = "none",
        margin: float | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            number = not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0
            if number or isinstance(value, str):
                raise TypeError(f"{name} is {value!r}, expected a list with a number for each lag")
        if len(beta) == 0:
            raise ValueError("beta is empty, expected at least beta_0")
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint is {constraint!r}, choose one of {CONSTRAINTS}")
        if margin is not None and not 1e-6 <= margin < 1:  # float32 rounds a smaller one away
            raise ValueError(f"margin is {margin}, expected a number in [1e-6, 1)")
        if constraint == "stable" and len(alpha) > MAX_ORDER:
            raise ValueError(
                f"a filter of order {len(alpha)} cannot be kept stable, expected order {MAX_ORDER} "
                "at most"
            )
        train = [name for name, on in (("alpha", train_alpha), ("beta", train_beta)) if on]
        first = first_values(list(alpha), feature_shape(shape), "alpha")
        super().__init__(shape, train=train, alpha=list(first), beta=list(beta))
        self.constraint = constraint
        stable = constraint == "stable"
        rounded = first.to(torch.get_default_dtype())
        if stable:
            refuse_clusters(rounded, first)
        self.margin = margin or (largest_margin(rounded) if stable else MARGIN)
        self._margin_follows = margin is None and stable

    def state_rows(self) -> dict[str, int | None]:
        """The last P outputs and the last Q inputs."""
        return {"past_output": self.alpha.shape[0], "past_input": self.beta.shape[0] - 1}

    def call(self, x: Tensor, state: FilterState | None = None, drops: bool = True) -> Call:
        """As :meth:`Cell.call`; an unstable filter that learns causes a warning, once."""
        if self.constraint == "none":
            warn_if_learning_unstable(self.alpha)
        return super().call(x, state, drops)

    def effective_coefficients(self) -> dict[str, Tensor]:
        """The coefficients that the layer filters with; alpha is :meth:`effective_alpha`."""
        return {"alpha": self.effective_alpha(), "beta": self.beta}

    def effective_alpha(self) -> Tensor:
        """The alpha that the layer filters with, ``(P, *shape)``.

        With ``constraint="stable"`` it is the stable one next to the parameter. Its gradient is
        passed on to the parameter unchanged (straight-through), so that a filter at the edge of the
        stable set can still be pulled back inside.
        """
        if self.constraint == "none":
            return self.alpha
        return straight_through(self.alpha, lambda alpha: stabilise(alpha, self.margin))

    def must_decay_when_rounded(self) -> dict[str, Tensor]:
        """The filters, unless a constraint keeps them stable."""
        return {"alpha": self.alpha} if self.constraint == "none" else {}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        # Filters nearer to the edge than this layer's first ones would be moved. Those nearer than
        # any margin are moved all the same.
        if self._margin_follows and not self.alpha.is_meta:
            alpha = self.alpha.detach().cpu()
            kept = (stabilise(alpha, MARGINS[-1]) == alpha).all(0)
            self.margin = min(self.margin, largest_margin(alpha[:, kept]))

    def poles(self) -> Tensor:
        """The poles of every channel's filter as it runs, complex, ``(*shape, P)``, on the CPU.

        The filter is stable if all lie inside the unit circle.
        """
        return poles_of(self.effective_alpha())

    def pole_radius(self) -> float:
        """The largest magnitude of any channel's pole; if it is below 1, all filters are stable.

        Infinite if a coefficient is not finite.
        """
        return self.poles().abs().amax().item() if self.alpha.numel() else 0.0

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        orders = f"P={len(self.alpha)}, Q={len(self.beta) - 1}"
        return f"{self.shape}, {orders}, constraint={self.constraint}"


class DualExponentialSynapse(IIRSynapse):
    """The PSP of a synapse with finite rise: the difference of two exponentials.

    With p = exp(-1 / tau_m) and q = exp(-1 / tau_s), the impulse response p^(k+1) - q^(k+1),
    k >= 0, is the second-order filter
        alpha_1 = p + q,  alpha_2 = -p q,  beta_0 = p - q.

    Args:
        shape: the channels: their number, or the feature shape.
        tau_m: the slow time constant, in steps; a number, tensor or function, see the module.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m in every channel.
        train_coefficients: whether alpha_1, alpha_2 and beta_0 are trained.
        unit_energy: whether beta_0 is instead the one with which the squares of the impulse
            response sum to 1. Channels of any memory then start equally strong.
        constraint, margin: as in :class:`IIRSynapse`.

    Shape:
        As in :class:`IIRSynapse`, with P = 2 and Q = 0.

    Raises:
        ValueError: the time constants are not in that order or too long, or as
            :class:`IIRSynapse`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: PerChannel,
        tau_s: PerChannel,
        train_coefficients: bool = True,
        constraint: str = "none",
        margin: float | None = None,
        unit_energy: bool = False,
    ) -> None:
        channels = feature_shape(shape)
        p, q = decays_of(
            per_channel(tau_m, channels, "tau_m"), per_channel(tau_s, channels, "tau_s")
        )
        alpha = round_decaying(p + q, -p * q)
        beta = (_gain_of_unit_energy(*alpha) if unit_energy else p - q,)
        train = train_coefficients, train_coefficients
        super().__init__(shape, alpha, beta, *train, constraint, margin)


class LowPassSynapse(IIRSynapse):
    """The PSP of a synapse that jumps and decays: the first-order low pass.

    F[t] = alpha_1 F[t-1] + x[t],  alpha_1 = exp(-1 / tau)

    Args:
        shape: the channels: their number, or the feature shape.
        tau: the time constant, in steps; a number, tensor or function, see the module.
        train_coefficients: whether alpha_1 is trained; beta_0 = 1 is not.
        unit_energy: as in :class:`DualExponentialSynapse`; beta_0 is then sqrt(1 - alpha_1^2).
        constraint, margin: as in :class:`IIRSynapse`.

    Shape:
        As in :class:`IIRSynapse`, with P = 1 and Q = 0.

    Raises:
        ValueError: ``tau`` is not positive or too long, or as :class:`IIRSynapse`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        tau: PerChannel,
        train_coefficients: bool = True,
        constraint: str = "none",
        margin: float | None = None,
        unit_energy: bool = False,
    ) -> None:
        (alpha_1,) = round_decaying(decay_of(per_channel(tau, feature_shape(shape), "tau")))
        beta = (_gain_of_unit_energy(alpha_1) if unit_energy else 1.0,)
        super().__init__(shape, (alpha_1,), beta, train_coefficients, False, constraint, margin)


class ResonantSynapse(IIRSynapse):
    """The PSP of a synapse that rings: a damped oscillation, from a pair of complex poles.

    With r = exp(-1 / tau) and w = 2 pi frequency, the poles r exp(+-i w), the impulse response
    beta_0 r^k sin((k + 1) w) / sin(w), k >= 0, is the second-order filter
        alpha_1 = 2 r cos(w),  alpha_2 = -r^2
    whose beta_0 makes the squares of that response sum to 1, so that channels of any memory start
    equally strong. A layer whose channels have many time constants and frequencies remembers what
    was where in a long sequence:

        ResonantSynapse(256, log_spaced(10, 800), log_spaced(1 / 800, 1 / 4))

    Args:
        shape: the channels: their number, or the feature shape.
        tau: the time constant of the decay, in steps; a number, tensor or function, see the module.
        frequency: the frequency of the oscillation, in cycles per step, 0 to 0.5; given like
            ``tau``.
        train_coefficients: whether alpha_1, alpha_2 and beta_0 are trained.
        constraint, margin: as in :class:`IIRSynapse`.

    Shape:
        As in :class:`IIRSynapse`, with P = 2 and Q = 0.

    Raises:
        ValueError: ``tau`` is not positive or too long, the frequency lies outside [0, 0.5], or as
            :class:`IIRSynapse`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        tau: PerChannel,
        frequency: PerChannel,
        train_coefficients: bool = True,
        constraint: str = "none",
        margin: float | None = None,
    ) -> None:
        channels = feature_shape(shape)
        r = decay_of(per_channel(tau, channels, "tau"))
        angle = 2 * math.pi * cycles_per_step(frequency, channels)
        alpha = round_decaying(2 * r * angle.cos(), -(r**2))
        beta, train = (_gain_of_unit_energy(*alpha),), (train_coefficients, train_coefficients)
        super().__init__(shape, alpha, beta, *train, constraint, margin)


def _gain_of_unit_energy(alpha_1: Tensor, alpha_2: Tensor | float = 0.0) -> Tensor:
    """The beta_0 with which the squares of a decaying filter's impulse response sum to 1.

    White noise then has the same variance after the filter as before it, whatever the memory. The
    variance of the output, an autoregressive process, is known in closed form:
        beta_0^2 (1 - alpha_2) / ((1 + alpha_2) ((1 - alpha_2)^2 - alpha_1^2)).
    """
    power = (1.0 + alpha_2) * ((1.0 - alpha_2) ** 2 - alpha_1**2) / (1.0 - alpha_2)
    return power.sqrt()
