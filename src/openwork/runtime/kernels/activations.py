"""What may follow a sum inside a kernel: clamp (ReLU, ReLU6), SiLU, GELU, sigmoid, in the code of the kernel itself.

All are straight lines of vector instructions, without branches, tables or calls. Everything rests on exp of a number
that is not positive: the number is n ln 2 + r with a whole n and |r| <= ln 2 / 2, exp(r) is a polynomial, and 2^n is
multiplied last and in two halves, so that results below the smallest normal number are right as well. The polynomials
are minimax fits (Lawson's iteration) of relative error below 5e-9; roundings make the rest of the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from openwork.runtime.kernels.emit import Emitter

Act = Literal["none", "clamp", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish", "tanh"]
ACTS: tuple[Act, ...] = get_args(Act)

_EXP = (0.499999934, 0.166665201, 0.0416683942, 0.00836878044, 0.0013814467)
"""(exp(r) - 1 - r) / r^2."""
_TANH = (-0.333332819, 0.133314422, -0.053739715, 0.0206390869, -0.0057049866)
"""(tanh(x) / x - 1) / x^2 as a polynomial in x^2, for |x| < 0.625."""
_PHI = (
    (0.398942202, 0.0346923918, 0.00472590886, 0.000176938847, 6.36484674e-06, 2.18186873e-08),
    (1.0, 0.253626496, 0.0291191842, 0.0019305594, 7.60226103e-05, 1.17126547e-06),
)
"""(Phi(x) - 1/2) / x = p(x^2) / q(x^2) for |x| < 4 sqrt(2); Phi is the normal distribution, beyond it 0 or 1 to 8e-9."""
_BEYOND = 5.65685425
_LOWEST = -176.1
"""Here n is -254, whose halves 2^-127 come out as zero, and r is negative: the least exponent that exp takes."""


@dataclass(frozen=True)
class _Power:
    """exp of something, still in parts: part * first * second."""

    part: Any
    first: Any
    second: Any


def apply(e: Emitter, act: Act, value: Any, limits: Any) -> Any:
    """Return act(value) for a float32 vector; `limits` is the address of the two bounds of `clamp`.

    Within 4 units in the last place of the exact result for every float32 number, also where the result is far out in a
    tail or below the smallest normal number; of gelu and gelu_tanh the share that x is multiplied by is within 2.5e-7, so
    that their tails have no relative accuracy, as in torch. Infinities give what they give in torch: minus infinity is NaN
    in silu, gelu, gelu_tanh and hardswish (infinity times zero). A NaN stays a NaN.

    Raises:
        KeyError: if there is no such activation.
    """
    if act == "none":
        return value
    if act == "clamp":
        return _clamp(e, value, limits)
    return {
        "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "sigmoid": _sigmoid, "hardswish": _hardswish, "tanh": _tanh,
    }[act](e, value)  # fmt: skip


def keeps_zero(act: Act) -> bool:
    """Return whether act(0) is 0 whatever the bounds."""
    return act not in ("clamp", "sigmoid")


def _clamp(e: Emitter, value: Any, limits: Any) -> Any:
    bounds = []
    for k in range(2):
        bound = e.load(e.item(limits, e.int(k), e.f32), e.f32)
        bound.set_metadata("invariant.load", e.module.add_metadata([]))  # no store changes it: out of the loop with it
        bounds.append(e.splat(bound, value.type.count))
    low, high = bounds
    value = e.b.select(e.b.fcmp_ordered("<", high, value), high, value)  # one instruction, and a NaN is not greater
    return e.b.select(e.b.fcmp_ordered(">", low, value), low, value)


def _silu(e: Emitter, x: Any) -> Any:
    """Return x / (1 + exp(-x)), and where x is negative x exp(x) / (1 + exp(x))."""
    b, one = e.b, _constant(e, x, 1.0)
    power = _exp(e, b.fneg(_absolute(e, x)))
    share = b.fdiv(one, b.fadd(one, _whole(e, power)))
    below = b.fmul(b.fmul(b.fmul(b.fmul(x, power.part), power.first), share), power.second)
    return b.select(_negative(e, x), below, b.fmul(x, share))


def _gelu_tanh(e: Emitter, x: Any) -> Any:
    """Return x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is the same."""
    b, one = e.b, _constant(e, x, 1.0)
    small = _smaller(e, _absolute(e, x), _constant(e, x, 20.0))
    square = b.fmul(small, small)
    size = b.fmul(small, e.fma(square, _constant(e, x, 0.07135481627159628), _constant(e, x, 1.5957691216057308)))
    power = _whole(e, _exp(e, b.fneg(size)))
    return b.fmul(x, b.fdiv(b.select(_negative(e, x), power, one), b.fadd(one, power)))


def _sigmoid(e: Emitter, x: Any) -> Any:
    b, one = e.b, _constant(e, x, 1.0)
    power = _whole(e, _exp(e, b.fneg(_absolute(e, x))))
    return b.fdiv(b.select(_negative(e, x), power, one), b.fadd(one, power))


def _gelu(e: Emitter, x: Any) -> Any:
    """Return x Phi(x)."""
    b, zero, one = e.b, _constant(e, x, 0.0), _constant(e, x, 1.0)
    high, low = _constant(e, x, _BEYOND), _constant(e, x, -_BEYOND)
    above, below = b.fcmp_ordered(">", x, high), b.fcmp_ordered("<", x, low)
    near = b.select(below, low, b.select(above, high, x))
    square = b.fmul(near, near)
    ratio = b.fdiv(_polynomial(e, square, _PHI[0]), _polynomial(e, square, _PHI[1]))
    share = e.fma(near, ratio, _constant(e, x, 0.5))
    share = b.select(b.fcmp_ordered(">", zero, share), zero, share)
    return b.fmul(x, b.select(below, zero, b.select(above, one, share)))


def _tanh(e: Emitter, x: Any) -> Any:
    b, one, size = e.b, _constant(e, x, 1.0), _absolute(e, x)
    power = _whole(e, _exp(e, b.fmul(_constant(e, x, -2.0), size)))
    far = b.fdiv(b.fsub(one, power), b.fadd(one, power))
    far = b.select(_negative(e, x), b.fneg(far), far)
    square = b.fmul(x, x)
    near = e.fma(b.fmul(square, _polynomial(e, square, _TANH)), x, x)
    return b.select(b.fcmp_ordered("<", size, _constant(e, x, 0.625)), near, far)


def _hardswish(e: Emitter, x: Any) -> Any:
    zero, six = _constant(e, x, 0.0), _constant(e, x, 6.0)
    share = _smaller(e, e.b.fadd(x, _constant(e, x, 3.0)), six)
    share = e.b.select(e.b.fcmp_ordered(">", zero, share), zero, share)
    return e.b.fmul(x, e.b.fmul(share, _constant(e, x, 1 / 6)))


def _exp(e: Emitter, a: Any) -> _Power:
    """Return exp(a) in parts, for a <= 0.

    The whole number nearest to a / ln 2 is read from the low bits of a sum with 1.5 * 2^23; a NaN makes nonsense of the
    powers of two and stays in `part`.
    """
    b = e.b
    kind = e.vector(e.i32, a.type.count)

    def whole(number: int) -> Any:
        return e.ir.Constant(kind, [e.ir.Constant(e.i32, number)] * kind.count)

    def power(number: Any) -> Any:
        return b.bitcast(b.shl(b.add(number, whole(127)), whole(23)), a.type)

    lowest, shift = _constant(e, a, _LOWEST), _constant(e, a, 12582912.0)
    a = b.select(b.fcmp_ordered(">", lowest, a), lowest, a)
    shifted = e.fma(a, _constant(e, a, 1.4426950408889634), shift)
    n = b.sub(b.bitcast(shifted, kind), whole(0x4B400000))
    count = b.fsub(shifted, shift)
    r = e.fma(count, _constant(e, a, -0.693359375), a)  # exact: the constant has 10 bits
    r = e.fma(count, _constant(e, a, 2.12194440e-4), r)
    part = b.fadd(e.fma(b.fmul(r, r), _polynomial(e, r, _EXP), r), _constant(e, a, 1.0))
    half = b.ashr(n, whole(1))
    return _Power(part, power(half), power(b.sub(n, half)))


def _whole(e: Emitter, power: _Power) -> Any:
    return e.b.fmul(e.b.fmul(power.part, power.first), power.second)


def _polynomial(e: Emitter, x: Any, coefficients: Sequence[float]) -> Any:
    """Return the sum of coefficients[k] x^k by Horner's rule."""
    value = _constant(e, x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = e.fma(value, x, _constant(e, x, coefficient))
    return value


def _constant(e: Emitter, like: Any, value: float) -> Any:
    return e.constant(value, like.type.count)


def _absolute(e: Emitter, x: Any) -> Any:
    return e.call(f"llvm.fabs.v{x.type.count}f32", x.type, [x])


def _negative(e: Emitter, x: Any) -> Any:
    return e.b.fcmp_ordered("<", x, _constant(e, x, 0.0))


def _smaller(e: Emitter, value: Any, bound: Any) -> Any:
    """Return the smaller one; a NaN stays."""
    return e.b.select(e.b.fcmp_ordered("<", bound, value), bound, value)
