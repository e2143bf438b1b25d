"""The ONNX graph, run by ONNX Runtime alone, against PyTorch."""

import errno
import json
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from leaving_pytorch import (
    COMING_BACK,
    NETWORKS,
    maps,
    network,
    passed_on,
    pooled_spikes,
    spikes,
    with_readout,
)
from prepared import NAMES, PREPARED, SERIES, Prepared
from torch import nn

from snn_lib import Cell, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.preparation import PixelPreparation, RecordingPreparation, SeriesPreparation
from snn_lib.errors import RunError
from snn_lib.inference import compiled, to_c, to_onnx
from snn_lib.readout import READOUTS, Mean

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def session(path):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(graph, x):
    """All steps of ``(T, B, *features)``, each state fed back."""
    _, *states = graph.get_inputs()
    state = {s.name: np.zeros((x.shape[1], *s.shape[1:]), x.dtype) for s in states}
    outputs = []
    for step in x:
        y, *new = graph.run(None, {"x": step, **state})
        state = dict(zip(state, new, strict=True))
        outputs.append(y)
    return np.stack(outputs)


@pytest.mark.parametrize("name", [*NETWORKS, *COMING_BACK])
def test_the_graph_computes_what_pytorch_computes(name, tmp_path):
    model, features = network(name)
    model.float()  # ONNX Runtime has no convolution in float64
    x = torch.cat([spikes(30, *features) for _ in range(3)], 1).float()
    to_onnx(model, tmp_path / "network.onnx", features)
    output = run(session(tmp_path / "network.onnx"), x.numpy())
    with torch.no_grad():
        target = model(x)[0].numpy()
    assert output.shape == target.shape
    np.testing.assert_allclose(output, target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", READOUTS)
def test_a_readout_answers_at_every_step_from_the_steps_so_far(kind, tmp_path):
    model, layers = with_readout(kind)
    x = torch.cat([spikes(20, 4), spikes(20, 4)], 1) - 0.3
    to_onnx(model, tmp_path / "network.onnx")
    output = run(session(tmp_path / "network.onnx"), x.numpy())
    with torch.no_grad():
        values = layers(x)[0]
        target = [READOUTS[kind]()(values[: t + 1]).numpy() for t in range(len(x))]
    assert (np.diff(values.numpy(), axis=0) < 0).any()  # the last is not the largest
    np.testing.assert_allclose(output, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7])
def test_average_pooling_of_spikes_has_the_bits_of_pytorch(size, tmp_path):
    model, current = pooled_spikes(size)
    for part in (model, model[:2]):
        to_onnx(part, tmp_path / "network.onnx", current.shape[2:])
        output = run(session(tmp_path / "network.onnx"), current.numpy())
        np.testing.assert_array_equal(output, part(current)[0].numpy())


def test_pooling_windows_outside_the_map_are_refused(tmp_path):
    model, features = maps(nn.MaxPool2d(2, padding=1, dilation=8))
    model, x = model.eval(), torch.rand(1, 1, *features)
    with torch.no_grad():
        assert model(x)[0].isinf().any()
    with pytest.raises(ValueError, match=r"1.module has windows that hold nothing of the map"):
        to_onnx(model, tmp_path / "network.onnx", features)


def test_the_mean_of_more_steps_than_float32_can_count_is_exact(tmp_path):
    to_onnx(passed_on(Mean()), tmp_path / "network.onnx")
    graph, done = session(tmp_path / "network.onnx"), 2**24
    names = [value.name for value in graph.get_inputs()]
    state = {name: np.zeros((1, 1), np.float32) for name in names[1:]}
    state["1.sum"][:] = state["1.steps"][:] = done  # as after so many steps, each of which was 1
    for _ in range(1001):
        y, *new = graph.run(None, {"x": np.full((1, 1), 5001, np.float32), **state})
        state = dict(zip(state, new, strict=True))
    assert y == pytest.approx((done + 1001 * 5001) / (done + 1001), rel=2**-22)
    assert state["1.steps"] == done + 1000  # the nearest number that float32 has, and the rest
    assert state["1.steps.rest"] == 1


def test_a_sum_that_overflows_is_infinite_from_then_on_as_in_pytorch(tmp_path):
    to_onnx(passed_on(Mean()), tmp_path / "network.onnx")
    x = np.float32([3e38, 3e38, 1, 1])[:, None, None]
    output = run(session(tmp_path / "network.onnx"), x)
    np.testing.assert_array_equal(output, [[[x[0, 0, 0]]], *[[[np.inf]]] * 3])


class Forgetting(Cell):
    """What is remembered is a number or a coefficient; so is one of two outputs."""

    states = ("level", "other")
    coefficients = ("own",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return torch.where(state[0] > 0.5, state[1] + x, x), (x * 0 + 1, 2 * coefficients[0])


class Constant(Cell):
    """Its output is its coefficient."""

    coefficients = ("own",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return 2 * coefficients[0], ()


class Rounding(Cell):
    """Its state is kept in bfloat16."""

    states = ("kept",)
    coefficients = ("own",)

    @staticmethod
    def step(x, state, coefficients, fire):
        kept = (coefficients[0] * state[0] + x).to(torch.bfloat16).to(x.dtype)
        return kept, (kept,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_may_round_to_bfloat16_but_c_does_not(dtype, tmp_path):
    model = Sequential(Rounding(4, own=torch.rand(4))).to(dtype)
    x = torch.randn(50, 3, 4, dtype=dtype)
    to_onnx(model, tmp_path / "network.onnx", [4])
    with torch.no_grad():
        target = model(x)[0].numpy()
    np.testing.assert_array_equal(run(session(tmp_path / "network.onnx"), x.numpy()), target)
    np.testing.assert_array_equal(compiled(model, [4]).run(x[:, 0].numpy()), target[:, 0])
    with pytest.raises(ValueError, match="layer 0 rounds to bfloat16, which C does not have"):
        to_c(model, tmp_path / "network.c", [4])


@pytest.mark.parametrize("kind", [Forgetting, Constant])
def test_what_is_the_same_in_all_sequences_has_their_shape(kind, tmp_path):
    model = Sequential(nn.Linear(3, 4), kind(4, own=torch.randn(4)), nn.Linear(4, 2))
    x = torch.randn(6, 5, 3)
    to_onnx(model, tmp_path / "network.onnx")
    with torch.no_grad():
        target = model(x)[0].numpy()
    output = run(session(tmp_path / "network.onnx"), x.numpy())
    np.testing.assert_allclose(output, target, atol=1e-5)
    stream = compiled(model)
    np.testing.assert_allclose(stream.run(x[:, 0].numpy()), target[:, 0], atol=1e-5)


def test_a_readout_of_one_s_own_may_make_fewer_classes_than_outputs(tmp_path):
    model, classes = Sequential(nn.Linear(4, 6)), ["no", "yes"]
    model.readout = "last"
    with pytest.raises(ValueError, match="2 names of classes and 6 outputs"):
        to_onnx(model, tmp_path / "network.onnx", classes=classes)
    with pytest.raises(ValueError, match="classes is 'abcdef', expected a list of names"):
        to_onnx(model, tmp_path / "network.onnx", classes="abcdef")
    model.readout = None
    for names in (classes, np.array(classes)):
        to_onnx(model, tmp_path / "network.onnx", classes=[*names])
        about = session(tmp_path / "network.onnx").get_modelmeta().custom_metadata_map
        assert json.loads(about["classes"]) == classes
    to_onnx(model, tmp_path / "network.onnx", classes=[7, 8])
    about = session(tmp_path / "network.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["7", "8"]


def test_inputs_outputs_classes_and_the_step_are_named_in_the_file(tmp_path):
    model = Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 2), SpikingNeuron(2, 3.0))
    path = tmp_path / "network.onnx"
    to_onnx(model, path, classes=["cat", "dog"], step="25 ms")
    graph = session(path)
    shapes = {value.name: value.shape for value in graph.get_inputs()}
    assert shapes == {"x": ["batch", 4], "0.past_output_0": ["batch", 4], "2.reset": ["batch", 2]}
    outputs = [value.name for value in graph.get_outputs()]
    assert outputs == ["y", "0.past_output_0.next", "2.reset.next"]
    metadata = graph.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert (metadata["step"], metadata["readout"]) == ("25 ms", "")
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert all(onnx.defs.has(operator) for operator in operators)  # standard ones
    assert all(node.domain == "" for node in onnx.load(path).graph.node)


def test_a_layer_that_only_pytorch_runs_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "network.onnx"
    with pytest.raises(ValueError, match=r"1 \(GRU\)"):
        to_onnx(Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), path)
    assert not path.exists()


def test_a_full_disk_leaves_the_file_that_was_there(monkeypatch, tmp_path):
    path = tmp_path / "network.onnx"
    to_onnx(Sequential(nn.Linear(4, 4)), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"network\.onnx: No space left"):
        to_onnx(Sequential(nn.Linear(4, 5)), path)
    assert path.read_bytes() == before


def test_without_the_package_onnx_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        to_onnx(Sequential(nn.Linear(4, 4)), tmp_path / "network.onnx")


@pytest.mark.parametrize(
    ("preparation", "raw", "steps"), PREPARED, ids=lambda value: type(value).__name__
)
def test_the_graph_prepares_its_input_as_pytorch_does(preparation, raw, steps, tmp_path):
    model = Prepared(preparation).eval()
    to_onnx(model, tmp_path / "network.onnx")
    graph = session(tmp_path / "network.onnx")
    output = run(graph, steps(raw).float().numpy())
    with torch.no_grad():
        target = model(preparation(raw).x.float())[0]
    np.testing.assert_allclose(output, target, rtol=1e-4, atol=1e-5)
    about = graph.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(NAMES)
    assert about["step"] == preparation.step
    assert about["readout"] == "last"
    if isinstance(preparation, PixelPreparation):
        assert json.loads(about["order"]) == preparation.order.tolist()


@pytest.mark.parametrize(
    "preparation",
    [
        SeriesPreparation(block=2, encoding="current", **SERIES),
        SeriesPreparation(block=1, encoding="population", **SERIES),
        SeriesPreparation(block=1, encoding="delta", **SERIES),
        *(
            RecordingPreparation(5, 30.0, sensor=34, values=values, order=order)
            for values in ("clipped", "counted")
            for order in ("summed", "reversed")
        ),
    ],
    ids=[
        *("blocks", "population", "changes"),
        *("mean", "backwards", "mean of counts", "counts backwards"),
    ],
)
def test_a_preparation_that_needs_more_than_a_step_is_refused(preparation, tmp_path):
    with pytest.raises(ValueError, match="Preparation of this network, as it is set, is"):
        to_onnx(Prepared(preparation), tmp_path / "network.onnx")


def far_from_0(deviations, dtype=torch.float32, **others):
    """A network of series whose second channel lies so many deviations below 0."""
    mean = torch.tensor([3.0, -deviations * 0.5], dtype=torch.float64)
    values = {**SERIES, "mean": mean, **others}
    return Prepared(SeriesPreparation(block=1, encoding="current", **values)).to(dtype)


@pytest.mark.parametrize(("write", "name"), [(to_onnx, "network.onnx"), (to_c, "network.c")])
def test_a_channel_that_lies_too_far_from_0_for_the_numbers_is_warned_of(write, name, tmp_path):
    """In float32 numbers at 1e7 deviations are a deviation apart, at 1e6 an eighth of one."""
    with pytest.warns(
        UserWarning, match="channel 1 of the series lies around -5e.06, where float32"
    ):
        write(far_from_0(1e7), tmp_path / name)
    with pytest.warns(UserWarning, match=r"tell apart what differs by 0.005.*network.double\(\)$"):
        write(far_from_0(1e5, change=torch.tensor([0.7, 0.01])), tmp_path / name)
    slope = {"change": torch.tensor([0.7, math.inf])}
    for change in (slope, {"change": torch.ones(2)}):  # and of what stays within each series
        with pytest.warns(UserWarning, match="lies around -5e.06.* differs by 0.5:"):
            write(far_from_0(1e7, **change), tmp_path / name)
    with pytest.warns(UserWarning, match="where float64 .* train again$"):
        write(far_from_0(1e16, torch.float64), tmp_path / name)
    still = {"deviation": torch.tensor([2.0, 1.0], dtype=torch.float64), "change": torch.ones(2)}
    with warnings.catch_warnings(action="error"):
        write(far_from_0(1e6, **slope), tmp_path / name)
        write(far_from_0(1e7, torch.float64), tmp_path / name)
        write(far_from_0(1e9, **still), tmp_path / name)
