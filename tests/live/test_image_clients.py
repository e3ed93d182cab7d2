"""Image and video adapters that loralens writes, loaded by diffusers and by ComfyUI themselves.

ComfyUI is tested where ``LORALENS_COMFYUI`` names its sources; its models are made without numbers.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens.core.image_families import families
from tests.conftest import when_used

diffusers = when_used("diffusers")
torch = when_used("torch")
pytestmark = pytest.mark.live
SMALL = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16}
# family → a small model of it; the models of Z-Image and of Lumina 2 count their blocks and sizes in other words
CONFIGS = {
    "Qwen-Image": {**SMALL, "joint_attention_dim": 32},
    "SD3": {**SMALL, "joint_attention_dim": 32, "caption_projection_dim": 48, "pooled_projection_dim": 24,
            "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "Wan": {**SMALL, "ffn_dim": 64, "text_dim": 32, "image_dim": 40, "added_kv_proj_dim": 48},
    "HunyuanVideo": {**SMALL, "num_single_layers": 2, "text_embed_dim": 32, "pooled_projection_dim": 24,
                     "rope_axes_dim": (4, 6, 6)},
    "LTX-Video": {**SMALL, "cross_attention_dim": 48, "caption_channels": 32},
    "LTX-2": {**SMALL, "cross_attention_dim": 48, "caption_channels": 32, "audio_num_attention_heads": 2,
              "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32},
    "Z-Image": {"dim": 96, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [16, 16, 16]},
    "Lumina2": {"hidden_size": 96, "num_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, "cap_feat_dim": 32,
                "axes_dim_rope": (4, 6, 6)},
    "FLUX.2": {**SMALL, "num_single_layers": 2, "joint_attention_dim": 32, "in_channels": 32},
    "Kandinsky 5": {"model_dim": 48, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "time_dim": 32,
                    "in_text_dim": 40, "in_text_dim2": 24, "axes_dims": (4, 6, 6)},
    "Chroma": {**SMALL, "num_single_layers": 2, "joint_attention_dim": 32, "approximator_hidden_dim": 40},
}  # fmt: skip
