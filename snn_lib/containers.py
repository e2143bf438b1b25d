"""What layers have in common, and what holds them.

``Sequential`` threads states through; ``Chunked`` keeps long sequences from filling the memory. A
layer of one's own derives from :class:`StatefulModule`; its docstring has an example.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snn_lib.functional import channels_last


class Output(NamedTuple):
    """What a stateful module returns, ``(output, state)`` as ``nn.GRU`` does.

    A plain tuple by all means, that says so where it is taken for a tensor: in ``nn.Sequential``.
    """

    output: Any
    state: Any

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Every PyTorch function that is given the pair instead of a tensor."""
        name = getattr(function, "__name__", "a PyTorch function")
        raise TypeError(
            f"{name} was given a layer's (output, state): chain layers with snn_lib.Sequential "
            "instead of nn.Sequential, or take the output alone, output, state = layer(x)"
        )


class StatefulModule(nn.Module):
    """A module over sequences that carries a state: ``forward(x, state=None)`` as in ``nn.GRU``.

    ``forward`` returns ``(output, state)``, an :class:`Output`. The state is a plain tuple of
    tensors, never a buffer: feeding a sequence in chunks, with the state handed on, gives the
    result of the whole run. With ``lengths``, int64 ``(B,)``, the state is that at each sequence's
    own end, what follows being padding (of a membrane that filters, up to rounding). A layer of
    one's own, the mean of the last two steps:

        class PairMean(StatefulModule):
            def forward(self, x, state=None, lengths=None):
                (before,) = state or (x.new_zeros(1, *x.shape[1:]),)
                seen = torch.cat([before, x])
                return Output((seen[1:] + seen[:-1]) / 2, (last_steps(seen, 1, lengths),))
    """


class Sequential(StatefulModule):
    """Modules one after the other, with the states of the stateful ones threaded through.

    Plain modules (``nn.Linear``, ``nn.Flatten(start_dim=2)``, :class:`PerStep`) see the whole
    sequence at once, so an ``nn.Linear`` is one matrix product over all time steps. Stateful ones
    are those of this package and PyTorch's ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN``. Like
    ``nn.Sequential`` it takes an ``OrderedDict`` of named modules as well, has slices, ``append``,
    ``extend`` and ``insert``.

    Args:
        modules: the modules, in order.
        batch_first: whether input and output are ``(B, T, *)``; the modules see ``(T, B, *)``, and
            states do not change.

    Shape:
        - x: ``(T, B, *)``.
        - state: a tuple with one entry a module, ``None`` for plain ones; ``None`` starts at rest.
        - lengths: int64 ``(B,)``, steps of each sequence, if they are padded to T.
        - returns the last module's output and the new state.

    Raises:
        ValueError: the state has not one entry a module.
    """

    def __init__(
        self, *modules: nn.Module | OrderedDict[str, nn.Module], batch_first: bool = False
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        if len(modules) == 1 and isinstance(modules[0], OrderedDict):
            for name, module in modules[0].items():
                self.add_module(name, module)
        else:
            self.extend(modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self):
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            chosen = OrderedDict(list(self._modules.items())[index])
            return Sequential(chosen, batch_first=self.batch_first)
        return list(self)[index]

    def append(self, module: nn.Module) -> "Sequential":
        """Adds a module at the end, under the next number that is free."""
        number = len(self)
        while str(number) in self._modules:  # of a slice, say
            number += 1
        self.add_module(str(number), module)
        return self

    def extend(self, modules: Sequence[nn.Module]) -> "Sequential":
        """Adds modules at the end."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: nn.Module) -> "Sequential":
        """Puts a module before number ``index``; numbers count anew, other names stay."""
        named = list(self._modules.items())
        named.insert(index, ("0", module))
        self._modules.clear()
        for number, (name, child) in enumerate(named):
            self.add_module(str(number) if name.isdigit() else name, child)
        return self

    def forward(
        self, x: Tensor, state: Sequence[Any] | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Runs the modules; see the class for shapes."""
        states, output = self._states(state), x
        for output in self._outputs(x, states, lengths):  # noqa: B007 (none outlives the next)
            pass
        return Output(output, tuple(states))

    def layerwise(
        self, x: Tensor, state: Sequence[Any] | None = None, lengths: Tensor | None = None
    ) -> Output:
        """The same, with every module's output: for a loss on hidden spikes, say.

        Returns:
            The list of the modules' outputs, and the new state.
        """
        states = self._states(state)
        return Output(list(self._outputs(x, states, lengths)), tuple(states))

    def _states(self, state: Sequence[Any] | None) -> list[Any]:
        states = [None] * len(self._modules) if state is None else list(state)
        if len(states) != len(self._modules):
            raise ValueError(
                f"state has {len(states)} entries, expected one for each of {len(self)} modules"
            )
        return states

    def _outputs(self, x: Tensor, states: list[Any], lengths: Tensor | None) -> Iterator[Tensor]:
        """Each module's output, which nothing else keeps, as its state in ``states`` is renewed."""
        known = {} if lengths is None else {"lengths": lengths}
        if self.batch_first:
            x = x.transpose(0, 1)
        for index, module in enumerate(self._modules.values()):
            if isinstance(module, StatefulModule):
                x, states[index] = module(x, states[index], **known)
            elif isinstance(module, nn.RNNBase):
                if module.batch_first or lengths is not None:
                    name = type(module).__name__
                    raise ValueError(
                        f"nn.{name} runs here time first and without lengths: leave batch_first "
                        "to Sequential, and take the state of padded sequences elsewhere"
                    )
                x, states[index] = module(x, states[index])
            else:
                x = module(x)
            yield x.transpose(0, 1) if self.batch_first else x

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return "batch_first=True" if self.batch_first else ""


class PerStep(nn.Module):
    """Applies a module that knows no time axis, such as ``nn.Conv2d``, to every time step.

    Time and batch are folded into one dimension, so the steps are still a single call. A module
    that couples the elements of its batch, such as ``nn.BatchNorm2d``, then couples the steps.

    Args:
        module: takes ``(N, *)`` and returns ``(N, *)``.

    Shape:
        ``(T, B, *)`` to ``(T, B, *)``.

    Raises:
        ValueError: the module holds a layer that knows the time axis.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for part in module.modules():
            if isinstance(part, (StatefulModule, nn.RNNBase)):
                raise ValueError(
                    f"{type(part).__name__} knows the time axis, which PerStep hides: give it to "
                    "snn_lib.Sequential beside PerStep, not inside"
                )
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Applies the module; see the class for shapes."""
        if channels_last(x):  # a single channel, too, for which flatten alone would forget it
            folded = x.movedim(2, -1).flatten(0, 1).movedim(-1, 1)
        else:
            folded = x.flatten(0, 1)
        return self.module(folded).unflatten(0, x.shape[:2])


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
        before = [_version(tensor) for tensor in _tensors((x, state))]
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
        return [(id(p), _version(p)) for p in self.module.parameters()] if known else []

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


def _version(tensor: Tensor) -> int:
    """How often it has been changed in place."""
    return 0 if tensor.is_inference() else tensor._version


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


def call_of(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name, in order, as a hook of it is told them."""
    return inspect.signature(layer.forward).bind(*args, **kwargs).arguments


def recomputing() -> bool:
    """Whether a :class:`Chunked` runs its module once more, for the backward pass.

    For forward hooks that count or collect: they have seen this chunk already.
    """
    chunk = running_chunk()
    return chunk is not None and chunk.runs > 1


def detached(state: Any) -> Any:
    """A state, of a layer or of a whole network, that no gradient flows through.

    For training on chunks of a long sequence: ``output, state = model(chunk, detached(state))``.
    """
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        parts = [detached(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def last_steps(sequence: Tensor, count: int, lengths: Tensor | None = None) -> Tensor:
    """The last ``count`` steps of each sequence, ``(count, B, *)``: what a layer has to remember.

    Args:
        sequence: ``(count + T, B, *)``, what was remembered before the first step in front.
        count: how many.
        lengths: int64 ``(B,)``, steps of each sequence; T for all if ``None``.
    """
    if lengths is None:
        return sequence[len(sequence) - count :].clone()
    steps = torch.arange(count, device=lengths.device)[:, None] + lengths  # (count, B)
    index = steps.view(*steps.shape, *[1] * (sequence.dim() - 2))
    return sequence.gather(0, index.expand(count, *sequence.shape[1:]))
