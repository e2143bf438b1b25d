"""The Triton kernels as they are launched and compiled, also where no GPU is here to run them.

What they compute is tested in ``test_agreement``.
"""

import importlib
import math
import os
import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles and launches nothing", allow_module_level=True)
cuda = importlib.import_module("snn_lib.kernels.cuda")
launching = importlib.import_module("snn_lib.kernels.cuda.launching")

FORWARD = ("_filter_forward", "_neuron_forward")
SEQUENCES = {  # that a kernel reads, its own scratch memory included
    "_filter_forward": 1,
    "_filter_backward": 3,
    "_neuron_forward": 1,
    "_neuron_backward": 4,
}
FLOAT, BFLOAT = (torch.float32, torch.float32), (torch.float32, torch.bfloat16)


def call_all(shape, dtype, rounded, surrogate="gaussian", width=0.4, dropout=0.3, device="cpu"):
    """The four functions, with what goes to matrix products and comes from them ``rounded``."""
    steps, batch, channels = shape
    order_p, order_q = 2, 1
    sequence = torch.ones(1, batch, channels, dtype=dtype, device=device).expand(steps, -1, -1)
    alpha, beta = sequence[0, :1].expand(order_p, -1), sequence[0, :1].expand(order_q + 1, -1)
    past = sequence[:order_p], sequence[:order_q]
    product = sequence.to(rounded)
    neuron = product, *beta, alpha[0], *sequence[:2]
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    cuda.filter_forward(sequence, alpha, beta, *past, rounded)
    cuda.filter_backward(product, past[0], sequence, alpha, beta, product, *past, [True] * 5)
    cuda.neuron_forward(*neuron, dropout, seed)
    slope = sequence if surrogate == "given" else None
    settings = surrogate, width, slope, dropout, seed, [True] * 6
    cuda.neuron_backward(sequence, *sequence[:2], *neuron, *settings)


@pytest.fixture(scope="module")
def compiling(tmp_path_factory):
    """What is called within ``with compiling(80) as kernels:`` compiles for that architecture.

    Nothing is run; ``kernels`` has what was compiled, by name. Triton compiles nothing twice.
    """
    from triton.backends.compiler import GPUTarget

    cache, run = str(tmp_path_factory.mktemp("triton")), triton.JITFunction.run

    @contextmanager
    def compiling(architecture):
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: f"sm_{architecture}",
            get_current_stream=lambda device: 0,
        )
        kernels = {}

        def compile_only(kernel, *arguments, grid, warmup, **options):
            try:
                kernels[kernel.fn.__name__] = run(
                    kernel, *arguments, grid=grid, warmup=True, **options
                )
            except RuntimeError as error:
                if "Cannot find ptxas" in str(error):
                    pytest.skip(f"no compiler for sm_{architecture}: {error}")
                raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=driver))
            patch.setattr(triton.JITFunction, "run", compile_only)
            patch.setenv("TRITON_CACHE_DIR", cache)
            yield kernels

    return compiling


@pytest.fixture
def compile_all(compiling):
    def compile_all(architecture, *dtypes, **settings):
        with compiling(architecture) as kernels:
            call_all((5, 3, 70), *dtypes, **settings)
        assert set(kernels) == set(SEQUENCES)
        return kernels

    return compile_all


@pytest.mark.parametrize("dtypes", [FLOAT, (torch.float64, torch.float64), BFLOAT], ids=str)
def test_spikes_are_made_without_fused_multiply_adds(compile_all, dtypes):
    """They depend on the rounding."""
    kernels = compile_all(90, *dtypes)
    assert all(kernel.asm["cubin"] for kernel in kernels.values())
    for name in FORWARD:
        assert "fma." not in kernels[name].asm["ptx"]


@pytest.mark.parametrize(
    ("architecture", "dtypes"), [(80, BFLOAT), (90, FLOAT), (90, BFLOAT), (100, BFLOAT)], ids=str
)
def test_every_sequence_is_loaded_ahead(compile_all, architecture, dtypes):
    """By asynchronous copies, of several steps before the loop and in it."""
    for name, kernel in compile_all(architecture, *dtypes).items():
        copies = len(re.findall(r"cp\.async\.c[ag]\.", kernel.asm["ptx"]))
        assert copies == SEQUENCES[name] * launching.UNROLL.value * launching.STAGES.value, name


@pytest.mark.parametrize(
    ("channels", "first", "row"),
    [(69, 0, 69), (70, 0, 71), (70, 1, 72), (70, 2, 72)],
    ids=["odd channels", "odd stride", "between two pairs", "unaligned"],
)
def test_bfloat16_is_read_in_pairs_only_where_all_pairs_are_aligned(
    compiling, channels, first, row
):
    current = torch.ones(5, 3, row, dtype=torch.bfloat16)[..., first : first + channels]
    coefficients, state = torch.ones(3, channels), torch.ones(2, 3, channels)
    with compiling(90) as kernels:
        cuda.neuron_forward(current, *coefficients, *state, 0.0, torch.tensor([0, 0]))
    ptx = kernels["_neuron_forward"].asm["ptx"]
    assert "ld.global.b16" in ptx
    assert "cp.async" not in ptx


@pytest.mark.parametrize(
    ("architecture", "dtypes"), [(80, BFLOAT), (90, FLOAT), (100, BFLOAT)], ids=str
)
def test_scratch_memory_is_written_before_it_is_read(compile_all, architecture, dtypes):
    """The neuron's second run stores what the way back, which begins with a Gaussian, copies."""
    ptx = compile_all(architecture, *dtypes)["_neuron_backward"].asm["ptx"]
    last_store = ptx.rindex("st.global", 0, ptx.index("ex2.approx"))
    first_copy = re.compile(r"cp\.async\.c[ag]\.").search(ptx, last_store).start()
    assert "bar.sync" in ptx[last_store:first_copy]


@pytest.mark.parametrize("surrogate", ["fast_sigmoid", "given"])
def test_every_surrogate_compiles(compile_all, surrogate):
    kernel = compile_all(90, *BFLOAT, surrogate=surrogate)["_neuron_backward"]
    assert kernel.asm["cubin"]
    assert "ex2.approx" not in kernel.asm["ptx"]  # of the Gaussian


def test_offsets_have_64_bits(compile_all):
    """A sequence may have more than 2^31 elements."""
    for name, kernel in compile_all(90, *FLOAT).items():
        code = kernel.asm["ttir"]
        added = re.findall(r"tt\.addptr \S+, (%\S+) .*: \S+, (?:tensor<\S+x)?(i\d+)", code)
        offsets = [width for offset, width in added if not is_constant(offset)]
        assert set(offsets) == {"i64"}, name
        # of sizes; those with constants count steps and mix hashes
        products = re.findall(r"arith\.muli (%\S+), (%\S+) .*: (?:tensor<\S+x)?(i\d+)", code)
        sizes = [width for *factors, width in products if not any(map(is_constant, factors))]
        assert set(sizes) == {"i64"}, name


def is_constant(name):
    return re.match(r"%c(st|-?\d)", name) is not None


def test_settings_are_arguments_in_double_precision(compile_all):
    """In single precision the mask would not be ``eager``'s. New values compile nothing anew."""
    kernels = compile_all(90, *FLOAT)
    assert compile_all(90, *FLOAT, width=0.7, dropout=0.75) == kernels
    for name, settings in {"_neuron_forward": 1, "_neuron_backward": 2}.items():
        signature = re.search(r"tt\.func public .*", kernels[name].asm["ttir"])[0]
        assert re.findall(r"%\w+: (f\d+)", signature) == ["f64"] * settings


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


@pytest.mark.parametrize("surrogate", ["gaussian", "fast_sigmoid", "given"])
def test_kernels_run_on_the_device_of_their_tensors(launches, surrogate):
    """On PyTorch's current device they would not find them; here a device without memory serves."""
    call_all((5, 3, 70), *FLOAT, surrogate, device="meta")
    assert len(launches) == 4  # each function has its kernel, whatever the surrogate
    for launch in launches:
        assert launch.guard is not None
        tensors = [leaf for leaf in tree_leaves(launch.tensors) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in (launch.guard, *tensors)} == {"meta"}


@pytest.mark.parametrize("multiprocessors", [108, 132])  # of an A100 and of an H100
@pytest.mark.parametrize("channels", [300, 500])
def test_multiprocessors_have_about_the_same_to_do(launches, channels, multiprocessors):
    batch = 64
    call_all((5, batch, channels), *FLOAT, device="meta")
    for launch in launches:
        assert 32 * launch.num_warps == launch.ROWS * launch.COLUMNS  # a lane a thread
        busiest = math.ceil(launch.grid[0] / multiprocessors) * launch.ROWS * launch.COLUMNS
        assert busiest <= 1.15 * batch * channels / multiprocessors
