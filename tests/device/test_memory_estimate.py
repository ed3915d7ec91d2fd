"""The estimate of a micro-batch's memory against what autograd really keeps, and the bound that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from causal_types.small_models import small_config, small_network
from strategies import question_batch
from trietune.device.memory import (
    LARGEST_BOUND,
    SMALLEST_BOUND,
    bytes_per_position,
    is_out_of_memory,
    micro_batch_bound,
    widths_of,
)
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.norms_and_mlps import fuse_network
from trietune.trie import make_micro_batches
from trietune.trie.batch_stats import measure_work

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCABULARY = 500
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


def build(dtype: torch.dtype, *, fused: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)  # type: ignore[arg-type]
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear")).get_base_model()  # type: ignore[arg-type]
    if fused:
        assert fuse_network(adapted).prunes_last  # type: ignore[arg-type]
    return adapted.train()  # type: ignore[operator]


def kept_bytes(model: TrieModel, micro_batch: Any) -> int:
    """Of all tensors that a forward keeps for its backward pass, each storage once, weights and layout left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype.is_floating_point:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.label_losses(micro_batch)
    assert losses.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_covers_what_is_kept_and_not_much_more(dtype: torch.dtype, fused: bool) -> None:
    sequences = question_batch(np.random.default_rng(2), vocabulary=VOCABULARY, paragraphs=6, scale=4)
    [micro_batch] = make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=10**6)
    network = build(dtype, fused=fused)
    model = TrieModel(network, device=torch.device("cpu"), prunes_last=fused)
    work = measure_work([micro_batch])
    estimate = work.num_positions * bytes_per_position(
        network.config,
        dtype,
        scores_per_position=work.scores_per_position,
        labels_per_position=work.labels_per_position,
        is_fused=fused,
    )
    kept = kept_bytes(model, micro_batch)
    # The peak is higher than what is kept by what one layer's backward takes.
    assert 1.0 < estimate / kept < 1.8, f"estimate {estimate:,}, kept {kept:,}"


def test_work_is_counted() -> None:
    sequences = question_batch(np.random.default_rng(2), vocabulary=VOCABULARY)
    indices = np.arange(len(sequences))
    [one] = make_micro_batches(sequences, indices, batching="trie", max_positions=10**6)
    work = measure_work([one])
    assert (work.num_positions, work.largest) == (one.num_positions, one.num_positions)
    assert work.num_labels == len(one.labels)
    assert work.num_tokens == one.num_tokens
    assert one.trie is not None
    paths = np.repeat(np.diff(one.trie.row_path_start), np.diff(one.trie.row_start))
    assert work.num_scores == paths.sum()
    rows = make_micro_batches(sequences, indices, batching="padded", max_positions=60)
    padded = measure_work(rows)
    assert padded.largest == max(row.input_ids.size for row in rows)
    assert padded.num_scores == sum(row.input_ids.size * row.input_ids.shape[1] for row in rows)
    assert measure_work([]).scores_per_position == 0


@pytest.mark.parametrize("larger", [{"labels_per_position": 0.9}, {"scores_per_position": 900.0}, {"is_fused": False}])
def test_more_work_takes_more_and_checkpointing_less(larger: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    plain = bytes_per_position(config, torch.bfloat16)
    assert bytes_per_position(config, torch.bfloat16, **larger) > plain
    assert bytes_per_position(config, torch.bfloat16, gradient_checkpointing=True) < plain / 2
    assert bytes_per_position(config, torch.float32) > plain


def test_the_bound_follows_free_memory_within_limits() -> None:
    assert micro_batch_bound(10**9, 10**6) == 512
    assert micro_batch_bound(-5, 10**6) == SMALLEST_BOUND
    assert micro_batch_bound(10**13, 10**6) == LARGEST_BOUND


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"), True),
        (RuntimeError("Bad StatusOr access: RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_allocators_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# ---- configurations that do not say how wide their layers are -----------------------------------------------------

# No `intermediate_size`, other names for everything, a list of sizes, no heads, experts.
UNKNOWN = ["gpt2", "mpt", "opt", "mamba", "rwkv", "gemma3n_text", "jamba", "olmoe", "gpt_oss", "qwen3_next", "ctrl"]


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_configuration_that_is_not_known_is_estimated_from_tensors(model_type: str) -> None:
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(small_config(model_type))
    config = network.config.get_text_config()
    widths = widths_of(config, network)
    assert (widths.hidden, widths.layers, widths.vocabulary) == (32, 2, 120)
    position = bytes_per_position(config, torch.float32, network=network, is_fused=False)
    assert position > 4 * 2 * (4 * 32 + widths.kept / 2)
    assert bytes_per_position(config, torch.float32, network=network, gradient_checkpointing=True) < position
    assert bytes_per_position(config, torch.float32) > 0


@pytest.mark.parametrize("model_type", ["gpt2", "olmoe"])
def test_what_is_counted_covers_what_is_kept(model_type: str) -> None:
    from pathlib import Path

    from trietune.model.adapter.adapter import add_adapter
    from trietune.model.base.folder import ModelFolder
    from trietune.model.base.randomness import silence_rates

    network = small_network(model_type, vocab_size=VOCABULARY)
    silence_rates(network)
    widths = widths_of(network.config, network)
    add_adapter(network, r=4, alpha=8, base=ModelFolder(Path(), "x", "folder"))
    sequences = question_batch(np.random.default_rng(2), vocabulary=VOCABULARY, paragraphs=4, scale=3)
    [micro_batch] = make_micro_batches(sequences, np.arange(len(sequences)), batching="trie", max_positions=10**6)
    model = TrieModel(network.train(), device=torch.device("cpu"))
    work = measure_work([micro_batch])
    estimate = work.num_positions * bytes_per_position(
        network.config,
        torch.float32,
        widths=widths,
        scores_per_position=work.scores_per_position,
        labels_per_position=work.labels_per_position,
        is_fused=False,
    )
    ratio = estimate / kept_bytes(model, micro_batch)
    assert 0.8 < ratio < 3.0, f"{ratio:.2f}"


def test_a_list_of_widths_counts_as_its_largest() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPE)  # type: ignore[arg-type]
    plain = bytes_per_position(config, torch.float32)
    config.__dict__["intermediate_size"] = [128, 256, 256]
    assert bytes_per_position(config, torch.float32) == plain
    config.__dict__["intermediate_size"] = None
    assert bytes_per_position(config, torch.float32) > 0
