"""Commented configuration files to start from, for `trietune init`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Literal, get_args

from trietune.config.allowed import allowed_values, takes_text
from trietune.config.documentation import groups
from trietune.config.settings import Settings
from trietune.config.yaml12 import write_value
from trietune.io.json_types import JsonMapping

TemplateKind = Literal["sst2", "squad", "chat", "jsonl"]
SCHEMA_FILE = "trietune.schema.json"

_HEADINGS: Mapping[TemplateKind, str] = {
    "sst2": "Sentiment of film reviews (SST-2): a sentence goes in, a label comes out.",
    "squad": "Question answering (SQuAD v2): a paragraph and a question go in, an answer or `unanswerable` comes out.",
    "chat": "Conversations of your own: one JSON object per line, with `messages` as chat services write them.",
    "jsonl": "Data of your own: one JSON object per line, columns put into a prompt and a completion.",
}
_SMALL_MODEL = "smollm2-135m-instruct"
# What each kind sets; the keys of a group that are not here follow as comments, with their defaults.
_VALUES: Mapping[TemplateKind, JsonMapping] = {
    "sst2": {"dataset_id": "stanfordnlp/sst2", "max_length": 64, "wandb_run_name": "sst2"},
    "squad": {
        "dataset_id": "rajpurkar/squad_v2",
        "max_length": 384,
        "lora_target_modules": ["q_proj", "v_proj"],
        "wandb_run_name": "squad",
    },
    "chat": {"train_file": "train.jsonl", "max_length": 1024, "wandb_run_name": "chat"},
    "jsonl": {
        "train_file": "train.jsonl",
        "prompt_template": "Question: {question}\nAnswer:",
        "completion_template": " {answer}",
        "max_length": 512,
        "wandb_run_name": "jsonl",
    },
}
_COMMON: JsonMapping = {
    "model_name": _SMALL_MODEL,
    "dtype": "auto",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": "all-linear",
    "learning_rate": 2e-4,
    "batch_size": 16,
    "num_epochs": 1,
    "use_wandb": False,
    "project_dir": "runs",
    "save_strategy": "epoch",
    "seed": 23,
}
_OFFERED = (
    "validation_file", "overlong", "print_examples", "lora_dropout", "max_steps", "max_time", "lr_scheduler_type",
    "warmup_ratio", "gradient_checkpointing", "max_tokens_per_micro_batch", "val_steps_freq", "steps_freq",
    "keep_last_n", "save_optim", "resume_from_checkpoint", "device",
)  # fmt: skip


def template_kinds() -> tuple[TemplateKind, ...]:
    return get_args(TemplateKind)


def render_template(kind: TemplateKind) -> str:
    """A commented YAML file that loads as it stands.

    Args:
        kind: one of `template_kinds()`.
    """
    return _render(_HEADINGS[kind], _VALUES[kind])


def render_for_data(heading: str, values: JsonMapping) -> str:
    """The same for data of one's own.

    Args:
        heading: what the data are, one line.
        values: keys that the data decide, and those that the user should look at.
    """
    return _render(heading, values)


def _render(heading: str, own: JsonMapping) -> str:
    values = {**_COMMON, **own}
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {heading}",
        "# A key behind `# ` has its default; `trietune train FILE.yaml --dry-run` shows what would run.",
    ]
    for title, keys in groups().items():
        shown = [key for key in keys if key in values or key in _OFFERED]
        if shown:
            lines += ["", f"# ---- {title}"]
        for key in shown:
            lines += ["", *_comment(key)]
            lines.append(f"{key}: {write_value(values[key])}" if key in values else _default(key))
    return "\n".join(lines) + "\n"


def _comment(key: str) -> list[str]:
    text = (Settings.model_fields[key].description or "").replace("\n", " ")
    if not takes_text(key):
        text += f" Allowed: {allowed_values(key)}."
    return textwrap.wrap(text, width=110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _default(key: str) -> str:
    return f"# {key}: {write_value(Settings.model_fields[key].default)}"
