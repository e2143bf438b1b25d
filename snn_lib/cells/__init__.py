"""Cells: layers that carry a state from step to step, each written once, as one step.

Read ``synapse`` and ``spiking_neuron`` first, the two of the paper. ``cell`` has what all have
in common, and how one of your own is written.
"""

from snn_lib.cells.adaptive_neuron import AdaptiveNeuron
from snn_lib.cells.cell import Cell, Constrained, is_spiking, parameter_groups
from snn_lib.cells.delay import Delay
from snn_lib.cells.recurrent import Recurrent
from snn_lib.cells.resonate_and_fire import ResonateAndFireNeuron
from snn_lib.cells.spiking_neuron import SpikingNeuron
from snn_lib.cells.synapse import (
    DualExponentialSynapse,
    IIRSynapse,
    LowPassSynapse,
    ResonantSynapse,
)

__all__ = [
    "AdaptiveNeuron",
    "Cell",
    "Constrained",
    "Delay",
    "DualExponentialSynapse",
    "IIRSynapse",
    "LowPassSynapse",
    "Recurrent",
    "ResonantSynapse",
    "ResonateAndFireNeuron",
    "SpikingNeuron",
    "is_spiking",
    "parameter_groups",
]
