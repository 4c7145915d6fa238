"""Conversational models small enough to train in a test, as bare configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "llava",
        "vision_config": CLIP,
        "text_config": {"model_type": "llama", **TEXT, **_IDS},
        "image_token_index": 255,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        "text_config": {
            **TEXT,
            **_IDS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "image_token_id": 255,
        "video_token_id": 254,
        "vision_start_token_id": 253,
        "vision_end_token_id": 252,
    },
    "llama": {"model_type": "llama", **TEXT, **_IDS},
}


def config(folder: Path, kind: str) -> str:
    """Write a configuration, and return what `--model` is to name."""
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(CONFIGS[kind]))
    return f"chat:{path}"
