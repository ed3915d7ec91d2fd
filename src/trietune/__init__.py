"""TrieTune: exact LoRA fine-tuning of causal language models that computes every shared prefix once.

from trietune import load_config, predict, train

run = train(load_config("sst2.yaml", ["num_epochs=2"]))
print(run.after["eval/accuracy"], run.adapter)
print(predict(run.directory, ["a fine film"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trietune.config import Settings
    from trietune.errors import UserError
    from trietune.evaluation.evaluate import Evaluation
    from trietune.run.python import evaluate, export, load_config, predict, train
    from trietune.run.result import Run

__version__ = "0.1.0"
__all__ = [
    "Evaluation", "Run", "Settings", "UserError", "__version__", "evaluate", "export", "load_config", "predict",
    "train",
]  # fmt: skip

# Loaded on first use, so that `import trietune` costs nothing and loads no torch.
_HOMES = {
    "Evaluation": "trietune.evaluation.evaluate",
    "Run": "trietune.run.result",
    "Settings": "trietune.config",
    "UserError": "trietune.errors",
    "evaluate": "trietune.run.python",
    "export": "trietune.run.python",
    "load_config": "trietune.run.python",
    "predict": "trietune.run.python",
    "train": "trietune.run.python",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The interface, for `dir` and for completion: what is loaded on first use is not there before."""
    return sorted(__all__)
