"""Loading a trained network: what it computes, and that it needs nothing but its checkpoint."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from refusing import refusal
from running import ONE_THREAD, ROOT, run_script, the_run
from torch import nn

import snn_lib.time_series
from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.series import load_series
from snn_lib.errors import InputError
from snn_lib.inference import compiled
from snn_lib.readout import LeakyIntegrator
from snn_lib.tasks import ClassificationConfig, SequenceClassification, SequenceRegression
from snn_lib.tasks.base import output_of
from snn_lib.tasks.digits import DigitClassification
from snn_lib.tasks.sequential_digits import SequentialDigits
from snn_lib.tasks.time_series import TimeSeries
from snn_lib.training import Experiment
from snn_lib.training.checkpoints import load_checkpoint, save_checkpoint
from snn_lib.training.config import config_from_dict
from snn_lib.training.loading import importing_from

SCRIPT = """\
import torch
from torch import nn
from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.tasks import SequenceClassification
from snn_lib.training import main

torch.manual_seed(0)
y = torch.arange(40) % 2
x = torch.rand(40, 6, 3)
data = {"train": (x[:30], y[:30]), "test": (x[30:], y[30:])}


def build_model(config):
    neurons = SpikingNeuron(8, tau_m=5)
    return Sequential(LowPassSynapse(3, tau=5), nn.Linear(3, 8), neurons, nn.Linear(8, 2))


task = SequenceClassification(data, readout="mean", classes=["down", "up"])
"""
CALL = "main(__file__, build_model, task)\n"
MARKED = """
def marked(config):
    {late}
    model = build_model(config)
    model.project = project
    return model


"""
OWN_SETTINGS = """
from typing import Literal
from snn_lib.tasks import ClassificationConfig


@dataclasses.dataclass
class OwnConfig(ClassificationConfig):
    width: int = 8
    shape: Literal["wide", "deep"] = "wide"


wide = SequenceClassification(data, "mean", config_class=OwnConfig)


def build_wide(config):
    neurons = SpikingNeuron(config.width, tau_m=5)
    layers = LowPassSynapse(3, tau=5), nn.Linear(3, config.width), neurons
    return Sequential(*layers, nn.Linear(config.width, 2))
"""


def build_model(config):
    return Sequential(
        LowPassSynapse(3, tau=5), nn.Linear(3, 8), SpikingNeuron(8, tau_m=5), nn.Linear(8, 2)
    )


def train(folder, task, build=build_model):
    """The path of the best checkpoint of a run of one epoch."""
    config = task.config_class(name="mine", device="cpu", runs_path=str(folder / "runs"))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    experiment = Experiment(build, task, config)
    experiment.train()
    return experiment.run.best


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A trained network: its checkpoint, its data and its task."""
    torch.manual_seed(0)
    x, y = torch.rand(20, 6, 3), torch.arange(20) % 2
    task = SequenceClassification({"train": (x, y)}, "mean", classes=["down", "up"])
    return train(tmp_path_factory.mktemp("mine"), task), x, task


def pretrained(name, task_class, **options):
    """A pretrained network, and its task on a few test samples."""
    path = ROOT / "checkpoint" / f"pretrained_{name}"
    task = task_class()
    values = {**load_checkpoint(path)["config"], "dataset_path": str(ROOT / "dataset")}
    if options:
        values["mnist_config"] = {**values["mnist_config"], **options}
    task.setup(config_from_dict(task.config_class, values, []), torch.device("cpu"))
    return snn_lib.load(path), task


@pytest.mark.parametrize(
    ("name", "task_class"),
    [
        ("snn_mlp_1", DigitClassification),
        ("snn_mlp_1_latency", DigitClassification),
        ("sequential_mnist", SequentialDigits),
    ],
)
def test_images_are_prepared_and_answered_as_in_the_test(name, task_class):
    network, task = pretrained(name, task_class, test_size=10)
    (batch,) = task.batches("test")
    images = torch.frombuffer(
        bytearray((ROOT / "dataset/MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:][:7840]),
        dtype=torch.uint8,
    ).view(10, 28, 28)
    assert torch.equal(network.prepare(images).x, batch.x)
    with torch.no_grad():
        output = output_of(network, batch.x)
    expected = output[-1] if name == "sequential_mnist" else output.sum(0) * task.logit_scale
    torch.testing.assert_close(network.answer(images), expected)
    assert torch.equal(task.logits(output, batch), expected)
    names, scores = network.classify(images)
    assert [int(one) for one in names] == expected.argmax(1).tolist()
    torch.testing.assert_close(scores, expected.softmax(1))
    assert sum(int(one) == label for one, label in zip(names, batch.y, strict=True)) >= 9


def test_series_are_prepared_and_answered_as_in_the_test():
    network, task = pretrained("time_series", TimeSeries)
    parts, classes = load_series("JapaneseVowels", ROOT / "dataset")
    batch = next(task.batches("test"))
    x, lengths = network.prepare(parts["test"][0][: batch.x.shape[1]])
    assert torch.equal(x, batch.x)
    assert torch.equal(lengths, batch.lengths)
    names, _ = network.classify(parts["test"][0][:50])
    right = [name == classes[label] for name, label in zip(names, parts["test"][1], strict=False)]
    assert sum(right) >= 48


def test_a_network_of_one_s_own_computes_what_was_trained(mine):
    path, x, _ = mine
    network = snn_lib.load(path, build_model)
    assert not network.training
    model = build_model(None)
    model.load_state_dict(load_checkpoint(path)["snn_state_dict"])
    with torch.no_grad():
        expected, state = model.eval()(x.transpose(0, 1))
        output, next_state = network(x.transpose(0, 1))
    assert torch.equal(output, expected)
    assert len(next_state) == len(state)
    names, scores = network.classify(x)
    assert names == [["down", "up"][k] for k in expected.mean(0).argmax(1)]
    torch.testing.assert_close(scores.sum(1), torch.ones(20))
    stream = compiled(network)
    for step, values in enumerate(x[0].numpy()):
        np.testing.assert_allclose(stream.step(values), expected[step, 0], rtol=1e-4, atol=1e-5)


def test_a_pretrained_model_that_is_not_here_is_said_to_be_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = rf"no file checkpoint/pretrained_snn_mlp_1, seen from {tmp_path}; .* in a clone"
    with pytest.raises(InputError, match=words):
        snn_lib.load("checkpoint/pretrained_snn_mlp_1")
    assert snn_lib.load(ROOT / "checkpoint" / "pretrained_snn_mlp_1").classes


def test_a_sequence_is_answered_alike_alone_and_beside_a_longer_one(mine):
    path, x, _ = mine
    network = snn_lib.load(path, build_model)
    with torch.no_grad():
        network.model[1].weight.abs_().mul_(5)  # all neurons fire, so that every step has a say
    together = network.answer([x[0], x[1, :2], x[2, :5]])
    for number, length in enumerate((6, 2, 5)):
        alone = network.answer(x[number : number + 1, :length])
        torch.testing.assert_close(together[number], alone[0])


def test_a_model_is_put_into_evaluation_by_its_own_method(mine):
    class Hard(Sequential):
        hard = False

        def eval(self):
            self.hard = True
            return super().eval()

    network = snn_lib.load(mine[0], lambda config: Hard(*build_model(config)))
    assert network.model.hard


def test_input_is_not_rounded_to_the_type_of_a_single_parameter(tmp_path):
    def build(config):
        first = nn.Identity()
        first.unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        first.scale = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)
        first.turn = nn.Parameter(torch.ones(99, dtype=torch.complex64), requires_grad=False)
        return Sequential(first, nn.Linear(3, 2))

    x = torch.rand(20, 6, 3)
    task = SequenceClassification({"train": (x, torch.arange(20) % 2)}, "mean")
    network = snn_lib.load(train(tmp_path, task, build), build)
    with torch.no_grad():
        expected = network.model(x.transpose(0, 1))[0].mean(0)
    torch.testing.assert_close(network.answer(x), expected)


def test_one_output_tells_no_classes(tmp_path):
    class Event(SequenceClassification):
        def loss(self, model, batch):
            loss = self.readout(model(batch.x)[0], batch.lengths).mean()
            return loss, {"samples": batch.x.shape[1], "loss": loss.detach(), "correct": 0}

    def build(config):
        return Sequential(LowPassSynapse(3, 4.0), nn.Linear(3, 1))

    data = torch.rand(20, 6, 3), torch.randint(2, (20,))
    network = snn_lib.load(train(tmp_path, Event({"train": data}, "mean"), build), build)
    assert network.answer(data[0]).shape == (20, 1)
    assert "has one output, which tells no classes" in refusal(network.classify, data[0])


@pytest.mark.parametrize("readout", ["last", None])
def test_numbers_of_a_sequence_or_of_its_steps_are_answered(tmp_path, readout):
    x = torch.rand(20, 6, 3)
    y = x[..., :2].cumsum(1)
    task = SequenceRegression({"train": (x, y[:, -1] if readout else y)}, readout)
    network = snn_lib.load(train(tmp_path, task), build_model)
    with torch.no_grad():
        output = network(x.transpose(0, 1))[0]
    expected = output[-1] if readout else output.transpose(0, 1)
    torch.testing.assert_close(network.answer(x), expected)
    assert "predicts numbers, not classes: call answer" in refusal(network.classify, x)


def test_each_step_of_a_sample_s_own_is_classified(tmp_path):
    x = [torch.rand(steps, 3) for steps in (6, 4, 5) * 7]
    y = [(sequence.sum(1) > 1.5).long() for sequence in x]
    task = SequenceClassification({"train": (x, y)}, None, classes=["low", "high"])
    network = snn_lib.load(train(tmp_path, task), build_model)
    names, scores = network.classify(x)
    assert scores.shape == (21, 6, 2)
    for sequence, own, found in zip(x, names, scores, strict=True):
        with torch.no_grad():
            expected = network(sequence[:, None])[0][:, 0].softmax(1)
        torch.testing.assert_close(found[: len(sequence)], expected)
        assert own == [["low", "high"][number] for number in expected.argmax(1).tolist()]


def test_a_readout_of_one_s_own_is_set_after_loading(tmp_path):
    x, y = torch.rand(20, 6, 3), torch.arange(20) % 2
    readout = LeakyIntegrator(tau=50)
    network = snn_lib.load(
        train(tmp_path, SequenceClassification({"train": (x, y)}, readout)), build_model
    )
    assert "set network.readout to that of the training" in refusal(network.answer, x)
    network.readout = readout
    with torch.no_grad():
        expected = readout(network(x.transpose(0, 1))[0])
    torch.testing.assert_close(network.answer(x), expected)


def test_an_answer_can_teach_another_network(mine):
    path, x, _ = mine
    answer = snn_lib.load(path, build_model).answer(x)
    assert not answer.requires_grad
    student = torch.zeros_like(answer, requires_grad=True)
    nn.functional.mse_loss(student, answer).backward()  # which keeps the answer
    assert student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_answers_in_the_dtype_of_its_weights(mine, dtype):
    path, x, _ = mine
    network = snn_lib.load(path, build_model).to(dtype)
    network.model.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    seen = []
    lengths = [6, 2, *[4] * 18]
    assert network.answer([steps[:n] for steps, n in zip(x, lengths, strict=True)]).isfinite().all()
    assert seen == [dtype]
    for network.readout in ("last", "every step"):
        scores = network.classify(x)[1]
        assert scores.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))


def test_a_network_answers_on_the_device_of_its_weights(mine):
    path, x, _ = mine
    network = snn_lib.load(path, build_model).to("meta")
    assert network.answer(x).device.type == "meta"
    assert network.answer([x[0], x[1, :3]]).device.type == "meta"  # with lengths


def test_the_model_of_a_checkpoint_is_imported_from_its_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rising.py").write_text(f"{SCRIPT}if __name__ == '__main__':\n    {CALL}")
    settings = "hyperparameters.epoch=1", "hyperparameters.batch_size=8", "device=cpu"
    command = sys.executable, "rising.py", "--train", *settings
    subprocess.run(command, check=True, env=ONE_THREAD, capture_output=True)
    best = the_run(tmp_path) / "best"
    shutil.copy(best, tmp_path / "sent")  # to another machine, with the script beside it
    before = torch.get_rng_state()
    network = snn_lib.load("sent")
    assert torch.equal(torch.get_rng_state(), before)  # although the script seeds it
    assert network.classes == ["down", "up"]
    assert network.classify(torch.rand(1, 6, 3))[0][0] in network.classes
    monkeypatch.chdir(ROOT)
    assert snn_lib.load(best).classes == ["down", "up"]  # the script lies above the checkpoint
    (tmp_path / "rising.py").write_text(SCRIPT + CALL)
    assert "calls main when it is imported: put the call under if" in refusal(snn_lib.load, best)
    (tmp_path / "rising.py").unlink()
    assert "rising.py, which wrote checkpoint " in refusal(snn_lib.load, best)


def written(mine, path, script, build_model=None):
    """Writes a checkpoint as a script does, or did when it named no build_model."""
    names = {"script": script, "build_model": build_model, "config_class": None}
    save_checkpoint(path, {**load_checkpoint(mine[0]), **names})


@pytest.mark.parametrize("module", ["labels.py", "labels/__init__.py", "labels/net.py"])
@pytest.mark.parametrize("second", ["two", "one/two"])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("name", ["rising:marked", None])
def test_projects_may_have_scripts_and_modules_of_the_same_names(
    mine, tmp_path, monkeypatch, module, second, late, name
):
    imported = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    line = f"from {imported} import project"
    for project in ("one", second):
        folder = tmp_path / project
        (folder / module).parent.mkdir(parents=True)
        (folder / module).write_text(f"project = {project!r}\n")
        script = SCRIPT + MARKED.format(late=line if late else "pass")
        script += "if __name__ == '__main__':\n    main(__file__, marked, task)\n"
        (folder / "rising.py").write_text(script if late else f"{line}\n{script}")
        written(mine, folder / "best", "rising.py", name)
    monkeypatch.chdir(tmp_path / second)  # whose script wrote another checkpoint
    monkeypatch.setitem(sys.modules, imported, SimpleNamespace(project="elsewhere"))
    for project in ("one", second, "one", second):
        model = snn_lib.load(tmp_path / project / "best").model
        assert model.project == project
    both = [tmp_path / project / "best" for project in ("one", second)] * 2
    with ThreadPoolExecutor(4) as threads:  # which share their modules
        models = threads.map(lambda path: snn_lib.load(path).model, both)
    assert [model.project for model in models] == ["one", second] * 2
    assert sys.modules[imported].project == "elsewhere"  # whoever has imported it keeps it


def test_a_script_above_a_link_to_the_runs_comes_before_others(mine, tmp_path, monkeypatch):
    """Before one where the runs are, and one in the current folder."""
    for project in ("one", "two", "far"):
        (tmp_path / project).mkdir()
        script = SCRIPT + MARKED.format(late=f"project = {project!r}")
        (tmp_path / project / "rising.py").write_text(script + "main(__file__, marked, task)\n")
    runs = tmp_path / "far" / "runs"
    runs.mkdir()
    written(mine, runs / "best", "rising.py")
    (tmp_path / "one" / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path / "two")
    assert snn_lib.load("../one/runs/best").model.project == "one"
    assert snn_lib.load(runs / "best").model.project == "far"


def test_a_class_of_settings_may_stand_in_a_script_whose_annotations_are_text(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    script = "from __future__ import annotations\nimport dataclasses\n" + SCRIPT + OWN_SETTINGS
    script += "if __name__ == '__main__':\n    main(__file__, build_wide, wide)\n"
    (tmp_path / "rising.py").write_text(script)
    settings = "hyperparameters.epoch=1", "hyperparameters.batch_size=8", "device=cpu", "width=5"
    done = run_script(tmp_path / "rising.py", "--train", *settings)
    assert done.code == 0, done.err
    network = snn_lib.load(the_run(tmp_path) / "best")
    assert network.model[1].weight.shape == (5, 3)


@pytest.mark.parametrize(
    ("script", "named", "words"),
    [
        ("import nothing_of_this_name", None, "broken.py does not give .*ModuleNotFoundError"),
        ("raise SystemExit('no data')", None, "broken.py ends before .*: no data"),
        ("x = 1", "broken:build_model", "AttributeError: .* has no attribute 'build_model'"),
        ("x = 1", "os:system", "InputError: os does not lie beside it"),
        ("x = 1", None, "does not call"),
    ],
)
def test_a_script_that_gives_no_model_is_named(mine, tmp_path, script, named, words):
    written(mine, tmp_path / "best", "broken.py", named)
    (tmp_path / "broken.py").write_text(f"{script}\n")
    assert re.search(words, refusal(snn_lib.load, tmp_path / "best"))


def test_a_script_with_a_second_dot_in_its_name_is_refused(mine, tmp_path):
    written(mine, tmp_path / "best", "mine_v1.2.py", "mine_v1.2:build_model")
    (tmp_path / "mine_v1.2.py").write_text(SCRIPT)
    assert "mine_v1.2 has a dot in its name: give load a" in refusal(
        snn_lib.load, tmp_path / "best"
    )


def test_a_script_that_is_imported_without_a_guard_is_refused(tmp_path, monkeypatch):
    (tmp_path / "unguarded.py").write_text(SCRIPT + CALL)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"unguarded.py calls main when it is imported: put the"):
        import unguarded  # noqa: F401


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"script": None}, "does not name the script"),
        ({"script": "../up.py"}, "does not name the script"),
        ({"script": "lost.py"}, "lost.py, which wrote"),
    ],
)
def test_a_checkpoint_without_its_script_needs_a_build_model(mine, tmp_path, change, words):
    save_checkpoint(tmp_path / "best", {**load_checkpoint(mine[0]), **change})
    assert words in refusal(snn_lib.load, tmp_path / "best")
    assert snn_lib.load(tmp_path / "best", build_model).classes == ["down", "up"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("readout", "men", "its readout is unknown"),
        ("readout", ["mean"], "its readout is unknown"),
        ("readout", torch.zeros(2), "its readout is unknown"),
        ("logit_scale", "1", "its logit_scale is no finite number"),
        ("logit_scale", math.nan, "its logit_scale is no finite number"),
        ("logit_scale", 10**400, "its logit_scale is no finite number"),
        ("logit_scale", torch.ones(3), "its logit_scale is no finite number"),
        ("classes", 2, "its classes are no list of names"),
        ("classes", "ab", "its classes are no list of names"),
        ("classes", ["down", None], "its classes are no list of names"),
        ("classes", torch.zeros(2), "its classes are no list of names"),
        ("preparation", {"kind": "Unknown"}, "its preparation makes no input"),
    ],
)
def test_a_damaged_readout_scale_or_list_of_classes_is_refused(mine, tmp_path, key, value, words):
    save_checkpoint(tmp_path / "best", {**load_checkpoint(mine[0]), key: value})
    message = refusal(snn_lib.load, tmp_path / "best", build_model)
    assert message.endswith(f"is damaged, or of another version: {words}")


def damaged(mine, folder, **changes):
    """The network of a checkpoint in which something has another value."""
    save_checkpoint(folder / "best", {**load_checkpoint(mine[0]), **changes})
    return snn_lib.load(folder / "best", build_model)


def test_classes_and_preparation_that_do_not_fit_the_network_are_refused(mine, tmp_path):
    x = mine[1]
    assert damaged(mine, tmp_path, logit_scale=10**30).answer(x).isfinite().all()
    network = damaged(mine, tmp_path, classes=["down", "up", "aside"])
    assert refusal(network.classify, x).endswith("has 3 names of classes and 2 outputs")
    network = damaged(mine, tmp_path, logit_scale=None)
    assert refusal(network.classify, x).endswith("predicts numbers, not classes: call answer")
    four = {**load_checkpoint(mine[0])["preparation"], "features": [4]}
    network = damaged(mine, tmp_path, preparation=four)
    message = refusal(network.answer, torch.rand(20, 6, 4))
    assert message.startswith("the model does not take batches (T, B, *features) of shape (6, 20, ")


@pytest.mark.parametrize("value", [{3: 4}, {"hyperparameters": {"tau_m": "8"}}])
def test_settings_of_which_no_layers_can_be_built_are_refused(mine, tmp_path, value):
    save_checkpoint(tmp_path / "best", {**load_checkpoint(mine[0]), "config": value})

    def build_decaying(config):
        return LowPassSynapse(3, tau=2 * math.sqrt(config.hyperparameters.tau_m))

    message = refusal(snn_lib.load, tmp_path / "best", build_decaying)
    assert "cannot be built: TypeError: " in message


def test_what_a_checkpoint_of_an_earlier_version_lacks_is_named(mine, tmp_path):
    path, x, _ = mine
    old = load_checkpoint(path)
    for key in ("preparation", "readout", "logit_scale", "classes", "script"):
        del old[key]
    save_checkpoint(tmp_path / "old", old)
    network = snn_lib.load(tmp_path / "old", build_model)
    assert network(x.transpose(0, 1))[0].shape == (6, 20, 2)
    assert "does not say how to prepare input" in refusal(network.prepare, x)
    assert "does not hold a readout" in refusal(network.classify, x)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda config: Sequential(LowPassSynapse(4, tau=5)), "belongs to another model: .*1.weig"),
        (
            lambda config: nn.Linear(config.fan_in, 2),
            "built: .*'fan_in'; .* config_class$",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(mine, build, words):
    assert re.search(words, refusal(snn_lib.load, mine[0], build))


def test_the_settings_of_a_checkpoint_may_be_a_class_of_one_s_own(tmp_path):
    @dataclasses.dataclass
    class OwnConfig(ClassificationConfig):
        width: int = 7

    def build_wide(config):
        assert config.width == 7
        return build_model(config)

    x, y = torch.rand(20, 6, 3), torch.arange(20) % 2
    task = SequenceClassification({"train": (x, y)}, "mean", config_class=OwnConfig)
    network = snn_lib.load(train(tmp_path, task), build_wide)
    assert set(network.classify(x)[0]) <= {"0", "1"}


def test_a_class_of_settings_that_is_given_counts_where_the_script_is_found(tmp_path):
    @dataclasses.dataclass
    class Own(ClassificationConfig):
        @property
        def outputs(self):
            return 2

    build = "def build_model(config):\n    return nn.Linear(3, config.outputs)\n"
    (tmp_path / "own.py").write_text(f"from torch import nn\n\n\n{build}")
    weights = nn.Linear(3, 2).state_dict()
    names = {"script": "own.py", "build_model": "own:build_model", "config_class": None}
    values = dataclasses.asdict(Own())
    save_checkpoint(tmp_path / "best", {"snn_state_dict": weights, "config": values, **names})
    assert "its settings may need their class" in refusal(snn_lib.load, tmp_path / "best")
    assert snn_lib.load(tmp_path / "best", config_class=Own).model.out_features == 2


def test_a_script_exports_its_network_as_c_without_its_data(tmp_path):
    command = "time_series.py", f"dataset_path={tmp_path}", "--export"
    done = run_script(*command, tmp_path / "series.c")
    assert done.code == 0, done.err
    assert "#define SERIES_INPUTS 12" in (tmp_path / "series.h").read_text()
    refused = run_script(*command, tmp_path / "my-series.c")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "expected a name in C" in refused.err


def test_a_script_exports_its_network_as_onnx_without_its_data(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    done = run_script("time_series.py", f"dataset_path={tmp_path}", "--export", path)
    assert done.code == 0, done.err
    assert "is exported to" in done.out
    assert runtime.InferenceSession(str(path)).get_inputs()[0].shape == ["batch", 12]


def test_an_installed_package_is_not_taken_from_a_folder_of_its_name(mine, tmp_path, monkeypatch):
    """Nor does Python take it from there, if the folder has no __init__.py."""
    for folder in ("numpy", "yaml"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.py").write_text("")
    (tmp_path / "rising.py").write_text(SCRIPT + CALL)
    written(mine, tmp_path / "best", "rising.py")
    before = sys.modules["numpy"]
    for _ in range(2):
        snn_lib.load(tmp_path / "best")
    assert sys.modules["numpy"] is before
    with importing_from(tmp_path.resolve()) as own:
        assert own == {"rising"}


def test_threads_that_build_networks_draw_what_each_of_them_draws_alone(mine):
    def drawn(config):
        orders.append([torch.randperm(50).tolist() for _ in range(200)])
        return build_model(config)

    orders = []
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: snn_lib.load(mine[0], drawn), range(8)))
    assert all(order == orders[0] for order in orders)
    assert torch.equal(torch.get_rng_state(), before)
