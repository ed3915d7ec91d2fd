"""Where a model meets its proof: on what data, up to what length, and what a run says of it.

training      tokens of the data; the longest example of training and validation
evaluation    the examples that are measured
questions     random tokens, as long as the longest window that a question exceeds
static shapes on the host, before the network goes to its device, under the masks that the device will use
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from trietune.device.memory import bytes_per_position, micro_batch_bound
from trietune.io.json_types import JsonObject
from trietune.model.causal_lm import TrieModel
from trietune.model.proof import prove, random_forests, training_forests
from trietune.model.proof.forests import BEYOND_A_WINDOW, SHORT_WIDTH
from trietune.model.proof.ladder import LONG
from trietune.run.device_plan import largest_under_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trietune.config.settings import Settings
    from trietune.model.causal_lm import TrieModel
    from trietune.model.proof import Proof
    from trietune.run.prepared import Prepared
    from trietune.tracking.tracker import Tracker
    from trietune.trie import Batching, Sequences

Say = Callable[[str], None]

# Distinct tokens at the beginning of the data below which random ones are taken instead.
FEWEST_DISTINCT, SAMPLED_TOKENS = 16, 4096


def prove_on_data(
    model: TrieModel,
    sequences: Sequences,
    others: Sequences | None,
    *,
    batching: Batching,
    with_gradients: bool,
    free_bytes: int,
    say: Say,
) -> Proof | None:
    """Prove `model` on tokens of `sequences` and on the longest example of both; None if there is no token.

    Raises:
        UserError: it cannot be computed as the run would.
    """
    if not len(sequences.input_ids):
        return None
    most_tokens = most_proven(model.config, free_bytes)
    short, longest = training_forests(
        sequences, others, batching=batching, most_tokens=most_tokens, device=model.device
    )
    if len(np.unique(np.asarray(sequences.input_ids[:SAMPLED_TOKENS]))) < FEWEST_DISTINCT:
        # Where all tokens are alike, unknown ones say, a wrong mask or position changes nothing, and proves nothing.
        short, longest = random_forests(model.vocabulary_size, longest.longest, device=model.device)
    return _tell(prove(model, short, longest, family=str(model.config.model_type), with_gradients=with_gradients), say)


def prove_training(prepared: Prepared, model: TrieModel, free_bytes: int, tracker: Tracker) -> Proof | None:
    """Prove a model that is trained as `prepared` says, gradients included."""
    return prove_on_data(
        model,
        prepared.data.train,
        prepared.data.validation,
        batching=prepared.plan.batching,
        with_gradients=True,
        free_bytes=free_bytes,
        say=tracker.info,
    )


def prove_before_device(prepared: Prepared, network: PreTrainedModel, tracker: Tracker) -> Proof | None:
    """Layers are proven before a device of static shapes takes them: there each pass would be compiled."""
    device = prepared.plan.device
    if not (device.has_static_shapes and prepared.settings.self_check and prepared.plan.num_steps):
        return None
    free_bytes = device.free_memory_bytes()
    return prove_on_host(network, lambda model: prove_training(prepared, model, free_bytes, tracker), say=tracker.info)


def prove_for_length(model: TrieModel, longest: int, *, free_bytes: int, say: Say) -> Proof:
    """Prove values of `model` on random tokens, up to the longest window that rows of `longest` tokens exceed."""
    length = min(length_to_prove(model.config, longest), most_proven(model.config, free_bytes))
    short, long = random_forests(model.vocabulary_size, length, device=model.device)
    return _tell(prove(model, short, long, family=str(model.config.model_type), with_gradients=False), say)


def prove_on_host(network: Any, prove_it: Callable[[TrieModel], Proof | None], *, say: Say) -> Proof | None:
    """Prove `network` where it is, under masks, before it goes to a device of static shapes.

    Args:
        prove_it: one of the two above, of a model.
    """
    before = network.config._attn_implementation
    model = TrieModel(network, device=network.device, attention="mask")
    model.may_lay_out_rows = False
    try:
        proof = prove_it(model)
    finally:
        network.set_attn_implementation(before)
    say("the layers were proven on the host, before they were compiled for this device")
    return proof


def windows_of(config: Any) -> list[int]:
    """Every whole number of a configuration that may bound how far a position sees, ascending."""
    names = ("window", "chunk", "original_max_position")
    found: set[int] = set()

    def look(values: JsonObject) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                look(value)
            elif isinstance(value, int) and not isinstance(value, bool) and any(part in name for part in names):
                found.add(value)

    look(config.to_dict())
    return sorted(value for value in found if value > 1)


def length_to_prove(config: object, longest: int) -> int:
    """A row that exceeds every window that rows of `longest` tokens exceed, and no longer than need be."""
    exceeded = [window for window in windows_of(config) if window < longest]
    return max([2 * SHORT_WIDTH, *(window + BEYOND_A_WINDOW for window in exceeded)])


def most_proven(config: object, free_bytes: int) -> int:
    """Tokens of the longest row whose plain attention fits into a part of the memory: three rows, in fp32."""
    share, rows, copies = 0.25, 3, 3
    a_score = 4 * rows * copies * int(getattr(config, "num_attention_heads", 1))
    return max(LONG, int(np.sqrt(share * free_bytes / a_score)))


def positions_under_masks(settings: Settings, config: object, dtype: Any, free_bytes: int, *, trains: bool) -> int:
    """Positions of the largest micro-batch where some layers attend under a mask of all pairs."""

    checkpointing = settings.gradient_checkpointing or not trains
    position_bytes = partial(bytes_per_position, config, dtype, gradient_checkpointing=checkpointing, is_fused=False)
    return largest_under_mask(settings, free_bytes, position_bytes)


def positions_on_rows(settings: Settings, model: TrieModel, free_bytes: int, *, gradient_checkpointing: bool) -> int:
    """Positions of whole rows, padding included, that are computed at once, or that the settings ask for."""
    asked = settings.max_tokens_per_micro_batch
    if asked != "auto":
        return asked
    position_bytes = bytes_per_position(
        model.config,
        model.network.dtype,  # type: ignore[arg-type]  # of transformers, which is untyped
        network=model.network,
        gradient_checkpointing=gradient_checkpointing,
        is_fused=False,
    )
    return micro_batch_bound(free_bytes, position_bytes)


def _tell(proof: Proof, say: Say) -> Proof:
    for line in proof.lines:
        say(line)
    return proof
