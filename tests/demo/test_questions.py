"""The sample questions are SQuAD v2's form to the letter, and hard enough to learn from."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest

from trietune.data.columns import choose_row_format, example_maker
from trietune.data.files import BrokenRow, detect_format, read_rows
from trietune.demo.locations import demo_questions

FEWEST_PARAGRAPHS = {"train": 44, "dev": 12}
QUESTIONS_PER_PARAGRAPH = 6
UNANSWERABLE_PER_PARAGRAPH = 2
WORDS_PER_PARAGRAPH = range(60, 121)
# Two texts that share as many words in a row are a copy; "in the second half of the century" is shorter.
COPIED_WORDS = 8
# Two thirds of the questions have an answer, so always guessing that is right in 67 of 100.
BEST_GUESS_FROM_THE_OPENING = 0.75

Paragraph = dict[str, Any]
Question = dict[str, Any]


def read_squad(split: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((demo_questions() / f"{split}.json").read_text(encoding="utf-8"))
    return document


def paragraphs_of(split: str) -> list[Paragraph]:
    return [paragraph for article in read_squad(split)["data"] for paragraph in article["paragraphs"]]


def questions_of(split: str) -> list[tuple[str, Question]]:
    return [(paragraph["context"], qa) for paragraph in paragraphs_of(split) for qa in paragraph["qas"]]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.fixture(params=["train", "dev"])
def split(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_keys_are_those_of_squad_v2(split: str) -> None:
    document = read_squad(split)
    assert set(document) == {"version", "data"}
    assert document["version"] == "v2.0"
    for article in document["data"]:
        assert set(article) == {"title", "paragraphs"}
        for paragraph in article["paragraphs"]:
            assert set(paragraph) == {"context", "qas"}
    for _, qa in questions_of(split):
        assert set(qa) - {"plausible_answers"} == {"id", "question", "is_impossible", "answers"}
        assert qa["is_impossible"] or "plausible_answers" not in qa
        for answer in qa["answers"] + qa.get("plausible_answers", []):
            assert set(answer) == {"text", "answer_start"}


def test_there_are_enough_paragraphs_of_a_readable_length(split: str) -> None:
    paragraphs = paragraphs_of(split)
    assert len(paragraphs) >= FEWEST_PARAGRAPHS[split]
    wrong = {p["context"][:40]: len(p["context"].split()) for p in paragraphs}
    assert {start: length for start, length in wrong.items() if length not in WORDS_PER_PARAGRAPH} == {}


def test_a_third_of_the_questions_of_each_paragraph_has_no_answer(split: str) -> None:
    for paragraph in paragraphs_of(split):
        impossible = [qa["is_impossible"] for qa in paragraph["qas"]]
        assert (len(impossible), sum(impossible)) == (QUESTIONS_PER_PARAGRAPH, UNANSWERABLE_PER_PARAGRAPH), paragraph
        for qa in paragraph["qas"]:
            assert bool(qa["answers"]) != qa["is_impossible"], qa


def test_each_answer_is_the_span_that_it_names_and_ends_at_word_boundaries(split: str) -> None:
    for context, qa in questions_of(split):
        for answer in qa["answers"] + qa.get("plausible_answers", []):
            start, text = answer["answer_start"], answer["text"]
            assert text == text.strip() != ""
            assert context[start : start + len(text)] == text, qa
            around = context[start - 1 : start] + context[start + len(text) :][:1]
            assert not any(character.isalnum() for character in around), qa


def test_answers_are_mostly_short(split: str) -> None:
    lengths = [len(answer["text"].split()) for _, qa in questions_of(split) for answer in qa["answers"]]
    assert max(lengths) <= 8
    assert sum(length <= 5 for length in lengths) > 0.9 * len(lengths)


def test_validation_accepts_variants_that_differ() -> None:
    golds = [[answer["text"] for answer in qa["answers"]] for _, qa in questions_of("dev") if qa["answers"]]
    assert all(len(set(texts)) == len(texts) <= 3 for texts in golds)
    assert sum(len(texts) > 1 for texts in golds) >= len(golds) / 2


def test_ids_and_titles_are_unique_over_both_files() -> None:
    ids = Counter(qa["id"] for split in FEWEST_PARAGRAPHS for _, qa in questions_of(split))
    assert [name for name, count in ids.items() if count > 1] == []
    titles = Counter(article["title"] for split in FEWEST_PARAGRAPHS for article in read_squad(split)["data"])
    assert [name for name, count in titles.items() if count > 1] == []


def test_no_question_is_asked_twice() -> None:
    questions = Counter(qa["question"].lower() for split in FEWEST_PARAGRAPHS for _, qa in questions_of(split))
    assert [question for question, count in questions.items() if count > 1] == []


def test_no_paragraph_copies_from_another() -> None:
    phrases = [
        {tuple(words[i : i + COPIED_WORDS]) for i in range(len(words) - COPIED_WORDS + 1)}
        for split in FEWEST_PARAGRAPHS
        for words in (words_of(paragraph["context"]) for paragraph in paragraphs_of(split))
    ]
    assert all(not first & second for first, second in itertools.combinations(phrases, 2))


def test_texts_are_plain_and_questions_end_as_questions(split: str) -> None:
    for context, qa in questions_of(split):
        for text in (context, qa["question"]):
            assert text.isprintable()
            assert text == " ".join(text.split())
        assert qa["question"].endswith("?")


def test_how_a_question_opens_does_not_tell_whether_it_has_an_answer(split: str) -> None:
    """Without the paragraph, the best guess from the first two words is hardly better than none."""
    openings: dict[str, Counter[bool]] = {}
    for _, qa in questions_of(split):
        first, second, *_ = words_of(qa["question"])
        openings.setdefault(f"{first} {second}" if first == "how" else first, Counter())[qa["is_impossible"]] += 1
    common = [counts for counts in openings.values() if counts.total() >= 4]
    guessed = sum(max(counts.values()) for counts in common) / sum(counts.total() for counts in common)
    assert guessed < BEST_GUESS_FROM_THE_OPENING, openings


def test_the_reader_of_squad_files_makes_an_example_of_each_question(split: str) -> None:
    path = demo_questions() / f"{split}.json"
    assert detect_format(path) == "squad"
    rows = [row for _, row in read_rows(path) if not isinstance(row, BrokenRow)]
    recipe = choose_row_format(
        list(rows[0]), task_name="squad", prompt_template=None, completion_template=None, source=path.name
    )
    make_example = example_maker(recipe)
    for (context, qa), row in zip(questions_of(split), rows, strict=True):
        example = make_example(row, "unused")
        assert example.id == qa["id"]
        assert context in example.prompt
        assert qa["question"] in example.prompt
        assert list(example.answers or ()) == [answer["text"] for answer in qa["answers"]]
        assert example.completion == (qa["answers"][0]["text"] if qa["answers"] else "unanswerable")
