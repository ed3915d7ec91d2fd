"""What a model said to evaluated examples, as runs keep it and `evaluate --predictions` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trietune.evaluation.evaluate import is_right
from trietune.evaluation.metrics import f1_score, prediction_text
from trietune.tracking import events
from trietune.tracking.jsonl import prediction_record, to_json_line

if TYPE_CHECKING:
    from trietune.data.examples import ExampleSource, Task
    from trietune.data.parts import Part
    from trietune.evaluation.evaluate import Prediction


def described(predictions: Sequence[Prediction], examples: ExampleSource, task: Task) -> list[events.Prediction]:
    """Predictions with what they are about, what was expected, and whether they are right."""
    found = []
    for prediction in predictions:
        is_question = task.kind == "answers"
        found.append(
            events.Prediction(
                id=prediction.id,
                prompt=examples[prediction.index].prompt,
                expected=" / ".join(prediction.gold) if prediction.gold else "unanswerable",
                predicted=prediction.text,
                is_right=is_right(prediction, task),
                probabilities=prediction.probabilities,
                f1=f1_score(prediction_text(prediction.text), prediction.gold) if is_question else None,
                kind=("answerable" if prediction.gold else "unanswerable") if is_question else "",
            )
        )
    return found


def described_by_part(
    predictions: Sequence[Prediction], parts: Sequence[Part], examples: ExampleSource, task: Task
) -> list[events.Prediction]:
    """As `described`, each by the task of the data set that it belongs to.

    Args:
        parts: the data sets that `examples` go through, one after the other; without any, `task` is that of all.
    """
    if not parts:
        return described(predictions, examples, task)
    found: list[events.Prediction] = []
    begin = 0
    for part in parts:
        end = begin + len(part.sequences)
        found += described([one for one in predictions if begin <= one.index < end], examples, part.prompt_format.task)
        begin = end
    return found


def predictions_file(predictions: Sequence[events.Prediction], *, is_squad: bool) -> bytes:
    """`{"id": "answer"}` as SQuAD's official script reads it (`unanswerable` is empty there); else JSONL."""
    if is_squad:
        answers = {prediction.id: prediction_text(prediction.predicted) for prediction in predictions}
        return (json.dumps(answers, ensure_ascii=False, indent=1) + "\n").encode()
    return b"".join(to_json_line(prediction_record(prediction)) for prediction in predictions)
