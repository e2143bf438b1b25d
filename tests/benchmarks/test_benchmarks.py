"""The other benchmarks run, in a tiny setting, and write what they say."""

import argparse
import csv
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from recorded import qtdb_files, some_beats
from running import ROOT, YAML, run_script, tiny, train
from torch import nn

from snn_conv import SNN, ConvConfig
from snn_lib.data.simulated_events import CameraSettings, simulated_recordings
from snn_lib.tasks.digits import DigitClassification

BENCHMARKS = ROOT / "benchmarks"


def test_the_interface_of_2020_is_compared_with_the_native_one(tmp_path, run_smoke):
    rows, printed = run_smoke("interface_2020", tmp_path, chart=False)
    names = ["native API", "2020 interface", "per-step loop"]
    assert [row["variant"] for row in rows] == names * 2
    assert all(float(row["training_ms"]) > 0 and row["variant"] in printed for row in rows)
    assert all(row["training/native"] == "1.0" for row in rows if row["variant"] == names[0])


def test_step_profile_counts_the_bytes_that_filters_and_neurons_move(tmp_path, run_smoke):
    rows, _ = run_smoke("step_profile", tmp_path, chart=False)
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"] * 3
    for row in rows:
        assert float(row["copy"]) > 0
        assert 0 < float(row["cells"]) < float(row["step"])


def test_firing_rates_measures_every_rate_beside_dense_networks(tmp_path, run_smoke):
    rows, printed = run_smoke("firing_rates", tmp_path)
    found = [(row["rate"], row["precision"]) for row in rows]
    assert found == [(rate, p) for p in ("float32", "bfloat16") for rate in ("0.35", "")]
    assert all(float(row["training_ms"]) > 0 for row in rows)
    assert "rate 35%" in printed


def test_streaming_compares_a_step_of_every_network(tmp_path, run_smoke):
    pytest.importorskip("onnxruntime")
    rows, printed = run_smoke("streaming", tmp_path)
    assert {row["network"] for row in rows} == {"sequential_mnist", "snn_mlp_1", "event_vision"}
    for row in rows:
        assert row["variant"] in printed
        assert float(row["step_q25"]) <= float(row["step_us"]) <= float(row["step_q75"])
    variants = [row["variant"] for row in rows if row["network"] == "sequential_mnist"]
    assert {"SNN-IIR", "compiled", "ONNX Runtime", "two nn.GRUCells"} <= set(variants)


def test_the_written_out_step_is_that_of_this_library():
    pytest.importorskip("onnxruntime")
    from pretrained import load
    from streaming import NETWORKS, Written

    chosen = argparse.Namespace(smoke=True, device="cpu")
    for name, sizes in NETWORKS.items():
        if not sizes:
            continue
        model = load(name, chosen).model.double().eval()
        written, state, state_written = Written(model), None, None
        for step in torch.rand(200, 1, 2, sizes[0], dtype=torch.float64):  # one moment at least
            with torch.no_grad():
                output, state = model(step, state)
                again, state_written = written(step, state_written)
            torch.testing.assert_close(again, output, rtol=1e-9, atol=1e-9)


def test_a_neuron_of_one_s_own_is_timed_beside_spiking_neuron():
    values = "tau_m=4", "tau_adaptation=20", "adaptation_strength=0.1"
    script = BENCHMARKS / "own_neuron.py"
    finished = run_script(script, "snn_lib.AdaptiveNeuron", *values, "--smoke", "--threads", 1)
    kinds = re.findall(r"^(\w+): [\d.]+ ms, [\d.]+ \([\d.]+ to [\d.]+\) of", finished.out, re.M)
    assert kinds == ["training", "inference"]


def test_early_inference_compares_networks_that_compute_less(tmp_path, run_smoke):
    pytest.importorskip("onnxruntime")
    rows, printed = run_smoke("early_inference", tmp_path, chart=False)
    single = {row["variant"] for row in rows if row["batch"] == "1"}
    latency = {f"snn_mlp_1_latency_behind, compiled{end}" for end in ("", ", until 2 ahead")}
    assert {*latency, "snn_mlp_1_latency, PyTorch", "dense network, ONNX Runtime"} <= single
    assert all(row["variant"] in printed and float(row["image_us"]) > 0 for row in rows)


def test_integers_recognise_what_floats_do_and_c_computes_the_same_bits(tmp_path, run_smoke):
    pytest.importorskip("onnxruntime")  # which the models of the other benchmarks need
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    ((row,), _) = run_smoke("integers", tmp_path, chart=False)
    assert float(row["accuracy"]) == float(row["accuracy_c"]) == 1.0  # of ten images
    assert float(row["accuracy_c_8_bit"]) >= 0.9
    assert {row[f"same_c{end}"] for end in ("", "_8_bit", "_4_bit")} == {"10"}


def test_instructions_are_counted_on_an_emulated_microcontroller(tmp_path, run_smoke):
    pytest.importorskip("onnxruntime")
    if missing := [t for t in ("arm-none-eabi-gcc", "qemu-system-arm") if not shutil.which(t)]:
        pytest.skip(f"no {', '.join(missing)}")
    rows, _ = run_smoke("microcontroller", tmp_path, chart=False)
    assert [row["arithmetic"] for row in rows] == ["float", "8 bits", "4 bits"]
    for row in rows:
        assert float(row["steps_until_clear"]) < 12
        assert 1e5 < float(row["instructions_until_clear"]) < float(row["instructions"])
    flash = [int(row["flash"]) for row in rows]
    assert flash[0] > 3 * flash[1] > 5 * flash[2]


def test_eight_bit_quantises_linear_layers_and_convolutions(tmp_path, run_smoke):
    pytest.importorskip("onnxruntime")
    rows, _ = run_smoke("eight_bit", tmp_path, chart=False)
    assert [row["model"] for row in rows] == ["snn_mlp_1", "event_vision"]
    for row in rows:
        assert float(row["megabytes_8_bit"]) < 0.6 * float(row["megabytes"])
        assert int(row["changed_answers"]) <= 1  # of ten


def test_the_compiled_network_and_the_onnx_graph_agree_with_every_pretrained_model(
    tmp_path, run_smoke
):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("aeon")
    rows, _ = run_smoke("inference_agreement", tmp_path, chart=False)
    pretrained = {path.name for path in ROOT.glob("*checkpoint/pretrained_*")}
    models = {name.removeprefix("pretrained_") for name in pretrained if "." not in name}
    assert {row["model"] for row in rows} == models - {"ecg", "ecg_small"}  # not in the clone
    for row in rows:
        # A spike that is another's is one whose potential lies within rounding of the threshold.
        assert float(row["farthest_from_threshold"]) <= 1e-5
        assert float(row["output_error"]) <= 1e-4
        if not row["model"].startswith("associative"):
            assert row["samples"] == row["same_answer"] == row["same_answer_onnx"] == "10"


def test_accuracy_of_every_pretrained_network_after_each_step(tmp_path, run_smoke):
    rows, printed = run_smoke("accuracy", tmp_path)
    assert {row["model"] for row in rows} == {name for name in YAML if name.startswith("snn_")}
    for row in rows:
        assert row["model"] in printed
        encoding = re.search("poisson|latency", row["model"])
        assert row["encoding"] == (encoding[0] if encoding else "constant")
        others = {"snn_conv": 8, "snn_conv_poisson": 10, "snn_mlp_1_latency": 12}
        steps = others.get(row["model"].removesuffix("_behind"), 25)
        assert float(row["accuracy"]) == float(row[f"accuracy_{steps}"]) >= 0.9  # of ten images
        assert float(row["spikes_per_image"]) > 0


def test_long_memory_tells_the_accuracy_after_every_pixel(tmp_path, run_smoke):
    rows, printed = run_smoke("long_memory", tmp_path)
    assert [int(row["pixels"]) for row in rows if row["order"] == "permuted"] == [*range(1, 785)]
    assert float(rows[783]["accuracy"]) >= 0.8  # of ten images
    assert "sequential_mnist: " in printed


def test_recurrent_trains_a_gated_layer_of_as_many_parameters(tmp_path):
    few = ("training_size=64", "validation_size=16", "test_size=16")
    settings = [
        f"mnist_config.{setting}" for setting in (*few, "use_transform=false", "teachers=[]")
    ]
    settings += ["hyperparameters.epoch=1", "hyperparameters.length=28", f"runs_path={tmp_path}"]
    trained = run_script("benchmarks/recurrent.py", "gru", "--train", *settings)
    assert trained.code == 0, trained.err
    assert "sequential_mnist_gru: " in trained.out
    assert len(list(tmp_path.glob("sequential_mnist_gru/*/best"))) == 1


def test_operations_trains_short_runs_once_and_stops_early(tmp_path, run_smoke):
    rows, printed = run_smoke("operations", tmp_path, "--train")
    models = ["snn_mlp_1", "snn_mlp_1_poisson", "snn_mlp_1_latency"]
    models += [f"{model}_behind" for model in models]
    assert [row["model"] for row in rows[:6]] == models
    dense = rows[6:8]
    assert [row["model"] for row in dense] == ["dense network", "dense network, as sparing"]
    for row in dense:
        assert int(row["dense_operations"]) == 784 * 500 + 500 * 500 + 500 * 10
        assert 0 < int(row["multiply_accumulates"]) < int(row["dense_operations"]) / 2
        assert f"{row['model']}: " in printed
    # Of 510 + 500 neurons and their filters; each has two numbers.
    assert f"{2 * 4 * 4040 * 12:,.2f} bytes of states" in printed
    for row in rows[:6] + rows[8:]:
        assert row["model"] in printed
        early, all_steps = float(row["operations_lead_1"]), float(row["additions"])
        assert early <= all_steps + float(row["multiply_accumulates"]) + 1
        assert 1 <= float(row["steps_lead_1"]) <= float(row["steps_lead_6"]) <= float(row["steps"])
    again, _ = run_smoke("operations", tmp_path)
    assert again == rows


def test_capacity_compares_the_network_with_a_table_that_is_never_wrong(tmp_path, run_smoke):
    rows, printed = run_smoke("capacity", tmp_path, "--train")
    assert {row["answering"] for row in rows} == {"network", "table"}
    for row in rows:
        assert f"{row['answering']} of {row['patterns']} patterns, {row['damage']}: " in printed
        if row["answering"] == "table":
            assert float(row["error"]) < 0.05
            assert float(row["retrieval"]) == 1
    again, _ = run_smoke("capacity", tmp_path)
    assert again == rows


def test_a_smoke_run_overwrites_no_results(monkeypatch):
    from measuring import options

    for flags, published in (["--smoke"], False), ([], True):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
        assert (options("", "scaling").output.parent == BENCHMARKS / "results") is published


@pytest.fixture
def quick_rivals(monkeypatch):
    """aeon's classifiers, which check what they are given, and then answer with the first label.

    They would compile themselves for longer than all else here takes.
    """
    pytest.importorskip("aeon")
    from aeon.classification.convolution_based import MiniRocketClassifier
    from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier

    for kind in (MiniRocketClassifier, KNeighborsTimeSeriesClassifier):
        monkeypatch.setattr(kind, "_fit", lambda self, X, y: self)
        monkeypatch.setattr(kind, "_predict", lambda self, X: np.repeat(self.classes_[0], len(X)))


def test_archives_compares_every_method_and_goes_on_where_it_stopped(
    tmp_path, run_smoke, quick_rivals
):
    rows, printed = run_smoke("archives", tmp_path)
    assert {row["dataset"] for row in rows} == {"UnitTest"}
    found = {row["method"]: row for row in rows}
    assert len(found) == len(rows) == 7
    spiking = int(found["SNN-IIR"]["parameters"])
    for method, row in found.items():
        assert 0 <= float(row["accuracy"]) <= 1
        assert f"UnitTest, {method}, seed 0" in printed
        assert bool(row["spikes"]) == method.startswith("SNN-IIR")
        if method.startswith("nn."):
            assert 0.95 * spiking < int(row["parameters"]) <= spiking
    again, printed = run_smoke("archives", tmp_path)
    assert again == rows
    assert "seed 0" not in printed


class Given(Exception):
    """What an experiment would be made of."""


def given(function, *arguments, monkeypatch):
    """The function's settings and first weights, from where it makes its experiment."""

    def stop(build_model, task, config, initialise=None):
        raise Given(config, initialise)

    monkeypatch.setattr(sys.modules[function.__module__], "Experiment", stop)
    with pytest.raises(Given) as caught:
        function(*arguments)
    return caught.value.args


def test_every_row_of_archives_and_what_helps_is_trained_with_its_seed(tmp_path, monkeypatch):
    import archives
    import what_helps

    from ecg import initialise

    for seed in (0, 3):
        for method, encoding in (("SNN-IIR", "current"), ("SNN-IIR, delta", "delta")):
            row = "GunPoint", method, seed, False
            config, first = given(archives.trained, *row, monkeypatch=monkeypatch)
            assert (config.dataset, config.seed) == ("GunPoint", seed)
            assert config.hyperparameters.encoding == encoding
            assert first is archives.initialise
        row = "recurrence", seed, tmp_path, str(tmp_path), 7
        config, first = given(what_helps.trained, *row, monkeypatch=monkeypatch)
        assert (config.seed, config.hyperparameters.epoch) == (seed, 7)
        assert (config.hyperparameters.neurons, first) == ([24], initialise)


def test_the_best_epoch_of_archives_is_that_of_the_training_sequences(tmp_path):
    from archives import Whole

    from snn_lib.tasks.time_series import TimeSeriesConfig

    series, labels = np.random.default_rng(0).normal(size=(30, 5, 2)), [0, 1] * 10
    parts = {"x": series[:20], "y": labels, "x_test": series[20:], "y_test": labels[:10]}
    np.savez(tmp_path / "mine.npz", **parts)
    config = TimeSeriesConfig(dataset=str(tmp_path / "mine.npz"))
    found = Whole().read(config)
    assert {part: len(x) for part, (x, _) in found.items()} == {
        "train": 20,
        "validation": 20,
        "test": 10,
    }
    assert found["validation"] is found["train"]


def test_early_series_compares_a_stream_with_fits_of_beginnings(tmp_path, run_smoke, quick_rivals):
    rows, printed = run_smoke("early_series", tmp_path)
    assert [row["method"][:3] for row in rows] == ["SNN"] * 10 + ["Min"] * 10
    for row in rows:
        assert row["method"] in printed
        assert 0 <= float(row["accuracy"]) <= 1
        assert bool(row["sure"]) == row["method"].startswith("SNN")


def test_recordings_of_two_cameras_are_described_read_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("snn_lib.data.simulated_events.BLOCK", 20)
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    camera = CameraSettings(noise=5.0)
    simulated_recordings(camera, tmp_path, train=True, count=20)
    output = tmp_path / "both"
    folders = camera.folder(tmp_path), "--dataset_path", tmp_path, "--output", output
    finished = run_script(BENCHMARKS / "event_recordings.py", *folders, "--first", 11)
    assert finished.code == 0, finished.err
    with output.with_suffix(".csv").open(newline="") as file:
        noisy, clean = csv.DictReader(file)
    assert float(noisy["noise_hz"]) == pytest.approx(5.0, rel=0.1)
    assert float(clean["noise_hz"]) < 1.0
    more = float(noisy["events"]) - float(clean["events"])
    assert more == pytest.approx(0.3 * 34**2 * 4.7, rel=0.05)
    assert float(clean["event_vision_behind"]) >= 0.9  # of ten
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_helps_goes_on_where_it_was_stopped_with_networks_of_one_size(tmp_path):
    folder, output = qtdb_files(tmp_path / "qtdb", *some_beats()), tmp_path / "helps"
    path = output.with_suffix(".csv")
    command = BENCHMARKS / "what_helps.py", folder, "--output", output, "--epochs", 1
    assert run_script(*command).code == 0
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, *others[2:]]) + "\n")
    again = run_script(*command)
    assert again.out.count("best epoch 1") == 2
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [",".join(row.values()) for row in rows] == [*others[2:], *others[:2]]
    assert all(1_840 <= int(row["parameters"]) <= 1_854 for row in rows)
    assert again.out.count(" % of the steps") == 6
    assert f"of {len(others)} runs are in {path} and not done again" in again.out


def test_the_dense_network_beside_snn_conv_trains_as_it_does(tmp_path):
    from dense_conv import Dense

    overrides = ("hyperparameters.channels=[4,8,8]", "hyperparameters.batch_size=32")
    options = {"model": Dense, "task": DigitClassification(ConvConfig)}
    script = BENCHMARKS / "dense_conv.py"
    trained = train(*tiny(tmp_path, *overrides), **options, script=script)
    assert "epoch 2/2" in trained.out
    config = ConvConfig(name="dense")
    config.hyperparameters.voters = 1
    dense, spiking = Dense(config), SNN(config)
    sizes = [
        [m.weight.shape for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for model in (dense, spiking)
    ]
    assert sizes[0] == sizes[1]
    assert dense(torch.rand(784).expand(10, 2, 784)).shape == (1, 2, 10)
