"""Finds which steps of the sequences each call of a layer runs.

A model may call its layers with all steps at once, in chunks or step by step, and some of them
several times at each step. To count what they do, one must know which sequences are new and which
steps are padding.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.chunks import Chunked, current_chunk
from snn_lib.containers import PerStep
from snn_lib.observing import bind_call


@dataclass
class Run:
    """A call of the model, or of a module that a ``Chunked`` in it runs.

    Attributes:
        begin: the step of the sequences at which the call begins.
        steps: how many steps it runs; ``None`` if nothing is padded.
        uses: how often it has called each layer.
        steps_run: how many steps each layer has run, of those layers that do not run all at once.
    """

    begin: int = 0
    steps: int | None = None
    uses: Counter = field(default_factory=Counter)
    steps_run: Counter = field(default_factory=Counter)


class Timeline:
    """Follows the calls of a model and of its layers.

    Attributes:
        lengths: the steps of each sequence of the present batch, int64 ``(B,)``, if it is padded.
        batch: B, once it is known.
        trouble: why it is unknown which steps are padding; ``None`` if it is known.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        self.batch: int | None = None
        self.trouble: str | None = None
        self._runs: list[Run] = []  # the calls that are running, with the innermost last
        self._end = 0  # the step after those that the model has run last
        self._first: str | None = None  # the layer that is called first without the model
        self._has_called = False  # whether this run of the model has called a layer

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """The context in which the timeline follows the calls of a model, by hooks."""
        with ExitStack() as handles:
            for part in model.modules():
                if isinstance(part, PerStep):
                    fold = part.register_forward_pre_hook(self.fold, with_kwargs=True)
                    handles.enter_context(fold)
            for run in (model, *(m.module for m in model.modules() if isinstance(m, Chunked))):
                enter = run.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
                leave = run.register_forward_hook(self.leave, with_kwargs=True, always_call=True)
                handles.enter_context(enter)
                handles.enter_context(leave)
            yield

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes that a run begins; a forward pre-hook."""
        if not self._runs:
            self._has_called, self.batch = False, None
        self._runs.append(run := Run())
        if self.lengths is None:
            return
        given = bind_call(module, args, kwargs)
        x, batch = next(iter(given.values())), len(self.lengths)
        shape = tuple((x if isinstance(x, Tensor) else x[0]).shape[:2])
        if batch not in shape:
            self.trouble = (
                f"the lengths are of {batch} sequences, but the model's input begins with the "
                f"dimensions {shape}, neither (T, B) nor (B, T)"
            )
            return
        run.steps = shape[0] if shape[1] == batch else shape[1]
        if (chunk := current_chunk()) is not None:
            run.begin = chunk.start
        elif given.get("state") is not None:
            run.begin = self._end
        self._end = run.begin + run.steps

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Notes that a run has ended; a forward hook."""
        self._runs.pop()

    def fold(self, step: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes how many sequences a ``PerStep`` is given; a forward pre-hook."""
        self.batch = next(iter(bind_call(step, args, kwargs).values())).shape[1]

    def new_sequences(self, name: str, batch: int, fresh: bool) -> int:
        """How many sequences begin with a call of a layer, which is ``fresh`` without a state."""
        self.batch = batch
        if self._runs:
            first, self._has_called = not self._has_called, True
        else:
            self._first = self._first or name
            first = name == self._first
        return batch if first and fresh else 0

    def use(self, name: str) -> int:
        """The number of this call of layer ``name`` among those of this run, from 0 on."""
        if not self._runs:
            return 0
        self._runs[-1].uses[name] += 1
        return self._runs[-1].uses[name] - 1

    def own(self, name: str, positions: int, fresh: bool = True) -> tuple[Tensor, int] | None:
        """Which of the T * B ``positions`` of a call of layer ``name`` are not padding.

        Returns a mask, bool ``(T, B)``, and the step of the sequences at which the call begins, or
        ``None`` if nothing is padded or there is :attr:`trouble`. A call is ``fresh`` without a
        state.
        """
        if self.lengths is None or self.trouble:
            return None
        steps = positions // len(self.lengths)
        run = self._runs[-1] if self._runs else Run()
        begin = run.begin
        if not self._runs and not fresh:
            self.trouble = f"layer {name} is given a state, but not by a call of the model"
        elif run.steps not in (None, steps):
            begin += run.steps_run[name]
            run.steps_run[name] += steps
            if run.steps_run[name] > run.steps:
                self.trouble = (
                    f"layer {name} has run {run.steps_run[name]} steps in parts, but the model is "
                    f"given {run.steps}"
                )
        time = torch.arange(begin, begin + steps, device=self.lengths.device)
        return None if self.trouble else (time[:, None] < self.lengths, begin)
