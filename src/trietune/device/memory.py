"""How much memory a micro-batch takes, and how many positions fit: behind `max_tokens_per_micro_batch: auto`.

The formulas follow what the layers keep for their backward pass; `benchmarks/memory.py` holds them against real peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Numbers that a fused layer keeps a position, in the base's dtype: two residuals and two normed inputs; gate, up and
# their product; and, counted by heads, queries, keys, values and attention's output.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 4, 3
# What the backward pass of one layer takes on top while it runs, alike.
PASSING_HIDDEN, PASSING_INTERMEDIATE, PASSING_SCORES = 6, 3, 2
# Layers of transformers and of PEFT, as a multiple of fused ones. Over a base of 16 bits they keep copies in fp32 of
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
# The backward pass of a scan takes this part of what it has kept on top.
PASSING_SCAN = 0.5
# What is left for the optimizer, the next micro-batch and the rest of the machine.
USABLE_SHARE = 0.6

SMALLEST_BOUND = 256
# Beyond this, products are as efficient as they get, and steps stay responsive to signals.
LARGEST_BOUND = 16_384

# How PyTorch's allocators, oneDNN and XLA word it where they raise a plain RuntimeError; in lower case.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "out of memory",
    "out_of_memory",
    "resource_exhausted",
    "not enough memory",
)
# The whole of what oneDNN says where it got no memory for the code of a product. Of shapes that it does not support it
# says "could not create a primitive descriptor for ...".
_WITHOUT_PRIMITIVE = "could not create a primitive"


@dataclass(frozen=True, slots=True)
class Widths:
    """What a position is in a network: the numbers that its layers keep of it.

    Attributes:
        hidden: width of the residual stream.
        layers: blocks of the decoder.
        kept: numbers that all layers' products read and write a position, the residual stream left out.
        widest: numbers that the backward pass of the widest layer takes on top.
        heads: query heads of a layer, of the most that any has.
        vocabulary: logits of a position.
        scanned: bytes that the scans of layers with a state keep of a position, in all layers.
        widest_scan: the same of the layer that keeps most.
    """

    hidden: int
    layers: int
    kept: int
    widest: int
    heads: int
    vocabulary: int
    scanned: int = 0
    widest_scan: int = 0


def widths_of(config: object, network: nn.Module | None = None) -> Widths:
    """From the configuration where it describes gated MLPs and attention by heads, else by counting tensors.

    Args:
        config: the text config of a causal model of transformers.
        network: a network of that configuration, with or without weights; if None, what the config lacks is assumed.
    """
    hidden = _whole(config, "hidden_size")
    intermediate = _whole(config, "intermediate_size")
    layers, heads = _whole(config, "num_hidden_layers"), _whole(config, "num_attention_heads")
    key_heads = _whole(config, "num_key_value_heads") or heads
    vocabulary = _whole(config, "vocab_size")
    is_plain = None not in (hidden, intermediate, layers, heads, vocabulary) and not _has_experts(network)
    if network is not None and not is_plain:
        return _count_widths(network, layers=layers, heads=heads, vocabulary=vocabulary)
    # Without a network, what is missing has the proportions that most models have.
    hidden = hidden or 1024
    heads = heads or max(hidden // 64, 1)
    key_heads = key_heads or heads
    head_size = _whole(config, "head_dim") or max(hidden // heads, 1)
    intermediate = intermediate or 4 * hidden
    kept = 2 * (heads + key_heads) * head_size + KEPT_INTERMEDIATE * intermediate
    passing = PASSING_INTERMEDIATE * intermediate
    return Widths(hidden, layers or 24, (layers or 24) * kept, passing, heads, vocabulary or 2**16)


def _whole(config: object, name: str) -> int | None:
    """A number that holds for all layers: the largest, where a configuration lists one for each."""
    value = getattr(config, name, None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [item for item in value if isinstance(item, int)]
        return max(numbers, default=0) or None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _has_experts(network: nn.Module | None) -> bool:
    return network is not None and any(p.dim() == 3 and p.shape[0] > 1 and p.shape[1] > 1 for p in network.parameters())


def _count_widths(network: Any, *, layers: int | None, heads: int | None, vocabulary: int | None) -> Widths:
    """Every matrix of the layers reads its inputs and writes its outputs; of experts, as many as a token is sent to."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    outside = {id(p) for module in (head, embedding) if isinstance(module, nn.Module) for p in module.parameters()}
    table: Any = getattr(embedding, "weight", None)
    num_rows, hidden = (int(table.shape[0]), int(table.shape[-1])) if table is not None else (2**16, 0)
    config = network.config.get_text_config()
    sent_to = max((_whole(config, name) or 1 for name in _EXPERTS_PER_TOKEN), default=1)
    by_layer: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2 or id(parameter) in outside or ".lora_" in name:
            continue
        times = min(sent_to, len(parameter)) if parameter.dim() == 3 else 1
        numbers = times * int(sum(parameter.shape[-2:]))
        layer = ".".join(
            name.split(".")[: 1 + next((n for n, part in enumerate(name.split(".")) if part.isdigit()), 0)]
        )
        by_layer[layer] = by_layer.get(layer, 0) + numbers
    # One tensor that several layers share (Zamba) is computed by each.
    repeated = max((layers or 1) // max(len(by_layer), 1), 1)
    widest = max(by_layer.values(), default=1)
    return Widths(
        hidden=max(hidden, 1),
        layers=layers or len(by_layer) or 1,
        kept=repeated * sum(by_layer.values()) or 1,
        widest=widest,
        heads=heads or max(hidden // 64, 1),
        vocabulary=vocabulary or num_rows,
    )


# What configurations call the number of experts that compute a token.
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k", "top_k_experts",
    "moe_router_topk",
)  # fmt: skip


def bytes_per_position(
    config: Any,
    dtype: torch.dtype,
    *,
    network: nn.Module | None = None,
    widths: Widths | None = None,
    scores_per_position: float = ASSUMED_SCORES,
    labels_per_position: float = ASSUMED_LABELS,
    gradient_checkpointing: bool = False,
    is_fused: bool = True,
) -> int:
    """An estimate of what one position of a micro-batch takes at the peak of its forward and backward.

    Args:
        config: the text config of a causal model of transformers.
        network: whose tensors are counted where the configuration does not say how wide its layers are.
        widths: as `widths_of` gives them, instead of both.
        scores_per_position: keys that a query is multiplied with, whose probabilities are kept; 0 for attention that
            keeps none.
        labels_per_position: positions' share that goes through the output head.
        gradient_checkpointing: only the inputs of layers are kept.
        is_fused: layers run as functions with a backward of their own (`fused_layers`).
    """
    size = torch.finfo(dtype).bits // 8
    found = widths or widths_of(config, network)
    hidden, layers = found.hidden, found.layers
    scores = SCORES_PADDING * found.heads * scores_per_position
    kept = found.kept / layers
    layer = KEPT_HIDDEN * hidden + kept + scores
    passing = PASSING_HIDDEN * hidden + found.widest + PASSING_SCORES * scores
    if not is_fused:
        more = UNFUSED_16_BITS if size == 2 else UNFUSED
        layer, passing = more * layer, more * passing
    # The last layer of fused ones computes labeled positions only.
    whole_layers = layers - 1 + labels_per_position if is_fused else layers
    bytes_a_logit = size + LOG_PROBABILITY_BYTES * (2 if size == 2 else 1)
    logits = bytes_a_logit * labels_per_position * found.vocabulary
    of_passing = passing * size + PASSING_SCAN * found.widest_scan
    if gradient_checkpointing:
        # Logits are there when only inputs are kept; a layer is computed again when the logits have gone.
        inputs = INPUT_WITH_HOLES * layers * hidden * size
        return int(ALLOCATOR * (inputs + max(logits, layer * size + found.widest_scan + of_passing)))
    return int(ALLOCATOR * (whole_layers * layer * size + found.scanned + max(logits, of_passing)))


def micro_batch_bound(free_bytes: int, position_bytes: int) -> int:
    """Positions that fit into `free_bytes`, in steps of 128, within sensible limits."""
    fitting = int(USABLE_SHARE * free_bytes / position_bytes) // 128 * 128
    return max(SMALLEST_BOUND, min(fitting, LARGEST_BOUND))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because memory could not be had: on the device, or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return said.strip() == _WITHOUT_PRIMITIVE or any(text in said for text in OUT_OF_MEMORY)


def release_cached_memory() -> None:
    """Give back what PyTorch keeps of freed memory, so that pieces of other sizes can be had."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
