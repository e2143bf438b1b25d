"""A cell: a layer whose channels each carry a state from one time step to the next.

A cell is written once, as one step. From the step come its loop in plain PyTorch, which is the
definition of correct, its kernels with their gradients, its place in a compiled stream and in an
ONNX graph, and the count of its arithmetic:

    class LeakyNeuron(Cell):
        states = ("membrane",)
        coefficients = ("decay",)

        @staticmethod
        def step(x, state, coefficients, fire):
            (membrane,), (decay,) = state, coefficients
            membrane = decay * membrane + x
            spikes = fire(membrane)
            return spikes, (membrane * (1 - spikes),)

    layer = LeakyNeuron(50, decay=0.9)  # output, state = layer(x), with x (T, B, 50)
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from snn_lib.containers import (
    Output,
    StatefulModule,
    check_module,
    feature_shape,
    runs_forward_of,
)
from snn_lib.functional import GAUSSIAN, Call, State, check_features, record_cell, run_cells
from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.kernels.program import Fire, Kind, key_of, program, register
from snn_lib.observing import note_input
from snn_lib.pytorch_private import is_observed, is_transformed, sees_operations
from snn_lib.recomputing import decide, dropout_seed, is_recomputing
from snn_lib.stability import MARGIN, check_decaying, check_rounding, refuse_rounding
from snn_lib.surrogate import Surrogate, check_surrogate
from snn_lib.time_constants import PerChannel, per_channel


class Constrained(StatefulModule):
    """A layer whose parameters are projected into an allowed set before it computes with them.

    Attributes:
        coefficients: the names of its coefficients, parameters or buffers.
    """

    coefficients: ClassVar[tuple[str, ...]] = ()

    def effective_coefficients(self) -> dict[str, Tensor]:
        """The coefficients that the layer computes with, by name, in the order of the class.

        In training, a parameter is set to the tensor of its name, see :meth:`coefficients_of_call`.
        """
        raise NotImplementedError

    def coefficients_of_call(self) -> dict[str, Tensor]:
        """The same for a forward pass. In training it sets the parameters to them, in place."""
        coefficients = self.effective_coefficients()
        if self.training and torch.is_grad_enabled() and not is_recomputing():
            self._pull_back(coefficients)
        return coefficients

    def project_(self) -> None:
        """Sets the parameters to what the layer computes with, in place.

        An optimiser may move a coefficient out of the stable set. If it stayed there, momentum
        would carry it away, and it would have to come all the way back. Every forward pass in
        training therefore pulls it back, and so does ``state_dict``. Only code that reads
        ``parameters()`` right after an optimiser's step, such as a moving average, has a reason to
        call this.
        """
        self._pull_back(self.effective_coefficients())

    def _pull_back(self, coefficients: dict[str, Tensor]) -> None:
        # torch.func's transforms and exported programs allow no change in place
        if is_transformed() or torch.compiler.is_exporting():
            return
        for name, effective in coefficients.items():
            own = self._parameters.get(name)  # which a parametrisation would compute
            # not what functional_call puts in its place
            if isinstance(own, nn.Parameter) and effective is not own:
                # through .data, or autograd would refuse the backward pass that saved it
                own.data.copy_(effective.detach())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.project_()
        super()._save_to_state_dict(*args, **kwargs)


class Cell(Constrained):
    """A layer that runs a step of a state over time, for every channel on its own.

    A subclass names its ``states`` and ``coefficients`` and defines ``step``. The step is traced
    once: it may use ``+ - * /``, comparisons, ``torch.where`` and PyTorch's elementary functions,
    and reads nothing but its arguments and Python's numbers. What kernels cannot compute runs in
    plain PyTorch.

    Args:
        shape: the channels: their number, or the feature shape such as ``(C, H, W)``; ``(C, 1, 1)``
            for maps of any size, whose positions share the coefficients.
        surrogate: the surrogate gradient of ``fire``: ``Gaussian``, ``FastSigmoid`` or any object
            with ``derivative(membrane)``, see :mod:`snn_lib.surrogate`.
        dropout: the probability, in training, that a spike is not passed on to the next layer. It
            is drawn for every neuron and time step. The other spikes are scaled by
            1 / (1 - dropout). The cell's own state sees all its spikes.
        train: the names of the coefficients that are parameters; the others are buffers.
        train_decay: whether the coefficients of ``decays`` are parameters, too, but for those that
            are zero everywhere.
        values: the coefficients' first values by name, each a number, a tensor of the channels'
            shape, or a function of this shape; or a list of such, for a coefficient with rows.

    Attributes:
        states: the names of its states.
        coefficients: the names of its coefficients. The layer has an attribute of each name.
        decays: the coefficients by which a state decays. If they are trained, the layer computes
            with the nearest ones in [0, 1 - 1e-3], in any training loop.
        spikes: whether its output is spikes, as ``fire`` returns them.

    Shape:
        - x: ``(T, B, *shape)``.
        - state: a tuple of tensors ``(B, *shape)``, one for each of ``states``.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns the output ``(T, B, *shape)`` and the new state. Under autocast the output of a
          float32 cell is in autocast's dtype, to which the matrix product after it would round it,
          unless it is spikes.

    Raises:
        ValueError: dropout is outside [0, 1); a coefficient has no value, or none that is finite; a
            decay is not between -1 and 1, here or where the layer is converted to a lower
            precision, or is trained and outside [0, 1 - 1e-3]; ``train_decay`` is given but there
            are no ``decays``; or a shape is wrong.
        TypeError: the surrogate has no ``derivative``, a coefficient is no number, ``train`` is a
            text, or the class has no ``step``.
    """

    takes_expanded = True
    states: ClassVar[tuple[str, ...]] = ()
    decays: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...  # a coefficient

    @staticmethod
    def step(x: Tensor, state: tuple, coefficients: tuple, fire: Fire) -> tuple[Tensor, tuple]:
        """One time step of every channel.

        Args:
            x: the input of this step.
            state: the states before it, in the order of ``states``.
            coefficients: in the order of ``coefficients``.
            fire: ``fire(v)`` is 1 where ``v > 1`` and 0 elsewhere, with the surrogate gradient.

        Returns:
            The output, and the states after the step.
        """
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Registers a new step, by the name of its class."""
        super().__init_subclass__(**kwargs)
        for attribute in ("states", "coefficients", "decays"):
            names = getattr(cls, attribute)
            if isinstance(names, str):  # or each of its letters would be a name
                raise TypeError(
                    f"{cls.__name__}.{attribute} is {names!r}, expected a tuple: ({names!r},)"
                )
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{cls.__name__}.{attribute} names {name!r} twice")
        parameters = inspect.signature(Cell.__init__).parameters
        taken = {*dir(Cell), *parameters, "shape", "training", "kind"}
        for name in taken.intersection(cls.coefficients):
            raise ValueError(f"{cls.__name__}.coefficients names {name!r}, which every Cell has")
        for name in set(cls.decays).difference(cls.coefficients):
            raise ValueError(f"{cls.__name__}.decays names {name!r}, which is no coefficient")
        above = next(base for base in cls.__mro__[1:] if issubclass(base, Cell))
        if cls.step is not above.step:
            if not isinstance(inspect.getattr_static(cls, "step"), staticmethod):
                raise TypeError(f"{cls.__name__}.step is a method: write @staticmethod above it")
            signature = inspect.signature(cls.step)
            try:
                signature.bind(*range(4))
            except TypeError:
                raise TypeError(
                    f"{cls.__name__}.step{signature}: expected four arguments, x, state, "
                    "coefficients and fire"
                ) from None
            own = cls.__module__.startswith("snn_lib.")
            name = cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"
            cls.kind = register(Kind(name, cls.step, cls.states, cls.coefficients))

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        surrogate: Surrogate = GAUSSIAN,
        dropout: float = 0.0,
        train: Sequence[str] = (),
        train_decay: bool = False,
        **values: "PerChannel | Sequence[PerChannel]",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if type(self).step is Cell.step:
            raise TypeError(f"{name} has no step")
        above = next(base for base in type(self).__mro__ if "kind" in vars(base))  # has its step
        for attribute in ("states", "coefficients"):
            ours, theirs = (len(getattr(kind, attribute)) for kind in (type(self), above))
            if ours != theirs:
                raise ValueError(
                    f"{name}.{attribute} names {ours}, but its step is that of {above.__name__}, "
                    f"which takes {theirs}: define a step"
                )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
        check_surrogate(surrogate)
        if isinstance(train, str):  # or each of its letters would be a name
            raise TypeError(f"train is {train!r}, expected the names in a list: [{train!r}]")
        train = tuple(train)  # it may be an iterator
        if train_decay and not self.decays:
            raise ValueError(f"train_decay has no effect: {type(self).__name__} names no decays")
        self.shape, self.surrogate, self.dropout = feature_shape(shape), surrogate, dropout
        for name in {*values, *train} ^ set(self.coefficients):
            expected = ", ".join(self.coefficients)
            raise ValueError(f"{name} has no value or is unknown: the coefficients are {expected}")
        self._kept_decaying: list[str] = []  # those of the decays that are trained
        for name in self.coefficients:
            first = first_values(values[name], self.shape, name).to(torch.get_default_dtype())
            for wrong in first[~first.isfinite()][:1]:
                raise ValueError(f"{name} is {wrong:g}, expected finite numbers")
            if name in self.decays:
                check_decaying(first.double())  # none that rounds to 1
            channels = torch.empty(first.shape).copy_(first)  # on the default device
            if name in train or (train_decay and name in self.decays and first.any()):
                for words in _refusal(name, first) if name in self.decays else ():
                    raise ValueError(words)
                self.register_parameter(name, nn.Parameter(channels))
                self._kept_decaying += [name] if name in self.decays else []
            else:
                self.register_buffer(name, channels)
        self.spikes = any(program(self.key).spikes)

    def forward(
        self, x: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Runs all time steps; see the class for shapes."""
        note_input(self, x, state)
        output, (state,) = run_cells([self.call(x, state)], x, lengths)
        return Output(output, state)

    def joins(self, following: nn.Module) -> bool:
        """Whether both can run as one: a neuron and a synapse, in either order, unobserved.

        In chunks, the second run of a chunk does what the first did.
        """
        return decide(lambda: self._joins(following))

    def _joins(self, following: nn.Module) -> bool:
        if torch.compiler.is_compiling() or is_transformed() or sees_operations():
            return False
        if not isinstance(following, Cell) or is_observed(self) or is_observed(following):
            return False
        cells = self, following
        if any(not (runs_forward_of(cell, Cell) and cell.coefficients) for cell in cells):
            return False
        if any(map(is_parametrized, cells)):  # to read a coefficient would compute it
            return False
        tensors = [getattr(cell, name) for cell in cells for name in cell.coefficients]
        first = tensors[0]
        if any((t.dtype, t.device) != (first.dtype, first.device) for t in tensors):
            return False
        if self._fires() and following._fires() and self.surrogate != following.surrogate:
            return False
        computes = first.dtype in COMPUTE_DTYPES and autocast_dtype(first) != torch.float16
        return computes and self.spikes != following.spikes

    def _fires(self) -> bool:
        return any(program(self.key).fires)

    def run_with(
        self,
        following: "Cell",
        x: Tensor,
        states: tuple[State | None, State | None],
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Runs this cell and the one after it as one; every result is as one by one."""
        # The call of the second one only needs the shape and the device of its input.
        calls = [cell.call(x, state) for cell, state in zip((self, following), states, strict=True)]
        return run_cells(calls, x, lengths)

    def call(self, x: Tensor, state: State | None = None, drops: bool = True) -> Call:
        """What the layer is to run with on an input, see :func:`snn_lib.functional.run_cells`."""
        # What is no sequence at all is refused later.
        if self.coefficients and isinstance(x, Tensor) and x.dim() > 2:
            check_features(x, self.shape)
        coefficients = self.coefficients_of_call()
        dropout = self.dropout if self.training and self.spikes and drops else 0.0
        return Call(
            self.kind,
            coefficients,
            self.state_rows(),
            state,
            self.surrogate,
            dropout,
            dropout_seed(x) if dropout else None,
            None if self.spikes else autocast_dtype([*coefficients.values(), x][0]),
        )

    def traces(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes, potential and reset of a cell that spikes, for a loss on them for example.

        It runs one step after the other, in plain PyTorch.

        Returns:
            S, V and R at every step, each ``(T, B, *shape)``, with gradients and before dropout. V
            is what the threshold compares with 1. R[t], already subtracted in V[t], is the state
            ``reset``, and zero if the cell has none.

        Raises:
            ValueError: the cell does not spike, or as :func:`snn_lib.functional.run_cells`.
        """
        spikes, potential, states = record_cell(self.call(x, state, drops=False), x)
        reset = states.get("reset")
        return spikes, potential, torch.zeros_like(potential) if reset is None else reset

    @property
    def products(self) -> int:
        """How often a channel multiplies in a step; not by coefficients that are all zero."""
        made = program(self.key)
        rows = chain.from_iterable(
            tensor if tensor.dim() > len(self.shape) else [tensor]
            for tensor in self.effective_coefficients().values()
        )
        pairs = zip(made.coefficients, rows, strict=True)
        zeros = {name: 0.0 for name, row in pairs if not row.any()}
        lines = made.forward.without({**zeros, "dropout_scale": 1.0}).lines
        return sum(line.operation in ("mul", "div") for line in lines)

    @property
    def key(self) -> str:
        """The key of its program, see ``snn_lib.kernels.program``."""
        tensors = (getattr(self, name) for name in self.coefficients)
        rows = (None if tensor.dim() == len(self.shape) else len(tensor) for tensor in tensors)
        return key_of(self.kind, tuple(self.state_rows().values()), tuple(rows))

    def state_rows(self) -> dict[str, int | None]:
        """By name and in order, how many rows each state has; ``None`` if it has none to count.

        ``Cell.__init__`` reads it, so a subclass sets before that what its own depends on.
        """
        return dict.fromkeys(self.states)

    # ---------------------------------------------------------------------------------------------
    # Coefficients that are kept where the cell is stable

    def effective_coefficients(self) -> dict[str, Tensor]:
        """The coefficients that the layer computes with, by name, in the order of ``coefficients``.

        Decays that are trained are the nearest ones in [0, 1 - 1e-3]. Their gradient is passed on
        to the parameter unchanged (straight-through), so that one at the edge can still be pulled
        back inside.
        """
        return {
            name: straight_through(getattr(self, name), _decaying)
            if name in self._kept_decaying
            else getattr(self, name)
            for name in self.coefficients
        }

    # ---------------------------------------------------------------------------------------------
    # Conversion and loading

    def must_decay_when_rounded(self) -> dict[str, Tensor]:
        """By name, the filters ``(P, *shape)`` that must still decay once they are rounded.

        A decay counts as a filter of order 1.
        """
        return {name: getattr(self, name)[None] for name in self.decays}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        for name, own in self.must_decay_when_rounded().items():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.numel() == own.numel():
                refuse_rounding(own, loaded.view(own.shape), prefix + name, others[-1])
        for name in self._kept_decaying:
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.is_floating_point() and not loaded.is_meta:
                others[-1].extend(_refusal(prefix + name, loaded))

    def _apply(self, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> "Cell":
        for own in self.must_decay_when_rounded().values():
            dtype = convert(own.new_empty(0)).dtype
            if dtype != own.dtype and not own.is_meta:
                check_rounding(own.detach(), dtype)
        return super()._apply(convert, recurse)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"{self.shape}"


def first_values(
    value: "PerChannel | Sequence[PerChannel]", shape: tuple[int, ...], name: str
) -> Tensor:
    """First values of every channel in float64, ``(*shape)`` or ``(rows, *shape)``, on the CPU."""
    if isinstance(value, str):  # a sequence of texts, without end
        raise TypeError(f"{name} is {value!r}, expected numbers")
    if isinstance(value, Sequence):
        rows = [first_values(row, shape, name) for row in value]
        none = torch.empty(0, *shape, dtype=torch.float64, device="cpu")
        return torch.stack(rows) if rows else none
    exact = torch.empty(shape, dtype=torch.float64, device="cpu")
    exact[...] = per_channel(value, shape, name)
    return exact


def _decaying(decay: Tensor) -> Tensor:
    """The nearest decays in [0, 1 - 1e-3], or further from 1 where the dtype has none so near."""
    return decay.clamp(0.0, 1.0 - max(MARGIN, torch.finfo(decay.dtype).eps))


def _refusal(name: str, decay: Tensor) -> list[str]:
    """What is wrong with decays that are to be trained: none, or one message.

    They may be as much beyond the edge as their dtype has rounded it.
    """
    rounded = 1.0 - MARGIN + torch.finfo(decay.dtype).eps / 2
    outside = decay[~((decay >= 0.0) & (decay < 1.0) & (decay <= rounded))]  # nan too
    expected = f"expected a decay in [0, {1 - MARGIN}], a time constant of at most 999 steps"
    return [f"{name} is trained, and {wrong:.6g}: {expected}" for wrong in outside[:1]]


def is_spiking(module: nn.Module) -> bool:
    """Whether a module is a cell whose output is spikes."""
    return isinstance(module, Cell) and module.spikes


def straight_through(tensor: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The projection of a tensor, whose gradient is passed on to the tensor unchanged."""
    fixed = tensor.detach()
    if not (torch.is_grad_enabled() or is_transformed()):
        return project(fixed)
    zero = fixed - tensor
    # The gradient of nan_to_num reads ``zero`` again. A compiled one computes it once more, from a
    # parameter that ``_pull_back`` has changed by then.
    if not torch.compiler.is_compiling():
        zero = zero.nan_to_num()  # it is nan where the tensor is infinite
    return project(fixed) - zero  # minus, because -0.0 + 0.0 is 0.0


def autocast_dtype(coefficient: Tensor) -> torch.dtype | None:
    """The dtype of autocast, if it is at work where a float32 layer lies."""
    device = coefficient.device.type
    # some devices, such as meta, have none
    if coefficient.dtype != torch.float32 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def parameter_groups(
    model: nn.Module, lr: float, coefficient_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Divides a model's parameters, for any optimiser, into weights, coefficients and delays.

        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))

    Coefficients have no weight decay, which would shorten the memory of the filters: AdamW's
    default alone takes a time constant of 800 steps to 89 in 1,000 steps with a rate of 1e-3. Nor
    have the delays of :class:`snn_lib.Delay`, which learn at the rate of the weights.

    Args:
        model: any module. Its coefficients are the parameters of its :class:`Cell` layers, such as
            synapses; layers of 2020 have none of these.
        lr: the learning rate of the weights.
        coefficient_lr_scale: the coefficients learn at so many times that rate. Poles near the unit
            circle need a small one, such as 0.01.

    Returns:
        The group of the weights, that of the coefficients and that of the delays, each if it has
        parameters.

    Raises:
        TypeError: the model is no module, such as an iterator of parameters.
        ValueError: a learning rate is negative or nan.
    """
    check_module("model", model)
    if not (lr >= 0 and coefficient_lr_scale >= 0):  # nan too
        raise ValueError(
            f"lr is {lr} and coefficient_lr_scale {coefficient_lr_scale}, expected 0 or more"
        )
    constrained: dict[bool, dict[int, nn.Parameter]] = {True: {}, False: {}}
    for module in model.modules():
        if isinstance(module, Constrained):
            own = module.parameters()
            constrained[isinstance(module, Cell)].update({id(p): p for p in own})
    coefficients, delays = constrained.values()
    weights = [p for p in model.parameters() if id(p) not in coefficients | delays]
    groups = [
        {"params": weights, "lr": lr},
        {
            "params": list(coefficients.values()),
            "lr": lr * coefficient_lr_scale,
            "weight_decay": 0.0,
        },
        {"params": list(delays.values()), "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
