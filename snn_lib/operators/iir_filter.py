"""The IIR filter as a custom operator, with its derivatives; equations are in ``eager``."""

from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import backend_for
from snn_lib.operators.checks import (
    check_operands,
    check_shape,
    check_time_first,
)
from snn_lib.operators.transforms import (
    can_skip_dispatch,
    fill_tangents,
    refuse_second,
    register_vmap,
    run_backward,
    save,
)
from snn_lib.pytorch_private import is_transformed
from snn_lib.stability import warn_if_unstable

FilterState = tuple[Tensor, Tensor]
FILTER = "Tensor x, Tensor alpha, Tensor beta, Tensor past_output, Tensor past_input"
FILTER_BACKWARD = (
    "Tensor grad_output, Tensor grad_last, Tensor x, Tensor alpha, Tensor beta, Tensor output, "
    "Tensor past_output, Tensor past_input, bool[] needed"
)


def run_filter(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Runs a filter; takes and returns what ``eager.filter_forward`` does.

    Shapes and dtypes are checked already.
    """
    if is_transformed():
        return _IIRFilter.apply(*inputs)
    if can_skip_dispatch(inputs):
        return backend_for(inputs[0]).filter_forward(*inputs)
    return torch.ops.snn.iir_filter(*inputs)


def check_filter(
    x: Tensor, alpha: Tensor, beta: Tensor, state: FilterState | None, name: str = "x"
) -> None:
    """Raises a ValueError if a shape does not fit that of ``x``, which errors call ``name``."""
    shape = x.shape
    check_time_first(shape, name)
    features = shape[2:]
    for coefficient, tensor, least in (("alpha", alpha, 0), ("beta", beta, 1)):
        if tensor.shape[1:] != features or tensor.shape[0] < least:
            raise ValueError(
                f"{coefficient} has shape {tuple(tensor.shape)}, expected (order, *features) "
                f"for {name} of shape {tuple(shape)} (T, B, *features)"
            )
    if state is not None:
        past_output, past_input = state
        check_shape("state past_output", past_output, (alpha.shape[0], *shape[1:]))
        check_shape("state past_input", past_input, (beta.shape[0] - 1, *shape[1:]))


@torch.library.custom_op(
    "snn::iir_filter", mutates_args=(), schema=f"({FILTER}, ScalarType dtype) -> (Tensor, Tensor)"
)
def _filter_forward(x, alpha, beta, past_output, past_input, dtype):
    check_operands(x=x, alpha=alpha, beta=beta, past_output=past_output, past_input=past_input)
    check_filter(x, alpha, beta, (past_output, past_input))
    if dtype != alpha.dtype and (alpha.dtype, dtype) != (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected {alpha.dtype}, or bfloat16 for float32")
    return backend_for(alpha).filter_forward(x, alpha, beta, past_output, past_input, dtype)


@_filter_forward.register_fake
def _(x, alpha, beta, past_output, past_input, dtype):
    check_operands(x=x, alpha=alpha, beta=beta, past_output=past_output, past_input=past_input)
    return x.new_empty(x.shape, dtype=dtype), alpha.new_empty(past_output.shape)


@torch.library.custom_op(
    "snn::iir_filter_backward",
    mutates_args=(),
    schema=f"({FILTER_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _filter_backward(
    grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
):
    check_operands(
        grad_output=grad_output,
        alpha=alpha,
        grad_last=grad_last,
        x=x,
        beta=beta,
        output=output,
        past_output=past_output,
        past_input=past_input,
    )
    check_filter(grad_output, alpha, beta, (past_output, past_input), "grad_output")
    check_shape("grad_last", grad_last, past_output.shape)
    _, need_alpha, need_beta, _, _ = needed
    if need_alpha:
        check_shape("output", output, grad_output.shape)
        warn_if_unstable(alpha)
    if need_beta:
        check_shape("x", x, grad_output.shape)
    return backend_for(alpha).filter_backward(
        grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
    )


@_filter_backward.register_fake
def _(grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed):
    like = grad_output, alpha, beta, past_output, past_input
    return tuple(
        alpha.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(like, needed, strict=True)
    )


register_vmap(torch.ops.snn.iir_filter)
register_vmap(torch.ops.snn.iir_filter_backward)


class _IIRFilter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, alpha, beta, past_output, past_input, dtype):
        return torch.ops.snn.iir_filter(x, alpha, beta, past_output, past_input, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, beta, past_output, past_input, _ = inputs
        output, _ = output
        if not is_transformed():
            # The output is kept for alpha's gradient only, and the input for beta's. Where one is
            # not needed, beta stands in for it and is never read.
            _, need_alpha, need_beta, *_ = ctx.needs_input_grad
            output = output if need_alpha else beta
            x = x if need_beta else beta
        save(ctx, x, alpha, beta, output, past_output, past_input)

    @staticmethod
    def backward(ctx, grad_output, grad_last):
        needed, saved = list(ctx.needs_input_grad[:5]), ctx.saved_tensors
        backward = torch.ops.snn.iir_filter_backward
        return *run_backward(backward, needed, grad_output, grad_last, *saved), None

    @staticmethod
    def jvp(ctx, *tangents):
        x, alpha, beta, output, past_output, past_input = ctx.saved_tensors
        tensors = x, alpha, beta, past_output, past_input
        tangents = fill_tangents(tangents[:5], tensors)
        return refuse_second("snn.iir_filter_jvp", _filter_jvp, *tangents, *tensors, output)


_filter_forward.register_autograd(_IIRFilter.backward, setup_context=_IIRFilter.setup_context)


def _filter_jvp(
    d_x, d_alpha, d_beta, d_past_output, d_past_input, x, alpha, beta, past_output, past_input, F
):
    """Tangents of F and of its last values.

    They come from the same filter, driven by
    sum_q beta_q dx[t-q] + sum_q dbeta_q x[t-q] + sum_p dalpha_p F[t-p]
    """

    def run(x, alpha, beta, past_output, past_input):
        return torch.ops.snn.iir_filter(x, alpha, beta, past_output, past_input, alpha.dtype)

    no_alpha, no_output, no_input = alpha[:0], past_output[:0], past_input[:0]
    from_beta, _ = run(x, no_alpha, d_beta, no_output, past_input)
    lagged = torch.cat([torch.zeros_like(beta[:1]), d_alpha])  # F from one step ago on
    from_alpha, _ = run(F.to(alpha.dtype), no_alpha, lagged, no_output, past_output)
    coefficients, last = run(
        from_beta + from_alpha,
        alpha,
        torch.ones_like(beta[:1]),
        torch.zeros_like(past_output),
        no_input,
    )
    # F is linear in the input and the state, so their tangents are simply filtered.
    inputs, last_of_inputs = run(d_x, alpha, beta, d_past_output, d_past_input)
    return (inputs + coefficients).to(F.dtype), last_of_inputs + last
