"""PyTorch tensors as the bytes of a safetensors file, and back, without the library's own file writing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trietune.checkpoints.tensors import RawTensor, parse, serialise

_SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A whole safetensors file; equal tensors give equal bytes."""
    return serialise({name: to_raw(tensor) for name, tensor in tensors.items()}, metadata={"format": "pt"})


def bytes_to_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the host. Raises `TensorError` for what is not one."""
    return {name: from_raw(raw) for name, raw in parse(data)[0].items()}


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """A copy of the tensor's bytes: training goes on while they are hashed and written."""
    plain = tensor.detach().to("cpu", copy=True).contiguous()
    data = plain.view(-1).view(torch.uint8).numpy().data
    return RawTensor(_SAFETENSORS_DTYPES[plain.dtype], tuple(plain.shape), data)


def from_raw(raw: RawTensor) -> torch.Tensor:
    """A tensor of its own with the bytes of `raw`."""
    data = raw.data() if callable(raw.data) else raw.data
    if not raw.size_bytes:
        return torch.empty(raw.shape, dtype=_TORCH_DTYPES[raw.dtype])
    array = np.frombuffer(data, dtype=np.uint8).copy()
    return torch.from_numpy(array).view(_TORCH_DTYPES[raw.dtype]).view(raw.shape)
