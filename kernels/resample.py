"""Reading a map at a grid position: the index arithmetic of torch.nn.functional.interpolate (align_corners=False).

csrc/common/resample.h is the same in C++. `axes` holds the map's sizes along (t, y, x), its strides, and the longest
area window along each; `grid` the grid's sizes. Positions come in an index type in which size · grid fits.
"""

import triton
import triton.language as tl

from .common import as_scalar, divide, rounded_product

ABSENT = tl.constexpr(0)
SAME = tl.constexpr(1)
AREA = tl.constexpr(2)
BILINEAR = tl.constexpr(3)
NEAREST = tl.constexpr(4)


# 1 / 255 in two parts, the first of so few bits that a byte times it is exact.
_LEVEL_HIGH = tl.constexpr(257 / 65536)
_LEVEL_LOW = tl.constexpr(1 / 255 - 257 / 65536)


@triton.jit
def map_value(ptr, offset, mask, ACC: tl.constexpr):
    """A map's element as a number: uint8 is a level of 0..255, bool is 0 or 1.

    level / 255 comes out correctly rounded, fused or not, in fp32 without a division, which takes ten times as long.
    """
    value = tl.load(ptr + offset, mask=mask, other=0).to(ACC)
    if ptr.dtype.element_ty == tl.uint8:
        if tl.float32 == ACC:
            value = value * _LEVEL_HIGH + value * _LEVEL_LOW
        else:
            value = value / (tl.zeros_like(value) + 255.0)
    return value


@triton.jit
def _nearest(position, size, out, shift):
    """ATen computes nearest indices in fp32 for every dtype."""
    scale = divide(as_scalar(size, tl.float32), as_scalar(out, tl.float32))
    index = tl.floor((position.to(tl.float32) + shift) * scale).to(position.dtype)
    return tl.minimum(index, size - 1)


@triton.jit
def _linear(position, size, out, ACC: tl.constexpr):
    """Two neighbours and the second one's share."""
    scale = divide(as_scalar(size, ACC), as_scalar(out, ACC))
    source = tl.maximum(rounded_product(position.to(ACC) + 0.5, scale) - 0.5, 0.0)
    first = tl.minimum(source.to(position.dtype), size - 1)
    share = tl.minimum(tl.maximum(source - first.to(ACC), 0.0), 1.0)
    return first, tl.minimum(first + 1, size - 1), share


@triton.jit
def _area(ptr, mask, t, y, x, axes, grid, ACC: tl.constexpr):
    """The window's sum, then its division by the extent along each axis."""
    t0, t1 = t * axes[0] // grid[0], ((t + 1) * axes[0] + grid[0] - 1) // grid[0]
    y0, y1 = y * axes[1] // grid[1], ((y + 1) * axes[1] + grid[1] - 1) // grid[1]
    x0, x1 = x * axes[2] // grid[2], ((x + 1) * axes[2] + grid[2] - 1) // grid[2]
    total = tl.zeros_like(x0 + y0 + t0).to(ACC)
    for i in range(axes[6]):
        for j in range(axes[7]):
            row = (t0 + i) * axes[3] + (y0 + j) * axes[4]
            inside = mask & (t0 + i < t1) & (y0 + j < y1)
            for k in range(axes[8]):
                total += map_value(ptr, row + (x0 + k) * axes[5], inside & (x0 + k < x1), ACC)
    return divide(divide(divide(total, (t1 - t0).to(ACC)), (y1 - y0).to(ACC)), (x1 - x0).to(ACC))


@triton.jit
def _bilinear_plane(ptr, plane, mask, y0, y1, x0, x1, share_y, share_x, axes, ACC: tl.constexpr):
    top, bottom = plane + y0 * axes[4], plane + y1 * axes[4]
    left, right = x0 * axes[5], x1 * axes[5]
    near = (1.0 - share_x) * map_value(ptr, top + left, mask, ACC) + share_x * map_value(ptr, top + right, mask, ACC)
    far = (1.0 - share_x) * map_value(ptr, bottom + left, mask, ACC) + share_x * map_value(
        ptr, bottom + right, mask, ACC)  # fmt: skip
    return (1.0 - share_y) * near + share_y * far


@triton.jit
def _bilinear(ptr, mask, t, y, x, axes, grid, ACC: tl.constexpr):
    t0, t1, share_t = _linear(t, axes[0], grid[0], ACC)
    y0, y1, share_y = _linear(y, axes[1], grid[1], ACC)
    x0, x1, share_x = _linear(x, axes[2], grid[2], ACC)
    value = _bilinear_plane(ptr, t0 * axes[3], mask, y0, y1, x0, x1, share_y, share_x, axes, ACC)
    if axes[0] != 1:
        between = share_t != 0
        far = _bilinear_plane(ptr, t1 * axes[3], mask & between, y0, y1, x0, x1, share_y, share_x, axes, ACC)
        value = tl.where(between, (1.0 - share_t) * value + share_t * far, value)
    return value


@triton.jit
def resampled(ptr, mask, t, y, x, axes, grid, mode, ACC: tl.constexpr):
    """The map at (t, y, x), three tensors of index type that broadcast to the tile; the mode is a uniform branch."""
    if mode == AREA:
        value = _area(ptr, mask, t, y, x, axes, grid, ACC)
    elif mode == BILINEAR:
        value = _bilinear(ptr, mask, t, y, x, axes, grid, ACC)
    else:
        shift = tl.where(mode == NEAREST, as_scalar(0.0, tl.float32), as_scalar(0.5, tl.float32))
        row = _nearest(t, axes[0], grid[0], shift) * axes[3] + _nearest(y, axes[1], grid[1], shift) * axes[4]
        value = map_value(ptr, row + _nearest(x, axes[2], grid[2], shift) * axes[5], mask, ACC)
    return value
