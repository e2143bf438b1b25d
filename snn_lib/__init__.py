"""Spiking neural networks as networks of trainable IIR filters.

This package exports the model: layers, containers and first weights. ``snn_lib.tasks`` and
``snn_lib.training`` train it, and ``snn_lib.inspection`` looks into it. :func:`load` loads what
was trained.
"""

from typing import TYPE_CHECKING

from snn_lib.cells import (
    AdaptiveNeuron,
    Cell,
    Delay,
    DualExponentialSynapse,
    IIRSynapse,
    LowPassSynapse,
    Recurrent,
    ResonantSynapse,
    ResonateAndFireNeuron,
    SpikingNeuron,
    parameter_groups,
)
from snn_lib.chunks import Chunked
from snn_lib.containers import (
    ChannelsFirst,
    Output,
    PerStep,
    Repeat,
    Sequential,
    StatefulModule,
    Votes,
    detach,
)
from snn_lib.initialisation import answer_from_the_start, fire_from_the_start
from snn_lib.kernels import use_backend
from snn_lib.surrogate import FastSigmoid, Gaussian
from snn_lib.time_constants import log_spaced

__version__ = "0.3.0"

__all__ = [
    "AdaptiveNeuron",
    "Cell",
    "ChannelsFirst",
    "Chunked",
    "Delay",
    "DualExponentialSynapse",
    "FastSigmoid",
    "Gaussian",
    "IIRSynapse",
    "LowPassSynapse",
    "Output",
    "PerStep",
    "Recurrent",
    "Repeat",
    "ResonantSynapse",
    "ResonateAndFireNeuron",
    "Sequential",
    "SpikingNeuron",
    "StatefulModule",
    "Votes",
    "answer_from_the_start",
    "detach",
    "fire_from_the_start",
    "load",
    "log_spaced",
    "parameter_groups",
    "use_backend",
]


if TYPE_CHECKING:
    from snn_lib.training.loading import load
else:

    def __getattr__(name):
        """Imports ``load`` when it is asked for, since layers alone do not need what it needs."""
        if name == "load":
            from snn_lib.training.loading import load

            return load
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
