"""The private parts of PyTorch that this package uses, in one place.

A new release of PyTorch may change them without notice. If it breaks this package, look here first.
They were tried with PyTorch 2.12, 2.13 and 2.15.

Private parts of ``nn.Module`` itself are used elsewhere: ``_modules``, in which ``Sequential``
keeps its modules as ``nn.Sequential`` does, ``_parameters`` and ``_buffers``, and what layers
override, ``_save_to_state_dict``, ``_load_from_state_dict`` and ``_apply``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch._compile
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.prune import BasePruningMethod
from torch.utils import _pytree

Function = TypeVar("Function", bound=Any)
# PyTorch's extension module, which is linked with its OpenMP library.
EXTENSION_PATH = torch._C.__file__


# As torch.compiler.disable, but PyTorch's compiler, which takes a second, is imported when the
# function first runs.
run_uncompiled = torch._compile._disable_dynamo


def assume_constant_result(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``, but PyTorch's compiler is not imported."""
    function._dynamo_marked_constant = True
    return function


def is_transformed() -> bool:
    """Whether this call is inside a transform of ``torch.func`` or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def carries_tangents() -> bool:
    """Whether forward-mode differentiation is switched on for this call."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def is_watched() -> bool:
    """Whether a mode, the tracer or the profiler sees each operation, beside autograd."""
    return sees_operations() or torch.autograd._profiler_enabled()


def sees_operations() -> bool:
    """Whether a mode or the tracer sees each operation, and may act on it.

    Examples of modes are fake tensors, functional tensors, counters of FLOPs and a default device.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    )


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; 0 in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def register_named_tuple(kind: type) -> None:
    """Lets ``torch.export.save`` write programs that return such a named tuple."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__name__}")


def convolve(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution layer with other weights in place of its own and without a bias."""
    return layer._conv_forward(x, weight, None)


def comes_from_compile(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned this module, around the one that it was given."""
    return "_orig_mod" in module._modules


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` runs the model or a part of it."""
    return any(
        module._compiled_call_impl is not None or comes_from_compile(module)
        for module in model.modules()
    )


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The hooks that change or see a module's forward pass, as ``torch.nn.utils.prune`` adds.

    Those that only observe the module of which this one is a copy are none.
    """
    hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
    return [hook for hook in hooks if getattr(hook, "observed", module) is module]


def compute_pruned(module: nn.Module) -> None:
    """Computes what is pruned of a module, as its hooks do where it is called."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            hook(module, ())


def is_observed(module: nn.Module) -> bool:
    """Whether a hook sees the module's calls or its gradients, or ``torch.compile`` runs it."""
    hooks = forward_hooks(module), module._backward_hooks, module._backward_pre_hooks
    compiled = module._compiled_call_impl is not None
    replaced = "forward" in vars(module)
    anywhere = torch.nn.modules.module._has_any_global_hook()
    return any(hooks) or compiled or replaced or bool(anywhere)
