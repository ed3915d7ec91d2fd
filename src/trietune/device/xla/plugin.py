"""Whether a Tenstorrent plug-in is installed, found out without starting or importing it.

A PJRT plug-in that fails to start cannot be undone: torch_xla keeps answering with the same error for the rest of the
process. So what is there is read from the installed packages' entry points first.
"""

from __future__ import annotations

from importlib import metadata

# Entry point group in which PJRT plug-ins register; torch_xla loads all of them when it is imported.
PLUGIN_GROUP = "torch_xla.plugins"
TENSTORRENT = "tt"
INSTALL_TENSTORRENT = (
    "install Tenstorrent's plug-in as its documentation says (`pip install pjrt-plugin-tt` with their package index: "
    "https://docs.tenstorrent.com/tt-xla)"
)


def has_plugin() -> bool:
    """Whether a Tenstorrent plug-in for PyTorch is installed."""
    return any(entry.name.lower() == TENSTORRENT for entry in metadata.entry_points(group=PLUGIN_GROUP))
