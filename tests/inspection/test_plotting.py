"""What is drawn, read back from the axes and the pictures."""

import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import signal

from snn_lib import DualExponentialSynapse, LowPassSynapse
from snn_lib.data.patterns import DAMAGE_KINDS
from snn_lib.inspection import plotting
from snn_lib.inspection.monitor import Monitor


@pytest.fixture(autouse=True)
def _no_display():
    matplotlib.use("Agg")
    yield
    plt.close("all")


@pytest.fixture
def spikes():
    return (torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.1).float()


@pytest.fixture
def learned():
    torch.manual_seed(0)
    synapse = DualExponentialSynapse(20, 8.0, 2.0)
    with torch.no_grad():
        synapse.alpha += 0.02 * torch.randn_like(synapse.alpha)
    return synapse


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def points(collection):
    return {tuple(point) for point in np.asarray(collection.get_offsets())}


def points_of(spikes):
    """The points of the spikes ``(time, trains)`` in a raster."""
    return {tuple(map(float, spike)) for spike in spikes.nonzero().tolist()}


def test_raster_has_a_dot_for_every_spike_with_train_0_at_the_top(spikes):
    ax = plotting.raster(spikes, title="S")
    assert points(ax.collections[0]) == points_of(spikes)
    assert ax.get_xlim() == (-0.5, 39.5)
    assert ax.get_ylim() == (29.5, -0.5)
    labels = ax.get_xlabel(), ax.get_ylabel(), ax.get_title()
    assert labels == ("time step", "train index", "S")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_completion_shows_spikes_at_their_time_and_the_missing_ones_at_the_end(kind):
    steps, trains = 40, 30
    given = torch.zeros(steps, 2, trains)
    given[5, 0, 3] = 1
    answered, missing = torch.zeros_like(given), torch.zeros_like(given, dtype=torch.bool)
    answered[10:, 1] = 1
    missing[30:] = True
    spikes = map(kind, (given, answered, missing))
    gif = Image.open(io.BytesIO(plotting.completion(*spikes, 4, width=400)))
    assert (gif.n_frames, gif.width) == (4, 400)
    assert gif.info["loop"] == 0
    assert not plt.get_fignums()
    durations = [gif.seek(frame) or gif.info["duration"] for frame in range(4)]
    assert durations == [100, 100, 100, 3000]

    def seen(frame, color):
        """Pixels of a colour, in the left and the right half of the upper and the lower row."""
        gif.seek(frame)
        near = np.abs(np.asarray(gif.convert("RGB")).astype(int) - color).sum(2) < 60
        return [half.sum() for row in np.array_split(near, 2) for half in np.array_split(row, 2, 1)]

    blue, vermilion = (
        np.round(255 * np.array(matplotlib.colors.to_rgb(color)))
        for color in (plotting.BLUE, plotting.VERMILION)
    )
    assert [sum(seen(frame, vermilion)) > 0 for frame in range(4)] == [False, False, False, True]
    counts = [seen(frame, blue) for frame in range(4)]
    assert counts[0] == [0, 0, 0, 0]
    assert [count[:3] for count in counts[1:]] == [[0, 0, 0]] * 3  # on the lower right alone
    assert 0 < counts[1][3] < counts[2][3]

    def inside(frame):
        """Dark pixels within the axes of the upper left, a third of the picture from its edges."""
        gif.seek(frame)
        dark = np.asarray(gif.convert("L")) < 60
        return dark[5:60, 30:180].sum(), dark[5:60, 220:380].sum()

    assert inside(0)[0] > inside(0)[1]  # what is given, to the first alone


def test_rasters_are_drawn_in_reading_order(spikes):
    samples = [spikes, spikes[:, :7], spikes[:20]]
    axes = plotting.rasters(samples, ["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    for ax, sample in zip(axes, samples, strict=True):
        assert points(ax.collections[0]) == points_of(sample)
    assert [ax.get_ylim()[0] for ax in axes] == [29.5, 6.5, 29.5]
    figure = axes[0].figure
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("time step", "train index")
    columns, rows = {ax.get_subplotspec().colspan.start for ax in axes}, len(axes) // 2 + 1
    assert columns == {0, 1}
    assert [ax.get_subplotspec().rowspan.start for ax in axes] == [0, 0, rows - 1]
    assert [ax.axison for ax in figure.axes] == [True, True, True, False]


def test_reconstructions_have_a_row_for_each_sample(spikes):
    damaged, output, target = (torch.stack([spikes.roll(k), spikes.roll(-k)], 1) for k in (0, 1, 2))
    axes = plotting.reconstructions(damaged, output, target, ["noise", "jitter"])
    assert [ax.get_title() for ax in axes[:, 0]] == ["input: noise", "input: jitter"]
    assert [ax.get_title() for ax in axes[0, 1:]] == ["network's output", "target"]
    assert axes[1, 0].get_ylabel() == "train index"
    for b, row in enumerate(axes):
        for ax, shown in zip(row, (damaged, output, target), strict=True):
            assert points(ax.collections[0]) == points_of(shown[:, b])


def test_membranes_show_potential_reset_threshold_and_spikes_of_each_neuron(spikes):
    membrane, reset = torch.randn(40, 30), torch.rand(40, 30)
    axes = plotting.membranes(spikes, membrane, reset, [3, 17])
    assert [ax.get_ylabel() for ax in axes] == ["neuron 3", "neuron 17"]
    for ax, neuron in zip(axes, [3, 17], strict=True):
        v, r, threshold, ticks = ax.lines
        np.testing.assert_allclose(v.get_ydata(), membrane[:, neuron])
        np.testing.assert_allclose(r.get_ydata(), reset[:, neuron])
        assert set(threshold.get_ydata()) == {1.0}
        assert list(ticks.get_xdata()) == spikes[:, neuron].nonzero().flatten().tolist()
    assert axes[-1].get_xlabel() == "time step"
    assert texts(axes[0]) == ["membrane potential V", "reset R", "threshold", "spike S"]


def assert_shows_responses(ax, synapse, steps):
    """The first lines are the impulse responses of the channels, by SciPy."""
    for line, alpha, beta in zip(ax.lines, synapse.alpha.T, synapse.beta.T, strict=False):
        expected = signal.lfilter(beta.tolist(), [1, *(-alpha).tolist()], np.eye(1, steps)[0])
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-4, atol=1e-5)


def test_synapse_kernels_are_impulse_responses(learned):
    initial = DualExponentialSynapse(20, torch.linspace(8.0, 16.0, 20), 2.0)
    ax = plotting.synapse_kernels(learned, initial, steps=30)
    assert_shows_responses(ax, learned, steps=30)
    k = np.arange(30)
    shown = {line.get_label(): line.get_ydata() for line in ax.lines}
    expected = np.exp(-(k + 1) / 8) - np.exp(-(k + 1) / 2)
    np.testing.assert_allclose(shown["initial"], expected, rtol=1e-4, atol=1e-5)
    channels = [line.get_ydata() for line in ax.lines[:20]]
    np.testing.assert_allclose(shown["learned, median"], np.median(channels, 0))
    assert not np.allclose(np.mean(channels, 0), np.median(channels, 0), rtol=1e-3)
    assert texts(ax) == ["learned, each channel", "learned, median", "initial"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time step after a spike", "PSP")


def test_synapse_kernels_keep_the_initial_one_in_view(learned):
    with torch.no_grad():
        learned.beta *= 0.01
    ax = plotting.synapse_kernels(learned, DualExponentialSynapse(20, 8.0, 2.0))
    bottom, top = ax.get_ylim()
    assert bottom < 0
    assert top > ax.lines[-1].get_ydata().max() > 0.4


def test_synapse_kernels_and_poles_are_those_of_the_filter_at_work():
    synapse = LowPassSynapse(1, 4.0, constraint="stable", margin=0.1)
    with torch.no_grad():
        synapse.alpha.fill_(1.5)
    ax = plotting.synapse_kernels(synapse, synapse, steps=5)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0.9 ** np.arange(5), rtol=1e-5)
    (pole,) = points(plotting.poles(synapse, synapse).collections[0])
    assert pole == pytest.approx((0.9, 0.0))


def test_synapse_kernels_of_feature_maps_are_drawn():
    synapse = LowPassSynapse((2, 3), 4.0)
    ax = plotting.synapse_kernels(synapse, synapse, steps=5)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.exp(-np.arange(5) / 4), rtol=1e-5)


def test_poles_are_drawn_with_the_unit_circle(learned):
    initial = DualExponentialSynapse(20, taus := torch.linspace(8.0, 16.0, 20), 2.0)
    ax = plotting.poles(learned, initial)
    shown, start = (np.asarray(collection.get_offsets()) for collection in ax.collections)
    alpha = learned.alpha.detach().double().numpy()
    roots = np.concatenate([np.roots([1, -a1, -a2]) for a1, a2 in alpha.T])
    expected = sorted((round(z.real, 4), round(abs(z.imag), 4)) for z in roots)
    assert sorted((round(x, 4), round(abs(y), 4)) for x, y in shown) == expected
    expected = np.exp(-1 / np.array([2.0, *taus]))
    np.testing.assert_allclose(np.unique(start[:, 0].round(5)), expected, atol=1e-4)
    circle = ax.lines[0].get_xydata()
    np.testing.assert_allclose(np.linalg.norm(circle, axis=1), 1.0)
    np.testing.assert_allclose([circle.min(0), circle.max(0)], [[-1, -1], [1, 1]], atol=1e-3)
    assert ax.get_aspect() == 1.0


def test_poles_outside_the_circle_are_still_in_view():
    stable, unstable = LowPassSynapse(1, 4.0), LowPassSynapse(1, 4.0)
    with torch.no_grad():
        unstable.alpha.fill_(-1.5)
    for ax in (plotting.poles(unstable, stable), plotting.poles(stable, unstable)):
        assert ax.get_xlim()[0] < -1.5


def test_synapse_layers_show_kernels_above_poles(learned):
    initial = DualExponentialSynapse(20, 8.0, 2.0)
    axes = plotting.synapse_layers([learned, initial], [initial, initial], ["one", "two"])
    assert [ax.get_title() for ax in axes[0]] == ["one", "two"]
    for column, synapse in zip(axes.T, (learned, initial), strict=True):
        kernels, plane = plt.subplots(1, 2)[1]
        plotting.synapse_kernels(synapse, initial, ax=kernels)
        plotting.poles(synapse, initial, ax=plane)
        for line, expected in zip(column[0].lines, kernels.lines, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), expected.get_xydata())
        assert points(column[1].collections[0]) == points(plane.collections[0])
    assert [ax.get_legend() is not None for ax in axes.flat] == [True, False, True, False]


def test_a_damage_sweep_shows_error_and_retrieval_over_the_strength():
    strengths, errors, retrievals = [0, 10, 20], [0.02, 0.05, 3.0], [1.0, 1.0, 0.8]
    rows = [
        {"damage": "x", "strength": strength, "error": error, "retrieval": retrieval}
        for strength, error, retrieval in zip(strengths, errors, retrievals, strict=True)
    ]
    axes = plotting.damage_sweeps(rows, trained={"x": 4})[:, 0]
    for ax, values in zip(axes, (errors, retrievals), strict=True):
        *_, trained, curve = ax.lines
        assert list(curve.get_xdata()) == strengths
        assert list(curve.get_ydata()) == values
        assert set(trained.get_xdata()) == {4}
    assert set(axes[0].lines[0].get_ydata()) == {1.0}
    assert [ax.get_ylabel() for ax in axes] == ["error / target's power", "retrieval"]
    assert axes[1].get_xlabel() == "x"
    assert axes[0].get_yscale() == "log"
    assert texts(axes[0]) == ["silence", "in training"]
    axes[0].figure.canvas.draw()
    assert {"10%", "100%"} <= {label.get_text() for label in axes[0].get_yticklabels()}


def test_damage_sweeps_have_a_column_for_each_kind():
    rows = [
        {"damage": kind, "strength": strength, "error": error, "retrieval": 1 - error}
        for kind, strength, error in (
            ("rows_removed", 0, 0.1),
            ("rows_removed", 9, 0.4),
            ("x", 1, 0.2),
        )
    ]
    axes = plotting.damage_sweeps(rows, {"x": 3, "y": 4})
    curves = [[ax.lines[-1].get_xydata().tolist() for ax in row] for row in axes]
    assert curves[0] == [[[0, 0.1], [9, 0.4]], [[1, 0.2]]]
    assert curves[1] == [[[0, 0.9], [9, 0.6]], [[1, 0.8]]]
    assert [ax.get_xlabel() for ax in axes[1]] == [DAMAGE_KINDS["rows_removed"].label, "x"]
    assert [len(ax.lines) for ax in axes[1]] == [1, 2]  # training showed "x" alone
    others = [{**row, "error": 0.5} for row in rows[:2]]
    compared = plotting.damage_sweeps(rows, others=others)
    assert compared.shape == (2, 2)
    assert compared[0, 0].lines[0].get_xydata().tolist() == [[0, 0.5], [9, 0.5]]
    assert compared[1, 0].lines[0].get_xydata().tolist() == [[0, 0.9], [9, 0.6]]
    assert compared[0, 0].lines[-1].get_xydata().tolist() == [[0, 0.1], [9, 0.4]]


def test_firing_rates_are_bars_with_the_first_layer_at_the_top():
    ax = plotting.firing_rates({"2": 0.01, "5": 0.0304})
    assert [bar.get_width() for bar in ax.patches] == [0.01, 0.0304]
    assert [float(number.get_text()) for number in ax.texts] == [0.01, 0.0304]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["2", "5"]
    assert ax.yaxis.get_inverted()
    assert ax.get_xlabel() == "spikes per neuron and time step"
    _, given = plt.subplots()
    assert plotting.firing_rates({"2": 0.01}, given) is given


# any tensor


CONVERSIONS = [
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.double,
    torch.Tensor.requires_grad_,
]


@pytest.mark.parametrize("converted", CONVERSIONS)
def test_tensors_of_any_precision_are_drawn(converted, spikes):
    # multiples of 1/8 below 4, which every precision holds
    membrane, reset = spikes.cumsum(0).remainder(4), spikes.cumsum(1).remainder(4) / 8
    shown = converted(spikes.clone())
    for ax in (plotting.raster(shown), *plotting.reconstructions(*[shown[:, None]] * 3, ["a"])[0]):
        assert points(ax.collections[0]) == points_of(spikes)
    traces = (converted(trace.clone()) for trace in (membrane, reset))
    (ax,) = plotting.membranes(shown, *traces, [3])
    v, r, _, ticks = ax.lines
    np.testing.assert_array_equal(v.get_ydata(), membrane[:, 3])
    np.testing.assert_array_equal(r.get_ydata(), reset[:, 3])
    assert list(ticks.get_xdata()) == spikes[:, 3].nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_synapses_of_any_precision_are_drawn(learned, dtype):
    rounded = learned.to(dtype)
    kernels, plane = (column[0] for column in plotting.synapse_layers([rounded], [rounded], ["a"]))
    assert_shows_responses(kernels, rounded, steps=50)
    assert len(plane.collections[0].get_offsets()) == 40
    assert rounded.alpha.dtype == dtype


def test_a_monitor_records_nothing_of_a_synapse_that_is_drawn(learned):
    monitor = Monitor(torch.nn.Sequential(learned))
    with pytest.warns(RuntimeWarning, match="nothing was seen"), monitor:
        plotting.synapse_kernels(learned, learned)
    assert not monitor.records


def test_an_impulse_response_that_overflows_is_refused(learned):
    unstable = LowPassSynapse(20, 4.0)
    with torch.no_grad():
        unstable.alpha.fill_(1.1)
    plotting.synapse_kernels(unstable, learned, 100)
    for pair in ((unstable, learned), (learned, unstable)):
        with pytest.raises(
            ValueError, match="response of a filter is not finite within 2000 steps"
        ):
            plotting.synapse_kernels(*pair, 2000)


# nothing to draw


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_rasters_without_steps_or_trains_are_empty_axes(shape):
    empty = torch.zeros(shape)
    ax = plotting.raster(empty)
    for panel in (ax, *plotting.reconstructions(*[empty[:, None]] * 3, ["a"])[0]):
        assert len(panel.collections[0].get_offsets()) == 0
        assert panel.get_xlim() == (-0.5, max(shape[0], 1) - 0.5)
        assert panel.get_ylim() == (max(shape[1], 1) - 0.5, -0.5)
    ax.figure.canvas.draw()


def test_axes_without_values_are_drawn_empty():
    empty = torch.zeros(0, 3)
    for axes in (
        plotting.membranes(empty, empty, empty, [1]),
        [plotting.firing_rates({})],
        [plotting.poles(LowPassSynapse(0, 4.0), LowPassSynapse(0, 4.0))],
    ):
        axes[0].figure.canvas.draw()


def test_spikes_and_potentials_may_be_arrays(spikes):
    reversed_ = np.broadcast_to(spikes.numpy(), spikes.shape)[::-1]  # read-only, from the end
    for array, expected in ((spikes.numpy(), spikes), (reversed_, spikes.flip(0))):
        ax = plotting.raster(array)
        assert points(ax.collections[0]) == points_of(expected)
    assert len(plotting.membranes(*[spikes.numpy()] * 3, [0])) == 1


def test_a_single_raster_takes_a_single_panel(spikes):
    axes = plotting.rasters([spikes], ["a"])
    assert len(axes[0].figure.axes) == 1
    _, given = plt.subplots()
    assert plotting.raster(spikes, given) is given


def test_the_lowest_raster_of_every_column_has_the_times(spikes):
    axes = plotting.rasters([spikes] * 5, "abcde", columns=3)
    axes[0].figure.canvas.draw()
    labelled = [any(tick.label1.get_visible() for tick in ax.xaxis.majorTicks) for ax in axes]
    assert labelled == [False, False, True, True, True]


def completion(*shapes, frames=4):
    return plotting.completion(*map(torch.zeros, shapes), frames)


REFUSED = [  # what is drawn, and the words
    (lambda: plotting.rasters([], []), "nothing to draw"),
    (lambda: plotting.reconstructions(*[torch.zeros(5, 0, 3)] * 3, []), "nothing to draw"),
    (lambda: plotting.membranes(*[torch.zeros(5, 3)] * 3, []), "nothing to draw"),
    (lambda: plotting.synapse_layers([], [], []), "nothing to draw"),
    (lambda: plotting.damage_sweeps([]), "nothing to draw"),
    (lambda: plotting.synapse_kernels(*[LowPassSynapse(0, 4.0)] * 2), "nothing to draw"),
    (lambda: plotting.synapse_kernels(*[LowPassSynapse(2, 4.0)] * 2, steps=0), "nothing to draw"),
    (lambda: plotting.reconstructions(*[torch.zeros(5, 2, 3)] * 3, ["a"]),
     "there are 1 names for 2 samples"),
    (lambda: plotting.rasters([torch.zeros(5, 3)] * 3, ["a", "b"]), "2 titles for 3 samples"),
    (lambda: plotting.membranes(*[torch.zeros(5, 2, 3)] * 3, [0]), r"\(5, 2, 3\), expected \(T, N"),
    (lambda: completion(*[(5, 3)] * 3), r"shape \(5, 3\), expected \(T, B, N\)"),
    (lambda: completion((5, 2, 3), (5, 1, 3), (5, 2, 3)), "expected the same"),
    (lambda: completion((5, 2, 3), (6, 2, 3), (5, 2, 3)), "expected the same"),
    (lambda: completion(*[(5, 2, 3)] * 3, frames=0), "frames is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("draw", "words"), REFUSED)
def test_figures_of_nothing_and_of_parts_that_do_not_fit_are_refused(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()
    assert not plt.get_fignums()
