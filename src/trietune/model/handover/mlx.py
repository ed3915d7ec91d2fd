"""An adapter as mlx-lm loads it (`mlx_lm/tuner/utils.py`, load_adapters).

adapter_config.json       num_layers, lora_parameters: rank, scale, dropout, keys
adapters.safetensors      `model.layers.0.self_attn.q_proj.lora_a`, inputs x rank; `lora_b`, rank x outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from peft import LoraConfig

from trietune.errors import UserError
from trietune.io import strict_json
from trietune.io.safetensors import from_numpy, serialize
from trietune.model.handover.gguf_files import adapted_part

ADAPTER_FILE = "adapters.safetensors"


def mlx_files(config: LoraConfig, tensors: Mapping[str, np.ndarray], *, num_layers: int) -> dict[str, bytes]:
    """The two files.

    Args:
        tensors: as PEFT names them, float32.
        num_layers: layers of the base model.

    Raises:
        UserError: an adapter on something else than linear layers of blocks.
    """
    turned: dict[str, Any] = {}
    keys = set()
    for name, values in tensors.items():
        base_name, part = adapted_part(name)
        module = base_name.removesuffix(".weight")
        pieces = module.split(".", 3)
        if pieces[:2] != ["model", "layers"]:
            raise UserError(
                f"mlx-lm takes no adapter on `{module}`", where="it adapts the layers of blocks", next_step="--merge"
            )
        keys.add(pieces[3])
        turned[f"{module}.{part}"] = from_numpy(np.ascontiguousarray(values.T))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    document = {
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": config.r, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        "model": config.base_model_name_or_path,
    }
    return {
        "adapter_config.json": strict_json.serialize(document),
        ADAPTER_FILE: serialize(turned, metadata={"format": "mlx"}),
    }
