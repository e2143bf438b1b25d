"""Which backend serves a tensor and why; what all backends promise beside the same numbers."""

import warnings
from contextlib import ExitStack

import pytest
import torch
from claimed_device import ClaimedDevice
from torch import nn

from snn_lib import LowPassSynapse, Recurrent, Sequential, SpikingNeuron, kernels, use_backend
from snn_lib.functional import iir_filter
from snn_lib.kernels import backend_for, choose_backend, eager
from snn_lib.kernels.check import FILTER, NEURON, Draw, filter_key, make_case

AUTOMATIC = ("cpu", "llvmlite")


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
def llvmlite():
    return pytest.importorskip("llvmlite")


# --------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize("steps", [31, 64, 100])
@pytest.mark.parametrize("ways", [("eager", "cpu"), ("cpu", "eager")])
def test_the_backward_pass_may_run_on_another_backend(steps, ways, llvmlite):
    model = Sequential(
        SpikingNeuron(6, 3.0, membrane_filter=True),
        Recurrent(nn.Linear(6, 6), SpikingNeuron(6, 3.0)),
        LowPassSynapse(6, 4.0),
    ).double()
    x = 2 * torch.randn(steps, 3, 6, dtype=torch.float64, requires_grad=True)
    lengths, found = torch.tensor([steps, steps - 7, 0]), []
    for forward, backward in (ways, (ways[1], ways[1])):
        with use_backend(forward):
            output, _ = model(x, lengths=lengths)
        with use_backend(backward):
            loss = output.cos().sum()
            found.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    torch.testing.assert_close(*found)


def test_each_device_is_served_by_its_fastest_backend(llvmlite):
    assert choose_backend("cpu") == choose_backend(torch.device("cpu")) == AUTOMATIC
    assert choose_backend("meta") == ("eager", "no backend is compiled for meta")
    assert backend_for(torch.ones(1)).__name__ == "snn_lib.kernels.cpu"


def test_use_backend_forces_a_backend_until_its_block_ends(llvmlite):
    with use_backend("eager"):
        assert choose_backend("cpu") == ("eager", "forced by use_backend")
        assert backend_for(torch.ones(1)) is eager
        with use_backend("auto"):
            assert choose_backend("cpu") == AUTOMATIC
    assert choose_backend("cpu") == AUTOMATIC


def test_blocks_of_the_same_backend_may_be_nested(llvmlite):
    with use_backend("cpu"), use_backend("eager"):
        with use_backend("cpu"):
            pass
        assert choose_backend("cpu")[0] == "eager"


def test_blocks_that_overlap_leave_nothing_behind(llvmlite):
    """As two threads may: the first to begin is the first to end."""
    first, second = ExitStack(), ExitStack()
    first.enter_context(use_backend("eager"))
    second.enter_context(use_backend("cpu"))
    assert choose_backend("cpu")[0] == "cpu"
    first.close()
    assert choose_backend("cpu") == ("cpu", "forced by use_backend")
    second.close()
    assert choose_backend("cpu") == AUTOMATIC


def test_a_block_ends_with_an_error_too(llvmlite):
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert choose_backend("cpu") == AUTOMATIC


@pytest.mark.parametrize(("value", "expected"), [("", None), ("auto", None), ("eager", "eager")])
def test_the_environment_chooses_for_the_process(value, expected, monkeypatch, llvmlite):
    monkeypatch.setenv("SNN_BACKEND", value)
    assert choose_backend("cpu") == ((expected, "SNN_BACKEND") if expected else AUTOMATIC)
    with use_backend("auto"):  # what the configuration's default asks for
        assert choose_backend("cpu") == ((expected, "SNN_BACKEND") if expected else AUTOMATIC)
    with use_backend("cpu"):
        assert choose_backend("cpu") == ("cpu", "forced by use_backend")


def test_unknown_backends_are_refused(monkeypatch):
    known = "'numpy' is unknown, choose one of auto, eager, cpu, cuda"
    with pytest.raises(ValueError, match=f"^backend {known}$"), use_backend("numpy"):
        pass
    monkeypatch.setenv("SNN_BACKEND", "numpy")
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=f"^SNN_BACKEND {known}$"):
            iir_filter(torch.ones(1, 2, 3), torch.ones(1, 3), torch.ones(1, 3))


def test_a_device_that_the_chosen_backend_cannot_serve_is_refused(monkeypatch, llvmlite):
    x, coefficient = torch.ones(1, 2, 3), torch.ones(1, 3)
    with use_backend("cpu"), pytest.raises(ValueError, match=r"^backend 'cpu' \(forced by use_"):
        backend_for(x.to("meta"))
    monkeypatch.setenv("SNN_BACKEND", "cuda")
    refused = r"^backend 'cuda' \(SNN_BACKEND\) cannot serve a tensor on cpu, only on cuda, or "
    with pytest.raises(ValueError, match=refused):
        iir_filter(x, coefficient, coefficient)
    with use_backend("eager"):
        assert backend_for(x.to("meta")) is eager


def test_triton_serves_a_cpu_through_its_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "_module", lambda name: name)  # importing it would stay so
    monkeypatch.setenv("SNN_BACKEND", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu") == ("cuda", "SNN_BACKEND")
    assert choose_backend("cuda") == ("cuda", "SNN_BACKEND")


# --------------------------------------------------------------------------------------------------
# Falling back


@pytest.fixture(
    params=[ImportError("No module named 'llvmlite'"), OSError("libLLVM: no such file")]
)
def broken(request, monkeypatch):
    """What the import of the CPU backend raises."""
    import_module = kernels.importlib.import_module

    def fail(name):
        if name == "snn_lib.kernels.cpu":
            raise request.param
        return import_module(name)

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    return request.param


def test_plain_pytorch_serves_where_the_cpu_backend_cannot_be_imported(broken):
    reason = f"llvmlite cannot be imported: {broken!r}"
    with pytest.warns(RuntimeWarning) as warned:
        output, _ = iir_filter(torch.ones(2, 1, 3), torch.ones(1, 3), torch.ones(1, 3))
    assert output[:, 0, 0].tolist() == [1.0, 2.0]
    (warning,) = warned
    assert str(warning.message).startswith(f"{reason}: plain PyTorch serves instead")
    assert "about three times as long" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert choose_backend("cpu") == ("eager", reason)


def test_a_chosen_backend_that_cannot_be_imported_is_refused(broken, monkeypatch):
    with pytest.raises(ImportError, match=r"^llvmlite cannot be imported: "), use_backend("cpu"):
        pass
    assert not kernels._choices
    monkeypatch.setenv("SNN_BACKEND", "cpu")
    with pytest.raises(ImportError, match=r"^llvmlite cannot be imported: "):
        choose_backend("cpu")


# --------------------------------------------------------------------------------------------------
# What eager and the CPU kernels share


@pytest.mark.parametrize("key", [filter_key(3, 2), NEURON, f"{NEURON}+{FILTER}"])
def test_cpu_kernels_give_the_bits_of_plain_pytorch(key, llvmlite):
    """Nearly the same is not enough: it decides which neurons fire."""
    case = make_case(Draw(torch.float32, "cpu"), (6, 5, 67), key=key)
    found, expected = (b.forward(case.inputs) for b in (kernels._module("cpu"), eager))
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(one, other)


def test_plain_pytorch_waits_for_no_device_and_needs_no_double_precision_of_it():
    with ClaimedDevice("mps") as device:
        options = {"key": f"{NEURON}+{FILTER}", "ends": True, "dropout": 0.3}
        case = make_case(Draw(torch.float32, "mps"), (3, 2, 5), **options)
        device.waits.clear()
        case.run(eager)
        assert not device.waits


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_the_operator_refuses_dtypes_that_kernels_would_misread(low):
    case = make_case(Draw(torch.float32, "cpu"), (3, 2, 5), key=NEURON)

    def run(**changes):
        return torch.ops.snn.run(*case.inputs._replace(**changes))

    with pytest.raises(ValueError, match=r"coefficients are in .*, expected float32 or float64"):
        run(coefficients=case.inputs.coefficients.to(low))
    with pytest.raises(ValueError, match=rf"state has .*{low}.*, expected .*float32"):
        run(state=case.inputs.state.to(low))
    if low != torch.bfloat16:
        with pytest.raises(ValueError, match=r"x is in .*, expected torch.float32"):
            run(x=case.inputs.x.to(low))
        with pytest.raises(ValueError, match=r"the output is in .*, expected torch.float32"):
            run(dtype=low)


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_results_are_contiguous_however_the_inputs_lie_in_memory(name, llvmlite):
    """Compiled code relies on it, however what is given lies."""
    case = make_case(Draw(torch.float32, "cpu"), (3, 2, 5), "transposed", key=NEURON)
    case.inputs = case.inputs._replace(state=torch.rand(5, 2, 2).permute(2, 1, 0))
    assert all(tensor.is_contiguous() for tensor in case.run(kernels._module(name)))
