"""Synapses: IIR filters that turn each channel's spikes into a post-synaptic potential (PSP).

F[t] = sum_{p=1..P} alpha_p F[t-p] + sum_{q=0..Q} beta_q x[t-q]

The coefficients belong to the channel, are initialised from time constants and trained together
with the weights. ``constraint="stable"`` keeps trained filters from blowing up: after each
optimiser step, :meth:`IIRSynapse.project_` moves the poles back inside the unit circle.

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snn_lib.containers import StatefulModule
from snn_lib.functional import FilterState, iir_filter

CONSTRAINTS = ("none", "stable")


class IIRSynapse(StatefulModule):
    """An IIR filter of any order for every channel.

    Args:
        shape: the channels: their number, or the feature shape such as ``(C, H, W)``.
        alpha: the P weights of past outputs, alpha_1 first.
        beta: the Q + 1 weights of present and past inputs, beta_0 first.
        train_alpha, train_beta: which of them are parameters; the others are buffers.
        constraint: ``"none"``, or ``"stable"``, which lets :meth:`project_` act.
        margin: m, how far inside the stable set ``"stable"`` keeps the filters.

    Attributes:
        alpha: ``(P, *shape)``.
        beta: ``(Q + 1, *shape)``.

    Shape:
        - x: ``(T, B, *shape)``.
        - state: ``(past_output, past_input)``: the last P outputs ``(P, B, *shape)`` and Q inputs
          ``(Q, B, *shape)``, oldest first.
        - returns the PSP ``(T, B, *shape)`` and the new state. Under autocast to bfloat16 the PSP
          of a float32 synapse is in bfloat16, as the matrix product after it would round it.

    Raises:
        ValueError: ``beta`` is empty, the constraint is unknown, or a shape is wrong.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        alpha: Sequence[float],
        beta: Sequence[float],
        train_alpha: bool = True,
        train_beta: bool = True,
        constraint: str = "none",
        margin: float = 1e-3,
    ) -> None:
        super().__init__()
        if len(beta) == 0:
            raise ValueError("beta is empty, expected at least beta_0")
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint is {constraint!r}, choose one of {CONSTRAINTS}")
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.constraint, self.margin = constraint, margin
        for name, values, train in (("alpha", alpha, train_alpha), ("beta", beta, train_beta)):
            column = torch.tensor(values, dtype=torch.get_default_dtype())
            channels = column.view(-1, *[1] * len(self.shape)).repeat(1, *self.shape)
            if train:
                self.register_parameter(name, nn.Parameter(channels))
            else:
                self.register_buffer(name, channels)

    def forward(self, x: Tensor, state: FilterState | None = None) -> tuple[Tensor, FilterState]:
        """Filters all time steps; see the class for shapes."""
        rounded = self.alpha.dtype == torch.float32 and _autocasts_to_bfloat16(x.device.type)
        return iir_filter(
            x, self.alpha, self.beta, state, dtype=torch.bfloat16 if rounded else None
        )

    def poles(self) -> Tensor:
        """The poles of every channel's filter, complex, ``(*shape, P)``.

        They are the eigenvalues of the recurrence's companion matrix; the filter is stable if all
        lie inside the unit circle.
        """
        order = len(self.alpha)
        if order == 0:
            return torch.zeros(*self.shape, 0, dtype=torch.complex128)
        companion = torch.zeros(*self.shape, order, order, dtype=torch.float64)
        companion[..., 0, :] = self.alpha.detach().movedim(0, -1).cpu()
        companion[..., 1:, :-1] = torch.eye(order - 1)
        return torch.linalg.eigvals(companion)

    def pole_radius(self) -> float:
        """The largest magnitude of any channel's pole: below 1, all filters are stable.

        Infinite if a coefficient is not finite.
        """
        if not torch.isfinite(self.alpha).all():
            return math.inf
        return self.poles().abs().amax().item() if len(self.alpha) else 0.0

    @torch.no_grad()
    def project_(self) -> None:
        """With ``constraint="stable"``, moves alpha to the stable set, in place; otherwise nothing.

        - Order 1: |alpha_1| <= 1 - m.
        - Order 2: |alpha_2| <= 1 - m and |alpha_1| <= 1 - alpha_2 - m, the triangle of all stable
          second-order filters, those with complex poles among them.
        - Higher orders: a filter whose largest pole radius r exceeds 1 - m has all its poles scaled
          by (1 - m) / r, that is alpha_p by ((1 - m) / r)^p. Coefficients that are not finite stay.
        """
        if self.constraint == "none" or len(self.alpha) == 0:
            return
        bound = 1.0 - self.margin
        if len(self.alpha) <= 2:
            alpha_2 = self.alpha[1].clamp_(-bound, bound) if len(self.alpha) == 2 else 0.0
            limit = bound - alpha_2
            self.alpha[0].clamp_(-limit, limit)
        elif torch.isfinite(self.alpha).all():  # others have no poles
            radius = self.poles().abs().amax(-1)
            scale = (bound / radius).clamp(max=1.0).to(self.alpha)
            powers = torch.arange(1, len(self.alpha) + 1).view(-1, *[1] * len(self.shape))
            self.alpha.mul_(scale ** powers.to(self.alpha))
            if self.pole_radius() >= 1.0:  # rounding can move a cluster of poles out again
                self.project_()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return (
            f"{self.shape}, P={len(self.alpha)}, Q={len(self.beta) - 1}, "
            f"constraint={self.constraint}"
        )


def _autocasts_to_bfloat16(device: str) -> bool:
    return (
        torch.amp.is_autocast_available(device)  # not on the meta device, for one
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.bfloat16
    )


class DualExponentialSynapse(IIRSynapse):
    """The PSP of a synapse with finite rise: the difference of two exponentials.

    With p = exp(-1 / tau_m) and q = exp(-1 / tau_s), the impulse response p^(k+1) - q^(k+1),
    k >= 0, is the second-order filter
        alpha_1 = p + q,  alpha_2 = -p q,  beta_0 = p - q.

    Args:
        shape: the channels: their number, or the feature shape.
        tau_m: the slow time constant, in steps.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m.
        train_coefficients: whether alpha_1, alpha_2 and beta_0 are trained.
        constraint, margin: as in :class:`IIRSynapse`.

    Shape:
        As in :class:`IIRSynapse`, with P = 2 and Q = 0.

    Raises:
        ValueError: the time constants are not in that order, or a shape is wrong.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        tau_m: float,
        tau_s: float,
        train_coefficients: bool = True,
        constraint: str = "none",
        margin: float = 1e-3,
    ) -> None:
        if not 0 < tau_s < tau_m:
            raise ValueError(f"tau_m is {tau_m} and tau_s {tau_s}, expected 0 < tau_s < tau_m")
        p, q = math.exp(-1.0 / tau_m), math.exp(-1.0 / tau_s)
        super().__init__(
            shape,
            alpha=(p + q, -p * q),
            beta=(p - q,),
            train_alpha=train_coefficients,
            train_beta=train_coefficients,
            constraint=constraint,
            margin=margin,
        )


class LowPassSynapse(IIRSynapse):
    """The PSP of a synapse that jumps and decays: the first-order low pass.

    F[t] = alpha_1 F[t-1] + x[t],  alpha_1 = exp(-1 / tau)

    Args:
        shape: the channels: their number, or the feature shape.
        tau: the time constant, in steps.
        train_coefficients: whether alpha_1 is trained; beta_0 = 1 is not.
        constraint, margin: as in :class:`IIRSynapse`.

    Shape:
        As in :class:`IIRSynapse`, with P = 1 and Q = 0.

    Raises:
        ValueError: ``tau`` is not positive, or a shape is wrong.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        tau: float,
        train_coefficients: bool = True,
        constraint: str = "none",
        margin: float = 1e-3,
    ) -> None:
        if not tau > 0:  # nan too
            raise ValueError(f"tau is {tau}, expected a positive number of steps")
        super().__init__(
            shape,
            alpha=(math.exp(-1.0 / tau),),
            beta=(1.0,),
            train_alpha=train_coefficients,
            train_beta=False,
            constraint=constraint,
            margin=margin,
        )
