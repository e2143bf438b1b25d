"""How alike spike patterns are: their filtered difference, the nearest pattern, matching spikes.

All spike trains are time first, ``(T, B, N)``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from snn_lib.cells import IIRSynapse
from snn_lib.containers import Output, whole_number
from snn_lib.functional import FilterState, check_tensor
from snn_lib.time_constants import decays_of, peak_scale


class OutputFilter(IIRSynapse):
    """The filter through which spike trains are compared: v0 (m[t] - s[t]), not trained.

    m[t] = p m[t-1] + x[t],  s[t] = q s[t-1] + x[t],  p = exp(-1 / tau_m),  q = exp(-1 / tau_s)
    is the second-order filter
        alpha_1 = p + q,  alpha_2 = -p q,  beta_0 = 0,  beta_1 = v0 (p - q),
    one step later than :class:`snn_lib.cells.DualExponentialSynapse`, with v0 from
    :func:`snn_lib.time_constants.peak_scale`.

    The filter is linear, so the difference of two filtered spike trains is their filtered
    difference. The loss of the associative memory is
    ``output_filter(output - target)[0].square().mean()``.

    Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.

    Args:
        tau_m: the slow time constant, in steps.
        tau_s: the fast time constant, in steps; 0 < tau_s < tau_m.
        channels: number of spike trains, N.
        normalize: whether v0 scales the difference to the peak 1; otherwise it is 1.

    Shape:
        As in :class:`snn_lib.cells.IIRSynapse`, with P = 2 and Q = 1.

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
        """Filters all time steps; not rounded under autocast, since distances need all digits."""
        check_tensor("x", x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, state, lengths)


def nearest_pattern(output: Tensor, patterns: Tensor) -> Tensor:
    """Finds the pattern nearest to each sample, by Euclidean distance over all steps and trains.

    The retrieval of the associative memory is the share of samples whose nearest pattern is the
    right one.

    Args:
        output: the network's output, filtered by :class:`OutputFilter`, ``(T, B, N)``.
        patterns: the patterns, delayed as the targets are and filtered, ``(T, patterns, N)``.

    Returns:
        The numbers of the patterns, int64 ``(B,)``.
    """
    check_tensor("output", output)
    # |o - c|^2 = |o|^2 - 2 o c + |c|^2, and |o|^2 is the same for all patterns
    with torch.autocast(output.device.type, enabled=False):
        overlap = torch.bmm(output, patterns.transpose(1, 2)).sum(0)  # (B, patterns)
    power = patterns.square().sum((0, 2))
    return (power - 2 * overlap).argmin(1)


def match_spikes(output: Tensor, target: Tensor, tolerance: int = 2) -> dict[str, Tensor]:
    """Pairs output spikes with target spikes of the same train, and counts the pairs.

    The two spikes of a pair are at most ``tolerance`` steps apart. No spike is in two pairs, so a
    burst around one target spike counts once. The nearest spikes are paired first: those of the
    same step, then those one step apart (late outputs before early ones), and so on.

    Args:
        output, target: spikes, ``(T, B, N)``; any value but 0 is a spike.
        tolerance: the largest distance within a pair, in steps.

    Returns:
        The numbers of ``pairs``, ``output_spikes`` and ``target_spikes``. Their sums over batches
        go to :func:`spike_scores`.

    Raises:
        ValueError: the tolerance is no whole number of at least 0.
    """
    tolerance = whole_number(tolerance, "tolerance", least=0)
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

    Precision is the share of output spikes that are in a pair. Recall is the share of target spikes
    that are in a pair. F1 is the harmonic mean of the two. Each is 0 if there are no spikes.
    """
    pairs, outputs, targets = (
        float(counts[key]) for key in ("pairs", "output_spikes", "target_spikes")
    )
    return {
        "precision": pairs / max(outputs, 1),
        "recall": pairs / max(targets, 1),
        "f1": 2 * pairs / max(outputs + targets, 1),
    }
