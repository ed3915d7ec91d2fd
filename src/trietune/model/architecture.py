"""How an architecture takes a trie: as nodes, where every layer lets its attention be replaced, or on whole rows.

As nodes, a trie changes what a position attends to and nothing else. Where something besides attention carries from
token to token (a state, a convolution), or attention is not reachable, the network runs on whole rows. Refused is what
depends on chance, or on how long the rest of a call is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from trietune.model.decoder_layers import decoder_of
from trietune.model.states import carries_states
from trietune.model.states.probe import refuse_mixing

# Tries give the gradients of padded rows for these; a test a family, with windows, soft-capping and grouped heads.
TESTED_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")

_ATTENTION_LAYERS = ("full_attention", "sliding_attention")
# Their angles depend on the longest position of the call, which differs between a trie and padded rows.
_CALL_DEPENDENT_ROPE = ("dynamic", "longrope")

_PROBE = "trietune-probe"
# Arguments that change the result and that the plain attention of a layer's own file does not take either, so that no
# rung of the self-check's ladder computes them: biases by distance.
_NOT_COMPUTED = ("position_bias", "attention_bias", "alibi")


def check_architecture(network: PreTrainedModel) -> str | None:
    """Why tries cannot be computed with this network, as the end of a sentence; None if they can.

    What is asked here no proof can see: it depends on chance or on the rest of a call.

    Args:
        network: with weights or without (on the device `meta`), its adapter not yet in place.
    """
    config = network.config.get_text_config()
    family = str(network.config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        return f"`{family}` has an encoder, and its decoder attends to it"
    if getattr(config, "attention_dropout", 0.0):
        return f"`{family}` is configured with dropout on attention weights"
    if getattr(config, "output_router_logits", False):
        return f"`{family}` adds a loss for its experts, which counts tokens and not labels"
    return None


def why_whole_rows(network: PreTrainedModel) -> str | None:
    """Why tries must run on whole rows from the start, as the end of a sentence; None lets the proof decide.

    With the proof off nothing else stands between such a network and wrong numbers.

    Args:
        network: as above.
    """
    config = network.config.get_text_config()
    family = str(network.config.model_type)
    if carries_states(network):
        return refuse_mixing(network)
    layers = set(getattr(config, "layer_types", None) or ())
    if other := sorted(layers - set(_ATTENTION_LAYERS)):
        return f"`{family}` has layers of the kind `{other[0]}`, which a trie's own attention does not support"
    if getattr(network, "_is_stateful", False):
        return f"`{family}` has state-space layers, which carry a state from token to token"
    is_known = family in TESTED_FAMILIES
    if not is_known and (
        not getattr(network, "_supports_attention_backend", False) or not _attends_through_the_interface(network)
    ):
        return f"`{family}` computes attention in its own way, which cannot be replaced"
    return None


def longest_of_one_rope(config: Any) -> int | None:
    """Tokens up to which rotary angles depend on nothing but the position; None where they never depend on more.

    With the scalings `dynamic` and `longrope`, a call with a longer row rotates all of its rows by other angles.

    Args:
        config: the text config of a causal model of transformers.
    """
    found = []
    for one in _ropes(config):
        if str(one.get("rope_type", "default")) in _CALL_DEPENDENT_ROPE:
            most = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            found.append(int(most or config.max_position_embeddings))
    return min(found, default=None)


def _attends_through_the_interface(given: PreTrainedModel) -> bool:
    """Run a copy without weights on four tokens, with an attention that only takes notes.

    Layers that compute attention themselves never call it, and some call it without passing on what the decoder was
    given: with a trie they would attend to everything, and say nothing.
    """
    notes: list[dict[str, object]] = []
    mark = object()

    def take_notes(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        notes.append(kwargs)
        batch, num_heads, length, _ = query.shape
        return query.new_empty(batch, length, num_heads, value.shape[-1]), None

    AttentionInterface.register(_PROBE, take_notes)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    with torch.device("meta"):
        # A copy of the configuration too: it is where a network keeps how it attends.
        network: Any = type(given)(copy.deepcopy(given.config))
        tokens = torch.zeros(1, 4, dtype=torch.long)
        try:
            network.set_attn_implementation(_PROBE)
            decoder_of(network)(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                trie_layout=mark,
            )
            num_expected = int(network.config.get_text_config().num_hidden_layers)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError):
            # Experts are chosen by values, which a copy without weights has none of: the first layer tells enough.
            num_expected = max(1, len(notes))
    has_more = any(note.get(name) is not None for note in notes for name in _NOT_COMPUTED)
    return sum(note.get("trie_layout") is mark for note in notes) == num_expected and not has_more


def _ropes(config: object) -> list[dict[str, Any]]:
    """The parameters of rotary scaling; a configuration has one set, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
