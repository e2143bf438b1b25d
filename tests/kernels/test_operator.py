"""The operator that runs programs, as PyTorch and those who call it directly see it."""

import pytest
import torch
from definitions import filter_inputs, neuron_inputs, run_filter, run_neuron
from small_networks import Operators
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from snn_lib import use_backend
from snn_lib.functional import iir_filter, spiking_neuron
from snn_lib.kernels import operator
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import program

both = pytest.mark.parametrize(
    ("function", "make"), [(run_filter, filter_inputs), (run_neuron, neuron_inputs)]
)


def operands(key, dtype=torch.float64):
    """The arguments of the operator, by name, and those of its backward pass."""
    made = program(key)
    inputs = Inputs(
        key,
        torch.randn(6, 2, 3, dtype=dtype),
        torch.rand(len(made.coefficients), 3, dtype=dtype) / 4,
        torch.randn(len(made.states), 2, 3, dtype=dtype),
        torch.tensor([2, 5]),
        "gaussian",
        [0.4],
        dropout=0.5 if any(made.spikes) else 0.0,
        seed=torch.tensor([7, 0]),
        dtype=dtype,
        keep=True,
        needed=[True] * len(made.coefficients),
    )
    *_, checkpoints = torch.ops.snn.run(*inputs)
    came = torch.randn(6, 2, 3, dtype=dtype), torch.randn_like(inputs.state)
    grad = dict(zip(("grad_output", "grad_last", "checkpoints"), (*came, checkpoints), strict=True))
    return inputs._asdict(), grad | {"need_x": True} | inputs._asdict()


KEYS = ["IIRSynapse[2,1;2,2]", "SpikingNeuron[-,-;-,-,-]"]
OPERATORS = torch.ops.snn.run, torch.ops.snn.run_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", KEYS)
def test_operators_pass_pytorch_s_checks(key, dtype):
    forward, backward = operands(key, dtype)
    for name in ("x", "coefficients", "state"):
        forward[name] = forward[name].clone().requires_grad_()
    # PyTorch would compare the room behind the checkpoints, which nobody writes.
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    opcheck(torch.ops.snn.run.default, tuple(forward.values()), test_utils=checks)
    for need_x in (True, False):
        some = backward | {"need_x": need_x, "needed": [need_x, *backward["needed"][1:]]}
        opcheck(torch.ops.snn.run_backward.default, tuple(some.values()))


@both
def test_profilers_modes_and_graphs_see_one_operator(function, make):
    with Operators() as seen, torch.no_grad():
        function(*make())
    assert sum(name.startswith("snn.") for name, _ in seen.calls) == 1
    with torch.profiler.profile() as profile, torch.no_grad():
        function(*make())
    assert sum(event.name.startswith("snn::") for event in profile.events()) == 1
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        inputs = [mode.from_tensor(tensor) for tensor in make()]
        assert function(*inputs)[0].shape == inputs[0].shape
    assert function(*(tensor.to("meta") for tensor in make()))[0].is_meta
    with torch.no_grad():
        graph = make_fx(lambda *inputs: function(*inputs)[0], pre_dispatch=True)(*make()).graph
    assert "snn." in str(graph)


@both
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_short_cut_around_the_operator_gives_the_same(function, make, backend, monkeypatch):
    inputs = make(dtype=torch.float32)
    with use_backend(backend):
        short = function(*inputs)
        monkeypatch.setattr(operator, "_can_skip_dispatch", lambda inputs: False)
        torch.testing.assert_close(function(*inputs), short, rtol=0.0, atol=0.0)
        with torch.inference_mode():
            torch.testing.assert_close(function(*inputs), short, rtol=0.0, atol=0.0)


@both
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_later_module_may_write_into_the_output(function, make, backend):
    inputs = make(features=(3, 2, 2), dtype=torch.float32)
    x = inputs[0].requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(function(*inputs)[0].relu().sum(), x)
        (again,) = torch.autograd.grad(function(*inputs)[0].relu_().sum(), x)
    torch.testing.assert_close(again, grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_tensor_with_a_pending_negation_is_read_with_its_sign(backend):
    """PyTorch has the imaginary part of a conjugate so: with the memory of the opposite number."""
    x = torch.complex(torch.zeros(1, 1, 1), torch.full((1, 1, 1), -2.0)).conj().imag
    assert x.is_neg()
    one, half = torch.ones(1, 1), torch.full((1,), 0.5)
    with use_backend(backend), torch.no_grad():
        assert iir_filter(x, one, one)[0].item() == 2
        assert spiking_neuron(x, half, half, half)[0].item() == 1


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("way", [0, 1])
def test_operators_called_directly_check_each_tensor(key, way):
    """Their kernels would read out of bounds."""
    arguments = operands(key)[way]
    called = OPERATORS[way]
    called(*arguments.values())
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) or name in ("grad_output", "grad_last", "checkpoints"):
            continue
        for wrong in (tensor[..., None], tensor[..., 1:], tensor.int()):
            with pytest.raises(ValueError, match=r"expected") as error:
                called(*(arguments | {name: wrong}).values())
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("way", "change", "words"),
    [
        (0, {"seed": None}, "dropout without a seed"),
        (0, {"key": "Unknown[-;-]"}, "no cell is called 'Unknown': import its module"),
        (0, {"dtype": torch.float16}, r"the output is in torch\.float16, expected torch\.float64"),
        (1, {"surrogate": "arctan"}, "no surrogate is called 'arctan': expected gaussian, fast"),
    ],
)
def test_operators_called_directly_check_their_settings(way, change, words):
    with pytest.raises(ValueError, match=words):
        OPERATORS[way](*(operands(KEYS[1])[way] | change).values())


def test_forward_mode_through_the_operator_is_refused_and_not_silently_wrong():
    """An operator called directly refuses it, and torch.compile breaks its graph."""
    forward, _ = operands(KEYS[0])
    with forward_ad.dual_level():
        forward["x"] = forward_ad.make_dual(forward["x"], forward["x"])
        with pytest.raises(NotImplementedError, match=r"forward mode through torch\.ops\.snn"):
            torch.ops.snn.run(*forward.values())
    current, *others = neuron_inputs()

    def tangent(x):
        return torch.func.jvp(lambda x: run_neuron(x, *others)[0], (x,), (x,))[1]

    torch.compiler.reset()
    found = torch.compile(tangent, backend="eager")(current)
    torch.testing.assert_close(found, tangent(current), rtol=1e-12, atol=1e-12)
