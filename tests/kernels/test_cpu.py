"""What surrounds the CPU kernels: threads, forks, kernels on disk, memory, denormals.

That their results are those of plain PyTorch is tested in ``test_agreement.py``.
"""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_networks import Operators

pytest.importorskip("llvmlite")

from snn_lib.functional import iir_filter, spiking_neuron
from snn_lib.kernels import cpu, disk, eager
from snn_lib.kernels.check import NEURON, Case, Draw, filter_key, make_case
from snn_lib.kernels.cpu import allocator, library, openmp, running
from snn_lib.kernels.cpu.writer import TINY, TINY_DOUBLE
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import program

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


SITE = Path(torch.__file__).parents[1]
GNU_OPENMP = [*SITE.glob("torch/lib/libgomp*"), *SITE.glob("torch.libs/libgomp*")]


@pytest.mark.skipif(not GNU_OPENMP, reason="PyTorch brings no GNU OpenMP library")
def test_kernels_run_on_as_many_threads_as_pytorch_has(threads, monkeypatch):
    teams, start = [], openmp._start

    def spy(share, arguments, team, flags):
        teams.append(team)
        start(share, arguments, team, flags)

    monkeypatch.setattr(openmp, "_start", spy)
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
    monkeypatch.setattr(openmp, "_start", None)
    assert same(outcome(), expected)


def test_tiles_of_channels_give_the_same(monkeypatch):
    """As of layers of more than 1,024 channels, over several blocks of steps."""
    options = {"key": f"{NEURON}+{filter_key(2, 0)}", "ends": True, "dropout": 0.3}
    case = make_case(Draw(torch.float32, "cpu"), (70, 40, N), **options)
    expected = outcome(), case.run(cpu)
    monkeypatch.setattr(running, "TILE_CHANNELS", 16)
    for found, one in zip((outcome(), case.run(cpu)), expected, strict=True):
        assert same(found, one)


def test_several_python_threads_may_run_kernels_at_once(threads):
    threads(2)
    expected = filtered()
    start = threading.Barrier(4)

    def call(_):
        torch.set_num_threads(2)
        start.wait()
        return [filtered() for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(call, range(4)):
            assert all(torch.equal(result, expected) for result in results)


def test_the_backward_pass_may_run_on_another_thread(threads):
    threads(2)
    expected = outcome()
    inputs = leaves()
    output = network(*inputs)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gradients, output, inputs).result(timeout=60)
    assert same([output.detach(), *found], expected)


def filtered():
    with torch.no_grad():
        return iir_filter(*leaves())[0]


def _filter_in_child(queue):
    torch.set_num_threads(2)
    queue.put(filtered().numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kernels_run_on_threads_after_a_fork(threads):
    threads(2)
    expected = filtered()  # the OpenMP threads are up before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_filter_in_child, args=(queue,))
    child.start()
    try:
        found = torch.from_numpy(queue.get(timeout=60))
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert torch.equal(found, expected)
    assert torch.equal(filtered(), expected)  # the parent is none the worse


def run_python(code, stderr=subprocess.PIPE, **environment):
    """Runs code in a fresh process from the checkout; ``None`` unsets a variable."""
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
    )


RUN = """
import torch
from snn_lib.functional import iir_filter
from snn_lib.kernels.cpu import openmp
torch.set_num_threads(2)
def run():
    output, _ = iir_filter(torch.ones(3, 64, 100), torch.ones(1, 100) / 2, torch.ones(1, 100))
    assert output[:, -1, -1].tolist() == [1.0, 1.5, 1.75]
run()
"""


@pytest.mark.skipif(os.name != "posix", reason="no pseudo-terminals on this system")
def test_first_use_says_that_it_compiles_and_a_second_process_compiles_nothing(tmp_path):
    folders = "from pathlib import Path\nfrom snn_lib.kernels import disk\n"
    folders += f"disk._folders = lambda: iter([Path({str(tmp_path)!r})])\n"
    for expected in ("first use: compiling for this CPU (some seconds)\r\n", ""):
        terminal, stderr = os.openpty()
        run = run_python(folders + RUN, stderr)
        os.write(stderr, b"end")
        shown = os.read(terminal, 10_000).decode().removesuffix("end")
        os.close(terminal)
        os.close(stderr)
        assert (run.returncode, shown) == (0, expected)


def test_a_notebook_says_that_it_compiles_and_a_log_file_does_not(monkeypatch, capsys):
    for modules, shown in ((sys.modules, ""), ({**sys.modules, "ipykernel": sys}, "first use: ")):
        monkeypatch.setattr(library.sys, "modules", modules)
        library.announce.cache_clear()
        library.announce()
        assert capsys.readouterr().err[:11] == shown


def test_an_interrupted_compilation_leaves_later_kernels_alone():
    """In a process of its own, which would end."""
    run = run_python("""
import gc
from snn_lib.kernels.cpu import library

def interrupted(source):
    raise KeyboardInterrupt

arguments = "(i64 %thread, i64 %first, i64 %last, ptr %arguments)"
names = "kernel", "share"
source = "\\n".join(f"define void @{name}{arguments} {{ ret void }}" for name in names)
compile_source, library._object = library._object, interrupted
for _ in range(3):
    try:
        library.kernel(source)
    except KeyboardInterrupt:
        gc.collect()
library._object = compile_source
library.kernel(source).run(0, 0, 1, None)
print("ran")
""")
    assert (run.returncode, run.stdout) == (0, "ran\n"), run.stderr


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The sources that were compiled; a folder of the test's own keeps them."""
    compiled = []

    def compile_source(source):
        compiled.append(source)
        return source.encode()

    monkeypatch.setattr(library, "_compile", compile_source)
    monkeypatch.setattr(disk, "_folders", lambda: iter([tmp_path / "kept"]))
    return compiled


def test_a_kernel_is_compiled_once_for_each_source_and_compiler(compiled, tmp_path, monkeypatch):
    for source in ("one", "one", "other", "one"):
        assert library._object(source) == source.encode()
    assert compiled == ["one", "other"]
    monkeypatch.setattr(library.llvmlite, "__version__", "another")
    library._object("one")
    for options in (library.OPTIONS, library.TARGET):
        monkeypatch.setitem(options, "another", True)
        library._object("one")
    assert compiled == ["one", "other", "one", "one", "one"]


def test_a_kernel_of_another_cpu_is_compiled_anew(compiled, monkeypatch):
    """As where computers share a home: one may not have the other's instructions."""
    library._object("one")
    monkeypatch.setattr(library.llvm, "get_host_cpu_name", lambda: "another")
    library._object("one")
    features = SimpleNamespace(flatten=lambda: "+another")
    monkeypatch.setattr(library.llvm, "get_host_cpu_features", lambda: features)
    library._object("one")
    assert compiled == ["one"] * 3


@pytest.mark.parametrize("cache", [None, ""])
def test_without_a_home_kernels_are_kept_beside_the_library_alone(cache, monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert [folder.name for folder in disk._folders()] == ["__pycache__"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert list(disk._folders())[1:] == [tmp_path / "snn_lib"]


def test_several_threads_may_write_the_same_kernel_at_once(compiled, tmp_path):
    start = threading.Barrier(8)

    def write(_):
        start.wait()
        return library._object("one")

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(write, range(8))} == {b"one"}
    assert len([*(tmp_path / "kept").iterdir()]) == 1


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 40])
def test_a_damaged_file_of_a_kernel_is_written_again(compiled, tmp_path, content):
    library._object("one")
    (file,) = (tmp_path / "kept").iterdir()
    intact = file.read_bytes()
    file.write_bytes(content)
    assert library._object("one") == b"one"
    assert file.read_bytes() == intact
    assert len(compiled) == 2


def test_where_no_folder_can_be_written_kernels_are_compiled_each_time(compiled, tmp_path):
    (tmp_path / "kept").touch()
    for _ in range(2):
        assert library._object("one") == b"one"
    assert len(compiled) == 2


def other_openmp():
    """LLVM's or Intel's OpenMP library, where one is installed."""
    installed = Path(sys.prefix, "lib/libiomp5.so")  # of the package intel-openmp
    if installed.exists():
        return str(installed)
    return find_library("iomp5") or find_library("omp")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloading is Linux's")
def test_a_preloaded_openmp_library_serves_the_kernels_as_it_serves_pytorch():
    installed = other_openmp()
    if installed is None:
        pytest.skip("no other OpenMP library is installed")
    forked = f"""
import ctypes, os, signal
def address(function):
    return ctypes.cast(function, ctypes.c_void_p).value
assert address(openmp._start) == address(ctypes.CDLL({installed!r}).GOMP_parallel)
child = os.fork()
if child == 0:
    signal.alarm(60)
    run()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
run()
"""
    run = run_python(RUN + forked, LD_PRELOAD=installed)
    assert run.returncode == 0, run.stderr


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's memory")


def tuning():
    """The variables of the environment by which the allocator is tuned."""
    return [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "SNN_KEEP_"))]


@glibc
def test_memory_of_large_buffers_is_kept_for_the_next_ones():
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
    run = run_python(code.replace("ELEMENTS", str(size)), **dict.fromkeys(tuning()))
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1_000_000


@glibc
@pytest.mark.parametrize(
    ("settings", "largest", "expected"),
    [
        ({}, 2**30, [-3, -1]),
        ({}, 2**25, [-3, -3, -1]),  # as before glibc 2.35
        ({}, 2**24, [-3, -3]),  # the trim threshold alone would stop glibc from raising the other
        ({"SNN_KEEP_MEMORY": "1"}, 2**30, [-3, -1]),
        ({"SNN_KEEP_MEMORY": "0"}, 2**30, []),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, 2**30, []),  # by the user
        ({"MALLOC_ARENA_MAX": "2"}, 2**30, []),
        ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}, 2**30, []),
    ],
)
def test_freed_memory_is_kept_as_far_as_the_user_and_the_c_library_allow(
    settings, largest, expected, monkeypatch
):
    """By two options of a C library that refuses larger buffers than this on its heap."""
    for name in tuning():
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    given = []

    def mallopt(option, value):
        given.append(option)
        return option != -3 or value <= largest

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda path: SimpleNamespace(mallopt=mallopt))
    allocator.keep_freed_memory()
    assert given == expected


def counted(work):
    """The elements of all that an operation makes."""
    with Operators() as made:
        work()
    return made.elements


def test_an_input_that_is_constant_in_time_is_not_copied():
    case = make_case(Draw(torch.float32, "cpu"), (500, 2, 8), "constant in time", key=NEURON)
    assert counted(lambda: cpu.forward(case.inputs)) < 1.5 * case.inputs.x.numel()  # the spikes


def test_the_backward_pass_needs_no_memory_but_the_gradient_of_the_input():
    """States of all steps are held for a tile at a time, also where the current is in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(Draw(dtype, "cpu"), (256, 16, 512), key=NEURON)
        *_, checkpoints = cpu.forward(case.inputs)
        made = counted(lambda case=case, kept=checkpoints: case.backward(cpu, kept))
        assert made < 1.5 * case.inputs.x.numel()


@pytest.mark.parametrize(
    ("dtype", "decay", "tiny"), [(torch.float32, 0.7, TINY), (torch.float64, 0.17, TINY_DOUBLE)]
)
@pytest.mark.parametrize("key", [filter_key(1, 0), filter_key(2, 0), filter_key(3, 0), NEURON])
def test_traces_and_gradients_that_decay_become_zero_before_they_are_denormal(
    key, dtype, decay, tiny
):
    """A state is zero before it is denormal, with which a CPU computes ten times slower."""
    x = torch.zeros(400, 2, 8, dtype=dtype)
    x[0] = 2.0
    decays = dict.fromkeys(("alpha_0", "reset_decay", "membrane_decay"), decay)
    made = program(key)
    others = {"beta_0": 1.0, "reset_strength": 1.0}
    rows = [(decays | others).get(name, 0.0) for name in made.coefficients]
    coefficients = torch.tensor(rows, dtype=dtype)[:, None].repeat(1, 8)
    state = torch.zeros(len(made.states), 2, 8, dtype=dtype)
    inputs = Inputs(key, x, coefficients, state, None, "gaussian", [0.4])
    inputs = inputs._replace(keep=True, needed=[True] * len(rows), dtype=dtype)
    case = Case(inputs, x.flip(0), torch.zeros_like(state))

    def smallest(tensors):
        return min(tensor[tensor != 0].abs().min().item() for tensor in tensors if tensor.any())

    output, last, grad_x, _, grad_state = case.run(cpu)
    assert smallest(case.run(eager)[:2]) < tiny
    assert not last.any()
    assert not grad_state.any()
    assert smallest([output, grad_x]) > torch.finfo(dtype).tiny
    if key != NEURON:
        assert output[150].min() > 0
        assert grad_x[-150].min() > 0
