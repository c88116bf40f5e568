"""The configs of the published Wan2.2 checkpoints as facts, so that their shapes are known where their files are not.

Knows what the JSON files of the published repositories say. Does not know what is done with them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

Configs: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The JSON objects of a checkpoint, by the names of their files."""

T2V_A14B_ID: Final = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
I2V_A14B_ID: Final = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
TI2V_5B_ID: Final = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"

_INDEX: Final[dict[str, Any]] = {
    "_class_name": "WanPipeline",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
_SCHEDULER: Final[dict[str, Any]] = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 12.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
_TEXT_ENCODER: Final[dict[str, Any]] = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 256384,
}
_TRANSFORMER: Final[dict[str, Any]] = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
_VAE: Final[dict[str, Any]] = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}

T2V_A14B_CONFIGS: Final[Configs] = MappingProxyType(
    {
        "model_index.json": _INDEX,
        "scheduler/scheduler_config.json": _SCHEDULER,
        "text_encoder/config.json": _TEXT_ENCODER,
        "transformer/config.json": _TRANSFORMER,
        "transformer_2/config.json": _TRANSFORMER,
        "vae/config.json": _VAE,
    }
)

# The latents, their mask (one channel for each frame of a latent frame) and the latents of the image: 16 + 4 + 16.
_I2V_TRANSFORMER: Final[dict[str, Any]] = {**_TRANSFORMER, "in_channels": 36}

I2V_A14B_CONFIGS: Final[Configs] = MappingProxyType(
    {
        **T2V_A14B_CONFIGS,
        "model_index.json": {
            **_INDEX,
            "_class_name": "WanImageToVideoPipeline",
            "boundary_ratio": 0.9,
            "image_encoder": [None, None],
            "image_processor": [None, None],
        },
        "scheduler/scheduler_config.json": {**_SCHEDULER, "flow_shift": 5.0},
        "transformer/config.json": _I2V_TRANSFORMER,
        "transformer_2/config.json": _I2V_TRANSFORMER,
    }
)

_LATENTS_MEAN_48: Final = [
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
]
_LATENTS_STD_48: Final = [
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
]

TI2V_5B_CONFIGS: Final[Configs] = MappingProxyType(
    {
        "model_index.json": {
            **_INDEX,
            "boundary_ratio": None,
            "expand_timesteps": True,
            "transformer_2": [None, None],
        },
        "scheduler/scheduler_config.json": {**_SCHEDULER, "flow_shift": 5.0},
        "text_encoder/config.json": _TEXT_ENCODER,
        "transformer/config.json": {
            **_TRANSFORMER,
            "ffn_dim": 14336,
            "in_channels": 48,
            "num_attention_heads": 24,
            "num_layers": 30,
            "out_channels": 48,
        },
        "vae/config.json": {
            **_VAE,
            "base_dim": 160,
            "decoder_base_dim": 256,
            "in_channels": 12,
            "is_residual": True,
            "latents_mean": _LATENTS_MEAN_48,
            "latents_std": _LATENTS_STD_48,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
            "z_dim": 48,
        },
    }
)

CONFIGS: Final[Mapping[str, Configs]] = MappingProxyType(
    {T2V_A14B_ID: T2V_A14B_CONFIGS, I2V_A14B_ID: I2V_A14B_CONFIGS, TI2V_5B_ID: TI2V_5B_CONFIGS}
)
"""By hub id."""
