"""What the loops over sub-vectors share: a scaled sum and a product of sub-vectors, and exp without a branch.

Sub-vectors of d floats lie in flat arrays from `place` on; d is the length of the tuple `unit` and so known while
compiling. Indices are unsigned (np.uint64): signed ones would be compared with 0 each time, to count from the end.
"""

import numpy as np
from numba import njit

OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits of the mantissa
_LOWEST = np.float32(-87.0)  # exp(-87) is the smallest normal float32


@njit(**OPTIONS)
def add_scaled(unit, target, place, scale, source, start):
    """target[place : place + d] += scale · source[start : start + d], float32."""
    for j in range(np.uint64(len(unit))):
        target[place + j] += scale * source[start + j]


@njit(**{**OPTIONS, "fastmath": False})
def dot(unit, x, place, y, start):
    """Σ x[place : place + d] · y[start : start + d], float32; of four products first and third, then second and fourth."""
    if len(unit) == 4:  # known while compiling; in this order they are halves of a register
        one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
        even = x[place] * y[start] + x[place + two] * y[start + two]
        return even + (x[place + one] * y[start + one] + x[place + three] * y[start + three])
    total = x[place] * y[start]
    for j in range(np.uint64(1), np.uint64(len(unit))):
        total += x[place + j] * y[start + j]
    return total


@njit(**OPTIONS)
def _power_of_two(shifted):
    """2^i from the float32 number 1.5 · 2^23 + i, by moving i into the exponent bits."""
    return np.int32((np.float32(shifted).view(np.int32) << np.int32(23)) + np.int32(0x3F800000)).view(np.float32)


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
