"""A base model whose linear layers are held in 4 bits (QLoRA, Dettmers et al. 2023), through bitsandbytes.

A weight is one of the 16 numbers that suit a normal distribution best (NF4), times the largest of its block of 64;
those are held in 8 bits, times the largest of theirs. Each product dequantizes the weights again in the compute dtype.
The adapter is what it always is, in fp32 beside them; embeddings, norms and the output head stay whole.
"""

from __future__ import annotations

import importlib.util

import torch

from trietune.device import Device
from trietune.errors import UserError

# 4 bits; 8 more for a block of 64; 32 more for 256 of those blocks.
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


def check_four_bits(device: Device, *, where: str) -> None:
    """Raise `UserError` unless bitsandbytes is installed and has kernels for `device`."""
    keep = "`--set load_in_4bit=False`, which holds the base model in `dtype`"
    if not device.runs_bitsandbytes:
        raise UserError(
            f"`load_in_4bit: True` needs a CUDA device, and this run is on {device.name}", where=where, next_step=keep
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "`load_in_4bit: True` needs bitsandbytes, which is not installed",
            where=where,
            next_step=f"pip install bitsandbytes, or {keep}",
        )


def loading_options(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Keyword arguments of `from_pretrained`: weights go to `device` one by one and are quantized there."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor of this name is held in 4 bits: matrices of all layers, neither embeddings nor the head."""
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name and "lm_head" not in name
