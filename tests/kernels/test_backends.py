"""Which backend serves a tensor and why; what all backends promise beside the same numbers."""

import runpy
import sys
import warnings
from contextlib import ExitStack

import pytest
import torch
from claimed_device import ClaimedDevice

from snn_lib import kernels, use_backend
from snn_lib.functional import iir_filter
from snn_lib.kernels import backend_for, choose_backend, eager

AUTOMATIC = ("cpu", "Numba")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """No choice by the environment, and none that was kept from before."""
    for name in ("SNN_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    functions = kernels._choose_backend, kernels._module
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def numba():
    return pytest.importorskip("numba")


# --------------------------------------------------------------------------------------------------
# The choice


def test_the_fastest_serves_each_device(numba):
    assert choose_backend("cpu") == choose_backend(torch.device("cpu")) == AUTOMATIC
    assert choose_backend("meta") == ("eager", "no backend is compiled for meta")
    assert backend_for(torch.ones(1)).__name__ == "snn_lib.kernels.cpu"


def test_use_backend_forces_one(numba):
    with use_backend("eager"):
        assert choose_backend("cpu") == ("eager", "forced by use_backend")
        assert backend_for(torch.ones(1)) is eager
        with use_backend("auto"):
            assert choose_backend("cpu") == AUTOMATIC
    assert choose_backend("cpu") == AUTOMATIC


def test_of_the_same_backend_twice_the_inner_one_ends(numba):
    with use_backend("cpu"), use_backend("eager"):
        with use_backend("cpu"):
            pass
        assert choose_backend("cpu")[0] == "eager"


def test_uses_that_overlap_leave_nothing_behind(numba):
    """As two threads may: the first to begin is the first to end."""
    first, second = ExitStack(), ExitStack()
    first.enter_context(use_backend("eager"))
    second.enter_context(use_backend("cpu"))
    assert choose_backend("cpu")[0] == "cpu"
    first.close()
    assert choose_backend("cpu") == ("cpu", "forced by use_backend")
    second.close()
    assert choose_backend("cpu") == AUTOMATIC


def test_a_use_that_fails_ends(numba):
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert choose_backend("cpu") == AUTOMATIC


@pytest.mark.parametrize(("value", "expected"), [("", None), ("auto", None), ("eager", "eager")])
def test_the_environment_chooses_for_the_process(value, expected, monkeypatch, numba):
    monkeypatch.setenv("SNN_BACKEND", value)
    assert choose_backend("cpu") == ((expected, "SNN_BACKEND") if expected else AUTOMATIC)
    with use_backend("auto"):  # what the configuration's default asks for
        assert choose_backend("cpu") == ((expected, "SNN_BACKEND") if expected else AUTOMATIC)
    with use_backend("cpu"):
        assert choose_backend("cpu") == ("cpu", "forced by use_backend")


def test_unknown_names_are_refused(monkeypatch):
    known = "'numba' is unknown, choose one of auto, eager, cpu, cuda"
    with pytest.raises(ValueError, match=f"^backend {known}$"), use_backend("numba"):
        pass
    monkeypatch.setenv("SNN_BACKEND", "numba")
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=f"^SNN_BACKEND {known}$"):
            iir_filter(torch.ones(1, 2, 3), torch.ones(1, 3), torch.ones(1, 3))


def test_a_device_that_the_chosen_backend_cannot_serve_is_refused(monkeypatch, numba):
    x, coefficient = torch.ones(1, 2, 3), torch.ones(1, 3)
    with use_backend("cpu"), pytest.raises(ValueError, match=r"^backend 'cpu' \(forced by use_"):
        backend_for(x.to("meta"))
    monkeypatch.setenv("SNN_BACKEND", "cuda")
    refused = r"^backend 'cuda' \(SNN_BACKEND\) cannot serve a tensor on cpu, only on cuda, or "
    with pytest.raises(ValueError, match=refused):
        iir_filter(x, coefficient, coefficient)
    with use_backend("eager"):
        assert backend_for(x.to("meta")) is eager


def test_triton_serves_a_cpu_by_its_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "_module", lambda name: name)  # importing it would stay so
    monkeypatch.setenv("SNN_BACKEND", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu") == ("cuda", "SNN_BACKEND")
    assert choose_backend("cuda") == ("cuda", "SNN_BACKEND")


# --------------------------------------------------------------------------------------------------
# Falling back


@pytest.fixture(params=[ImportError("No module named 'numba'"), OSError("libLLVM: no such file")])
def broken(request, monkeypatch):
    """What the import of the CPU backend raises."""
    import_module = kernels.importlib.import_module

    def fail(name):
        if name == "snn_lib.kernels.cpu":
            raise request.param
        return import_module(name)

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    return request.param


def test_eager_serves_whatever_fails_at_import(broken):
    reason = f"Numba cannot be imported: {broken!r}"
    with pytest.warns(RuntimeWarning) as warned:
        output, _ = iir_filter(torch.ones(2, 1, 3), torch.ones(1, 3), torch.ones(1, 3))
    assert output[:, 0, 0].tolist() == [1.0, 2.0]
    (warning,) = warned
    assert str(warning.message).startswith(f"{reason}: plain PyTorch serves instead")
    assert "one and a half times as long" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert choose_backend("cpu") == ("eager", reason)


def test_a_chosen_backend_that_cannot_be_imported_is_refused(broken, monkeypatch):
    with pytest.raises(ImportError, match=r"^Numba cannot be imported: "), use_backend("cpu"):
        pass
    assert not kernels._choices
    monkeypatch.setenv("SNN_BACKEND", "cpu")
    with pytest.raises(ImportError, match=r"^Numba cannot be imported: "):
        choose_backend("cpu")


def test_the_command_says_what_serves(capsys, numba, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels"])
    runpy.run_module("snn_lib.kernels", run_name="__main__")
    assert capsys.readouterr().out.splitlines()[0] == "cpu: cpu (Numba)"


# --------------------------------------------------------------------------------------------------
# What eager and the CPU kernels share

SEED = [3, 0]
T, B, N = 6, 5, 7


def filter_case():
    """Arguments of ``filter_forward`` but the last."""
    alpha, past = torch.rand(2, N) - 0.5, (torch.randn(2, B, N), torch.randn(1, B, N))
    return torch.randn(T, B, N), alpha, torch.randn(2, N), *past


def neuron_case():
    """The first six arguments of ``neuron_forward``."""
    return 1.0 + torch.randn(T, B, N), *torch.rand(3, N), *torch.randn(2, B, N)


def forward(backend):
    filtered = backend.filter_forward(*filter_case(), torch.float32)
    return *filtered, *backend.neuron_forward(*neuron_case(), 0.3, torch.tensor(SEED))


def backward(backend):
    x, alpha, beta, *past = filter_case()
    gradients = torch.randn(T, B, N), torch.randn(2, B, N)
    filtered = backend.filter_backward(*gradients, x, alpha, beta, x, *past, [True] * 5)
    gradients = torch.randn(T, B, N), *torch.randn(2, B, N)
    options = "gaussian", 0.4, None, 0.3, torch.tensor(SEED), [True] * 6
    return *filtered, *backend.neuron_backward(*gradients, *neuron_case(), *options)


def test_cpu_kernels_round_as_eager_does(numba):
    """Nearly the same is not enough: it decides which neurons fire."""
    found = forward(kernels._module("cpu"))
    torch.manual_seed(0)
    for one, other in zip(found, forward(eager), strict=True):
        assert torch.equal(one, other)


def test_eager_asks_for_no_double_precision_where_there_is_none():
    with ClaimedDevice("mps"), torch.device("mps"):
        forward(eager)
        backward(eager)


LOW = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.int64], ids=str)


@LOW
@pytest.mark.parametrize("place", range(5))
def test_cpu_kernels_refuse_dtypes_that_they_would_misread(low, place, numba):
    cpu = kernels._module("cpu")
    arguments = [*filter_case()]
    arguments[place] = arguments[place].to(low)
    with pytest.raises(TypeError, match=f"got .*{low}.*, expected torch.float32 or torch.float64"):
        cpu.filter_forward(*arguments, torch.float32)
    grad, output = torch.randn(T, B, N), torch.randn(T, B, N)
    x, alpha, beta, *past = arguments
    with pytest.raises(TypeError, match=f"got .*{low}"):
        cpu.filter_backward(grad, grad[:2], x, alpha, beta, output, *past, [True] * 5)

    arguments = [*neuron_case()]
    arguments[1 + place] = arguments[1 + place].to(low)
    with pytest.raises(TypeError, match=f"got .*{low}"):
        cpu.neuron_forward(*arguments, 0.0, torch.tensor(SEED))
    options = "gaussian", 0.4, None, 0.0, torch.tensor(SEED), [True] * 6
    with pytest.raises(TypeError, match=f"got .*{low}"):
        cpu.neuron_backward(grad, *grad[:2], *arguments, *options)


def test_cpu_kernels_refuse_sequences_in_half_precision(numba):
    cpu, x, seed = kernels._module("cpu"), torch.randn(T, B, N), torch.tensor(SEED)
    with pytest.raises(TypeError, match=r"got torch.float16, torch.float32, "):
        cpu.filter_forward(*filter_case(), torch.float16)
    current, *neuron = neuron_case()
    with pytest.raises(TypeError, match=r"got torch.float16, torch.float32, "):
        cpu.neuron_forward(current.half(), *neuron, 0.0, seed)
    with pytest.raises(TypeError, match=r"got torch.float32, torch.float64, "):
        cpu.neuron_backward(
            x, *x[:2], current, *neuron, "given", 0.4, x.double(), 0.0, seed, [True] * 6
        )


def test_eager_s_states_lie_in_memory_as_the_operators_promise():
    """Compiled code relies on it, however the given states lie."""
    current, decay, transposed = torch.rand(3, 2, 5), torch.full((5,), 0.5), torch.rand(5, 2).T
    coefficients = decay, torch.ones(5), decay
    found = eager.neuron_forward(current, *coefficients, transposed, transposed, 0.0, None)
    assert all(tensor.is_contiguous() for tensor in found)
