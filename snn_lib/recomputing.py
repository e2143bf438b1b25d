"""The chunk of a sequence that runs, and what both of its runs must agree on.

:class:`snn_lib.Chunked` runs a chunk a second time for the backward pass. Both runs draw the same
dropout and take the same ways.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snn_lib.functional import draw_seed


@dataclass
class Seed:
    """The seed of one layer's dropout, which the first chunk draws for all chunks.

    Attributes:
        key: the number drawn, int64 ``()``.
        elements: how many elements the layer has had in the chunks so far.
    """

    key: Tensor
    elements: int = 0


@dataclass
class Chunk:
    """The chunk that a :class:`Chunked` runs.

    Attributes:
        start: the step of the sequence that it begins with.
        steps: how many steps it has.
        seeds: the seeds of the whole sequence, in the order in which layers ask for them.
        runs: how often it has begun to run; the backward pass runs it a second time.
        used: of each seed that this chunk used: the key, the number of the chunk's first element,
            and whether the chunk drew the key itself.
        place: how many seeds the current run has used.
        decisions: what :func:`decide` was told in the first run; the current one has made so many.
        given: the versions of the sequences and states that it was given, and the modes of the
            module's parts after its first run.
        read: the versions of the parameters and buffers that it read.
    """

    start: int
    steps: int
    seeds: list[Seed]
    runs: int = 0
    used: list[tuple[Tensor, int, bool]] = field(default_factory=list)
    place: int = 0
    decisions: list[bool] = field(default_factory=list)
    decided: int = 0
    given: tuple[list[int], list[bool]] | None = None
    read: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def run(self) -> Iterator[None]:
        """The context in which its modules run."""
        self.runs, self.place, self.decided = self.runs + 1, 0, 0
        token = _chunk.set(self)
        try:
            yield
        finally:
            _chunk.reset(token)

    def seed(self, draw: Callable[[], Tensor], elements: int) -> Tensor:
        """The next layer's seed, int64 ``(2,)``: its key, and the number of its first element."""
        if self.runs == 1:
            drew = self.place == len(self.seeds)
            if drew:
                self.seeds.append(Seed(draw()[0]))
            seed = self.seeds[self.place]
            self.used.append((seed.key, seed.elements, drew))
            seed.elements += elements
        key, first, drew = self.used[self.place]
        if self.runs > 1 and drew:
            draw()  # so that the generator goes on as it did in the first run
        self.place += 1
        return torch.stack([key, torch.full_like(key, first)])


_chunk: ContextVar[Chunk | None] = ContextVar("chunk", default=None)


def current_chunk() -> Chunk | None:
    """The chunk that runs, inside :class:`Chunked`; ``None`` elsewhere and in compiled code."""
    return None if torch.compiler.is_compiling() else _chunk.get()


def is_recomputing() -> bool:
    """Whether a :class:`Chunked` runs its module once more, for the backward pass.

    A forward hook that counts or collects has seen this chunk already.
    """
    chunk = current_chunk()
    return chunk is not None and chunk.runs > 1


def decide(choose: Callable[[], bool]) -> bool:
    """What ``choose`` says; if a chunk runs again, what it said then.

    A module that runs in one of two ways, which keep different tensors for the backward pass, must
    run in the same way both times.
    """
    chunk = current_chunk()
    if chunk is None:
        return choose()
    if chunk.runs == 1:
        chunk.decisions.append(choose())
    chunk.decided += 1
    return chunk.decisions[chunk.decided - 1]


def dropout_seed(current: Tensor) -> Tensor:
    """A seed for the dropout of neurons with this input; in chunks, it gives the whole run's mask.

    Args:
        current: ``(T, B, *features)``.

    Returns:
        As :func:`snn_lib.functional.draw_seed`, int64 ``(2,)``.
    """
    chunk = current_chunk()
    if chunk is None:
        return draw_seed(current.device)
    return chunk.seed(lambda: draw_seed(current.device), current.numel())
