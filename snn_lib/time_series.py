"""The network for time series, and the command that trains it: archive sets, or files of yours.

    python -m snn_lib.time_series mine.npz        # trains; np.savez("mine.npz", x=x, y=y)
    python -m snn_lib.time_series GunPoint        # any UCR or UEA set
    python -m snn_lib.time_series mine.npz --test # if it has x_test and y_test, too

Random filters of many time scales remember what has just been and what was long ago. Neurons with
random weights read them. A neuron fires while what they remember fits its weights, so its firing
rate says how much of the sequence does. Each neuron has a synapse after it. If its memory is long,
an early spike counts more than a late one. The last layer weighs the synapses' means over time. It
alone learns, by ridge regression: no gradients are needed.

MiniRocket reads its random features in the same way (Dempster, Schmidt, Webb, KDD 2021, doi
10.1145/3447548.3467231). Here the features are spiking neurons, which also work step by step.

SpikingClassifier in snn_lib.classifier is the same network with the interface of scikit-learn and
aeon. The model follows Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snn_lib import (
    Gaussian,
    LowPassSynapse,
    Repeat,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    answer_from_the_start,
    log_spaced,
)
from snn_lib.data.preparation import NetworkInput, SeriesPreparation
from snn_lib.data.series import divisors
from snn_lib.readout import within
from snn_lib.tasks.time_series import TimeSeries, TimeSeriesConfig, TimeSeriesHyperparameters
from snn_lib.training import main
from snn_lib.training.display import say
from snn_lib.training.distributed import rank_and_world

CALIBRATION = 2**24  # numbers from which the first weights are found, that is 64 MiB
VALUED = "--config_file", "--export", "--resume"  # whose value is the next word
NEARBY = 4  # values of a current to either side, between which its threshold may be
ROUNDING = 1e-5  # values of a current of deviation 1 that are nearer than this may be the same


def build_network(
    settings: TimeSeriesHyperparameters, preparation: SeriesPreparation, outputs: int
) -> Sequential:
    """The network: filters of every input, neurons that hear some of them, and a linear layer.

    Args:
        settings: the sizes, and the first values of filters and neurons.
        preparation: of its input; memories and periods are spread up to its longest sequence.
        outputs: classes, or numbers.

    Shape:
        Input over time ``(T, B, inputs)`` to output ``(T, B, outputs)`` and the state. The answer
        is the mean of the output over the steps of the sequence.
    """
    copies = -(-settings.filters // preparation.inputs)
    filters, steps = copies * preparation.inputs, preparation.steps
    shortest, longest = settings.shortest_memory, settings.longest_memory * steps
    # Filters that no gradient changes are stable. The constraint would move the slowest ones.
    constraint = settings.constraint if settings.epoch else "none"
    return Sequential(
        Repeat(copies),
        ResonantSynapse(
            filters,
            log_spaced(shortest, max(longest, 2 * shortest)),
            log_spaced(min(settings.fewest_cycles / steps, 0.25), 0.25),
            train_coefficients=settings.train_coefficients,
            constraint=constraint,
            margin=1e-5,  # the slowest filters are near the edge of the stable set
        ),
        nn.Linear(filters, settings.neurons),
        SpikingNeuron(
            settings.neurons,
            settings.tau_m,
            settings.membrane_filter,
            settings.reset_strength,
            Gaussian(settings.surrogate_width),
            settings.dropout,
        ),
        LowPassSynapse(  # half of them remember nothing, in the others early spikes count more
            settings.neurons,
            log_spaced(1 / steps, steps),
            train_coefficients=settings.train_coefficients,
            constraint=constraint,
            margin=1e-5,
            unit_energy=True,
        ),
        nn.Linear(settings.neurons, outputs),
    )


@torch.no_grad()
def draw_weights(
    network: Sequential, settings: TimeSeriesHyperparameters, sample: NetworkInput
) -> None:
    """Draws the weights of all layers but the last, as suits the data.

    The filters become equally loud. Each neuron hears a few of them, drawn at random, by a current
    of deviation 1. It has a share of the steps of its own, drawn at random, in which this current
    is above the threshold.

    Args:
        network: from :func:`build_network`.
        settings: the same.
        sample: sequences from all over the training data.
    """
    repeat, filters, weights, *_ = network
    psp = filters(repeat(sample.x))[0]
    if sample.lengths is not None:
        psp = psp[within(psp, sample.lengths)[..., 0]]
    psp = psp.flatten(0, -2)
    loudness = divisors(psp.std(0, correction=0))
    filters.beta /= loudness

    neurons, inputs = weights.weight.shape
    steps = torch.randperm(len(psp))[: max(CALIBRATION // (neurons + inputs), 1)]
    psp = psp[steps.to(psp.device)] / loudness
    drawn = torch.randn(neurons, inputs)
    order = torch.rand(neurons, inputs).argsort(1).argsort(1)
    drawn = drawn.where(order < settings.heard, 0.0).to(psp.device)
    current = psp @ drawn.T
    deviation = divisors(current.std(0, correction=0))
    shares = torch.empty(neurons).uniform_(settings.lowest_rate, settings.highest_rate)
    place = ((1 - shares) * (len(psp) - 1)).long().to(psp.device)
    # Rounding would decide whether a current on the threshold fires. So it lies in the widest gap
    # nearby or, where nearby values differ by rounding alone, as while channels rest, at their end.
    values = (current / deviation).T.contiguous()
    if values.device.type == "cpu" and values.dtype.itemsize >= 4:
        values.numpy().sort()  # ten times faster than PyTorch
    else:
        values = values.sort().values
    values = values.T
    nearby = (place + torch.arange(-NEARBY, NEARBY + 1).to(place)[:, None]).clamp(0, len(psp) - 1)
    gaps = values.gather(0, nearby).diff(dim=0)
    widest = gaps.argmax(0)
    ends = nearby.gather(0, torch.stack([widest, widest + 1]))
    for neuron in (gaps.amax(0) < ROUNDING).nonzero()[:, 0]:
        own, at = values[:, neuron], place[neuron]
        alike = ((own - own[at]).abs() < ROUNDING).sum()
        (apart,) = (own.diff() >= ROUNDING).nonzero(as_tuple=True)
        distance = (apart - at).abs()
        if len(apart) and distance.min() <= alike + len(own) // 100:  # so that its share stays
            below = apart[distance.argmin()]
            ends[:, neuron] = torch.stack([below, below + 1])
    weights.weight.copy_(drawn / deviation[:, None])
    weights.bias.copy_(1 - values.gather(0, ends).mean(0))


def build_model(config: TimeSeriesConfig, task: TimeSeries) -> Sequential:
    """The network for the data that the task has read."""
    return build_network(config.hyperparameters, task.preparation, len(task.classes))


def initialise(network: Sequential, task: TimeSeries) -> dict[str, Any]:
    """Finds all weights on the training sequences, and says what has been read.

    Returns:
        The sums of loss and metrics over the sequences, each answered by a fit without it.
    """
    if rank_and_world()[0] == 0:
        say(task.contents)
    draw_weights(network, task.config.hyperparameters, task.sample())
    answers = answer_from_the_start(network, network[-1], task.training_sequences())
    return task.cross_entropy(network.eval(), answers, task.training_labels())[1]


def complete(words: Sequence[str]) -> list[str]:
    """The words of the command as those of an experiment, where the data is a setting.

    The first word that is neither an option nor a setting is the data. (A path with ``=`` is given
    by ``dataset=``.) It also names the run, unless the words name a checkpoint, whose run has a
    name.
    """
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    plain = {
        place: before
        for place, (before, word) in enumerate(pairwise(["", *words]))
        if "=" not in word and not word.startswith("-")
    }
    place = next((place for place, before in plain.items() if before not in VALUED), None)
    if place is None or "dataset" in settings:
        if any(word.startswith("-") for word in words):
            return [*words]
        return ["--train", "dataset=", *words]  # which is refused unless data is named after it
    data, given = words[place], []
    if "--export" not in {word.partition("=")[0] for word in words}:
        given += [f"dataset={data}", *["--train"] * ("--test" not in words)]
    path = settings.get("test_checkpoint_path", "").strip("\"'") or settings.get("--resume")
    if not path and "--resume" not in plain.values():
        stem = re.sub(r"\W", "_", Path(data).stem.removesuffix("_TRAIN"))
        given.append(f"name={stem[:100] or 'time_series'}")  # by which the network is found
    return [*given, *words[:place], *words[place + 1 :]]


if __name__ == "__main__":
    main(__file__, build_model, TimeSeries(), initialise, complete(sys.argv[1:]))
