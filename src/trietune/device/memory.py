"""How many positions fit into memory at once: the bound behind `max_tokens_per_micro_batch: auto`."""

from __future__ import annotations

from typing import Any

import torch

# Activations kept for the backward, in numbers a position and layer: inputs of norms and projections, the normed
# copies in fp32, rotary products, attention's output, and the MLP's gate, up and product.
HIDDEN_COPIES = 16
INTERMEDIATE_COPIES = 6
# Logits in the model's dtype, in fp32, and their gradient, for the share of positions that carry a label.
LOGIT_BYTES = 12
LABELLED_SHARE = 0.35
# What is left for the optimizer, the next micro-batch and the rest of the machine.
USABLE_SHARE = 0.6

SMALLEST_BOUND = 256
# Beyond this, products are as efficient as they get, and steps stay responsive to signals.
LARGEST_BOUND = 16_384

# How PyTorch's allocators, oneDNN and XLA word it where they raise a plain RuntimeError; in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "out of memory", "out_of_memory", "resource_exhausted")


def bytes_per_position(config: Any, dtype: torch.dtype, *, gradient_checkpointing: bool) -> int:
    """An estimate of what one position of a micro-batch takes, forward and backward.

    Args:
        config: the text config of a causal model of transformers.
    """
    size = torch.finfo(dtype).bits // 8
    layer = (HIDDEN_COPIES * config.hidden_size + INTERMEDIATE_COPIES * config.intermediate_size) * size
    layers = config.num_hidden_layers
    kept = layer + layers * config.hidden_size * size if gradient_checkpointing else layers * layer
    return int(kept + LABELLED_SHARE * LOGIT_BYTES * config.vocab_size)


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
