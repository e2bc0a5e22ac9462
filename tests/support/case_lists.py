"""The cases for weighted_loss that every backend is run over (see cases.py)."""

import torch

from diffdoctor import Packed
from diffdoctor.reference.losses import ELEMENT_LOSSES
from support.cases import BF16, F16, F32, F64, OTHER_TARGETS, Case

CONF = ((2, 1, 5, 7), F32)
LARGE_MAP = ((2, 40, 56), torch.uint8)
LOSSES = tuple(loss for loss in ELEMENT_LOSSES if loss != "l2")  # l2 is the other cases' loss


def all_cases() -> list[Case]:
    """The matrix: each dtype, layout, map, target, loss and option at least once, and the combinations that bite."""
    return [*_sizes(), *_views(), *_resampled(), *_tokens(), *_targets(), *_losses(), *_weights(), *_reductions()]


def _sizes() -> list[Case]:
    cases = [Case(f"plain-{_name(d)}", dtype=d, target_dtype=d) for d in (F32, BF16, F16, F64)]
    return [
        *cases,
        Case("mixed-bf16-f32", dtype=BF16, target_dtype=F32),
        Case("mixed-f16-f64", dtype=F16, target_dtype=F64),
        Case("mixed-f32-bf16", target_dtype=BF16),
        Case("mixed-f64-f16", dtype=F64, target_dtype=F16),
        Case("one-element", shape=(1, 1, 1, 1), confidence=((1, 1, 1, 1), F32)),
        Case("prime", shape=(3, 1, 13, 17), confidence=((3, 13, 17), F32)),
        Case("power-plus-one", shape=(2, 1, 1, 4097)),
        Case("power-minus-one", shape=(1, 3, 1, 1023), confidence=((1, 1, 1023), BF16)),
        Case("large", shape=(2, 5, 65, 63), confidence=((2, 65, 63), F32), options={"threshold": 0.4}),
        Case("large-bf16", shape=(2, 5, 65, 64), dtype=BF16, target_dtype=BF16, confidence=((2, 65, 64), F32)),
    ]


def _views() -> list[Case]:
    cases = []
    for view in ("transposed", "sliced", "chunk", "channels_last", "batch_inner", "expanded"):
        cases.append(Case(f"pred-{view}", pred_view=view, confidence=CONF))
        cases.append(
            Case(
                f"all-{view}-bf16",
                dtype=BF16,
                pred_view=view,
                target_view=view,
                map_view=view if view != "channels_last" else "contiguous",
                confidence=((2, 1, 5, 7), F16),
                options={"reduction": "sample"},
            )
        )
    return cases


def _resampled() -> list[Case]:
    cases = [
        Case("video", shape=(2, 3, 4, 5, 7), confidence=((2, 1, 5, 7), F32)),
        Case("video-resample", shape=(2, 3, 4, 5, 7), confidence=((2, 10, 14), F32)),
    ]
    for mode in ("area", "bilinear", "nearest", "nearest-exact"):
        opts = {"interpolation": mode}
        cases += [
            Case(f"{mode}-down", confidence=LARGE_MAP, options=opts),
            Case(f"{mode}-up", confidence=((2, 1, 3, 4), F32), mask=((1, 1, 2, 3), F64), options=opts),
            Case(f"{mode}-odd", confidence=((1, 11, 16), BF16), mask=((2, 13, 19), torch.bool), options=opts),
            Case(f"{mode}-video", shape=(2, 2, 3, 4, 5), confidence=((2, 1, 5, 9, 11), F32), options=opts),
            Case(f"{mode}-channels-last", pred_view="channels_last", target_view="channels_last", confidence=LARGE_MAP,
                 options=opts),
            Case(f"{mode}-f64", dtype=F64, confidence=((2, 9, 13), F32), options=opts),
        ]  # fmt: skip
    return cases


def _tokens() -> list[Case]:
    cases = []
    for order in ("c ph pw", "ph pw c"):
        layout = Packed(6, 8, 2, order)
        tag = order.replace(" ", "")
        cases += [
            Case(f"packed-{tag}", shape=(2, 12, 12), confidence=((2, 6, 8), F32), options={"layout": layout}),
            Case(f"packed-{tag}-resampled", shape=(2, 12, 12), dtype=BF16, confidence=((2, 48, 64), torch.uint8),
                 weighting=((2, 1, 6, 8), F32), options={"layout": layout}),
            Case(f"packed-{tag}-image-target", shape=(2, 12, 12), target="image", mask=((1, 3, 4), F32),
                 options={"layout": layout}),
        ]  # fmt: skip
    return [
        *cases,
        Case("packed-patch1", shape=(2, 48, 3), confidence=((2, 6, 8), F32), options={"layout": Packed(6, 8, 1)}),
        Case("tokens", shape=(2, 10, 6), confidence=((2, 10), F32), weighting=((2, 10, 1), F32)),
        Case("tokens-bf16", shape=(3, 33, 16), dtype=BF16, confidence=((3, 33), torch.bool), mask=((1, 33), F32)),
    ]


def _targets() -> list[Case]:
    cases = []
    for target in ("epsilon", "sample", "velocity", "flow", "flow_reversed", "preconditioned"):
        cases.append(Case(f"target-{target}", target=target, confidence=CONF))
        cases.append(Case(f"target-{target}-bf16", target=target, dtype=BF16, pred_view="chunk"))
    for target in OTHER_TARGETS:
        cases.append(Case(f"target-{target}", target=target, confidence=CONF))
    spatial, three = "contrastive", "contrastive_flow"
    cases += [
        Case(f"target-{spatial}-bf16", target=spatial, dtype=BF16, target_dtype=BF16, confidence=LARGE_MAP,
             options={"clean_weight": 0.0}),
        Case(f"target-{three}-bf16", target=three, dtype=BF16, target_dtype=BF16, confidence=CONF),
        Case(f"target-{three}-f16", target=three, dtype=F16, target_view="channels_last", confidence=CONF),
        Case(f"target-{spatial}-f64", target=spatial, dtype=F64, target_dtype=F64, confidence=CONF,
             weighting=((2, 1, 5, 7), F32), options={"artifact_grad": 2.0, "threshold": 0.25}),
        Case(f"target-{three}-huber", target=three, pred_view="sliced", confidence=CONF, mask=CONF,
             options={"loss_type": {"huber": 1.0, "l1": 0.5}, "gamma": 2.0}),
        Case(f"target-{spatial}-large", target=spatial, shape=(1, 2, 24, 30), dtype=BF16,
             confidence=((1, 24, 30), F32)),
        Case(f"target-{three}-large", target=three, shape=(1, 2, 24, 30), target_dtype=BF16,
             confidence=((1, 24, 30), F32)),
    ]  # fmt: skip
    return cases


def _losses() -> list[Case]:
    cases = []
    for loss in LOSSES:
        cases.append(Case(f"loss-{loss}", options={"loss_type": loss}, confidence=CONF))
        cases.append(Case(f"loss-{loss}-f64", dtype=F64, options={"loss_type": loss}))
    mixture = dict(zip(ELEMENT_LOSSES, (1.0, 0.5, 0.25, 2.0, 1.5, 0.75, 1.25, 0.6), strict=False))
    return [
        *cases,
        Case("loss-mixture", options={"loss_type": mixture}, huber_c="tensor", confidence=CONF),
        Case("loss-mixture-f16", dtype=F16, target_dtype=F16, options={"loss_type": mixture}, huber_c="tensor"),
        Case("huber-per-sample", options={"loss_type": "huber"}, huber_c="tensor"),
        Case("huber-zero", options={"loss_type": {"pseudo_huber": 1.0, "smooth_l1": 1.0, "huber": 1.0}}, huber_c=0.0),
    ]


def _weights() -> list[Case]:
    return [
        Case("weighting-1d", weighting=((2,), F32)),
        Case("weighting-1d-one", weighting=((1,), F64)),
        Case("weighting-keepdim", weighting=((2, 1, 1, 1), BF16), confidence=CONF),
        Case("weighting-full", weighting=((2, 3, 5, 7), F16)),
        Case("weighting-channel", weighting=((3, 1, 1), F32), options={"reduction": "sample"}),
        Case("weighting-spatial-f16", dtype=F16, target_dtype=F16, weighting=((2, 1, 5, 7), F32)),
        Case("weighting-video", shape=(2, 3, 4, 5, 7), weighting=((2, 1, 4, 1, 1), F32)),
        Case("mask-only", mask=((2, 5, 7), torch.bool)),
        Case("grad-modulated", confidence=CONF, options={"artifact_grad": 1.0, "clean_grad": 0.0, "threshold": 0.5}),
        Case("grad-amplified", confidence=CONF, options={"artifact_grad": 3.0, "clean_grad": 0.2, "gamma": 2.5}),
        Case("weights", confidence=CONF, options={"artifact_weight": 0.0, "clean_weight": 1.5, "threshold": 0.25}),
        Case("normalizer", confidence=CONF, normalizer="tensor"),
        Case("normalizer-number", confidence=CONF, normalizer=12.5, options={"reduction": "sum"}),
    ]


def _reductions() -> list[Case]:
    cases = []
    for reduction in ("mean", "sample", "sum"):
        opts = {"reduction": reduction}
        cases += [
            Case(f"reduce-{reduction}", confidence=CONF, weighting=((2,), F32), options=opts),
            Case(f"reduce-{reduction}-f16", dtype=F16, target_dtype=F16, confidence=CONF, weighting=((2,), F32),
                 options=opts),
            Case(f"normalize-sample-{reduction}", confidence=CONF, mask=((1, 20, 28), F32),
                 options={**opts, "normalize": "sample"}),
            Case(f"normalize-batch-{reduction}", dtype=BF16, confidence=LARGE_MAP, weighting=((2,), F32),
                 options={**opts, "normalize": "batch"}),
        ]  # fmt: skip
    cases.append(Case("normalize-no-map", options={"normalize": "sample", "clean_weight": 0.5}))
    return cases


def tiled_cases() -> list[Case]:
    """Sizes at which a sample is cut into several tiles, in every way that tiles are cut."""
    return [
        Case("runs", shape=(2, 16, 32, 64), confidence=((2, 32, 64), F32)),
        Case("runs-bf16-resampled", shape=(1, 7, 48, 64), dtype=BF16, confidence=((1, 72, 96), torch.uint8)),
        Case("runs-odd-f16", shape=(2, 3, 41, 67), dtype=F16, target_dtype=F16, mask=((2, 41, 67), BF16)),
        Case("runs-strided", shape=(2, 3, 40, 64), pred_view="sliced", confidence=((1, 40, 64), torch.bool)),
        Case("uniform-f64", shape=(3, 1, 150, 120), dtype=F64, target="velocity"),
        Case("uniform-two-terms", shape=(2, 4, 64, 96), dtype=BF16, target="flow", target_dtype=BF16),
        Case("outers-channels-last", shape=(2, 24, 40, 40), dtype=BF16, pred_view="channels_last",
             target_view="channels_last", target_dtype=BF16, confidence=((2, 80, 80), F32)),
        Case("outers-packed", shape=(2, 384, 64), dtype=BF16, confidence=((2, 32, 48), F32),
             options={"layout": Packed(32, 48, 2)}),
        Case("outers-packed-f64", shape=(1, 384, 48), dtype=F64, mask=((1, 1, 64, 96), F32),
             options={"layout": Packed(32, 48, 2, "ph pw c"), "interpolation": "bilinear"}),
        Case("outers-tokens", shape=(2, 300, 40), confidence=((2, 300), F32), weighting=((2, 300, 1), F32)),
        Case("too-many-channels", shape=(1, 3, 17000), confidence=((1, 3), F32)),
        Case("full-weighting", shape=(2, 8, 32, 40), dtype=BF16, weighting=((2, 8, 32, 40), BF16)),
        Case("frames", shape=(2, 6, 5, 24, 20), confidence=((2, 1, 7, 24, 20), F32), weighting=((2, 1, 5, 1, 1), F32),
             options={"normalize": "sample"}),
        Case("many-samples", shape=(300, 1, 5, 4), confidence=((300, 5, 4), F32), options={"normalize": "batch"}),
    ]  # fmt: skip


def fast_cases() -> list[Case]:
    """Calls that csrc/cuda/l2.cu serves: every dtype, number of terms and kind of map, at sizes with tiles of several
    columns and rows, the last of them not full."""
    run, maps = (2, 5, 24, 37 * 8), ((2, 24, 37 * 8), F32)
    u8, b16 = ((1, 24, 37 * 8), torch.uint8), ((2, 24, 37 * 8), BF16)
    weights = {"weighting": ((2, 1, 24, 37 * 8), F32)}
    return [
        Case("fast-f32", shape=run),
        Case("fast-bf16-two", shape=run, dtype=BF16, target_dtype=BF16, target="velocity", weighting=((2,), F32)),
        Case("fast-f16-three", shape=run, dtype=F16, target_dtype=F16, target="three_terms"),
        Case("fast-bf16-f32-tiny", shape=(3, 1, 2, 8), dtype=BF16, normalizer="tensor"),
        Case("fast-sample-left-out", shape=(3, 2, 24, 64), weighting=((3,), F32), options={"reduction": "sample"}),
        Case("fast-map-f32", shape=run, confidence=maps, options={"clean_weight": 0.0, "threshold": 0.3}),
        Case("fast-map-bf16", shape=run, dtype=BF16, target_dtype=BF16, confidence=u8, pred_view="chunk"),
        Case("fast-map-f16", shape=run, dtype=F16, target_dtype=F16, confidence=u8, mask=b16, **weights),
        Case("fast-map-bf16-f32-bool", shape=run, dtype=BF16, mask=((2, 24, 37 * 8), torch.bool), **weights,
             options={"reduction": "sum"}),
        Case("fast-map-f16-f32-modulated", shape=run, dtype=F16, confidence=((2, 24, 37 * 8), F16),
             options={"artifact_weight": 0.5, "artifact_grad": 1.5, "clean_grad": 0.0}),
        Case("fast-map-bf16-two", shape=(2, 3, 7, 16, 40), dtype=BF16, target_dtype=BF16, target="preconditioned",
             confidence=((2, 1, 1, 16, 40), F32), options={"normalize": "sample"}),
        Case("fast-map-f32-three", shape=run, target="three_terms", mask=maps),
        *(Case(f"fast-{name}-{_name(dtype)}-{_name(other)}", shape=run, dtype=dtype, target_dtype=other, target=name,
               confidence=maps, mask=b16 if dtype == F16 else None)
          for name, dtype, other in (("contrastive", F32, F32), ("contrastive_flow", BF16, BF16),
                                     ("contrastive_flow", F16, F16), ("contrastive", BF16, BF16))),
    ]  # fmt: skip


def odd_cases() -> list[Case]:
    """Calls that csrc/cuda/l2_odd.cu serves, and without maps l2.cu: runs of 4 and of 1 to 7 elements more than whole
    vectors, samples that start in the middle of one, a single row and a single column."""
    b16, f16 = {"dtype": BF16, "target_dtype": BF16}, {"dtype": F16, "target_dtype": F16}
    small, odd, b16_map = (2, 9, 19, 23), (2, 3, 83, 125), ((2, 19, 23), BF16)
    return [
        Case("odd-bf16-166", shape=(1, 3, 166, 166), **b16, confidence=((1, 166, 166), F32)),
        Case("odd-f32-83", shape=odd, confidence=((2, 83, 125), torch.uint8), mask=((1, 83, 125), BF16)),
        Case("odd-f16-row", shape=(3, 3, 1, 521), **f16, confidence=((3, 1, 521), F16),
             weighting=((3, 1, 1, 521), F32)),
        Case("odd-bf16-f32-column", shape=(2, 5, 777, 1), dtype=BF16, mask=((2, 777, 1), torch.bool),
             options={"reduction": "sum"}),
        Case("odd-bf16-one-channel", shape=(3, 1, 7, 9), **b16, confidence=((3, 7, 9), F32),
             options={"clean_weight": 0.0}),
        Case("odd-f16-f32-modulated", shape=(2, 40, 17, 17), dtype=F16, confidence=((2, 17, 17), F32),
             options={"artifact_grad": 1.5, "clean_grad": 0.0}),
        Case("odd-bf16-frames", shape=(2, 3, 5, 11, 27), **b16, target="flow", confidence=((2, 1, 1, 11, 27), F32),
             options={"normalize": "sample"}),
        Case("odd-f32-three", shape=small, target="three_terms", mask=b16_map, normalizer="tensor"),
        Case("odd-sample-left-out", shape=(3, 2, 19, 23), confidence=((3, 19, 23), F32), weighting=((3,), F32),
             options={"reduction": "sample"}),
        Case("odd-contrastive-f32", shape=small, target="contrastive", confidence=b16_map),
        Case("odd-contrastive-bf16", shape=odd, **b16, target="contrastive_flow", confidence=((2, 83, 125), F32),
             mask=((2, 83, 125), torch.uint8)),
        Case("odd-contrastive-f16", shape=small, **f16, target="contrastive", confidence=b16_map),
        Case("odd-f32-no-map", shape=(3, 1, 7, 9)),
        Case("odd-bf16-no-map", shape=(3, 3, 41, 67), **b16, target="velocity", weighting=((3,), F32)),
        Case("odd-f16-f32-no-map", shape=(2, 3, 1, 2731), dtype=F16),
    ]  # fmt: skip


def token_cases() -> list[Case]:
    """Calls that csrc/cuda/tokens.cu serves: every dtype, number of terms and kind of map, at 222 tokens, of which the
    last block of 64 is not full, and at 5, 8 and 16 channels."""
    layout, shape, image = {"layout": Packed(12, 74)}, (2, 222, 20), "image"
    same, b16 = ((2, 12, 74), F32), {"dtype": BF16, "target_dtype": BF16}
    return [
        Case("tokens-f32", shape=shape, target=image, options=layout, normalizer="tensor"),
        Case("tokens-bf16-map", shape=(2, 222, 64), target=image, **b16, confidence=same, options=layout),
        Case("tokens-f16-area", shape=shape, dtype=F16, target_dtype=F16, target=image,
             confidence=((2, 96, 592), torch.uint8), mask=((1, 12, 74), torch.bool), options=layout),
        Case("tokens-bf16-f32-bilinear", shape=shape, dtype=BF16, target=image, mask=((2, 6, 37), F32),
             weighting=((2, 1, 12, 74), F32), options={**layout, "interpolation": "bilinear", "reduction": "sum"}),
        Case("tokens-f16-f32-chunk", shape=(2, 222, 32), dtype=F16, target="velocity", target_dtype=F16,
             confidence=same, options={**layout, "artifact_grad": 0.0, "gamma": 2.0, "threshold": 0.3}),
        Case("tokens-contrastive", shape=shape, **b16, target="image_contrastive", confidence=same,
             options={**layout, "normalize": "sample"}),
        Case("tokens-sample-left-out", shape=(3, 222, 20), target="image_contrastive", confidence=((3, 12, 74), BF16),
             weighting=((3,), F32), options={**layout, "reduction": "sample"}),
    ]  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return {F32: "f32", BF16: "bf16", F16: "f16", F64: "f64"}[dtype]
