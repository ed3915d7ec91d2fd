"""What a run shows of itself beside its numbers: its beginning, examples, answers, a batch, gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from trietune.data.preview import preview_examples
from trietune.run.batch_picture import write_batch_picture
from trietune.run.predictions import described_by_part
from trietune.run.wording import few
from trietune.tracking import events
from trietune.tracking.wandb.listener import are_histograms_due, watched_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel

    from trietune.config.settings import Settings
    from trietune.evaluation.evaluate import Evaluation
    from trietune.ranks.ranks import Ranks
    from trietune.run.objective import Learning
    from trietune.run.prepared import Prepared
    from trietune.run.throughput import Throughput
    from trietune.tracking.tracker import Tracker
    from trietune.training.loop import Step
    from trietune.training.sampler import Sampler

SHOWN_EXAMPLES, SHOWN_PREDICTIONS = 3, 10


def show_start(prepared: Prepared, environment: Mapping[str, object], first_step: int, tracker: Tracker) -> None:
    plan = prepared.plan
    tracker.emit(
        events.RunStarted(
            name=plan.directory.name,
            directory=plan.directory,
            num_steps=plan.num_steps,
            first_step=first_step,
            config=prepared.settings.dump_public(),
            environment=environment,
            plan=plan.lines(),
        )
    )


def show_step(
    prepared: Prepared, step: Step, throughput: Throughput, ranks: Ranks, tracker: Tracker, *, is_logged: bool
) -> None:
    """One optimizer step; files and trackers record it where it is logged."""
    device = prepared.plan.device
    metrics = throughput.metrics(
        step, device.used_memory_bytes(), device.compilations(), waiting_share=ranks.waiting_share
    )
    ids = [prepared.data.train.row_id(row) for row in step.sequence_indices]
    tracker.emit(events.StepFinished(step.number, step.epoch, metrics, ids, is_logged))


def show_examples(prepared: Prepared, tracker: Tracker) -> None:
    """The first training examples as the model reads them."""
    previews = preview_examples(prepared.data.train, prepared.tokenizer, SHOWN_EXAMPLES)
    shown = [events.MarkedExample(p.id, [(t.text, t.is_label) for t in p.tokens]) for p in previews]
    tracker.emit(events.ExamplesShown(shown))


def show_predictions(
    prepared: Prepared, evaluation: Evaluation, step: int, when: Literal["before", "after"], tracker: Tracker
) -> None:
    """What the model said to every validation example; the first ones belong on a terminal."""
    data = prepared.data
    assert data.validation is not None
    told = described_by_part(evaluation.predictions, data.parts, data.validation.examples, data.task)
    num_shown = SHOWN_PREDICTIONS if prepared.settings.print_examples else 0
    tracker.emit(events.PredictionsShown(step, when, told, num_shown))


def draw_first_batch(prepared: Prepared, learning: Learning, sampler: Sampler, tracker: Tracker) -> None:
    """Keep the first batch as a picture, for the report."""
    plan, rows = prepared.plan, learning.rows
    if plan.num_steps == 0 or plan.batching != "trie":
        return
    batch = [(row, sequence) for row in sampler.batch(0, 0) for sequence in rows.sequences_of(np.array([row]))]
    indices = np.array([sequence for _, sequence in batch], np.int64)
    ids = [prepared.data.train.row_id(row) for row, _ in batch]
    try:
        write_batch_picture(plan.directory, rows, indices, ids, prepared.tokenizer)
    except OSError as error:
        tracker.warn(f"the report has no picture of a batch: {error}")


class GradientWatch:
    """Looks at gradients when all of a step are there: which tensors have none, and their histograms for W&B."""

    def __init__(self, peft_model: PeftModel, settings: Settings, tracker: Tracker) -> None:
        self._peft_model = peft_model
        self._settings = settings
        self._tracker = tracker
        self._has_looked = False

    def before_update(self, step: int) -> None:
        if not self._has_looked:
            self._has_looked = True
            self._warn_of_untrained()
        self._emit_histograms(step)

    def _warn_of_untrained(self) -> None:
        """Adapters whose layer is passed by, such as those of parts that text does not go through."""
        trained = {name: p for name, p in self._peft_model.named_parameters() if p.requires_grad}
        without = [name for name, parameter in trained.items() if parameter.grad is None]
        if without:
            layers = list(dict.fromkeys(name.removeprefix("base_model.model.").split(".lora_")[0] for name in without))
            self._tracker.warn(
                f"{len(without)} of the adapter's {len(trained)} tensors got no gradient in the first step, on "
                f"{few(layers)}: they stay unchanged unless later examples reach them"
            )

    def _emit_histograms(self, step: int) -> None:
        mode = self._settings.wandb_watch_mode
        if not are_histograms_due(step, mode=mode, every=self._settings.wandb_log_freq):
            return
        arrays = {}
        for name, parameter in self._peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            values = {"parameters": parameter.detach(), "gradients": parameter.grad}
            for kind in watched_kinds(mode):
                value = values[kind]
                if value is not None:
                    arrays[f"{kind}/{name}"] = value.float().flatten().cpu().numpy().copy()
        self._tracker.emit(events.Histograms(step, arrays))
