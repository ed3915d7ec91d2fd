"""Keys that this build cannot honor: refused by name when they are set to something, never read and ignored.

The table is the whole list. Whoever builds one of the features deletes its lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trietune.config.problems import Problem
from trietune.config.settings import Settings
from trietune.config.yaml12 import write_value


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a value is refused, and what to write in its place. `applies` is True of the values that are refused."""

    applies: Callable[[object], bool]
    reason: str
    remedy: str


def _is_set(value: object) -> bool:
    return value not in (None, False, "", (), [], {})


NOT_YET: Mapping[str, Refusal] = {}

# Features that have a key of their own here, under another name.
ELSEWHERE: Mapping[str, Refusal] = {
    "custom_dataset": Refusal(
        _is_set,
        "its parts are keys of their own here",
        "write `train_file`, `validation_file`, `prompt_template` and `completion_template`",
    ),
    "prompt_format": Refusal(
        _is_set, "the text of a prompt is given itself here", "write `prompt_template` or `chat_template`"
    ),
    "unfreeze_embeddings": Refusal(
        _is_set, "modules that are trained whole have names here", 'write `modules_to_save: ["embed_tokens"]`'
    ),
    "adapter_layers": Refusal(
        _is_set, "there are no bottleneck adapters here, only LoRA", "remove it; `lora_target_modules` chooses layers"
    ),
    "adapter_bottleneck_dim": Refusal(
        _is_set, "there are no bottleneck adapters here, only LoRA", "remove it; `lora_r` is the width of LoRA"
    ),
    "test_config": Refusal(
        _is_set, "the original's test harness is not a part of this", "remove it; `max_steps` bounds a run"
    ),
}


def refusals(settings: Settings) -> list[Problem]:
    """A problem for each key that is set to something that this build does not have."""
    problems = []
    for key, refusal in {**NOT_YET, **ELSEWHERE}.items():
        value = getattr(settings, key)
        if refusal.applies(value):
            shown = f"`{key}: {write_value(value)}` ({settings.where(key)})"
            what = f"{shown} is not supported yet" if key in NOT_YET else f"{shown} is not supported here"
            problems.append(Problem(what, refusal.reason, refusal.remedy, (key,)))
    return problems
