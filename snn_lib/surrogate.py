"""Surrogate gradients, which replace the derivative of the spike's step function.

The forward pass of a neuron is a step, S = 1 if V > 1 else 0, whose derivative is zero almost
everywhere. Training replaces it, in the backward pass only, by a smooth bump around the threshold.

A surrogate of your own is any object with a method ``derivative``. If it has parameters, they are
not trained: no gradient flows into the shape of the bump. Numbers that change in training have to
be attributes of the object or of its class, and to be read as ``self.width``, say.

    class Window:
        def derivative(self, membrane):
            return (torch.abs(membrane - 1.0) < 0.5).to(membrane)
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

THRESHOLD = 1.0


class Surrogate(Protocol):
    """What a neuron takes as its surrogate. No class needs to inherit from it."""

    def derivative(self, membrane: Tensor) -> Tensor:
        """dS/dV at every element of ``membrane``, in its shape."""
        ...


def check_surrogate(surrogate: Surrogate) -> None:
    """Raises a TypeError for what is no surrogate gradient."""
    if isinstance(surrogate, type) or not callable(getattr(surrogate, "derivative", None)):
        raise TypeError(f"surrogate is {surrogate!r}, expected an object with derivative(membrane)")


@dataclass(frozen=True)
class Gaussian:
    """The paper's surrogate, the density of a normal distribution around the threshold.

    dS/dV = exp(-(V - 1)^2 / (2 sigma^2)) / (sqrt(2 pi) sigma)

    Args:
        width: sigma, in units of the threshold.

    Raises:
        ValueError: the width is not a positive number.

    Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
    """

    name: ClassVar[str] = "gaussian"
    width: float = 0.4

    def __post_init__(self) -> None:
        _check_width(self.width)

    def derivative(self, membrane: Tensor) -> Tensor:
        """dS/dV at every element of ``membrane``."""
        distance = membrane - THRESHOLD
        scale = 1.0 / (math.sqrt(2.0 * math.pi) * self.width)
        return scale * torch.exp(distance * distance * (-0.5 / self.width**2))


@dataclass(frozen=True)
class FastSigmoid:
    """SuperSpike's surrogate, whose tails fall with the square of the distance.

    dS/dV = 1 / (1 + |V - 1| / width)^2

    Args:
        width: distance from the threshold at which the derivative has fallen to 1/4, in units of
            the threshold.

    Raises:
        ValueError: the width is not a positive number.

    Source: Zenke and Ganguli, Neural Computation 2018, doi 10.1162/neco_a_01086.
    """

    name: ClassVar[str] = "fast_sigmoid"
    width: float = 0.1

    def __post_init__(self) -> None:
        _check_width(self.width)

    def derivative(self, membrane: Tensor) -> Tensor:
        """dS/dV at every element of ``membrane``."""
        distance = torch.abs(membrane - THRESHOLD)
        return 1.0 / (1.0 + distance * (1.0 / self.width)) ** 2


def _check_width(width: float) -> None:
    if not 0.0 < width < math.inf:  # nan too
        raise ValueError(f"width is {width}, expected a positive number")


# The surrogates that every backend has compiled.
SURROGATES = {surrogate.name: surrogate for surrogate in (Gaussian, FastSigmoid)}
