"""Event vision: what the network sees of recordings, and the script on sets of any kind."""

import dataclasses
import itertools
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import gesture_files, nmnist_files, tonic_downloads
from refusing import refusal
from running import ROOT, YAML, accuracy, prepared, run

import event_vision
from snn_lib import SpikingNeuron
from snn_lib.data.batches import default_dtype
from snn_lib.data.events import Events, Frames
from snn_lib.data.recordings import NMNIST, load_recordings, recording_files
from snn_lib.errors import SettingsError
from snn_lib.tasks.event_vision import EventVision
from snn_lib.training.config import load_config

CPU = torch.device("cpu")
STEPS = 4
task_of = partial(prepared, EventVision)
SMALL = (
    f"hyperparameters.length={STEPS}",
    "hyperparameters.channels=[4,4,8]",
    "hyperparameters.hidden=16",
    "hyperparameters.batch_size=8",
    "hyperparameters.epoch=2",
    "events.validation_size=4",
    "device=cpu",
)


def configured(*overrides, file="event_vision"):
    schema = event_vision.EventConvConfig
    return load_config(schema, YAML[file], [*SMALL, *overrides])


@pytest.fixture
def files(tmp_path):
    """Overrides for twenty recordings a part in N-MNIST's folders, of noise."""
    return "dataset=nmnist", f"events.path={nmnist_files(tmp_path / 'mine')}"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A folder with MNIST, in which simulated recordings are kept for all tests."""
    root = tmp_path_factory.mktemp("dataset")
    (root / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    return root


def frames_of(files, part="train", **options):
    frames = Frames(STEPS, 300.0, **options)
    path = files[1].removeprefix("events.path=")
    return load_recordings(NMNIST, recording_files(NMNIST, Path(path), part), frames)


def test_the_network_sees_whether_there_were_events_or_how_many_time_first(files):
    frames, labels = frames_of(files, "test")
    (clipped,) = task_of(configured(*files)).batches("test")
    (counted,) = task_of(configured(*files, "events.values=counted")).batches("test")
    assert torch.equal(clipped.y, labels)
    assert torch.equal(counted.x, frames.transpose(0, 1))
    assert counted.x.max() > 1
    assert torch.equal(clipped.x, (frames > 0).transpose(0, 1).float())
    # Differences of bytes would be bytes, too.
    assert clipped.x.dtype == counted.x.dtype == torch.float32
    with default_dtype(torch.float64):
        assert next(task_of(configured(*files)).batches("test")).x.dtype == torch.float64


def test_time_runs_backwards_or_is_summed_up_as_the_settings_say(files):
    seen = {
        order: next(task_of(configured(*files, f"events.order={order}")).batches("test"))
        for order in ("forward", "reversed", "summed")
    }
    forward = seen["forward"].x
    assert not torch.equal(forward[0], forward[-1])
    for step in range(STEPS):
        assert torch.equal(seen["reversed"].x[step], forward[STEPS - 1 - step])
        torch.testing.assert_close(seen["summed"].x[step], forward.mean(0))


def test_parts_are_drawn_by_the_seed_and_keep_to_their_sizes(files):
    task = task_of(configured(*files, "events.training_size=9", "events.test_size=3"))
    sizes = {split: task.split(split).count for split in ("train", "validation", "test")}
    assert sizes == {"train": 9, "validation": 4, "test": 3}
    whole = task_of(configured(*files))
    assert whole.split("train").count == 16
    assert torch.equal(task.parts["train"][2], whole.parts["train"][2][:9])
    training, held_out = (set(task.parts[split][2].tolist()) for split in ("train", "validation"))
    assert not training & held_out
    in_order = sorted(whole.parts["train"][2].tolist())  # for gestures, by class
    assert training != set(in_order[:9])
    again, other = (task_of(configured(*files, f"seed={seed}")) for seed in (2, 3))
    for one in (again, other):
        one.split("train")
    assert set(again.parts["validation"][2].tolist()) == held_out
    assert set(other.parts["validation"][2].tolist()) != held_out
    too_many = task_of(configured(*files, "events.validation_size=20"))
    with pytest.raises(SettingsError, match="is 20, but there are 20 recordings "):
        too_many.split("train")


def test_the_recordings_that_are_divided_are_all_of_the_folder(files):
    sizes = "events.training_size=9", "events.validation_size=4"
    assert task_of(configured(*files, *sizes)).divided() == 20


def test_a_test_part_that_is_missing_is_told_from_a_folder_that_is(files, tmp_path):
    assert task_of(configured(*files)).has("test")
    shutil.rmtree(tmp_path / "mine" / "Test")
    assert not task_of(configured(*files)).has("test")
    task = task_of(configured(files[0], f"events.path={tmp_path}/mien"))
    assert task.has("test")
    assert f"no recordings {tmp_path}/mien/Test" in refusal(task.split, "test")
    assert task_of(configured(files[1], "dataset=simulated")).has("test")  # which reads no folder


def test_the_first_simulated_recordings_are_held_out_whatever_the_seed(simulated):
    """So that real recordings of these images are new to the network as well."""
    for seed in (2, 3):
        sizes = "events.validation_size=4", "events.training_size=9", f"seed={seed}"
        task = task_of(configured(f"dataset_path={simulated}", *sizes))
        assert [task.split(split).count for split in ("train", "validation")] == [9, 4]
        assert task.parts["validation"][2].tolist() == [0, 1, 2, 3]
        assert task.parts["train"][2].tolist() == list(range(4, 13))


def test_the_first_few_recordings_of_a_part_are_of_all_classes(tmp_path):
    """The files of DVS128 Gesture are named by their class, so that they are in its order."""
    gestures = "dataset=dvs_gesture", f"events.path={gesture_files(tmp_path / 'mine')}"
    task = task_of(configured(*gestures, "events.test_size=11", file="event_vision_gesture"))
    (batch,) = task.batches("test")
    assert sorted(batch.y.tolist()) == list(range(11))


def test_first_weights_see_the_recordings_that_are_trained_on_alone(files):
    sizes = "events.training_size=9", "hyperparameters.batch_size=9"
    task = task_of(configured(*files, *sizes, "events.use_augmentation=false"))
    (training,), (held_out,) = task.batches("train"), task.batches("validation")

    def recordings(x):
        return {recording.numpy().tobytes() for recording in x.unbind(1)}

    assert recordings(task.sample()) == recordings(training.x)
    assert not recordings(task.sample()) & recordings(held_out.x)


def test_processes_share_a_batch_and_augment_alike(files):
    world = 3
    config = configured(*files)
    whole = list(task_of(config).batches("train", 1))
    shares = [list(task_of(config, rank, world).batches("train", 1)) for rank in range(world)]
    for number, batch in enumerate(whole):
        for rank in range(world):
            assert torch.equal(shares[rank][number].x, batch.x[:, rank::world])
            assert torch.equal(shares[rank][number].y, batch.y[rank::world])


def test_training_recordings_are_augmented_anew_in_every_epoch_and_others_never(files):
    def shown(split, epoch, *overrides):
        task = task_of(configured(*files, *overrides))
        training = split == "train"
        batches = task.batches("train", epoch) if training else task.batches(split)
        return torch.cat([b.x.sum((0, 2, 3, 4)) for b in batches]).sort().values

    assert torch.equal(shown("train", 0), shown("train", 0))
    assert not torch.equal(shown("train", 0), shown("train", 1))
    plain = "events.use_augmentation=false"
    assert torch.equal(shown("train", 0, plain), shown("train", 1, plain))
    assert torch.equal(shown("validation", 0), shown("validation", 0, plain))


def test_a_recording_is_augmented_otherwise_in_every_batch_epoch_and_seed(files):
    """All recordings are the same one, so that their order changes nothing."""
    task = task_of(configured(*files, "hyperparameters.batch_size=1"))
    task.split("train")
    frames, labels, chosen = task.parts["train"]
    alike, shown = (frames[:1].expand_as(frames), labels, chosen), []
    for seed, epoch in (2, 0), (2, 1), (3, 0):
        task = task_of(dataclasses.replace(task.config, seed=seed))
        task.parts["train"] = alike
        shown += [batch.x for batch in task.batches("train", epoch)]
    assert len(shown) == 3 * len(chosen)
    different = {tuple(x.flatten().tolist()) for x in shown}
    assert len(different) > len(shown) / 2  # a few may be moved alike
    first, second, third = shown[:: len(chosen)]
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("file", "dataset"),
    [
        ("event_vision", "simulated"),
        ("event_vision", "nmnist"),
        ("event_vision_behind", "simulated"),
        ("event_vision_gesture", "dvs_gesture"),
    ],
)
def test_the_network_sees_the_whole_sensor(file, dataset):
    preparation = configured(f"dataset={dataset}", file=file).preparation()
    end = {"dvs_gesture": 127}.get(dataset, 33)  # the last pixel of the sensor
    x, y = (np.array(place) for place in zip(*itertools.product((0, end), (0, end)), strict=True))
    corners = Events(x, y, t=np.zeros(4, np.int64), p=np.ones(4, np.int64))
    seen = preparation([corners]).x.sum((0, 1, 4))  # (side, side)
    assert seen[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1] * 4
    assert seen.sum() == 4


def test_only_as_many_images_are_recorded_as_are_asked_for(simulated):
    options = "events.training_size=150", "events.validation_size=20", "events.test_size=90"
    task = task_of(configured(f"dataset_path={simulated}", *options))
    for split in ("train", "validation", "test"):
        task.split(split)
    folder = task.config.camera.folder(simulated)
    assert len(list(folder.glob("Train/*/*.bin"))) == 200
    assert len(list(folder.glob("Test/*/*.bin"))) == 100
    assert {split: task.split(split).count for split in task.parts} == {
        "train": 150,
        "validation": 20,
        "test": 90,
    }


@pytest.mark.parametrize("side", [34, 32, 20])
def test_every_layer_of_the_network_fires_from_the_start(simulated, side):
    few = "events.training_size=100"  # which are read first
    config = configured(f"dataset_path={simulated}", f"events.side={side}", few)
    task = EventVision(event_vision.EventConvConfig)
    task.setup(config, CPU)
    torch.manual_seed(0)
    model = event_vision.SNN(config)
    event_vision.initialise(model, task)
    model.eval()
    x = task.sample()
    with torch.no_grad():
        outputs, _ = model.layers.layerwise(x.movedim(-1, 2))
    for layer, output in zip(model.layers, outputs, strict=True):
        if isinstance(layer, SpikingNeuron):
            assert 0.01 < output.float().mean() < 0.15
    assert outputs[-1].shape == (STEPS, 100, 10)


def test_feature_maps_keep_their_channels_last_and_what_is_left_over_is_pooled():
    config = configured()
    model = event_vision.SNN(config)
    x = (torch.rand(STEPS, 3, 34, 34, 2) < 0.1).to(torch.uint8)
    outputs, _ = model.layers.layerwise(x.movedim(-1, 2))
    sides = [output.shape[-1] for output in outputs[:12]]
    assert sides == [34, 34, 34, 17, 17, 17, 17, 9, 9, 9, 9, 5]
    for output in outputs[:13]:
        assert output.movedim(2, -1).is_contiguous()
    corner = torch.zeros_like(x)
    corner[:, :, 33, 33] = 1
    corner, _ = model.layers[:4].layerwise(10 * corner.movedim(-1, 2).float())
    assert corner[2][..., 32:, 32:].any() == corner[3][..., 16, 16].any()


def script(folder, action, *overrides, file="event_vision"):
    settings = [*SMALL, f"runs_path={folder}/runs", "name=mine", *overrides]
    return run(
        *(action, "--config_file", YAML[file], *settings, "test_checkpoint_path=''"),
        model=event_vision.SNN,
        task=EventVision(event_vision.EventConvConfig),
        initialise=event_vision.initialise,
        script=ROOT / "event_vision.py",
    )


def test_simulated_recordings_are_learned_and_tested_to_the_same_accuracy(simulated, tmp_path):
    overrides = (
        f"dataset_path={simulated}",
        "events.training_size=300",
        "events.validation_size=100",
        "events.test_size=100",
        "events.use_augmentation=false",
        "hyperparameters.hidden=64",
        "hyperparameters.epoch=4",
        "hyperparameters.weight_averaging=0",
        "scheduler.OneCycleLR.max_lr=0.01",
    )
    trained = script(tmp_path, "--train", *overrides)
    tested = script(tmp_path, "--test", *overrides)
    assert accuracy(trained) == accuracy(tested)
    assert accuracy(tested) > 25  # chance is 10
    work = (
        r"synaptic operations per recording \(0 additions and [\d,]+ multiply-accumulates\); a de"
    )
    assert re.search(work, tested.out)
    backwards = script(tmp_path, "--test", *overrides, "events.order=reversed")
    assert accuracy(backwards) != accuracy(tested)


def test_n_mnist_is_downloaded_by_tonic_trained_on_and_tested(tmp_path, monkeypatch):
    overrides = "dataset=nmnist", f"dataset_path={tmp_path}/dataset"
    with tonic_downloads(tmp_path, monkeypatch):
        trained = script(tmp_path, "--train", *overrides)
        assert accuracy(trained) == accuracy(script(tmp_path, "--test", *overrides))


@pytest.mark.parametrize("overrides", [(), ("events.bins=count", "events.values=counted")])
def test_files_of_one_s_own_need_no_tonic(files, tmp_path, overrides):
    trained = script(tmp_path, "--train", *files, *overrides)
    assert accuracy(trained) == accuracy(script(tmp_path, "--test", *files))


def test_a_folder_without_a_test_part_is_trained_on_alone(files, tmp_path):
    shutil.rmtree(tmp_path / "mine" / "Test")
    trained = script(tmp_path, "--train", *files)
    assert trained.code == 0, trained.err
    assert "validation loss" in trained.out
    assert "test loss" not in trained.out
    assert script(tmp_path, "--test", *files).err == "event_vision.py: there is no test data\n"


def test_a_test_part_that_lacks_a_class_is_told_before_training(files, tmp_path):
    shutil.rmtree(tmp_path / "mine" / "Test" / "3")
    refused = script(tmp_path, "--train", *files)
    assert refused.code == 2
    assert f"there are no recordings {tmp_path}/mine/Test/*/*.bin of class 3" in refused.err
    assert not (tmp_path / "runs").exists()


def test_gestures_train_in_chunks_of_time_and_test_to_the_same_accuracy(tmp_path):
    overrides = (
        f"events.path={gesture_files(tmp_path / 'mine')}",
        "hyperparameters.length=10",
        "hyperparameters.chunk=4",
    )
    file = "event_vision_gesture"
    trained = script(tmp_path, "--train", *overrides, file=file)
    assert accuracy(trained) == accuracy(script(tmp_path, "--test", *overrides, file=file))
    assert event_vision.SNN(configured(file=file)).layers[-1].shape == (11,)


def test_a_damaged_recording_is_refused_in_a_line(files, tmp_path):
    path = tmp_path / "mine" / "Train" / "7" / "00002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    refused = script(tmp_path, "--train", *files)
    assert refused.code == 2
    assert refused.err == (
        f"event_vision.py: {path} is cut in the middle of an event: it has {len(content) - 2} "
        "bytes, five an event\n"
    )
