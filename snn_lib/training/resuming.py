"""What a run needs besides its weights to go on from a checkpoint, and whether a file holds it.

A file may hold anything: what PyTorch would compute with unchecked is checked here.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snn_lib.training.run_log import Row

TIMES = ("seconds", "data_seconds")  # columns of the metrics that differ from run to run


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds besides weights and optimiser."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the epoch under way
    batches: int = 0  # that an epoch has
    sums: dict[str, float] = field(default_factory=dict)  # of those batches
    seconds: float = 0.0  # that they took
    data_seconds: float = 0.0  # of which until their data was there
    history: list[Row] = field(default_factory=list)  # a row of metrics an epoch
    warned: list[str] = field(default_factory=list)  # what was warned of, once a run
    folder: str = ""  # of the run's logs

    def check(self) -> None:
        """Raises ValueError unless it makes sense, which a file does not promise."""
        for name, value in vars(Progress()).items():
            if not isinstance(getattr(self, name), type(value)):
                raise ValueError(f"{name} is no {type(value).__name__}")
        if len(self.history) != self.epoch:
            raise ValueError(f"{self.epoch} epochs have {len(self.history)} rows of metrics")
        if not 0 <= self.batch <= self.batches:
            raise ValueError(f"batch {self.batch} of {self.batches}")
        for row in (self.sums, *self.history):
            if not all(isinstance(value, (int, float)) for value in row.values()):
                raise ValueError("a metric is no number")
        if not all(abs(value) <= 2**53 for value in self.sums.values()):  # nor nan
            raise ValueError("a sum is not finite, or too large to be counted with")
        for number, row in enumerate(self.history, 1):
            if row.get("epoch") != number:
                raise ValueError("epochs are not in order")
            if row.keys() != self.history[0].keys() | {"epoch", *TIMES}:
                raise ValueError("epochs have different metrics")
        amounts = self.seconds, self.data_seconds, self.sums.get("samples", 0)
        if not all(amount >= 0 for amount in amounts):  # nor nan
            raise ValueError("a time or the number of samples is negative")


def check_alike(state: Any, own: Any, name: str) -> None:
    """Raises ValueError unless both have the same keys, types and shapes, and finite numbers."""
    if isinstance(own, dict) and isinstance(state, dict) and state.keys() == own.keys():
        for key, value in own.items():
            check_alike(state[key], value, f"{name}, {key}")
    elif isinstance(own, Tensor) and isinstance(state, Tensor):
        kinds = [(tensor.shape, tensor.dtype, tensor.layout) for tensor in (state, own)]
        if kinds[0] != kinds[1] or not torch.isfinite(state).all():
            raise ValueError(f"{name} has another shape or type, or is not finite")
    elif own is not None or state is not None:
        raise ValueError(f"{name} is not what it should be")


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of PyTorch's generators, of which dropout draws its seeds."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts the generators into a state that :func:`rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """How PyTorch is told which device of its kind is meant: of MPS there is but one."""
    return () if device.type == "mps" else (device,)


def learning_settings(config: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that the states of optimiser and scheduler depend on."""
    optimizer, scheduler = config["optimizer"], config["scheduler"]
    choice, plan = optimizer["optimizer_choice"], scheduler["scheduler_choice"]
    scale = optimizer["coefficient_lr_scale"]
    return choice, optimizer[choice], scale, plan, scheduler.get(plan)
