"""Settings of a run: every key, read from YAML, environment and command line. Loads no torch."""

from trietune.config.load import load_config, show_config
from trietune.config.settings import Settings

__all__ = ["Settings", "load_config", "show_config"]
