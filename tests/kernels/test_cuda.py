"""The Triton kernels as they are written, launched and compiled, also where no GPU is here.

What they compute is tested in ``test_agreement``.
"""

import importlib
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from snn_lib.kernels import disk
from snn_lib.kernels.check import FILTER, NEURON, Draw, filter_key, make_case
from snn_lib.kernels.program import Kind, register
from snn_lib.surrogate import FastSigmoid

triton = pytest.importorskip("triton", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles and launches nothing", allow_module_level=True)
cuda = importlib.import_module("snn_lib.kernels.cuda")
launching = importlib.import_module("snn_lib.kernels.cuda.launching")
running = importlib.import_module("snn_lib.kernels.cuda.running")

FLOAT, DOUBLE, BFLOAT = torch.float32, torch.float64, torch.bfloat16
PAIR = f"{NEURON}+{FILTER}"
SHAPE = (70, 3, 70)


def elementary_step(x, state, coefficients, fire):
    """All functions that a step may call."""
    (a, b), (gain,) = state, coefficients
    a = torch.tanh(a) + torch.sin(x) * torch.cos(b) / (1.0 + torch.exp(-x))
    inside = (a > gain) | ~(b != x)
    b = torch.where(inside & (a <= 0.5), torch.sqrt(1.0 + b * b), torch.log(2.0 + b.abs()))
    return torch.maximum(a, torch.clamp(b, max=gain)).to(BFLOAT).to(x.dtype), (a, b)


register(Kind("elementary", elementary_step, ("a", "b"), ("gain",)))


def case(key, dtype=FLOAT, shape=SHAPE, device="cpu", **options):
    return make_case(Draw(dtype, device), shape, key=key, **options)


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    """The kernels of a case, forward and backward, compiled for an architecture; nothing is run.

    Triton compiles nothing twice.
    """
    from triton.backends.compiler import GPUTarget

    folder, run = str(tmp_path_factory.mktemp("triton")), triton.JITFunction.run

    def compile_for(architecture, case, backward=True):
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: f"sm_{architecture}",
            get_current_stream=lambda device: 0,
        )
        kernels = []

        def compile_only(kernel, *arguments, grid, warmup, **options):
            try:
                kernels.append(run(kernel, *arguments, grid=grid, warmup=True, **options))
            except RuntimeError as error:
                if "Cannot find ptxas" in str(error):
                    pytest.skip(f"no compiler for sm_{architecture}: {error}")
                raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=driver))
            patch.setattr(triton.JITFunction, "run", compile_only)
            patch.setenv("TRITON_CACHE_DIR", folder)
            *_, checkpoints = cuda.forward(case.inputs)
            if backward:
                case.backward(cuda, checkpoints)
        return kernels

    return compile_for


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_the_forward_pass_has_no_fused_multiply_adds(compile_for, dtype):
    """They round otherwise, and that decides about spikes."""
    (forward,) = compile_for(90, case(PAIR, dtype, dropout=0.3), backward=False)
    assert forward.asm["cubin"]
    assert "fma." not in forward.asm["ptx"]


def test_the_backward_pass_fuses_sums_in_double_precision_alone(compile_for):
    _, backward = compile_for(90, case(NEURON, ends=True))
    assert backward.asm["cubin"]
    assert set(re.findall(r"fma\S*", backward.asm["ptx"])) == {"fma.rn.f64"}


@pytest.mark.parametrize(("architecture", "dtype"), [(80, BFLOAT), (90, FLOAT), (100, BFLOAT)])
def test_every_sequence_is_loaded_ahead(compile_for, architecture, dtype):
    """By asynchronous copies, of several steps before the loop and in it.

    Forward x alone; backward x again, and then x, the output's gradient, V and R.
    """
    kernels = compile_for(architecture, case(NEURON, dtype))
    for kernel, sequences in zip(kernels, (1, 5), strict=True):
        copies = len(re.findall(r"cp\.async\.c[ag]\.", kernel.asm["ptx"]))
        assert copies == sequences * launching.UNROLL.value * launching.STAGES.value


@pytest.mark.parametrize(
    ("channels", "first", "row"),
    [(69, 0, 69), (70, 0, 71), (70, 1, 72), (70, 2, 72)],
    ids=["odd channels", "odd stride", "between two pairs", "unaligned"],
)
def test_bfloat16_is_read_in_pairs_only_where_all_pairs_are_aligned(
    compile_for, channels, first, row
):
    given = case(filter_key(1, 0), BFLOAT, (5, 3, channels))
    x = torch.ones(5, 3, row, dtype=BFLOAT)[..., first : first + channels]
    (forward,) = compile_for(90, replace(given, inputs=given.inputs._replace(x=x)), backward=False)
    assert "ld.global.b16" in forward.asm["ptx"]
    assert "cp.async" not in forward.asm["ptx"]


@pytest.mark.parametrize(("architecture", "dtype"), [(80, BFLOAT), (90, FLOAT), (100, BFLOAT)])
def test_states_are_written_before_they_are_read(compile_for, architecture, dtype):
    """Those that are computed again, between which and their use all threads wait."""
    _, backward = compile_for(architecture, case(NEURON, dtype))
    ptx = backward.asm["ptx"]
    surrogate = ptx.index("ex2.approx")
    last_store = ptx.rindex("st.global", 0, surrogate)
    first_copy = re.compile(r"cp\.async\.c[ag]\.").search(ptx, last_store).start()
    assert first_copy < surrogate
    assert "bar.sync" in ptx[last_store:first_copy]
    assert "bar.sync" in ptx[surrogate:]  # and before the next block's take their place


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("elementary[-,-;-]", FLOAT),
        ("elementary[-,-;-]", DOUBLE),
        (f"{filter_key(0, 0)}~{NEURON}", BFLOAT),  # what is handed on is rounded
    ],
)
def test_every_function_of_a_step_compiles(compile_for, key, dtype):
    (kernel,) = compile_for(90, case(key, dtype), backward=False)
    assert kernel.asm["cubin"]


def test_offsets_in_memory_have_64_bits(compile_for):
    """A sequence may have more than 2^31 elements."""
    for kernel in compile_for(90, case(NEURON, ends=True)):
        code = kernel.asm["ttir"]
        added = re.findall(r"tt\.addptr \S+, (%\S+) .*: \S+, (?:tensor<\S+x)?(i\d+)", code)
        offsets = [width for offset, width in added if not is_constant(offset)]
        assert set(offsets) == {"i64"}
        # of sizes; those with constants count steps and mix hashes
        products = re.findall(r"arith\.muli (%\S+), (%\S+) .*: (?:tensor<\S+x)?(i\d+)", code)
        sizes = [width for *factors, width in products if not any(map(is_constant, factors))]
        assert set(sizes) == {"i64"}


def is_constant(name):
    return re.match(r"%c(st|-?\d)", name) is not None


def test_settings_are_arguments_in_double_precision(compile_for):
    """In single precision the mask would not be plain PyTorch's. New values compile nothing."""
    kernels = [
        compile_for(90, case(NEURON, dropout=dropout, surrogate=FastSigmoid(width)))
        for dropout, width in ((0.3, 0.1), (0.75, 0.7))
    ]
    assert kernels[0] == kernels[1]
    for kernel, settings in zip(kernels[0], (1, 2), strict=True):
        signature = re.search(r"tt\.func public .*", kernel.asm["ttir"])[0]
        assert re.findall(r"%\w+: (f\d+)", signature) == ["f64"] * settings


# --------------------------------------------------------------------------------------------------
# Launching


@pytest.fixture
def launches(monkeypatch):
    """What kernels are launched with, and the tensor of the device guard; nothing is run."""
    launches, guards = [], [None]

    @contextmanager
    def device_of(tensor):
        guards.append(tensor)
        yield
        guards.pop()

    def run(kernel, *arguments, grid, warmup, **options):
        launches.append(SimpleNamespace(tensors=arguments, grid=grid, guard=guards[-1], **options))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    return launches


@pytest.mark.parametrize(("x", "grad", "pairs"), [(70, 71, [2, 1]), (71, 70, [1, 1])])
def test_the_backward_pass_reads_pairs_only_where_those_of_both_sequences_are_aligned(
    launches, x, grad, pairs
):
    given = case(filter_key(1, 0), BFLOAT, (5, 3, 70))
    x, grad = (torch.ones(5, 3, row, dtype=BFLOAT)[..., :70] for row in (x, grad))
    replace(given, inputs=given.inputs._replace(x=x), grad_output=grad).run(cuda)
    assert [launch.NEIGHBOURS for launch in launches] == pairs


def test_kernels_run_on_the_device_of_their_tensors(launches):
    """On PyTorch's current device they would not find them; here a device without memory serves."""
    given = case(PAIR, shape=(5, 3, 70), device="meta", dropout=0.3, ends=True)
    replace(given, inputs=given.inputs._replace(state=None)).run(cuda)
    assert len(launches) == 2
    for launch in launches:
        assert launch.guard is not None
        tensors = [leaf for leaf in tree_leaves(launch.tensors) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in (launch.guard, *tensors)} == {"meta"}


@pytest.mark.parametrize("multiprocessors", [108, 132])  # of an A100 and of an H100
@pytest.mark.parametrize("channels", [300, 500])
def test_work_is_shared_evenly_among_the_multiprocessors(launches, channels, multiprocessors):
    batch = 64
    case(PAIR, shape=(5, batch, channels), device="meta").run(cuda)
    for launch in launches:
        assert 32 * launch.num_warps == launch.ROWS * launch.COLUMNS  # a lane a thread
        busiest = math.ceil(launch.grid[0] / multiprocessors) * launch.ROWS * launch.COLUMNS
        assert busiest <= 1.15 * batch * channels / multiprocessors


def test_the_backward_pass_needs_no_memory_for_the_states_of_every_step(launches):
    """Beside the gradient of x, it holds the states of a block of steps at a time."""
    for steps in (100, 1000):
        case(PAIR, shape=(steps, 4, 32), device="meta").run(cuda)
    rooms = [
        sum(t.numel() for t in launch.tensors if isinstance(t, torch.Tensor))
        for launch in launches[1::2]
    ]
    grad_x, checkpoints = 900 * 4 * 32, 28 * 4 * 4 * 32
    assert rooms[1] - rooms[0] == grad_x + checkpoints


# --------------------------------------------------------------------------------------------------
# The files in which sources lie

SOURCE = """import triton.language as tl
from snn_lib.kernels.cuda.launching import jit
@jit
def kernel(x, steps, batch, channels):
    tl.store(x, 1.0)
"""


def test_a_source_lies_in_a_file_and_a_damaged_one_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_folders", lambda: iter([tmp_path / "not yet there"]))
    for _ in range(2):
        kernel = running._kernel(SOURCE)
        (file,) = (tmp_path / "not yet there").iterdir()
        assert file.read_text() == SOURCE
        assert "tl.store(x, 1.0)" in kernel.src
        file.write_text("raise SystemExit")


def test_a_folder_that_cannot_be_written_is_refused_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(disk, "_folders", lambda: iter([tmp_path / "file" / "folder"]))
    with pytest.raises(OSError, match=r"^no folder for kernels can be written: set XDG_CACHE_HOME"):
        running._kernel(SOURCE)
