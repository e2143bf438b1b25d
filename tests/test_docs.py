"""The documentation: its code runs as it stands, its links lead somewhere, every name is listed."""

import re
import runpy
import sys
import time
from dataclasses import asdict

import pytest
import torch
from reading import PAGES, ROOT, blocks
from recorded import qtdb_files, some_beats, some_events

import snn_lib
import snn_lib.inference
import snn_lib.tasks
import snn_lib.training
from snn_lib import fire_from_the_start
from snn_lib.data.events import nmnist_bytes
from snn_lib.training.checkpoints import save_checkpoint

WITH_CODE = [page for page in PAGES if page.parent != ROOT and blocks(page, "python")]


def run_as_script(monkeypatch, script, *arguments, code=0):
    """Runs a script of this folder with a command line, and expects its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == code


def anchors(page):
    """The names of a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qtdb_files(tmp_path, *some_beats(count=80))
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(block, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), target


def test_files_that_are_named_exist():
    suffixes = r"(?:py|md|yaml|ipynb|csv|cff)"
    for page in PAGES:
        for name in re.findall(rf"`(?:python )?([\w./]+/[\w.]+\.{suffixes})`", page.read_text()):
            if not name.startswith("runs/"):
                assert any((ROOT / at / name).exists() for at in ("", "snn_lib")), (page.name, name)


def test_what_the_packages_export_is_in_the_list():
    listed = (ROOT / "docs" / "api.md").read_text()
    packages = snn_lib, snn_lib.inference, snn_lib.tasks, snn_lib.training
    missing = {name for p in packages for name in p.__all__ if f"- `{name}`: " not in listed}
    assert not missing, "to be written anew by python docs/make_api.py"


def test_the_list_is_as_the_docstrings_are():
    script = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert script["page"]() == (ROOT / "docs" / "api.md").read_text(), "write it anew"


def test_the_readme_s_picture_is_light():
    assert (ROOT / "docs" / "pictures" / "associative_memory.gif").stat().st_size < 2**20


@pytest.mark.parametrize("filters", ["map", "pixel"])
def test_the_convolutional_network_s_picture_is_drawn_of_any_checkpoint(
    filters, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    import snn_conv

    config = snn_conv.ConvConfig(name="drawn")
    options = config.hyperparameters
    options.filters, options.channels, options.length = filters, [2, 2, 2], 3
    config.mnist_config.test_size = 20
    weights = snn_conv.SNN(config).state_dict()
    checkpoint, picture = tmp_path / "checkpoint", tmp_path / "picture.png"
    save_checkpoint(checkpoint, {"snn_state_dict": weights, "config": asdict(config)})
    script = str(ROOT / "docs" / "make_conv_picture.py")
    arguments = ["--checkpoint", checkpoint, "--output", picture, "--digit", 7]
    run_as_script(monkeypatch, script, *arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recording_is_played_step_by_step_as_it_was_recorded_and_drawn(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    import event_vision

    torch.manual_seed(0)
    config = event_vision.EventConvConfig(name="live")
    config.hyperparameters.channels, config.hyperparameters.length = [4, 4, 4], 5
    config.events.duration = 30.0
    model = event_vision.SNN(config).eval()
    events = some_events(3, count=2000)
    x, _ = config.preparation()([events])
    fire_from_the_start(model, x, rate=0.2)
    for weights in model.parameters():  # away from where its search has ended, at the threshold
        weights.data *= 1.01
    checkpoint, recording = tmp_path / "checkpoint", tmp_path / "7" / "00001.bin"
    of_use = {"preparation": config.preparation().to_dict(), "readout": "count", "logit_scale": 1.0}
    made_by = {"config": asdict(config), "script": "event_vision.py"}
    save_checkpoint(checkpoint, {"snn_state_dict": model.state_dict(), **made_by, **of_use})
    network = snn_lib.load(checkpoint, event_vision.SNN)
    recording.parent.mkdir()
    recording.write_bytes(nmnist_bytes(events))

    script, picture = str(ROOT / "docs" / "make_event_picture.py"), tmp_path / "picture.png"
    live = runpy.run_path(script)["live"]
    begin = time.perf_counter()
    steps = list(live(network, events, speed=0.5))
    assert time.perf_counter() - begin >= 0.06  # 30 ms at half of the speed
    assert torch.equal(torch.stack([step.frame for step in steps]), x[:, 0])
    with torch.no_grad():
        spikes, _ = model(x)
    assert spikes.any()
    said = torch.stack([step.confidence for step in steps])
    torch.testing.assert_close(said, spikes[:, 0].cumsum(0).softmax(1))

    arguments = ["--checkpoint", checkpoint, "--recording", recording, "--output", picture]
    run_as_script(monkeypatch, script, *arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        len(re.findall(r"ms: [\d-], \d+ % sure, said [\d.]+ ms later", capsys.readouterr().out))
        == 5
    )


def test_an_electrocardiogram_is_drawn_with_its_labels_and_a_network_s_answers(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    import ecg

    torch.manual_seed(0)
    config = ecg.ECGConfig(name="drawn")
    config.hyperparameters.neurons = [12]
    x, labels = some_beats()
    qtdb_files(tmp_path, x, labels)
    checkpoint, picture = tmp_path / "checkpoint", tmp_path / "picture.png"
    preparation = {"kind": "SequencePreparation", "features": [4]}
    of_use = {"preparation": preparation, "readout": "every step", "logit_scale": 1.0}
    made_by = {"config": asdict(config), "script": "ecg.py"}
    weights = ecg.SNN(config).state_dict()
    save_checkpoint(checkpoint, {"snn_state_dict": weights, **made_by, **of_use})

    script = str(ROOT / "docs" / "make_ecg_picture.py")
    paths = ["--checkpoint", checkpoint, "--dataset_path", tmp_path, "--output", picture]
    run_as_script(monkeypatch, script, *paths, "--number", 3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (names,), _ = snn_lib.load(checkpoint, ecg.SNN).classify(x[3:4])
    right = [int(name) == label for name, label in zip(names, labels[3], strict=True) if label >= 0]
    said = f"{100 * sum(right) / len(right):.2f} % of {len(right)} labelled steps"
    assert said in capsys.readouterr().out
    run_as_script(monkeypatch, script, *paths, "--number", len(x), code=2)
    assert f"--number is {len(x)}, expected 0 to {len(x) - 1}" in capsys.readouterr().err
    paths[1] = ROOT / "checkpoint" / "pretrained_snn_mlp_1"
    run_as_script(monkeypatch, script, *paths, code=2)
    assert "pretrained_snn_mlp_1 is no network of ecg.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--number", -1), "--number is -1, expected that of a test recording, from 0"),
        (("--speed", 0), "--speed is 0.0, expected a positive number"),
        (("--checkpoint", "checkpoint/pretrained_ecg"), "pretrained_ecg is no network of event_vi"),
        (("--checkpoint", "checkpoint/none"), "there is no file checkpoint/none"),
    ],
)
def test_a_recording_that_cannot_be_played_is_refused_in_a_line(
    arguments, words, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    script = str(ROOT / "docs" / "make_event_picture.py")
    run_as_script(monkeypatch, script, *arguments, code=2)
    assert words in capsys.readouterr().err.splitlines()[-1]
