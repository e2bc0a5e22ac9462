"""A hypothesis strategy of weighted_loss cases, for every backend's search."""

import torch
from hypothesis import strategies as st

from diffdoctor import Packed
from diffdoctor.lowering.plan import LOSS_KINDS
from support.cases import SPATIAL_TARGETS, Case

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VIEWS = ("contiguous", "transposed", "sliced", "chunk", "channels_last", "batch_inner")


@st.composite
def map_specs(draw, batch: int, grid: tuple[int, ...], video: bool, flat: bool):
    """None, or (shape, dtype) of a map: the grid's size or any other."""
    if draw(st.booleans()):
        return None
    dtype = draw(st.sampled_from((*FLOATS, torch.uint8, torch.bool)))
    b = draw(st.sampled_from((1, batch)))
    if flat:
        return (b, *grid), dtype
    space = grid[-2:] if draw(st.booleans()) else (draw(st.integers(1, 23)), draw(st.integers(1, 23)))
    if video and draw(st.booleans()):
        return (b, 1, draw(st.integers(1, 5)), *space), dtype
    return draw(st.sampled_from(((b, *space), (b, 1, *space)))), dtype


@st.composite
def cases(draw, max_side: int = 13):
    """Any call: thresholds lie between the levels that maps take, so that no rounding decides a comparison."""
    kind = draw(st.sampled_from(("image", "image", "video", "packed", "tokens")))
    batch, channels = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    side = st.integers(1, max_side)
    options = {}
    if kind == "image":
        grid = (draw(side), draw(side))
        shape = full = (batch, channels, *grid)
    elif kind == "video":
        grid = (draw(st.integers(1, 4)), draw(side), draw(side))
        shape = full = (batch, channels, *grid)
    elif kind == "tokens":
        grid = (draw(st.integers(1, 40)),)
        shape = full = (batch, *grid, channels)
    else:
        p = draw(st.integers(1, 3))
        grid = (p * draw(st.integers(1, 4)), p * draw(st.integers(1, 4)))
        order = draw(st.sampled_from(("c ph pw", "ph pw c")))
        options["layout"] = Packed(*grid, p, order)
        shape = (batch, grid[0] * grid[1] // (p * p), channels * p * p)
        full = (batch, channels, *grid)
    dtype = draw(st.sampled_from(FLOATS))
    confidence = draw(map_specs(batch, grid, kind == "video", kind == "tokens"))
    mask = draw(map_specs(batch, grid, kind == "video", kind == "tokens"))
    weighting = None
    if draw(st.booleans()):
        dims = draw(st.lists(st.booleans(), min_size=len(full), max_size=len(full)))
        broadcast = tuple(n if keep else 1 for n, keep in zip(full, dims, strict=True))
        weighting = (draw(st.sampled_from(((batch,), (1,), broadcast))), draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()):
        options["loss_type"] = draw(
            st.one_of(
                st.sampled_from(LOSS_KINDS),
                st.dictionaries(st.sampled_from(LOSS_KINDS), st.sampled_from((0.25, 1.0, 2.0)), min_size=1, max_size=3),
            )
        )
    if draw(st.booleans()):
        options["artifact_grad"] = draw(st.sampled_from((0.0, 1.0, 2.5)))
        options["clean_grad"] = draw(st.sampled_from((0.0, 0.3, 1.0)))
    options["artifact_weight"] = draw(st.sampled_from((0.0, 1.0, 2.0, 4.0)))
    options["clean_weight"] = draw(st.sampled_from((0.0, 0.5, 1.0)))
    options["reduction"] = draw(st.sampled_from(("mean", "sample", "sum")))
    options["interpolation"] = draw(st.sampled_from(("area", "bilinear", "nearest", "nearest-exact")))
    resampled = confidence is not None and tuple(confidence[0][-2:]) != grid[-2:] and kind != "tokens"
    if options["interpolation"] in ("nearest", "nearest-exact") or not resampled:
        options["threshold"] = draw(st.sampled_from((0.0, 0.3001, 0.7003)))
    elif options["interpolation"] == "bilinear" and options["artifact_weight"] == 0.0:
        options["artifact_weight"] = 0.25  # a flat map of ones comes out as 1 or as 1 - 2^-53: selected or not
    options["gamma"] = draw(st.sampled_from((1.0, 1.0, 0.5, 2.0)))
    normalizer = None
    normalize = draw(st.sampled_from((None, None, "sample", "batch", "given")))
    if normalize == "given":
        normalizer = draw(st.sampled_from((2.5, "tensor")))
    elif normalize:
        options["normalize"] = normalize
    targets = ("tensor", "epsilon", "velocity", "flow", "flow_reversed", "preconditioned", "three_terms")
    if confidence is not None:
        targets += SPATIAL_TARGETS
    return Case(
        id="search",
        shape=shape,
        dtype=dtype,
        target=draw(st.sampled_from((*targets, "image") if kind == "packed" else targets)),
        target_dtype=draw(st.sampled_from(FLOATS)),
        pred_view=draw(st.sampled_from(VIEWS)),
        target_view=draw(st.sampled_from(VIEWS)),
        map_view=draw(st.sampled_from(("contiguous", "transposed", "sliced"))),
        confidence=confidence,
        mask=mask,
        weighting=weighting,
        huber_c=draw(st.sampled_from((0.3, "tensor"))),
        normalizer=normalizer,
        options=options,
        seed=draw(st.integers(0, 3)),
    )
