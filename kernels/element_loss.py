"""Element losses and their derivatives for the Triton kernels; csrc/common/losses.h is the same mathematics in C++.

Written with exp, sqrt and polynomials alone: the interpreter has no libdevice, and the GPU's fast log has an absolute
error that would cost log_cosh its digits near 0.
"""

import triton
import triton.language as tl

STRENGTHS = 8  # as many as weighted_loss_kernel has arguments for

_LN2 = tl.constexpr(0.693147180559945309417)


@triton.jit
def sign(d):
    """1, −1 or 0; NaN stays NaN."""
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))


@triton.jit
def huber(d, c):
    a = tl.abs(d)
    inner = a <= c
    return tl.where(inner, 0.5 * d * d, c * (a - 0.5 * c)), tl.where(inner, d, c * sign(d))


@triton.jit
def smooth_l1(d, c):
    a = tl.abs(d)
    inner = a < c
    safe = tl.where(inner, c, 1.0)
    return tl.where(inner, 0.5 * d * d / safe, a - 0.5 * c), tl.where(inner, d / safe, sign(d))


@triton.jit
def pseudo_huber(d, c):
    """√(d² + c²) − c without its cancellation; |d| at c = 0."""
    root = tl.sqrt(d * d + c * c)
    divisor = tl.where(root == 0, 1.0, root)
    straight = c == 0
    return tl.where(straight, tl.abs(d), d * d / (divisor + c)), tl.where(straight, sign(d), d / divisor)


@triton.jit
def log_cosh(d, ACC: tl.constexpr):
    """log(cosh(d)) = log1p(cosh(a) − 1) for a = |d| < 1, else a + log1p(e^(−2a)) − ln 2, and tanh(d)."""
    a = tl.abs(d)
    near = a < 1.0
    square = tl.where(near, d * d, 0.0)
    # Σ a^(2k) / (2k + 2)! and / (2k + 1)!: to 1e-9 and 1e-18 at a = 1.
    TERMS: tl.constexpr = 10 if tl.float64 == ACC else 6
    even = tl.zeros_like(square)
    odd = tl.zeros_like(square)
    for k in tl.static_range(TERMS):
        even = 1.0 + even * square * (1.0 / ((2 * (TERMS - k) + 1) * (2 * (TERMS - k) + 2)))
        odd = 1.0 + odd * square * (1.0 / (2 * (TERMS - k) * (2 * (TERMS - k) + 1)))
    excess = 0.5 * square * even
    decay = tl.exp(-2.0 * a)
    y = tl.where(near, excess, decay)
    # log1p(y) = 2 artanh(s), s = y / (2 + y) ≤ 0.214.
    s = y / (2.0 + y)
    SERIES: tl.constexpr = 13 if tl.float64 == ACC else 7
    artanh = tl.zeros_like(s)
    for k in tl.static_range(SERIES):
        artanh = artanh * (s * s) + 1.0 / (2 * (SERIES - 1 - k) + 1)
    loss = 2.0 * s * artanh + tl.where(near, 0.0, a - _LN2)
    slope = tl.where(near, d * odd / (1.0 + excess), sign(d) * (1.0 - decay) / (1.0 + decay))
    return loss, slope


@triton.jit
def element_loss(d, c, strength, ACC: tl.constexpr):
    """ℓ(d) and ℓ′(d) of the mixture. A kind whose strength is 0 is not evaluated.

    strength: of each kind in the order of diffdoctor/reference/losses.py, in ACC; the kernels have room for STRENGTHS.
    """
    loss = tl.zeros_like(d)
    slope = tl.zeros_like(d)
    if strength[0] != 0:
        loss = strength[0] * (d * d)
        slope = strength[0] * 2.0 * d
    if strength[1] != 0:
        loss += strength[1] * tl.abs(d)
        slope += strength[1] * sign(d)
    if strength[2] != 0:
        value, derivative = huber(d, c)
        loss += strength[2] * value
        slope += strength[2] * derivative
    if strength[3] != 0:
        value, derivative = smooth_l1(d, c)
        loss += strength[3] * value
        slope += strength[3] * derivative
    if strength[4] != 0:
        value, derivative = pseudo_huber(d, c)
        loss += strength[4] * value
        slope += strength[4] * derivative
    if strength[5] != 0:
        value, derivative = log_cosh(d, ACC)
        loss += strength[5] * value
        slope += strength[5] * derivative
    return loss, slope
