"""What a model will be, from its config alone: no weight is read, so mistakes are found before the slow part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trietune.model.adapter.adapter import add_adapter
from trietune.model.architecture import check_architecture
from trietune.model.base.four_bits import BYTES_A_WEIGHT, is_quantized
from trietune.model.base.load import check_config
from trietune.model.base.locate import ModelFolder


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Counts of a network with its adapter, and whether a trie can be computed with it.

    Attributes:
        config: its text config, of transformers.
        num_parameters: of the base model, tied ones once.
        num_trainable: of the adapter.
        num_in_layers: of the base model's parameters, those of linear layers below the output head.
        refusal: why tries cannot be computed, as the end of a sentence; None if they can.
    """

    config: Any
    num_parameters: int
    num_trainable: int
    num_in_layers: int
    refusal: str | None

    def num_bytes(self, dtype: torch.dtype, *, load_in_4bit: bool = False) -> int:
        """Of the base model's weights in `dtype`, its layers in 4 bits if asked."""
        in_layers = BYTES_A_WEIGHT if load_in_4bit else dtype.itemsize
        return int((self.num_parameters - self.num_in_layers) * dtype.itemsize + self.num_in_layers * in_layers)


def describe_network(base: ModelFolder, *, dtype: torch.dtype, adapter: Mapping[str, Any]) -> NetworkShape:
    """Build the network without weights, put the adapter on it, and count.

    Args:
        adapter: keyword arguments of `add_adapter`.

    Raises:
        UserError: the model needs code of its own, is quantized or no causal language model, or the adapter's targets
            are not in it.
    """
    check_config(base)
    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        refusal = check_architecture(network)
        num_parameters = sum(p.numel() for p in network.parameters())
        num_in_layers = sum(p.numel() for name, p in network.named_parameters() if is_quantized(name, tuple(p.shape)))
        peft_model = add_adapter(network, base=base, **adapter)
    num_trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return NetworkShape(network.config.get_text_config(), num_parameters, num_trainable, num_in_layers, refusal)
