"""Pictures of spike trains, neurons, synapses and results, on Matplotlib.

Every function draws on the axes it is given, or on a new figure, and returns them. Tensors may be
of any device and precision. Axes are in time steps and train (or neuron) index, train 0 at the top
as an array is printed. Colours are those of Okabe and Ito, which colour-blind readers can tell
apart. A figure of no panels is refused with a ``ValueError``.
"""

import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from snn_lib.data.patterns import DAMAGE_KINDS
from snn_lib.inspection.monitor import as_numpy
from snn_lib.surrogate import THRESHOLD
from snn_lib.synapses import IIRSynapse

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
    ax = ax or _panels(1, 1, (4, 4))[0, 0]
    steps, trains = (max(size, 1) for size in spikes.shape)
    time, train = as_numpy(spikes).nonzero()
    # A dot about as large as a cell, within what can be seen and told apart.
    ax.scatter(time, train, s=min(20, max(0.6, 400 / max(steps, trains))), c=color, lw=0)
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
        columns: panels in a row, at most.
        color: of the dots.

    Returns:
        The axes, one for each sample.
    """
    columns = min(columns, len(samples))
    rows = -(-len(samples) // max(columns, 1))
    grid = _panels(
        rows,
        columns,
        (2.4 * columns, 0.3 + 2.4 * rows),
        sharex=True,
        sharey=len({spikes.shape for spikes in samples}) == 1,
    )
    empty, above = grid.flat[len(samples) :], grid.flat[len(samples) - columns :]
    for ax, lowest in zip(empty, above, strict=False):
        ax.set_axis_off()
        lowest.tick_params(labelbottom=True)
    axes = grid.flat[: len(samples)]
    for ax, spikes, title in zip(axes, samples, titles, strict=True):
        raster(spikes, ax, title, color)
        ax.set(xlabel="", ylabel="")
    grid[0, 0].figure.supxlabel("time step", fontsize="medium")
    grid[0, 0].figure.supylabel("train index", fontsize="medium")
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
        (axes,) = _panels(1, 3, (10.5, 3.8), sharex=True, sharey=True)
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
    axes = _panels(len(names), 3, (9, 0.4 + 3 * len(names)), sharex=True, sharey=True)
    for b, (name, row) in enumerate(zip(names, axes, strict=True)):
        reconstruction(damaged[:, b], output[:, b], target[:, b], row)
        row[0].set_title(f"input: {name}")
        for ax in row:
            ax.label_outer()
    return axes


def completion(
    given: Tensor, answered: Tensor, missing: Tensor, frames: int = 30, width: int = 880
) -> bytes:
    """A moving picture of what a network is given and what it answers, as both come in time.

    Args:
        given, answered: spikes, ``(T, B, N)``; the samples stand side by side.
        missing: where the answer cannot come from the input, bool ``(T, B, N)``; the spikes there
            have a colour of their own.
        frames: pictures from the first step to the last, a tenth of a second each; where nothing
            changes from one to the next, there are fewer.
        width: in pixels.

    Returns:
        A GIF.

    Raises:
        ValueError: the shapes differ, or there are no frames.
    """
    if not given.shape == answered.shape == missing.shape:
        shapes = ", ".join(str(tuple(spikes.shape)) for spikes in (given, answered, missing))
        raise ValueError(f"given, answered and missing have the shapes {shapes}, expected the same")
    if frames < 1:
        raise ValueError(f"frames is {frames}, expected at least 1")
    missing = missing.bool()
    steps, samples, _ = given.shape
    axes = _panels(2, samples, (2.2 * samples, 4.8))
    figure, grown = axes[0, 0].figure, []
    panels = (
        (given, BLACK, axes[0]),
        (answered * ~missing, BLUE, axes[1]),
        (answered * missing, VERMILION, axes[1]),
    )
    for spikes, color, row in panels:
        for ax, sample in zip(row, spikes.unbind(1), strict=True):
            dots = raster(sample, ax, color=color).collections[-1]
            dots.set_sizes([2.0])
            grown.append((dots, dots.get_offsets().copy()))
    present = [ax.axvline(color=GREY, lw=0.8) for ax in axes.flat]
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes[0, 0].set_ylabel("given", fontsize="large")
    axes[1, 0].set_ylabel("answered", fontsize="large")

    figure.set_dpi(width / figure.get_figwidth())
    pictures = []
    for now in np.linspace(0, steps, frames + 1)[1:]:
        for dots, offsets in grown:
            dots.set_offsets(offsets[offsets[:, 0] < now])
        for line in present:
            line.set_xdata([now, now])
        figure.canvas.draw()
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        pictures.append(picture.quantize(32, dither=Image.Dither.NONE))
    plt.close(figure)
    durations = [100] * (frames - 1) + [3000]  # milliseconds
    file = io.BytesIO()
    pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
    return file.getvalue()


def membranes(
    spikes: Tensor,
    membrane: Tensor,
    reset: Tensor,
    neurons: Sequence[int],
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Membrane potential, reset and spikes of a few neurons over time, one panel each.

    Args:
        spikes, membrane, reset: of one sample, ``(T, N)``, such as ``record.membrane[:, 0]`` of a
            :class:`snn_lib.inspection.monitor.NeuronRecord`.
        neurons: which of the N to show.
        axes: one for each.

    Returns:
        The axes, one for each neuron.
    """
    if axes is None:
        axes = _panels(len(neurons), 1, (9, 1.2 + 1.5 * len(neurons)), sharex=True)[:, 0]
    spikes, membrane, reset = (as_numpy(trace) for trace in (spikes, membrane, reset))
    for ax, neuron in zip(axes, neurons, strict=True):
        (time,) = spikes[:, neuron].nonzero()
        ax.plot(membrane[:, neuron], color=BLUE, lw=1, label="membrane potential V")
        ax.plot(reset[:, neuron], color=ORANGE, lw=1, label="reset R")
        ax.axhline(THRESHOLD, color=GREY, lw=1, ls="--", label="threshold")
        # On the upper edge of the panel, in the axes' own coordinates.
        edge = ax.get_xaxis_transform()
        ax.plot(
            time, [0.95] * len(time), "|", c=BLACK, ms=9, mew=1.2, transform=edge, label="spike S"
        )
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.25 * (top - bottom))
        ax.set(ylabel=f"neuron {neuron}", xlim=(-0.5, max(len(spikes), 1) - 0.5))
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

    Raises:
        ValueError: there are no channels, or no steps.
    """
    kernels = _impulse_response(learned, steps)
    if kernels.size == 0:
        raise ValueError(f"nothing to draw: {kernels.shape[1]} channels, {steps} steps")
    ax = ax or _panels(1, 1, (6, 4))[0, 0]
    start = _impulse_response(initial, steps)[:, 0]
    time = np.arange(steps)
    ax.plot(time, kernels, color=SKY, lw=0.5, alpha=min(1.0, 100 / kernels.shape[1]))
    ax.plot([], [], color=SKY, label="learned, each channel")
    ax.plot(time, np.median(kernels, axis=1), color=BLUE, lw=2, label="learned, median")
    ax.plot(time, start, color=VERMILION, ls="--", label="initial")
    # One channel in a hundred may leave the panel, so that the others can be seen.
    low, high = np.quantile(kernels, (0.005, 0.995), axis=1)
    bottom, top = min(low.min(), start.min()), max(high.max(), start.max())
    margin = 0.05 * (top - bottom) or 1.0
    ax.set(ylim=(bottom - margin, top + margin), xlim=(0, max(steps - 1, 1)))
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
    ax = ax or _panels(1, 1, (4.5, 4.5))[0, 0]
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1, label="unit circle")
    trained = as_numpy(learned.poles()).ravel()
    start = np.unique(as_numpy(initial.poles()))
    faint = min(1.0, max(0.3, 100 / max(trained.size, 1)))
    ax.scatter(trained.real, trained.imag, s=6, c=BLUE, alpha=faint, lw=0, label="learned")
    few = len(start) < 20  # many are drawn small, or they would hide what they became
    size = {"s": 40, "lw": 1} if few else {"s": 8, "lw": 0.5, "zorder": 0}
    ax.scatter(start.real, start.imag, c=VERMILION, marker="x", label="initial", **size)
    limit = 1.1 * max(1.0, np.abs(trained).max(initial=0.0), np.abs(start).max(initial=0.0))
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
    axes = _panels(2, len(titles), (3 * len(titles), 6.2))
    for trained, fresh, title, column in zip(learned, initial, titles, axes.T, strict=True):
        synapse_kernels(trained, fresh, ax=column[0]).set_title(title)
        poles(trained, fresh, ax=column[1])
    for ax in axes[:, 1:].flat:  # the first column's hold for all
        ax.set_ylabel("")
        ax.get_legend().remove()
    return axes


def damage_sweeps(
    rows: Sequence[Mapping[str, Any]],
    trained: Mapping[str, float] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
) -> np.ndarray:
    """Error and retrieval against the strength of every kind of damage, a column each.

    The error is a share of the target's power, on a logarithmic axis. An output without spikes has
    100 %, where a line is drawn. Retrieval is the share of samples that are recognised.

    Args:
        rows: with ``damage``, ``strength``, ``error`` and ``retrieval``, as
            :meth:`snn_lib.tasks.association.Association.sweep` returns them.
        trained: the strength in training for each kind of damage, the most if it varied; a line is
            drawn there.
        others: rows of another model, drawn behind in grey.

    Returns:
        The axes, two rows of them.
    """
    kinds = list(dict.fromkeys(row["damage"] for row in rows))
    axes = _panels(2, len(kinds), (2.8 * len(kinds), 5), sharex="col", sharey="row")
    measures = (
        ("error", "error / target's power", VERMILION, "s"),
        ("retrieval", "retrieval", BLUE, "o"),
    )
    for kind, column in zip(kinds, axes.T, strict=True):
        for ax, (measure, ylabel, color, marker) in zip(column, measures, strict=True):
            grey = {"color": GREY, "marker": ".", "label": "the other"}
            _plot_damage(ax, others, kind, measure, **grey)
            if measure == "error":
                ax.axhline(1.0, color=GREY, lw=1, ls="--", label="silence")
            if trained and kind in trained:
                ax.axvline(trained[kind], color=GREY, lw=1, ls=":", label="in training")
            _plot_damage(ax, rows, kind, measure, color=color, marker=marker, ms=4)
            ax.set_ylabel(ylabel)
            ax.grid(alpha=0.3)
        column[0].set_yscale("log")
        column[0].yaxis.set_minor_formatter(NullFormatter())
        column[1].set_ylim(-0.05, 1.05)
        column[1].set_xlabel(DAMAGE_KINDS[kind].label if kind in DAMAGE_KINDS else kind)
    for ax in axes.flat:
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        ax.label_outer()
    axes[0, 0].legend(frameon=False, fontsize="small", loc="lower right")
    return axes


def _plot_damage(
    ax: Axes, rows: Sequence[Mapping[str, Any]], kind: str, measure: str, **style: Any
) -> None:
    """A curve of one measure against the strength of one kind of damage, if there are rows."""
    of_kind = [row for row in rows if row["damage"] == kind]
    if of_kind:
        strengths = [row["strength"] for row in of_kind]
        ax.plot(strengths, [row[measure] for row in of_kind], **style)


def firing_rates(rates: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Mean firing rate of every layer, as bars.

    Args:
        rates: spikes per neuron and time step, by the layer's name, first layer first.
        ax: where to draw.
    """
    ax = ax or _panels(1, 1, (5, 1 + 0.4 * len(rates)))[0, 0]
    bars = ax.barh(list(rates), list(rates.values()), color=BLUE)
    ax.bar_label(bars, fmt="%.4f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.25)  # room for the numbers
    ax.set_xlim(left=0.0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set(xlabel="spikes per neuron and time step", ylabel="layer")
    return ax


def _panels(rows: int, columns: int, size: tuple[float, float], **sharing: Any) -> np.ndarray:
    """The axes ``(rows, columns)`` of a new figure."""
    if rows * columns == 0:
        raise ValueError("nothing to draw, expected at least one panel")
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing
    )[1]


def _impulse_response(synapse: IIRSynapse, steps: int) -> np.ndarray:
    """The answer of every channel to one spike at step 0, ``(steps, channels)``."""
    dtype = torch.promote_types(synapse.alpha.dtype, torch.float32)
    synapse = copy.deepcopy(synapse).to("cpu", dtype)
    impulse = torch.zeros(steps, 1, *synapse.shape, dtype=dtype)
    impulse[:1] = 1.0
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        psp, _ = synapse.forward(impulse)  # forward: who watches the layer is not told
    return as_numpy(psp[:, 0].flatten(1))


def _integer_ticks(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
