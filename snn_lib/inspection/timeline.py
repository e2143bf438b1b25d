"""Finds which steps of the sequences each call of a layer runs.

A model may call its layers with all steps at once, in chunks or step by step, and some of them
several times at each step. Three rules say which steps a call of a layer runs:

- A call of the model without a state begins at step 0. A call with a state goes on where the call
  before it ended. A chunk of a ``Chunked`` knows where it begins.
- A layer that is given all steps of this call or chunk runs all of them, each time it is called.
- A layer that is given fewer steps runs them in parts: each call goes on where the last one ended.

For example, a model is given steps 0 to 5, and then, with the state, steps 6 to 9. In the second
call its first layer is given four steps: these are the steps 6 to 9. Its second layer is called
four times, with a step each: these are step 6, step 7, step 8 and step 9.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.observing import bind_call
from snn_lib.recomputing import current_chunk


class Call(NamedTuple):
    """Where a call of a layer belongs.

    Attributes:
        number: how often this call of the model, or this chunk, has called the layer before.
        begin: the step of the sequences at which it begins, if they are padded.
        own: which of its steps are not padding, bool ``(T, B)``; ``None`` if all are the
            sequences' own.
    """

    number: int
    begin: int = 0
    own: Tensor | None = None


@dataclass
class Run:
    """A call of the model.

    Each chunk of a ``Chunked`` has counts of its own, by the step at which the chunk starts.

    Attributes:
        fresh: whether it is given no state, and so begins new sequences.
        is_chunk: whether a ``Chunked`` has called the model; otherwise there may be one inside it.
        start: the step of the sequences at which it begins.
        steps: how many steps it runs; ``None`` if nothing is padded.
        has_begun: whether it has called a layer that tells of new sequences.
        calls: how often it has called each layer, by the layer's name and the chunk.
        steps_in_parts: how many steps a layer has run in parts, by the same.
    """

    fresh: bool = True
    is_chunk: bool = False
    start: int = 0
    steps: int | None = None
    has_begun: bool = False
    calls: Counter = field(default_factory=Counter)
    steps_in_parts: Counter = field(default_factory=Counter)


class Timeline:
    """Follows the calls of a model and of its layers.

    Attributes:
        lengths: the steps of each sequence of the present batch, int64 ``(B,)``; ``None`` if
            nothing is padded or it is unknown what is.
        trouble: why it is unknown which steps are padding; ``None`` if it is known.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        self.trouble: str | None = None
        self._run: Run | None = None  # the call of the model that is running
        self._end = 0  # the step after those that the model has run last
        self._first: str | None = None  # the layer that is called first without the model

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """The context in which the timeline follows the calls of a model, by hooks."""
        enter = model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        leave = model.register_forward_hook(self._leave, always_call=True)
        with enter, leave:
            yield

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes that a call of the model begins; a forward pre-hook."""
        given = bind_call(model, args, kwargs)
        fresh = given.get("state") is None
        self._run = run = Run(fresh, is_chunk=current_chunk() is not None)
        if self.lengths is None:
            return
        x, batch = next(iter(given.values())), len(self.lengths)
        shape = tuple((x if isinstance(x, Tensor) else x[0]).shape[:2])
        if batch not in shape:
            self._give_up(
                f"the lengths are of {batch} sequences, but the model's input begins with the "
                f"dimensions {shape}, neither (T, B) nor (B, T)"
            )
            return
        run.start = 0 if fresh else self._end
        run.steps = shape[0] if shape[1] == batch else shape[1]
        self._end = run.start + run.steps

    def _leave(self, model: nn.Module, args: tuple, result: Any) -> None:
        """Notes that a call of the model has ended; a forward hook."""
        self._run = None

    def begins_a_run(self, name: str) -> bool:
        """Whether a call of layer ``name`` is the first in a call of the model without a state.

        If layers are called without the model, a run begins with the layer that was first of all.
        """
        if self._run is None:
            self._first = self._first or name
            return name == self._first
        has_begun, self._run.has_begun = self._run.has_begun, True
        return self._run.fresh and not has_begun

    def place(self, name: str, steps: int, fresh: bool = True) -> Call:
        """Finds where a call of layer ``name`` with so many steps belongs.

        A call is ``fresh`` without a state.
        """
        run = self._run or Run()
        chunk = None if run.is_chunk else current_chunk()
        start = run.start if chunk is None else run.start + chunk.start
        whole = (chunk or run).steps
        key = name, start
        number, begin = run.calls[key], start
        run.calls[key] += 1
        if self.lengths is None:
            return Call(number)
        if self._run is None and not fresh:
            self._give_up(f"layer {name} is given a state, but not by a call of the model")
        elif whole not in (None, steps):
            begin += run.steps_in_parts[key]
            run.steps_in_parts[key] += steps
            if begin + steps > start + whole:
                self._give_up(
                    f"layer {name} has run {run.steps_in_parts[key]} steps in parts, but the model "
                    f"is given {whole}"
                )
        if self.lengths is None:
            return Call(number)
        time = torch.arange(begin, begin + steps, device=self.lengths.device)
        return Call(number, begin, time[:, None] < self.lengths)

    def _give_up(self, why: str) -> None:
        self.trouble, self.lengths = why, None
