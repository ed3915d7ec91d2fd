"""The JSON Schema of a configuration file, with which an editor completes keys and marks mistakes while one types."""

from __future__ import annotations

from typing import Any

from trietune.config.allowed import allowed_values
from trietune.config.normalize import DTYPE_SPELLINGS, SCHEDULE_SPELLINGS
from trietune.config.settings import Settings

# Spellings that `normalize` accepts beside those of the types.
_TEXT = {"type": "string"}
_ALSO: dict[str, list[dict[str, Any]]] = {
    "dtype": [
        {"enum": [f"torch.{name}" for name in ("bfloat16", "float32", "float16")]},
        {"enum": [*DTYPE_SPELLINGS]},
    ],
    "lr_scheduler_type": [{"enum": [*SCHEDULE_SPELLINGS]}],
    "save_strategy": [{"const": "none"}],
    "log_level": [{"enum": ["debug", "info", "warning", "error", "critical"]}],
    "max_time": [_TEXT],
    "max_steps": [{"const": -1}],
    "max_grad_norm": [{"const": 0}],
    "mesh_shape": [_TEXT],
    "mesh_axis_names": [_TEXT],
    "wandb_tags": [_TEXT],
    "modules_to_save": [_TEXT],
}


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a file: every key with its description, what it allows, and its default."""
    schema = Settings.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["description"] = "Configuration of a TrieTune run; every key is optional."
    for key, entry in schema["properties"].items():
        about = {name: entry.pop(name) for name in ("description", "default") if name in entry}
        entry.pop("title", None)
        if key in _ALSO:
            entry = {"anyOf": [*entry.get("anyOf", [entry]), *_ALSO[key]]}
        about["description"] = f"{about['description']}\n\nAllowed: {allowed_values(key)}."
        schema["properties"][key] = {**about, **entry}
    return dict(schema)
