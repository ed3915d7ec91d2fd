"""A base model from a local folder into memory.

Weights come only from safetensors and code only from transformers: what a folder brings as Python is never run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from trietune.device.device import recompute
from trietune.device.memory import is_out_of_memory
from trietune.errors import StopRequested, UserError
from trietune.io.causes import first_line, lacks_threads
from trietune.model.base.folder import ModelFolder, read_config
from trietune.model.base.four_bits import BYTES_PER_WEIGHT, is_quantized, loading_options

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def load_network(
    folder: ModelFolder,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_in_4bit: bool = False,
    report: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """The causal language model of `folder`, in evaluation mode, all weights in `dtype` on `device`.

    Args:
        load_in_4bit: linear layers are held in 4 bits and compute in `dtype`; see `four_bits.check_four_bits`.

    Raises:
        UserError: needs code of its own, is not a causal language model, is quantized, lacks weights, is damaged, does
            not fit into memory.
    """
    if dtype not in SUPPORTED_DTYPES:
        raise UserError(f"a base model cannot be held in {dtype}", next_step="dtype: bfloat16   (or float32)")
    check_config(folder)
    _check_memory(folder.path, dtype, device, load_in_4bit)
    try:
        with quiet_library(), reading_config(folder):
            loaded: Any = auto_class(_model_type(folder)).from_pretrained(
                folder.path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # counted below, with the name of the first
                **(loading_options(dtype, device) if load_in_4bit else {}),
            )
        network, info = loaded
        if not load_in_4bit:
            network.to(device)
    except SafetensorError as error:
        raise UserError(
            f"the weights of `{folder.name}` are damaged: {error}",
            where=str(folder.path),
            next_step="download or copy them again"
            if folder.source != "gguf"
            else f"delete {folder.path}, then run again",
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(folder.path, dtype, device, load_in_4bit) from error
    check_loaded(folder, info, report)
    network.train(False)
    return network  # type: ignore[no-any-return]  # transformers gives a pair when it is asked for one


def auto_class(model_type: str) -> Any:
    """The class of transformers that loads a type: of text alone, or of text beside images and sounds."""
    is_text = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if is_text else AutoModelForMultimodalLM


def _model_type(folder: ModelFolder) -> str:
    return str(read_config(folder.path)["model_type"])


@contextmanager
def reading_config(folder: ModelFolder) -> Iterator[None]:
    """Turn whatever a library raises over a folder's config.json into a `UserError` that names the file.

    Each architecture reads some forty keys in code of its own, without looking at their kinds first; what that raises
    is any class of error. Lack of memory, which is nobody's mistake, passes.
    """
    try:
        yield
    except (UserError, MemoryError, StopRequested, SafetensorError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or lacks_threads(error):
            raise
        raise UserError(
            f"the configuration of `{folder.name}` describes no network that can be built: "
            f"{type(error).__name__}: {first_line(error)[:300]}",
            where=str(folder.path / "config.json"),
            next_step="take config.json from the page that the weights come from; if it is from there, please report "
            "this with the model's name",
        ) from error


def check_config(folder: ModelFolder) -> None:
    """Raise `UserError` unless `folder` holds a causal language model that this transformers can load as it is."""
    raw: dict[str, object] = read_config(folder.path)
    family = raw["model_type"]
    text = raw.get("text_config")
    both_ways = [one.get("use_bidirectional_attention") for one in (raw, text) if isinstance(one, dict)]
    if any(way in (True, "all") for way in both_ways):  # "vision": only for images
        raise UserError(
            f"`{folder.name}` is not a causal language model: it attends in both directions",
            where="config.json: use_bidirectional_attention",
            next_step="choose one that generates text from left to right, such as Gemma, Llama, Qwen or Mistral",
        )
    asked = raw.get("quantization_config")
    if asked is not None:
        method = asked.get("quant_method", "an unnamed method") if isinstance(asked, dict) else "an unnamed method"
        raise UserError(
            f"the weights of `{folder.name}` are quantized ({method}); TrieTune trains on plain weights",
            next_step="take the model that this one was made from, often the same name without the suffix",
        )
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return
    if raw.get("auto_map"):
        raise UserError(
            f"`{folder.name}` needs Python code from its own folder, and TrieTune runs none that comes with weights",
            where=f"config.json: model_type `{family}`, auto_map",
            next_step="choose a model whose architecture transformers has, for example Gemma, Llama, Qwen or Mistral",
        )
    try:
        with reading_config(folder):
            AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except UserError as error:
        if not isinstance(error.__cause__, ValueError):
            raise
        raise UserError(
            f"the installed transformers does not know the architecture `{family}` of `{folder.name}`",
            next_step="pip install --upgrade transformers",
        ) from None
    raise UserError(
        f"`{folder.name}` is not a model that generates text: transformers has no such class for `{family}`",
        where="config.json: model_type",
        next_step="choose one that generates text from left to right, such as Gemma, Llama, Qwen or Mistral",
    )


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep transformers' bars and its report on weights off the terminal: what matters in it is raised by us."""
    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_memory(folder: Path, dtype: torch.dtype, device: torch.device, load_in_4bit: bool) -> None:
    """Refuse before the machine begins to swap: Linux ends a process without a word where others raise."""
    if device.type not in ("cpu", "cuda"):
        return
    if _needed_bytes(folder, dtype, load_in_4bit) > _available_bytes(device):
        raise _too_large(folder, dtype, device, load_in_4bit)


def _too_large(folder: Path, dtype: torch.dtype, device: torch.device, load_in_4bit: bool) -> UserError:
    needed = f"{_needed_bytes(folder, dtype, load_in_4bit) / 1e9:.1f} GB"
    where = f"{_available_bytes(device) / 1e9:.1f} GB are free on {device}" if device.type in ("cpu", "cuda") else None
    held, is_small = ("4 bits", True) if load_in_4bit else (_name(dtype), dtype.itemsize <= 2)
    smaller = "a smaller model" if is_small else "dtype: bfloat16   (half the memory), or a smaller model"
    return UserError(f"the model needs {needed} for its weights alone in {held}", where=where, next_step=smaller)


def _needed_bytes(folder: Path, dtype: torch.dtype, load_in_4bit: bool) -> int:
    """Bytes of all weights once they are in `dtype` or 4 bits, from the headers of their files."""
    shapes = (shape for file in folder.glob("*.safetensors") for shape in _shapes(file).items())
    return int(
        sum(
            _count(shape) * (BYTES_PER_WEIGHT if load_in_4bit and is_quantized(name, shape) else dtype.itemsize)
            for name, shape in shapes
        )
    )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"`{file}` is damaged or only partly downloaded: {error}",
            where=f"{file.stat().st_size:,} bytes",
            next_step="download or copy it again",
        ) from error


def _count(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_loaded(folder: ModelFolder, info: dict[str, Any], report: Callable[[str], None]) -> None:
    """transformers fills what a file lacks with random numbers, and continues."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing or mismatched:
        what = f"lack {len(missing)} tensors of" if missing else f"have {len(mismatched)} tensors of other shapes than"
        raise UserError(
            f"the weights of `{folder.name}` {what} the model that its config.json describes",
            where=f"the first is `{missing[0] if missing else mismatched[0][0]}`",
            next_step="take config.json and weights from the same place and revision",
        )
    if unexpected := sorted(info["unexpected_keys"]):
        report(f"{len(unexpected)} tensors of {folder.name} belong to no part of the model, e.g. {unexpected[0]}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def enable_checkpointing(network: PreTrainedModel, recompute: Callable[..., object] = recompute) -> None:
    """Compute activations a second time in the backward pass, layer by layer, by `recompute` (`Device.recompute`)."""
    # transformers 5.20 renamed it.
    enable: Any = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    parameter = next(name for name in inspect.signature(enable).parameters if name.endswith("checkpointing_kwargs"))
    enable(**{parameter: {"use_reentrant": False}})
    layers: Iterator[Any] = network.modules()
    for layer in layers:
        if hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = recompute
