"""What a run will do, every `auto` resolved: `--dry-run` prints this object, `train` executes the same one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config.defaults import ORIGINAL_DEFAULTS
from trietune.io.places import expand
from trietune.tracking import wording

if TYPE_CHECKING:
    import torch

    from trietune.config.settings import Settings
    from trietune.device import Device
    from trietune.model.attention.layout import AttentionKind
    from trietune.trie import Batching
    from trietune.trie.static_shapes import StaticShapes


# Norms and the like are left out of what is counted, so where all linear layers are adapted the part is 1.
FULLY_ADAPTED = 0.995


def num_steps_of(settings: Settings, num_train: int) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of a whole run with `num_train` training examples."""
    batches_per_epoch = math.ceil(num_train / settings.batch_size)
    per_epoch = math.ceil(batches_per_epoch / settings.gradient_accumulation_steps)
    in_all = per_epoch * settings.num_epochs
    return per_epoch, in_all if settings.max_steps is None else min(settings.max_steps, in_all)


def describe_defaults(settings: Settings) -> str:
    """Which set of defaults applies, for the plan."""
    if ORIGINAL_DEFAULTS.keys() <= settings.model_fields_set:
        return "none applies: all keys are set in which TrieTune's and the original's differ"
    if settings.has_original_defaults:
        return "the original experiment's, for keys that are not set (docs/configuration.md has both sets)"
    return "TrieTune's own, for keys that are not set"


@dataclass(frozen=True, slots=True)
class Sharing:
    """What tries save on this data, measured on a few batches drawn as training will draw them.

    Attributes:
        tokens_per_example: positions that plain rows without padding would compute.
        positions_per_example: positions that this run computes.
    """

    tokens_per_example: float
    positions_per_example: float

    @property
    def factor(self) -> float:
        return self.tokens_per_example / max(self.positions_per_example, 1e-9)


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """Shapes, and what they add to positions and to labels, as parts of them."""

    shapes: StaticShapes
    added_positions: float
    added_labels: float

    @property
    def description(self) -> str:
        """For the plan."""
        listed = ", ".join(f"{shape.num_positions:,} x {shape.num_labels:,}" for shape in self.shapes.shapes)
        rows = f", {self.shapes.num_rows} side by side" if self.shapes.num_rows > 1 else ""
        return (
            f"{listed} (tokens x labels){rows}; padding adds {self.added_positions:.1%} to the tokens and "
            f"{self.added_labels:.0%} to the labels"
        )


@dataclass(frozen=True, slots=True)
class ProcessesPlan:
    """How several processes share steps, measured on a few steps drawn as training will draw them.

    Attributes:
        count: processes.
        examples_per_step: examples of all processes together.
        speed_up: over one process, by tokens: what is computed once more and uneven parts count, messages do not.
        positions_per_example: computed by all together.
        smallest_part, largest_part: shares of a step's work that a process computes.
        repeated: what is computed again because steps are split, as a share of the whole.
        suggestion: a larger batch size and its speed-up, where this one leaves processes idle.
    """

    count: int
    examples_per_step: int
    speed_up: float
    positions_per_example: float
    smallest_part: float
    largest_part: float
    repeated: float
    suggestion: tuple[int, float] | None = None

    def lines(self) -> list[tuple[str, str]]:
        """For the plan."""
        lines = [
            (
                "processes",
                f"{self.count} processes; each computes its part of {self.examples_per_step} examples: "
                f"{self.speed_up:.1f} times as fast as one, by tokens ({self.speed_up / self.count:.0%})",
            ),
            (
                "",
                f"parts of {self.smallest_part:.0%} to {self.largest_part:.0%} of a step's work; {self.repeated:.0%} "
                "more to compute because it is split",
            ),
        ]
        if self.suggestion is not None:
            batch_size, speed_up = self.suggestion
            lines.append(
                (
                    "",
                    f"the batch is what limits it: `--set batch_size={batch_size}` would be {speed_up:.1f} times "
                    f"({speed_up / self.count:.0%}); adjust the learning rate",
                )
            )
        return lines


@dataclass(frozen=True, slots=True)
class Plan:
    """A run with nothing left open.

    Attributes:
        directory: the run's folder; its name is the run's.
        adapted_share: part of the weights of the base model's layers that carry adapters.
        base_rates: rates of the base model's own dropout and noise, by name, as its configuration has them.
        keeps_dropout: whether these stay on.
        dtype: dtype of the base model; adapter and optimizer are fp32.
        load_in_4bit: whether its linear layers are held in 4 bits and only compute in `dtype`.
        attention: how tries attend; None for padded rows, which keep transformers' attention.
        attention_reason: why not in the device's best way; None if they do.
        why_whole_rows: why tries run on whole rows; None if they do not, or if the self-check is to find out.
        is_grouped: whether examples with a long common prefix meet in a batch.
        max_positions: most positions of a micro-batch.
        static: the shapes that micro-batches are padded to, on a device that needs such; None elsewhere.
        num_steps: optimizer steps of the whole run.
        eval_max_examples: examples of a periodic validation; None takes all.
        eval_batch_size: answers generated together.
        model_bytes: memory of the base model, the adapter, its gradients and its optimizer.
        position_bytes: estimate for one position of a micro-batch.
        largest_micro_batch: positions of the largest micro-batch of those that were looked at.
        objective: what is learned, in words; None for `sft`.
        label_cost: cost of one label at the output head, in nodes of the layers before it.
        processes: how a step's examples are shared; None where one process trains.
        max_length: limit of an example, in tokens; `longest` is the longest in the training data.
        defaults: which set of defaults the keys that are not set have.
        data_lines: of several data sets, what becomes of each.
    """

    directory: Path
    model_name: str
    model_revision: str | None
    num_parameters: int
    num_trainable: int
    device: Device
    dtype: torch.dtype
    load_in_4bit: bool
    batching: Batching
    attention: AttentionKind | None
    attention_reason: str | None
    why_whole_rows: str | None
    is_grouped: bool
    max_positions: int
    num_train: int
    num_validation: int
    batch_size: int
    batches_per_step: int
    steps_per_epoch: int
    num_steps: int
    num_warmup_steps: int
    eval_max_examples: int | None
    eval_batch_size: int
    sharing: Sharing
    model_bytes: int
    position_bytes: int
    largest_micro_batch: int
    static: StaticPlan | None = None
    adapted_share: float = 1.0
    base_rates: Mapping[str, float] = field(default_factory=dict)
    keeps_dropout: bool = False
    objective: str | None = None
    label_cost: float = 0.0
    processes: ProcessesPlan | None = None
    max_length: int | None = None
    longest: int = 0
    defaults: str | None = None
    data_lines: tuple[str, ...] = ()

    @property
    def has_loss_scale(self) -> bool:
        """Whether losses are multiplied before the backward pass, as fp16 needs it."""
        return str(self.dtype) == "torch.float16"

    @property
    def _dtype(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.load_in_4bit:
            name = f"4 bits, computing in {name}"
        return f"{name}, with a scaled loss" if self.has_loss_scale else name

    @property
    def _length(self) -> str:
        return f"at most {self.max_length:,} tokens per example; the longest has {self.longest:,}"

    @property
    def _adapted(self) -> str:
        share = self.adapted_share
        return "" if share > FULLY_ADAPTED else f", on {share:.0%} of the layers' weights"

    @property
    def _dropout(self) -> str:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in self.base_rates.items())
        if not self.keeps_dropout:
            return f"the base model's own is off ({rates})"
        if not rates:
            return "the base model has none of its own"
        return f"the base model's own stays on ({rates}), drawn once per node; layers are not fused"

    def lines(self) -> list[tuple[str, str]]:
        """The plan for people: (name, value), in the order in which things happen."""
        revision = f" at {self.model_revision[:12]}" if self.model_revision else ""
        batch = _number(self.batch_size, "example") + (
            f" x {self.batches_per_step} accumulated" if self.batches_per_step > 1 else ""
        )
        epochs = self.num_steps / self.steps_per_epoch
        attention = self.attention or "the model's own"
        validation = "all" if self.eval_max_examples is None else f"{self.eval_max_examples:,}"
        return [
            ("model", f"{self.model_name}{revision}, {_millions(self.num_parameters)} parameters"),
            ("adapter", f"{self.num_trainable:,} trained parameters, in float32" + self._adapted),
            *([("dropout", self._dropout)] if self.base_rates or self.keeps_dropout else []),
            ("device", f"{self.device.name}, base in {self._dtype}"),
            ("data", f"{self.num_train:,} training and {self.num_validation:,} validation examples"),
            *(("", line) for line in self.data_lines),
            *([("length", self._length)] if self.max_length is not None else []),
            *([("objective", self.objective)] if self.objective else []),
            (
                "steps",
                f"{_number(self.num_steps, 'step')} of {batch} ({epochs:.3g} {'epoch' if epochs == 1 else 'epochs'})",
            ),
            *(self.processes.lines() if self.processes else []),
            ("batching", f"{self.batching}, attention: {attention}, " + _grouping(self.is_grouped)),
            *([("attention", f"{attention}, {self.attention_reason}")] if self.attention_reason else []),
            *([("attention", f"on whole rows, {self.why_whole_rows}")] if self.why_whole_rows else []),
            (
                "sharing",
                f"{self.sharing.positions_per_example:.1f} of {self.sharing.tokens_per_example:.1f} tokens per example "
                f"are computed ({self.sharing.factor:.2f}x)"
                + (f", {self.processes.positions_per_example:.1f} by all processes" if self.processes else ""),
            ),
            (
                "memory",
                f"{wording.size(self.model_bytes)} for model and optimizer; about "
                f"{wording.size(self.largest_micro_batch * self.position_bytes)} for a micro-batch of "
                f"{self.largest_micro_batch:,} tokens" + (", in each process" if self.processes else ""),
            ),
            (
                "micro-batch",
                f"at most {self.max_positions:,} tokens, "
                f"about {wording.size(self.max_positions * self.position_bytes)}",
            ),
            *([("shapes", self.static.description)] if self.static else []),
            ("validation", f"{validation} examples during training, all before and after"),
            ("run", str(self.directory)),
            *([("defaults", self.defaults)] if self.defaults else []),
        ]


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _grouping(is_grouped: bool) -> str:
    return "examples with a common prefix share a batch" if is_grouped else "shuffled"


def run_directory(settings: Settings) -> Path:
    """`<project_dir>/<run name>`; a name that exists gets `-2`, `-3`, unless the run is resumed."""
    first = expand(settings.project_dir) / settings.wandb_run_name
    if settings.resume_from_checkpoint:
        return first
    directory, number = first, 1
    while os.path.lexists(directory):
        number += 1
        directory = first.with_name(f"{first.name}-{number}")
    return directory
