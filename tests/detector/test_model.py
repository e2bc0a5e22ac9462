"""Detectors as networks: sizes, ranges, gradients, tiles, files, and the published layout."""

import json

import pytest
import torch
import torch.nn.functional as F

from diffdoctor.detector import ArtifactDetector, ConvDetector, PreprocessConfig, load_detector
from diffdoctor.runs.errors import UserError

transformers = pytest.importorskip("transformers")

MAKE = {
    "segformer": lambda: ArtifactDetector.tiny(),
    "segformer-batchnorm": lambda: ArtifactDetector.tiny(head_norm="batch"),
    "conv": lambda: ConvDetector((8, 16)),
    "conv-patches": lambda: ConvDetector((8, 16), patch=2),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    return MAKE[name]()


@pytest.fixture(params=MAKE)
def detector(request):
    return make(request.param)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (64, 64), (100, 60)], ids=str)
def test_maps_have_the_picture_s_size(detector, size):
    images = torch.rand(2, 3, *size)
    confidence = detector.confidence(images)
    assert confidence.shape == (2, 1, *size)
    assert 0 <= confidence.min() < confidence.max() <= 1
    logits = detector(images)
    expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    torch.testing.assert_close(confidence, expected)


def test_logits_come_at_a_quarter_of_the_enlarged_picture():
    assert make("segformer")(torch.rand(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    assert make("segformer")(torch.rand(1, 3, 128, 96)).shape == (1, 1, 32, 24)
    assert make("conv")(torch.rand(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    assert make("conv-patches")(torch.rand(1, 3, 16, 24)).shape == (1, 1, 8, 12)


def test_a_batch_is_its_pictures_one_by_one(detector):
    images = torch.rand(3, 3, 24, 24)
    together = detector(images)
    torch.testing.assert_close(together, torch.cat([detector(image[None]) for image in images]), rtol=1e-4, atol=1e-5)


def test_the_range_of_the_pixels_is_said_not_guessed(detector):
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(detector(images * 2 - 1, value_range=(-1, 1)), detector(images), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(detector(images * 2 - 1), detector(images), atol=1e-3)


@pytest.mark.parametrize("size", [16, 80, 150], ids=["enlarged", "as it is", "shrunk"])
@pytest.mark.parametrize("name", ["segformer", "conv"])
def test_the_gradient_to_the_picture_is_the_slope(name, size):
    detector = make(name).double()
    detector.preprocess_config.max_side = 96
    torch.manual_seed(1)
    images = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(images)

    def value(x):
        return detector.confidence(x).square().sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    # Small enough that hardly any ReLU of the head switches within it: 1e-5 leaves an error of 2e-3.
    step = 1e-7
    with torch.no_grad():
        slope = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)


def test_shrinking_is_antialiased_like_transformers_own_processor():
    numpy = pytest.importorskip("numpy")
    picture = numpy.random.default_rng(0).integers(0, 256, (150, 90, 3), dtype=numpy.uint8)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64}, do_reduce_labels=False)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    got = ArtifactDetector.tiny(input_size=64).preprocess(images)
    # Pillow rounds to 8 bits after each of its two passes: up to 1 of 255, over the smallest deviation 0.224.
    assert (got - expected).abs().max() < 1.5 / 255 / 0.224


def test_pictures_are_enlarged_shrunk_and_rounded_as_configured():
    config = PreprocessConfig(min_side=64, max_side=256, multiple=32)
    assert config.network_size(16, 16) == (64, 64)
    assert config.network_size(16, 32) == (64, 128)
    assert config.network_size(100, 130) == (96, 128)
    assert config.network_size(2000, 1000) == (256, 128)
    assert PreprocessConfig(input_size=512).network_size(16, 700) == (512, 512)


def test_tiles_agree_with_the_whole_away_from_the_picture_s_border():
    detector = make("conv")
    torch.manual_seed(2)
    images = F.interpolate(torch.rand(1, 3, 12, 15), size=(96, 120), mode="bilinear")
    whole, tiled = detector.confidence(images), detector.confidence(images, tile=64, overlap=0.5)
    assert tiled.shape == whole.shape
    # A tile's own normalisation and borders change its map a little; blended, they must not tear it.
    assert (whole - tiled).abs().mean() < 0.05
    seams = (tiled.diff(dim=-1).abs().amax(), whole.diff(dim=-1).abs().amax())
    assert seams[0] < 3 * seams[1]
    assert torch.equal(detector.confidence(images, tile=120), whole)


def test_a_constant_map_survives_tiling():
    detector = make("conv")
    torch.nn.init.zeros_(detector.head.weight)
    torch.nn.init.constant_(detector.head.bias, 1.5)
    tiled = detector.confidence(torch.rand(1, 3, 70, 50), tile=32, overlap=0.3)
    torch.testing.assert_close(tiled, torch.full_like(tiled, 1.5).sigmoid())


def test_bf16_stays_close_to_fp32(detector):
    images = torch.rand(2, 3, 32, 32)
    expected = detector.confidence(images)
    got = detector.bfloat16().confidence(images)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segformer", "conv"])
def test_torch_compile_takes_it_as_one_graph(name):
    detector = make(name)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)

    def confidence(x):
        return detector.confidence(x, value_range=(-1, 1))

    # "aot_eager" traces forward and backward as inductor would and leaves out the minutes of code generation.
    compiled = torch.compile(confidence, fullgraph=True, backend="aot_eager")
    got, expected = compiled(images), confidence(images)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out.sum(), images)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_files_bring_back_the_same_bits_and_class(detector, tmp_path):
    images = torch.rand(2, 3, 16, 16)
    detector.preprocess_config.min_side = 32
    expected = detector(images)
    detector.save_pretrained(tmp_path / "detector")
    loaded = load_detector(tmp_path / "detector")
    assert type(loaded) is type(detector)
    assert not loaded.training
    assert not loaded.confidence(images).requires_grad  # frozen: it may weigh a loss; training unfreezes
    assert loaded.confidence(images.requires_grad_()).requires_grad
    images = images.detach()
    assert loaded.preprocess_config == detector.preprocess_config
    assert torch.equal(loaded(images), expected)
    assert torch.equal(type(detector).from_pretrained(tmp_path / "detector")(images), expected)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["detector", "detector.json", "model.safetensors"]


def test_what_is_not_a_detector_is_named(tmp_path):
    make("conv").save_pretrained(tmp_path / "conv")
    with pytest.raises(UserError, match="expected a detector of class ArtifactDetector, got ConvDetector"):
        ArtifactDetector.from_pretrained(tmp_path / "conv")
    with pytest.raises(UserError, match="expected a folder"):
        load_detector(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a complete detector"):
        load_detector(tmp_path / "empty")
    weights = tmp_path / "conv" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete detector"):
        load_detector(tmp_path / "conv")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "conv" / "detector.json").read_text())
    config["network"]["channels"] = [8, 24]
    (tmp_path / "conv" / "detector.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit: down\.1\.first\.weight of shape"):
        load_detector(tmp_path / "conv")


def published_state(tmp_path, config):
    """transformers' own model with random values, and its state dict under the published checkpoint's names."""
    from safetensors.torch import load_file

    torch.manual_seed(3)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.decode_head.batch_norm.running_mean.normal_()
    model.decode_head.batch_norm.running_var.uniform_(0.5, 1.5)
    # transformers writes files under the names that its models were published with.
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert "segformer.encoder.block.0.0.layer_norm_1.weight" in state
    assert "decode_head.linear_c.0.proj.weight" in state
    return model, state


def published_config(**changes):
    options = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 16, 20, 32], "decoder_hidden_size": 24, "num_labels": 1}
    return transformers.SegformerConfig(**{**options, **changes})


def test_the_published_layout_loads_and_gives_transformers_own_output(tmp_path):
    model, state = published_state(tmp_path, published_config())
    torch.save(state, tmp_path / "ad_pytorch_model.bin")
    detector = ArtifactDetector.from_official(tmp_path / "ad_pytorch_model.bin", input_size=96)
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    images = torch.rand(2, 3, 70, 130, requires_grad=True)
    pixels = detector.preprocess(images)
    assert pixels.shape == (2, 3, 96, 96)
    logits = detector(images)
    assert logits.std() > 0.02
    assert torch.equal(logits, model(pixel_values=pixels).logits)
    detector.confidence(images).sum().backward()
    assert images.grad.abs().max() > 0
    # Training leaves the published statistics alone, and a saved copy gives the same.
    before = detector(images).detach()
    detector.train()(images)
    assert torch.equal(detector.eval()(images), before)
    detector.save_pretrained(tmp_path / "again")
    assert torch.equal(load_detector(tmp_path / "again")(images), before)


def test_the_published_size_is_b5():
    detector = ArtifactDetector.of_size("b5", head_norm="batch")
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(84.6e6, rel=0.001)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_key_that_does_not_fit_is_named(tmp_path, fault):
    _, state = published_state(tmp_path, published_config())
    key = "segformer.encoder.block.1.1.mlp.dense2.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        state["decode_head.extra.weight"] = torch.zeros(1)
        key = "decode_head.extra.weight"
    else:
        state[key] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "state.bin")
    with pytest.raises(
        UserError, match=r"extra\.weight" if fault == "unexpected" else r"1\.(mlp\.)?(dense2|fc2|.*mlp)"
    ):
        ArtifactDetector.from_official(tmp_path / "state.bin")


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="safely"):
        ArtifactDetector.from_official(tmp_path / "evil.bin")
    assert not (tmp_path / "written").exists()
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"expected a SegFormer's state dict, got other keys \(a …\)"):
        ArtifactDetector.from_official(tmp_path / "other.bin")


@pytest.mark.parametrize(
    ("images", "options", "error", "match"),
    [
        ([1.0], {}, TypeError, "images: expected a torch.Tensor"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), {}, TypeError, "images: expected a floating-point dtype"),
        (torch.zeros(3, 16, 16), {}, ValueError, r"images: expected shape \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 16, 16), {}, ValueError, "images: expected shape"),
        (torch.zeros(1, 3, 16, 16), {"value_range": (1, 0)}, ValueError, "value_range"),
    ],
)
def test_bad_pictures_are_refused(images, options, error, match):
    with pytest.raises(error, match=match):
        make("conv")(images, **options)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="head_norm"):
        ArtifactDetector.tiny(head_norm="layer")
    with pytest.raises(ValueError, match="size: expected"):
        ArtifactDetector.of_size("b9")
    with pytest.raises(ValueError, match="channels"):
        ConvDetector((5,))
    with pytest.raises(ValueError, match="min_side"):
        PreprocessConfig(min_side=0)
    with pytest.raises(ValueError, match="tile"):
        make("conv").confidence(torch.rand(1, 3, 32, 32), tile=4)
