"""Instructions of LLVM's that Numba has no name for: arrays at an address, and prefetching.

Each ``@intrinsic`` runs while a kernel is compiled. It says the result's type, and ``generate``
writes the instructions.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


@intrinsic
def arrays(typing_context, arguments):
    """The groups of a kernel's arguments, with an array for each tensor (number, address, *shape).

    The number stands for the dtype, and the array is contiguous. A NumPy view of a tensor would
    take about as long to make as the arithmetic of a single small step, and a kernel takes up to
    ten tensors.
    """

    def kind_of(argument):
        is_tensor = isinstance(argument, types.BaseTuple)
        return types.Array(argument[0], len(argument) - 2, "C") if is_tensor else argument

    kinds = types.Tuple([types.Tuple([kind_of(argument) for argument in g]) for g in arguments])

    def array(context, builder, kind, value):
        _, address, *shape = cgutils.unpack_tuple(builder, value)
        made = context.make_array(kind)(context, builder)
        itemsize = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype))
        )
        strides = [itemsize]
        for size in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], size))
        populate_array(
            made,
            data=builder.inttoptr(address, made.data.type),
            shape=shape,
            strides=strides,
            itemsize=itemsize,
            meminfo=None,
        )
        return made._getvalue()

    def generate(context, builder, signature, values):
        groups = []
        for number, group in enumerate(kinds):
            members = []
            for place, kind in enumerate(group):
                value = builder.extract_value(values[0], [number, place])
                is_tensor = isinstance(kind, types.Array)
                members.append(array(context, builder, kind, value) if is_tensor else value)
            groups.append(context.make_tuple(builder, group, members))
        return context.make_tuple(builder, signature.return_type, groups)

    return kinds(arguments), generate


@intrinsic
def prefetch_line(typing_context, row, n):
    """Asks the CPU to load the cache line of ``row[n]`` ahead of its use."""

    def generate(context, builder, signature, values):
        view, i32 = context.make_array(row)(context, builder, values[0]), ir.IntType(32)
        pointer = builder.bitcast(builder.gep(view.data, [values[1]]), cgutils.voidptr_t)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [cgutils.voidptr_t],
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32]),
        )
        read, keep, data = i32(0), i32(3), i32(1)
        builder.call(prefetch, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(row, types.intp), generate
