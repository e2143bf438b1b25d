"""Pictures of spike trains, neurons, synapses and results, drawn by Matplotlib.

A function returns the axes it has drawn on, if it does not say otherwise. Those are the axes that
it was given, or those of a new figure. Tensors may be on any device and of any precision; spikes
and potentials may be arrays, too. Time runs to the right, in steps, and train 0 is at the top, as
in a printed array. The colours are those of Okabe and Ito, which colour-blind readers can tell
apart.
"""

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

from snn_lib.cells import IIRSynapse
from snn_lib.data.patterns import DAMAGE_KINDS
from snn_lib.functional import iir_filter
from snn_lib.inspection.monitor import as_numpy
from snn_lib.surrogate import THRESHOLD

BLACK, GREY = "#000000", "#7f7f7f"
ORANGE, SKY, GREEN, BLUE, VERMILION = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
LEGEND = {"frameon": False, "fontsize": "small"}


def raster(
    spikes: Tensor | np.ndarray,
    ax: Axes | None = None,
    title: str | None = None,
    color: str = BLACK,
) -> Axes:
    """A dot for every spike of one sample.

    Args:
        spikes: ``(T, N)``; any value but 0 is a spike.
        ax, title: the axes to draw on, and their title.
        color: the colour of the dots.
    """
    _check_shape(spikes, "(T, N): one sample")
    ax = _axes(ax, (4, 4))
    steps, trains = (max(size, 1) for size in spikes.shape)
    time, train = as_numpy(spikes).nonzero()
    # A dot is about as large as a cell, but neither too small to be seen nor too large.
    ax.scatter(time, train, s=min(20, max(0.6, 400 / max(steps, trains))), c=color, lw=0)
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(trains - 0.5, -0.5), title=title)
    ax.set(xlabel="time step", ylabel="train index")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    return ax


def rasters(
    samples: Sequence[Tensor | np.ndarray], titles: Sequence[str], columns: int = 5
) -> np.ndarray:
    """Rasters of several samples or layers, in reading order.

    Args:
        samples: each ``(T, N)``; N may differ.
        titles: a title for each sample.
        columns: the largest number of panels in a row.

    Returns:
        The axes, one for each sample.
    """
    if len(titles) != len(samples):
        raise ValueError(f"there are {len(titles)} titles for {len(samples)} samples")
    columns = min(columns, len(samples))
    rows = -(-len(samples) // max(columns, 1))
    same = len({spikes.shape for spikes in samples}) == 1
    grid = _panels(rows, columns, (2.4 * columns, 0.3 + 2.4 * rows), sharex=True, sharey=same)
    empty, above = grid.flat[len(samples) :], grid.flat[len(samples) - columns :]
    for ax, lowest in zip(empty, above, strict=False):
        ax.set_axis_off()
        lowest.tick_params(labelbottom=True)
    axes = grid.flat[: len(samples)]
    for ax, spikes, title in zip(axes, samples, titles, strict=True):
        raster(spikes, ax, title)
        ax.set(xlabel="", ylabel="")
    grid[0, 0].figure.supxlabel("time step", fontsize="medium")
    grid[0, 0].figure.supylabel("train index", fontsize="medium")
    return axes


def reconstructions(
    damaged: Tensor, output: Tensor, target: Tensor, names: Sequence[str]
) -> np.ndarray:
    """Rasters of damaged input, network's output and target, with a row for each sample.

    Args:
        damaged, output, target: ``(T, B, N)``.
        names: what was done to each sample, which is written above its input.

    Returns:
        The axes, ``(B, 3)``.

    Raises:
        ValueError: there are no samples, or not as many names.
    """
    if len(names) != damaged.shape[1]:
        raise ValueError(f"there are {len(names)} names for {damaged.shape[1]} samples")
    axes = _panels(len(names), 3, (9, 0.4 + 3 * len(names)), sharex=True, sharey=True)
    for b, (name, row) in enumerate(zip(names, axes, strict=True)):
        raster(damaged[:, b], row[0], f"input: {name}", VERMILION)
        raster(output[:, b], row[1], "network's output", BLUE)
        raster(target[:, b], row[2], "target", BLACK)
        for ax in row:
            ax.label_outer()
    return axes


def completion(
    given: Tensor | np.ndarray,
    answered: Tensor | np.ndarray,
    missing: Tensor | np.ndarray,
    frames: int = 30,
    width: int = 880,
) -> bytes:
    """A moving picture of what a network is given and of what it answers as time goes on.

    Args:
        given, answered: spikes, ``(T, B, N)``; the samples stand side by side.
        missing: the part of the answer that was missing from the input, bool ``(T, B, N)``; its
            spikes have a colour of their own.
        frames: the number of pictures, each of which is shown for a tenth of a second, and the last
            for three; pictures in which nothing changes are left out.
        width: the width in pixels.

    Returns:
        A GIF.

    Raises:
        ValueError: the shapes differ, or there are no frames.
    """
    given, answered, missing = map(as_numpy, (given, answered, missing))
    if not given.shape == answered.shape == missing.shape:
        shapes = ", ".join(str(spikes.shape) for spikes in (given, answered, missing))
        raise ValueError(f"given, answered and missing have the shapes {shapes}, expected the same")
    if frames < 1:
        raise ValueError(f"frames is {frames}, expected at least 1")
    _check_shape(given, "(T, B, N)")
    missing = missing.astype(bool)
    steps, samples, _ = given.shape
    axes = _panels(2, samples, (2.2 * samples, 4.8))
    figure, grown = axes[0, 0].figure, []
    panels = (
        (given, BLACK, axes[0]),
        (answered * ~missing, BLUE, axes[1]),
        (answered * missing, VERMILION, axes[1]),
    )
    for spikes, color, row in panels:
        for ax, sample in zip(row, spikes.swapaxes(0, 1), strict=True):
            dots = raster(sample, ax, color=color).collections[-1]
            dots.set(sizes=[2.0])
            grown.append((dots, np.array(dots.get_offsets())))
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
    spikes: Tensor | np.ndarray,
    membrane: Tensor | np.ndarray,
    reset: Tensor | np.ndarray,
    neurons: Sequence[int],
) -> np.ndarray:
    """Membrane potential, reset and spikes of a few neurons over time, one panel each.

    Args:
        spikes, membrane, reset: those of one sample, ``(T, N)``, such as ``record.membrane[:, 0]``
            of a :class:`snn_lib.inspection.monitor.NeuronRecord`.
        neurons: which of the N neurons to show.

    Returns:
        The axes, one for each neuron.
    """
    for trace in (spikes, membrane, reset):
        _check_shape(trace, "(T, N): one sample")
    axes = _panels(len(neurons), 1, (9, 1.2 + 1.5 * len(neurons)), sharex=True)[:, 0]
    fired, potential, resets = (as_numpy(trace) for trace in (spikes, membrane, reset))
    for ax, neuron in zip(axes, neurons, strict=True):
        (time,) = fired[:, neuron].nonzero()
        ax.plot(potential[:, neuron], color=BLUE, lw=1, label="membrane potential V")
        ax.plot(resets[:, neuron], color=ORANGE, lw=1, label="reset R")
        ax.axhline(THRESHOLD, color=GREY, lw=1, ls="--", label="threshold")
        edge = ax.get_xaxis_transform()  # 0.95 is near the upper edge, whatever the potentials
        ax.plot(
            time, [0.95] * len(time), "|", c=BLACK, ms=9, mew=1.2, transform=edge, label="spike S"
        )
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom, top + 0.25 * (top - bottom))
        ax.set(ylabel=f"neuron {neuron}", xlim=(-0.5, max(len(spikes), 1) - 0.5))
    axes[-1].set_xlabel("time step")
    axes[0].legend(**LEGEND, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return axes


def synapse_kernels(
    learned: IIRSynapse, initial: IIRSynapse, steps: int = 50, ax: Axes | None = None
) -> Axes:
    """Impulse responses of all channels of a synapse layer, before and after training.

    Args:
        learned: the trained layer.
        initial: the layer before training; its first channel is shown.
        steps: length of the response, in steps.
        ax: the axes to draw on.

    Raises:
        ValueError: there are no channels or no steps, or a response is not finite, for example
            because the filter is unstable.
    """
    kernels, start = impulse_response(learned, steps), impulse_response(initial, steps)[:, :1]
    if kernels.size == 0 or start.size == 0:
        raise ValueError(f"nothing to draw: {kernels.shape[1]} channels, {steps} steps")
    if not (np.isfinite(kernels).all() and np.isfinite(start).all()):
        raise ValueError(f"the response of a filter is not finite within {steps} steps")
    ax = _axes(ax, (6, 4))
    time = np.arange(steps)
    ax.plot(time, kernels, color=SKY, lw=0.5, alpha=min(1.0, 100 / kernels.shape[1]))
    ax.plot([], [], color=SKY, label="learned, each channel")
    ax.plot(time, np.median(kernels, axis=1), color=BLUE, lw=2, label="learned, median")
    ax.plot(time, start, color=VERMILION, ls="--", label="initial")
    # Up to one channel in a hundred may leave the panel, so that the others can be seen.
    low, high = np.quantile(kernels, (0.005, 0.995), axis=1)
    bottom, top = min(low.min(), start.min()), max(high.max(), start.max())
    margin = 0.05 * (top - bottom) or 1.0
    ax.set(ylim=(bottom - margin, top + margin), xlim=(0, max(steps - 1, 1)))
    ax.set(xlabel="time step after a spike", ylabel="PSP")
    ax.legend(**LEGEND, loc="upper right")
    return ax


def poles(learned: IIRSynapse, initial: IIRSynapse, ax: Axes | None = None) -> Axes:
    """The poles of all channels of a synapse layer in the complex plane, before and after training.

    A filter is stable if its poles lie inside the unit circle. It rings if two poles lie off the
    real axis.
    """
    ax = _axes(ax, (4.5, 4.5))
    angle = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1, label="unit circle")
    trained = as_numpy(learned.poles()).ravel()
    start = np.unique(as_numpy(initial.poles()))
    faint = min(1.0, max(0.3, 100 / max(trained.size, 1)))
    ax.scatter(np.real(trained), np.imag(trained), s=6, c=BLUE, alpha=faint, lw=0, label="learned")
    few = len(start) < 20  # many crosses are small, since large ones would hide the learned poles
    size: dict[str, Any] = {"s": 40, "lw": 1} if few else {"s": 8, "lw": 0.5, "zorder": 0}
    ax.scatter(np.real(start), np.imag(start), c=VERMILION, marker="x", label="initial", **size)
    limit = 1.1 * max(1.0, np.abs(trained).max(initial=0.0), np.abs(start).max(initial=0.0))
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.set(xlabel="real part", ylabel="imaginary part")
    ax.legend(**LEGEND, loc="center", bbox_to_anchor=(0.3, 0.5))
    return ax


def synapse_layers(
    learned: Sequence[IIRSynapse], initial: Sequence[IIRSynapse], titles: Sequence[str]
) -> np.ndarray:
    """Kernels and, below them, poles of several synapse layers, before and after training.

    Returns the axes, ``(2, layers)``.
    """
    axes = _panels(2, len(titles), (3 * len(titles), 6.2))
    for trained, fresh, title, column in zip(learned, initial, titles, axes.T, strict=True):
        synapse_kernels(trained, fresh, ax=column[0]).set_title(title)
        poles(trained, fresh, ax=column[1])
    for ax in axes[:, 1:].flat:  # the first column's label and legend hold for its row
        ax.set_ylabel("")
        ax.get_legend().remove()
    return axes


def damage_sweeps(
    rows: Sequence[Mapping[str, Any]],
    trained: Mapping[str, float] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
) -> np.ndarray:
    """Error and retrieval against the strength of damage, with a column for each kind of damage.

    The error is given as a share of the target's power, on a logarithmic axis. An output without
    spikes has an error of 100 %, where a line is drawn. Retrieval is the share of samples that are
    recognised.

    Args:
        rows: what :meth:`snn_lib.tasks.association.Association.sweep` returns, with ``damage``,
            ``strength``, ``error`` and ``retrieval`` in each row.
        trained: the strength in training for each kind of damage, as
            :meth:`snn_lib.data.patterns.Damage.strengths` returns it, the largest one if it varied;
            a line is drawn there.
        others: the rows of another model, which is drawn in grey behind the first.

    Returns:
        The axes, ``(2, kinds of damage)``.
    """
    kinds = list(dict.fromkeys(row["damage"] for row in rows))
    axes = _panels(2, len(kinds), (2.8 * len(kinds), 5), sharex="col", sharey="row")
    measures = (
        ("error", "error / target's power", VERMILION, "s"),
        ("retrieval", "retrieval", BLUE, "o"),
    )
    for kind, column in zip(kinds, axes.T, strict=True):
        for ax, (measure, ylabel, color, marker) in zip(column, measures, strict=True):
            _plot_damage(ax, others, kind, measure, color=GREY, marker=".", label="the other")
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
    axes[0, 0].legend(**LEGEND, loc="lower right")
    return axes


def _plot_damage(
    ax: Axes, rows: Sequence[Mapping[str, Any]], kind: str, measure: str, **style: Any
) -> None:
    """A curve of one measure against the strength of one kind of damage, if there are rows."""
    points = [(row["strength"], row[measure]) for row in rows if row["damage"] == kind]
    if points:
        ax.plot(*zip(*points, strict=True), **style)


def firing_rates(rates: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Mean firing rate of every layer, in spikes per neuron and step, as bars from the top down."""
    ax = _axes(ax, (5, 1 + 0.4 * len(rates)))
    bars = ax.barh(list(rates), list(rates.values()), color=BLUE)
    ax.bar_label(bars, fmt="%.4f", padding=3)
    ax.invert_yaxis()
    ax.margins(x=0.25)  # room for the numbers
    ax.set_xlim(left=0.0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set(xlabel="spikes per neuron and time step", ylabel="layer")
    return ax


def _check_shape(values: Tensor | np.ndarray, expected: str) -> None:
    if values.ndim != expected.count(",") + 1:
        raise ValueError(f"there are values of shape {tuple(values.shape)}, expected {expected}")


def _axes(given: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes that are given, or those of a new figure."""
    return given or _panels(1, 1, size)[0, 0]


def _panels(rows: int, columns: int, size: tuple[float, float], **sharing: Any) -> np.ndarray:
    """The axes ``(rows, columns)`` of a new figure."""
    if rows * columns == 0:
        raise ValueError("nothing to draw, expected at least one panel")
    return plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing
    )[1]


def impulse_response(synapse: IIRSynapse, steps: int) -> np.ndarray:
    """The answer of every channel to one spike at step 0, ``(steps, channels)``."""
    alpha, beta = (torch.from_numpy(as_numpy(c)) for c in (synapse.effective_alpha(), synapse.beta))
    impulse = torch.zeros(steps, 1, *synapse.shape, device="cpu")
    impulse[:1] = 1.0
    psp, _ = iir_filter(impulse, alpha, beta)
    return psp[:, 0].flatten(1).numpy()
