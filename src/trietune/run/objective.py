"""What a run learns: the objective that the settings name, the rows that it learns from, and its reference.

sft      the sequences of the data                 nothing beside them
dpo ...  the answers of the data, row by row       scores of all answers before training, kept in the cache
kto      each answer, and its prompt with another  the same
rank     each prompt with every label              nothing beside them
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trietune.data.answers import AnswerSets, with_every_label, with_other_completions
from trietune.data.cache import make_key
from trietune.data.encoder import make_encoder
from trietune.data.examples import Task, TokenSequences
from trietune.errors import UserError
from trietune.evaluation.preferences import evaluate_answers, joined, measure_share, score_answers
from trietune.io import files
from trietune.io.cache_folder import mark_used
from trietune.io.json_types import JsonObject
from trietune.ranks.ranks import ALONE, Ranks
from trietune.training.objectives.answers import answers_of
from trietune.training.objectives.by_scores import LearnByScores, describe
from trietune.training.objectives.dpo import Dpo
from trietune.training.objectives.ipo import Ipo
from trietune.training.objectives.kto import Kto
from trietune.training.objectives.orpo import Orpo
from trietune.training.objectives.rank import Rank
from trietune.training.objectives.sft import LearnWeightedLabels, learn_labels
from trietune.training.objectives.simpo import Simpo
from trietune.training.objectives.with_chosen import WithChosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trietune.config.settings import Settings
    from trietune.data.loaded_data import Data
    from trietune.evaluation.evaluate import Evaluation
    from trietune.evaluation.metrics import Measured
    from trietune.model.causal_lm import TrieModel
    from trietune.run.plan import Plan
    from trietune.training.objectives.answers import Objective
    from trietune.training.objectives.learning import Learn

Rows = TokenSequences | AnswerSets
MOST_LABELS = 1000


def make_objective(settings: Settings) -> Objective | None:
    """The objective that the settings name; None for `sft`, which needs no scores."""
    makers: dict[str, Callable[[], Objective]] = {
        "dpo": lambda: Dpo(settings.dpo_beta, settings.dpo_label_smoothing),
        "ipo": lambda: Ipo(settings.dpo_beta),
        "simpo": lambda: Simpo(settings.simpo_beta, settings.simpo_gamma),
        "orpo": lambda: Orpo(settings.orpo_lambda),
        "kto": lambda: Kto(settings.kto_beta, settings.kto_desirable_weight, settings.kto_undesirable_weight),
        "rank": lambda: Rank(settings.rank_by),
    }
    if settings.objective == "sft":
        return None
    objective = makers[settings.objective]()
    return WithChosen(objective, settings.sft_weight) if settings.sft_weight else objective


def rows_of(settings: Settings, sequences: TokenSequences) -> Rows:
    """What batches of this data hold under an objective that is neither `sft` nor `rank`."""
    if settings.objective == "kto":
        assert sequences.grades is not None
        return with_other_completions(sequences, np.asarray(sequences.grades))
    if not settings.learns_preferences:
        return sequences
    assert sequences.grades is not None
    assert sequences.row_start is not None
    return AnswerSets(
        input_ids=sequences.input_ids,
        labels=sequences.labels,
        offsets=np.asarray(sequences.offsets),
        row_start=np.asarray(sequences.row_start),
        grade=np.asarray(sequences.grades),
        is_trained=np.ones(len(sequences), bool),
    )


def rows_to_rank(data: Data, tokenizer: PreTrainedTokenizerFast) -> tuple[AnswerSets, Data]:
    """Each training prompt with every label of the task, and the data with that task.

    Raises:
        UserError: the completions are not labels.
    """
    if data.task.kind != "labels":
        data = data.with_task(_task_of(data))
    encoder = make_encoder(tokenizer, data.prompt_format)
    completions = [np.array(encoder.encode_completion(label), np.int32) for label in data.task.labels]
    try:
        return with_every_label(data.train, completions), data
    except ValueError as error:
        place = data.train.ids[int(error.args[0])]
        raise UserError(
            f"`objective: rank` needs examples of a prompt and one of {len(completions)} labels, and `{place}` is none",
            next_step="objective: sft     (which learns any completion)",
        ) from None


def _task_of(data: Data) -> Task:
    """The distinct completions of the training data as labels."""
    if data.task.kind == "answers" or data.prompt_format.kind != "template":
        raise UserError(
            "`objective: rank` chooses between the labels of a task, and this data has answers of all kinds",
            where=f"{data.counts.train.source}",
            next_step="objective: sft     (or give each example a prompt and one of a few completions)",
        )
    labels: dict[str, None] = {}
    for index in range(len(data.train)):
        labels[data.train.examples[index].completion] = None
        if len(labels) > MOST_LABELS:
            break
    if not 2 <= len(labels) <= MOST_LABELS:
        number = f"more than {MOST_LABELS:,}" if len(labels) > MOST_LABELS else str(len(labels))
        raise UserError(
            f"`objective: rank` chooses between the labels of a task, and this data has {number} completions",
            where=f"{data.counts.train.source}",
            next_step="objective: sft     (which learns any completion)",
        )
    for index in range(0 if data.validation is None else len(data.validation)):
        assert data.validation is not None
        if data.validation.examples[index].completion not in labels:
            raise UserError(
                f"a validation example has a completion that no training example has: `{data.validation.ids[index]}`",
                next_step="remove it, or train on an example of its label",
            )
    found = tuple(sorted(labels))
    return Task("labels", found, tuple(label.strip() for label in found))


@dataclass(frozen=True, slots=True)
class Learning:
    """An objective with its rows, ready to be learned from and measured.

    Attributes:
        objective: None for `sft`.
        rows: rows of the training data.
        validation: answers of the validation data; None where they are not compared, or not there.
        parts: of several data sets, the name and the number of validation rows of each.
        reference, validation_reference: float64 [sequences], scores under the reference; None without one.
    """

    settings: Settings
    objective: Objective | None
    rows: Rows
    validation: AnswerSets | None
    reference: np.ndarray | None = None
    validation_reference: np.ndarray | None = None
    parts: Sequence[tuple[str, int]] = ()

    @property
    def learn(self) -> Learn:
        """What the loop is given."""
        if self.objective is None:
            weights = self.rows.weights if isinstance(self.rows, TokenSequences) else None
            return learn_labels if weights is None else LearnWeightedLabels.of(self.rows, weights)
        assert isinstance(self.rows, AnswerSets)
        return LearnByScores(
            self.objective, self.rows, self.reference, self.settings.pairs, keeps_draws=self.settings.lora_dropout > 0
        )

    def reference_digest(self) -> str | None:
        """Changes with any score of the reference; None without one."""
        return None if self.reference is None else hashlib.sha256(self.reference.tobytes()).hexdigest()

    def with_reference(
        self,
        model: TrieModel,
        keys: tuple[str, str],
        cache_folder: Path,
        *,
        plan: Plan,
        max_positions: int,
        check_stop: Callable[[], None],
        progress: Callable[[str, int, int | None], None],
        ranks: Ranks = ALONE,
        shares_scoring: bool = True,
    ) -> Learning:
        """The same with the scores of the reference, which `model` must be at this moment.

        Args:
            keys: names in the cache for the training and the validation answers.
            ranks: that all call this and get the same scores; what rank 0 finds in its cache is sent to the others.
            shares_scoring: whether each rank scores a part; otherwise each scores all.
        """
        if self.objective is None or not self.objective.needs_reference:
            return self
        assert isinstance(self.rows, AnswerSets)

        def scores(sets: AnswerSets, key: str) -> np.ndarray:
            path = cache_folder / "reference" / f"{key}.npz"
            kept = ranks.once(lambda: _bytes_of(_read(path, len(sets))))
            mark_used(path)
            if kept is not None:
                return np.frombuffer(kept).copy()
            found, _ = score_answers(
                model,
                sets,
                np.arange(len(sets)),
                batching=plan.batching,
                max_positions=max_positions,
                check_stop=check_stop,
                progress=lambda phase, done, total: progress("scores of the reference", done, total),
                ranks=ranks if shares_scoring else ALONE,
            )
            ranks.once(lambda: _write(path, found))
            return found

        validation = self.validation
        return replace(
            self,
            reference=scores(self.rows, keys[0]),
            validation_reference=None if validation is None else scores(validation, keys[1]),
        )

    def evaluate(self, model: TrieModel, *, is_reference: bool, **arguments: Any) -> Evaluation:
        """Measure the validation answers.

        Args:
            is_reference: whether the model is still its own reference, so that there are no rewards to speak of.
            arguments: arguments of `evaluate_answers`.
        """
        assert self.objective is not None
        assert self.validation is not None
        sets = self.validation

        def judge(rows: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> Measured:
            return measure(
                self.settings, sets, rows, scores, counts, self.validation_reference, is_reference=is_reference
            )

        return evaluate_answers(model, sets, judge, parts=self.parts, **arguments)


def evaluate_preferences(
    model: TrieModel,
    settings: Settings,
    sequences: TokenSequences,
    *,
    max_positions: int,
    max_examples: int | None,
    report: Callable[[str], None],
    check_stop: Callable[[], None],
    progress: Callable[[str, int, int | None], None],
    parts: Sequence[tuple[str, int]] = (),
) -> Evaluation:
    """Measure a model on preferences without its reference: which answers it prefers, not by how much more than before.

    Args:
        report: takes a line for the user.
        parts: of several data sets, the name and the number of rows of each.
    """
    objective = make_objective(settings)
    assert objective is not None
    rows = rows_of(settings, sequences)
    assert isinstance(rows, AnswerSets)
    if objective.needs_reference:
        report(
            f"the loss and the rewards of `objective: {settings.objective}` compare with the model before training: "
            "the run's own evaluations hold them"
        )
    learning = Learning(settings, objective, rows, rows, parts=parts)
    return learning.evaluate(
        model,
        is_reference=False,
        batching=settings.batching,
        max_positions=max_positions,
        max_examples=max_examples,
        seed=settings.seed,
        check_stop=check_stop,
        progress=progress,
    )


def measure(
    settings: Settings,
    sets: AnswerSets,
    rows: np.ndarray,
    scores: np.ndarray,
    counts: np.ndarray,
    reference: np.ndarray | None,
    *,
    is_reference: bool,
) -> Measured:
    """Loss, preference accuracy, rewards and log-probabilities of some rows of answers.

    `preference_accuracy` is the share of pairs whose better answer has the greater score: the sum of its label
    log-probabilities, or their mean under an objective of means. `rewards/accuracies` compares with the reference.
    """
    objective = make_objective(settings)
    assert objective is not None
    lacks_reference = objective.needs_reference and reference is None
    answers = answers_of(sets, rows, counts, reference, settings.pairs)
    found = torch.from_numpy(scores)
    metrics = describe(objective, found, answers)
    values = found
    if not objective.needs_reference and (rewards := objective.rewards(found, answers)) is not None:
        values = rewards
    better, worse = answers.better, answers.worse
    row = answers.row[better].numpy()
    shares = [measure_share("preference_accuracy", (values[better] > values[worse]).numpy(), row)]
    if not lacks_reference:
        metrics = {"loss": float(objective.loss(found, answers)), **metrics}
    if lacks_reference or (objective.needs_reference and is_reference):
        metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/") and name != "kl"}
    elif (rewards := objective.rewards(found, answers)) is not None:
        shares.append(measure_share("rewards/accuracies", (rewards[better] > rewards[worse]).numpy(), row))
    order = dict.fromkeys(["loss", "preference_accuracy", *metrics])
    whole = joined(metrics, *shares)
    return replace(
        whole, metrics={name: whole.metrics[name] for name in [*order, *whole.metrics] if name in whole.metrics}
    )


def _read(path: Path, num_sequences: int) -> np.ndarray | None:
    """Scores from the cache; None if there are none or they cannot be read. The archive checks its own sums."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            scores: np.ndarray = archive["scores"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return scores if scores.shape == (num_sequences,) and scores.dtype == np.float64 else None


def _bytes_of(scores: np.ndarray | None) -> bytes | None:
    return None if scores is None else scores.tobytes()


def _write(path: Path, scores: np.ndarray) -> None:
    """Keep the scores, whole or not at all; a cache that cannot be written to costs only time."""
    content = io.BytesIO()
    np.savez(content, scores=scores)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, content.getvalue())
    except OSError:
        pass


def reference_keys(settings: Settings, plan: Plan, environment: JsonObject) -> tuple[str, str]:
    """Names in the cache for the reference's scores of training and validation data: all that decides them."""
    common = {
        "base": environment["base_digest"],
        "start": environment.get("start_adapter"),
        "is_kto": settings.objective == "kto",
        "dtype": str(plan.dtype),
        "load_in_4bit": plan.load_in_4bit,
        "layout": [plan.batching, plan.attention, plan.device.kind],
        "torch": environment["versions"]["torch"],
    }
    names = ("data_fingerprint", "validation_fingerprint")
    train, validation = (make_key(reference=environment[name], **common) for name in names)
    return train, validation
