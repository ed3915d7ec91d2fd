"""What a model will be, from its config only: no weight is read, so mistakes are found before the slow part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from trietune.device.memory import Widths, widths_of
from trietune.model.adapter.adapter import add_adapter
from trietune.model.adapter.targets import Coverage, measure_coverage
from trietune.model.architecture import check_architecture, longest_of_one_rope, why_whole_rows
from trietune.model.base.folder import ModelFolder
from trietune.model.base.four_bits import BYTES_PER_WEIGHT, is_quantized
from trietune.model.base.load import auto_class, check_config, reading_config
from trietune.model.base.randomness import rates_in_attention, rates_of, silence_rates
from trietune.model.states import carries_states
from trietune.model.states.memory import with_scans

# GPT-2's `wpe`; `embed_positions`, `position_embeddings` and their like.
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Counts of a network with its adapter, and whether a trie can be computed with it.

    Attributes:
        config: its text config, of transformers.
        num_parameters: parameters of the base model, tied ones counted once.
        num_trainable: parameters of the adapter.
        num_in_layers: parameters of the base model's linear layers below the output head.
        num_embeddings: rows of the input embedding.
        has_learnt_positions: whether each position has a vector of its own, so that there are no more of them.
        refusal: why tries cannot be computed, as the end of a sentence; None if they can.
        why_whole_rows: why they run on whole rows, alike; None if they need not.
        carries_states: whether tries hand states on from node to node.
        longest_in_a_trie: tokens of the longest row that tries compute as a row by itself; None if there is no end.
        widths: widths of its layers, for the memory estimate.
        coverage: which part of its layers carries adapters.
        base_rates: rates of its own dropout and noise, by name.
        adapts_parameters: whether adapters are on parameters themselves, such as stacks of experts.
    """

    config: Any
    num_parameters: int
    num_trainable: int
    num_in_layers: int
    refusal: str | None
    widths: Widths
    coverage: Coverage
    base_rates: Mapping[str, float]
    why_whole_rows: str | None = None
    carries_states: bool = False
    longest_in_a_trie: int | None = None
    num_embeddings: int = 0
    has_learnt_positions: bool = False
    adapts_parameters: bool = False

    def num_bytes(self, dtype: torch.dtype, *, load_in_4bit: bool = False) -> int:
        """Of the base model's weights in `dtype`, its layers in 4 bits if asked."""
        in_layers = BYTES_PER_WEIGHT if load_in_4bit else dtype.itemsize
        return int((self.num_parameters - self.num_in_layers) * dtype.itemsize + self.num_in_layers * in_layers)


def describe_network(
    base: ModelFolder, *, dtype: torch.dtype, adapter: Mapping[str, Any], base_dropout: bool = False
) -> NetworkShape:
    """Build the network without weights, put the adapter on it, and count.

    Args:
        adapter: keyword arguments of `add_adapter`.
        base_dropout: whether the base's own dropout stays on.

    Raises:
        UserError: the model needs code of its own, is quantized or no causal language model, or the adapter's targets
            are not in it.
    """
    check_config(base)
    with reading_config(base):
        config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            network = auto_class(config.model_type).from_config(config, dtype=dtype, trust_remote_code=False)
            base_rates = rates_of(network)
            dropped = rates_in_attention(network)
            if not base_dropout:
                silence_rates(network)
            refusal = check_architecture(network)
            on_rows = why_whole_rows(network)
            has_states = on_rows is None and carries_states(network)
            if base_dropout and dropped:
                name, rate = next(iter(dropped.items()))
                refusal = f"`base_dropout: True` keeps its dropout on attention weights (`{name}: {rate:g}`)"
            num_embeddings = int(network.get_input_embeddings().weight.shape[0])
            has_learnt_positions = any(
                isinstance(module, torch.nn.Embedding) and _POSITIONS.search(name)
                for name, module in network.named_modules()
            )
            num_parameters = sum(p.numel() for p in network.parameters())
            num_in_layers = sum(
                p.numel() for name, p in network.named_parameters() if is_quantized(name, tuple(p.shape))
            )
            config = network.config.get_text_config()
            widths = with_scans(widths_of(config, network), network)
            peft_model = add_adapter(network, base=base, **adapter)
    num_trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return NetworkShape(
        config=config,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        num_in_layers=num_in_layers,
        refusal=refusal,
        why_whole_rows=on_rows,
        carries_states=has_states,
        longest_in_a_trie=longest_of_one_rope(config),
        widths=widths,
        coverage=measure_coverage(network),
        base_rates=base_rates,
        num_embeddings=num_embeddings,
        has_learnt_positions=has_learnt_positions,
        adapts_parameters=any(
            bool(getattr(config, "target_parameters", None)) for config in peft_model.peft_config.values()
        ),
    )
