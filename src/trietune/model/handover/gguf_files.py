"""GGUF files: a whole model, or an adapter; written, and read back as what transformers would hold.

llama.cpp multiplies an adapter by `lora_alpha / rank` and knows nothing of rsLoRA. So the scale goes into the weights
(`fold_scale`), and `lora_alpha` equals the rank.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

from trietune.errors import UserError
from trietune.model.handover.gguf_names import GgufNames
from trietune.model.handover.gguf_tokenizer import GgufTokenizer

Quantization = Literal["f32", "bf16", "f16", "q8_0", "q4_k_m"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
_LARGEST_F16 = 65504.0
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer with what surrounds it; `adds_bos` makes llama.cpp put `bos_id` before every text."""

    tokenizer: GgufTokenizer
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str


def write_model(
    file: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    names: GgufNames,
    config: Mapping[str, object],
    vocabulary: Vocabulary,
    *,
    quantization: Quantization,
    title: str,
) -> None:
    """Write a whole model.

    Args:
        tensors: name in transformers and float32 values; one at a time, since a model may be large.
        config: `config.json` of the model, with `rope_parameters`.

    Raises:
        UserError: a value that f16 cannot hold, or `q4_k_m` without llama.cpp's own program.
    """
    quantize_by = find_quantizer() if quantization == "q4_k_m" else None
    kind = "f16" if quantization == "q4_k_m" else quantization
    target = file.with_suffix(".f16.gguf") if quantize_by else file
    writer = gguf.GGUFWriter(target, names.architecture, use_temp_file=True)
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(_FILE_TYPES[kind])
    _write_shape(writer, names, config)
    _write_vocabulary(writer, vocabulary)
    if (factors := _llama3_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, values in tensors:
        _add_tensor(writer, names.name(name), names.stored(name, values), kind)
    _close(writer)
    if quantize_by:
        done = subprocess.run([quantize_by, target, file, "Q4_K_M"], capture_output=True, text=True, check=False)  # noqa: S603
        target.unlink()
        if done.returncode or not file.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"llama.cpp's `llama-quantize` failed: {last}", next_step="--quantize q8_0")


def find_quantizer() -> str:
    """The path of `llama-quantize`. Raises `UserError` if llama.cpp is not installed."""
    found = shutil.which("llama-quantize")
    if found is None:
        raise UserError(
            "`--quantize q4_k_m` is done by llama.cpp's own `llama-quantize`, which is not installed here",
            next_step="install llama.cpp, or take `--quantize q8_0`, which needs no other program",
        )
    return found


def write_adapter(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    names: GgufNames,
    *,
    rank: int,
    quantization: Quantization,
    title: str,
) -> None:
    """Write an adapter whose scale is in its weights already.

    Args:
        tensors: as PEFT names them, float32.

    Raises:
        UserError: an adapter on a part that llama.cpp does not adapt.
    """
    writer = gguf.GGUFWriter(file, names.architecture)
    writer.add_type("adapter")
    writer.add_name(title)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, values in sorted(tensors.items()):
        base_name, part = adapted_part(name)
        stored = names.stored(base_name, values) if part == "lora_b" else values
        # Rows of a few numbers are not blocks: such an adapter is small, and f16 keeps it exact enough.
        kind = "f16" if quantization in ("q8_0", "q4_k_m") else quantization
        _add_tensor(writer, f"{names.name(base_name)}.{part}", stored, kind)
    _close(writer)


def adapted_part(name: str) -> tuple[str, str]:
    """(`model.layers.0.self_attn.q_proj.weight`, `lora_a`) of PEFT's name. Raises `UserError` for other tensors."""
    for ending, part in ((_LORA_A, "lora_a"), (_LORA_B, "lora_b")):
        if name.endswith(ending):
            base_name = name.removesuffix(ending).removeprefix(_PEFT_PREFIX)
            if base_name.endswith("lm_head"):
                break
            return f"{base_name}.weight", part
    raise UserError(
        f"llama.cpp takes no adapter on `{name.removeprefix(_PEFT_PREFIX)}`",
        where="it adapts the linear layers of blocks",
        next_step="--merge, which makes a whole model of it",
    )


def read_back(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file as float32, under its own name."""
    reader = gguf.GGUFReader(file)
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        found[str(tensor.name)] = values.reshape(shape)
    return found


# llama.cpp's `llama_ftype`
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def _write_shape(writer: Any, names: GgufNames, config: Mapping[str, Any]) -> None:
    writer.add_block_count(names.num_layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(names.num_heads)
    writer.add_head_count_kv(names.num_key_heads)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    head_size = int(config.get("head_dim") or config["hidden_size"] // names.num_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if names.architecture == "llama":
        writer.add_rope_dimension_count(head_size)
    _write_rope(writer, config.get("rope_parameters") or {})
    if names.architecture == "gemma2":
        writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    if names.architecture in ("gemma2", "gemma3"):
        if cap := config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(cap))
        writer.add_sliding_window(int(config["sliding_window"]))


def _write_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    if local := (rope.get("sliding_attention") or {}).get("rope_theta"):
        writer.add_rope_freq_base_swa(float(local))
    rope = rope.get("full_attention") or rope
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(float(rope["factor"]))
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if rope.get(key) is not None:
                    add(float(rope[key]))
        case _:
            pass


def _llama3_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """By what each rotary frequency of Llama 3.1 is divided; the formula of transformers' `rope_type: llama3`."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, size, 2) / size)
    wavelengths = 2 * np.pi / frequencies
    old = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (old / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divided = np.where(wavelengths < old / high, 1.0, np.where(wavelengths > old / low, factor, between))
    return divided.astype(np.float32)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.has_space_prefix)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.eos_id is not None:
        writer.add_eos_token_id(vocabulary.eos_id)
        writer.add_add_eos_token(False)
    turn_ends = [number for number in vocabulary.stop_ids if number != vocabulary.eos_id]
    if turn_ends:
        writer.add_eot_token_id(turn_ends[0])
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    # llama.cpp keeps vectors in f32 whatever the file's format is.
    is_blocked = values.ndim > 1 and values.shape[-1] % 32 == 0
    if values.ndim == 1 or kind == "f32":
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    elif kind == "bf16":
        data = quantize(values, gguf.GGMLQuantizationType.BF16)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif kind == "q8_0" and is_blocked:
        data = quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        if float(np.abs(values).max(initial=0.0)) > _LARGEST_F16:
            raise UserError(f"f16 cannot hold the values of `{name}`", next_step="--quantize bf16")
        writer.add_tensor(name, values.astype(np.float16))


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
