"""What is there before a run: a plan, and all that was read to make it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trietune.config.settings import Settings
    from trietune.data.loaded_data import Data
    from trietune.model.base.folder import ModelFolder
    from trietune.model.base.shape import NetworkShape
    from trietune.run.objective import Learning
    from trietune.run.plan import Plan
    from trietune.trie.batch_stats import Work
    from trietune.trie.groups import PrefixGroups


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and all that was read to make it.

    Attributes:
        learning: what is learned, before its reference has been scored.
        shape: counts of the network.
        work: work in a few steps, by all processes together.
        num_sampled: examples of these steps.
        start: folder of the initial adapter; None: a new one.
    """

    settings: Settings
    plan: Plan
    base: ModelFolder
    tokenizer: PreTrainedTokenizerFast
    data: Data
    groups: PrefixGroups | None
    learning: Learning
    shape: NetworkShape
    work: Work
    num_sampled: int
    start: Path | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one process has chosen for all that share a training: where choices follow from a measurement or the disk.

    Attributes:
        directory: folder of the run.
        dtype: dtype of the base model: `float32`, `bfloat16`, `float16`.
    """

    directory: Path
    dtype: str
