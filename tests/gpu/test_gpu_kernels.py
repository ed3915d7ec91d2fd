"""Every way to attend gives the numbers of the formula: each head size, window and grouping of heads that models have.

A kernel in bf16 rounds in its own order. What is asked of it is that its error, against the formula in fp64, is of the
size of the error that the plain formula itself makes in bf16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.trie_examples import dense_attention, random_nodes, trie_of
from strategies import IGNORED, flat, question_batch
from trietune.device import choose_device
from trietune.device.device import AttentionNeeds
from trietune.model.attention.attend import attend, trie_attention
from trietune.model.attention.layout import TrieLayout
from trietune.trie import Trie

# Of the formula's own error in the same number format; kernels keep probabilities in bf16 where it keeps them in fp32.
SPREAD = 3.0
# Sums of products in fp32, but on cards whose products round their factors to 10 bits unless told otherwise.
FP32_TOLERANCE = 2e-5

# (query heads, key heads, head size) of SmolLM2-135M, Llama 3.2 1B, Mistral 7B (a part), Gemma 1.1 2B, Gemma 3 1B
HEADS = [(9, 3, 64), (32, 8, 64), (8, 2, 128), (8, 1, 256), (4, 1, 256)]
WINDOWS = [None, 1, 40, 512]


def needs(head_size: int, dtype: torch.dtype, softcap: float | None = None) -> AttentionNeeds:
    return AttentionNeeds(head_size, dtype, has_soft_cap=softcap is not None, num_positions=1024)


def skip_if_refused(way: str, device: torch.device, asked: AttentionNeeds) -> None:
    if device.type == "cuda" and (refusal := choose_device("cuda", use_tt=False).refuses_attention(way, asked)):
        pytest.skip(f"{way} on this card: {refusal}")


def attended(
    way: str, inputs: tuple[Tensor, Tensor, Tensor], trie: Trie, *, query_nodes: np.ndarray | None = None, **how: Any
) -> Tensor:
    """By `way`, as layers call it: [N, H, d]."""
    query, key, value = inputs
    layout = TrieLayout(
        trie,
        kind=way,  # type: ignore[arg-type]
        num_heads=query.shape[1],
        num_key_heads=key.shape[1],
        device=query.device,
        query_nodes=query_nodes,
    )
    if way != "mask":
        return attend(query, key, value, layout, **how, is_pruned=query_nodes is not None)
    library = (x.transpose(0, 1)[None] for x in inputs)
    out, _ = trie_attention(
        torch.nn.Module(),
        *library,
        None,
        scaling=how["scale"],
        sliding_window=how["window"],
        softcap=how["softcap"],
        trie_layout=layout,
    )
    return out[0]


def results(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and the three gradients, in fp64 on the host."""
    upper = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, inputs, upper))]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Of the worst of them, as a part of its size; one that is zero but for rounding is measured by the largest."""
    least = 1e-3 * max(float(e.norm()) for e in expected)
    return max(float((f - e).norm()) / max(float(e.norm()), least) for f, e in zip(found, expected, strict=True))


def on(device: torch.device, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.detach().to(device, dtype).requires_grad_() for x in inputs)
    return query, key, value


def compare(
    way: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    trie: Trie,
    *,
    window: int | None = None,
    softcap: float | None = None,
    prunes: bool = False,
) -> None:
    skip_if_refused(way, device, needs(heads[2], dtype, softcap))
    needed = np.unique(trie.label_index).astype(np.int64) if prunes else None
    drawn = random_nodes(
        trie.num_nodes,
        trie.num_nodes if needed is None else len(needed),
        heads=heads[:2],
        head_size=heads[2],
        dtype=dtype,
    )
    how: dict[str, Any] = {"window": window, "scale": heads[2] ** -0.5, "softcap": softcap}
    exact = on(torch.device("cpu"), drawn, torch.float64)
    expected = results(dense_attention(*exact, trie, **how, query_nodes=needed), exact)
    inputs = on(device, drawn, dtype)
    own = error(results(attended(way, inputs, trie, query_nodes=needed, **how), inputs), expected)
    if dtype == torch.float32:
        assert own < FP32_TOLERANCE, f"{way}: {own:.1e}"
        return
    plain = on(device, drawn, dtype)
    bound = error(results(dense_attention(*plain, trie, **how, query_nodes=needed), plain), expected)
    assert own < SPREAD * bound, f"{way}: {own:.1e}, the formula in {dtype}: {bound:.1e}"


def questions(seed: int = 3, scale: int = 8) -> Trie:
    return trie_of(question_batch(np.random.default_rng(seed), vocabulary=500, scale=scale))


def chain(length: int) -> Trie:
    """One sequence of `length` nodes and one more token."""
    tokens = [5 + i % 90 for i in range(length + 1)]
    return trie_of(flat([tokens], [[IGNORED] * length + tokens[-1:]]))


@pytest.mark.parametrize("prunes", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("way", ["varlen", "flex", "rows"])
def test_bf16(device: torch.device, way: str, heads: tuple[int, int, int], window: int | None, prunes: bool) -> None:
    compare(way, device, torch.bfloat16, heads, questions(), window=window, prunes=prunes)


@pytest.mark.parametrize("way", ["varlen", "flex", "rows", "mask"])
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 2, 128), (8, 1, 256)])
def test_fp16(device: torch.device, way: str, heads: tuple[int, int, int]) -> None:
    compare(way, device, torch.float16, heads, questions())


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", [(9, 3, 64), (8, 2, 128), (8, 1, 256)])
@pytest.mark.parametrize("way", ["flex", "rows", "mask"])
def test_fp32(device: torch.device, way: str, heads: tuple[int, int, int], window: int | None) -> None:
    compare(way, device, torch.float32, heads, questions(), window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["flex", "rows", "mask"])
def test_soft_capping(device: torch.device, way: str, dtype: torch.dtype) -> None:
    compare(way, device, dtype, (8, 4, 256), questions(), window=40, softcap=5.0)


def test_trap_1_masked_products_have_a_gradient_at_every_length(device: torch.device) -> None:
    """cuDNN's attention gives NaN on H100 where a length leaves 64 after division by 128; it is off."""
    if device.type == "cuda":
        choose_device("cuda", use_tt=False)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    for length in (63, 64, 65, 192, 320):
        compare("mask", device, torch.bfloat16, (8, 1, 256), chain(length))


@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_trap_2_what_is_not_refused_runs(device: torch.device, way: str) -> None:
    """The backward at the largest heads, over more keys than one block holds."""
    compare(way, device, torch.bfloat16, (8, 1, 256), chain(700))
    compare(way, device, torch.bfloat16, (8, 8, 128), chain(700))


def test_trap_4_new_lengths_compile_nothing(device: torch.device) -> None:
    """Two programs for all lengths, and gradients for those that are not a multiple of 128."""
    if device.type != "cuda":
        pytest.skip("the CPU compiles nothing; model/test_flex_attention.py counts programs there")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for seed, scale in enumerate((2, 9, 4, 16, 7)):
        compare("flex", device, torch.bfloat16, (9, 3, 64), questions(seed, scale))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("way", ["varlen", "flex", "rows"])
def test_trap_4_gradients_do_not_depend_on_strides(device: torch.device, way: str) -> None:
    """Inputs that are views of one projection, and a gradient that comes transposed (pytorch/pytorch issue 146377)."""
    trie = questions()
    drawn = random_nodes(trie.num_nodes, trie.num_nodes, heads=(4, 4), head_size=64, dtype=torch.float64)
    how: dict[str, Any] = {"window": None, "scale": 0.125, "softcap": None}
    found = []
    for is_strided in (False, True):
        inputs = on(device, drawn, torch.bfloat16)
        views = inputs
        if is_strided:
            joined = torch.cat(inputs, -1)
            views = tuple(joined[..., first : first + 64] for first in (0, 64, 128))  # type: ignore[assignment]
        out = attended(way, views, trie, **how)
        upper = torch.randn(4, trie.num_nodes, 64, generator=torch.Generator().manual_seed(2))
        upper = upper.to(device, torch.bfloat16).transpose(0, 1)
        grads = torch.autograd.grad(out, inputs, upper if is_strided else upper.contiguous())
        found.append([x.detach().double().cpu() for x in (out, *grads)])
    for strided, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(strided, plain, rtol=0, atol=0.05 * float(plain.abs().max()))
        assert error([strided], [plain]) < 0.01


@pytest.mark.parametrize("way", ["varlen", "flex", "rows", "mask"])
def test_trap_5_padding_gives_no_nan(device: torch.device, way: str) -> None:
    """From one node to just beyond a block: what pads a block sees something, and no gradient goes there."""
    skip_if_refused(way, device, needs(64, torch.bfloat16))
    for length in (1, 2, 127, 128, 129):
        trie = chain(length)
        inputs = on(
            device,
            random_nodes(length, length, heads=(9, 3), head_size=64, dtype=torch.float32),
            torch.bfloat16,
        )
        how: dict[str, Any] = {"window": None, "scale": 0.125, "softcap": None}
        for part in results(attended(way, inputs, trie, **how), inputs):
            assert part.isfinite().all(), f"{way}, {length} nodes"


@pytest.mark.parametrize("way", ["varlen", "rows"])
def test_equal_inputs_give_equal_gradients(device: torch.device, way: str) -> None:
    """No order of additions is left to chance, so that a resumed run can repeat a step bit by bit."""
    trie = questions()
    drawn = random_nodes(trie.num_nodes, trie.num_nodes, heads=(9, 3), head_size=64, dtype=torch.float32)
    how: dict[str, Any] = {"window": None, "scale": 0.125, "softcap": None}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(3):
            inputs = on(device, drawn, torch.bfloat16)
            runs.append(results(attended(way, inputs, trie, **how), inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))
