"""Synapses of given coefficients, and the poles of filters by NumPy."""

import numpy as np
import torch

from snn_lib.cells import IIRSynapse

MARGIN = 1e-3


def filters(alphas, dtype=torch.float64, constraint="none"):
    """A synapse whose channel i has the coefficients ``alphas[i]``."""
    synapse = IIRSynapse(len(alphas), alphas[0], (1.0,), constraint=constraint, margin=MARGIN)
    synapse.to(dtype)
    with torch.no_grad():
        synapse.alpha.copy_(torch.tensor(alphas, dtype=torch.float64).T)
    return synapse


def numpy_poles(alpha):
    return np.roots([1.0, *(-np.asarray(alpha, dtype=np.float64))])


def from_poles(*poles):
    """alpha_1 ... alpha_P of the filter with these poles."""
    return tuple(-np.poly(poles).real[1:])
