"""What the Triton kernels share: rounding stores, pinned scalars, the last-program reduction."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def as_scalar(value, dtype: tl.constexpr):
    """A run-time scalar in `dtype`: the interpreter hands over Python floats, which would compute in fp64."""
    return tl.full([], value, dtype)


@triton.jit
def divide(a, b):
    """a / b rounded as IEEE asks; Triton's own fp32 division may be 2 ulp off, enough to move an index or miss a 1."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is added to it: a plain product may be fused with the addition.

    With bilinear resampling a fused one misses positions that are whole numbers, and a neighbour that weighs nothing
    gets a weight.
    """
    return tl.fma(a, tl.zeros_like(a) + b, tl.zeros_like(a))


@triton.jit
def to_storage(x, dtype: tl.constexpr, ROUND_BF16: tl.constexpr):
    """x in a tensor's dtype, rounded to nearest even; the interpreter's own bf16 conversion truncates."""
    if ROUND_BF16 and dtype == tl.bfloat16:
        single = x.to(tl.float32)
        bits = single.to(tl.uint32, bitcast=True)
        upper = tl.where(single == single, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return upper.to(tl.uint16).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def arrives_last(counter_ptr, expected):
    """True in the last of `expected` programs to get here, which then sees what the others stored before.

    The barrier puts every thread's stores before the one that arrives; the counter is left at zero for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def column_sum(partial_ptr, count, stride, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `count` partial results `stride` apart, always in the same order."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offs.to(tl.int64) * stride, mask=offs < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


def interprets(kernel):
    """Whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET=1 when its file was imported)."""
    return isinstance(kernel, InterpretedFunction)
