"""TrieTune: exact LoRA fine-tuning of causal language models that computes every shared prefix once.

from trietune import load_config, train

run = train(load_config("sst2.yaml", ["num_epochs=2"]))
print(run.after["eval/accuracy"], run.adapter)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trietune.config import Settings, load_config
    from trietune.errors import UserError
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.opened import evaluate
    from trietune.run.result import Run
    from trietune.run.train import train

__version__ = "0.1.0"
__all__ = ["Evaluation", "Run", "Settings", "UserError", "__version__", "evaluate", "load_config", "train"]

# Loaded on first use, so that `import trietune` costs nothing and loads no torch.
_HOMES = {
    "Evaluation": "trietune.evaluation.evaluate",
    "Run": "trietune.run.result",
    "Settings": "trietune.config",
    "UserError": "trietune.errors",
    "evaluate": "trietune.run.opened",
    "load_config": "trietune.config",
    "train": "trietune.run.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
