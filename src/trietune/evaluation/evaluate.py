"""Measure a model on a data set: its loss, and what its task asks for.

    labels     every label of every example scored in one trie      loss, accuracy
    answers    greedy generation on one trie, and the loss with it  loss, exact match, F1
    text       the loss                                             loss, perplexity

Before, during and after training the same function measures, so that its numbers can stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trietune.data.encoder import Encoder
from trietune.data.examples import Example, Task, TokenSequences
from trietune.data.templates import UNANSWERABLE
from trietune.errors import UserError
from trietune.evaluation.generation import GenerationLimits, generate_and_score
from trietune.evaluation.metrics import (
    exact_match,
    join,
    measure_accuracy,
    measure_answers,
    measure_loss,
    measure_overlap,
    prediction_text,
)
from trietune.evaluation.scoring import (
    CheckStop,
    Progress,
    find_prompt_lengths,
    label_log_probabilities,
    label_probabilities,
    names_of,
    no_progress,
    no_stop,
    sequence_losses,
    sum_by_name,
)
from trietune.model.causal_lm import TrieModel
from trietune.ranks.ranks import ALONE, Ranks
from trietune.trie import Batching, Sequences
from trietune.trie.dealing import deal_step


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says to one example.

    Attributes:
        index: the example's index in its data set.
        id: its id.
        text: the label's short name, or the generated answer.
        gold: the right ones; empty for an unanswerable question.
        probabilities: probability of each label, by its short name; empty for generated answers.
    """

    index: int
    id: str
    text: str
    gold: tuple[str, ...]
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome of `evaluate`; names of metrics and intervals begin with `eval/`."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    num_examples: int
    predictions: Sequence[Prediction]


def evaluate_model(
    model: TrieModel,
    sequences: TokenSequences,
    encoder: Encoder,
    *,
    batching: Batching,
    max_positions: int,
    batch_size: int,
    max_examples: int | None = None,
    seed: int = 0,
    generate: bool = True,
    max_new_tokens: int | None = None,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure `model` on `sequences` by the task of the encoder's prompt format.

    Over several ranks each computes a part, dealt by what its trie costs, and all get the metrics of the whole.

    Args:
        max_positions: most positions computed at once, which bounds memory.
        batch_size: about how many answers are generated together.
        max_examples: size limit: of a larger set, a random subset that depends only on `seed`; None takes all.
        generate: False leaves generated answers out, and their metrics.
        max_new_tokens: longest generated answer; None: as many as the longest gold completion of the whole set has.
        check_stop: called between micro-batches and decoding steps; what it raises ends the evaluation.
        progress: called with a phase (`loss`, `labels`, `answers`), and the examples done and in all, of this process.
        ranks: processes that share the work; all call this function.
    """
    answered = answer_examples(
        model,
        sequences,
        encoder,
        choose_examples(len(sequences), max_examples, seed=seed),
        batching=batching,
        max_positions=max_positions,
        batch_size=batch_size,
        generate=generate,
        max_new_tokens=max_new_tokens,
        check_stop=check_stop,
        progress=progress,
        ranks=ranks,
    )
    return evaluation_of([answered], seed=seed)


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model made of examples, one by one.

    Attributes:
        losses: float64 [B], summed over the label tokens of each; `weights` the number of these.
        is_right: bool [B], whether the likeliest label is the right one; None without labels.
        predictions: one an example, where labels or answers were measured; else none.
    """

    losses: np.ndarray
    weights: np.ndarray
    predictions: Sequence[Prediction]
    is_right: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """The task that it was measured by."""
        return "labels" if self.is_right is not None else "answers" if self.predictions else "text"


def evaluation_of(several: Sequence[Answered], *, seed: int, prefix: str = "eval/") -> Evaluation:
    """Metrics over all examples of several sets: the loss, and what all of them were measured by."""
    losses, weights = (np.concatenate([getattr(one, name) for one in several]) for name in ("losses", "weights"))
    predictions = [prediction for one in several for prediction in one.predictions]
    measured = [measure_loss(losses, weights)]
    kinds = {one.kind for one in several}
    if kinds == {"labels"}:
        measured.append(measure_accuracy(np.concatenate([one.is_right for one in several if one.is_right is not None])))
    elif kinds == {"answers"}:
        texts, gold_answers = [p.text for p in predictions], [p.gold for p in predictions]
        measured.append(measure_answers(texts, gold_answers, seed=seed))
        measured.append(measure_overlap(texts, gold_answers, seed=seed))
    joined = join(measured, prefix=prefix)
    return Evaluation(joined.metrics, joined.intervals, len(losses), predictions)


def evaluate_parts(
    model: TrieModel,
    parts: Sequence[tuple[str, TokenSequences, Encoder]],
    *,
    max_examples: int | None = None,
    seed: int = 0,
    **how: Any,
) -> Evaluation:
    """Measure several data sets, each by its own task, and all of them together.

    Metrics of all are named as those of one; each data set's have its name in them, `eval/NAME/loss`. Where tasks
    differ, all together are measured by their loss.

    Args:
        parts: name, sequences and encoder of each; the index of a prediction counts through all of them.
        max_examples: of all together; each gives its part of one random subset.
        how: arguments of `answer_examples`.
    """
    starts = np.cumsum([0, *(len(sequences) for _, sequences, _ in parts)])
    chosen = choose_examples(int(starts[-1]), max_examples, seed=seed)
    answered = []
    for (_, sequences, encoder), begin, end in zip(parts, starts, starts[1:], strict=False):
        indices = chosen[(chosen >= begin) & (chosen < end)] - begin
        found = answer_examples(model, sequences, encoder, indices, **how)
        counted = [replace(one, index=one.index + int(begin)) for one in found.predictions]
        answered.append(replace(found, predictions=counted))
    whole = evaluation_of([one for one in answered if len(one.losses)], seed=seed)
    metrics, intervals = dict(whole.metrics), dict(whole.intervals)
    for (name, _, _), one in zip(parts, answered, strict=True):
        if len(one.losses) and len(parts) > 1:
            of_part = evaluation_of([one], seed=seed, prefix=f"eval/{name}/")
            metrics |= of_part.metrics
            intervals |= of_part.intervals
    return replace(whole, metrics=metrics, intervals=intervals)


def answer_examples(
    model: TrieModel,
    sequences: TokenSequences,
    encoder: Encoder,
    indices: np.ndarray,
    *,
    batching: Batching,
    max_positions: int,
    batch_size: int,
    generate: bool = True,
    max_new_tokens: int | None = None,
    check_stop: CheckStop = no_stop,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Answered:
    """What `model` makes of these examples, by the task of the encoder; see `evaluate_model` for the arguments.

    Args:
        indices: int64 [B], ascending.
    """
    if not len(indices):
        return Answered(np.zeros(0), np.zeros(0), [])
    mine = own_places(sequences, indices, ranks, batching)
    own = indices[mine]
    how: Any = {"max_positions": max_positions, "check_stop": check_stop, "progress": progress}
    task = encoder.prompt_format.task
    if task.kind == "labels":
        completions = [np.array(encoder.encode_completion(label), np.int32) for label in task.labels]
        scores = ranks.together(
            lambda: label_log_probabilities(model, sequences, own, completions, batching=batching, **how)
        )
        log_probabilities = put_together(ranks, mine, scores, len(indices))
        gold = find_labels(sequences, indices, completions)
        return _answer_by_labels(sequences, indices, task, log_probabilities, gold, completions)
    if task.kind == "answers" and generate:
        limits = GenerationLimits(
            stop_ids=frozenset(encoder.prompt_format.stop_ids),
            max_new_tokens=longest_completion(sequences) if max_new_tokens is None else max_new_tokens,
            max_positions=max_positions,
            batch_size=batch_size,
        )
        own_answers, own_losses, own_weights = ranks.together(
            lambda: generate_and_score(model, sequences, own, limits, check_stop=check_stop, progress=progress)
        )
        losses = put_together(ranks, mine, own_losses, len(indices))
        weights = put_together(ranks, mine, own_weights, len(indices))
        answers: list[list[int]] = [[] for _ in range(len(indices))]
        for places, part in ranks.gather((mine.tolist(), own_answers)):
            for place, answer in zip(places, part, strict=True):
                answers[place] = answer
        return Answered(losses, weights, _answer_predictions(sequences, indices, encoder, answers))
    own_losses, own_weights = ranks.together(lambda: sequence_losses(model, sequences, own, batching=batching, **how))
    losses = put_together(ranks, mine, own_losses, len(indices))
    return Answered(losses, put_together(ranks, mine, own_weights, len(indices)), [])


def own_places(sequences: Sequences, indices: np.ndarray, ranks: Ranks, batching: Batching) -> np.ndarray:
    """Places in `indices` of what this rank computes, ascending: all of them in one process."""
    everything = np.arange(len(indices))
    if ranks.count == 1:
        return everything
    parts = deal_step(sequences, indices, ranks.count, batching=batching, label_cost=0.0).parts
    places = [np.flatnonzero(np.isin(indices, part)) for part in parts]
    # A sequence without a label costs nothing and is in no part.
    unlabeled = np.setdiff1d(everything, np.concatenate(places))
    return np.sort(ranks.mine([np.append(places[0], unlabeled), *places[1:]]))


def put_together(ranks: Ranks, mine: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The values of all ranks' places, float64 [count, ...] in the order of the examples."""
    if ranks.count == 1:
        return values
    whole = np.zeros((count, *values.shape[1:]))
    for places, content in ranks.gather((mine.tolist(), values.astype(np.float64).tobytes())):
        whole[places] = np.frombuffer(content).reshape(-1, *values.shape[1:])
    return whole


def is_right(prediction: Prediction, task: Task) -> bool:
    """Whether the metrics count it as right: the label, or an exact match (`unanswerable` is not an answer)."""
    if task.kind == "labels":
        return prediction.text in prediction.gold
    return exact_match(prediction_text(prediction.text), prediction.gold) == 1


def choose_examples(num_examples: int, max_examples: int | None, *, seed: int) -> np.ndarray:
    """Indices of the examples to evaluate, ascending: all, or a subset drawn without replacement; int64."""
    if max_examples is None or max_examples >= num_examples:
        return np.arange(num_examples)
    return np.sort(np.random.default_rng(seed).choice(num_examples, max_examples, replace=False))


def longest_completion(sequences: TokenSequences) -> int:
    """Tokens of the longest gold completion, its end-of-sequence token included; at least 1."""
    lengths = np.diff(np.asarray(sequences.offsets)) - find_prompt_lengths(sequences)
    return max(1, int(lengths.max(initial=0)))


def find_labels(sequences: TokenSequences, indices: np.ndarray, completions: Sequence[np.ndarray]) -> np.ndarray:
    """Which of the labels' completions each example has; int64 [B].

    Raises:
        UserError: one has none of them.
    """
    number_of = {completion.tobytes(): number for number, completion in enumerate(completions)}
    starts = np.asarray(sequences.offsets)[:-1] + find_prompt_lengths(sequences)
    found = np.zeros(len(indices), np.int64)
    for at, index in enumerate(indices):
        completion = np.asarray(sequences.input_ids[starts[index] : sequences.offsets[index + 1]], np.int32)
        number = number_of.get(completion.tobytes())
        if number is None:
            raise UserError(
                f"the completion of `{sequences.ids[index]}` is none of the {len(completions)} labels of this task: "
                f"`{sequences.examples[int(index)].completion.strip()[:80]}`",
                next_step="correct it, or measure the loss alone: `--set task=text`",
            )
        found[at] = number
    return found


def _answer_by_labels(
    sequences: TokenSequences,
    indices: np.ndarray,
    task: Task,
    log_probabilities: np.ndarray,
    gold: np.ndarray,
    completions: Sequence[np.ndarray],
) -> Answered:
    names, group = names_of(task)
    predicted = sum_by_name(label_probabilities(log_probabilities), group, len(names)).argmax(axis=1)
    return Answered(
        losses=-log_probabilities[np.arange(len(gold)), gold],
        weights=np.array([len(completion) for completion in completions])[gold],
        predictions=_label_predictions(sequences, indices, task, log_probabilities, gold),
        is_right=predicted == group[gold],
    )


def _label_predictions(
    sequences: TokenSequences, indices: np.ndarray, task: Task, log_probabilities: np.ndarray, gold: np.ndarray
) -> list[Prediction]:
    names, group = names_of(task)
    probabilities = sum_by_name(label_probabilities(log_probabilities), group, len(names))
    return [
        Prediction(
            index=int(index),
            id=sequences.ids[index],
            text=names[int(row.argmax())],
            gold=(names[group[right]],),
            probabilities=dict(zip(names, row.tolist(), strict=True)),
        )
        for index, right, row in zip(indices, gold, probabilities, strict=True)
    ]


def _gold_answers(example: Example, encoder: Encoder) -> tuple[str, ...]:
    """All right answers of an example: those that the data lists, or its completion; none if it is `unanswerable`."""
    if example.answers:
        return example.answers
    answer = example.completion
    if example.messages:  # what is generated is the first answer that is learned
        answer = next((one.content for one in encoder.answers(example) if one.weight), "")
    return () if answer.strip() == UNANSWERABLE else (answer.strip(),)


def _answer_predictions(
    sequences: TokenSequences, indices: np.ndarray, encoder: Encoder, answers: Sequence[Sequence[int]]
) -> list[Prediction]:
    return [
        Prediction(
            index=int(index),
            id=sequences.ids[index],
            text=encoder.decode_completion(tokens).strip(),
            gold=_gold_answers(sequences.examples[int(index)], encoder),
        )
        for index, tokens in zip(indices, answers, strict=True)
    ]
