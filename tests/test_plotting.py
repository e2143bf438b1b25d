import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import signal

from snn_lib import DualExponentialSynapse, LowPassSynapse, plotting


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


def test_raster_has_a_dot_for_every_spike_with_train_0_at_the_top(spikes):
    ax = plotting.raster(spikes, title="S")
    assert points(ax.collections[0]) == {tuple(map(float, s)) for s in spikes.nonzero().tolist()}
    assert ax.get_xlim() == (-0.5, 39.5)
    assert ax.get_ylim() == (29.5, -0.5)
    labels = ax.get_xlabel(), ax.get_ylabel(), ax.get_title()
    assert labels == ("time step", "train index", "S")
    ax.figure.canvas.draw()


def test_raster_of_silence_and_on_given_axes():
    _, ax = plt.subplots()
    assert plotting.raster(torch.zeros(10, 5), ax) is ax
    ax.figure.canvas.draw()


def test_reconstruction_shows_three_rasters(spikes):
    target = spikes.roll(4, 0)
    axes = plotting.reconstruction(spikes, spikes.flip(0), target)
    assert [ax.get_title() for ax in axes] == ["damaged input", "network's output", "target"]
    for ax, shown in zip(axes, (spikes, spikes.flip(0), target), strict=True):
        assert len(ax.collections[0].get_offsets()) == shown.sum()
    assert axes[0].get_ylabel() == "train index"
    _, given = plt.subplots(1, 3)
    assert list(plotting.reconstruction(spikes, spikes, spikes, given)) == list(given)


def test_rasters_in_reading_order(spikes):
    samples = [spikes, spikes[:, :7], spikes[:20]]
    axes = plotting.rasters(samples, ["a", "b", "c"], columns=2)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    for ax, sample in zip(axes, samples, strict=True):
        assert points(ax.collections[0]) == {
            tuple(map(float, spike)) for spike in sample.nonzero().tolist()
        }
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
    for b, row in enumerate(axes):
        for ax, shown in zip(row, (damaged, output, target), strict=True):
            assert points(ax.collections[0]) == {
                tuple(map(float, spike)) for spike in shown[:, b].nonzero().tolist()
            }


def test_neuron_traces(spikes):
    membrane, reset = torch.randn(40, 30), torch.rand(40, 30)
    axes = plotting.neuron_traces(spikes, membrane, reset, [3, 17])
    assert [ax.get_ylabel() for ax in axes] == ["neuron 3", "neuron 17"]
    for ax, neuron in zip(axes, [3, 17], strict=True):
        v, r, threshold, ticks = ax.lines
        np.testing.assert_allclose(v.get_ydata(), membrane[:, neuron])
        np.testing.assert_allclose(r.get_ydata(), reset[:, neuron])
        assert set(threshold.get_ydata()) == {1.0}
        assert list(ticks.get_xdata()) == spikes[:, neuron].nonzero().flatten().tolist()
    assert axes[-1].get_xlabel() == "time step"
    assert texts(axes[0]) == ["membrane potential V", "reset R", "threshold", "spike S"]
    _, given = plt.subplots(1, 1, squeeze=False)
    assert plotting.neuron_traces(spikes, membrane, reset, [0], given[0])[0] is given[0, 0]


def test_synapse_kernels_are_impulse_responses(learned):
    initial = DualExponentialSynapse(20, 8.0, 2.0)
    ax = plotting.synapse_kernels(learned, initial, steps=30)
    impulse = np.eye(1, 30)[0]
    for channel in range(20):
        alpha, beta = learned.alpha[:, channel].tolist(), learned.beta[:, channel].tolist()
        expected = signal.lfilter(beta, [1, *(-a for a in alpha)], impulse)
        np.testing.assert_allclose(ax.lines[channel].get_ydata(), expected, rtol=1e-4, atol=1e-5)
    k = np.arange(30)
    shown = {line.get_label(): line.get_ydata() for line in ax.lines}
    expected = np.exp(-(k + 1) / 8) - np.exp(-(k + 1) / 2)
    np.testing.assert_allclose(shown["initial"], expected, rtol=1e-4, atol=1e-5)
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


def test_synapse_kernels_of_a_layer_with_a_feature_shape():
    synapse = LowPassSynapse((2, 3), 4.0)
    ax = plotting.synapse_kernels(synapse, synapse, steps=5)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.exp(-np.arange(5) / 4), rtol=1e-5)


def test_poles_in_the_unit_circle(learned):
    initial = DualExponentialSynapse(20, 8.0, 2.0)
    ax = plotting.poles(learned, initial)
    shown, start = (np.asarray(collection.get_offsets()) for collection in ax.collections)
    alpha = learned.alpha.detach().double().numpy()
    roots = np.concatenate([np.roots([1, -a1, -a2]) for a1, a2 in alpha.T])
    expected = sorted((round(z.real, 4), round(abs(z.imag), 4)) for z in roots)
    assert sorted((round(x, 4), round(abs(y), 4)) for x, y in shown) == expected
    np.testing.assert_allclose(np.unique(start[:, 0].round(5)), np.exp([-1 / 2, -1 / 8]), atol=1e-4)
    circle = ax.lines[0].get_xydata()
    np.testing.assert_allclose(np.linalg.norm(circle, axis=1), 1.0)
    assert ax.get_aspect() == 1.0


def test_poles_outside_the_circle_are_still_in_view():
    synapse = LowPassSynapse(1, 4.0)
    with torch.no_grad():
        synapse.alpha.fill_(-1.5)
    ax = plotting.poles(synapse, synapse)
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


def test_damage_sweep():
    strengths, errors, retrievals = [0, 10, 20], [0.02, 0.05, 3.0], [1.0, 1.0, 0.8]
    axes = plotting.damage_sweep(strengths, errors, retrievals, "rows removed", trained=4)
    for ax, values in zip(axes, (errors, retrievals), strict=True):
        *_, trained, curve = ax.lines
        assert list(curve.get_xdata()) == strengths
        assert list(curve.get_ydata()) == values
        assert set(trained.get_xdata()) == {4}
    assert set(axes[0].lines[0].get_ydata()) == {1.0}
    assert [ax.get_ylabel() for ax in axes] == ["error / target's power", "retrieval"]
    assert axes[1].get_xlabel() == "rows removed"
    assert axes[0].get_yscale() == "log"
    axes[0].figure.canvas.draw()
    assert {"10%", "100%"} <= {label.get_text() for label in axes[0].get_yticklabels()}
    _, grid = plt.subplots(2, 4)
    given = plotting.damage_sweep(strengths, errors, retrievals, "x", axes=grid[:, 2])
    assert list(given) == list(grid[:, 2])


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
    assert [ax.get_xlabel() for ax in axes[1]] == ["rows removed", "x"]
    assert [len(ax.lines) for ax in axes[1]] == [1, 2]  # training showed "x" alone
    assert plotting.damage_sweeps(rows).shape == (2, 2)


def test_firing_rates_are_bars_with_the_first_layer_at_the_top():
    ax = plotting.firing_rates({"2": 0.01, "5": 0.03})
    assert [bar.get_width() for bar in ax.patches] == [0.01, 0.03]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["2", "5"]
    assert ax.yaxis.get_inverted()
    assert ax.get_xlabel() == "spikes per neuron and time step"
    _, given = plt.subplots()
    assert plotting.firing_rates({"2": 0.01}, given) is given
