"""Pictures of spike trains, neurons, synapses and results, on Matplotlib.

Every function draws on the axes it is given, or on a new figure, and returns them. Axes are in time
steps and train (or neuron) index, train 0 at the top as an array is printed. Colours are those of
Okabe and Ito, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from snn_lib.functional import iir_filter
from snn_lib.surrogate import THRESHOLD
from snn_lib.synapses import IIRSynapse

DAMAGE_LABELS = {
    "rows_removed": "rows removed",
    "block_size": "side of the removed block",
    "jitter_sigma": "jitter (s.d. in steps)",
    "noise_probability": "noise spikes per cell",
}
BLACK, GREY = "#000000", "#7f7f7f"
ORANGE, SKY, GREEN, BLUE, VERMILION = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"


def raster(
    spikes: Tensor, ax: Axes | None = None, title: str | None = None, color: str = BLACK
) -> Axes:
    """A dot for every spike of one sample.

    Args:
        spikes: ``(T, N)``; any value but 0 is a spike.
        ax: where to draw.
        title: above the axes.
        color: of the dots.
    """
    ax = ax or plt.subplots(figsize=(4, 4), layout="constrained")[1]
    steps, trains = spikes.shape
    time, train = spikes.nonzero(as_tuple=True)
    # A dot about as large as a cell, within what can be seen and told apart.
    ax.scatter(
        time.cpu(), train.cpu(), s=min(20, max(0.6, 400 / max(steps, trains))), c=color, lw=0
    )
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(trains - 0.5, -0.5), title=title)
    ax.set(xlabel="time step", ylabel="train index")
    _integer_ticks(ax)
    return ax


def rasters(
    samples: Sequence[Tensor], titles: Sequence[str], columns: int = 5, color: str = BLACK
) -> np.ndarray:
    """A raster of each of several samples or layers, in reading order.

    Args:
        samples: each ``(T, N)``; N may differ.
        titles: one for each.
        columns: panels in a row.
        color: of the dots.

    Returns:
        The axes, one for each sample.
    """
    rows = -(-len(samples) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.4 * columns, 0.3 + 2.4 * rows),
        sharex=True,
        sharey=len({spikes.shape for spikes in samples}) == 1,
        squeeze=False,
        layout="constrained",
    )
    for ax in grid.flat[len(samples) :]:
        ax.set_axis_off()
    axes = grid.flat[: len(samples)]
    for ax, spikes, title in zip(axes, samples, titles, strict=True):
        raster(spikes, ax, title, color)
        ax.set(xlabel="", ylabel="")
    figure.supxlabel("time step", fontsize="medium")
    figure.supylabel("train index", fontsize="medium")
    return axes


def reconstruction(
    damaged: Tensor, output: Tensor, target: Tensor, axes: Sequence[Axes] | None = None
) -> np.ndarray:
    """Rasters of the damaged input, the network's output and the target, side by side.

    Args:
        damaged, output, target: of one sample, ``(T, N)``.
        axes: three axes.

    Returns:
        The three axes.
    """
    if axes is None:
        _, axes = plt.subplots(
            1, 3, figsize=(10.5, 3.8), sharex=True, sharey=True, layout="constrained"
        )
    panels = (
        (damaged, "damaged input", VERMILION),
        (output, "network's output", BLUE),
        (target, "target", BLACK),
    )
    for ax, (spikes, title, color) in zip(axes, panels, strict=True):
        raster(spikes, ax, title, color)
    for ax in axes[1:]:
        ax.set_ylabel("")
    return np.asarray(axes)


def reconstructions(
    damaged: Tensor, output: Tensor, target: Tensor, names: Sequence[str]
) -> np.ndarray:
    """Damaged input, output and target of several samples, a row each.

    Args:
        damaged, output, target: ``(T, B, N)``.
        names: what was done to each sample, written over its input.

    Returns:
        The axes, ``(B, 3)``.
    """
    _, axes = plt.subplots(
        len(names),
        3,
        figsize=(9, 0.4 + 3 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for b, (name, row) in enumerate(zip(names, axes, strict=True)):
        reconstruction(damaged[:, b], output[:, b], target[:, b], row)
        row[0].set_title(f"input: {name}")
        for ax in row:
            ax.label_outer()
    return axes


def neuron_traces(
    spikes: Tensor,
    membrane: Tensor,
    reset: Tensor,
    neurons: Sequence[int],
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Membrane potential, reset and spikes of a few neurons over time, one panel each.

    Args:
        spikes, membrane, reset: of one sample, ``(T, N)``, such as ``record.membrane[:, 0]`` of a
            :class:`snn_lib.monitor.NeuronRecord`.
        neurons: which of the N to show.
        axes: one for each.

    Returns:
        The axes, one for each neuron.
    """
    if axes is None:
        _, axes = plt.subplots(
            len(neurons),
            1,
            figsize=(9, 1.2 + 1.5 * len(neurons)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        axes = axes[:, 0]
    for ax, neuron in zip(axes, neurons, strict=True):
        time = spikes[:, neuron].nonzero().flatten().cpu()
        ax.plot(membrane[:, neuron].cpu(), color=BLUE, lw=1, label="membrane potential V")
        ax.plot(reset[:, neuron].cpu(), color=ORANGE, lw=1, label="reset R")
        ax.axhline(THRESHOLD, color=GREY, lw=1, ls="--", label="threshold")
        # On the upper edge of the panel, in the axes' own coordinates.
        edge = ax.get_xaxis_transform()
        ax.plot(
            time, [0.95] * len(time), "|", c=BLACK, ms=9, mew=1.2, transform=edge, label="spike S"
        )
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.25 * (top - bottom))
        ax.set(ylabel=f"neuron {neuron}", xlim=(-0.5, len(spikes) - 0.5))
    axes[-1].set_xlabel("time step")
    axes[0].legend(
        ncols=4, fontsize="small", frameon=False, loc="lower left", bbox_to_anchor=(0, 1)
    )
    return np.asarray(axes)


def synapse_kernels(
    learned: IIRSynapse, initial: IIRSynapse, steps: int = 50, ax: Axes | None = None
) -> Axes:
    """Impulse responses of all channels of a synapse layer, learned against initial.

    Args:
        learned: the trained layer.
        initial: a layer as training began with; its first channel is shown.
        steps: length of the response, in steps.
        ax: where to draw.
    """
    ax = ax or plt.subplots(figsize=(6, 4), layout="constrained")[1]
    kernels = _impulse_response(learned, steps)
    start = _impulse_response(initial, steps)[:, 0]
    time = np.arange(steps)
    ax.plot(time, kernels, color=SKY, lw=0.5, alpha=min(1.0, 100 / kernels.shape[1]))
    ax.plot([], [], color=SKY, label="learned, each channel")
    ax.plot(time, kernels.median(1).values, color=BLUE, lw=2, label="learned, median")
    ax.plot(time, start, color=VERMILION, ls="--", label="initial")
    # One channel in a hundred may leave the panel, so that the others can be seen.
    low, high = np.quantile(kernels, (0.005, 0.995), axis=1)
    bottom, top = min(low.min(), start.min().item()), max(high.max(), start.max().item())
    margin = 0.05 * (top - bottom)
    ax.set(ylim=(bottom - margin, top + margin), xlim=(0, steps - 1))
    ax.set(xlabel="time step after a spike", ylabel="PSP")
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    return ax


def poles(learned: IIRSynapse, initial: IIRSynapse, ax: Axes | None = None) -> Axes:
    """The poles of all channels of a synapse layer in the complex plane, learned against initial.

    A filter is stable if its poles lie inside the unit circle; a pair off the real axis rings.

    Args:
        learned: the trained layer.
        initial: a layer as training began with.
        ax: where to draw.
    """
    ax = ax or plt.subplots(figsize=(4.5, 4.5), layout="constrained")[1]
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1, label="unit circle")
    for synapse, style in (
        (learned, {"s": 6, "c": BLUE, "alpha": 0.3, "lw": 0, "label": "learned"}),
        (initial, {"s": 40, "c": VERMILION, "marker": "x", "label": "initial"}),
    ):
        z = synapse.poles().flatten()
        ax.scatter(z.real, z.imag, **style)
    limit = 1.1 * max(1.0, learned.pole_radius())
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.set(xlabel="real part", ylabel="imaginary part")
    ax.legend(frameon=False, fontsize="small", loc="center", bbox_to_anchor=(0.3, 0.5))
    return ax


def synapse_layers(
    learned: Sequence[IIRSynapse], initial: Sequence[IIRSynapse], titles: Sequence[str]
) -> np.ndarray:
    """Kernels and, below them, poles of several synapse layers, learned against initial.

    Args:
        learned: the trained layers.
        initial: layers as training began with, one for each.
        titles: one for each.

    Returns:
        The axes, two rows of them.
    """
    count = len(titles)
    _, axes = plt.subplots(2, count, figsize=(3 * count, 6.2), squeeze=False, layout="constrained")
    for trained, fresh, title, column in zip(learned, initial, titles, axes.T, strict=True):
        synapse_kernels(trained, fresh, ax=column[0]).set_title(title)
        poles(trained, fresh, ax=column[1])
    for ax in axes[:, 1:].flat:  # the first column's hold for all
        ax.set_ylabel("")
        ax.get_legend().remove()
    return axes


def damage_sweep(
    strengths: Sequence[float],
    errors: Sequence[float],
    retrievals: Sequence[float],
    xlabel: str,
    trained: float | None = None,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Error, on a logarithmic axis, and retrieval against the strength of one kind of damage.

    Args:
        strengths: of the damage, ascending.
        errors: loss as a share of the target's power, at each strength; an output without spikes
            has 100 %, where a line is drawn.
        retrievals: share of samples recognised, at each strength.
        xlabel: the kind of damage with its unit, such as ``"rows removed"``.
        trained: the strength in training, where a line is drawn.
        axes: two axes, for the error and for the retrieval.

    Returns:
        The two axes.
    """
    if axes is None:
        _, axes = plt.subplots(2, 1, figsize=(4, 5), sharex=True, layout="constrained")
    axes[0].axhline(1.0, color=GREY, lw=1, ls="--", label="silence")
    for ax, values, ylabel, color, marker in (
        (axes[0], errors, "error / target's power", VERMILION, "s"),
        (axes[1], retrievals, "retrieval", BLUE, "o"),
    ):
        if trained is not None:
            ax.axvline(trained, color=GREY, lw=1, ls=":", label="as in training")
        ax.plot(strengths, values, color=color, marker=marker, ms=4)
        ax.set_ylabel(ylabel)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_ylim(-0.05, 1.05)
    for ax in axes:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].set_xlabel(xlabel)
    return np.asarray(axes)


def damage_sweeps(
    rows: Sequence[Mapping[str, Any]], trained: Mapping[str, float] | None = None
) -> np.ndarray:
    """Error and retrieval against the strength of every kind of damage, a column each.

    Args:
        rows: with ``damage``, ``strength``, ``error`` and ``retrieval``, as
            :meth:`snn_lib.association.Association.sweep` returns them.
        trained: strengths in training, by the kind of damage.

    Returns:
        The axes, two rows of them.
    """
    kinds = list(dict.fromkeys(row["damage"] for row in rows))
    _, axes = plt.subplots(
        2,
        len(kinds),
        figsize=(2.8 * len(kinds), 5),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for kind, column in zip(kinds, axes.T, strict=True):
        of_kind = [row for row in rows if row["damage"] == kind]
        values = ([row[key] for row in of_kind] for key in ("strength", "error", "retrieval"))
        label, strength = DAMAGE_LABELS.get(kind, kind), (trained or {}).get(kind)
        damage_sweep(*values, label, strength, column)
    for ax in axes.flat:
        ax.label_outer()
    axes[0, 0].legend(frameon=False, fontsize="small", loc="lower right")
    return axes


def firing_rates(rates: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Mean firing rate of every layer, as bars.

    Args:
        rates: spikes per neuron and time step, by the layer's name, first layer first.
        ax: where to draw.
    """
    ax = ax or plt.subplots(figsize=(5, 1 + 0.4 * len(rates)), layout="constrained")[1]
    bars = ax.barh(list(rates), list(rates.values()), color=BLUE)
    ax.bar_label(bars, fmt="%.4f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.25)  # room for the numbers
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set(xlabel="spikes per neuron and time step", ylabel="layer")
    return ax


def _impulse_response(synapse: IIRSynapse, steps: int) -> Tensor:
    """The answer of every channel to one spike at step 0, ``(steps, channels)``."""
    coefficients = (synapse.effective_alpha(), synapse.beta)
    alpha, beta = (tensor.detach().flatten(1).cpu() for tensor in coefficients)
    impulse = torch.zeros(steps, 1, alpha.shape[1])
    impulse[0] = 1.0
    return iir_filter(impulse, alpha, beta)[0][:, 0]


def _integer_ticks(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
