"""How alike spike patterns are: their filtered difference, the nearest pattern, matching spikes.

All spike trains are time first, ``(T, B, N)``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from snn_lib.containers import Output
from snn_lib.functional import FilterState
from snn_lib.synapses import IIRSynapse
from snn_lib.time_constants import decays_of, peak_scale


class OutputFilter(IIRSynapse):
    """The filter through which spike trains are compared: v0 (m[t] - s[t]), not trained.

    m[t] = p m[t-1] + x[t],  s[t] = q s[t-1] + x[t],  p = exp(-1 / tau_m),  q = exp(-1 / tau_s)
    is the second-order filter
        alpha_1 = p + q,  alpha_2 = -p q,  beta_0 = 0,  beta_1 = v0 (p - q),
    one step later than :class:`snn_lib.synapses.DualExponentialSynapse`, with v0 from
    :func:`snn_lib.time_constants.peak_scale`.
    As the filter is linear, the difference of two filtered spike trains is their filtered
    difference: the loss of the associative memory is
    ``output_filter(output - target)[0].square().mean()``.

    Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.

    Args:
        tau_m: the slow time constant, in steps.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m.
        channels: number of spike trains, N.
        normalize: whether v0 scales the difference to the peak 1; otherwise it is 1.

    Shape:
        As in :class:`snn_lib.synapses.IIRSynapse`, with P = 2 and Q = 1.

    Raises:
        ValueError: the time constants are not in that order or not finite, or a shape is wrong.
    """

    def __init__(self, tau_m: float, tau_s: float, channels: int, normalize: bool = True) -> None:
        p, q = decays_of(tau_m, tau_s)
        v0 = peak_scale(tau_m, tau_s) if normalize else 1.0
        super().__init__(
            channels,
            alpha=(p + q, -p * q),
            beta=(0.0, v0 * (p - q)),
            train_alpha=False,
            train_beta=False,
        )

    def forward(
        self, x: Tensor, state: FilterState | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Filters all time steps, unrounded under autocast too: distances need their digits."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, state, lengths)


def nearest_pattern(output: Tensor, patterns: Tensor) -> Tensor:
    """Which pattern every sample is nearest to, by Euclidean distance over all steps and trains.

    Retrieval is the share of samples for which that is the right one. Both arguments come filtered
    by :class:`OutputFilter`, and the patterns delayed like the target.

    Args:
        output: ``(T, B, N)``.
        patterns: ``(T, patterns, N)``.

    Returns:
        int64, ``(B,)``.
    """
    # |o - c|^2 = |o|^2 - 2 o c + |c|^2, of which |o|^2 does not depend on the pattern
    with torch.autocast(output.device.type, enabled=False):
        overlap = torch.bmm(output, patterns.transpose(1, 2)).sum(0)  # (B, patterns)
    power = patterns.square().sum((0, 2))
    return (power - 2 * overlap).argmin(1)


def match_spikes(output: Tensor, target: Tensor, tolerance: int = 2) -> dict[str, Tensor]:
    """Counts the output spikes that have a target spike of their own in the same train.

    A pair is an output and a target spike of one train, at most ``tolerance`` steps apart, and
    every spike is in one pair at most, so that a burst at one target spike counts once. Pairs are
    formed nearest first: those of the same step, then those one step apart (late outputs before
    early ones), and so on.

    Args:
        output, target: spikes, ``(T, B, N)``; any value but 0 is a spike.
        tolerance: the largest distance of a pair, in steps.

    Returns:
        The numbers of ``pairs``, ``output_spikes`` and ``target_spikes``, to be summed over
        batches for :func:`spike_scores`.
    """
    output, target = output != 0, target != 0
    output_spikes, target_spikes = output.sum(), target.sum()
    for distance in range(min(tolerance, len(output) - 1) + 1):
        end = len(output) - distance
        for late, early in ((output, target), (target, output)):
            pairs = late[distance:] & early[:end]
            late[distance:] ^= pairs
            early[:end] ^= pairs
    return {
        "pairs": output_spikes - output.sum(),
        "output_spikes": output_spikes,
        "target_spikes": target_spikes,
    }


def spike_scores(counts: Mapping[str, float]) -> dict[str, float]:
    """Precision, recall and F1 of the output spikes, from the counts of :func:`match_spikes`.

    Precision is the share of output spikes that are in a pair, recall that of target spikes, F1
    their harmonic mean. A share of nothing is 0.
    """
    pairs, outputs, targets = (
        float(counts[key]) for key in ("pairs", "output_spikes", "target_spikes")
    )
    return {
        "precision": pairs / max(outputs, 1),
        "recall": pairs / max(targets, 1),
        "f1": 2 * pairs / max(outputs + targets, 1),
    }
