"""What is trained on: real data sets, a generated chat set, and sequences made to one measure each.

A workload is token sequences and the batches of every optimizer step, decided here once, so that all engines that can
take given batches take the same ones. Sequences longer than `max_length` are left out, as the original experiment does,
and counted.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trietune.demo import demo_questions, demo_reviews
from trietune.training.sampler import Sampler
from trietune.trie import make_micro_batches
from trietune.trie.groups import find_prefix_groups

IGNORED_LABEL = -100
SEED = 23


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences with labels, flat; sequence `i` is `input_ids[offsets[i] : offsets[i + 1]]`."""

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """Token ids and labels of one sequence."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[begin:end].tolist(), self.labels[begin:end].tolist()


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences and batches.

    Attributes:
        name: `squad-grouped-32`, ...
        max_length: what the original's loop pads to.
        batches: sequence indices of each optimizer step.
        steps_a_round: optimizer steps between two changes of engine.
        num_too_long: examples left out.
        row_start: int64 [R + 1], for preferences: the first sequence of each row, whose answers stand side by side, the
            best first. `batches` are then rows, and `batch_size` counts them. None: every sequence by itself.
    """

    name: str
    sequences: Sequences
    max_length: int
    batch_size: int
    batches: list[np.ndarray]
    steps_a_round: int
    num_too_long: int
    row_start: np.ndarray | None = None

    def answers_of(self, row: int) -> range:
        """The sequences of a row of preferences, the best first."""
        assert self.row_start is not None
        return range(int(self.row_start[row]), int(self.row_start[row + 1]))


@dataclass(frozen=True, slots=True)
class Shape:
    """How much there is to share in some batches, an example."""

    padded_tokens: float
    real_tokens: float
    distinct_tokens: float
    labels: float
    merged_labels: float


def measure_shape(workload: Workload, batches: Sequence[np.ndarray]) -> Shape:
    nodes = tokens = labels = pairs = 0
    for batch in batches:
        for part in make_micro_batches(workload.sequences, batch, batching="trie", max_positions=2**40):
            nodes += part.num_positions
            tokens += part.num_tokens
            labels += part.total_weight
            pairs += len(part.labels)
    num = sum(len(batch) for batch in batches)
    return Shape(workload.max_length, tokens / num, nodes / num, labels / num, pairs / num)


def real_workload(name: str, tokenizer: Any, data: Path, *, num_rounds: int) -> Workload:
    """`squad-grouped-32`, `sst2-plain-4`, `chat-grouped-16`, ...: data set, order, and examples in a step."""
    dataset, order, size = name.split("-")
    pairs, max_length = {"squad": (_squad, 256), "sst2": (_sst2, 32), "chat": (_chat, 1024)}[dataset]
    sequences, num_too_long = tokenize(tokenizer, pairs(data), max_length=max_length)
    return arrange(
        name,
        sequences,
        max_length=max_length,
        batch_size=int(size),
        grouped=order == "grouped",
        num_rounds=num_rounds,
        num_too_long=num_too_long,
    )


def arrange(
    name: str,
    sequences: Sequences,
    *,
    max_length: int,
    batch_size: int,
    grouped: bool,
    num_rounds: int,
    num_too_long: int = 0,
) -> Workload:
    """Batches for a warm-up round and `num_rounds` more; those of an epoch's end, which are short, are left out."""
    groups = find_prefix_groups(sequences, batch_size=batch_size) if grouped else None
    sampler = Sampler(len(sequences), batch_size=batch_size, seed=SEED, groups=groups)
    steps_a_round = max(1, min(16, 64 // batch_size if max_length <= 64 else 32 // batch_size))
    per_epoch = len(sequences) // batch_size
    if per_epoch == 0:
        raise SystemExit(
            f"error: {name} has {len(sequences)} examples of at most {max_length} tokens, fewer than a batch of "
            f"{batch_size}; {num_too_long} are longer"
        )
    batches = [sampler.batch(*divmod(number, per_epoch)) for number in range(steps_a_round * (num_rounds + 1))]
    return Workload(name, sequences, max_length, batch_size, batches, steps_a_round, num_too_long)


def tokenize(tokenizer: Any, pairs: Sequence[tuple[str, str]], *, max_length: int) -> tuple[Sequences, int]:
    """Prompt and completion tokenized apart, one BOS if the tokenizer has one, EOS as the last label."""
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [
        (begin + prompt, [*completion, tokenizer.eos_token_id])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    kept = [row for row in rows if len(row[0]) + len(row[1]) <= max_length]
    return flatten(kept), len(rows) - len(kept)


def flatten(rows: Sequence[tuple[list[int], list[int]]]) -> Sequences:
    """Sequences of (prompt, completion) token ids; the completion's tokens are the labels."""
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    ids = [token for prompt, completion in rows for token in (*prompt, *completion)]
    labels = [t for prompt, completion in rows for t in (*([IGNORED_LABEL] * len(prompt)), *completion)]
    return Sequences(
        np.array(ids, np.int32), np.array(labels, np.int32), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    )


def random_questions(
    *, vocabulary: int, num_paragraphs: int, questions: int, paragraph: int, question: int, answer: int, seed: int = 3
) -> Sequences:
    """Random tokens: `paragraph` tokens shared by `questions` questions, each with its own question and answer."""
    draw: Callable[[int], list[int]] = lambda n: generator.integers(3, vocabulary, n).tolist()  # noqa: E731
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_paragraphs):
        shared = draw(paragraph)
        rows += [(shared + draw(question), draw(answer)) for _ in range(questions)]
    return flatten(rows)


# Prompt and answer tokens, answers of a row, rows of a step: few rows, for TRL computes 42 sequences for seven answers.
PREFERENCES = {
    "pairs-equal": (128, 128, 2, 4),
    "pairs-long-prompt": (256, 64, 2, 4),
    "ranked-4": (128, 32, 4, 2),
    "ranked-7": (128, 32, 7, 1),
}


def preferences(name: str, *, vocabulary: int, num_rounds: int, steps_a_round: int = 1, seed: int = SEED) -> Workload:
    """Random tokens: rows of a prompt and its answers, the best first. Lengths vary by a quarter."""
    prompt, answer, num_answers, batch_size = PREFERENCES[name]
    generator = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        size = int(generator.integers(length * 3 // 4, length * 5 // 4 + 1))
        return [int(token) for token in generator.integers(3, vocabulary, size)]

    num_rows = batch_size * steps_a_round * (num_rounds + 1)
    rows = []
    for _ in range(num_rows):
        shared = draw(prompt)
        rows += [(shared, draw(answer)) for _ in range(num_answers)]
    return Workload(
        name,
        flatten(rows),
        max_length=(prompt + answer) * 5 // 4,
        batch_size=batch_size,
        batches=np.split(np.arange(num_rows), num_rows // batch_size),
        steps_a_round=steps_a_round,
        num_too_long=0,
        row_start=np.arange(num_rows + 1) * num_answers,
    )


def find_file(data: Path, name: str) -> Path:
    """`squad_v2/train.json` or `sst2/train.tsv` in the data folder; `demo` is the sample data in the same two forms."""
    if str(data) == "demo":
        return demo_questions() / "train.json" if name.endswith(".json") else demo_reviews() / "train.tsv"
    if not (data / name).is_file():
        raise SystemExit(
            f"error: {data / name} is not there\nnext:  --data FOLDER, or --data demo for TrieTune's own sample data"
        )
    return data / name


def squad_prompt(context: str, question: str) -> str:
    return f"\nContext: {context}\n\nQuestion: {question}\n\nAnswer:\n"


def _squad(data: Path) -> list[tuple[str, str]]:
    articles = json.loads(find_file(data, "squad_v2/train.json").read_text("utf-8"))["data"]
    return [
        (
            squad_prompt(paragraph["context"], question["question"]),
            question["answers"][0]["text"] if question["answers"] else "unanswerable",
        )
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _sst2(data: Path) -> list[tuple[str, str]]:
    with find_file(data, "sst2/train.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = {"0": "negative", "1": "positive"}
    return [(f"Review: {row['sentence']}\nOutput:", f' {{"label": "{names[row["label"]]}"}}') for row in rows]


# Words of one or two tokens, so that the lengths below come out about the same in any tokenizer.
_WORDS = re.findall(
    r"\w+",
    """
    the a our your order parcel address invoice price night week month please check answer polite short clear never
    always customer refund return ticket account change name number before after without with about when where reason
    small large new old first last open closed ready late early paid missing broken blue green red left right again
    """,
)
SYSTEM_WORDS = 440  # about 500 tokens with the punctuation
NUM_CHATS = 2048


def _chat(data: Path) -> list[tuple[str, str]]:
    """One system prompt of about 500 tokens, then a message of 5 to 60 words and a reply of 5 to 80."""
    generator = np.random.default_rng(SEED)

    def text(num_words: int) -> str:
        words = [str(_WORDS[i]) for i in generator.integers(0, len(_WORDS), num_words)]
        words = [word + (". " if at % 9 == 8 else " ") for at, word in enumerate(words)]
        return "".join(words).strip()

    system = text(SYSTEM_WORDS)
    return [
        (
            f"System: {system}\n\nUser: {text(int(generator.integers(5, 60)))}\n\nAssistant:",
            f" {text(int(generator.integers(5, 80)))}",
        )
        for _ in range(NUM_CHATS)
    ]
