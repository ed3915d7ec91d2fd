"""How much memory a micro-batch takes, and how many positions fit: behind `max_tokens_per_micro_batch: auto`.

The formulas follow what the layers keep for their backward; `benchmarks/memory.py` holds them against real peaks.
"""

from __future__ import annotations

from typing import Any

import torch

# Numbers that a fused layer keeps a position, in the base's dtype: two residuals and two normed inputs; gate, up and
# their product; and, counted by heads, queries, keys, values and attention's output.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 4, 3
# What the backward of one layer takes on top while it runs, alike.
PASSING_HIDDEN, PASSING_INTERMEDIATE, PASSING_SCORES = 6, 3, 2
# Layers of the library and of PEFT, as a multiple of fused ones. Over a base of 16 bits they keep copies in fp32 of
# what goes into norms and adapters.
UNFUSED, UNFUSED_16_BITS = 1.2, 2.0
# Rows and paths are padded to the lengths of a bucket.
SCORES_PADDING = 1.2
# A label's log-probabilities in fp32, beside its logits in the base's dtype; those of 16 bits are copied to fp32 first.
LOG_PROBABILITY_BYTES = 4
# With checkpointing, each kept input ends between freed tensors; as a multiple of the inputs, holes included.
INPUT_WITH_HOLES = 2.5
# What the allocator and the libraries take on top: holes between tensors, reordered weights, the batch's own arrays.
ALLOCATOR = 1.15
# For work whose batches have not been looked at.
ASSUMED_SCORES, ASSUMED_LABELS = 300, 0.35
# What is left for the optimizer, the next micro-batch and the rest of the machine.
USABLE_SHARE = 0.6

SMALLEST_BOUND = 256
# Beyond this, products are as efficient as they get, and steps stay responsive to signals.
LARGEST_BOUND = 16_384

# How PyTorch's allocators, oneDNN and XLA word it where they raise a plain RuntimeError; in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "out_of_memory", "resource_exhausted")


def bytes_per_position(
    config: Any,
    dtype: torch.dtype,
    *,
    scores_per_position: float = ASSUMED_SCORES,
    labels_per_position: float = ASSUMED_LABELS,
    gradient_checkpointing: bool = False,
    is_fused: bool = True,
) -> int:
    """An estimate of what one position of a micro-batch takes at the peak of its forward and backward.

    Args:
        config: the text config of a causal model of transformers.
        scores_per_position: keys that a query is multiplied with, whose probabilities are kept; 0 for attention that
            keeps none.
        labels_per_position: positions' share that goes through the output head.
        gradient_checkpointing: only the inputs of layers are kept.
        is_fused: layers run as functions with a backward of their own (`fused_layers`).
    """
    size = torch.finfo(dtype).bits // 8
    hidden, intermediate, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    attended = 2 * (config.num_attention_heads + key_heads) * head_size
    scores = SCORES_PADDING * config.num_attention_heads * scores_per_position
    layer = KEPT_HIDDEN * hidden + attended + KEPT_INTERMEDIATE * intermediate + scores
    passing = PASSING_HIDDEN * hidden + PASSING_INTERMEDIATE * intermediate + PASSING_SCORES * scores
    if not is_fused:
        more = UNFUSED_16_BITS if size == 2 else UNFUSED
        layer, passing = more * layer, more * passing
    # The last layer of fused ones computes labelled positions alone.
    whole_layers = layers - 1 + labels_per_position if is_fused else layers
    bytes_a_logit = size + LOG_PROBABILITY_BYTES * (2 if size == 2 else 1)
    logits = bytes_a_logit * labels_per_position * config.vocab_size
    if gradient_checkpointing:
        # Logits are there when only inputs are kept; a layer is computed again when the logits have gone.
        inputs = INPUT_WITH_HOLES * layers * hidden * size
        return int(ALLOCATOR * (inputs + max(logits, (layer + passing) * size)))
    return int(ALLOCATOR * (whole_layers * layer * size + max(logits, passing * size)))


def micro_batch_bound(free_bytes: int, position_bytes: int) -> int:
    """Positions that fit into `free_bytes`, in steps of 128, within sensible limits."""
    fitting = int(USABLE_SHARE * free_bytes / position_bytes) // 128 * 128
    return max(SMALLEST_BOUND, min(fitting, LARGEST_BOUND))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because memory could not be had: on the device, or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def release_cached_memory() -> None:
    """Give back what PyTorch keeps of freed memory, so that pieces of other sizes can be had."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
