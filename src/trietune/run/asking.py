"""A loaded model, measured on a data set or asked for answers.

Imported once a device has been chosen: transformers starts XLA devices when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.errors import UserError
from trietune.evaluation.evaluate import evaluate_model
from trietune.evaluation.predict import (
    DEFAULT_MAX_NEW_TOKENS,
    encode_prompt,
    longest_prompt,
    make_examples,
    predict_labels,
    predict_text,
)
from trietune.io.outputs import write_output
from trietune.run.fitting import check_ids, check_vocabulary
from trietune.run.objective import evaluate_preferences
from trietune.run.opening import progress_of
from trietune.run.predictions import described, predictions_file
from trietune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trietune.data.encoder import Encoder
    from trietune.data.examples import TokenSequences
    from trietune.evaluation.evaluate import Evaluation
    from trietune.evaluation.sampling import Sampling
    from trietune.run.loaded import LoadedModel

from trietune.data.templates import PromptFormat
from trietune.io.json_types import JsonMapping, JsonObject

ANSWERS_AT_ONCE = 32


def measure(
    opened: LoadedModel,
    sequences: TokenSequences,
    prompt_format: PromptFormat,
    *,
    max_examples: int | None,
    tracker: Tracker,
    check_stop: Callable[[], None],
    keep: Path | None,
) -> Evaluation:
    """Metrics of `opened` on `sequences`; see `trietune.run.opened.evaluate`."""
    check_vocabulary(sequences, opened.num_embeddings)
    max_positions = opened.prove_on(sequences)
    if opened.settings.learns_preferences:
        return evaluate_preferences(
            opened.model,
            opened.settings,
            sequences,
            max_positions=max_positions,
            max_examples=max_examples,
            report=tracker.info,
            check_stop=check_stop,
            progress=progress_of(tracker, "examples"),
        )
    size = opened.settings.eval_batch_size
    encoder = opened.encoder(prompt_format)
    found = evaluate_model(
        opened.model,
        sequences,
        encoder,
        batching=opened.settings.batching,
        max_positions=max_positions,
        batch_size=ANSWERS_AT_ONCE if size == "auto" else size,
        max_examples=max_examples,
        seed=opened.settings.seed,
        check_stop=check_stop,
        progress=progress_of(tracker, "examples"),
    )
    if keep is not None:
        _keep_predictions(found, sequences, encoder, keep)
    return found


def ask(
    opened: LoadedModel,
    inputs: Sequence[str | JsonMapping],
    *,
    max_new_tokens: int | None,
    check_stop: Callable[[], None],
    sampling: Sampling | None,
) -> list[JsonObject]:
    """Answers of `opened` to `inputs`; see `trietune.run.opened.predict`."""
    encoder = opened.encoder()
    check_ids(
        [encode_prompt(encoder, one) for one in make_examples(encoder.prompt_format, inputs)], opened.num_embeddings
    )
    new_tokens = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    max_positions = opened.prove_for(longest_prompt(encoder, inputs) + new_tokens)
    if encoder.prompt_format.task.kind == "labels" and opened.settings.task in ("auto", "labels"):
        labels = predict_labels(
            opened.model,
            encoder,
            inputs,
            batching=opened.settings.batching,
            max_positions=max_positions,
            check_stop=check_stop,
        )
        return [{"label": found.label, "probabilities": dict(found.probabilities)} for found in labels]
    texts = predict_text(
        opened.model,
        encoder,
        inputs,
        max_positions=max_positions,
        batch_size=ANSWERS_AT_ONCE,
        max_new_tokens=new_tokens,
        check_stop=check_stop,
        sampling=sampling,
    )
    return [{"text": text} for text in texts]


def _keep_predictions(found: Evaluation, sequences: TokenSequences, encoder: Encoder, file: Path) -> None:
    task = encoder.prompt_format.task
    if not found.predictions:
        raise UserError(
            f"there is nothing to write to `{file}`: this data has no labels and no questions, so the model was only "
            "measured by its loss",
            next_step="leave `--predictions` out, or ask with `trietune predict --input FILE`",
        )
    told = described(found.predictions, sequences.examples, task)
    write_output(file, predictions_file(told, is_squad=task.kind == "answers"), "--predictions")
