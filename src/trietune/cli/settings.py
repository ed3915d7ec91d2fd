"""The settings of a run from what was typed: a YAML file, a model and data, or nothing, which is the sample run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trietune.errors import UserError

if TYPE_CHECKING:
    from trietune.config.settings import Settings

# What `trietune init` leaves behind, and only `trietune train` expects.
_YAML = (".yaml", ".yml")


def settings_to_train(config: Path | None, overrides: list[str]) -> Settings:
    """Of a file; without one, of the data that is named, or of the sample run.

    Raises:
        UserError: a mistake in them, or a data file in the place of the YAML file.
    """
    from trietune.config import load_config
    from trietune.demo import demo_config

    if config is not None:
        if config.suffix.lower() not in _YAML and _is_data(config):
            raise UserError(
                f"`{config}` is data, not a configuration file",
                next_step=f"trietune train --data {config}     (or `trietune init {config}`, which writes a YAML file)",
            )
        return load_config(config, overrides)
    typed = load_config(None, overrides)
    data = typed.train_file or typed.dataset_id
    # The sample run goes on being one with another of the samples.
    if data is not None and not (isinstance(data, str) and data.startswith("demo/")):
        return typed
    return load_config(demo_config(learns_preferences=typed.learns_preferences and data is None), overrides)


def _is_data(path: Path) -> bool:
    from trietune.data.files import FORMAT_OF_SUFFIX

    return path.is_file() and path.suffix.lower() in FORMAT_OF_SUFFIX
