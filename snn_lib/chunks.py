"""Long sequences in chunks of time, with the gradients of the whole run: :class:`Chunked`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snn_lib.containers import Output, StatefulModule
from snn_lib.pytorch_private import version


class Chunked(StatefulModule):
    """Runs a module in chunks of time: exact gradients, in memory that grows far less with T.

        model = Chunked(Sequential(...), steps=50)
        output, state = model(x)  # as ever

    Training keeps only the states between the chunks; the backward pass runs every chunk once more,
    the last one first. Unlike with :func:`detached` no gradient is cut off: they are those of the
    whole run, and so are spikes and the dropout of :class:`snn_lib.SpikingNeuron`, bit for bit
    where the matrix products of a chunk are.

    Input and output stay whole. Where these are too much already, let the module return less than
    a value for every step: what it returns for the chunks is joined along time, whatever its
    length, the loss of a chunk for example. ``x`` may be several sequences, input and target, say.

    Args:
        module: ``(x, state) -> (output, state)``: a layer, a :class:`Sequential`, an ``nn.GRU``, a
            network of one's own. If it has ``batch_first``, time is the second dimension.
        steps: of a chunk. There is a state for each, so that neither few nor many steps are best:
            about the square root of T times a few.

    Shape:
        - x: ``(T, B, *)``, or a tuple of sequences, of which the module is given a tuple of chunks.
        - state: as the module takes it; ``None`` starts at rest.
        - lengths: int64 ``(B,)``, steps of each sequence, if they are padded to T and the module
          takes them. The padding's own output may differ from the whole run's.
        - returns the module's output of all chunks, and the state after the last step.

    The module's forward hooks see every chunk, and once more in the backward pass, when
    :func:`recomputing` says so. What else it changes as it runs, as ``nn.BatchNorm1d`` its
    averages, it changes twice. Compile it inside, ``Chunked(torch.compile(module), steps)``.

    Raises:
        ValueError: ``steps`` is not a positive number, the sequences of ``x`` differ in length, the
            module reads time both ways, or it has a part with ``batch_first`` but no attribute that
            says of itself.
        TypeError: the module does not return ``(output, state)``.
        RuntimeError: it is compiled, exported or differentiated by ``torch.func.grad``, or runs in
            the chunks of another; when the backward pass runs a chunk again, the parameters, ``x``
            or the state are others than they were.
    """

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps}, expected a whole number, at least 1")
        for part in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(part, nn.RNNBase) and part.bidirectional:
                raise ValueError(f"{part} reads time both ways, which no chunk can")
            if (
                isinstance(part, (StatefulModule, nn.RNNBase))
                and getattr(part, "batch_first", False)
                and not hasattr(module, "batch_first")
            ):
                raise ValueError(
                    f"{type(module).__name__} has a part with batch_first=True: give it an "
                    "attribute batch_first that says whether it takes (B, T, *) itself"
                )
        self.module, self.steps = module, steps

    @property
    def batch_first(self) -> bool:
        """Whether the module takes ``(B, T, *)``."""
        return getattr(self.module, "batch_first", False)

    def forward(
        self,
        x: Tensor | tuple[Tensor, ...],
        state: Any = None,
        lengths: Tensor | None = None,
    ) -> Output:
        """Runs the module over all chunks; see the class for shapes."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "Chunked is not compiled or exported as a whole: compile the module inside, "
                "Chunked(torch.compile(module), steps)"
            )
        if running_chunk() is not None:
            raise RuntimeError("a Chunked runs in the chunks of another: let only one cut the time")
        time = int(self.batch_first)
        sequences = (x,) if isinstance(x, Tensor) else x
        total, *others = (sequence.shape[time] for sequence in sequences)
        if any(other != total for other in others):
            raise ValueError(f"the sequences of x have {[total, *others]} steps, expected as many")
        outputs: list[Tensor] = []
        seeds: list[Seed] = []
        # Not narrow, whose gradient is as long as the whole sequence for every chunk.
        chunks = zip(*(sequence.split(self.steps, time) for sequence in sequences), strict=True)
        for number, parts in enumerate(chunks):
            part = parts[0] if isinstance(x, Tensor) else parts
            start, count = number * self.steps, parts[0].shape[time]
            known = {} if lengths is None else {"lengths": (lengths - start).clamp(0, count)}
            arguments = Chunk(start, seeds), part, state, known
            if torch.is_grad_enabled():
                output, state = checkpoint(self._run, *arguments, use_reentrant=False)
            else:
                output, state = self._run(*arguments)
            outputs.append(output)
        return Output(torch.cat(outputs, time), state)

    def _run(
        self, chunk: "Chunk", x: Any, state: Any, known: dict[str, Tensor]
    ) -> tuple[Tensor, Any]:
        before = [version(tensor) for tensor in _tensors((x, state))]
        if chunk.runs and chunk.read != (before, self._parameters_at_work()):
            raise RuntimeError(
                "Chunked runs each chunk again in the backward pass, and finds parameters, x or a "
                "state changed since the forward pass"
            )
        with chunk.running():
            result = self.module(x, state, **known)
        if chunk.runs == 1:
            chunk.read = before, self._parameters_at_work()
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{type(self.module).__name__} returned {type(result).__name__}, expected "
                "(output, state) to go on from in the next chunk"
            )
        return result

    def _parameters_at_work(self) -> list[tuple[int, int]]:
        """Which they are, ``torch.func.functional_call`` may put others in place, and versions."""
        known = isinstance(self.module, nn.Module)
        return [(id(p), version(p)) for p in self.module.parameters()] if known else []

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"steps={self.steps}"


def _tensors(nested: Any) -> Iterator[Tensor]:
    """Those of sequences or states."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(tuple(nested.values()))
    elif isinstance(nested, (tuple, list)):
        for part in nested:
            yield from _tensors(part)


@dataclass
class Seed:
    """What a layer with dropout draws in the first chunk, for all chunks to have it alike.

    Attributes:
        key: what was drawn.
        elements: how many the layer has numbered in the chunks so far.
    """

    key: Tensor
    elements: int = 0


@dataclass
class Chunk:
    """The chunk that a :class:`Chunked` runs.

    Attributes:
        start: the step of the sequence that it begins with.
        seeds: those of the sequence, in the order in which they were drawn.
        runs: how many times it has begun to run: at the second the backward pass asks for it.
        taken: of this run, how many seeds.
        first: the number of this chunk's first element, for each seed.
        drawn: the places among the seeds of those that this chunk drew itself.
        read: the versions of the tensors that it was given, and of the parameters.
    """

    start: int
    seeds: list[Seed] = field(default_factory=list)
    runs: int = 0
    taken: int = 0
    first: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    read: tuple[list[int], list[tuple[int, int]]] = ([], [])

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context in which its modules run."""
        self.runs, self.taken = self.runs + 1, 0
        token = _chunk.set(self)
        try:
            yield
        finally:
            _chunk.reset(token)

    def seed(self, draw: Callable[[], Tensor], elements: int) -> tuple[Tensor, int]:
        """What was drawn at this place of the first chunk, and the number of the first element.

        Who drew draws when run again, too, for the generator to go on as it did.
        """
        place, self.taken = self.taken, self.taken + 1
        if self.runs > 1:
            if place in self.drawn:
                draw()
        else:
            if place == len(self.seeds):
                self.seeds.append(Seed(draw()))
                self.drawn.append(place)
            self.first.append(self.seeds[place].elements)
            self.seeds[place].elements += elements
        return self.seeds[place].key, self.first[place]


_chunk: ContextVar[Chunk | None] = ContextVar("chunk", default=None)


def running_chunk() -> Chunk | None:
    """The chunk at work, inside :class:`Chunked`; compiled code knows of none."""
    return None if torch.compiler.is_compiling() else _chunk.get()


def recomputing() -> bool:
    """Whether a :class:`Chunked` runs its module once more, for the backward pass.

    For forward hooks that count or collect: they have seen this chunk already.
    """
    chunk = running_chunk()
    return chunk is not None and chunk.runs > 1
