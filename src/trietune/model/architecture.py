"""Which architectures take a trie: those whose every layer lets its attention be replaced, and whose logits are a head.

A trie changes what a position attends to, and what states it starts from. So an architecture is refused if anything else
carries from token to token, if attention or states are not reachable, or if anything depends on how many
rows or how long a call is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

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

    A family outside `TESTED_FAMILIES` passes if nothing in its configuration speaks against it and every one of its
    layers attends through the library's interface; the self-check, which proves each layer, has the last word.

    Args:
        network: with weights or without (on the device `meta`), its adapter not yet in place.
    """
    config = network.config
    family = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        return f"`{family}` has an encoder, and its decoder attends to it"
    if config.get_text_config() is not config:
        return f"`{family}` takes more than text, and masks its attention itself"
    has_states = carries_states(network)
    layers = set(getattr(config, "layer_types", None) or ())
    if not has_states and (other := sorted(layers - set(_ATTENTION_LAYERS))):
        return f"`{family}` has layers of the kind `{other[0]}`, which carry a state from token to token"
    if not has_states and getattr(network, "_is_stateful", False):
        return f"`{family}` has state-space layers, which carry a state from token to token"
    if not has_states and not getattr(network, "_supports_attention_backend", False):
        return f"`{family}` computes attention in its own way, which cannot be replaced"
    if (rope := _rope_types(config)) & set(_CALL_DEPENDENT_ROPE):
        kind = sorted(rope & set(_CALL_DEPENDENT_ROPE))[0]
        return f"`{family}` uses the rotary scaling `{kind}`, whose angles depend on the longest sequence of a call"
    if getattr(config, "attention_dropout", 0.0):
        return f"`{family}` is configured with dropout on attention weights"
    if getattr(config, "output_router_logits", False):
        return f"`{family}` adds a loss for its experts, which counts tokens and not labels"
    if has_states:
        return refuse_mixing(config)
    if family not in TESTED_FAMILIES and not _attends_through_the_interface(config):
        return f"`{family}` computes attention in its own way, which cannot be replaced"
    return None


def _attends_through_the_interface(config: Any) -> bool:
    """Run a copy without weights on four tokens, with an attention that only takes notes.

    Layers that compute attention themselves never call it, and some call it without passing on what the decoder was
    given: with a trie they would attend to everything, and say nothing.
    """
    notes: list[dict[str, Any]] = []
    mark = object()

    def take_notes(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        notes.append(kwargs)
        batch, num_heads, length, _ = query.shape
        return query.new_empty(batch, length, num_heads, value.shape[-1]), None

    AttentionInterface.register(_PROBE, take_notes)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    with torch.device("meta"):
        # A copy of the configuration too: it is where a network keeps how it attends.
        network: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), trust_remote_code=False
        )
        tokens = torch.zeros(1, 4, dtype=torch.long)
        try:
            network.set_attn_implementation(_PROBE)
            network.get_decoder()(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                trie_layout=mark,
            )
            num_expected = int(config.num_hidden_layers)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError):
            # Experts are chosen by values, which a copy without weights has none of: the first layer tells enough.
            num_expected = max(1, len(notes))
    has_more = any(note.get(name) is not None for note in notes for name in _NOT_COMPUTED)
    return sum(note.get("trie_layout") is mark for note in notes) == num_expected and not has_more


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling; a configuration has one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(one.get("rope_type", "default")) for one in nested}
