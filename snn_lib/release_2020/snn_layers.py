"""The layers of the authors' 2020 release: its names, arguments, shapes and state-dict keys.

Scripts and checkpoints written for that release run unchanged. The layers take and return tensors
with time last, ``(B, *features, T)``. These are views of tensors with time first, on which the
operators of :mod:`snn_lib.functional` compute, so nothing is copied between layers.

Unless a layer says otherwise, it has ``forward(x, states=None) -> (output, states)``, and
``create_init_states()``, which returns the zeros to start from, without a batch dimension: states
without one are those of every sequence. ``step_num`` and ``batch_size`` are only kept as
attributes; the sizes of the input count. Time constants are in steps. A layer's
parameters are in a cell, whose name is part of their state-dict keys.

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.cells import DualExponentialSynapse
from snn_lib.containers import PerStep
from snn_lib.errors import out_of_memory
from snn_lib.functional import NeuronState, iir_filter, neuron_traces, spiking_neuron
from snn_lib.inspection.monitor import SynapseRecord, as_numpy, record_of
from snn_lib.observing import observe
from snn_lib.surrogate import THRESHOLD, Gaussian
from snn_lib.time_constants import decay_of, peak_scale

__all__ = [
    "SNN_Monitor",
    "axon_layer",
    "calculate_conv2d_outsize",
    "calculate_maxpooling2d_outsize",
    "conv2d_layer",
    "dual_exp_iir_layer",
    "exponential_filter_layer",
    "filter_layer",
    "firsr_order_low_pass_layer",
    "first_order_low_pass_layer",
    "maxpooling2d_layer",
    "neuron_layer",
    "neuron_layer_dot_product",
    "np",
    "snn_layer",
    "synapse_layer",
    "threshold",
    "threshold_layer",
    "torch",
]

States = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------
# The threshold


class threshold(torch.autograd.Function):
    """``threshold.apply(v, sigma)``: 1 where v > 1, else 0, with the Gaussian surrogate gradient.

    Args:
        v: membrane potentials, of any shape.
        sigma: width of the Gaussian, a number or a tensor of one element.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, sigma: float | Tensor) -> Tensor:
        """Spikes, of the shape and dtype of ``v``."""
        ctx.save_for_backward(v)
        ctx.surrogate = Gaussian(float(sigma))
        return (v > THRESHOLD).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor, None]:
        """The gradient of ``v``."""
        (v,) = ctx.saved_tensors
        return grad_spikes * ctx.surrogate.derivative(v), None


class threshold_layer(nn.Module):
    """``threshold`` as a module: membrane potentials to spikes, of any shape."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, v: Tensor) -> Tensor:
        """Spikes, of the shape and dtype of ``v``."""
        return threshold.apply(v, self.sigma)


# ---------------------------------------------------------------------------------------------
# What the layers share


class _Cell(nn.Module):
    """The parameters and modules of a layer, by name."""

    def __init__(self, **members: nn.Parameter | nn.Module) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


class _Layer(nn.Module):
    """A layer between time-last tensors; subclasses define ``_run`` on time-first ones.

    ``features`` is the shape of the input without batch and time, ``state_shapes`` are those of the
    states without the batch.
    """

    cell_name: str

    def __init__(
        self,
        step_num: int,
        batch_size: int,
        cell: _Cell,
        features: tuple[int, ...],
        *state_shapes: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.step_num, self.batch_size = step_num, batch_size
        self._features, self._state_shapes = features, state_shapes
        self.add_module(self.cell_name, cell)

    @property
    def _cell(self) -> Any:
        return getattr(self, self.cell_name)

    def create_init_states(self) -> States:
        """Zeros, for any batch."""
        like = next(self.parameters())
        return tuple(like.new_zeros(shape) for shape in self._state_shapes)

    def forward(self, x: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Runs all time steps; see the class for shapes.

        Raises:
            ValueError: the shape of the input, or of a state, is another one.
        """
        states = None if states is None else self._for_batch(len(x), states)
        try:
            output, states = self._run(x.movedim(-1, 0), states)
        except (ValueError, RuntimeError) as error:
            given, sizes = tuple(x.shape[1:-1]), self._features
            if out_of_memory(error):
                raise
            if given == sizes:
                self._check_states(len(x), states)
                raise
            # Some layers compute with what broadcasts, and then the error is about something else.
            cause = f": {error}" if 1 in given + sizes else ""
            raise ValueError(
                f"{type(self).__name__} is given an input of shape {tuple(x.shape)}, expected "
                f"(B, {', '.join(map(str, sizes))}, T){cause}"
            ) from error
        return output.movedim(0, -1), states

    def _for_batch(self, size: int, states: Any) -> Any:
        """The states of each sequence; those without a batch dimension are those of all."""
        given, shapes = _listed(states), self._state_shapes
        if len(given) != len(shapes):
            raise ValueError(
                f"{type(self).__name__} is given {len(given)} states, expected {len(shapes)}"
            )
        pairs = zip(given, shapes, strict=True)
        wide = [
            s.expand(size, *shape) if s.shape in (shape, (1, *shape)) else s for s, shape in pairs
        ]
        return wide[0] if len(wide) == 1 else tuple(wide)

    def _check_states(self, size: int, states: Any) -> None:
        """Raises :class:`ValueError` if a state has another shape than for so many sequences."""
        if states is None:
            return
        for state, shape in zip(_listed(states), self._state_shapes, strict=True):
            if state.shape != (size, *shape):
                raise ValueError(
                    f"{type(self).__name__} is given a state of shape {tuple(state.shape)}, "
                    f"expected {(size, *shape)}"
                )

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        raise NotImplementedError


def _listed(states: Any) -> tuple[Tensor, ...]:
    """The states of a layer, which may be a tensor alone."""
    return (states,) if isinstance(states, Tensor) else tuple(states)


def _parameter(value: Tensor | float, train: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(value).detach().clone(), requires_grad=train)


def _decay(shape: Sequence[int], tau: float, train: bool = False) -> nn.Parameter:
    """exp(-1 / tau) for every channel."""
    return _parameter(torch.full(tuple(shape), float(decay_of(tau))), train)


def _trace(x: Tensor, decay: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """y[t] = decay y[t-1] + x[t] after the value ``past``, ``(B, *features)``, and the last y."""
    state = None if past is None else (past[None], x.new_empty(0, *x.shape[1:]))
    y, (last, _) = iir_filter(x, decay[None], torch.ones_like(decay)[None], state)
    return y, last[0]


def _difference_of_traces(x: Tensor, cell: Any, states: States | None) -> tuple[Tensor, States]:
    """m - s of two traces with the cell's decays, and ``(m, s)`` at the last step."""
    past_m, past_s = (None, None) if states is None else states
    m, last_m = _trace(x, cell.decay_m, past_m)
    s, last_s = _trace(x, cell.decay_s, past_s)
    return m - s, (last_m, last_s)


# ---------------------------------------------------------------------------------------------
# Synapses


class dual_exp_iir_layer(_Layer):
    """Dual exponential synapses: F[t] = alpha_1 F[t-1] + alpha_2 F[t-2] + beta_1 x[t].

    Shape:
        ``(B, *input_shape, T)`` to the same; states ``(F[t], F[t-1])``, both ``(B, *input_shape)``.
    """

    cell_name = "dual_exp_iir_cell"

    def __init__(
        self,
        input_shape: Sequence[int],
        step_num: int,
        batch_size: int,
        tau_m: float,
        tau_s: float,
        train_coefficients: bool,
    ) -> None:
        shape = tuple(input_shape)
        initial = DualExponentialSynapse(shape, tau_m, tau_s)
        cell = _Cell(
            v_0=_parameter(peak_scale(tau_m, tau_s)),  # stored, not applied
            alpha_1=_parameter(initial.alpha[0], train_coefficients),
            alpha_2=_parameter(initial.alpha[1], train_coefficients),
            beta_1=_parameter(initial.beta[0], train_coefficients),
        )
        super().__init__(step_num, batch_size, cell, shape, shape, shape)

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        cell = self._cell
        if states is not None:
            last, before = states
            states = torch.stack([before, last]), x.new_empty(0, *x.shape[1:])
        alpha = torch.stack([cell.alpha_1, cell.alpha_2])
        psp, (past, _) = iir_filter(x, alpha, cell.beta_1[None], states)
        before, last = past.unbind()
        return psp, (last, before)


class first_order_low_pass_layer(_Layer):
    """First-order low-pass synapses: F[t] = alpha_1 F[t-1] + x[t].

    Shape:
        ``(B, *input_shape, T)`` to the same; states ``F[t]``, a tensor ``(B, *input_shape)``.
    """

    cell_name = "first_order_low_pass_cell"

    def __init__(
        self,
        input_shape: Sequence[int],
        step_num: int,
        batch_size: int,
        tau: float,
        train_coefficients: bool,
    ) -> None:
        shape = tuple(input_shape)
        cell = _Cell(alpha_1=_decay(shape, tau, train_coefficients))
        super().__init__(step_num, batch_size, cell, shape, shape)

    def create_init_states(self) -> Tensor:
        """Zeros, for any batch."""
        return super().create_init_states()[0]

    def _run(self, x: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        return _trace(x, self._cell.alpha_1, states)


class firsr_order_low_pass_layer(first_order_low_pass_layer):
    """The same, by the name that the first version of the release gave it and its parameters."""

    cell_name = "firsr_order_low_pass_cell"


class axon_layer(_Layer):
    """v_0 (m[t] - s[t]) with m[t] = decay_m m[t-1] + x[t] and s[t] = decay_s s[t-1] + x[t].

    Shape:
        ``(B, *input_shape, T)`` to the same; states ``(m, s)``, both ``(B, *input_shape)``.
    """

    cell_name = "axon_cell"

    def __init__(
        self,
        input_shape: Sequence[int],
        step_num: int,
        batch_size: int,
        tau_m: float,
        tau_s: float,
        train_tau_m: bool,
        train_tau_s: bool,
    ) -> None:
        shape = tuple(input_shape)
        cell = _Cell(
            v_0=_parameter(peak_scale(tau_m, tau_s)),
            decay_m=_decay(shape, tau_m, train_tau_m),
            decay_s=_decay(shape, tau_s, train_tau_s),
        )
        super().__init__(step_num, batch_size, cell, shape, shape, shape)

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        difference, states = _difference_of_traces(x, self._cell, states)
        return self._cell.v_0 * difference, states


class synapse_layer(axon_layer):
    """As :class:`axon_layer`, but every connection has a filter of its own.

    Args:
        input_size, output_size: they take the place of ``input_shape``; the others are the same.

    Shape:
        ``(B, in, T)`` to ``(B, in, out, T)``; states ``(m, s)``, both ``(B, in, out)``.
    """

    cell_name = "synapse_cell"

    def __init__(self, input_size: int, output_size: int, *options: Any, **named: Any) -> None:
        super().__init__((input_size, output_size), *options, **named)
        self._features = (input_size,)

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        connections = x[..., None].expand(*x.shape, self._cell.decay_m.shape[1])
        return super()._run(connections, states)


# ---------------------------------------------------------------------------------------------
# Neurons


class _NeuronCell(_Cell):
    """A neuron layer's parameters; its properties have the names of ``SpikingNeuron``."""

    sigma: Tensor
    reset_decay: Tensor
    reset_v: Tensor
    decay_v: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        tau_m: float,
        membrane_filter: bool,
        reset_v: float = 1.0,
        **members: nn.Parameter | nn.Module,
    ) -> None:
        decay = _decay(shape, tau_m)
        super().__init__(
            sigma=_parameter(Gaussian().width),
            reset_decay=decay,
            reset_v=_parameter(torch.full_like(decay, reset_v)),
            decay_v=_parameter(decay),
            **members,
        )
        self.membrane_filter = membrane_filter

    @property
    def reset_strength(self) -> Tensor:
        return self.reset_v

    @property
    def membrane_decay(self) -> Tensor:
        return self.decay_v if self.membrane_filter else torch.zeros_like(self.decay_v)

    def forward(self, current: Tensor, states: NeuronState | None) -> tuple[Tensor, States]:
        return spiking_neuron(
            current,
            self.reset_decay,
            self.reset_strength,
            self.membrane_decay,
            states,
            Gaussian(self.sigma.item()),
        )

    def traces(self, current: Tensor, states: NeuronState | None = None) -> tuple[Tensor, ...]:
        """Spikes, membrane potential and reset at every step."""
        coefficients = self.reset_decay, self.reset_strength, self.membrane_decay
        return neuron_traces(current, *coefficients, states)


class _NeuronLayer(_Layer):
    """Neurons; subclasses define ``_current``, which turns a time-first PSP into their current."""

    cell_name = "neuron_cell"

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        return self._cell(self._current(x), states)

    def _current(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class neuron_layer(_NeuronLayer):
    """Fully connected neurons: weights on the PSP, threshold 1, filtered reset.

    V[t] = decay_v V[t-1] + (W F + b)[t] - R[t], without the first term if ``membrane_filter`` is
    off; R[t+1] = reset_decay R[t] + reset_v S[t].

    Args:
        input_type: ``"axon"`` for one PSP for each input. Otherwise there is one for each
            connection, as a :class:`synapse_layer` returns them, and there is no bias.

    Shape:
        ``(B, in, T)``, or ``(B, in, out, T)``, to spikes ``(B, out, T)``; states ``(V, R)``, both
        ``(B, out)``: V of the last step and R of the next.
    """

    def __init__(
        self,
        input_size: int,
        neuron_number: int,
        step_num: int,
        batch_size: int,
        tau_m: float,
        train_bias: bool,
        membrane_filter: bool,
        input_type: str = "axon",
        reset_v: float = 1.0,
    ) -> None:
        shape = (neuron_number,)
        features: tuple[int, ...] = (input_size,)
        if input_type == "axon":
            weight = nn.Linear(input_size, neuron_number, bias=train_bias)
        else:
            features = (input_size, neuron_number)
            weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(features)))
        cell = _NeuronCell(shape, tau_m, membrane_filter, reset_v, weight=weight)
        super().__init__(step_num, batch_size, cell, features, shape, shape)
        self.input_type = input_type

    def _current(self, x: Tensor) -> Tensor:
        weight = self._cell.weight
        return weight(x) if isinstance(weight, nn.Linear) else (weight * x).sum(-2)


class neuron_layer_dot_product(_NeuronLayer):
    """As :class:`neuron_layer`, but each neuron has a single input, with a weight and no bias.

    Shape:
        ``(B, out, T)`` to spikes ``(B, out, T)``; states ``(V, R)``, both ``(B, out)``.
    """

    def __init__(
        self,
        input_size: int,
        neuron_number: int,
        step_num: int,
        batch_size: int,
        tau_m: float,
        train_bias: bool,
        membrane_filter: bool,
        input_type: str = "axon",
    ) -> None:
        shape = (neuron_number,)
        weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, neuron_number)))
        cell = _NeuronCell(shape, tau_m, membrane_filter, weight=weight)
        super().__init__(step_num, batch_size, cell, shape, shape, shape)
        self.input_type = input_type

    def _current(self, x: Tensor) -> Tensor:
        return self._cell.weight * x


class conv2d_layer(_NeuronLayer):
    """As :class:`neuron_layer`, with a convolution in place of the matrix.

    Attributes:
        output_shape: ``(C', H', W')``.

    Shape:
        ``(B, C, H, W, T)`` to spikes ``(B, C', H', W', T)``; states ``(V, R)``, both
        ``(B, C', H', W')``.
    """

    cell_name = "conv2d_cell"

    def __init__(
        self,
        h_input: int,
        w_input: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        step_num: int,
        batch_size: int,
        tau_m: float,
        train_bias: bool,
        membrane_filter: bool,
        input_type: str = "axon",
    ) -> None:
        size = calculate_conv2d_outsize(h_input, w_input, padding, kernel_size, stride, dilation)
        shape = (out_channels, *size)
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=train_bias
        )
        cell = _NeuronCell(shape, tau_m, membrane_filter, conv=conv)
        super().__init__(step_num, batch_size, cell, (in_channels, h_input, w_input), shape, shape)
        self.input_type, self.output_shape = input_type, shape

    def _current(self, x: Tensor) -> Tensor:
        return PerStep(self._cell.conv)(x)


class snn_layer(_Layer):
    """Synapses and neurons in one: v_0 (W (m - s) + b) drives neurons without membrane filter.

    Shape:
        ``(B, in, T)`` to spikes ``(B, out, T)``; states ``(V, R, m, s)``, V and R ``(B, out)``,
        the traces m and s ``(B, in)``.
    """

    cell_name = "snn_cell"

    def __init__(
        self,
        input_size: int,
        neuron_number: int,
        step_num: int,
        batch_size: int,
        tau_m: float,
        tau_s: float,
        train_tau_m: bool,
        train_tau_s: bool,
    ) -> None:
        inputs, neurons = (input_size,), (neuron_number,)
        cell = _NeuronCell(
            neurons,
            tau_m,
            membrane_filter=False,
            v_0=_parameter(peak_scale(tau_m, tau_s)),
            decay_m=_decay(inputs, tau_m, train_tau_m),
            decay_s=_decay(inputs, tau_s, train_tau_s),
            weight=nn.Linear(input_size, neuron_number),
        )
        super().__init__(step_num, batch_size, cell, inputs, neurons, neurons, inputs, inputs)

    def _run(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        cell = self._cell
        neurons, traces = (None, None) if states is None else (states[:2], states[2:])
        difference, traces = _difference_of_traces(x, cell, traces)
        spikes, neurons = cell(cell.v_0 * cell.weight(difference), neurons)
        return spikes, (*neurons, *traces)


# ---------------------------------------------------------------------------------------------
# Pooling and filters: a tensor in, a tensor out, no states


def calculate_conv2d_outsize(
    h: int,
    w: int,
    padding: int | tuple[int, int],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
) -> tuple[int, int]:
    """The height and width of the output of a convolution or pooling of an ``h`` x ``w`` image."""
    window = nn.Conv2d(1, 1, kernel_size, stride, padding, dilation, device="meta")
    height, width = window(torch.empty(1, h, w, device="meta")).shape[1:]
    return height, width


calculate_maxpooling2d_outsize = calculate_conv2d_outsize


class maxpooling2d_layer(nn.Module):
    """The maximum of the PSP over a window, at every time step.

    Attributes:
        output_shape: ``(H', W')``.

    Shape:
        ``(B, C, H, W, T)`` to ``(B, C, H', W', T)``.
    """

    def __init__(
        self,
        h_input: int,
        w_input: int,
        in_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        step_num: int,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.step_num, self.batch_size, self.in_channels = step_num, batch_size, in_channels
        self.output_shape = calculate_maxpooling2d_outsize(
            h_input, w_input, padding, kernel_size, stride, dilation
        )
        self.pool = PerStep(nn.MaxPool2d(kernel_size, stride, padding, dilation))

    def forward(self, x: Tensor) -> Tensor:
        """Pools all time steps; see the class for shapes."""
        return self.pool(x.movedim(-1, 0)).movedim(0, -1)


class filter_layer(nn.Module):
    """The filter through which spike trains are compared, as in :class:`OutputFilter`.

    Shape:
        ``(B, input_size, T)`` to the same.
    """

    def __init__(
        self,
        input_size: int,
        step_num: int,
        batch_size: int,
        filter_tau_m: float,
        filter_tau_s: float,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.step_num, self.batch_size, self.input_size = step_num, batch_size, input_size
        self.filter_v0 = _parameter(peak_scale(filter_tau_m, filter_tau_s))
        self.filter_decay_m = _decay((), filter_tau_m)
        self.filter_decay_s = _decay((), filter_tau_s)
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Filters all time steps; see the class for shapes."""
        p, q, v0 = self.filter_decay_m, self.filter_decay_s, self.filter_v0
        return _same_for_all(x, (p + q, -p * q), (torch.zeros_like(v0), v0 * (p - q)))


class exponential_filter_layer(nn.Module):
    """y[t] = (1 - alpha) y[t-1] + alpha x[t].

    Shape:
        ``(B, input_size, T)`` to the same.
    """

    alpha: Tensor

    def __init__(
        self, input_size: int, step_num: int, batch_size: int, alpha: float, device: Any = None
    ) -> None:
        super().__init__()
        self.step_num, self.batch_size, self.input_size = step_num, batch_size, input_size
        self.register_buffer("alpha", torch.tensor(float(alpha), device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filters all time steps; see the class for shapes."""
        return _same_for_all(x, (1 - self.alpha,), (self.alpha,))


def _same_for_all(x: Tensor, alpha: States, beta: States) -> Tensor:
    """Filters every channel of the time-last ``x`` with the same scalar coefficients."""
    x = x.movedim(-1, 0)
    a, b = (
        torch.stack(values).view(-1, *[1] * (x.dim() - 2)).expand(-1, *x.shape[2:])
        for values in (alpha, beta)
    )
    return iir_filter(x, a, b)[0].movedim(0, -1)


# ---------------------------------------------------------------------------------------------
# Monitor


class SNN_Monitor:
    """Records a layer over its next ``max_iteration`` forward passes.

    Args:
        module: a synapse layer, or a neuron layer other than :class:`snn_layer`.
        max_iteration: number of passes, all of one batch size and length.

    Attributes:
        record: NumPy arrays ``(iteration, B, *features, T)``, with the iterations that have run:
            ``"psp"`` of a synapse layer, or ``"v"``, ``"reset_v"`` and ``"spike"`` of a neuron
            layer. At step t these are the potential V[t], the next reset R[t+1], and S[t].

    Raises:
        TypeError: ``module`` is another kind of layer.
    """

    def __init__(self, module: _Layer, max_iteration: int = 1) -> None:
        if not isinstance(module, _Layer) or isinstance(module, snn_layer):
            raise TypeError(f"{type(module).__name__} is no layer that can be monitored")
        self.module, self.max_iteration = module, max_iteration
        self.record: dict[str, np.ndarray] = {}
        self._observed = module._cell if isinstance(module, _NeuronLayer) else module
        self._hook = observe(self._observed, self._store)

    def _store(self, given: dict[str, Any], output: Tensor) -> None:
        run, cell = record_of(self._observed, given, output), self.module._cell
        if isinstance(run, SynapseRecord):
            traces = {"psp": run.psp}
        else:
            reset_after = cell.reset_decay * run.reset + cell.reset_strength * run.spikes  # R[t+1]
            time_first = {"v": run.membrane, "reset_v": reset_after, "spike": run.spikes}
            traces = {name: trace.movedim(0, -1) for name, trace in time_first.items()}
        for name, trace in traces.items():
            earlier = self.record.get(name, ())
            self.record[name] = np.stack([*earlier, as_numpy(trace)])
        if len(earlier) + 1 == self.max_iteration:
            self._hook.remove()
