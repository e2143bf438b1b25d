"""A device that does not exist, so that mistakes which only a GPU would show are found without one.

    with ClaimedDevice() as device:
        model.to("cuda")(torch.zeros(5, 2, 784, device="cuda"))
    device.waits  # what made the CPU wait for the device, by line of code

Tensors claim that they are on the device, but their elements lie on the CPU, which computes
everything. What CUDA refuses is refused in the same words: tensors of two devices in one operation,
a generator of the CPU for numbers of the device, and ``numpy()``. The device has its own random
numbers. Autocast rounds the matrix products and nothing else.

To PyTorch the tensors are on the meta device, for which autograd needs no driver.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # an optimiser imports it otherwise, while functions are patched
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from snn_lib.errors import INSTALLED

ROOT = Path(__file__).parent.parent
META = torch.device("meta")
MATRIX_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, torch.bmm, F.conv2d)
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
FILLING = (aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_)
WAITING = (  # the size or the value of what they return depends on elements
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.repeat_interleave,
)


class ClaimedTensor(Tensor):
    """Claims ``device`` and keeps its elements in ``held``, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, held, device):
        tensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=META
        )
        tensor.held, tensor.claimed = held, device
        return tensor

    device = property(lambda self: self.claimed)
    is_cuda = property(lambda self: self.claimed.type == "cuda")
    is_meta = property(lambda self: False)

    def numpy(self):
        raise TypeError(
            f"can't convert {self.claimed} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    __array__ = numpy

    def tolist(self):
        return self.detach().cpu().tolist()

    def __repr__(self):
        return f"{self.detach().cpu()!r} on {self.claimed}"

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            copy._is_param = True
        return memo.setdefault(id(self), copy)

    def __reduce_ex__(self, protocol):  # in a file its elements are those of a tensor of the CPU
        return self.detach().cpu().__reduce_ex__(protocol)

    # With these, ``nn.Module.to`` makes a parameter of the CPU into one of the device.
    def __tensor_flatten__(self):
        return ["held"], self.claimed

    @staticmethod
    def __tensor_unflatten__(inner, claimed, shape, stride):
        return ClaimedTensor(inner["held"], claimed)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor whose device is gone")


class ClaimedDevice:
    """The context in which there is such a device, of the ``kind`` ``cuda`` or ``mps``.

    Attributes:
        waits: how often each line of this project made the CPU wait for the device, by
            ``(line, operation)``.
    """

    def __init__(self, kind="cuda"):
        self.device = torch.device(kind, 0)
        self.waits = Counter()
        self._seed(0)

    def __enter__(self):
        self._stack = ExitStack()
        for name, replacement in {
            "Tensor.pin_memory": _pinned,
            "cuda.is_available": lambda: self.device.type == "cuda",
            "cuda.is_bf16_supported": lambda *_, **__: True,
            "cuda.mem_get_info": lambda *_: (2**36, 2**36),
            "cuda.get_device_name": str,
            "cuda.is_current_stream_capturing": lambda: False,
            "accelerator.current_stream": lambda *_: SimpleNamespace(is_capturing=lambda: False),
            "cuda.manual_seed_all": self._seed,  # which torch.manual_seed calls, and the next
            "mps.manual_seed": self._seed,
            "cuda.get_rng_state": lambda device=None: self._random,
            "cuda.set_rng_state": lambda state, device=None: setattr(self, "_random", state),
            "mps.get_rng_state": lambda: self._random,
            "mps.set_rng_state": lambda state: setattr(self, "_random", state),
        }.items():
            self._stack.enter_context(mock.patch(f"torch.{name}", replacement))
        self._stack.enter_context(_Calls(self.device))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _seed(self, seed):
        self._random = torch.Generator().manual_seed(seed).get_state()

    def run(self, func, args, kwargs):
        """What an operation returns on the CPU, with the device's random numbers."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError(
                f"Expected a '{self.device.type}' device type for generator but found 'cpu'"
            )
        state = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            result = func(*args, **kwargs)
            self._random = torch.get_rng_state()
        finally:
            torch.set_rng_state(state)
        return result

    def check(self, func, args, tensors):
        """Refuses tensors of two devices where CUDA does."""
        foreign = [tensor for tensor in tensors if not isinstance(tensor, ClaimedTensor)]
        operation = func.overloadpacket
        if operation in INDEXING:  # the indices may lie on the CPU
            foreign = [tensor for tensor in foreign if all(tensor is not i for i in args[1])]
        scalars = torch.Tag.pointwise in func.tags or operation in FILLING + INDEXING
        allowed = operation in COPIES or (scalars and all(t.dim() == 0 for t in foreign))
        if foreign and len(foreign) < len(tensors) and not allowed:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and cpu! (in {operation})"
            )

    def count(self, func, args, kwargs, leaves, arrives):
        """Counts an operation that makes the CPU wait."""
        operation = func.overloadpacket
        if operation in COPIES:
            source = args[1] if operation is aten.copy_ else args[0]
            if isinstance(source, ClaimedTensor):
                waits = leaves
            else:
                non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
                waits = arrives and not (non_blocking and hasattr(source, "pinned"))
        elif operation in INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = any(index.dtype == torch.bool for index in indices)
            one_value = operation is not aten.index and args[2].numel() == 1  # fills the mask
            foreign = not all(isinstance(index, ClaimedTensor) for index in indices)
            waits = foreign or (masks and not one_value)
        else:
            waits = operation in WAITING and kwargs.get("output_size") is None
        if waits:
            self.waits[_line(), str(operation).removeprefix("aten.")] += 1


class _Calls(TorchFunctionMode):
    """Gives PyTorch its meta device where the claimed one is named."""

    def __init__(self, device):
        super().__init__()
        self.claimed = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device or func.__name__ == "__get__":
            return func(*args, **kwargs)
        args = [self._meta(value) for value in args]
        kwargs = {name: self._meta(value) for name, value in kwargs.items()}
        if func is Tensor.cuda:
            return args[0].to(META)
        if func in (torch.tensor, torch.as_tensor):  # their way to the device is not shown
            device = kwargs.pop("device", None)
            return func(*args, **kwargs).to(device)
        kind = self.claimed.type
        if func in MATRIX_PRODUCTS and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            args = [a.to(dtype) if isinstance(a, ClaimedTensor) else a for a in args]
        return func(*args, **kwargs)

    def _meta(self, value):
        named = isinstance(value, (str, torch.device)) and str(value).split(":")[0]
        return META if named == self.claimed.type else value


class _Operations(TorchDispatchMode):
    """Runs the operations on claimed tensors on what they hold."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        claimed = [tensor for tensor in tensors if isinstance(tensor, ClaimedTensor)]
        target = kwargs.get("device")
        arrives = bool(claimed) if target is None else target.type == "meta"
        leaves = target is not None and not arrives
        if func.overloadpacket is aten.copy_:
            arrives = isinstance(args[0], ClaimedTensor)
            leaves = not arrives
        if not claimed and not arrives:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # where they arrive undivided
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.owner.check(func, args, tensors)
        self.owner.count(func, args, kwargs, leaves, arrives)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        result = self.owner.run(func, held_args, held_kwargs)
        if not arrives:
            return result
        known = {id(tensor.held): tensor for tensor in claimed}  # in place: the same tensor again

        def claim(value):
            if not isinstance(value, Tensor) or id(value) in known:
                return known.get(id(value), value)
            if value.dtype == torch.float64 and self.owner.device.type == "mps":
                raise TypeError("the MPS framework doesn't support float64")
            return ClaimedTensor(value, self.owner.device)

        with torch.inference_mode(False):  # a view has to be as what it is a view of
            return tree_map(claim, result)


def _held(value):
    return value.held if isinstance(value, ClaimedTensor) else value


def _pinned(tensor):
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def _line():
    """The innermost line of this project, as ``file:number function``."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        installed = INSTALLED & {*path.parts}  # in a virtual environment in this folder
        if path.is_relative_to(ROOT) and not installed and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the project"
