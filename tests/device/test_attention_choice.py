"""Which way to attend is taken on which card, for which model, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from trietune.device.cpu import describe_cpu
from trietune.device.device import AttentionNeeds, Device
from trietune.device.doctor import find_attention
from trietune.device.kernels import CudaDevice, choose_backend, unsupported_reason
from trietune.errors import UserError

KB = 1024
T4 = CudaDevice(capability=(7, 5), shared_memory_bytes=64 * KB)
RTX_4090 = CudaDevice(capability=(8, 9), shared_memory_bytes=99 * KB)
A100 = CudaDevice(capability=(8, 0), shared_memory_bytes=163 * KB)
H100 = CudaDevice(capability=(9, 0), shared_memory_bytes=227 * KB)

GEMMA = AttentionNeeds(head_size=256, dtype=torch.bfloat16, has_soft_cap=False, num_positions=4096)
GEMMA2 = replace(GEMMA, has_soft_cap=True)
LLAMA = replace(GEMMA, head_size=128)
SMOLLM2 = replace(GEMMA, head_size=64)


def on(card: CudaDevice) -> Device:
    """A device with this card's kernels; nothing is computed on it."""
    return replace(
        describe_cpu(),
        kind="cuda",
        name="a card",
        attentions=("varlen", "flex", "mask", "rows"),
        refuses_attention=partial(unsupported_reason, card),
    )


@pytest.mark.parametrize(
    ("card", "needs", "kind", "reason"),
    [
        (H100, GEMMA, "varlen", None),
        (A100, SMOLLM2, "varlen", None),
        (RTX_4090, GEMMA, "varlen", None),
        (H100, GEMMA2, "flex", "not varlen: it does not support soft-capping"),
        (
            RTX_4090,
            GEMMA2,
            "rows",
            "not varlen: it does not support soft-capping; not flex: its backward pass needs more shared "
            "memory for head size 256 than this GPU has (99 KB); not mask: it pays off only for micro-batches of up to "
            "2,048 tokens",
        ),
        (
            A100,
            replace(LLAMA, dtype=torch.float32),
            "flex",
            "not varlen: it computes in bfloat16 and float16, not in float32",
        ),
        (
            T4,
            replace(LLAMA, dtype=torch.float16),
            "flex",
            "not varlen: it needs compute capability 8.0, and this GPU has 7.5",
        ),
        (
            RTX_4090,
            replace(LLAMA, head_size=200),
            "rows",
            "not varlen: on this GPU it has no backward pass for head size 200; not flex: its backward pass needs more "
            "shared memory for head size 200 than this GPU has (99 KB); not mask: it pays off only for micro-batches "
            "of up to 2,048 tokens",
        ),
        (
            H100,
            replace(LLAMA, head_size=512, num_positions=1024),
            "mask",
            "not varlen: it supports head sizes that are multiples of 8 up to 256, not 512; not flex: it supports "
            "head sizes from 16 to 256, not 512",
        ),
        (
            replace(H100, has_flash=False, has_triton=False),
            LLAMA,
            "rows",
            "not varlen: this build of PyTorch has no flash attention; not flex: it is compiled by Triton, which is "
            "not installed; not mask: it pays off only for micro-batches of up to 2,048 tokens",
        ),
        (
            CudaDevice(capability=(6, 1), shared_memory_bytes=48 * KB),
            replace(LLAMA, dtype=torch.float32, num_positions=2048),
            "mask",
            "not varlen: it needs compute capability 8.0, and this GPU has 6.1; not flex: Triton needs "
            "compute capability 7.0, and this GPU has 6.1",
        ),
    ],
)
def test_the_best_way_that_takes_the_model(
    card: CudaDevice, needs: AttentionNeeds, kind: str, reason: str | None
) -> None:
    assert choose_backend("auto", on(card), needs, where="attention") == (kind, reason)


@pytest.mark.parametrize("asked", ["varlen", "flex", "mask", "rows"])
def test_a_way_that_was_asked_for_is_taken_without_a_word(asked: str) -> None:
    assert choose_backend(asked, on(H100), GEMMA, where="attention") == (asked, None)


def test_a_way_that_was_asked_for_and_does_not_take_the_model_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        choose_backend("varlen", on(H100), GEMMA2, where="sst2.yaml, line 3")
    assert refused.value.what == "`attention: varlen` does not run here: it does not support soft-capping"
    assert refused.value.where == "sst2.yaml, line 3"
    assert refused.value.next_step == "`--set attention=auto`, which uses `flex` on this device"


@pytest.mark.parametrize("asked", ["varlen", "flex"])
def test_ways_of_cuda_are_refused_on_a_cpu(asked: str) -> None:
    cpu = replace(describe_cpu(), name="CPU, 2 threads")
    with pytest.raises(UserError) as refused:
        choose_backend(asked, cpu, LLAMA, where="attention")
    assert refused.value.what == (
        f"`attention: {asked}` does not run here: its kernel runs on CUDA, and this run is on CPU, 2 threads"
    )
    assert refused.value.next_step == "`--set attention=auto`, which uses `rows` on this device"


def test_a_cpu_takes_rows_whatever_the_model() -> None:
    for needs in (GEMMA, GEMMA2, replace(LLAMA, dtype=torch.float32, num_positions=100)):
        assert choose_backend("auto", describe_cpu(), needs, where="attention") == ("rows", None)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        (describe_cpu(), "tries use `rows`"),
        (on(H100), "tries use `varlen`"),
        (on(T4), "tries use `flex` for heads of 64 and 128, `rows` for heads of 256"),
    ],
)
def test_doctor_names_the_ways(device: Device, text: str) -> None:
    assert find_attention(device).text == text
