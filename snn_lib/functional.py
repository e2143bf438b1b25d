"""Cells over whole sequences, as functions of tensors.

Autograd, ``torch.compile`` and ``torch.export`` see a single node, however many time steps there
are. This file checks what a user hands in, converts it to one dtype and folds the features into one
dimension; ``snn_lib.kernels`` computes. :func:`run_cells` does so for any cell, and
:func:`iir_filter` and :func:`spiking_neuron` for the two of the paper.

``backward`` is computed by kernels. Forward mode, the transforms of ``torch.func`` and second
derivatives are PyTorch's own: they run one step after the other, in plain PyTorch.

Tensors are time first, ``(T, B, *features)``.

Source: Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.kernels import COMPUTE_DTYPES, recurrence
from snn_lib.kernels.eager import steps_of
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.operator import run
from snn_lib.kernels.program import fire_with, key_of
from snn_lib.pytorch_private import is_observed, is_transformed, is_watched
from snn_lib.stability import warn_if_learning_unstable
from snn_lib.surrogate import Gaussian, Surrogate, check_surrogate

# Coefficients in these dtypes are converted to float32 to compute with them.
LOW_PRECISION = (torch.bfloat16, torch.float16)
# What to do if a layer is given what another returned.
CHAIN = (
    "chain layers with snn_lib.Sequential instead of nn.Sequential, or take the output alone, "
    "output, state = layer(x)"
)
GAUSSIAN = Gaussian()
FLOAT64 = torch.float64
State = tuple[Tensor, ...]
FilterState = tuple[Tensor, Tensor]
NeuronState = tuple[Tensor, Tensor]


@dataclass
class Call:
    """A cell, and what it is to run with.

    Attributes:
        kind: the name of the kind of cell.
        coefficients: by name, each ``(*features)``, or ``(rows, *features)`` if it has rows. The
            positions of a feature map may share them: ``(C, 1, 1)`` for maps ``(C, H, W)``.
        state: by name, the number of rows of each state; ``None`` if it has no dimension for them.
        given: the states before the first step, each ``(B, *features)`` or ``(rows, B,
            *features)``; zeros if ``None``.
        surrogate, dropout, seed: see :func:`spiking_neuron`.
        dtype: the dtype of the output, that of the coefficients if ``None``.
    """

    kind: str
    coefficients: dict[str, Tensor]
    state: Mapping[str, int | None]
    given: State | None
    surrogate: Surrogate  # no default, which torch.compile cannot make of an object
    dropout: float = 0.0
    seed: Tensor | None = None
    dtype: torch.dtype | None = None


def run_cells(
    calls: Sequence[Call], x: Tensor, lengths: Tensor | None = None, name: str = "x"
) -> tuple[Tensor, list[State]]:
    """Runs one cell, or two neighbours as one, over all steps of ``x``.

    Args:
        calls: the cells, of which one spikes at most.
        x: ``(T, B, *features)``. It is converted to the dtype of the coefficients; without any, it
            is computed in float64 if it has this dtype, and in float32 otherwise. An input that
            is constant over time may be expanded. It is copied only if it has to be converted while
            it needs a gradient, or while a compiler, a transform or a mode looks on.
        lengths: int64 ``(B,)``, the number of steps after which each sequence's state is returned;
            T for all if ``None``. One beyond T counts as T.
        name: what errors call ``x``.

    Returns:
        The output of the last cell, ``(T, B, *features)``, and the states of each after the last
        step, in at least float32.

    Raises:
        ValueError: a shape, a device, the lengths, the seed or the form of a state does not fit the
            others, coefficients are not floating point, the input or a state is complex, or dropout
            is outside [0, 1).
        TypeError: ``x``, a coefficient or an entry of a state is no tensor, or the surrogate has no
            ``derivative``.
        RuntimeError: ``torch.jit.trace`` traces it.
    """
    inputs = _inputs_of(calls, x, lengths, name)
    dtype, features, last = inputs.dtype, x.shape[2:], channels_last(x)
    if dtype == torch.float16:  # which no kernel writes
        inputs = inputs._replace(dtype=torch.float32)
    fires = calls[-1] if calls[1:] and not inputs.program.fires[0] else calls[0]
    output, after = run(inputs, fires.surrogate)
    states = [tuple(own.values()) for own in _states_of(calls, after, features, last)]
    return in_dtype(unfold(output, features, last), dtype, "the output"), states


def run_recurrent(
    calls: Sequence[Call],
    x: Tensor,
    weights: nn.Module,
    fed: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[State]]:
    """Runs one cell, or two as one, whose output comes back through weights a step later.

    Args:
        calls, x, lengths: as in :func:`run_cells`; without dropout.
        weights: from ``(1, B, *features)`` to the same shape. An ``nn.Linear`` without hooks has an
            operator; others run step by step in plain PyTorch.
        fed: the output before the first step, ``(B, *features)``; zeros if ``None``.

    Returns:
        What the first cell is given, x and what has come back, and the output of the last, each
        ``(T, B, *features)``; and the states of each cell after the last step. They are in the
        dtype that computes.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`run_cells`.
    """
    inputs = _inputs_of(calls, x, lengths, "x")
    own, features, last = inputs.coefficients.dtype, x.shape[2:], channels_last(x)
    inputs = inputs._replace(x=in_dtype(inputs.x, own, "x"), dtype=own)
    surrogate = calls[0].surrogate
    if fed is None:
        fed = x.new_zeros(x.shape[1:], dtype=own)
    check_shape("state fed", fed, x.shape[1:])
    fed = fold(in_dtype(fed, own, "state fed")[None], 2, last)[0]
    if type(weights) is nn.Linear and not is_observed(weights) and len(features) == 1:
        weight, bias = weights.weight.to(own), weights.bias
        if weight.shape != (*features, *features):
            raise ValueError(
                f"the weights have shape {tuple(weight.shape)}, expected {(*features, *features)}"
            )
        inputs = inputs if bias is None else inputs._replace(x=inputs.x + bias.to(own))
        currents, outputs, after = recurrence.run(inputs, surrogate, weight, fed)
    else:

        def weigh(output: Tensor) -> Tensor:
            given = unfold(output[None], features, last).to(promoted)
            return fold(weights(given), 2, last)[0].to(own)

        tensors = chain(calls[0].coefficients.values(), weights.parameters(), weights.buffers())
        promoted = next((one.dtype for one in tensors if one.is_floating_point()), own)
        with casting_anew(x.device):
            currents, outputs, after = recurrence.run_plainly(inputs, surrogate, weigh, fed)
    states = [tuple(state.values()) for state in _states_of(calls, after, features, last)]
    return unfold(currents, features, last), unfold(outputs, features, last), states


def _inputs_of(calls: Sequence[Call], x: Tensor, lengths: Tensor | None, name: str) -> Inputs:
    """What the program of these cells runs with; everything is checked."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot trace a cell: use torch.export.export(model, (x,)) instead"
        )
    check_sequence(name, x)
    inputs, *following = [_fold_call(call, x, name) for call in calls]
    own = inputs.coefficients.dtype
    for other in following:
        dropping = inputs if inputs.dropout else other
        at_rest = inputs.state is None and other.state is None
        inputs = inputs._replace(
            key=("~" if inputs.dtype == torch.bfloat16 else "+").join([inputs.key, other.key]),
            coefficients=torch.cat([inputs.coefficients, other.coefficients]),
            state=None if at_rest else torch.cat([inputs.first, other.first]),
            dropout=dropping.dropout,
            seed=dropping.seed,
            dtype=other.dtype,
            needed=[*inputs.needed, *other.needed],
        )
    if x.dtype != own and (x.dtype, own) != (torch.bfloat16, torch.float32):  # which kernels read
        inputs = inputs._replace(x=in_dtype(inputs.x, own, name))
    return inputs if lengths is None else inputs._replace(lengths=lengths_beside(x, lengths))


def _fold_call(call: Call, x: Tensor, name: str) -> Inputs:
    """What a cell runs with, with the features folded into one dimension; x is not converted."""
    if not 0.0 <= call.dropout < 1.0:
        raise ValueError(f"dropout is {call.dropout}, expected a probability in [0, 1)")
    check_surrogate(call.surrogate)
    if call.seed is not None and (call.seed.shape, call.seed.dtype) != ((2,), torch.int64):
        raise ValueError(
            f"seed has shape {tuple(call.seed.shape)} in {call.seed.dtype}, expected (2,) in "
            "torch.int64, from draw_seed"
        )
    shape, features, last = x.shape, x.shape[2:], channels_last(x)
    tensors, promoted = _in_one_dtype(call.coefficients)
    if tensors:
        own, device = tensors[0].dtype, tensors[0].device
        check_device(name, x, device)
    else:
        own, device = FLOAT64 if x.dtype == FLOAT64 else torch.float32, x.device
    dtype = call.dtype or promoted or own
    if call.dtype and dtype != own and (own != torch.float32 or dtype not in LOW_PRECISION):
        raise ValueError(f"dtype is {dtype}, expected {own}, or bfloat16 or float16 for float32")
    rows, counts, needed = [], [], []
    for label, tensor in zip(call.coefficients, tensors, strict=True):
        check_device(label, tensor, device)
        leading = tensor.dim() - len(features)  # 1 if it has rows
        tensor = over_positions(tensor, features, leading)
        if leading not in (0, 1) or tensor.shape[leading:] != features:
            raise ValueError(
                f"{label} has shape {tuple(tensor.shape)}, expected {tuple(features)}"
                f" or (order, *features) for {name} of shape {tuple(shape)} (T, B, *features)"
            )
        counts.append(tensor.shape[0] if leading else None)
        rows.append(fold(tensor if leading else tensor[None], 1, last))
        needed += [tensor.requires_grad] * len(rows[-1])
    state = None
    if call.given is not None:
        given = []
        check_entries(call.given, call.state)
        for (label, count), tensor in zip(call.state.items(), call.given, strict=True):
            expected = shape[1:] if count is None else (count, *shape[1:])
            check_shape(f"state {label}", tensor, expected)
            check_device(f"state {label}", tensor, device)
            tensor = in_dtype(tensor, own, f"state {label}")
            given.append(fold(tensor[None] if count is None else tensor, 2, last))
        state = torch.cat(given) if given else None
    if not rows:
        rows = [fold(torch.empty(0, *features, dtype=own, device=device), 1, last)]
    return Inputs(
        key_of(call.kind, tuple(call.state.values()), tuple(counts)),
        fold(x, 2, last),
        torch.cat(rows) if rows[1:] else rows[0],
        state,
        dropout=call.dropout,
        seed=draw_seed(x.device) if call.dropout and call.seed is None else call.seed,
        dtype=dtype,
        needed=needed,
    )


def _states_of(
    calls: Sequence[Call], rows: Tensor, features: torch.Size, last: bool, dim: int = 0
) -> list[dict[str, Tensor]]:
    """The states of each cell by name, from the rows of all of them along this dimension."""
    found, begin = [], 0
    for call in calls:
        found.append({})
        for name, count in call.state.items():
            own = rows.select(dim, begin) if count is None else rows.narrow(dim, begin, count)
            found[-1][name] = unfold(own, features, last)
            begin += 1 if count is None else count
    return found


def iir_filter(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: FilterState | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, FilterState]:
    """Filters every channel of ``x`` along time, each with its own coefficients.

    F[t] = sum_{p=1..P} alpha_p F[t-p] + sum_{q=0..Q} beta_q x[t-q]

    Args:
        x: input, ``(T, B, *features)``, see :func:`run_cells`.
        alpha: ``(P, *features)``, weights of the past outputs, P >= 0. The positions of a feature
            map may share them: ``(P, C, 1, 1)`` for maps ``(C, H, W)``. So may those of ``beta``.
        beta: ``(Q + 1, *features)``, weights of the present and past inputs.
        state: ``(past_output, past_input)``, the last P outputs ``(P, B, *features)`` and the last
            Q inputs ``(Q, B, *features)`` before the first step, oldest first; zeros if ``None``.
        dtype: the dtype of F, that of the coefficients if ``None``. If the recurrence is in
            float32, it may be ``torch.bfloat16`` or ``torch.float16``, for a matrix product that
            would round F anyway.

    Returns:
        F, ``(T, B, *features)``, and the state after the last step. The recurrence and the state
        have the dtype that ``alpha`` and ``beta`` promote to, at least float32, whatever F is
        rounded to. The gradient of ``alpha`` is computed from F before it is rounded.

    Raises:
        ValueError: F cannot be rounded to ``dtype``, or as :func:`run_cells`.
        TypeError: as there.
    """
    call = _filter_call(alpha, beta, state, dtype)
    output, ((past_output, past_input),) = run_cells([call], x)
    return output, (past_output, past_input)


def _filter_call(
    alpha: Tensor, beta: Tensor, state: FilterState | None, dtype: torch.dtype | None
) -> Call:
    """A filter, ready to run."""
    for label, tensor, least in (("alpha", alpha, 0), ("beta", beta, 1)):
        check_tensor(label, tensor)
        if tensor.dim() < 2 or tensor.shape[0] < least:
            raise ValueError(
                f"{label} has shape {tuple(tensor.shape)}, expected (order, *features)"
            )
    warn_if_learning_unstable(alpha)
    rows = {"past_output": alpha.shape[0], "past_input": beta.shape[0] - 1}
    coefficients = {"alpha": alpha, "beta": beta}
    return Call("IIRSynapse", coefficients, rows, state, GAUSSIAN, dtype=dtype)


def spiking_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None = None,
    surrogate: Surrogate = GAUSSIAN,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, NeuronState]:
    """Turns input currents into spikes: a threshold at 1 with a filtered reset.

    V[t] = lambda V[t-1] + I[t] - R[t]
    S[t] = 1 if V[t] > 1 else 0
    R[t+1] = theta R[t] + v_reset S[t]

    The derivatives use the surrogate gradient for dS/dV and flow through the reset as well.

    Args:
        current: I, ``(T, B, *features)``. The membrane is computed in the dtype that the
            coefficients promote to, at least float32, under autocast too.
        reset_decay: theta, ``features``. As in :func:`iir_filter`, the positions of a feature map
            may share it and the other two coefficients.
        reset_strength: v_reset, ``features``.
        membrane_decay: lambda, ``features``; 0 for a membrane without memory.
        state: ``(membrane, reset)``, V before the first step and R at it, both
            ``(B, *features)``; zeros if ``None``.
        surrogate: the surrogate gradient, any object with ``derivative(membrane)``. It is compiled
            if it consists of elementary operations, as ``torch.exp`` and ``torch.where``. The
            neuron runs in plain PyTorch otherwise.
        dropout: probability with which a spike is not passed on, drawn for every element and time
            step. Spikes that are passed on are scaled by 1 / (1 - dropout). The reset sees every
            spike. Under ``torch.func.vmap`` dropout follows the transform's ``randomness``.
        seed: of the dropout, int64 ``(2,)`` from :func:`draw_seed`, on the current's device; drawn
            if ``None``. Its second number is the number of the first element. Elements are counted
            in the order of ``(T, B, *features)``, or as they lie in memory if channels are last
            there. A chunk that counts on from the one before has the mask of the whole sequence.

    Returns:
        S, ``(T, B, *features)``, in the dtype that the coefficients promote to, and the state after
        the last step, in at least float32.

    Raises:
        ValueError, TypeError: as :func:`run_cells`.
    """
    call = _neuron_call(reset_decay, reset_strength, membrane_decay, state, surrogate)
    call.dropout, call.seed = dropout, seed
    output, ((membrane, reset),) = run_cells([call], current, name="current")
    return output, (membrane, reset)


def _neuron_call(
    theta: Tensor, strength: Tensor, decay: Tensor, state: NeuronState | None, surrogate: Surrogate
) -> Call:
    coefficients = {"reset_decay": theta, "reset_strength": strength, "membrane_decay": decay}
    rows = {"membrane": None, "reset": None}
    return Call("SpikingNeuron", coefficients, rows, state, surrogate)


class Recording(NamedTuple):
    """What a cell does at every step, with gradients and before dropout.

    Attributes:
        output: ``(T, B, *features)``.
        potential: what the threshold of its output compares with 1, in the same shape.
        states: by name, each state before every step, ``(T, [rows,] B, *features)``.
    """

    output: Tensor
    potential: Tensor
    states: dict[str, Tensor]


def record_cell(call: Call, x: Tensor) -> Recording:
    """Runs a cell that spikes in plain PyTorch and keeps what it does at every step, for a loss.

    Args:
        call: the cell; its dropout is left out.
        x: ``(T, B, *features)``.

    Raises:
        ValueError, TypeError: as :func:`run_cells`; also if the cell does not spike.
    """
    inputs = _inputs_of([replace(call, dropout=0.0)], x, None, "x")
    features, last, fire = x.shape[2:], channels_last(x), fire_with(call.surrogate)
    fired: list[tuple[Tensor, Tensor]] = []  # what thresholds have compared, and said

    def watched(potential: Tensor) -> Tensor:
        fired.append((potential, fire(potential)))
        return fired[-1][1]

    if not any(inputs.program.spikes):
        raise ValueError(f"{call.kind} does not spike, so it has no potential")
    outputs, potentials, states = [], [], [inputs.first]
    shape = inputs.x.shape[1:]  # of what a step returns, which may be a coefficient
    for output, rows in steps_of(inputs, watched):
        outputs.append(output.expand(shape))
        potentials += [one.expand(shape) for one, spikes in fired if spikes is output]
        after = [row.expand(shape) for row in rows]
        states.append(torch.stack(after) if after else inputs.first)
        fired.clear()
    spikes, potential = (torch.stack(of) if of else inputs.x for of in (outputs, potentials))
    before = torch.stack(states)[:-1]
    return Recording(
        unfold(spikes, features, last),
        unfold(potential, features, last),
        _states_of([call], before, features, last, dim=1)[0],
    )


def neuron_traces(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None = None,
    surrogate: Surrogate = GAUSSIAN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, membrane potential and reset of a neuron at every step, for a loss on them.

    Args:
        current, reset_decay, reset_strength, membrane_decay, state, surrogate: as in
            :func:`spiking_neuron`.

    Returns:
        S, V and R, each ``(T, B, *features)``, with gradients, in at least float32. R[t] is
        already subtracted from V[t]. A spike at t first appears in R[t+1].

    Raises:
        ValueError, TypeError: as in :func:`spiking_neuron`.
    """
    call = _neuron_call(reset_decay, reset_strength, membrane_decay, state, surrogate)
    spikes, membrane, states = record_cell(call, current)
    return spikes, membrane, states["reset"]


# --------------------------------------------------------------------------------------------------
# How sequences lie in memory


def channels_last(sequence: Tensor) -> bool:
    """Whether the channels of feature maps ``(T, B, C, *positions)`` lie side by side in memory.

    Convolutions call this order ``channels_last``. Maps are folded as they lie, and never copied.
    """
    return sequence.dim() > 3 and sequence.stride(2) == 1


def repeats(x: Tensor) -> bool:
    """Whether a sequence is one step, expanded over time, and may be computed as one.

    A program that a compiler or a transform makes must serve other inputs too.
    """
    return (
        not torch.compiler.is_compiling()
        and x.dim() > 1
        and x.stride(0) == 0
        and x.shape[0] > 1
        and not (x.requires_grad and torch.is_grad_enabled())
        and not is_transformed()
        and not is_watched()
    )


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed for the dropout of :func:`spiking_neuron`, int64 ``(2,)``.

    It is drawn from PyTorch's generator of the device, so it can be reproduced and nothing waits.
    """
    key = torch.randint(2**63 - 1, (), device=device)
    return torch.stack([key, torch.zeros_like(key)])


def casting_anew(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which autocast keeps no weights that it has cast.

    All steps, or chunks, would share them, and the gradients would be added up in low precision.
    """
    kind = device.type
    if torch.compiler.is_compiling() or not (
        torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def in_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in this dtype; without a call of PyTorch where there is nothing to do."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_complex():
        raise ValueError(f"{name} is in {tensor.dtype}, expected real numbers")
    return tensor[:1].to(dtype).expand(tensor.shape) if repeats(tensor) else tensor.to(dtype)


def fold(tensor: Tensor, leading: int, last: bool) -> Tensor:
    """Folds the feature dimensions, which follow the ``leading`` ones, into a single dimension.

    With ``last``, the channels, which are the first of them, are folded behind the positions.
    """
    if tensor.dim() == leading + 1:
        return tensor
    return (tensor.movedim(leading, -1) if last else tensor).flatten(leading)


def unfold(tensor: Tensor, features: torch.Size, last: bool) -> Tensor:
    """Undoes ``fold``."""
    if len(features) == 1:
        return tensor
    if not last:
        return tensor.unflatten(-1, features)
    channels, *positions = features
    return tensor.unflatten(-1, (*positions, channels)).movedim(-1, tensor.dim() - 1)


def over_positions(coefficients: Tensor, features: torch.Size, leading: int) -> Tensor:
    """Repeats the coefficients of a channel, ``(C, 1, 1)``, over its feature map ``(C, H, W)``.

    Nothing is copied. Coefficients that do not fit are returned as they are; a check names them.
    """
    own = coefficients.shape[max(leading, 0) :]
    if own == features or not _fit(own, features):
        return coefficients
    return coefficients.expand(*coefficients.shape[:leading], *features)


def _fit(own: Sequence[int], features: Sequence[int]) -> bool:
    """Whether the features of a layer are those of a sequence; its positions may be 1 for all."""
    if len(own) != len(features) or own[:1] != features[:1]:
        return False
    # One by one, since torch.compile finds no size in a tuple if it may change.
    return all(size == whole or size == 1 for size, whole in zip(own, features, strict=True))


# --------------------------------------------------------------------------------------------------
# Checks


def check_features(x: Tensor, shape: Sequence[int]) -> None:
    """Raises a ValueError unless ``x``, ``(T, B, *features)``, has the features of a layer."""
    if not _fit(tuple(shape), x.shape[2:]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (T, B, *features) with features of the "
            f"layer's shape {tuple(shape)}"
        )


def check_sequence(name: str, x: Tensor) -> None:
    """Raises a TypeError unless this is a tensor, and a ValueError unless (T, B, *features)."""
    check_tensor(name, x)
    if x.dim() < 3:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected at least three dimensions "
            "(T, B, *features)"
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises a TypeError unless this is a tensor."""
    if not isinstance(tensor, Tensor):
        hint = f": {CHAIN}" if getattr(tensor, "_fields", ()) == ("output", "state") else ""
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor{hint}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises a TypeError unless this is a tensor, and a ValueError unless it has this shape."""
    check_tensor(name, tensor)
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_entries(state: Sequence[Tensor], names: Collection[str]) -> None:
    """Raises a ValueError unless a state is a tuple with an entry for each of these names."""
    is_tuple = isinstance(state, (tuple, list))
    if not is_tuple or len(state) != len(names):
        found = f"has {len(state)} entries" if is_tuple else f"is a {type(state).__name__}"
        number = len(names) if is_tuple else "a tuple"
        raise ValueError(f"state {found}, expected {number}: ({', '.join(names)})")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises a ValueError unless the tensor is on this device."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} as the coefficients")


def lengths_beside(sequence: Tensor, lengths: Tensor) -> Tensor:
    """The lengths as int64 ``(B,)`` on the device of their sequences, ``(T, B, *)``.

    Raises:
        ValueError: there is not a whole number for each sequence.
    """
    if not isinstance(lengths, Tensor):
        raise ValueError(f"lengths are a {type(lengths).__name__}, expected a tensor")
    expected = tuple(sequence.shape[1:2])
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != expected:
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)} in {lengths.dtype}, expected whole numbers "
            f"of shape {expected}"
        )
    return lengths.to(sequence.device, torch.int64)


def _in_one_dtype(coefficients: dict[str, Tensor]) -> tuple[list[Tensor], torch.dtype | None]:
    """The coefficients in one dtype, float32 or float64, and the dtype that they promote to."""
    tensors = list(coefficients.values())
    if not tensors:
        return [], None
    for name, tensor in coefficients.items():
        check_tensor(name, tensor)
    own, *others = {tensor.dtype for tensor in tensors}
    if not others and own in COMPUTE_DTYPES:
        return tensors, own
    for name, tensor in coefficients.items():
        if tensor.dtype not in COMPUTE_DTYPES + LOW_PRECISION:
            raise ValueError(
                f"{name} is in {tensor.dtype}, expected float32, float64, bfloat16 or float16"
            )
    own = reduce(torch.promote_types, others, own)
    dtype = own if own in COMPUTE_DTYPES else torch.float32
    return [tensor.to(dtype) for tensor in tensors], own
