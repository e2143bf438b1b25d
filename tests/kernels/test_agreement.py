"""Every backend computes what the loop of plain PyTorch does under autograd, on the same cases.

The cases of the ``cuda`` backend run on the GPU. Where there is none they run in a process of their
own, through Triton's interpreter, which has to be chosen before triton is imported. A
new cell needs no case here, because "odd" has every operation.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from snn_lib import DualExponentialSynapse, FastSigmoid, SpikingNeuron, use_backend
from snn_lib.kernels import eager
from snn_lib.kernels.check import FILTER, NEURON, Case, Draw, Triangle, filter_key, make_case
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import Kind, register

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the tensor's largest magnitude
GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
BFLOAT = torch.bfloat16

LAYOUTS = [  # (T, B, N) and how sequences lie in memory
    ((9, 3, 7), "contiguous"),
    ((3, 1, 70), "constant in time"),
    ((2, 1, 70), "transposed"),
    ((2, 33, 3), "constant in time"),  # with a last tile that is not full
    ((1, 2, 1), "contiguous"),
    ((0, 2, 7), "contiguous"),
    ((3, 0, 7), "contiguous"),
    ((66, 2, 3), "contiguous"),  # several blocks of steps, whose states the way back computes again
]


def odd_step(x, state, coefficients, fire):
    """The operations that no cell of the library has."""
    (slow, fast), (width, x_step, _) = state, coefficients
    slow = torch.tanh(x_step * slow + 0.3 * x) / (1.0 + torch.exp(-x * width))
    loud = ((slow.abs() > 0.2) | ~(x >= slow)) & (fast != 0.125)
    fast = torch.where(loud, torch.sqrt(1.0 + fast * fast), torch.log(2.0 + fast.abs()))
    output = torch.maximum(torch.sin(slow), torch.clamp(torch.cos(fast), max=0.5)) ** 2
    return output - fast * width - x_step, (slow, 0.5 * fast)


def constant_step(x, state, coefficients, fire):
    """Results that are inputs, numbers, or the same for all batch rows."""
    (one, _, _), (gain,) = state, coefficients
    return gain, (x * 0.0 + 0.25, gain, one)


def rounding_step(x, state, coefficients, fire):
    """A state that is kept in bfloat16."""
    (kept,), (gain,) = state, coefficients
    kept = (gain * kept + x).to(torch.bfloat16).to(x.dtype)
    return kept * gain, (kept,)


@dataclass(frozen=True)
class Window:
    """A surrogate whose numbers are called as arguments of kernels are."""

    scale: float = 0.7
    steps: float = 0.9

    def derivative(self, membrane):
        return torch.where(torch.abs(membrane - 1.0) < self.steps, self.scale * membrane, 0.0)


register(Kind("odd", odd_step, ("slow", "fast"), ("width", "step", "unused")))
register(Kind("rounding", rounding_step, ("kept",), ("gain",)))
register(Kind("constant", constant_step, ("one", "two", "three"), ("gain",)))
CASES = {
    **{f"filter {order}": {"key": filter_key(*order)} for order in [(0, 0), (1, 0), (3, 2)]},
    "filter with ends": {"key": FILTER, "ends": True},
    "neuron": {"key": NEURON},
    "neuron with dropout": {"key": NEURON, "dropout": 0.3, "surrogate": FastSigmoid()},
    "neuron with a surrogate": {"key": NEURON, "dropout": 0.3, "surrogate": Window()},
    "neuron and filter": {"key": f"{NEURON}+{FILTER}", "dropout": 0.3, "ends": True},
    "filter and neuron": {"key": f"{FILTER}+{NEURON}", "surrogate": Triangle()},
    "odd": {"key": "odd[-,-;-,-,-]"},
    "rounding": {"key": "rounding[-;-]"},
    "constant": {"key": "constant[-,-,-;-]"},
}
every_program = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@pytest.fixture(params=["eager", "cpu", "cuda"])
def name(request):
    package = {"cpu": "llvmlite", "cuda": "triton"}.get(request.param)
    if package:
        pytest.importorskip(package, exc_type=ImportError)
    if request.param == "cuda" and not (GPU or INTERPRETER):
        pytest.skip("no GPU; runs through Triton's interpreter in test_triton_s_interpreter_agrees")
    return request.param


@pytest.fixture
def backend(name):
    return importlib.import_module(f"snn_lib.kernels.{name}")


@pytest.fixture
def draw(name, dtype):
    """Draws normally distributed tensors, on the backend's device, the same in every run."""
    return Draw(dtype, "cuda" if name == "cuda" and GPU else "cpu")


def by_autograd(case):
    """The output, the last state, and the gradients of x, coefficients and state."""
    given = case.inputs
    tensors = [t.detach().requires_grad_() for t in (given.x, given.coefficients, given.first)]
    results = eager.run(
        given._replace(**dict(zip(("x", "coefficients", "state"), tensors, strict=True)))
    )
    pairs = zip(results, (case.grad_output, case.grad_last), strict=True)
    roots, gradients = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
    found = torch.autograd.grad(roots, tensors, gradients, materialize_grads=True)
    return [result.detach() for result in results] + list(found)


def with_inputs(case, **changes):
    return replace(case, inputs=case.inputs._replace(**changes))


def assert_agree(actual, expected, tolerance=0.0):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if e.dtype == BFLOAT:  # the neighbouring number where the sums round differently
            torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-5)
            continue
        scale = e.abs().max().item() if e.numel() else 0.0
        atol = (tolerance or TOLERANCE[e.dtype]) * scale
        torch.testing.assert_close(a, e, rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_program
def test_results_and_gradients_of_every_program_are_those_of_autograd(backend, draw, options):
    case = make_case(draw, (9, 3, 7), **options)
    assert_agree(case.run(backend), by_autograd(case))


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("program", ["filter (3, 2)", "neuron and filter"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_tensors_of_any_shape_and_layout_in_memory_are_served(backend, draw, program, layout):
    case = make_case(draw, *layout, **CASES[program])
    assert_agree(case.run(backend), by_autograd(case))


@pytest.mark.parametrize("dtype", [BFLOAT], ids=str)
@pytest.mark.parametrize("program", ["filter (3, 2)", "neuron with dropout", "neuron and filter"])
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_in_bfloat16_sequences_are_rounded_once_as_plain_pytorch_rounds_them(
    backend, draw, program, layout
):
    case = make_case(draw, *layout, **CASES[program])
    found = case.run(backend)
    assert case.inputs.x.dtype == found[2].dtype == BFLOAT
    assert_agree(found, by_autograd(case))


@pytest.mark.parametrize("dtype", [BFLOAT], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_between_two_cells_a_sequence_may_be_rounded_to_bfloat16(backend, draw, layout):
    case = make_case(draw, *layout, key=f"{FILTER}~{NEURON}")
    found, expected = case.run(backend), by_autograd(case)
    assert_agree(found[:2], expected[:2])
    # A gradient that is rounded on its way may be so to the neighbouring number.
    assert_agree(found[2:], expected[2:], tolerance=2**-8)
    apart = with_inputs(case, key=case.inputs.key.replace("~", "+"))
    assert not torch.equal(apart.run(backend)[1], found[1])


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_no_state_is_a_state_of_zeros_and_no_lengths_are_the_whole_length(backend, draw):
    case = make_case(draw, (5, 3, 7), **CASES["neuron and filter"])
    zeros, nine = torch.zeros_like(case.inputs.state), torch.full_like(case.inputs.lengths, 9)
    case = with_inputs(case, state=zeros, lengths=nine)
    found = with_inputs(case, state=None, lengths=None).run(backend)
    for one, other in zip(found, case.run(backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_no_tensor_need_be_contiguous(backend, draw):
    """As coefficients that are alike for all lags, which lie in memory once."""
    case = make_case(draw, (5, 3, 7), **CASES["neuron and filter"])
    case = with_inputs(
        replace(case, grad_last=draw(7, 3, 4).permute(2, 1, 0)),
        coefficients=0.3 * draw(1, 7).sigmoid().expand(6, 7),
        state=draw(4, 1, 7).expand(4, 3, 7),
        lengths=torch.tensor([4, 9, 0, 9, 5], device=draw.device)[::2],
        seed=case.inputs.seed.repeat_interleave(2)[::2],
    )
    assert_agree(case.run(backend), by_autograd(case))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("surrogate", [FastSigmoid(), Triangle()], ids=["smooth", "clamped"])
def test_nan_and_infinity_pass_as_in_plain_pytorch(backend, draw, surrogate):
    case = make_case(draw, (6, 2, 9), key=NEURON, surrogate=surrogate)
    case.inputs.x[2, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = by_autograd(case)
    assert expected[2][:3, 0, 0].isnan().all()
    for one, other in zip(case.run(backend), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_rounding_to_bfloat16_is_that_of_pytorch(backend, draw):
    """To the nearest, to the even one on a tie, and neither nan nor infinity is lost."""
    if backend.__name__.endswith("cuda") and INTERPRETER:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.3895314e38, torch.inf, torch.nan])
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)  # nans
    x = torch.cat([values, -values, bits, draw(50).cpu()]).view(1, 1, -1).to(draw.device)
    one, none = torch.ones_like(x[0]), x[:0]
    output, *_ = backend.forward(Inputs(filter_key(0, 0), x, one, none, dtype=BFLOAT))
    torch.testing.assert_close(output, x.bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("row", [*range(6), None])
def test_gradients_that_are_not_needed_may_be_left_out(backend, draw, row):
    """Each coefficient's alone, and none; the others are the same to the bit."""
    case = make_case(draw, (3, 2, 7), **CASES["neuron and filter"])
    everything = case.run(backend)
    needed = [number == row for number in range(6)]
    found = with_inputs(case, needed=needed).run(backend)
    for gradients in (found, everything):
        gradients[3] = gradients[3][needed]
    for one, other in zip(found, everything, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_threshold_is_strict(backend, draw, dtype):
    above = torch.nextafter(torch.ones((), dtype=dtype), torch.full((), 2.0, dtype=dtype))
    x = torch.stack([torch.ones_like(above), above]).view(1, 1, 2).to(draw.device)
    zeros = torch.zeros_like(x[0]).expand(3, 2)
    spikes, *_ = backend.forward(Inputs(NEURON, x, zeros, dtype=dtype))
    assert spikes.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_kernels_sum_gradients_of_coefficients_in_double_precision(backend, draw):
    """Of terms that cancel, between which single precision loses the small ones."""
    if backend is eager:
        pytest.skip("PyTorch's autograd sums them")
    terms = torch.tensor([2.0**30, 1.0, 1.0, -(2.0**30)], device=draw.device)
    coefficients = torch.tensor([[0.0], [0.0], [1.0]], device=draw.device)  # a copy of x

    def gradient_of_beta(grad_output):
        x, rest = torch.ones_like(grad_output), torch.zeros_like(grad_output[:1]).expand(2, -1, 1)
        inputs = Inputs(FILTER, x, coefficients, keep=True, needed=[True] * 3)
        *_, found, _ = Case(inputs, grad_output, rest).run(backend)
        return found[2].item()

    assert gradient_of_beta(terms.view(4, 1, 1)) == 2.0
    across = torch.zeros(1, 64, 1, device=draw.device)  # batch rows
    across[0, [0, 1, 62, 63], 0] = terms
    assert gradient_of_beta(across) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_layers_agree_through_autograd(name, draw):
    """Forward and backward through autograd, with features of two dimensions and lengths."""
    layers = [DualExponentialSynapse((2, 3), 4.0, 2.0), SpikingNeuron((2, 3), 4.0, True)]
    layers = [layer.to(draw.device) for layer in layers]
    x, lengths = 3.0 * draw(40, 3, 2, 3), torch.tensor([40, 0, 34], device=draw.device)

    def run(backend_name):
        given, results = x.clone().requires_grad_(), []
        with use_backend(backend_name):
            sequence = given
            for layer in layers:
                sequence, state = layer(sequence, None, lengths)
                results += [sequence, *state]
            loss = sum((result * result).sum() for result in results)
            return results + list(torch.autograd.grad(loss, [given, *layers[0].parameters()]))

    assert_agree(run(name), run("eager"))


@pytest.mark.skipif(GPU or INTERPRETER, reason="the cuda cases run in this process")
def test_triton_s_interpreter_agrees():
    """The cuda cases on a machine without a GPU."""
    pytest.importorskip("triton", exc_type=ImportError)
    options = "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "cuda"
    here = Path(__file__)
    files = here, here.with_name("test_check.py"), here.parents[1] / "test_golden.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    # the rounding to bfloat16
    assert re.search(r"\b1 skipped\b", result.stdout), result.stdout
