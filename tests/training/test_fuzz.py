"""Hostile and broken files: any YAML text, override or checkpoint gives exit code 0 or 2, one line.

Exit code 1 only where the file holds numbers that make training explode.

SNN_FUZZ_CASES sets the number of cases over all tests (default 120), new ones each time then:

    SNN_FUZZ_CASES=10000 python -m pytest tests/training/test_fuzz.py
"""

import os
import pickle
import signal
import zipfile
from io import BytesIO

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import SCRIPT, run
from torch import nn

from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch, Split
from snn_lib.settings import list_settings
from snn_lib.tasks.digits import DigitClassification, DigitConfig

CASES = os.environ.get("SNN_FUZZ_CASES")


def cases(share):
    """Settings for a test that takes its share of the cases."""
    return settings(
        max_examples=int(share * int(CASES or 120)),
        deadline=None,
        derandomize=CASES is None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


class Noise(DigitClassification):
    """The task of the scripts on four images of noise, so that settings that are fine train."""

    def setup(self, config, device):
        self.config, self.device = config, device

    def split(self, split):
        size = self.config.hyperparameters.batch_size
        return Split(2 * size, size, None)  # two an epoch

    def batches(self, split, epoch=None, start=0):
        for _ in range(start, 2):
            yield Batch(torch.rand(3, 2, 4), torch.tensor([0, 1]))


class Interrupted(Noise):
    """The same, stopped in the middle of its third epoch."""

    def batches(self, split, epoch=None, start=0):
        for batch in super().batches(split, epoch, start):
            if epoch == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch


def tiny_model(config):
    return Sequential(LowPassSynapse(4, 4.0), nn.Linear(4, 3), SpikingNeuron(3, 4.0))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The only place where a case may write; its working directory too."""
    path = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def check(*arguments, task=Noise):
    """Runs the script and checks what must hold whatever its input is."""
    finished = run(*arguments, "runs_path=r", model=tiny_model, task=task())
    # A state may be one of numbers that training cannot go on from, which is told as in any run.
    exploded = finished.code == 1 and "the gradient's norm" in finished.err
    assert finished.code in (0, 2) or exploded or task is Interrupted, finished
    if finished.code in (1, 2):
        assert finished.err.startswith("snn_mlp_1.py: ")
        assert len(finished.err.splitlines()) == 1, finished.err
    assert not os.path.exists("touched")
    return finished


KEYS = [key for key, _ in list_settings(DigitConfig()) if key not in ("runs_path", "dataset_path")]
SAFE = ["device=cpu", "name=n"]  # last, where a case may write anywhere
REAL_YAML = SCRIPT.with_suffix(".yaml").read_bytes()
CODE = "!!python/object/apply:os.system ['touch touched']"
numbers = st.sampled_from(
    [-1, 0, 1, 2, 3, 10**25, 0.0, -0.5, 0.5, 1e-3, float("nan"), float("inf")]
)
WORDS = """none null true cpu Adam SGD OneCycleLR CyclicLR MultiStepLR CosineAnnealingWarmRestarts
poisson stable bfloat16 ??? ${name} ${seed} ${oc.env:HOME} ${a.b} ${ [ {a:b} *x &x 2001-01-01"""
words = st.sampled_from([*WORDS.split(), CODE, "", "\0"])
scalars = st.one_of(numbers, words, st.none(), st.booleans(), st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(scalars), inner, max_size=2)
    ),
    max_leaves=4,
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.text(max_size=8))


@cases(0.3)
@given(st.lists(st.tuples(keys, values), min_size=1, max_size=3))
def test_any_overrides_are_run_or_refused_in_a_line(overrides):
    check(
        "--train",
        "hyperparameters.epoch=1",
        *(f"{k}={v}" for k, v in overrides if k[:1] != "-"),
        *SAFE,
    )


def nested(pairs):
    """Dotted keys as the mapping of mappings that YAML files have."""
    tree = {}
    for key, value in pairs:
        *sections, last = key.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
            if not isinstance(level, dict):
                break
        else:
            level[last] = value
    return tree


@st.composite
def texts(draw):
    """YAML text: of keys and values, damaged copies of the real file, and anything at all."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return yaml.safe_dump(nested(draw(st.lists(st.tuples(keys, values), max_size=6)))).encode()
    if kind == 1:
        return damaged(draw, REAL_YAML)
    return draw(
        st.one_of(
            st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
        )
    )


def damaged(draw, content):
    """Some bytes changed, removed, repeated or put in, or the end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 40))
        put = draw(st.one_of(st.binary(max_size=4), st.just(content[place : place + length] * 2)))
        content = content[:place] + put + content[place + draw(st.sampled_from([0, 1, length])) :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


@cases(0.3)
@given(texts())
def test_any_yaml_file_is_run_or_refused_in_a_line(content):
    with open("any.yaml", "wb") as file:
        file.write(content)
    check("--train", "--config_file", "any.yaml", "hyperparameters.epoch=1", *SAFE)


@pytest.fixture(scope="module")
def good(folder):
    """The path of a real checkpoint, and a function that resumes or tests the file ``last``."""
    settings = ["name=good", "device=cpu", "hyperparameters.epoch=3"]
    finished = check("--train", *settings, task=Interrupted)
    assert finished.code == 128 + signal.SIGTERM, finished
    (run,) = folder.glob("r/good/*/")
    (run / "best").rename(folder / "best")

    def use(test):
        named = ("--train", "--resume", "last")
        action = ("--test", "test_checkpoint_path=last") if test else named
        check(*action, *settings)

    return run / "last", use


class Touch:
    """Makes a file when it is unpickled, if that is allowed."""

    def __reduce__(self):
        return open, ("touched", "w")


@st.composite
def damaged_checkpoints(draw, content):
    """A checkpoint's bytes, damaged; or another pickle in it, with right checksums; or alone."""
    if draw(st.integers(0, 3)):
        return damaged(draw, content)
    pickled = pickle.dumps(
        draw(st.one_of(values, st.just(Touch()), st.just({"snn_state_dict": {"x": Touch()}}))),
        protocol=draw(st.sampled_from([2, 4])),
    )
    if draw(st.booleans()):
        pickled = damaged(draw, pickled)
    if draw(st.booleans()):
        return pickled
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


@cases(0.3)
@given(st.data(), st.booleans())
def test_any_bytes_as_a_checkpoint_are_used_or_refused_in_a_line(good, data, test):
    path, use = good
    with open("last", "wb") as file:
        file.write(data.draw(damaged_checkpoints(path.read_bytes())))
    use(test)


@cases(0.1)
@given(st.data(), st.booleans())
def test_any_value_in_a_checkpoint_is_used_or_refused_in_a_line(good, data, test):
    """One value of a whole checkpoint, at any depth, is another one."""
    path, use = good
    checkpoint = torch.load(path, weights_only=True)
    level = checkpoint
    while True:
        places = sorted(level, key=str) if isinstance(level, dict) else range(len(level))
        place = data.draw(st.sampled_from(places))
        deeper = isinstance(level[place], (dict, list)) and len(level[place]) > 0
        if not deeper or data.draw(st.booleans()):
            break
        level = level[place]
    tensors = st.sampled_from([torch.zeros(3), torch.tensor(2), torch.zeros(2, 3).to_sparse()])
    level[place] = data.draw(st.one_of(values, tensors))
    torch.save(checkpoint, "any_last")
    use(test)


def test_the_malicious_pickle_of_these_tests_is_malicious(folder):
    pickle.loads(pickle.dumps(Touch())).close()
    assert (folder / "touched").exists()
    (folder / "touched").unlink()
