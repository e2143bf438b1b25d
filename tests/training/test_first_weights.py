"""First weights: found on all the training data, only where training starts from scratch."""

from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from recorded import qtdb_files, some_beats
from refusing import refusal
from running import ROOT, SCRIPTS, SmallSNN, load, the_run, tiny, train
from torch import nn
from torch.nn.utils import prune

from snn_lib.errors import InputError, RunError
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.training import distributed, experiment
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment, Stopped
from snn_lib.training.loading import arguments_of_main

FEW = {  # settings with which a script's data is read in a moment
    "mnist_config.training_size": 150,
    "mnist_config.validation_size": 20,
    "events.training_size": 30,
    "events.validation_size": 10,
    "hyperparameters.batch_size": 7,
    "hyperparameters.epoch": 1,
}


def before_the_first_batch(build_model, task, initialise, config, rank, world, monkeypatch):
    """As training begins in a process: parameters and buffers, samples, and what dropout draws."""

    def stop(*_):
        drawn.append(torch.randint(2**31, ()).item())
        raise Stopped

    drawn = []
    with monkeypatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(distributed, "rank_and_world", lambda: (rank, world))
        patch.setattr(experiment, "DistributedDataParallel", lambda model: model)
        patch.setattr(experiment, "begin_run", stop)
        trial = Experiment(build_model, task, config, initialise)
        with pytest.raises(Stopped):
            trial.train()
    samples = sum(batch.x.shape[1] for batch in task.batches("train"))
    return trial.model.state_dict(), samples, *drawn


@pytest.mark.parametrize("name", SCRIPTS)
def test_first_weights_are_the_same_with_one_process_and_with_two(name, tmp_path, monkeypatch):
    if name == "time_series":
        pytest.importorskip("aeon")
    build_model, task, initialise = arguments_of_main(ROOT / f"{name}.py")
    config = load_config(task.config_class, ROOT / f"{name}.yaml", [f"runs_path={tmp_path}"])
    for key, value in FEW.items():
        section, option = key.split(".")
        if hasattr(getattr(config, section, None), option):
            setattr(getattr(config, section), option, value)
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    qtdb_files(tmp_path, *some_beats(count=60))
    if name != "associative_memory":  # its data set is a file
        config.dataset_path = str(tmp_path)
    config.device = "cpu"
    states, samples, drawn = zip(
        *(
            before_the_first_batch(build_model, task, initialise, config, rank, world, monkeypatch)
            for rank, world in ((0, 1), (0, 2), (1, 2))
        ),
        strict=True,
    )
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    assert 0 < samples[1] < samples[0] == samples[1] + samples[2]  # then they share the data
    assert drawn[0] == drawn[1] != drawn[2]  # and each has dropout of its own


def test_initialise_is_called_where_training_starts_from_scratch_and_nowhere_else(tmp_path):
    calls = []

    def initialise(model, task):
        assert not torch.is_grad_enabled()
        calls.append(task.device)
        nn.init.constant_(model.layers[4].bias, 0.25)

    more = ("scheduler.scheduler_choice=none", "optimizer.AdamW.lr=1e-9")
    settings = tiny(tmp_path, *more, "hyperparameters.epoch=1")
    train(*settings, model=SmallSNN, initialise=initialise)
    assert calls == [torch.device("cpu")]
    bias = load(the_run(tmp_path) / "last")["snn_state_dict"]["layers.4.bias"]
    torch.testing.assert_close(bias, torch.full((10,), 0.25), rtol=0, atol=1e-6)
    longer = [*settings, "hyperparameters.epoch=2"]
    train("--resume", *longer, model=SmallSNN, initialise=initialise)
    assert len(calls) == 1


@pytest.mark.parametrize("use", ["train", "test"])
def test_an_experiment_that_was_trained_or_tested_is_not_trained_from_the_start_again(
    tmp_path, use
):
    settings = tiny(tmp_path, "hyperparameters.epoch=1")
    config = load_config(DigitConfig, ROOT / "snn_mlp_1.yaml", settings)
    Experiment(SmallSNN, DigitClassification(), config).train()
    again = Experiment(SmallSNN, DigitClassification(), config)
    getattr(again, use)()
    with pytest.raises(InputError, match="has been trained or loaded already: make a new Exp"):
        again.train()


def test_what_is_trained_is_decided_where_a_resumed_run_finds_it_again(tmp_path):
    """``initialise`` is not called when a run is resumed."""

    def freeze(model, task):
        next(model.parameters()).requires_grad_(False)

    config = load_config(DigitConfig, None, [f"runs_path={tmp_path}", *tiny(tmp_path)])
    trial = Experiment(SmallSNN, DigitClassification(), config, freeze)
    assert "initialise changes which parameters are trained" in refusal(trial.train)

    def replace(model, task):
        prune.identity(next(one for one in model.modules() if isinstance(one, nn.Linear)), "weight")

    def remove(model, task):
        model.layers[1].bias = None

    for change in (replace, remove):
        trial = Experiment(SmallSNN, DigitClassification(), config, change)
        with pytest.raises(RunError, match="initialise changes the layers and not only their wei"):
            trial.train()
