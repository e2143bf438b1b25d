"""Containers: ``Sequential`` threads states through, ``PerStep`` hides the time axis."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class StatefulModule(nn.Module):
    """A module over sequences that carries a state: ``forward(x, state=None)`` as in ``nn.GRU``.

    ``forward`` returns ``(output, state)``. The state is a plain tuple of tensors, never a buffer:
    feeding a sequence in chunks, with the state handed on, gives the result of the whole run.
    """


class Sequential(StatefulModule):
    """Modules one after the other, with the states of the stateful ones threaded through.

    Plain modules (``nn.Linear``, ``nn.Flatten(start_dim=2)``, :class:`PerStep`) see the whole
    sequence at once, so an ``nn.Linear`` is one matrix product over all time steps. Stateful ones
    are those of this package and PyTorch's ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN``.

    Args:
        modules: the modules, in order.

    Shape:
        - x: ``(T, B, *)``.
        - state: a tuple with one entry a module, ``None`` for plain ones; ``None`` starts at rest.
        - returns the last module's output and the new state.

    Raises:
        ValueError: the state has not one entry a module.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]

    def forward(
        self, x: Tensor, state: Sequence[Any] | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Runs the modules; see the class for shapes."""
        states = [None] * len(self) if state is None else list(state)
        if len(states) != len(self):
            raise ValueError(
                f"state has {len(states)} entries, expected one for each of {len(self)} modules"
            )
        for index, module in enumerate(self.children()):
            if isinstance(module, (StatefulModule, nn.RNNBase)):
                x, states[index] = module(x, states[index])
            else:
                x = module(x)
        return x, tuple(states)


class PerStep(nn.Module):
    """Applies a module that knows no time axis, such as ``nn.Conv2d``, to every time step.

    Time and batch are folded into one dimension, so the steps are still a single call. A module
    that couples the elements of its batch, such as ``nn.BatchNorm2d``, then couples the steps.

    Args:
        module: takes ``(N, *)`` and returns ``(N, *)``.

    Shape:
        ``(T, B, *)`` to ``(T, B, *)``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Applies the module; see the class for shapes."""
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
