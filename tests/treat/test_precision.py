"""A denoiser under autocast: nearly the gradient of fp32, and fp16's scale."""

import pytest
import torch

from diffdoctor.treat import treatment
from diffdoctor.treat.families import family_of
from diffdoctor.treat.lora import lora_state
from support.treatment import gradient_norms, run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_gives_nearly_the_gradient_of_fp32(precision):
    result = run(precision=precision, steps=2)
    assert result.skipped == 0
    assert all(p.dtype == torch.float32 for p in family_of(result.pipeline).denoiser.parameters())
    norms = [row["grad_norm"] for row in result.history]
    assert norms == pytest.approx(gradient_norms(), rel=0.05)


def test_fp16_keeps_gradients_that_are_too_small_for_it():
    """At a ten-millionth of the usual weight the gradient inside the denoiser is below fp16's least number, 6e-8."""
    tiny = {"offline_weight": 1e-7, "method": "draft_k", "map_source": "uniform", "max_grad_norm": 0.0, "steps": 1}
    low, full = (run(precision=precision, **tiny).history[0]["grad_norm"] for precision in ("fp16", "fp32"))
    assert 0 < low < 1e-6
    assert low == pytest.approx(full, rel=0.1)


def test_fp16_overflow_is_skipped_and_halves_the_scale(monkeypatch, tmp_path):
    scales = []
    take = treatment.Treatment._take_step

    def spying(self):
        # an infinity in place of the first gradient
        handle = self.training.parameters[0].register_hook(lambda g: g * float("inf") if self.step == 0 else g)
        take(self)
        handle.remove()
        scales.append(self.training.scaler.get_scale())

    monkeypatch.setattr(treatment.Treatment, "_take_step", spying)
    result = run(precision="fp16", steps=2)
    assert result.skipped == 1
    assert scales == [2.0**15, 2.0**15]
    assert all(torch.isfinite(value).all() for value in lora_state(family_of(result.pipeline)).values())
