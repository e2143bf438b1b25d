"""A trained network as one compiled function: one sample, one time step, in microseconds.

    network = compiled(model)
    for x in stream:  # NumPy arrays
        output = network.step(x)

This file has what a user calls. ``description.py`` describes the network, ``arrays.py`` makes
arrays of the description, and ``machine.py`` runs them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from snn_lib.inference import machine
from snn_lib.inference.arrays import Arrays, aligned_zeros, unmasked
from snn_lib.inference.description import Description, describe
from snn_lib.inference.layers import Flattening
from snn_lib.readout import check_lead


def compiled(network: nn.Module, shape: Sequence[int] | None = None) -> "CompiledNetwork":
    """Compiles a trained network for one sample at a time.

    The compiled network computes what ``network`` does in evaluation mode with its present weights,
    from NumPy arrays on the CPU. Filters and neurons give the same bits as PyTorch. The products of
    weights are added up in another order than in PyTorch, and :meth:`CompiledNetwork.run` adds in
    another order than :meth:`CompiledNetwork.step`. So the sums may differ in their last digits,
    and a neuron whose potential is that close to the threshold may fire in one and not in another.

    Before it is returned, what the network's ``forward`` does and each of its layers are compared
    with PyTorch in a run of 32 steps; :func:`snn_lib.inference.description.describe` says what this
    cannot see. A sum or mean over time may run for years:
    :func:`snn_lib.inference.layers.running_sum` says how exact it stays.

    Args:
        network: a :class:`snn_lib.Sequential`, or a module around one. Its layers may be
            ``nn.Linear``, cells (synapses, neurons and your own), :class:`snn_lib.Delay`,
            :class:`snn_lib.Recurrent`, :class:`snn_lib.Repeat`, readouts,
            :class:`snn_lib.readout.Snapshots`, ``nn.Flatten``, and :class:`snn_lib.PerStep` of
            ``nn.Conv2d``, ``nn.MaxPool2d``, ``nn.AvgPool2d`` and, right after weights,
            ``nn.BatchNorm1d`` and ``nn.BatchNorm2d``; before all that compute ``nn.Unflatten`` and
            :class:`snn_lib.ChannelsFirst`. Dropout and ``nn.Identity`` are left out.
        shape: the shape of one step of the input; needed if the first layer does not determine it.

    Raises:
        ValueError: a layer cannot be compiled or computes something else, or the shape is missing;
            see :func:`snn_lib.inference.description.describe`.
        TypeError: the network is no module.
    """
    description = describe(network, shape)
    compare_layers(description)
    return CompiledNetwork(Arrays(description))


def compare_layers(description: Description) -> None:
    """Compares each layer, compiled, with PyTorch on what PyTorch gave it in its run.

    Raises:
        ValueError: a layer computes something else.
    """
    for layer, (x, y) in zip(description.layers, description.run, strict=False):
        if isinstance(layer, Flattening) or not np.isfinite(x).all():
            continue
        places, shape = np.arange(x.shape[1]), (-1, *layer.before)
        alone = replace(description, before=layer.before, after=layer.after, entry=places)
        stream = CompiledNetwork(Arrays(replace(alone, layers=(layer,))))
        output = stream.run(x.reshape(shape)).reshape(len(x), -1)[-len(y) :]  # a readout's last
        known = np.isfinite(y)
        sizes = np.abs(y, where=known, out=np.zeros_like(y))
        tolerance = np.sqrt(np.finfo(y.dtype).eps) * sizes.max(initial=0)
        errors = np.subtract(output, y, where=known, out=np.zeros_like(y))
        if (np.abs(errors) > tolerance).any():
            raise ValueError(
                f"layer {layer.name} computes something else in PyTorch than its kind of layer, or "
                "makes last digits large from step to step: it can be neither compiled nor exported"
            )


class CompiledNetwork:
    """A stream through a compiled network, which keeps its state from one step to the next.

    :func:`compiled` makes the first stream. Only one thread may use a stream at a time.
    Different streams of a network can run in several threads at once, since no step holds the GIL.

    Attributes:
        before, after: the shapes of one step of the input and of the output.
        dtype: the dtype of the output, float32 or float64.
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self.before, self.after, self.dtype = arrays.before, arrays.after, arrays.dtype
        self._state = np.zeros(arrays.states, self.dtype)
        self._values = aligned_zeros(arrays.values, self.dtype)
        room = arrays.widest + machine.GROUP
        self._numbers = np.zeros(room, np.int64)
        self._amounts = np.zeros((machine.BLOCK, room), self.dtype)

    def stream(self) -> "CompiledNetwork":
        """Makes another stream through the same network, at rest; both read the same weights."""
        return CompiledNetwork(self._arrays)

    def reset(self) -> None:
        """Sets the state to zero, for a new sequence."""
        self._state[:] = 0

    def step(self, x: np.ndarray) -> np.ndarray:
        """Runs one time step, from an array of shape ``before`` to one of shape ``after``.

        Raises:
            ValueError: ``x`` has another shape, or a value that is masked or not finite. The state
                then stays as it is.
            TypeError: ``x`` does not hold real numbers.
        """
        return self.run(unmasked(x)[None])[0]

    def peek(self, x: np.ndarray) -> np.ndarray:
        """What :meth:`step` would return, without the step: the state stays as it is."""
        before = self._state.copy()
        try:
            return self.step(x)
        finally:
            self._state[:] = before

    def run(self, x: np.ndarray) -> np.ndarray:
        """Runs a sequence, ``(T, *before)`` to ``(T, *after)``, beginning with the present state.

        If one step is broadcast over time, by ``np.broadcast_to``, a first layer of weights weighs
        it once.

        Raises:
            ValueError, TypeError: as :meth:`step`.
        """
        steps = self._steps(x)
        out = np.empty((len(x), self._arrays.outputs), self.dtype)
        self._run(steps, len(x), out)
        return self._in_order(out).reshape(len(out), *self.after)

    def until_clear(self, x: np.ndarray, lead: float) -> tuple[int, int]:
        """Runs a sequence until one class is ahead of every other.

        It stops at the first step at which the sum of the output since the start of ``x`` is larger
        for one class than for every other by ``lead``, or else after the last step. So does
        :func:`snn_lib.readout.first_lead`.

        Args:
            x: ``(T, *before)``, at least one step.
            lead: by how much the first class has to be ahead of the second.

        Returns:
            The class, and the number of steps that were run.

        Raises:
            ValueError: there are no steps or fewer than two classes, or ``lead`` is negative or
                nan; or as :meth:`step`.
            TypeError: as :meth:`step`.
        """
        steps = self._steps(x)
        if len(x) == 0 or len(self.after) != 1 or self.after[0] < 2:
            raise ValueError(
                f"there are {len(x)} steps and outputs of the shape {self.after}, expected at "
                "least one step and two classes"
            )
        check_lead(lead)
        total = np.zeros((1, self._arrays.outputs), self.dtype)
        done = self._run(steps, len(x), total, True, float(self.dtype.type(lead)))
        return int(self._in_order(total)[0].argmax()), done

    def _steps(self, x: np.ndarray) -> np.ndarray:
        """A sequence as the compiled function takes it: a fresh array, ``(T or 1, features)``."""
        x = unmasked(x)
        if x.shape[1:] != self.before or x.ndim == 0:
            raise ValueError(
                f"a step of the input has the shape {x.shape[1:]}, expected {self.before}"
            )
        if x.strides[0] == 0:  # every step is the same
            x = x[:1]
        x = x.astype(self.dtype, order="C", casting="same_kind")
        return x.reshape(len(x), math.prod(self.before))

    def _run(
        self, x: np.ndarray, total: int, out: np.ndarray, summing: bool = False, lead: float = 0.0
    ) -> int:
        arrays = self._arrays
        steps = x if arrays.entry is None else x.take(arrays.entry, axis=1)
        shared = arrays.layers, arrays.coefficients, arrays.table
        own = self._state, self._values, self._numbers, self._amounts
        done = machine.run(*shared, *own, steps, total, out, summing, lead)
        if done == 0 and len(x) > 0:
            step, feature = np.argwhere(~np.isfinite(x))[0]
            channel = ", ".join(str(index) for index in np.unravel_index(feature, self.before))
            raise ValueError(
                f"the input is {x[step, feature]} in step {step}, channel {channel}: expected "
                f"finite numbers in {self.dtype}"
            )
        return done

    def _in_order(self, out: np.ndarray) -> np.ndarray:
        """The last layer's output in the order of PyTorch's features."""
        return out if self._arrays.leave is None else out.take(self._arrays.leave, axis=1)
