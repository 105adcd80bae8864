"""What numba does not do by itself: a whole sub-vector in one vector register, and exp in every lane of one.

Sub-vectors of d floats lie in flat arrays from `place` on; d is the length of the tuple `unit` and so known while
compiling. Written as loops they would be taken one float at a time, because the compiler cannot know that the arrays do
not overlap. Indices are unsigned (np.uint64): signed ones would be compared with 0 each time, to count from the end.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}

_FLOAT, _WORD = ir.FloatType(), ir.IntType(32)
_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_LOWEST = np.float32(-87.0)  # exp(-87) is the smallest normal float32


def _pointer(context, builder, array_type, array, place, d):
    """Address of array[place : place + d] as a vector of d floats."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), ir.VectorType(_FLOAT, d).as_pointer())


@intrinsic
def add_scaled(typingctx, unit, target, place, scale, source, start):
    """target[place : place + d] += scale · source[start : start + d], float32."""

    def codegen(context, builder, signature, args):
        d, vector = len(unit), ir.VectorType(_FLOAT, len(unit))
        into = _pointer(context, builder, target, args[1], args[2], d)
        added = builder.load(_pointer(context, builder, source, args[4], args[5], d), align=4)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[3], ir.Constant(_WORD, 0))
        lanes = ir.Constant(ir.VectorType(_WORD, d), [0] * d)
        product = builder.fmul(builder.shuffle_vector(first, first, lanes), added, flags=("contract",))
        builder.store(builder.fadd(builder.load(into, align=4), product, flags=("contract",)), into, align=4)
        return context.get_dummy_value()

    return types.void(unit, target, types.uint64, types.float32, source, types.uint64), codegen


@intrinsic
def dot(typingctx, unit, x, place, y, start):
    """Σ x[place : place + d] · y[start : start + d], float32, added up in whatever order is fastest."""

    def codegen(context, builder, signature, args):
        d, vector = len(unit), ir.VectorType(_FLOAT, len(unit))
        left = builder.load(_pointer(context, builder, x, args[1], args[2], d), align=4)
        right = builder.load(_pointer(context, builder, y, args[3], args[4], d), align=4)
        name, kind = f"llvm.vector.reduce.fadd.v{d}f32", ir.FunctionType(_FLOAT, [_FLOAT, vector])
        total = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(total, [ir.Constant(_FLOAT, -0.0), builder.fmul(left, right)], fastmath=("reassoc",))

    return types.float32(unit, x, types.uint64, y, types.uint64), codegen


@intrinsic
def _power_of_two(typingctx, shifted):
    """2^i from the float32 number 1.5 · 2^23 + i, by moving i into the exponent bits."""
    if shifted != types.float32:
        return None

    def codegen(context, builder, signature, args):
        exponent = builder.shl(builder.bitcast(args[0], _WORD), ir.Constant(_WORD, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(_WORD, 0x3F800000)), _FLOAT)

    return types.float32(types.float32), codegen


@njit(**OPTIONS)
def exp(x):
    """exp(x) for float32 x <= 0 within 2 ulp, and 0 below -87: range reduction and a polynomial, without a branch."""
    bounded = _LOWEST if x < _LOWEST else x
    shifted = bounded * _LOG2E + _ROUND
    whole = shifted - _ROUND
    rest = bounded - whole * _LN2_HIGH - whole * _LN2_LOW
    value = np.float32(1.9875691500e-4)  # minimax polynomial of exp on ±½ log 2
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1.0)
    return np.float32(0.0) if x < _LOWEST else value * _power_of_two(shifted)
