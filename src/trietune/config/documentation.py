"""The reference of all keys, made from their definitions: `python -m trietune.config.documentation` writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from trietune.config.allowed import allowed_values
from trietune.config.defaults import ORIGINAL_DEFAULTS
from trietune.config.foreign import FOREIGN_NAMES
from trietune.config.not_yet import ELSEWHERE, NOT_YET
from trietune.config.settings import Settings
from trietune.config.yaml12 import write_value

# Title, first key and introduction of each group; a group ends where the next one begins, in the order of `Settings`.
_GROUPS: tuple[tuple[str, str, str], ...] = (
    ("Data", "dataset_id", "What is learned, and how an example becomes a prompt and a completion."),
    ("Base model", "model_name", "What learns. Its own weights never change."),
    ("Adapter", "training_type", "What is trained: a LoRA adapter, loadable by plain PEFT."),
    (
        "Objective",
        "objective",
        "What is learned from an example. docs/objectives.md has the formulas and the forms of data.",
    ),
    ("Optimization", "learning_rate", "How the adapter is trained, and for how long."),
    ("Shared prefixes", "batching", "How a batch is laid out. No key here changes a gradient beyond rounding."),
    ("Evaluation", "do_validation", "When and on how much it is measured."),
    ("Log and trackers", "log_level", "What is told about a run, and to whom, beside the files of the run itself."),
    ("Checkpoints", "project_dir", "What is kept of a run, and how it resumes after a stop."),
    (
        "Remote storage",
        "storage_backend",
        "A second place for checkpoints. Credentials come from the provider's usual chain.",
    ),
    ("Devices", "use_tt", "What it runs on."),
    ("Of the original's later files", "custom_dataset", "Known, so that the answer names the key that does it here."),
)

ORIGINAL_KEYS = frozenset({
    "dataset_id", "model_name", "max_length", "dtype", "learning_rate", "batch_size", "gradient_checkpointing",
    "num_epochs", "optim", "log_level", "use_wandb", "wandb_project", "wandb_run_name", "wandb_tags",
    "wandb_watch_mode", "wandb_log_freq", "model_to_wandb", "steps_freq", "epoch_freq", "val_steps_freq",
    "resume_from_checkpoint", "resume_option", "checkpoint_path", "checkpoint_metric", "checkpoint_metric_mode",
    "keep_last_n", "keep_best_n", "save_strategy", "project_dir", "save_optim", "storage_backend",
    "sync_to_storage", "load_from_storage", "remote_path", "seed", "deterministic", "lora_r", "lora_alpha",
    "lora_target_modules", "lora_task_type", "framework", "use_tt",
})  # fmt: skip
LATER_ORIGINAL_KEYS = frozenset({
    "ignored_index", "training_type", "training_model_type", "print_examples", "parallelism_strategy", "mesh_shape",
    "mesh_axis_names", "tp_sharding_specs", "model_sharding_patterns", "input_sharding_dim", "enable_trace",
    "trace_region_size_mb", "custom_dataset", "prompt_format", "chat_system_prompt", "unfreeze_embeddings",
    "adapter_layers", "adapter_bottleneck_dim", "run_decode_example", "test_config", "dpo_beta", "dpo_label_smoothing",
    "sft_checkpoint_path", "do_validation", "adam_beta1", "adam_beta2", "adam_eps", "trace_region_size",
})  # fmt: skip

_INTRODUCTION = """# Configuration

A run is described by one flat YAML file, `trietune train FILE.yaml`. Every key has a default, so a file names only what
it changes. `trietune init sst2` writes a commented file to start from.

**Where a value comes from.** The command line comes first (`--learning-rate 2e-4`, `learning_rate=2e-4` or
`--set learning_rate=2e-4`; the last one written wins), then the variable `TRIETUNE_<KEY>`
(`TRIETUNE_BATCH_SIZE=8`), then the file, then the default. `trietune train FILE.yaml --show-config` prints every value
with its origin. After `--set` and in a variable, text needs no quotes; in double quotes, `\\n` is a line break.

**How a file is read.** As YAML 1.2: `6e-5` is a number, and `yes` and `no` are words (write `True` and `False`). An
unknown key, a key given twice, a value of the wrong type or outside its range, keys that contradict each other, tags
and aliases are errors. All are reported at once, each with its line and what to write, and nothing is started.

**Two sets of defaults.** A file that writes both `framework` and `use_tt` is one of the original experiment's, and so
is any file that runs by the original's command: what it leaves out is as the original had it. Every other file, and a
run without one, has TrieTune's own. The plan says which set applies.

{both_sets}

`TRIETUNE_DEFAULTS=original` (or `trietune`) decides in place of the file.

**Names.** Keys keep the spelling of the Gemma 1.1 LoRA experiment whose files load unchanged. *original* marks one of
its 42 keys, *original, later* a key of its later files; the others are ours. Names of other tools are
[answered with ours](#names-in-other-tools).
"""


def groups() -> Mapping[str, tuple[str, ...]]:
    """The keys under the title of their group, in order."""
    keys = list(Settings.model_fields)
    starts = [keys.index(first) for _, first, _ in _GROUPS] + [len(keys)]
    return {title: tuple(keys[starts[i] : starts[i + 1]]) for i, (title, _, _) in enumerate(_GROUPS)}


def render_documentation() -> str:
    """`docs/configuration.md`: each key with its meaning, what it allows, its default, and what this build refuses."""
    parts = [_INTRODUCTION.replace("{both_sets}", _both_sets())]
    for (title, keys), (_, _, introduction) in zip(groups().items(), _GROUPS, strict=True):
        parts.append(f"## {title}\n\n{introduction}\n")
        parts += [_section(key) for key in keys]
    parts.append(_names_in_other_tools())
    return "\n".join(parts)


def _section(key: str) -> str:
    field = Settings.model_fields[key]
    origin = " *(original)*" if key in ORIGINAL_KEYS else " *(original, later)*" if key in LATER_ORIGINAL_KEYS else ""
    lines = [
        f"### `{key}`{origin}",
        "",
        field.description or "",
        "",
        f"- Allowed: {allowed_values(key)}.",
        f"- Default: {_own_default(key)}"
        + (f"; the original's is `{write_value(ORIGINAL_DEFAULTS[key])}`" if key in ORIGINAL_DEFAULTS else ""),
    ]
    refusal = {**NOT_YET, **ELSEWHERE}.get(key)
    if refusal is not None:
        kind = "Not there yet" if key in NOT_YET else "Refused"
        lines.append(f"- {kind}: {refusal.reason}; {refusal.remedy}.")
    return "\n".join(lines) + "\n"


def _both_sets() -> str:
    rows = ["| key | TrieTune's own | the original's |", "|---|---|---|"]
    for key, original in ORIGINAL_DEFAULTS.items():
        rows.append(f"| `{key}` | {_own_default(key)} | `{write_value(original)}` |")
    return "\n".join(rows)


def _own_default(key: str) -> str:
    if key == "wandb_run_name":
        return "the YAML file's name, else that of the data"
    return f"`{write_value(Settings.model_fields[key].default)}`"


def _names_in_other_tools() -> str:
    lines = [
        "## Names in other tools",
        "",
        "None of these is accepted in place of ours: the message says what to write.",
        "",
        "| name | in | here | note |",
        "|---|---|---|---|",
    ]
    for name, foreign in sorted(FOREIGN_NAMES.items()):
        here = ", ".join(f"`{key}`" for key in foreign.keys) or "none"
        lines.append(f"| `{name}` | {foreign.tools} | {here} | {foreign.difference} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Write the reference to the path that is given, or to its place in the repository."""
    Path(arguments[0] if arguments else "docs/configuration.md").write_text(render_documentation(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
