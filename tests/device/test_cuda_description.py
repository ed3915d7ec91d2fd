"""What a card says of itself, from PyTorch's answers about cards that are not here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from trietune.device import cuda
from trietune.device.device import AttentionNeeds

GEMMA = AttentionNeeds(head_size=256, dtype=torch.bfloat16, has_soft_cap=False, num_positions=4096)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers of an H100, and what PyTorch was asked to do."""
    asked: dict[str, Any] = {}
    properties = SimpleNamespace(
        major=9, minor=0, shared_memory_per_block_optin=227 * 1024, shared_memory_per_block=48 * 1024
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: asked.update(cudnn=on))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.update(history=options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: asked.update(snapshot=path))
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    asked["properties"] = properties
    return asked


def test_an_h100(calls: dict[str, Any], tmp_path: Path) -> None:
    device = cuda.describe_cuda()
    assert device.name == "NVIDIA H100"
    assert device.torch_device == torch.device("cuda")
    assert device.attentions[0] == "varlen"
    assert device.refuses_attention("varlen", GEMMA) is None
    assert device.refuses_attention("flex", GEMMA) is None
    assert device.fastest_dtype() == torch.bfloat16
    assert device.free_memory_bytes() == 70 * 2**30
    assert device.used_memory_bytes() == 5 * 2**30
    assert calls["cudnn"] is False, "attention through cuDNN gives NaN under a mask"

    device.watch_memory()
    assert calls["history"]["context"] is None, "lines of code cost too much at each allocation"
    assert calls["history"]["max_entries"] == cuda.MEMORY_EVENTS
    assert device.write_memory_snapshot(tmp_path / "memory_snapshot.pickle")
    assert calls["snapshot"] == str(tmp_path / "memory_snapshot.pickle")


def test_a_card_without_bf16_and_with_little_shared_memory(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    calls["properties"].major, calls["properties"].minor = 7, 5
    device = cuda.describe_cuda()
    assert torch.bfloat16 not in device.dtypes
    assert device.fastest_dtype() == torch.float16
    assert "8.0" in str(device.refuses_attention("varlen", GEMMA))
    assert "Triton" in str(device.refuses_attention("flex", GEMMA))


def test_compilations_are_counted_from_the_first_on(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.describe_cuda()
    monkeypatch.setitem(counters, "stats", {"unique_graphs": 0})
    assert device.compilations() is None
    monkeypatch.setitem(counters, "stats", {"unique_graphs": 3})
    assert device.compilations() == 3


def test_rows_are_copied_from_pinned_memory_without_waiting(calls: dict[str, Any]) -> None:
    done: list[Any] = []

    class Array:
        def pin_memory(self) -> Array:
            done.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> Array:
            done.append((device.type, non_blocking))
            return self

    place = cuda.describe_cuda().to_device
    assert place is not None
    place(Array())  # type: ignore[arg-type]
    assert done == ["pinned", ("cuda", True)]
