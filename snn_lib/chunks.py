"""Long sequences in chunks of time, with the gradients of the whole run.

:class:`Chunked` runs any module chunk by chunk and keeps only the states in between. For the
backward pass it runs each chunk once more, as ``torch.utils.checkpoint`` does.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snn_lib.cells import Constrained
from snn_lib.containers import (
    Output,
    Sequential,
    StatefulModule,
    answers_once,
    batch_first_part,
    runs_forward_of,
    tensors_in,
    whole_number,
)
from snn_lib.functional import casting_anew, check_tensor, lengths_beside
from snn_lib.pytorch_private import version
from snn_lib.recomputing import Chunk, Seed, current_chunk


class UnfitOutputError(TypeError):
    """A module returns what no next chunk can go on from, or what cannot be joined along time."""


class Chunked(StatefulModule):
    """Runs a module in chunks of time: exact gradients, in memory that grows far less with T.

        model = Chunked(Sequential(...), steps=50)
        output, state = model(x)  # as without chunks

    In training only the states between the chunks are kept. The backward pass runs every chunk once
    more, beginning with the last one. No gradient is cut off, as :func:`snn_lib.detach` does: the
    gradients are those of the whole run, and so are the spikes and the dropout of a
    :class:`snn_lib.SpikingNeuron` that runs once in a chunk, bit for bit if the matrix products of
    a chunk are.

    The whole input and the whole output stay in memory. If that is too much, let the module return
    less than a value for every step, the loss of a chunk for example: what it returns for the
    chunks is joined along time, whatever its length, and numbers become a vector. ``x`` may be a
    tuple of several sequences, such as input and target.

    The module's forward hooks see every chunk, and see it again in the backward pass, when
    :func:`snn_lib.recomputing.is_recomputing` is true. Whatever else the module changes as it runs,
    such as the averages of ``nn.BatchNorm1d``, it changes twice. If it computes with what it
    changes, as spectral normalisation does, its gradients are not those of the whole run.

    To compile it, compile the module inside: ``Chunked(torch.compile(module), steps)``. Its dropout
    is then drawn anew for every chunk, and ``is_recomputing`` is never true inside it.

    Args:
        module: ``(x, state) -> (output, state)``: a layer, a :class:`snn_lib.Sequential`, an
            ``nn.GRU`` or a network of your own. If its ``batch_first`` is true, time is the second
            dimension.
        steps: the number of steps in a chunk. Each chunk adds a state to the memory and each step
            of a chunk adds to what the backward pass needs at once, so a few times the square root
            of T is best.

    Shape:
        - x: ``(T, B, *)``, or a tuple of sequences, of which the module is given a tuple of chunks.
        - state: as the module takes it; ``None`` starts at rest.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T and
          the module takes them. The output at the padding may differ from the whole run's.
        - returns the module's output of all chunks, and the state after the last step.

    Raises:
        ValueError: ``steps`` is not a positive number, the sequences of ``x`` differ in length, the
            module reads time both ways or holds another ``Chunked``, a part of it has
            ``batch_first`` and the module itself has no such attribute, or a
            :class:`snn_lib.Sequential` has a readout or a plain module that holds what has a state.
        TypeError: the module takes no state, does not return ``(output, state)``, has layers with a
            state and returns ``None`` for it, or its output is no tensor.
        RuntimeError: it is compiled as one graph, exported or differentiated by
            ``torch.func.grad``, or runs in the chunks of another; or when the backward pass runs a
            chunk again, the parameters, buffers, ``x`` or the state have changed, or the module is
            in another mode. Whatever else the module reads, such as the probability of dropout,
            must be as it was, too.
    """

    def __init__(self, module: nn.Module, steps: int) -> None:
        super().__init__()
        if isinstance(module, nn.Module):
            _check_module(module)
            self.training = module.training
        self.module, self.steps = module, whole_number(steps, "steps")

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
        if current_chunk() is not None:
            raise RuntimeError("a Chunked runs in the chunks of another: let only one cut the time")
        time = int(self.batch_first)
        sequences = x if isinstance(x, tuple) else (x,)
        for sequence in sequences:
            check_tensor("x", sequence)
        total, *others = (sequence.shape[time] for sequence in sequences)
        if any(other != total for other in others):
            raise ValueError(f"the sequences of x have {[total, *others]} steps, expected as many")
        if lengths is not None:
            lengths = lengths_beside(sequences[0].movedim(time, 0), lengths)
        outputs: list[Tensor] = []
        seeds: list[Seed] = []
        # The gradient of narrow would be as long as the whole sequence for every chunk.
        chunks = zip(*(sequence.split(self.steps, time) for sequence in sequences), strict=True)
        for number, parts in enumerate(chunks):
            part = parts[0] if isinstance(x, Tensor) else parts
            start, count = number * self.steps, parts[0].shape[time]
            if number and (forgetful := _forgetful(self.module, state)) is not None:
                whole, layer = (type(one).__name__ for one in forgetful)
                raise UnfitOutputError(
                    f"{whole} returned no state, so that its {layer} would begin anew in each "
                    "chunk: return the states, or () if there is nothing to remember"
                )
            padding = {} if lengths is None else {"lengths": (lengths - start).clamp(0, count)}
            arguments = Chunk(start, count, seeds), part, state, padding
            if torch.is_grad_enabled():
                output, state = checkpoint(self._run, *arguments, use_reentrant=False)
            else:
                output, state = self._run(*arguments)
            outputs.append(torch.atleast_1d(output))
        return Output(torch.cat(outputs, min(time, outputs[0].dim() - 1)), state)

    def _run(
        self, chunk: Chunk, x: Any, state: Any, padding: dict[str, Tensor]
    ) -> tuple[Tensor, Any]:
        given, before = list(map(version, tensors_in((x, state)))), self._versions()
        if chunk.runs and (
            chunk.given != (given, self._modes())
            or any(before.get(key) != v for key, v in chunk.read.items())
        ):
            raise RuntimeError(
                "Chunked runs each chunk again in the backward pass, and finds parameters, "
                "buffers, x or a state changed since the forward pass, or train() or eval() called"
            )
        with chunk.run(), casting_anew(tensors_in(x)[0].device):
            result = self.module(x, state, **padding)
        if chunk.runs == 1:
            # What the module itself changes as it runs is no change that somebody else made.
            unchanged = {key: v for key, v in self._versions().items() if before.get(key) == v}
            chunk.given, chunk.read = (given, self._modes()), unchanged
        if not (isinstance(result, tuple) and len(result) == 2):
            raise UnfitOutputError(
                f"{type(self.module).__name__} returned {type(result).__name__}, expected "
                "(output, state) to go on from in the next chunk"
            )
        if not isinstance(result[0], Tensor):
            raise UnfitOutputError(
                f"the output of {type(self.module).__name__} is a {type(result[0]).__name__}, "
                "expected a tensor, which can be joined along time"
            )
        return result

    def _modes(self) -> list[bool]:
        return [part.training for part in self.modules()]

    def _versions(self) -> dict[int, int]:
        """The version of each parameter and buffer, by the identity of the tensor.

        ``torch.func.functional_call`` puts other tensors in their places.
        """
        if not isinstance(self.module, nn.Module):
            return {}
        tensors = (*self.module.parameters(), *self.module.buffers())
        return {id(tensor): version(tensor) for tensor in tensors}

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"steps={self.steps}"


def _check_module(module: nn.Module) -> None:
    """Refuses a module that cannot run in chunks."""
    name = type(module).__name__
    try:
        inspect.signature(module.forward).bind(None, None)
    except TypeError:
        raise TypeError(
            f"{name} takes no state, so it cannot run in chunks: expected a forward(x, state=None) "
            "that returns (output, state)"
        ) from None
    for part in module.modules():
        if isinstance(part, nn.RNNBase) and part.bidirectional:
            raise ValueError(f"{part} reads time both ways, which no chunk can")
        if isinstance(part, Sequential):
            part.refuse_parts_that_forget()
            if answers_once(part):
                raise ValueError(
                    f"{name} has a readout, which would answer once for each chunk: put it behind "
                    "the Chunked"
                )
        if isinstance(part, Chunked):
            raise ValueError(f"{name} holds another Chunked: let only one cut the time")
    if not hasattr(module, "batch_first") and batch_first_part(module) is not None:
        raise ValueError(
            f"{name} has a part with batch_first: give {name} an attribute batch_first that says "
            "whether it takes (B, T, *) itself"
        )


def _forgetful(module: nn.Module, state: Any) -> tuple[nn.Module, nn.Module] | None:
    """A module that returned no state, and a layer in it that has one; or else ``None``."""
    if runs_forward_of(module, Sequential) and isinstance(state, tuple):
        found = map(_forgetful, module, state)
        return next((pair for pair in found if pair is not None), None)
    if state is not None or not isinstance(module, nn.Module):  # a function has no layers
        return None
    layers = (one for one in module.modules() if isinstance(one, (Constrained, nn.RNNBase)))
    layer = next(layers, None)  # others may have no state
    return None if layer is None else (module, layer)
