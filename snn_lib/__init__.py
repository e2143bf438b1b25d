"""Spiking neural networks as networks of trainable IIR filters."""

from snn_lib.containers import PerStep, Sequential
from snn_lib.kernels import use_backend
from snn_lib.neurons import SpikingNeuron
from snn_lib.surrogate import FastSigmoid, Gaussian
from snn_lib.synapses import DualExponentialSynapse, IIRSynapse, LowPassSynapse

__all__ = [
    "DualExponentialSynapse",
    "FastSigmoid",
    "Gaussian",
    "IIRSynapse",
    "LowPassSynapse",
    "PerStep",
    "Sequential",
    "SpikingNeuron",
    "use_backend",
]
