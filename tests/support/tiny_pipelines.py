"""Random pipelines of every family, small enough to train on a CPU within a test; built offline, saved as a folder.

Pictures are 16 to 64 pixels wide, latents half of that. Nothing here is trained.
"""

import torch

from diffdoctor.demo.pipeline import build_tokenizer

PROMPTS = ("a photo of a red square", "a photo of a green circle", "a photo of a blue triangle")
NEW_FAMILIES = ("z_image", "qwen_image", "krea2", "chroma", "flux2_dev", "sana", "wan")
FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux2", *NEW_FAMILIES)
# of a pipeline's call
CALL_OPTIONS = {name: {"max_sequence_length": 32} for name in FAMILIES if name not in ("sd", "sdxl")}
CALL_OPTIONS["wan"]["num_frames"] = 1
# of 16 pixels it would make 1024 otherwise
CALL_OPTIONS["sana"]["use_resolution_binning"] = False


def call_options(name, scale, prompts=PROMPTS):
    """Options of a pipeline's call at a guidance scale, such that it does what its family does."""
    if name == "qwen_image":
        return {**CALL_OPTIONS[name], "true_cfg_scale": scale, "negative_prompt": [" "] * len(prompts)}
    return {**CALL_OPTIONS.get(name, {}), "guidance_scale": scale}


def drawn(output):
    """The pictures (or latents) of a pipeline's call, whether it draws pictures or videos of one frame."""
    if hasattr(output, "images"):
        return output.images
    return output.frames[:, 0] if output.frames.shape[2] == 3 else output.frames


def t5_tokenizer(texts=PROMPTS, max_length=32):
    """A `T5Tokenizer` over a Unigram model learnt from texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    learner.train_from_iterator(
        sorted(texts) * 4,
        trainers.UnigramTrainer(vocab_size=96, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    pieces = [(piece, 0.0) for piece in special]
    # get_vocab has a random order of its own
    pieces += [(piece, -float(rank)) for rank, piece in enumerate(sorted(learner.get_vocab())) if piece not in special]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _clip(tokenizer, hidden_size=32, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        projection_dim=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer, hidden_size=32):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer), d_model=hidden_size, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def autoencoder(latent_channels=4, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    ).eval()


def _unet(cross_attention_dim=32, **config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


def _ddpm(prediction_type):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )


def _sd(prediction_type):
    from diffusers import StableDiffusionPipeline

    tokenizer = build_tokenizer(PROMPTS, max_length=77)
    return StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.5),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_ddpm(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(prediction_type):
    from diffusers import StableDiffusionXLPipeline

    tokenizer = build_tokenizer(PROMPTS, max_length=77)
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.5),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(PROMPTS, max_length=77),
        unet=_unet(
            64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        scheduler=_ddpm(prediction_type),
    )


def flow_scheduler(**config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _sd3(prediction_type):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, t5 = build_tokenizer(PROMPTS, max_length=77), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
        ),
        scheduler=flow_scheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projection=True),
        tokenizer_2=build_tokenizer(PROMPTS, max_length=77),
        text_encoder_3=t5_encoder(t5, 64),
        tokenizer_3=t5,
    )


def _flux(prediction_type):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    tokenizer, t5 = build_tokenizer(PROMPTS, max_length=77), t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=False),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )


def qwen_tokenizer(texts=PROMPTS, max_length=64):
    """A `Qwen2Tokenizer` with a chat template, over byte pairs learnt from texts."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        sorted(texts) * 4,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def flux2_parts(guidance_embeds):
    """What the pipelines of FLUX.2 share."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    vae.bn.running_mean.copy_(0.2 * torch.randn(16))
    vae.bn.running_var.copy_(0.5 + torch.rand(16))
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = flow_scheduler(shift=3.0, use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer}


def _flux2(prediction_type):
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=27, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(text).eval()
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(guidance_embeds=False))


def tiny_pipeline(family, *, prediction_type="epsilon", seed=0):
    """A random pipeline of one of `FAMILIES`; prediction_type is for the UNet ones. The global random state is kept."""
    known = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "flux2": _flux2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family in known:
            pipeline = known[family](prediction_type)
        else:
            from support import tiny_families

            pipeline = getattr(tiny_families, family)()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
