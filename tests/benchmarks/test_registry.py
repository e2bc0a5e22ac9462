"""The benchmarks' cases: honest inputs, and the bytes that they move."""

import dataclasses
import math

import pytest
import torch

from benchmarks.ops import (
    correctness,
    formulas,
    inputs,
    registry,
)
from support.benchmarks import EVERY, tiny

CPU = torch.device("cpu")


def test_names_are_unique_on_each_device():
    for device in ("cpu", "cuda"):
        keys = [case.key for case in registry.cases(device)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("key", EVERY)
def test_every_case_passes_its_gate_on_the_reference(key):
    case = registry.shrunken(EVERY[key])
    tensors = case.inputs(case, CPU)
    backend = "reference"

    def fused(**given):
        return case.fused(given, backend)

    want = correctness.expected(case, tensors)
    assert correctness.check(case, correctness.run(case, tensors, fused), want, ours=True)["reason"] is None
    assert correctness.check(case, correctness.run(case, tensors, case.formula), want, ours=False)["reason"] is None


def test_inputs_are_the_same_every_time():
    case = tiny("kohya/bf16")
    first, second = case.inputs(case, CPU), case.inputs(case, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_pixel_of_a_detectors_map_is_near_the_threshold(monkeypatch):
    monkeypatch.setattr(inputs, "NEAR", 2e-3)  # many would be
    case = dataclasses.replace(EVERY["detector-demo/fp32"], shape=(1, 1, 8, 8))
    tensors = case.inputs(case, torch.device("cpu"))
    enlarged = torch.nn.functional.interpolate(tensors["logits"], size=(64, 64), mode="bilinear")
    assert (enlarged.sigmoid() - 0.1).abs().min() > 1.9e-3


def test_least_bytes_of_the_bar_are_prediction_target_gradient_and_map():
    case = EVERY["latents/bf16"]
    tensors = case.inputs(case, CPU)
    elements = math.prod(case.shape)
    assert registry.least_bytes(case, tensors) == 3 * 2 * elements + 4 * elements // case.shape[1]


def test_fp16_moves_five_passes_for_three():
    case = dataclasses.replace(EVERY["pixel-2048/fp16"], shape=(1, 3, 64, 64))
    tensors = case.inputs(case, CPU)
    assert registry.passes_bytes(case, tensors) * 3 == registry.least_bytes(case, tensors) * 5


def test_large_cases_are_large():
    large = [case for case in registry.cases("cuda") if "large" in case.tags]
    assert large
    assert all(math.prod(case.shape) >= 64e6 for case in large)


def test_tokens_unpack_as_the_layout_says():
    import diffdoctor

    tokens = torch.arange(2 * 12 * 8, dtype=torch.float32).view(2, 12, 8)
    assert torch.equal(formulas.unpack(tokens, 6, 8), diffdoctor.Packed(6, 8).unpack(tokens))
