"""`diffdoctor.repair`: every method on every family; kept only if better; what it gives and what it refuses."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("scipy")
from PIL import Image

import diffdoctor
from diffdoctor.repairs import RepairOptions
from diffdoctor.repairs.redraw import InpaintRedrawer, ResumeRedrawer, _inpainting_class, open_redrawer
from diffdoctor.repairs.repairer import ELSEWHERE, NOT_BEST, NOT_BETTER
from diffdoctor.runs.errors import UserError
from support.repairs import PROMPT, QUICK, blocks, bright, inpainter
from support.tiny_pipelines import CALL_OPTIONS, FAMILIES, tiny_pipeline

LONG_TEXTS = (*CALL_OPTIONS, "flux-fill")


def options(name="sd", **changes):
    return RepairOptions(**{**QUICK, "max_sequence_length": 32 if name in LONG_TEXTS else None, **changes})


def repaired(pictures, pipeline=None, detector=bright, name="sd", **changes):
    pipeline = tiny_pipeline("sd") if pipeline is None else pipeline
    return diffdoctor.repair(pictures, pipeline, detector, options(name, **changes), prompts=PROMPT, progress=False)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("inpaint", name) for name in ("sd", "sdxl", "sd3", "flux", "flux-fill", "flux2", "qwen_image", "z_image")),
        *(("resume", n) for n in FAMILIES),
    ],
)
def test_bright_blocks_go_and_nothing_else_changes(method, name):
    pipeline = inpainter(name) if method == "inpaint" else tiny_pipeline(name)
    odd = blocks(37, 29, ((0, 20, 8, 9),))  # at the border, of no round size
    found = repaired([blocks(), odd], pipeline, name=name, method=method)
    for original, result in zip((blocks(), odd), found, strict=True):
        assert result.pixels.shape == original.shape
        assert (result.pixels[~result.mask] == original[~result.mask]).all()
        assert result.changed_outside() == 0
        assert all(region.kept and region.score_after < region.score_before for region in result.regions)
        assert result.after.mean() < result.before.mean()
        pixels = torch.from_numpy(result.picture.rgb()).permute(2, 0, 1)[None] / 255.0
        np.testing.assert_allclose(result.after, bright(pixels)[0, 0], rtol=1e-5)  # the map is that of what is kept
    assert [len(result.regions) for result in found] == [2, 1]
    assert found[0].regions[0].box == (39, 24, 17, 11)


def test_diffusers_inpainting_pipelines_are_found_by_the_models_class():
    import diffusers

    pairs = {
        "StableDiffusionPipeline": "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline": "StableDiffusionXLInpaintPipeline",
        "StableDiffusion3Pipeline": "StableDiffusion3InpaintPipeline",
        "FluxPipeline": "FluxInpaintPipeline",
        "Flux2KleinPipeline": "Flux2KleinInpaintPipeline",
        "ZImagePipeline": "ZImageInpaintPipeline",
        "QwenImagePipeline": "QwenImageInpaintPipeline",
    }
    there = {one: other for one, other in pairs.items() if hasattr(diffusers, one) and hasattr(diffusers, other)}
    assert len(there) >= 4
    for one, other in there.items():
        assert _inpainting_class(getattr(diffusers, one)).__name__ == other
    assert _inpainting_class(diffusers.PixArtAlphaPipeline) is None
    assert _inpainting_class(diffusers.ChromaPipeline) is None


def test_qwen_image_is_guided_without_a_negative_prompt():
    told = {scale: InpaintRedrawer(inpainter("qwen_image"), options("qwen_image", guidance_scale=scale)).options
            for scale in (4.0, 1.0)}  # fmt: skip
    assert told[4.0] == {**told[1.0], "true_cfg_scale": 4.0, "negative_prompt": " "}


def test_auto_inpaints_where_it_can_and_keeps_the_weights_dtype():
    half = tiny_pipeline("sd").to(torch.bfloat16)
    redrawer = open_redrawer(half, options())
    assert isinstance(redrawer, InpaintRedrawer)
    assert redrawer.pipeline.unet is half.unet
    assert half.unet.dtype == torch.bfloat16
    again = open_redrawer(redrawer.pipeline, options())
    assert again.pipeline is redrawer.pipeline
    assert isinstance(open_redrawer(tiny_pipeline("sd"), options(method="resume")), ResumeRedrawer)


def test_auto_resumes_where_diffusers_inpainting_takes_no_such_model():
    pipeline = tiny_pipeline("sd")
    pipeline.unet.register_to_config(sample_size=[2, 5])  # of pictures that are not square
    assert isinstance(open_redrawer(pipeline, options()), ResumeRedrawer)
    with pytest.raises(UserError, match="StableDiffusionInpaintPipeline: cannot be made of this pipeline"):
        open_redrawer(pipeline, options(method="inpaint"))


def test_an_offloaded_pipeline_resumes_where_it_computes(monkeypatch):
    pipeline = tiny_pipeline("sd")
    redrawer = ResumeRedrawer(pipeline, options(method="resume"))
    monkeypatch.setattr(type(pipeline), "_execution_device", property(lambda self: torch.device("meta")))
    assert redrawer.device.type == "meta"


class Liar:
    """Says that whatever is not the first picture it saw is worse, or better."""

    def __init__(self, change):
        self.seen, self.change = None, change

    def __call__(self, pictures):
        maps = torch.full((len(pictures), 1, *pictures.shape[2:]), 0.2)
        maps[:, :, 4:12, 5:14] = 0.8
        if self.seen is None:
            self.seen = pictures.clone()
        for picture, confidence in zip(pictures, maps, strict=True):
            if not torch.equal(picture, self.seen[0]):
                self.change(confidence)
        return maps


def test_what_is_not_better_is_not_kept():
    original = blocks()
    (result,) = repaired([original], detector=Liar(lambda c: c.mul_(1.1)), tries=3)
    assert (result.pixels == original).all()
    assert not result.changed
    (region,) = result.regions
    assert [attempt.why_not for attempt in region.tries] == [NOT_BETTER] * 3
    assert len({attempt.seed for attempt in region.tries}) == 3
    assert [attempt.strength for attempt in region.tries] == pytest.approx([0.6, 0.8, 1.0])
    assert region.score_after == region.score_before

    def moves(confidence):  # the artifact goes from the region to the rest of the picture
        confidence[:, 2:14, 3:16] = 0.1
        confidence[:, 20:] = 0.9

    (result,) = repaired([original], detector=Liar(moves))
    assert (result.pixels == original).all()
    assert {attempt.why_not for attempt in result.regions[0].tries} == {ELSEWHERE}


def test_the_best_of_the_tries_is_kept():
    levels = iter((0.7, 0.55, 0.6, 0.75))

    def better(confidence):
        confidence[:, 4:12, 5:14] = next(levels)

    (result,) = repaired([blocks()], detector=Liar(better), tries=4)
    assert [attempt.why_not for attempt in result.regions[0].tries] == [NOT_BEST, "", NOT_BEST, NOT_BEST]
    assert result.regions[0].score_after == min(attempt.score for attempt in result.regions[0].tries)


def test_what_the_model_cannot_draw_is_no_try():
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    (result,) = repaired([blocks()], pipeline, method="resume")
    assert not result.changed
    assert {attempt.why_not for attempt in result.regions[0].tries} == {"the model gave values that are not finite"}


def test_a_picture_depends_on_its_seed_and_neither_on_its_fellows_nor_on_its_type(tmp_path):
    original = blocks()
    Image.fromarray(original).save(tmp_path / "a.png")
    one = repaired([original], method="resume")[0]
    other = repaired([Image.fromarray(original), tmp_path / "a.png"], method="resume")
    assert (other[0].pixels == one.pixels).mean() > 0.99  # a batch of two rounds otherwise
    assert np.abs(other[0].pixels.astype(int) - one.pixels).max() <= 2
    assert (other[0].pixels != other[1].pixels).any()
    assert (repaired([original], method="resume", seed=1)[0].pixels != one.pixels).any()
    one.save(tmp_path / "mended.png")
    assert (np.asarray(Image.open(tmp_path / "mended.png")) == one.pixels).all()
    assert (np.asarray(one.image) == one.pixels).all()


def test_a_weak_redrawing_of_few_steps_is_one_step():
    for method in ("inpaint", "resume"):
        (result,) = repaired([blocks()], method=method, sampling_steps=2, strength=0.1, last_strength=0.1, tries=1)
        assert result.regions[0].tries[0].score is not None


def test_the_prompt_is_a_pictures_own_unless_it_is_given():
    texts = [
        options(prompt=prompt).prompt_for(own) for prompt in (None, "a cat", "[PROMPT], sharp") for own in ("x", None)
    ]
    assert texts == ["x", "", "a cat", "a cat", "x, sharp", ", sharp"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({}, {"method": "paint"}, "method: expected one of auto, inpaint, resume, got 'paint'"),
        ({}, {"strength": 0.0}, r"strength: expected a number in \(0, 1\], got 0.0"),
        ({}, {"min_area": 0.5, "max_area": 0.2}, "min_area, max_area: expected shares"),
        ({}, {"tries": 0}, "tries: expected >= 1, got 0"),
        ({}, {"height": 20}, "height, width: expected multiples of 8 pixels, got 20 x 16"),
        ({}, {"max_sequence_length": 9}, "max_sequence_length: StableDiffusionInpaintPipeline does not take"),
        ({"pictures": [Image.new("CMYK", (8, 8))]}, {}, r"pictures\[0\]: a CMYK picture"),
        ({"pictures": ["nowhere.png"]}, {}, r"pictures\[0\] \(nowhere.png\): a file that cannot be read"),
        ({"pictures": "a.png"}, {}, "pictures: expected a list of pictures, got str"),
        ({"prompts": ["a", "b"]}, {}, r"prompts: expected one per picture \(1\), got 2"),
        ({"prompts": [3]}, {}, "prompts: expected texts, got int"),
        ({"detector": 3}, {}, "detector: expected a detector, or a function"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, changes, message):
    call = {"pictures": [blocks()], "pipeline": tiny_pipeline("sd"), "detector": bright, "prompts": PROMPT, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        diffdoctor.repair(**call, options=options(**changes), progress=False)


def test_a_pipeline_that_nothing_redraws_is_refused():
    class Other:
        def __call__(self, prompt):
            pass

    with pytest.raises(UserError, match="no inpainting pipeline for Other, and Other cannot be treated yet"):
        open_redrawer(Other(), options())
    with pytest.raises(UserError, match=r"method inpaint: expected a pipeline for which .* got Other: try resume"):
        open_redrawer(Other(), options(method="inpaint"))
