"""Compares every compiled backend of this machine with ``eager``, and times it.

``python -m snn_lib.kernels --check`` prints the table. It is meant for the first run on a device,
such as a GPU of a kind on which the kernels have not run yet.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from snn_lib.kernels import BACKENDS, PACKAGES, backend_for, eager, use_backend

# Two tensors agree if they differ by at most this part of the largest magnitude.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}
ODD = (7, 5, 67)  # T, B and N that fill no tile of any backend
LARGE = (25, 64, 512)  # a layer in training, which is timed as well
LAYOUTS = ("contiguous", "constant in time", "transposed")
LINE = "{:28}{:9}" + "{:>10}" * 6 + "  {}"

Tensors = Sequence[Tensor]
Call = Callable[[ModuleType], Tensors]  # calls a function of the backend that it is given


def check(devices: list[str]) -> bool:
    """Prints a table for every compiled backend; returns whether all of them agree with ``eager``.

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
    """Prints a line for each operator and dtype of one backend; returns whether all agree.

    Triton's interpreter is slow: with it, only small sequences are compared, and nothing is timed.
    """
    name = backend.__name__.rpartition(".")[2]
    package = importlib.import_module(PACKAGES[name].lower())
    interpreted = name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    print(
        f"\nBackend {name} on {torch.cuda.get_device_name() if device == 'cuda' else device}, "
        f"{PACKAGES[name]} {package.__version__}{' interpreted' if interpreted else ''}, "
        f"PyTorch {torch.__version__}.\n"
        "Differences from eager are parts of the largest value. Times are in ms for sequences\n"
        f"(T, B, N) = {LARGE}, beside that of a matrix product (T B, N) x (N, N).\n"
    )
    heads = "output", "state", "gradients", "forward", "backward", "product"
    print(LINE.format("operator", "dtype", *heads, "").rstrip())
    all_agree = True
    for operator, make_calls in OPERATORS.items():
        for dtype in TOLERANCE:
            make = partial(make_calls, dtype, device)
            cells = ["-"] * 6
            try:
                differences, agree = compare(backend, make, large=not interpreted)
                cells[:3] = (f"{difference:.0e}" for difference in differences)
                if not interpreted:
                    cells[3:] = (f"{time:.3f}" for time in measure(backend, make, dtype, device))
                verdict = "agrees" if agree else "DISAGREES"
            except Exception as error:  # of the compiler or the device; the other lines still help
                agree, verdict = False, "FAILS: " + " ".join(repr(error).split())[:200]
            print(LINE.format(operator, str(dtype)[6:], *cells, verdict), flush=True)
            all_agree = all_agree and agree
    return all_agree


def compare(
    backend: ModuleType, make: Callable[..., tuple[Call, Call]], large: bool
) -> tuple[list[float], bool]:
    """The largest differences in outputs, states and gradients, and whether all agree."""

    def results(one: ModuleType) -> tuple[Tensors, Tensors, Tensors]:
        (output, *states), gradients = forward(one), backward(one)
        return [output], states, gradients

    largest, agree = [0.0, 0.0, 0.0], True
    for case in [(ODD, layout) for layout in LAYOUTS] + [(LARGE, "contiguous")] * large:
        forward, backward = make(*case)
        for column, pair in enumerate(zip(results(backend), results(eager), strict=True)):
            for found, expected in zip(*pair, strict=True):
                distance = difference(found, expected)
                largest[column] = max(largest[column], distance)
                agree = agree and distance <= TOLERANCE[expected.dtype]
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


def measure(
    backend: ModuleType, make: Callable[..., tuple[Call, Call]], dtype: torch.dtype, device: str
) -> Iterator[float]:
    """Milliseconds of a forward pass, a backward pass and a matrix product, the best of several."""
    steps, batch, channels = LARGE
    sequence = torch.ones(steps * batch, channels, dtype=dtype, device=device)
    weight = torch.ones(channels, channels, dtype=dtype, device=device)
    for call in (*make(LARGE, "contiguous"), lambda _: sequence @ weight):
        timer = Timer(
            "call(backend)",
            globals={"call": call, "backend": backend},
            num_threads=torch.get_num_threads(),
        )
        yield 1e3 * min(timer.blocked_autorange(min_run_time=0.1).times)


# --------------------------------------------------------------------------------------------------
# What is compared. Each function makes its tensors, the same in every run, and returns two calls:
# of the forward pass, and of the backward pass.


def filter_calls(
    order: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    shape: tuple[int, int, int],
    layout: str,
) -> tuple[Call, Call]:
    """The calls of a stable filter of order (P, Q), whose output is rounded to ``dtype``."""
    (p, q), (_, batch, channels), draw = order, shape, Draw(dtype, device)
    x, alpha, beta = draw(*shape, layout=layout), draw(p, channels), draw(q + 1, channels)
    alpha = 0.9 * alpha.tanh() / p
    past = draw(p, batch, channels), draw(q, batch, channels)
    forward_inputs = x, alpha, beta, *past, dtype
    output, _ = eager.filter_forward(*forward_inputs)
    gradients = draw(*shape, layout=layout).to(dtype), draw(p, batch, channels)
    backward_inputs = *gradients, x, alpha, beta, output, *past, [True] * 5
    return (
        lambda backend: backend.filter_forward(*forward_inputs),
        lambda backend: backend.filter_backward(*backward_inputs),
    )


def neuron_calls(
    surrogate: str,
    dropout: float,
    dtype: torch.dtype,
    device: str,
    shape: tuple[int, int, int],
    layout: str,
) -> tuple[Call, Call]:
    """The calls of a neuron that gets a current in ``dtype``."""
    (_, batch, channels), draw = shape, Draw(dtype, device)
    current = (1.0 + draw(*shape, layout=layout)).to(dtype)
    coefficients = (draw(channels).sigmoid() for _ in range(3))
    inputs = current, *coefficients, draw(batch, channels), draw(batch, channels)
    gradients = draw(*shape, layout=layout), draw(batch, channels), draw(batch, channels)
    slope = draw(*shape, layout=layout) if surrogate == "given" else None
    # of the dropout: the key, and the number of the first element
    seed = torch.tensor([0x1234_5678_9ABC_DEF0, 3], device=device)
    return (
        lambda backend: backend.neuron_forward(*inputs, dropout, seed),
        lambda backend: backend.neuron_backward(
            *gradients, *inputs, surrogate, 0.4, slope, dropout, seed, [True] * 6
        ),
    )


OPERATORS = {
    "filter, P = 1, Q = 0": partial(filter_calls, (1, 0)),
    "filter, P = 2, Q = 0": partial(filter_calls, (2, 0)),
    "filter, P = 3, Q = 2": partial(filter_calls, (3, 2)),
    "neuron, gaussian": partial(neuron_calls, "gaussian", 0.0),
    "neuron, gaussian, dropout": partial(neuron_calls, "gaussian", 0.3),
    "neuron, fast_sigmoid": partial(neuron_calls, "fast_sigmoid", 0.0),
    "neuron, given slopes": partial(neuron_calls, "given", 0.0),
}


class Draw:
    """Draws normally distributed tensors, the same on every machine, in the dtype that computes."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, layout: str = "contiguous") -> Tensor:
        """A tensor of this shape that lies so in memory; one of ``LAYOUTS``."""
        if layout == "constant in time":
            return self(1, *shape[1:]).expand(shape)
        if layout == "transposed":
            return self(*reversed(shape)).permute(2, 1, 0)
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).to(self.device)
