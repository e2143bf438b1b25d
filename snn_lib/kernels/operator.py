"""The operator that runs a program over a whole sequence, as PyTorch sees it.

Autograd, ``torch.compile`` and ``torch.export`` see a single node, however many time steps there
are. It runs on the backend that serves its tensors, see ``snn_lib.kernels``. Where PyTorch has to
see the steps themselves, plain PyTorch runs them: in forward mode, under the transforms of
``torch.func``, for second derivatives, and for steps or surrogates that no kernel can compute.
"""

from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import backend_for, eager
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import name_of, program
from snn_lib.pytorch_private import (
    assume_constant_result,
    is_transformed,
    is_watched,
    run_uncompiled,
)
from snn_lib.surrogate import Surrogate

PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses of a tensor may change what operators do
SCHEMA = (
    "str key, Tensor x, Tensor coefficients, Tensor? state, Tensor? lengths, str surrogate, "
    "float[] numbers, float dropout, Tensor? seed, ScalarType dtype, bool keep, bool[] needed"
)


def run(inputs: Inputs, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """Runs a program on tensors that fit each other, with this surrogate.

    Returns:
        The output, ``(T, B, N)``, and the state ``(S, B, N)`` after the last step.
    """
    tensors = inputs.x, inputs.coefficients, inputs.state
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if learns:
        name, numbers = name_of(surrogate)
        inputs = inputs._replace(surrogate=name, numbers=numbers, keep=True)
    if is_transformed() or not has_kernels(inputs.key, inputs.surrogate):
        return _run_plain(inputs, surrogate)
    if not learns and _can_skip_dispatch(inputs):
        return backend_for(inputs.x).forward(inputs)[:2]
    return torch.ops.snn.run(*inputs)[:2]


@run_uncompiled  # a transform, or what no kernel can compute, runs step by step
def _run_plain(inputs: Inputs, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    return eager.run(inputs, surrogate)


@assume_constant_result
def has_kernels(key: str, surrogate: str) -> bool:
    """Whether kernels can compute a program and its gradients with a surrogate, if one is named."""
    return program(key).has_kernels(surrogate)


def _can_skip_dispatch(inputs: Inputs) -> bool:
    """Whether a backend may be called directly, because no part of PyTorch has to see the operator.

    That is so if no gradient is needed and no compiler, mode or subclass of a tensor is at work. A
    direct call leaves out PyTorch's dispatch and the operator's checks, which take most of the time
    of a single step of a stream. Tensors on several devices are left to those checks.
    """
    if torch.compiler.is_compiling() or is_watched():
        return False
    device = inputs.x.device
    return device.type != "meta" and all(
        # one that is negative in this sense has the opposite numbers in its memory
        type(value) in PLAIN and value.device == device and not value.is_neg()
        for value in inputs
        if isinstance(value, Tensor)
    )


@torch.library.custom_op(
    "snn::run", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
def _run(*arguments):
    inputs = Inputs(*arguments)
    inputs.check()
    return backend_for(inputs.coefficients).forward(inputs)


@_run.register_fake
def _(*arguments):
    inputs = Inputs(*arguments)
    inputs.check()
    return inputs.new_results()


@torch.library.custom_op(
    "snn::run_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor grad_last, Tensor checkpoints, bool need_x, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _run_backward(grad_output, grad_last, checkpoints, need_x, *arguments):
    inputs = Inputs(*arguments)
    inputs.check()
    backend = backend_for(inputs.coefficients)
    return backend.backward(inputs, grad_output, grad_last, checkpoints, need_x)


@_run_backward.register_fake
def _(grad_output, grad_last, checkpoints, need_x, *arguments):
    return Inputs(*arguments).new_gradients(need_x)


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    *_, checkpoints = output
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, checkpoints)


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple:
    *tensors, checkpoints = ctx.saved_tensors
    pairs = zip(ctx.settings, tensors, strict=True)
    inputs = Inputs(*(setting if tensor is None else tensor for setting, tensor in pairs))
    if grad_output is None:
        grad_output = inputs.x.new_zeros((), dtype=inputs.dtype).expand(inputs.x.shape)
    grad_last = inputs.rest if grad_last is None else grad_last
    needs = need_x, need_coefficients, _ = ctx.needs_input_grad[1:4]
    if torch.is_grad_enabled():  # somebody differentiates the gradient

        def run_plainly(x: Tensor, coefficients: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
            return eager.run(inputs._replace(x=x, coefficients=coefficients, state=first))

        tensors = inputs.x, inputs.coefficients, inputs.first
        found = eager.differentiate(run_plainly, tensors, needs, (grad_output, grad_last))
    else:
        inputs = inputs._replace(needed=[need and need_coefficients for need in inputs.needed])
        gradients = grad_output, grad_last, checkpoints
        found = torch.ops.snn.run_backward(*gradients, need_x, *inputs)
    found = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
    return None, *found, *[None] * (len(inputs) - 4)


_run.register_autograd(_differentiate, setup_context=_remember)
