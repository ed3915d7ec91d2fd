"""Which way a trie attends on a device: the best one whose kernel takes the model, and one clause why not a better one.

varlen   variable-length flash attention          flex   FlexAttention under a mask of blocks
mask     one product under a mask of all pairs     rows   products of rows and paths, in plain PyTorch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trietune.device.device import AttentionNeeds, Device
from trietune.errors import UserError

# Positions up to which a mask of all pairs is read faster than rows are cut: 4 MB of it, for all layers.
SMALL_TRIE = 2048
# Of a micro-batch whose bound is not known yet.
ANY_NUMBER_OF_POSITIONS = 2**31

HALF_PRECISION = (torch.bfloat16, torch.float16)
# The flash kernels' limits, as PyTorch's own choice between kernels checks them.
LARGEST_FLASH_HEAD, FLASH_HEAD_STEP = 256, 8
LEAST_FLASH_CAPABILITY = (8, 0)
# Cards with 100 KB of shared memory have no flash backward for these heads (wider ones do: they take another kernel).
SMALL_CARDS = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
HEADS_WITHOUT_BACKWARD = range(193, 225)

LEAST_TRITON_CAPABILITY = (7, 0)
SMALLEST_FLEX_HEAD, LARGEST_FLEX_HEAD = 16, 256
# FlexAttention's backward pass keeps four blocks of 128 heads at a time; wider ones run out of a small GPU's memory
# (pytorch/pytorch issues 133254, 198228).
WIDE_HEAD, WIDE_HEAD_BYTES = 128, 160 * 1024


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """What decides which kernels a GPU runs.

    Attributes:
        capability: compute capability.
        shared_memory_bytes: what one block of threads can ask for.
        has_flash: whether this build of PyTorch has flash attention.
        has_triton: whether what compiles FlexAttention is installed.
    """

    capability: tuple[int, int]
    shared_memory_bytes: int
    has_flash: bool = True
    has_triton: bool = True


def choose_backend(asked: str, device: Device, needs: AttentionNeeds, *, where: str) -> tuple[str, str | None]:
    """How tries attend, and why not in the device's best way (None if they do, or if it was asked for).

    Args:
        asked: value of `attention`; `auto` takes the first way of the device that takes the model.

    Raises:
        UserError: a way that was asked for by name is not the device's, or does not take the model.
    """
    if asked != "auto":
        if refusal := _refusal(asked, device, needs):
            kind, _ = choose_backend("auto", device, needs, where=where)
            raise UserError(
                f"`attention: {asked}` does not run here: {refusal}",
                where=where,
                next_step=f"`--set attention=auto`, which uses `{kind}` on this device",
            )
        return asked, None
    refusals: list[str] = []
    for kind in device.attentions:
        refusal = _refusal(kind, device, needs)
        if refusal is None and kind == "mask" and needs.num_positions > SMALL_TRIE and len(device.attentions) > 1:
            refusal = f"it pays off only for micro-batches of up to {SMALL_TRIE:,} tokens"
        if refusal is None:
            return kind, "; ".join(refusals) or None
        refusals.append(f"not {kind}: {refusal}")
    raise AssertionError(f"every device has a way that takes any model; {device.name} has {device.attentions}")


def unsupported_reason(card: CudaDevice, kind: str, needs: AttentionNeeds) -> str | None:
    """Why the kernel of `kind` does not support this model on this GPU; None if it does."""
    match kind:
        case "varlen":
            return _flash_refuses(card, needs)
        case "flex":
            return _flex_refuses(card, needs)
        case _:
            return None


def _refusal(kind: str, device: Device, needs: AttentionNeeds) -> str | None:
    if kind not in device.attentions:
        kernel = "its kernel runs on CUDA" if kind in ("varlen", "flex") else "it needs another device"
        return f"{kernel}, and this run is on {device.name}"
    return device.refuses_attention(kind, needs)


def _flash_refuses(card: CudaDevice, needs: AttentionNeeds) -> str | None:
    if not card.has_flash:
        return "this build of PyTorch has no flash attention"
    if card.capability < LEAST_FLASH_CAPABILITY:
        return f"it needs compute capability 8.0, and this GPU has {_dotted(card.capability)}"
    if needs.has_soft_cap:
        return "it does not support soft-capping"
    if needs.dtype not in HALF_PRECISION:
        return f"it computes in bfloat16 and float16, not in {str(needs.dtype).removeprefix('torch.')}"
    if needs.head_size > LARGEST_FLASH_HEAD or needs.head_size % FLASH_HEAD_STEP:
        return f"it supports head sizes that are multiples of 8 up to 256, not {needs.head_size}"
    if needs.head_size in HEADS_WITHOUT_BACKWARD and card.capability in SMALL_CARDS:
        return f"on this GPU it has no backward pass for head size {needs.head_size}"
    return None


def _flex_refuses(card: CudaDevice, needs: AttentionNeeds) -> str | None:
    if not card.has_triton:
        return "it is compiled by Triton, which is not installed"
    if card.capability < LEAST_TRITON_CAPABILITY:
        return f"Triton needs compute capability 7.0, and this GPU has {_dotted(card.capability)}"
    if not SMALLEST_FLEX_HEAD <= needs.head_size <= LARGEST_FLEX_HEAD:
        return f"it supports head sizes from 16 to 256, not {needs.head_size}"
    if needs.head_size > WIDE_HEAD and card.shared_memory_bytes < WIDE_HEAD_BYTES:
        return (
            f"its backward pass needs more shared memory for head size {needs.head_size} than this GPU has "
            f"({card.shared_memory_bytes // 1024} KB)"
        )
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
