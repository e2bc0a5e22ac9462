"""Random pipelines of the newer families, made of configurations alone; see tiny_pipelines.py."""

import torch

from support.tiny_pipelines import autoencoder, flow_scheduler, flux2_parts, qwen_tokenizer, t5_encoder, t5_tokenizer

_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.2,
}
_VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}


def _frame_autoencoder():
    """An autoencoder of videos with four channels, halving a picture's sides once."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    ).eval()  # fmt: skip
    _enlarge(vae.decoder.conv_out, 4)
    return vae


@torch.no_grad()
def _enlarge(layer, factor):
    """Make a layer's output larger: what was never trained gives pictures and predictions with little in them."""
    layer.weight.mul_(factor)


def _length(tokenizer, text):
    """In tokens: the pipelines know it of their own tokenizer alone."""
    return len(tokenizer(text).input_ids)


def qwen_image():
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer(max_length=256)
    text = {
        **_TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 256,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    pipeline = QwenImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=_frame_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=_VISION)
        ).eval(),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    pipeline.prompt_template_encode_start_idx = _length(tokenizer, pipeline.prompt_template_encode.split("{}")[0])
    for layer in (pipeline.transformer.txt_in, pipeline.transformer.proj_out):
        _enlarge(layer, 6)
    return pipeline


def krea2():
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = qwen_tokenizer(max_length=256)
    text = {
        **_TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {**_VISION, "deepstack_visual_indexes": [0]}
    pipeline = Krea2Pipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=_frame_autoencoder(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip
    pipeline.prompt_template_encode_start_idx = _length(tokenizer, pipeline.prompt_template_encode_prefix)
    for layer in (pipeline.transformer.txt_in.linear_2, pipeline.transformer.final_layer.linear):
        _enlarge(layer, 6)
    return pipeline


def z_image():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    text = Qwen3Config(**_TEXT, vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    _enlarge(transformer.all_final_layer["2-1"].linear, 3)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=False),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(text).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    tokenizer = t5_tokenizer()
    return ChromaPipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.7, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5_encoder(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
    )  # fmt: skip


def flux2_dev():
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    # a tokenizer alone: the real one is a processor of pictures too, and needs torchvision
    tokenizer = qwen_tokenizer(max_length=512)
    words = "{% for part in message.content %}{{ part.text }}{% endfor %}"
    tokenizer.chat_template = "{% for message in messages|reverse %}" + words + "\n{% endfor %}"
    text = {
        **_TEXT, "model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 30,
        "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    return Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **flux2_parts(guidance_embeds=True))


def sana():
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model

    # the instruction before every prompt is long
    tokenizer = qwen_tokenizer(max_length=2048)
    # as Gemma's does, so that no text is without a token
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    text = Gemma2Config(
        **_TEXT, vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=2048,
        query_pre_attn_scalar=8, sliding_window=512,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate", downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.6,
    ).eval()  # fmt: skip
    _enlarge(vae.decoder.conv_out, 4)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16,
    )  # fmt: skip
    for layer in (transformer.caption_projection.linear_2, transformer.proj_out):
        _enlarge(layer, 6)
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text).eval(),
        vae=vae,
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
    )
    # it insists on multiples of 32 pixels, which its own autoencoder needs and this one does not
    pipeline.check_inputs = lambda *args: None
    return pipeline


def wan_autoencoder():
    """An autoencoder of videos with four channels, halving a picture's sides and a video's frames once."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], scale_factor_temporal=2,
        scale_factor_spatial=2, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    ).eval()  # fmt: skip
    _enlarge(vae.decoder.conv_out, 4)
    return vae


def _wan_transformer():
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=2, text_dim=16,
        freq_dim=16, ffn_dim=32, rope_max_seq_len=64,
    )  # fmt: skip
    for layer in (transformer.condition_embedder.text_embedder.linear_2, transformer.proj_out):
        _enlarge(layer, 6)
    return transformer


def wan22():
    """With two transformers, the second of which takes over after two of four steps."""
    return wan(transformer_2=_wan_transformer(), boundary_ratio=0.8)


def wan(**parts):
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=wan_autoencoder(),
        scheduler=UniPCMultistepScheduler(**flow),
        transformer=_wan_transformer(),
        **parts,
    )
