"""What llama.cpp calls the parts of a model that transformers names otherwise, and how it stores them.

    model.layers.0.self_attn.q_proj.weight   ->   blk.0.attn_q.weight, its rows in another order (Llama)
    model.norm.weight                        ->   output_norm.weight, one added (Gemma)

The rules are those of llama.cpp's own converter (`conversion/llama.py`, `gemma.py`, `qwen.py`, `base.py`), for the
families that TrieTune trains. Another family is refused by name: a file that opens and answers nonsense is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from trietune.errors import UserError

# model_type of transformers -> architecture of llama.cpp
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# llama.cpp takes every sixth layer of Gemma 3, and every second one of Gemma 2, as the one without a window.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6}
# Layers of the only models whose scores llama.cpp scales by hidden size and heads instead of the head's size.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True, slots=True)
class GgufNames:
    """Names and forms of one model's tensors in a GGUF file.

    Attributes:
        architecture: as llama.cpp calls it.
        num_heads, num_key_heads: heads of attention; rows of queries and keys are reordered by them.
        notes: what llama.cpp will do otherwise than transformers, in whole sentences.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_key_heads: int
    notes: tuple[str, ...]

    def name(self, of_transformers: str) -> str:
        """`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`. Raises `UserError` if it has none."""
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        found = gguf.get_tensor_name_map(kinds[self.architecture], self.num_layers).get_name(
            of_transformers, try_suffixes=(".weight", ".bias")
        )
        if found is None:
            raise UserError(
                f"llama.cpp has no place for `{of_transformers}` in an architecture `{self.architecture}`",
                next_step="--to transformers --merge, which takes every part of a model",
            )
        return str(found)

    def stored(self, of_transformers: str, values: np.ndarray) -> np.ndarray:
        """The tensor as llama.cpp wants it: float32 in, float32 out."""
        if self._is_reordered(of_transformers):
            return _reorder(values, self._heads(of_transformers))
        if self._is_norm_less_one(of_transformers):
            return values + np.float32(1)
        return values

    def restored(self, of_transformers: str, values: np.ndarray) -> np.ndarray:
        """The opposite of `stored`."""
        if self._is_reordered(of_transformers):
            return _order_back(values, self._heads(of_transformers))
        if self._is_norm_less_one(of_transformers):
            return values - np.float32(1)
        return values

    def _is_reordered(self, name: str) -> bool:
        return self.architecture == "llama" and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj")

    def _heads(self, name: str) -> int:
        return self.num_key_heads if ".k_proj." in name else self.num_heads

    def _is_norm_less_one(self, name: str) -> bool:
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")


def names_for(config: Mapping[str, Any]) -> GgufNames:
    """The names for the model that a `config.json` describes.

    Raises:
        UserError: a family, or a form of one, that llama.cpp would compute in another way.
    """
    family = str(config.get("model_type"))
    architecture = ARCHITECTURES.get(family)
    if architecture is None:
        raise _unknown(f"its family is `{family}`", f"GGUF files are written for {', '.join(ARCHITECTURES)}")
    num_layers, num_heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    _check_windows(architecture, config)
    _check_scale(architecture, config)
    rope = config.get("rope_parameters") or {}
    kind = (rope.get("full_attention") or rope).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise _unknown(f"its positions are scaled by `{kind}`", "known are linear, llama3 and yarn")
    if architecture == "gemma3" and config.get("attn_logit_softcapping"):
        raise _unknown("it caps its scores", "llama.cpp does not, in Gemma 3")
    window = config.get("sliding_window")
    has_window = bool(window) and (
        family == "mistral" or (family == "qwen2" and bool(config.get("use_sliding_window")))
    )
    notes = (
        (f"llama.cpp has no sliding window for this family: texts beyond {window:,} tokens get other answers there",)
        if has_window
        else ()
    )
    return GgufNames(architecture, num_layers, num_heads, int(config.get("num_key_value_heads") or num_heads), notes)


def _check_windows(architecture: str, config: Mapping[str, Any]) -> None:
    every, kinds = _WINDOW_PATTERNS.get(architecture), config.get("layer_types")
    if every is None or not kinds:
        return
    expected = ["full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(len(kinds))]
    if list(kinds) != expected:
        raise _unknown(
            "its layers with a window are not where llama.cpp expects them",
            f"one in {every} has none there, whatever `layer_types` says",
        )


def _check_scale(architecture: str, config: Mapping[str, Any]) -> None:
    if architecture not in _LAYERS_OF_27B:
        return
    head_size = int(config["head_dim"])
    if int(config["num_hidden_layers"]) == _LAYERS_OF_27B[architecture]:
        head_size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    if config.get("query_pre_attn_scalar", head_size) != head_size:
        raise _unknown(
            f"its scores are scaled by `query_pre_attn_scalar: {config['query_pre_attn_scalar']}`",
            f"llama.cpp scales those of this architecture by {head_size}",
        )


def _unknown(why: str, known: str) -> UserError:
    return UserError(
        f"llama.cpp cannot compute this model as it was trained: {why}",
        where=known,
        next_step="--to transformers, vllm or mlx",
    )


def _reorder(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Pairs of rotary dimensions lie side by side in llama.cpp, and a half apart in transformers."""
    shape = (num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape))


def _order_back(rows: np.ndarray, num_heads: int) -> np.ndarray:
    shape = (num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape))
