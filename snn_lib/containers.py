"""What layers have in common, and what holds them.

``Sequential`` threads states through; ``Chunked`` keeps long sequences from filling the memory. A
layer of one's own derives from :class:`StatefulModule`; its docstring has an example.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

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


def call_of(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name, in order, as a hook of it is told them."""
    return inspect.signature(layer.forward).bind(*args, **kwargs).arguments


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
