"""What surrounds the CPU kernels: threads, forks, the compile cache, memory, denormals.

That their results are those of the reference is tested in ``test_agreement.py``.
"""

import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_networks import Counted
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("numba")

from snn_lib.kernels.cpu.rows import TINY

from snn_lib.functional import iir_filter, spiking_neuron
from snn_lib.kernels import cpu, eager
from snn_lib.kernels.cpu import allocator, openmp, tiles
from snn_lib.kernels.cpu import iir_filter as filter_kernels

ROOT = Path(__file__).parents[2]
T, B, N = 12, 64, 50  # large enough for several threads


def network(x, alpha, beta):
    """A filter and a neuron with dropout drawn from a fixed seed, N channels."""
    torch.manual_seed(0)
    decay = torch.full((x.shape[2],), 0.7)
    psp, _ = iir_filter(x, alpha, beta)
    return spiking_neuron(psp, decay, torch.ones_like(decay), decay, dropout=0.3)[0]


def leaves():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, B, N, generator=generator)
    alpha = torch.tensor([0.8, -0.2])[:, None].repeat(1, N)
    beta = torch.tensor([0.9, 0.3])[:, None].repeat(1, N)
    return [tensor.requires_grad_() for tensor in (x, alpha, beta)]


def gradients(output, inputs):
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


def outcome():
    """Spikes and gradients of a whole forward and backward pass."""
    inputs = leaves()
    output = network(*inputs)
    return [output.detach(), *gradients(output, inputs)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SITE = Path(torch.__file__).parents[1]
GNU_OPENMP = [*SITE.glob("torch/lib/libgomp*"), *SITE.glob("torch.libs/libgomp*")]


@pytest.mark.skipif(not GNU_OPENMP, reason="PyTorch brings no GNU OpenMP library")
def test_as_many_threads_as_pytorch_has_are_at_work(threads, monkeypatch):
    teams, parallel = [], filter_kernels._filter_forward_parallel

    def spy(team, items, arguments):
        teams.append(team)
        parallel(team, items, arguments)

    monkeypatch.setattr(filter_kernels, "_filter_forward_parallel", spy)
    for count in (1, 2, 3):
        threads(count)
        iir_filter(*leaves())
    assert teams == [2, 3]  # one thread needs no team


def test_results_do_not_depend_on_the_number_of_threads(threads):
    threads(1)
    expected = outcome()
    for count in (2, 3, 7):
        threads(count)
        assert same(outcome(), expected)


def test_without_openmp_a_thread_pool_gives_the_same(threads, monkeypatch):
    threads(3)
    expected = outcome()
    monkeypatch.setattr(openmp, "_usable", False)
    assert same(outcome(), expected)


def test_tiles_of_channels_give_the_same(monkeypatch):
    expected = outcome()
    monkeypatch.setattr(tiles, "TILE_CHANNELS", 16)
    assert same(outcome()[:2], expected[:2])


def test_many_threads_may_call_at_once(threads):
    threads(2)
    x, alpha, beta = (tensor.detach() for tensor in leaves())
    past = torch.zeros(2, B, N), torch.zeros(1, B, N)
    expected, _ = cpu.filter_forward(x, alpha, beta, *past, x.dtype)
    start = threading.Barrier(4)

    def call(_):
        torch.set_num_threads(2)
        start.wait()
        return [cpu.filter_forward(x, alpha, beta, *past, x.dtype)[0] for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(call, range(4)):
            assert all(torch.equal(result, expected) for result in results)


def test_backward_may_run_on_another_thread(threads):
    threads(2)
    expected = outcome()
    inputs = leaves()
    output = network(*inputs)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gradients, output, inputs).result(timeout=60)
    assert same([output.detach(), *found], expected)


def _filter_in_child(arrays, queue):
    x, alpha, beta, past_output, past_input = (torch.from_numpy(array) for array in arrays)
    torch.set_num_threads(2)
    queue.put(cpu.filter_forward(x, alpha, beta, past_output, past_input, x.dtype)[0].numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_with_threads(threads):
    threads(2)
    x, alpha, beta = (tensor.detach() for tensor in leaves())
    tensors = (x, alpha, beta, torch.zeros(2, B, N), torch.zeros(1, B, N))
    expected, _ = cpu.filter_forward(*tensors, x.dtype)  # the OpenMP threads are up before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(
        target=_filter_in_child, args=([tensor.numpy() for tensor in tensors], queue)
    )
    child.start()
    try:
        found = torch.from_numpy(queue.get(timeout=60))
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert torch.equal(found, expected)
    found, _ = cpu.filter_forward(*tensors, x.dtype)
    assert torch.equal(found, expected)  # the parent is none the worse


class Filtered(Dataset):
    """Samples that pass through a filter on their way."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.full((T, B, N), float(index))
        return iir_filter(x, torch.full((1, N), 0.5), torch.ones(1, N))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_data_workers_can_filter(threads):
    threads(2)
    outcome()
    loader = DataLoader(
        Filtered(), num_workers=2, multiprocessing_context="fork", timeout=60, batch_size=None
    )
    for index, found in enumerate(loader):
        assert torch.equal(found, Filtered()[index])


def run_python(code, folder=ROOT, stderr=subprocess.PIPE, **environment):
    """Runs code in a fresh process from the checkout; ``None`` unsets a variable."""
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
    )


FILTER = """
import torch
from snn_lib.kernels import cpu
from snn_lib.kernels.cpu import openmp
torch.set_num_threads(2)
x, one, zero = torch.ones(3, 64, 100), torch.ones(1, 100), torch.zeros(())
past = zero.expand(1, 64, 100), zero.expand(0, 64, 100)
def run():
    output, _ = cpu.filter_forward(x, one / 2, one, *past, torch.float32)
    assert output[:, -1, -1].tolist() == [1.0, 1.5, 1.75]
run()
"""


def test_a_user_s_functions_without_a_module_compile_beside_ours():
    numba, names = pytest.importorskip("numba"), {}
    exec("def add(x): return x + 1", names)
    assert numba.njit(names["add"])(1) == 2


# The least that can be compiled, which is compiled as everything else.
FLUSH = """
import numpy as np
from snn_lib.kernels.cpu import rows
values = np.array([1e-35, 1.0], np.float32)
rows.flush(values)
assert values.tolist() == [0.0, 1.0]
"""


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals on this system")
def test_first_use_says_that_it_compiles_and_later_ones_read_the_cache(tmp_path):
    """So does the first use after a change of any file whose code becomes part of the kernels."""
    shutil.copytree(ROOT / "snn_lib", tmp_path / "snn_lib")

    hits = """
from snn_lib.kernels.cpu import iir_filter, rows
for function in (iir_filter._filter_forward_parallel, rows.flush):
    print(sum(function.stats.cache_hits.values()), end=" ")
"""

    def use(code):
        """What the cache held, and what a terminal shows."""
        terminal, stderr = os.openpty()
        settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_OPT": "1"}
        run = run_python(code + hits, tmp_path, stderr, **settings)
        os.write(stderr, b"end")
        shown = os.read(terminal, 10_000).decode().removesuffix("end")
        os.close(terminal)
        os.close(stderr)
        assert run.returncode == 0, shown
        return run.stdout, shown

    first_use = "0 0 ", "first use: compiling for this CPU (some seconds)\r\n"
    assert use(FILTER) == first_use
    assert use(FILTER + FLUSH) == ("1 1 ", "")
    with (tmp_path / "snn_lib/kernels/cpu/openmp.py").open("a") as source:
        source.write("# changed\n")
    assert use(FLUSH) == first_use


def test_a_notebook_says_that_it_compiles_and_a_log_file_does_not(tmp_path):
    settings = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_OPT": "1"}
    notebook = "import sys; sys.modules['ipykernel'] = sys" + FLUSH
    assert run_python(notebook, **settings).stderr.startswith("first use: compiling for this CPU")
    shutil.rmtree(tmp_path)
    assert run_python(FLUSH, **settings).stderr == ""


def test_works_silently_where_no_cache_can_be_written(tmp_path):
    no_folder = tmp_path / "file"
    no_folder.touch()
    run = run_python(
        FLUSH,
        NUMBA_CACHE_DIR=str(no_folder / "cache"),
        NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator",
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def other_openmp():
    """LLVM's or Intel's OpenMP library, where one is installed."""
    installed = Path(sys.prefix, "lib/libiomp5.so")  # of the package intel-openmp
    if installed.exists():
        return str(installed)
    return find_library("iomp5") or find_library("omp")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloading is Linux's")
def test_a_preloaded_openmp_library_serves_the_kernels_as_it_serves_pytorch():
    library = other_openmp()
    if library is None:
        pytest.skip("no other OpenMP library is installed")
    forked = f"""
import ctypes, os, signal
import llvmlite.binding
preloaded = ctypes.cast(ctypes.CDLL({library!r}).GOMP_parallel, ctypes.c_void_p).value
assert openmp._usable
assert llvmlite.binding.address_of_symbol("snn_GOMP_parallel") == preloaded
child = os.fork()
if child == 0:
    signal.alarm(60)
    run()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
run()
"""
    run = run_python(FILTER + forked, LD_PRELOAD=library)
    assert run.returncode == 0, run.stderr


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's memory")


@glibc
def test_large_buffers_are_not_returned_to_the_system():
    version = tuple(map(int, platform.libc_ver()[1].split(".")))
    size = 16_000_000 if version >= (2, 35) else 7_000_000  # older ones return more than 32 MB
    code = """
import mmap
import torch
from snn_lib.kernels import cpu
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
buffer = torch.ones(ELEMENTS)
full = resident()
del buffer
print(full - resident())
"""
    tuned = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "SNN_KEEP_"))]
    run = run_python(code.replace("ELEMENTS", str(size)), **dict.fromkeys(tuned))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1_000_000


@pytest.fixture
def untuned(monkeypatch):
    """No choice of the allocator by the environment."""
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GLIBC_", "SNN_KEEP_")):
            monkeypatch.delenv(name)


@glibc
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SNN_KEEP_MEMORY", "1", [-3, -1]),
        ("SNN_KEEP_MEMORY", "0", []),
        ("MALLOC_TRIM_THRESHOLD_", "131072", []),
        ("MALLOC_ARENA_MAX", "2", []),
        ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0", []),
    ],
)
def test_an_allocator_that_the_user_has_tuned_is_left_alone(
    name, value, expected, untuned, monkeypatch
):
    monkeypatch.setenv(name, value)
    assert options_set(monkeypatch) == expected


@glibc
@pytest.mark.parametrize(
    ("largest", "expected"),
    [(2**25, [-3, -3, -1]), (2**24, [-3, -3])],  # as before glibc 2.35, and one with another limit
)
def test_freed_memory_is_kept_as_far_as_the_c_library_allows(
    largest, expected, untuned, monkeypatch
):
    """The trim threshold alone would stop glibc from raising the other by itself."""
    assert options_set(monkeypatch, largest) == expected


def options_set(monkeypatch, largest=2**30):
    """The options given to a C library that refuses larger buffers than this on its heap."""
    given = []

    def mallopt(option, value):
        given.append(option)
        return option != -3 or value <= largest

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda path: SimpleNamespace(mallopt=mallopt))
    allocator.keep_freed_memory()
    return given


def test_repeated_steps_are_not_unpacked():
    image = torch.rand(B, N)
    dense = tiles.dense(image.expand(1000, B, N))
    assert dense.shape == (1, B, N)
    assert dense.data_ptr() == image.data_ptr()
    assert tiles.dense(torch.zeros(()).expand(1000, B, N)).shape == (1, 1, N)


def test_a_tensor_elsewhere_is_refused_before_its_address_is_read():
    x, alpha = torch.zeros(3, B, N, device="meta"), torch.zeros(0, N)
    past = torch.zeros(0, B, N)
    with pytest.raises(TypeError, match="CPU kernels got a tensor on meta"):
        cpu.filter_forward(x, alpha, torch.ones(1, N), past, past, x.dtype)


def test_the_neuron_s_way_back_makes_one_gradient_as_long_as_the_sequence_and_no_more():
    """V of all steps is held for a tile at a time, also where the current is in bfloat16."""
    current = torch.ones(80, 64, 512, dtype=torch.bfloat16)
    coefficients, state = torch.ones(3, 512), torch.zeros(2, 64, 512)
    options = "gaussian", 0.4, None, 0.0, None, [True] + [False] * 5
    gradients = current.float(), *state
    with Counted() as made:
        cpu.neuron_backward(*gradients, current, *coefficients, *state, *options)
    assert made.elements < 1.5 * current.numel()


def denormal(tensor):
    """Whether a value is not zero and yet smaller than a recurrence may carry on."""
    return bool(((tensor != 0) & (tensor.abs() < TINY)).any())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_decaying_traces_end_in_zero(order):
    steps, none = 400, torch.zeros(())
    x = torch.zeros(steps, 2, 8)
    x[0] = 1.0
    alpha, beta = torch.zeros(order, 8), torch.ones(1, 8)
    alpha[0] = 0.7
    past = none.expand(order, 2, 8), none.expand(0, 2, 8)
    assert denormal(eager.filter_forward(x, alpha, beta, *past, x.dtype)[0])
    output, last = cpu.filter_forward(x, alpha, beta, *past, x.dtype)
    assert not denormal(output)
    assert output[150].min() > 0
    assert output[-1].max() == 0

    gradients = x.flip(0), torch.zeros_like(last)
    grad_x = cpu.filter_backward(*gradients, x, alpha, beta, output, *past, [True] * 5)[0]
    assert not denormal(grad_x)
    assert grad_x[-150].min() > 0
    assert grad_x[0].max() == 0

    decay, strength, seed = torch.full((8,), 0.7), torch.ones(8), torch.zeros(2, dtype=torch.int64)
    state = none.expand(2, 8), none.expand(2, 8)
    neuron = (2 * x, decay, strength, decay, *state)
    assert denormal(eager.neuron_forward(*neuron, 0.0, seed)[2])
    assert not any(denormal(tensor) for tensor in cpu.neuron_forward(*neuron, 0.0, seed))
    surrogate = ("gaussian", 0.4, None, 0.0, seed, [True] * 6)
    for gradient in cpu.neuron_backward(x.flip(0), *state, *neuron, *surrogate):
        assert not denormal(gradient)
