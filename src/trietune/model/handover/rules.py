"""What each program takes, as a table of checks with their sources; what it does not take is refused by name.

Without these checks a reader either stops with a message about its own insides, or loads the adapter and answers as if
it had been trained less: llama.cpp takes rsLoRA's scale for `lora_alpha / r`, about five times too weak at rank 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from peft import LoraConfig

from trietune.errors import UserError

Target = Literal["transformers", "vllm", "mlx", "gguf", "ollama"]
TARGETS: tuple[str, ...] = get_args(Target)
# Values that `--max-lora-rank` of vLLM accepts: `vllm/config/lora.py`, MaxLoRARanks.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that an adapter may have and a program may not take.

    Attributes:
        what: the key in `adapter_config.json`.
        breaks: whether an adapter breaks the rule.
        targets: for which programs it holds.
        source: where the program says so.
    """

    what: str
    breaks: Callable[[LoraConfig], bool]
    targets: tuple[Target, ...]
    source: str


# Only for adapters that stay adapters: a merged model has none of these.
RULES = (
    Rule(
        "use_dora",
        lambda config: bool(config.use_dora),
        ("vllm", "mlx", "gguf", "ollama"),
        "vLLM, vllm/lora/peft_helper.py: `vLLM does not yet support DoRA`; llama.cpp, convert_lora_to_gguf.py: "
        "a tensor that is neither lora_A nor lora_B; mlx-lm, tuner/dora.py: its own parameters",
    ),
    Rule(
        "modules_to_save",
        lambda config: bool(config.modules_to_save),
        ("vllm", "mlx", "gguf", "ollama"),
        "vLLM, vllm/lora/peft_helper.py: `only supports modules_to_save being None`; llama.cpp, src/llama-adapter.cpp: "
        "`unexpected suffix`; mlx-lm, tuner/utils.py, load_adapters: `not an adapter parameter in the model`",
    ),
    Rule(
        "bias",
        lambda config: config.bias != "none",
        ("vllm", "mlx", "gguf", "ollama"),
        "vLLM, vllm/lora/peft_helper.py: `Adapter bias is not supported`; llama.cpp and mlx-lm: as modules_to_save",
    ),
    Rule(
        "rank_pattern",
        lambda config: bool(config.rank_pattern),
        ("mlx", "gguf", "ollama"),
        "mlx-lm, tuner/utils.py, linear_to_lora_layers: one `rank` for all; llama.cpp: one "
        "`adapter.lora.alpha` for all",
    ),
    Rule(
        "alpha_pattern",
        lambda config: bool(config.alpha_pattern),
        ("vllm", "mlx", "gguf", "ollama"),
        "vLLM, vllm/lora/peft_helper.py: the key is not read; mlx-lm: one `scale` for all; llama.cpp: one "
        "`adapter.lora.alpha` for all",
    ),
    Rule(
        "r",
        lambda config: config.r > VLLM_RANKS[-1],
        ("vllm",),
        "vLLM, vllm/config/lora.py: `max_lora_rank` is at most 512",
    ),
)

_PROGRAMS: dict[Target, str] = {
    "transformers": "transformers with PEFT",
    "vllm": "vLLM",
    "mlx": "mlx-lm",
    "gguf": "llama.cpp",
    "ollama": "Ollama",
}


def program(target: Target) -> str:
    """What the program is called."""
    return _PROGRAMS[target]


def check_rules(config: LoraConfig, target: Target, *, where: str) -> None:
    """Raise `UserError` for an adapter that the program of `target` does not take as it is."""
    for rule in RULES:
        if target in rule.targets and rule.breaks(config):
            raise UserError(
                f"{program(target)} does not take an adapter with `{rule.what}`, which `{where}` has",
                where=rule.source,
                next_step=f"the same command with --merge: a whole model works in {program(target)}",
            )


def needs_folding(config: LoraConfig, target: Target) -> bool:
    """Whether the scale must go into the weights: rsLoRA, or an alpha that is not whole, for a reader of neither.

    llama.cpp's `adapter.lora.alpha` is divided by the rank whatever `use_rslora` says (`src/llama-adapter.h`,
    get_scale), and Ollama's converter reads `lora_alpha` into a whole number (`convert/convert_adapter.go`).
    """
    return target in ("gguf", "ollama")


def vllm_rank(config: LoraConfig) -> int:
    """The smallest `--max-lora-rank` that takes this adapter."""
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    return next(rank for rank in VLLM_RANKS if rank >= max(ranks))
