"""Treatments of denoisers in fewer bits: the LoRA is as without, and what cannot be made here is refused."""

import contextlib
import importlib.util
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch.testing._internal.two_tensor import TwoTensor

from diffdoctor.evaluate.model.config import EvaluateModelConfig
from diffdoctor.repairs.config import RepairConfig
from diffdoctor.runs.errors import UserError
from diffdoctor.training.weights import weights_digest
from diffdoctor.treat import loading
from diffdoctor.treat.adapters import merged_adapters
from diffdoctor.treat.checks import check_even_batches, check_resident_blocks
from diffdoctor.treat.command import TreatCommandConfig
from diffdoctor.treat.families import family_of
from diffdoctor.treat.guided_sampling import guide
from diffdoctor.treat.loading import load_lora, load_pipeline
from diffdoctor.treat.lora import WEIGHTS_NAME, add_lora
from diffdoctor.treat.quantization import check_available
from diffdoctor.treat.sample import SampleConfig
from support.tiny_pipelines import PROMPTS, drawn, tiny_pipeline
from support.treatment import BrightDetector, run, small


@pytest.mark.parametrize(
    "config",
    [TreatCommandConfig, SampleConfig, EvaluateModelConfig, lambda **kw: RepairConfig([], "p", "d", "o", **kw)],
)
def test_a_format_that_there_is_none_of_is_refused(config):
    assert config(quantize="bnb4").quantize == "bnb4"
    with pytest.raises(UserError, match=r"quantize: expected one of int8, fp8, bnb8, bnb4, or None, got 'int3'"):
        config(quantize="int3")


def test_what_is_not_installed_or_needs_a_gpu_is_refused(monkeypatch, tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^torchao is not installed: run `.*quantize"):
        load_pipeline("pipeline", str(tmp_path), quantize="int8")
    with pytest.raises(UserError, match=r"^bitsandbytes is not installed"):
        check_available("bnb8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"quantize: expected int8 or fp8 without a GPU.*bnb4"):
        check_available("bnb4")


class Held(torch.nn.Parameter):
    """A weight of another class, as a quantized one is."""


def test_what_is_no_plain_weight_is_neither_merged_nor_sharded_nor_put_away():
    family = family_of(tiny_pipeline("sd3"))
    parameters = add_lora(family, rank=2, alpha=2.0, groups=("attention",), seed=0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(0.1)
    layers = family.denoiser.transformer_blocks[0].attn
    layers.to_q.base_layer.weight = Held(layers.to_q.base_layer.weight.data)
    held, plain = (layer.base_layer.weight.clone() for layer in (layers.to_q, layers.to_k))
    with merged_adapters(family):
        assert torch.equal(layers.to_q.base_layer.weight, held)
        assert not layers.to_q.disable_adapters
        assert not torch.equal(layers.to_k.base_layer.weight, plain)
    assert torch.equal(layers.to_k.base_layer.weight, plain)
    with pytest.raises(UserError, match="FSDP: expected a denoiser that is not quantized"):
        check_even_batches(family, small(), SimpleNamespace(count=1))
    waiting = small(resident_blocks=1, gradient_checkpointing=True)
    for sharded, got in ((False, "a denoiser that is quantized"), (True, "FSDP")):
        with pytest.raises(UserError, match=f"resident_blocks: expected None with {got}"):
            check_resident_blocks(family, waiting, sharded)
    with pytest.raises(UserError, match="resident_blocks: expected None with --quantize"):
        TreatCommandConfig(resident_blocks=1, gradient_checkpointing=True, quantize="int8")


def test_a_digest_is_of_all_that_a_quantized_weight_consists_of():
    def digest(scale):
        layer = torch.nn.Linear(2, 2, bias=False)
        layer.weight = torch.nn.Parameter(TwoTensor(torch.ones(2, 2), torch.full((2, 2), scale)), requires_grad=False)
        return weights_digest(layer)

    assert digest(1.0) == digest(1.0) != digest(2.0)


def test_weights_that_stay_in_fp32_do_not_say_what_a_denoiser_takes(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path)
    pipeline = load_pipeline("pipeline", str(tmp_path), dtype="bf16", vae="fp32")
    assert next(pipeline.transformer.parameters()).dtype == torch.float32
    assert family_of(pipeline).denoiser_dtype == pipeline.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("how", "name"), [("int8", "sd3"), ("fp8", "flux"), ("int8", "sd")])
def test_a_lora_of_a_quantized_denoiser_is_one_of_the_denoiser(how, name, dtype, tmp_path):
    pytest.importorskip("torchao")
    tiny_pipeline(name).save_pretrained(tmp_path / "pipeline")

    def loaded(quantize=how):
        return load_pipeline("pipeline", str(tmp_path / "pipeline"), dtype=dtype, vae="fp32", quantize=quantize)

    def draw(pipeline):
        options = {} if name == "sd" else {"max_sequence_length": 32}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return drawn(pipeline(
            prompt=list(PROMPTS), height=16, width=16, num_inference_steps=2, output_type="latent",
            generator=generator, **options,
        )).float()  # fmt: skip

    plain, near = draw(loaded(None)), draw(loaded())
    assert 0 < (near - plain).norm() < 0.1 * plain.norm()
    options = {"precision": dtype, "gradient_checkpointing": True, "learning_rate": 0.05}
    # the last is done already, with the digest of the same quantized weights
    for method in ("draft_k", "nft", "nft"):
        result = run(loaded(), BrightDetector(), method=method, output_dir=tmp_path / method, **options)
        assert [row["grad_norm"] > 0 for row in result.history] == [True, True]
    run(loaded(None), BrightDetector(), output_dir=tmp_path / "without", **options)

    def layout(folder):
        with safe_open(folder / "lora" / WEIGHTS_NAME, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (found.get_shape(), found.get_dtype()) for key, found in slices.items()}

    assert layout(tmp_path / "nft") == layout(tmp_path / "draft_k") == layout(tmp_path / "without")
    for quantize in (None, how):
        before = draw(pipeline := loaded(quantize))
        load_lora(pipeline, tmp_path / "draft_k" / "lora")
        assert (draw(pipeline) - before).norm() > 1e-3 * before.norm()
        with guide(pipeline, BrightDetector(), height=16, width=16, rewinds=1) as log:
            draw(pipeline)
        assert log.flagged_area


def test_weights_are_quantized_on_the_gpu_that_the_pipeline_is_for(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    current, on = [], []

    @contextlib.contextmanager
    def device(place):
        current.append(place)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(loading, "check_available", lambda how: None)
    monkeypatch.setattr(loading, "quantization_config", lambda *_: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *_, **__: {})
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: on.extend(current))
    for place in (torch.device("cuda", 1), torch.device("cpu"), None):
        load_pipeline("pipeline", str(tmp_path), quantize="bnb4", device=place)
    assert on == [torch.device("cuda", 1)]
