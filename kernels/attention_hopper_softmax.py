"""What a warpgroup of the Hopper kernel does with a tile of scores [M, N], between its two products (Gluon).

Scores lie as the tensor cores leave them: of eight columns, thread t of four holds 2t and 2t + 1. Whatever is cut,
joined and reordered here stays within a thread; `assert_trivial` makes that a compile-time check.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .attention_hopper_work import KEYS


@gluon.jit
def halve(x):
    """The left and the right half [M, N / 2] of x [M, N]."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@gluon.jit
def fold_max(x):
    """Maxima over the columns that are equal modulo 8, [M, 8]: as far as one thread sees them."""
    for _ in gl.static_range(4):
        left, right = halve(x)
        x = gl.maximum(left, right)
    return x


@gluon.jit
def fold_sum(x):
    """Sums over the columns that are equal modulo 8, [M, 8]."""
    for _ in gl.static_range(4):
        left, right = halve(x)
        x = left + right
    return x


@gluon.jit
def along(row, like):
    """A value a row, as a column beside `like` [M, N]."""
    return gl.convert_layout(row, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def to_operand(weights, layout: gl.constexpr):
    """Weights [M, N] as the first operand of the product with the values; nothing moves between threads.

    A 2-byte operand has the accumulator's order. For e4m3, of sixteen columns thread t of four holds 8j + 2t + b (j, b
    in 0, 1) and is to hold 4t + 2j + b: the keys were loaded in that order.
    """
    if weights.dtype == gl.float8e4nv:
        M: gl.constexpr = weights.shape[0]
        N: gl.constexpr = weights.shape[1]
        columns = gl.reshape(weights, (M, N // 16, 2, 4, 2))
        weights = gl.reshape(gl.permute(columns, (0, 1, 3, 2, 4)), (M, N))
    return gl.convert_layout(weights, layout, assert_trivial=True)


@gluon.jit
def mask_tile(scores, valid, count, FP8: gl.constexpr):
    """The first tile of a slot, of which only some keys are valid: -inf for the others."""
    c = gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
    if FP8:
        c = c // 16 * 16 + c % 8 // 2 * 4 + c % 16 // 8 * 2 + c % 2  # the key that each column holds
        seen = c < valid - (count - 1) * KEYS
    else:
        seen = c >= count * KEYS - valid
    return gl.where(seen[None, :], scores, float("-inf"))
