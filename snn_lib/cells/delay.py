"""Delays: each channel arrives later by its own number of steps.

    y[t] = (1 - part) x[t - whole] + part x[t - whole - 1],  delay = whole + part

A fractional delay lies between two neighbouring steps, so it has a gradient, the difference of the
two: dy[t]/d delay = x[t - whole - 1] - x[t - whole]. Before the weights a delay is that of an axon.
After :class:`snn_lib.Repeat`, each input has several.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.cells.cell import Constrained, autocast_dtype, first_values, straight_through
from snn_lib.containers import Output, feature_shape, last_steps, whole_number
from snn_lib.functional import (
    channels_last,
    check_device,
    check_entries,
    check_features,
    check_sequence,
    check_shape,
    fold,
    in_dtype,
    over_positions,
    unfold,
)
from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.kernels.delays import interpolate
from snn_lib.time_constants import PerChannel, per_channel


class Delay(Constrained):
    """Delays each channel by its own number of steps, which can be trained.

    Two inputs, each with 8 delays that are drawn at random and then learned:

        Sequential(Repeat(8), Delay(16, lambda shape: 20 * torch.rand(shape), longest=20))

    Args:
        shape: the channels: their number, or the feature shape such as ``(C, H, W)``; ``(C, 1, 1)``
            for maps of any size, whose positions share the delay of their channel.
        steps: the delays in steps, from 0 to ``longest``: a number for all channels, a tensor of
            the channels' shape, or a function of this shape.
        longest: the longest delay, a whole number of steps. So many steps of input are remembered.
        train: whether the delays are parameters. The layer computes with the nearest ones in
            [0, ``longest``], in any training loop, as a constrained :class:`snn_lib.IIRSynapse`
            does with its coefficients.

    Attributes:
        steps: the delays, ``(*shape)``.

    Shape:
        - x: ``(T, B, *shape)``.
        - state: the last ``longest`` inputs, oldest first, ``(longest, B, *shape)``, in a tuple.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns the delayed channels ``(T, B, *shape)`` and the new state. They are in the dtype
          of the delays; under autocast in that of autocast, if the delays are in float32.

    Raises:
        ValueError: a delay lies outside [0, ``longest``], ``longest`` is not a whole number of at
            least 1, or a shape is wrong.
    """

    takes_expanded = True
    coefficients = ("steps",)
    products = 2  # how often a channel multiplies in a step

    def __init__(
        self, shape: int | Sequence[int], steps: PerChannel, longest: int, train: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.longest = feature_shape(shape), whole_number(longest, "longest")
        first = first_values(per_channel(steps, self.shape, "steps"), self.shape, "steps")
        if refused := self._refusal("steps", first):
            raise ValueError(*refused)
        delays = torch.empty(self.shape).copy_(first)  # on the default device
        if train:
            self.steps = nn.Parameter(delays)
        else:
            self.register_buffer("steps", delays)

    def effective_coefficients(self) -> dict[str, Tensor]:
        """The delays that the layer computes with: the nearest ones in [0, ``longest``]."""
        return {"steps": straight_through(self.steps, lambda d: d.clamp(0.0, self.longest))}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        loaded = state_dict.get(f"{prefix}steps")
        if isinstance(loaded, Tensor) and not loaded.is_meta:
            others[-1].extend(self._refusal(f"{prefix}steps", loaded))

    def _refusal(self, name: str, delays: Tensor) -> list[str]:
        """What is wrong with delays: none, or one message."""
        outside = delays[~((delays >= 0) & (delays <= self.longest))]  # nan too
        return [
            f"{name} is {wrong:g}, expected a delay in [0, {self.longest}]" for wrong in outside[:1]
        ]

    def forward(
        self, x: Tensor, state: tuple[Tensor] | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Delays all time steps; see the class for shapes."""
        check_sequence("x", x)
        check_features(x, self.shape)
        features, last, delays = (
            x.shape[2:],
            channels_last(x),
            self.coefficients_of_call()["steps"],
        )
        check_device("x", x, delays.device)
        own = delays.dtype if delays.dtype in COMPUTE_DTYPES else torch.float32
        dtype = autocast_dtype(delays) or delays.dtype
        channels = over_positions(delays, features, 0)
        x = fold(in_dtype(x, own, "x"), 2, last)
        if state is None:
            before = x.new_zeros(self.longest, *x.shape[1:])
        else:
            check_entries(state, ["past"])
            check_shape("state", state[0], (self.longest, x.shape[1], *features))
            before = fold(in_dtype(state[0], own, "state"), 2, last)
        sequence = torch.cat([before, x])
        start, parts = self._places(fold(channels[None].to(own), 1, last)[0])
        output = unfold(interpolate(sequence, start, parts, x.shape[0]), features, last)
        after = unfold(last_steps(sequence, self.longest, lengths), features, last)
        return Output(in_dtype(output, dtype, "the output"), (after,))

    def _places(self, delays: Tensor) -> tuple[Tensor, Tensor]:
        """Where each channel begins in its past and input, and the parts of this step and the next.

        An undefined delay begins anywhere. Its parts, and so its output, are undefined.
        """
        # Low precision may have rounded it up. It is to have a gradient there, too.
        delays = straight_through(delays, lambda d: d.clamp(max=self.longest))
        whole = delays.detach().nan_to_num().floor().clamp(0, self.longest - 1)
        part = delays - whole
        return self.longest - 1 - whole.long(), torch.stack([part, 1 - part])

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.shape}, longest={self.longest}"
