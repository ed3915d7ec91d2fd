"""A loaded model, measured on a data set or asked for answers.

Imported once a device has been chosen: transformers starts XLA devices when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from trietune.data.loading import writable
from trietune.data.parts import join_parts
from trietune.data.several import form_of
from trietune.errors import UserError
from trietune.evaluation.evaluate import evaluate_model, evaluate_parts
from trietune.evaluation.predict import (
    DEFAULT_MAX_NEW_TOKENS,
    encode_prompt,
    longest_prompt,
    make_examples,
    predict_labels,
    predict_text,
)
from trietune.io.cache_folder import cache_folder
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.io.outputs import write_output
from trietune.run.fitting import check_ids, check_vocabulary
from trietune.run.objective import evaluate_preferences
from trietune.run.opening import progress_of
from trietune.run.predictions import described_by_part, predictions_file
from trietune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trietune.data.encoder import Encoder
    from trietune.data.examples import TokenSequences
    from trietune.data.parts import Part
    from trietune.data.templates import PromptFormat
    from trietune.evaluation.evaluate import Evaluation
    from trietune.evaluation.sampling import Sampling
    from trietune.run.loaded import LoadedModel
    from trietune.trie import Batching


ANSWERS_AT_ONCE = 32


class _HowToEvaluate(TypedDict):
    batching: Batching
    max_positions: int
    batch_size: int
    max_examples: int | None
    seed: int
    check_stop: Callable[[], None]
    progress: Callable[[str, int, int | None], None]


def measure(
    opened: LoadedModel,
    parts: Sequence[Part],
    *,
    max_examples: int | None,
    tracker: Tracker,
    check_stop: Callable[[], None],
    keep: Path | None,
) -> Evaluation:
    """Metrics of `opened` on one data set or several; see `trietune.run.opened.evaluate`."""
    folder = cache_folder() / "data"
    if len(parts) > 1:
        folder = writable(folder, lambda line: None)  # said when the parts were read
    sequences, _ = join_parts(parts, folder, check_stop)
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
            parts=[(part.name, part.sequences.num_rows) for part in parts if len(parts) > 1],
        )
    size = opened.settings.eval_batch_size
    how: _HowToEvaluate = {
        "batching": opened.settings.batching,
        "max_positions": max_positions,
        "batch_size": ANSWERS_AT_ONCE if size == "auto" else size,
        "max_examples": max_examples,
        "seed": opened.settings.seed,
        "check_stop": check_stop,
        "progress": progress_of(tracker, "examples"),
    }
    encoders = [opened.encoder(part.prompt_format) for part in parts]
    if len(parts) == 1:
        found = evaluate_model(opened.model, sequences, encoders[0], **how)
    else:
        named = [(part.name, part.sequences, encoder) for part, encoder in zip(parts, encoders, strict=True)]
        found = evaluate_parts(opened.model, named, **how)
    if keep is not None:
        _keep_predictions(found, sequences, parts, keep)
    return found


def ask(
    opened: LoadedModel,
    inputs: Sequence[str | JsonMapping],
    *,
    max_new_tokens: int | None,
    check_stop: Callable[[], None],
    sampling: Sampling | None,
    places: Sequence[str] | None = None,
) -> list[JsonObject]:
    """Answers of `opened` to `inputs`; see `trietune.run.opened.predict`."""
    used = opened.encoder()
    formats = _formats_of(used.prompt_format, inputs)
    answers: list[JsonObject] = [{} for _ in inputs]
    for prompt_format in dict.fromkeys(formats):
        own = [at for at, one in enumerate(formats) if one == prompt_format]
        encoder = used if prompt_format == used.prompt_format else opened.encoder(prompt_format)
        found = _ask(
            opened,
            encoder,
            [inputs[at] for at in own],
            [f"input {at + 1}" if places is None else places[at] for at in own],
            max_new_tokens=max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            check_stop=check_stop,
            sampling=sampling,
        )
        for at, answer in zip(own, found, strict=True):
            answers[at] = answer
    return answers


def _formats_of(prompt_format: PromptFormat, inputs: Sequence[str | JsonMapping]) -> list[PromptFormat]:
    """The format that each input is asked in: the adapter's, or, for a row that has not its columns, another of those
    that it was trained with."""
    others = {form_of(one): one for one in reversed(prompt_format.others)}
    others.pop(form_of(prompt_format), None)
    if not others:
        return [prompt_format] * len(inputs)
    found = []
    for value in inputs:
        tried = [] if isinstance(value, str) else [prompt_format, *reversed(others.values())]
        # One without a template takes any text; another that names the row's columns fits better.
        tried.sort(key=lambda one: _is_bare(one) and "prompt" not in value)
        # Of a row that none takes, what is wrong is told in the words of the data set that has its columns.
        named = [one for one in tried if one.columns and set(one.columns) <= set(value)]
        found.append(next((one for one in tried if _takes(one, value)), named[0] if named else prompt_format))
    return found


def _is_bare(prompt_format: PromptFormat) -> bool:
    return prompt_format.kind != "chat" and not prompt_format.prompt_template


def _takes(prompt_format: PromptFormat, value: str | JsonMapping) -> bool:
    try:
        make_examples(prompt_format, [value])
    except UserError:
        return False
    return True


def _ask(
    opened: LoadedModel,
    encoder: Encoder,
    inputs: Sequence[str | JsonMapping],
    places: Sequence[str],
    *,
    max_new_tokens: int,
    check_stop: Callable[[], None],
    sampling: Sampling | None,
) -> list[JsonObject]:
    examples = make_examples(encoder.prompt_format, inputs, places)
    check_ids([encode_prompt(encoder, one) for one in examples], opened.num_embeddings)
    max_positions = opened.prove_for(longest_prompt(encoder, inputs) + max_new_tokens)
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
        max_new_tokens=max_new_tokens,
        check_stop=check_stop,
        sampling=sampling,
    )
    return [{"text": text} for text in texts]


def _keep_predictions(found: Evaluation, sequences: TokenSequences, parts: Sequence[Part], file: Path) -> None:
    if not found.predictions:
        raise UserError(
            f"there is nothing to write to `{file}`: this data has no labels and no questions, so the model was only "
            "measured by its loss",
            next_step="leave `--predictions` out, or ask with `trietune predict --input FILE`",
        )
    tasks = {part.prompt_format.task.kind for part in parts}
    told = described_by_part(found.predictions, parts, sequences.examples, parts[0].prompt_format.task)
    write_output(file, predictions_file(told, is_squad=tasks == {"answers"}), "--predictions")
