"""Compares every compiled backend of this machine with plain PyTorch, and times it.

``python -m snn_lib.kernels --check`` prints the table. It is meant for the first run on a device,
such as a GPU of a kind on which the kernels have not run yet.
"""

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from snn_lib.kernels import BACKENDS, PACKAGES, backend_for, eager, use_backend
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import name_of, program
from snn_lib.surrogate import FastSigmoid, Gaussian, Surrogate

# Two tensors agree if they differ by at most this part of the largest magnitude.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}
ODD = (7, 5, 67)  # T, B and N that fill no tile of any backend
LARGE = (25, 64, 512)  # a layer in training, which is timed as well
LAYOUTS = ("contiguous", "constant in time", "transposed")
SEED = [0x1234_5678_9ABC_DEF0, 3]  # of the dropout: the key, and the number of the first element
LINE = "{:28}{:9}" + "{:>10}" * 6 + "  {}"
NEURON = "SpikingNeuron[-,-;-,-,-]"


def filter_key(p: int, q: int) -> str:
    """The key of a filter of order (P, Q)."""
    return f"IIRSynapse[{p},{q};{p},{q + 1}]"


@dataclass(frozen=True)
class Triangle:
    """A surrogate of one's own."""

    width: float = 0.5

    def derivative(self, membrane: Tensor) -> Tensor:
        """dS/dV at every element of ``membrane``."""
        return torch.clamp(1.0 - torch.abs(membrane - 1.0) / self.width, min=0.0)


FILTER = filter_key(2, 0)
PROGRAMS: dict[str, dict[str, Any]] = {
    "filter, P = 1, Q = 0": {"key": filter_key(1, 0)},
    "filter, P = 2, Q = 0": {"key": FILTER},
    "filter, P = 3, Q = 2": {"key": filter_key(3, 2)},
    "filter, lengths": {"key": FILTER, "ends": True},
    "neuron, gaussian": {"key": NEURON},
    "neuron, gaussian, dropout": {"key": NEURON, "dropout": 0.3},
    "neuron, fast_sigmoid": {"key": NEURON, "surrogate": FastSigmoid()},
    "neuron, own surrogate": {"key": NEURON, "surrogate": Triangle()},
    "adaptive neuron": {"key": "AdaptiveNeuron[-,-,-;-,-,-,-,-]"},
    "resonate-and-fire neuron": {"key": "ResonateAndFireNeuron[-,-,-;-,-,-,-,-]"},
    "neuron and filter": {"key": f"{NEURON}+{FILTER}", "dropout": 0.3},
    "filter and neuron": {"key": f"{FILTER}+{NEURON}"},
    "filter, rounded, and neuron": {"key": f"{FILTER}~{NEURON}"},
}


def check(devices: list[str]) -> bool:
    """Prints a table for every compiled backend; returns whether all agree with plain PyTorch.

    Args:
        devices: types of the devices of this machine, such as "cpu".
    """
    tables = [print_table(*found) for found in compiled_backends(devices)]
    if not tables:
        print("no compiled backend can run here, so there is nothing to check")
    return bool(tables) and all(tables)


def compiled_backends(devices: list[str]) -> Iterator[tuple[ModuleType, str]]:
    """The compiled backends, each with a device that it can serve."""
    for name in BACKENDS:
        for device in devices:
            try:
                with use_backend(name):
                    backend = backend_for(torch.empty(0, device=device))
            except (ImportError, ValueError):  # it is not installed, or serves another device
                continue
            if backend is not eager:
                yield backend, device


def print_table(backend: ModuleType, device: str) -> bool:
    """Prints a line for each program and dtype of one backend; returns whether all agree.

    Triton's interpreter is slow: with it, only small sequences are compared, and nothing is timed.
    """
    name = backend.__name__.rpartition(".")[2]
    package = importlib.import_module(PACKAGES[name].lower())
    interpreted = name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    print(
        f"\nBackend {name} on {torch.cuda.get_device_name() if device == 'cuda' else device}, "
        f"{PACKAGES[name]} {package.__version__}{' interpreted' if interpreted else ''}, "
        f"PyTorch {torch.__version__}.\n"
        "Differences from plain PyTorch are parts of the largest value. Times are in ms for\n"
        f"sequences (T, B, N) = {LARGE}, beside that of a matrix product (T B, N) x (N, N).\n"
    )
    heads = "output", "state", "gradients", "forward", "backward", "product"
    print(LINE.format("program", "dtype", *heads, "").rstrip())
    all_agree = True
    for label, options in PROGRAMS.items():
        for dtype in TOLERANCE if "~" not in options["key"] else [torch.bfloat16]:
            draw, cells = Draw(dtype, device), ["-"] * 6
            try:
                differences, agree = compare(backend, draw, options, large=not interpreted)
                cells[:3] = (f"{difference:.0e}" for difference in differences)
                if not interpreted:
                    case = make_case(draw, LARGE, **options)
                    cells[3:] = (f"{time:.3f}" for time in measure(backend, case, dtype))
                verdict = "agrees" if agree else "DISAGREES"
            except Exception as error:  # of the compiler or the device; the other lines still help
                agree, verdict = False, "FAILS: " + " ".join(repr(error).split())[:200]
            print(LINE.format(label, str(dtype)[6:], *cells, verdict), flush=True)
            all_agree = all_agree and agree
    return all_agree


def compare(
    backend: ModuleType, draw: "Draw", options: dict[str, Any], large: bool
) -> tuple[list[float], bool]:
    """The largest differences in outputs, states and gradients, and whether all agree."""
    largest, agree = [0.0, 0.0, 0.0], True
    # What is rounded on its way may be rounded the other way where sums differ by the last bit.
    rounds = "~" in options["key"]
    for shape, layout in [(ODD, layout) for layout in LAYOUTS] + [(LARGE, "contiguous")] * large:
        case = make_case(draw, shape, layout, **options)
        for place, pair in enumerate(zip(case.run(backend), case.run(eager), strict=True)):
            distance, column = difference(*pair), min(place, 2)
            largest[column] = max(largest[column], distance)
            agree = agree and distance <= TOLERANCE[draw.rounded if rounds else pair[1].dtype]
    return largest, agree


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors, as a part of the largest expected magnitude.

    It is infinite where shape or dtype differ, or where a value is not finite.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    distance = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return distance if math.isfinite(distance) else math.inf


def measure(backend: ModuleType, case: "Case", dtype: torch.dtype) -> Iterator[float]:
    """Milliseconds of a forward pass, a backward pass and a matrix product, the best of several."""
    (steps, batch, channels), device = case.inputs.x.shape, case.inputs.x.device
    sequence = torch.ones(steps * batch, channels, dtype=dtype, device=device)
    weight = torch.ones(channels, channels, dtype=dtype, device=device)
    *_, checkpoints = backend.forward(case.inputs)
    for call in (
        lambda: backend.forward(case.inputs),
        lambda: case.backward(backend, checkpoints),
        lambda: sequence @ weight,
    ):
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        yield 1e3 * min(timer.blocked_autorange(min_run_time=0.1).times)


# --------------------------------------------------------------------------------------------------
# What is compared


@dataclass
class Case:
    """What a program runs with, and the gradients that arrive at its results."""

    inputs: Inputs
    grad_output: Tensor
    grad_last: Tensor

    def backward(self, backend: ModuleType, checkpoints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, of the coefficients and of the state."""
        return backend.backward(self.inputs, self.grad_output, self.grad_last, checkpoints, True)

    def run(self, backend: ModuleType) -> list[Tensor]:
        """The output, the last state, and the gradients of x, coefficients and state."""
        output, last, checkpoints = backend.forward(self.inputs)
        return [output, last, *self.backward(backend, checkpoints)]


def make_case(
    draw: "Draw",
    shape: tuple[int, int, int],
    layout: str = "contiguous",
    *,
    key: str,
    ends: bool = False,
    dropout: float = 0.0,
    surrogate: Surrogate = Gaussian(),  # noqa: B008 (immutable)
) -> Case:
    """A case of stable filters, and of neurons with currents around the threshold.

    In bfloat16, that is the dtype of the input, and of an output that is no spikes. ``ends``
    gives each sequence a length of its own, from none to more than there are steps.
    """
    made, (steps, batch, channels) = program(key), shape
    rows = [
        draw(channels).sigmoid() * (0.3 if name.startswith("alpha") else 1.0)
        for name in made.coefficients
    ]
    states = len(made.states), batch, channels
    dtype = draw.dtype if made.spikes[-1] else draw.rounded
    inputs = Inputs(
        key,
        (1.0 + draw(*shape, layout=layout)).to(draw.rounded),
        torch.stack(rows),
        draw(*states),
        torch.linspace(0, steps + 2, batch, device=draw.device).long() if ends else None,
        *name_of(surrogate),
        dropout,
        torch.tensor(SEED, device=draw.device) if dropout else None,
        dtype,
        True,
        [True] * len(rows),
    )
    return Case(inputs, draw(*shape, layout=layout).to(dtype), draw(*states))


class Draw:
    """Draws normally distributed tensors, the same on every machine, in the dtype that computes.

    Attributes:
        dtype: that dtype.
        rounded: what sequences between matrix products are rounded to.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.rounded, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, layout: str = "contiguous") -> Tensor:
        """A tensor of this shape that lies so in memory; one of ``LAYOUTS``."""
        if layout == "constant in time":
            return self(1, *shape[1:]).expand(shape)
        if layout == "transposed":
            return self(*reversed(shape)).permute(2, 1, 0)
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).to(self.device)
