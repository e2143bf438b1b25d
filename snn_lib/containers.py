"""What layers have in common, and the containers that hold them.

:class:`Sequential` runs modules one after the other and keeps a state for each. :class:`PerStep`
applies a module that knows no time axis. A layer of your own derives from :class:`StatefulModule`,
whose docstring has an example.
"""

import contextlib
import copy
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, TypeGuard, TypeVar, overload

import torch
from torch import Tensor, nn

from snn_lib.functional import (
    CHAIN,
    channels_last,
    check_sequence,
    check_tensor,
    lengths_beside,
    repeats,
)
from snn_lib.products import SkippingZeros, may_skip_zeros
from snn_lib.pytorch_private import comes_from_compile, is_compiled, register_named_tuple
from snn_lib.recomputing import decide

Kind = TypeVar("Kind", bound=nn.Module)
Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMALISATIONS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
OF_CHANNELS = (  # which lie in the second dimension
    *BATCH_NORMALISATIONS,
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
KEEPING_AXES = (
    *(nn.Linear, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.LayerNorm, nn.RMSNorm, nn.Sequential),
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"),
)


def is_weighted(module: nn.Module) -> TypeGuard[Weighted]:
    """Whether a module is a linear layer or a convolution."""
    return isinstance(module, WEIGHTED)


def holds_weights(parameter: Tensor) -> bool:
    """Whether a parameter is weights, as far as one can tell.

    It is if it has two dimensions, for outputs and inputs, or more and is not a scale of each
    channel, such as ``(C, 1, 1)``.
    """
    return parameter.dim() == 2 or parameter.numel() > max([1, *parameter.shape[:2]])


class Output(NamedTuple):
    """What a stateful module returns: ``(output, state)``, as ``nn.GRU`` does.

    It behaves as a plain tuple. If it is used as a tensor, as happens in ``nn.Sequential``, an
    error names the mistake.
    """

    output: Tensor
    state: Any

    if not TYPE_CHECKING:  # so that an editor marks them, too

        def __getattr__(self, name: str) -> NoReturn:
            """Raises the error, for every attribute that a tuple has not."""
            raise AttributeError(f"a layer's (output, state) has no attribute {name!r}: {CHAIN}")

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Raises the error, for every PyTorch function that is given the pair."""
        name = getattr(function, "__name__", "a PyTorch function")
        raise TypeError(f"{name} was given a layer's (output, state): {CHAIN}")


# So that torch.export.save can write a network, and torch.load can read an Output.
register_named_tuple(Output)
torch.serialization.add_safe_globals([Output])


class StatefulModule(nn.Module):
    """A module over sequences that carries a state: ``forward(x, state=None)`` as in ``nn.GRU``.

    ``forward`` returns ``(output, state)``, an :class:`Output`. The state is a plain tuple of
    tensors, never a buffer. A sequence may be fed in chunks: if each chunk is given the state that
    the one before returned, the results are those of the whole run.

    With ``lengths``, int64 ``(B,)``, the steps after each sequence's length are padding, and the
    returned state is the one at each sequence's own end (of a membrane that filters, up to
    rounding).

    Example: a layer that returns the mean of the last two steps.

        class PairMean(StatefulModule):
            def forward(self, x, state=None, lengths=None):
                (before,) = state or (x.new_zeros(1, *x.shape[1:]),)
                steps = torch.cat([before, x])
                return Output((steps[1:] + steps[:-1]) / 2, (last_steps(steps, 1, lengths),))

    Attributes:
        takes_expanded: whether ``x`` may be one step that a :class:`Sequential` has expanded over
            time, so that all steps lie in the same memory. Otherwise it is copied. An input that
            you expand yourself is given to the first layers as it is.
        spikes: whether the output is spikes, which are mostly zero.
    """

    takes_expanded = False
    spikes = False
    __call__: Callable[..., Output]  # of which nn.Module says Any

    def joins(self, following: nn.Module) -> bool:
        """Whether this module and the one after it run as one, by :meth:`run_with`."""
        return False

    def run_with(
        self,
        following: nn.Module,
        x: Tensor,
        states: tuple[Any, Any],
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, Any]]:
        """Runs both modules as one: the output of the second, and both new states."""
        raise NotImplementedError


class Readout(nn.Module):
    """A module that makes one answer of a whole sequence, such as those in ``snn_lib.readout``.

    ``forward(output, lengths=None)`` takes ``(T, B, *)`` and returns ``(B, *)``. With ``lengths``,
    int64 ``(B,)``, only the first so many steps of each sequence count.

    Attributes:
        reads_all: whether the answer depends on all steps, so that it would be another one if the
            sequence were handed over in parts.
    """

    reads_all = True


class Sequential(StatefulModule):
    """Modules one after the other, each of which is given its own state.

    Plain modules, such as ``nn.Linear``, ``nn.Flatten(start_dim=2)`` and :class:`PerStep`, are
    given the whole sequence at once, so an ``nn.Linear`` is one matrix product over all time steps.
    Stateful modules are those of this package and PyTorch's ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN``.
    A :class:`Readout`, such as ``snn_lib.readout.Mean``, answers once for each sequence.

    An input that was expanded over time is the same at every step. An ``nn.Linear`` or a
    convolution then weighs it once for all steps, and its hooks see one step, ``(1, B, *)``. An
    input that requires a gradient is weighed at every step, because each step has a gradient of its
    own, and so is every input where ``torch.compile``, ``torch.func``, a profiler or a mode is at
    work.

    An ``nn.Linear`` or a ``PerStep(nn.Conv2d(...))`` after spikes, which may be pooled, leaves out
    what is zero, where there are kernels for that (see :mod:`snn_lib.products`). So does an
    ``nn.Linear`` that comes first, in float32. The result is the same up to rounding.

    As ``nn.Sequential`` it can be built from an ``OrderedDict`` of named modules. It supports
    indices and slices, item assignment, ``append`` and ``extend``. To put a module between others,
    make another one: ``Sequential(*network[:1], module, *network[1:])``.

    Args:
        modules: the modules, in order.
        batch_first: whether input and output are ``(B, T, *)``. The modules are given
            ``(T, B, *)``, and states stay as they are. So do the answers of a readout, ``(B, *)``,
            and what follows it.

    Shape:
        - x: ``(T, B, *)``.
        - state: a tuple with an entry for each module, ``None`` for plain ones. ``None`` in its
          place starts at rest.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns the last module's output and the new state.

    Raises:
        ValueError: a module has ``batch_first``, or a part of it has and the module itself has no
            such attribute; it treats channels, which ``PerStep`` shows it; it has a state or is a
            readout, and ``torch.compile`` returned it; the state has not one entry for each module,
            or one for a plain module; a state is given, and a readout, or a part of a plain module,
            would need one; lengths are given, and a readout is a part of a plain module; or a
            module raises one, to which the module's name is added.
        TypeError: x is no tensor.
    """

    _modules: dict[str, nn.Module]  # of which nn.Module says that some may be None

    def __init__(
        self, *modules: nn.Module | OrderedDict[str, nn.Module], batch_first: bool = False
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        for module in modules:
            if isinstance(module, OrderedDict):
                for name, named in module.items():
                    self.add_module(name, named)
            else:
                self.append(module)

    def add_module(self, name: str, module: nn.Module) -> None:
        """Adds a module at the end under a name, or replaces the one of that name."""
        if isinstance(module, nn.Module) and comes_from_compile(module):
            (inner,) = module.children()
            if isinstance(inner, (StatefulModule, nn.RNNBase)) or answers_once(inner):
                raise ValueError(
                    f"torch.compile returned this {type(inner).__name__}: compile the whole "
                    "Sequential, or the module in place, by its method compile()"
                )
        if isinstance(module, nn.Module) and batch_first_part(module) is not None:
            raise ValueError(
                f"{type(module).__name__} has batch_first, but Sequential hands (T, B, *) to its "
                "modules: build it without, and give batch_first to the outermost Sequential; or "
                "give it an attribute batch_first = False if it takes (T, B, *)"
            )
        if (part := _part_of_channels(module)) is not None:
            raise ValueError(
                f"{type(part).__name__} takes (N, C, *), and would take the sequences of a batch "
                "for its channels: put it into a PerStep"
            )
        super().add_module(name, module)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequential": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            chosen = OrderedDict(list(self._modules.items())[index])
            return Sequential(chosen, batch_first=self.batch_first)
        return list(self)[index]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self.add_module(list(self._modules)[index], module)

    def append(self, module: nn.Module) -> "Sequential":
        """Adds a module at the end, under the next number that is free."""
        number = len(self)
        while str(number) in self._modules:  # A slice keeps the numbers of its modules.
            number += 1
        self.add_module(str(number), module)
        return self

    def extend(self, modules: Sequence[nn.Module]) -> "Sequential":
        """Adds modules at the end."""
        for module in modules:
            self.append(module)
        return self

    def forward(
        self, x: Tensor, state: Sequence[Any] | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Runs the modules; see the class for shapes."""
        states, output = self._states(state), x
        for output in self._outputs(x, states, lengths, joining=True):  # noqa: B007 (see there)
            pass
        return Output(output, tuple(states))

    def layerwise(
        self, x: Tensor, state: Sequence[Any] | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], tuple[Any, ...]]:
        """Runs the modules and returns every module's output, for a loss on hidden spikes, say.

        A module of your own must not change its input in place: it is the output of another one.

        Returns:
            The list of the modules' outputs, ``(B, T, *)`` with ``batch_first`` and ``(B, *)`` from
            a readout on, and the new state.
        """
        states, outputs, modules = self._states(state), [], self._modules.values()
        in_place = [any(getattr(p, "inplace", False) for p in m.modules()) for m in modules]
        for number, output in enumerate(self._outputs(x, states, lengths)):
            changes = any(in_place[number + 1 :])  # perhaps a view of this output
            outputs.append(output.clone() if changes else output)
        return outputs, tuple(states)

    def _states(self, state: Sequence[Any] | None) -> list[Any]:
        if isinstance(state, Tensor):
            raise ValueError("state is a tensor, expected a tuple; lengths are given by their name")
        states = [None] * len(self._modules) if state is None else list(state)
        if len(states) != len(self._modules):
            raise ValueError(
                f"state has {len(states)} entries, expected one for each of {len(self)} modules"
            )
        if state is not None:
            self.refuse_parts_that_forget()
        return states

    def refuse_parts_that_forget(self) -> None:
        """Raises a ValueError if a plain module, or a part of it, reads other steps."""
        for name, module in self._modules.items():
            if (part := _part_that_forgets(module)) is not None:
                derive = "derive the module from snn_lib.StatefulModule, or "
                raise ValueError(
                    f"layer {name}: {_within(module, part)} begins anew with each call: "
                    f"{'' if answers_once(module) else derive}run whole sequences"
                )

    def _outputs(
        self, x: Tensor, states: list[Any], lengths: Tensor | None, joining: bool = False
    ) -> Iterator[Tensor]:
        """Yields each module's output and puts its new state into ``states``.

        With ``joining``, neighbours that run as one yield one output. Nothing here keeps an output
        once the next module has run.
        """
        check_tensor("x", x)
        if self.batch_first:
            x = x.transpose(0, 1)
        answered = False  # by a readout, so that no time is left
        expanded = False  # whether x may be what a layer that ran once has returned
        spikes = None  # whether x is; nobody knows of the input
        named, index = list(self._modules.items()), 0
        while index < len(named):
            name, module = named[index]
            if isinstance(x, tuple):
                raise ValueError(
                    f"layer {name} is given a tuple, expected a tensor: a module that returns "
                    "(output, state) derives from snn_lib.StatefulModule, and a chain of such "
                    "modules is a snn_lib.Sequential"
                )
            following = named[index + 1][1] if index + 1 < len(named) else None
            if (
                joining
                and following is not None
                and isinstance(module, StatefulModule)
                and module.joins(following)
            ):
                # if it fails, the modules run one by one below, so that the error names the layer
                with contextlib.suppress(ValueError):
                    pair = states[index], states[index + 1]
                    x, states[index : index + 2] = module.run_with(following, x, pair, lengths)
                    index, spikes = index + 2, _spikes(following, False)
                    yield x.transpose(0, 1) if self.batch_first else x
                    continue
            steps, once = x.shape[0], weighs_once(module, x)
            x = x[:1] if once else x
            if _has_weights(module) and not (x.is_floating_point() or x.is_complex()):
                x = x.to(next(module.parameters()).dtype)  # bytes, which cells read as they are
            try:
                with _way(module, spikes):
                    x, states[index] = _run(module, x, states[index], lengths)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
            if once:
                x = x.expand(steps, *x.shape[1:])
            expanded = expanded or once
            if expanded and isinstance(x, Tensor) and x.dim() and x.stride(0) == 0:
                x = x if _takes_expanded(following) else x.contiguous()
            if self.batch_first and not isinstance(x, Tensor):
                raise ValueError(f"layer {name} returned a {type(x).__name__}, expected a tensor")
            index += 1
            spikes = _spikes(module, spikes)
            answered = answered or answers_once(module)
            yield x.transpose(0, 1) if self.batch_first and not answered else x

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return "batch_first=True" if self.batch_first else ""


def _part_that_forgets(module: nn.Module) -> nn.Module | None:
    """A part that reads other steps, of a plain module, which is handed no state."""
    if isinstance(module, (StatefulModule, nn.RNNBase, PerStep)):
        return None
    kinds = StatefulModule, nn.RNNBase, nn.MultiheadAttention, Readout
    parts = (part for part in module.modules() if isinstance(part, kinds))
    reading = (part for part in parts if getattr(part, "reads_all", True))
    return next((part for part in reading if not isinstance(part, Sequential)), None)


def answers_once(module: nn.Module) -> bool:
    """Whether a module is a readout, or a chain with one."""
    if isinstance(module, (Sequential, nn.Sequential)):
        return any(map(answers_once, module))
    return isinstance(module, Readout)


def _within(module: nn.Module, part: nn.Module) -> str:
    """What an error calls a module or a part of it."""
    kind, whole = type(part).__name__, type(module).__name__
    return f"this {kind}" if part is module else f"the {kind} in this {whole}"


def _part_of_channels(module: Any) -> nn.Module | None:
    """The module itself, or a part of an ``nn.Sequential``, that takes ``(N, C, *)``.

    What stands behind parts that may move the axes is not looked at.
    """
    forward = getattr(type(module), "forward", None)
    if forward is nn.Sequential.forward:
        for part in module:
            found = _part_of_channels(part)
            if found is not None or not isinstance(part, KEEPING_AXES):
                return found
        return None
    return module if forward in {kind.forward for kind in OF_CHANNELS} else None


def part_with_memory(module: nn.Module) -> nn.Module | None:
    """The module itself if it has a state, or else the first part of it that has one."""
    stateful = (part for part in module.modules() if isinstance(part, (StatefulModule, nn.RNNBase)))
    return next(stateful, None)


def runs_forward_of(module: Any, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is of one of these classes and runs the ``forward`` that stands there.

    It does not if a user's class has another one, or if another one was set on the module.
    """
    if not isinstance(module, kinds):
        return False
    return getattr(module.forward, "__func__", None) in {kind.forward for kind in kinds}


def _has_weights(module: nn.Module | None) -> bool:
    """Whether a module is a layer of weights, or applies one at every step."""
    return type(module.module if isinstance(module, PerStep) else module) in WEIGHTED


def _weighs(module: nn.Module | None) -> bool:
    """Whether a module is a layer of weights, which treats all steps alike."""
    if not _has_weights(module):
        return False
    parts = [module, module.module] if isinstance(module, PerStep) else [module]
    return all(runs_forward_of(part, PerStep, *WEIGHTED) for part in parts)


def weighs_once(module: nn.Module, x: Tensor) -> bool:
    """Whether a :class:`Sequential` runs a module on the first step of ``x``, for all steps."""
    return _weighs(module) and repeats(x)


def _spikes(module: nn.Module, given: bool | None) -> bool | None:
    """Whether a module returns spikes, if it is ``given`` some or not, or if nobody knows."""
    inner = module.module if isinstance(module, PerStep) else module
    if isinstance(inner, (nn.Flatten, nn.Identity, nn.MaxPool2d)):
        return given
    return isinstance(module, StatefulModule) and module.spikes is True


def _way(module: nn.Module, spikes: bool | None) -> contextlib.AbstractContextManager:
    """The context in which a module runs: weights of spikes leave out what is zero.

    In chunks, the second run of a chunk does what the first did.
    """
    if isinstance(module, PerStep):
        skips = isinstance(module.module, nn.Conv2d) and spikes is True
    else:
        skips = isinstance(module, nn.Linear) and spikes is not False
    if not skips or is_compiled(module):
        return contextlib.nullcontext()
    return SkippingZeros(spikes is True) if decide(may_skip_zeros) else contextlib.nullcontext()


def _takes_expanded(module: nn.Module | None) -> bool:
    """Whether a module may be given an expanded tensor.

    Others may write to their input, or ask how it lies in memory.
    """
    own = isinstance(module, StatefulModule) and module.takes_expanded
    return own or _weighs(module) or isinstance(module, nn.Flatten)


def _run(module: nn.Module, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """A module's output and its new state, ``None`` of a plain module."""
    if isinstance(module, StatefulModule):
        padding = {} if lengths is None else {"lengths": lengths}
        result = module(x, state, **padding)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(
                f"{type(module).__name__} returned a {type(result).__name__}, expected "
                "(output, state)"
            )
        return result
    if isinstance(module, nn.RNNBase):
        if lengths is not None:
            raise ValueError(
                f"nn.{type(module).__name__} takes no lengths, so it cannot return the state at "
                "each sequence's own end"
            )
        return module(x, state)
    if state is not None:
        raise ValueError(f"{type(module).__name__} has no state, expected None in its place")
    if lengths is None:
        return module(x), None
    if isinstance(module, Readout):
        return module(x, lengths), None
    readouts = (part for part in module.modules() if isinstance(part, Readout))
    if (part := next(readouts, None)) is not None:
        raise ValueError(
            f"{_within(module, part)} is handed no lengths: make it a layer of a "
            "snn_lib.Sequential, or derive the module around it from snn_lib.containers.Readout or "
            "snn_lib.StatefulModule"
        )
    return module(x), None


class PerStep(nn.Module):
    """Applies a module that knows no time axis, such as ``nn.Conv2d``, to every time step.

    Time and batch are folded into one dimension, so all steps are still a single call. If the
    module couples the elements of its batch, as ``nn.BatchNorm2d`` does, it also couples the steps.

    Args:
        module: takes ``(N, *)`` and returns ``(N, *)``.

    Shape:
        ``(T, B, *)`` to ``(T, B, *)``.

    Raises:
        ValueError: the module holds a layer that knows the time axis, or is an average pool and is
            given whole numbers.
    """

    batch_first = False  # whatever its module's batch_first says of other axes than time

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        check_module("module", module)
        if (part := part_with_memory(module)) is not None:
            raise ValueError(
                f"{type(part).__name__} knows the time axis, which PerStep hides: give it to "
                "snn_lib.Sequential beside PerStep, not inside"
            )
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Applies the module; see the class for shapes."""
        check_tensor("x", x)
        if isinstance(self.module, nn.AvgPool2d) and not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}, whose means would be whole numbers: give floats")
        if channels_last(x):  # flatten alone would forget it where there is a single channel
            folded = x.movedim(2, -1).flatten(0, 1).movedim(-1, 1)
        else:
            folded = x.flatten(0, 1)
        return self.module(folded).unflatten(0, x.shape[:2])


class Repeat(nn.Module):
    """Repeats the channels of every step, so that a synapse after it filters each several times.

    Four inputs, each with 16 filters of its own:

        Sequential(Repeat(16), ResonantSynapse(64, log_spaced(1, 100), log_spaced(1 / 400, 1 / 4)))

    Args:
        copies: how many times each channel is there afterwards.

    Shape:
        ``(T, B, C, *positions)`` to ``(T, B, copies * C, *positions)``: all channels in order, then
        all of them again. So channel n is channel ``n % C`` of the input.

    Raises:
        ValueError: ``copies`` is not a whole number of at least 1.
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = whole_number(copies, "copies")

    def forward(self, x: Tensor) -> Tensor:
        """Repeats the channels; see the class for shapes."""
        check_sequence("x", x)
        if channels_last(x):  # which the copies are to remain
            return torch.cat([x.movedim(2, -1)] * self.copies, -1).movedim(-1, 2)
        return torch.cat([x] * self.copies, 2)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.copies}"


class ChannelsFirst(nn.Module):
    """Moves the channels, which come last in images, before the positions, as convolutions ask.

    The memory stays as it is: the channels remain last in it, which is faster on a CPU.

    Shape:
        ``(T, B, *positions, C)`` to ``(T, B, C, *positions)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Moves the channels; see the class for shapes."""
        check_sequence("x", x)
        return x.movedim(-1, 2)


class Votes(nn.Module):
    """Adds up the spikes of neurons that vote for the same class.

    Args:
        classes: the number of classes.

    Shape:
        ``(T, B, classes * voters)``, the voters of a class side by side, to ``(T, B, classes)``.

    Raises:
        ValueError: ``classes`` is not a whole number of at least 1, or does not divide the neurons.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = whole_number(classes, "classes")

    def forward(self, x: Tensor) -> Tensor:
        """Adds up the votes; see the class for shapes."""
        check_sequence("x", x)
        if x.shape[2] % self.classes:
            raise ValueError(
                f"got {x.shape[2]} channels, expected a multiple of the {self.classes} classes"
            )
        return x.unflatten(2, (self.classes, -1)).sum(3)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.classes}"


def feature_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a layer's features, from their number or their shape.

    Raises:
        ValueError: a size is not a whole number.
    """
    try:
        sizes = list(shape)
    except TypeError:
        sizes = [shape]
    return tuple(whole_number(size, "shape", 0) for size in sizes)


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """A whole number of at least so much, from Python's, NumPy's or PyTorch's.

    Raises:
        ValueError: it is none; the message calls it ``name``.
    """
    number = least - 1
    with contextlib.suppress(TypeError):
        number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return number


def check_module(name: str, module: nn.Module) -> None:
    """Raises a TypeError unless this is a module; the message calls it ``name``."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} is a {type(module).__name__}, expected a torch.nn.Module")


def batch_first_part(module: Any) -> str | None:
    """Finds what takes ``(B, T, *)``: the attribute ``batch_first`` says so.

    A module that has the attribute speaks for all its parts, since it may transpose for them. What
    is no module has no parts, but may have the attribute.

    Returns:
        The name of the first such part, ``""`` for the module itself, ``None`` if there is none.
    """
    own = getattr(module, "batch_first", None)
    if own is not None:
        return "" if own else None
    for name, child in module.named_children() if isinstance(module, nn.Module) else ():
        part = batch_first_part(child)
        if part is not None:
            return f"{name}.{part}" if part else name
    return None


def detach(state: Any) -> Any:
    """The same state, of a layer or of a whole network, through which no gradient flows.

    For training on chunks of a long sequence: ``output, state = model(chunk, detach(state))``.

    Raises:
        TypeError: as :func:`map_tensors`.
    """
    return map_tensors(Tensor.detach, state)


def map_tensors(function: Callable[[Tensor], Any], state: Any) -> Any:
    """Applies a function to every tensor of a state.

    Args:
        function: takes a tensor.
        state: a tensor, ``None`` or a number, or a tuple, list, dictionary or dataclass of such.

    Returns:
        A new state of the same form, with the function's results in the tensors' places.

    Raises:
        TypeError: the state holds anything else.
    """
    if isinstance(state, Tensor):
        return function(state)
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, (tuple, list)):
        parts = [map_tensors(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    if isinstance(state, dict):
        mapped = copy.copy(state)
        mapped.update({key: map_tensors(function, part) for key, part in state.items()})
        return mapped
    if dataclasses.is_dataclass(state):
        mapped = copy.copy(state)
        for field in dataclasses.fields(state):
            part = map_tensors(function, getattr(state, field.name))
            object.__setattr__(mapped, field.name, part)  # which a frozen one allows, too
        return mapped
    raise TypeError(
        f"found {type(state).__name__}, expected a tensor, or tensors in tuples, lists, "
        "dictionaries or dataclasses"
    )


def tensors_in(state: Any) -> list[Tensor]:
    """The tensors of a state, in order; see :func:`map_tensors`."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, state)
    return tensors


def last_steps(sequence: Tensor, count: int, lengths: Tensor | None = None) -> Tensor:
    """The last ``count`` steps of each sequence, ``(count, B, *)``: what a layer has to remember.

    The result is a copy. A state that were a view would keep the whole sequence in memory, and
    would change when the sequence is overwritten.

    Args:
        sequence: ``(count + T, B, *)``, which begins with the steps remembered from before.
        count: the number of steps.
        lengths: int64 ``(B,)``, the number of steps of each sequence; T for all if ``None``. One
            beyond T counts as T.

    Raises:
        ValueError: there is not a whole number for each sequence.
    """
    total = sequence.shape[0] - count  # len would be a constant if exported
    if lengths is None:
        return sequence[total:].clone()
    lengths = lengths_beside(sequence, lengths).clamp(max=total)
    steps = torch.arange(count, device=lengths.device)[:, None] + lengths  # (count, B)
    index = steps.view(*steps.shape, *[1] * (sequence.dim() - 2))
    return sequence.gather(0, index.expand(count, *sequence.shape[1:]))
