"""The original experiment's command: `trietune train` on the YAML file beside this script.

    python3 blacksmith/experiments/torch/gemma11/test_gemma11_finetuning.py [CONFIG.yaml] [--set key=value] [--dry-run]

Whatever follows the script's name is passed on, and keys that the file leaves out are as the original had them. The
name begins with `test_` because the original's does; importing this file does nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
CHECKOUT = HERE.parents[4]
# Read by TrieTune, and by the processes that it starts.
DEFAULTS = "TRIETUNE_DEFAULTS"


def main(arguments: list[str]) -> int:
    names_file = any(item.endswith((".yaml", ".yml")) and "=" not in item for item in arguments)
    file = [] if names_file else [str(HERE.with_suffix(".yaml"))]
    try:
        from trietune.cli.app import main as trietune
    except ModuleNotFoundError as error:
        if error.name != "trietune":
            return _explain_missing(error)
        sys.path.insert(0, str(CHECKOUT / "src"))
        try:
            from trietune.cli.app import main as trietune
        except ModuleNotFoundError as error_in_checkout:
            return _explain_missing(error_in_checkout)
    before = os.environ.get(DEFAULTS)
    os.environ[DEFAULTS] = "original"
    try:
        return trietune(["train", *file, *arguments])
    finally:
        os.environ.pop(DEFAULTS)
        if before is not None:
            os.environ[DEFAULTS] = before


def _explain_missing(error: ModuleNotFoundError) -> int:
    sys.stderr.write(
        f"error: this Python ({sys.executable}) has no package `{error.name}`\n"
        f"next:  `make train` sets up {CHECKOUT / '.venv'}; then use {CHECKOUT / '.venv' / 'bin' / 'python'}\n"
    )
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
