"""Rows that are too long by their text are dropped, counted and named without being tokenized."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizer_families
from load_rows import load_rows
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from trietune.data import least_tokens
from trietune.data.encoder import Encoder
from trietune.data.least_tokens import find_bound
from trietune.errors import UserError

WORDS = [
    "a",
    "film",
    "très",
    "日本語",
    "naïve",
    "e\u0301",
    "\u1100\u1161",
    "42,",
    "\u212b",
    "▁",
    "  ",
    "\n\n",
    "\t",
    "\xa0",
    "</s>",
]
LONG = "the film was good, and 12 actors agreed. " * 2_000
BOUNDED = ("llama2", "gemma", "gpt2", "qwen", "smollm2")


def texts(number: int) -> list[str]:
    draw = random.Random(number)
    return ["".join(draw.choices([*WORDS, " ", " "], k=draw.randrange(1, 300))) for _ in range(300)] + [
        "a" * 500, " " * 500, "\n" * 500, "▁" * 500, "▁ " * 500, "e\u0301" * 500, "\u1100\u1161\u11a8" * 200, "",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_tokens, "_PIECE", 64)  # texts of several pieces
    backend = tokenizer_families.BUILDERS[name]().backend_tokenizer
    bound = find_bound(backend)
    assert bound is not None
    for text in texts(1):
        assert bound.least(text) <= len(backend.encode(text, add_special_tokens=False).ids), text
    words = "good film " * 100
    assert bound.least(words) >= 200 // bound.words_of_token > 10


def test_ends_that_are_taken_off_do_not_count() -> None:
    tokenizer = tokenizer_families.BUILDERS["smollm2"]()
    backend, ends = tokenizer.backend_tokenizer, (tokenizer.bos_token, tokenizer.eos_token)
    bound = find_bound(backend, ends)
    assert bound is not None
    assert bound.least(" ".join(ends * 100)) <= 0.5 * len(backend.encode(" ".join(ends * 100)).ids)
    assert bound.least("<|im_start|>user\n" + "good film " * 100) > 100


def test_of_a_tokenizer_that_passes_over_text_nothing_is_known() -> None:
    def changed(change: Any) -> Any:
        backend = tokenizer_families.BUILDERS["gpt2"]().backend_tokenizer
        change(backend)
        return find_bound(backend)

    def no_spaces(backend: Any) -> None:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])

    def split_away(backend: Any) -> None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
        )

    for rule in (normalizers.StripAccents(), normalizers.Strip(), normalizers.Replace("film", ""), normalizers.NFKC()):
        assert changed(lambda backend, rule=rule: setattr(backend, "normalizer", rule)) is None
    assert changed(no_spaces) is None
    assert changed(split_away) is None
    assert find_bound(tokenizer_families.BUILDERS["unigram"]().backend_tokenizer) is None
    assert find_bound(Tokenizer(models.BPE({"a": 0}, []))) is None
    assert find_bound(Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))) is None
    strips = changed(lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)]))
    assert strips is not None
    assert strips.bytes_of_token is None


FORMS: dict[str, Any] = {
    "prompt": lambda text: {"prompt": text, "completion": "yes"},
    "completion": lambda text: {"prompt": "a", "completion": text},
    "text": lambda text: {"text": text},
    "messages": lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]},
    "weighted": lambda text: {"prompt": text, "completion": "yes", "weight": 0.5},
    "answers": lambda text: {"prompt": text, "chosen": "good", "rejected": "bad"},
    "question": lambda text: {
        "id": str(len(text)), "context": text, "question": "q", "answers": {"text": ["a"], "answer_start": [0]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_families.BUILDERS["qwen"]()


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that reach the tokenizer."""
    lengths: list[int] = []
    tokenize = Encoder._tokenize

    def noted(self: Encoder, backend: Any, some: Any) -> Any:
        lengths.extend(map(len, some))
        return tokenize(self, backend, some)

    monkeypatch.setattr(Encoder, "_tokenize", noted)
    return lengths


def load(tokenizer: Any, tmp_path: Path, rows: list[Any], **changes: Any) -> tuple[Any, list[str]]:
    return load_rows(rows, tokenizer, tmp_path, **{"max_length": 400, **changes})


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
@pytest.mark.parametrize("form", FORMS)
def test_an_overlong_row_is_counted_as_ever(
    tokenizer: Any, tmp_path: Path, form: str, overlong: str, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [FORMS[form](text) for text in ("a", LONG, "ccc", LONG + "!", "dd")]
    changes = {"overlong": overlong, **({"objective": "dpo"} if form == "answers" else {})}
    data, lines = load(tokenizer, tmp_path, rows, **changes)
    is_spared = overlong == "drop" or form in ("completion", "text")
    assert (max(tokenized) < len(LONG)) == is_spared
    monkeypatch.setattr(least_tokens, "CHARACTERS_WORTH_A_LOOK", 10**9)
    (tmp_path / "again").mkdir()
    slow, slow_lines = load(tokenizer, tmp_path / "again", rows, **changes)
    assert max(tokenized) >= len(LONG)
    assert lines == slow_lines
    assert data.counts == slow.counts
    assert data.train.input_ids.tolist() == slow.train.input_ids.tolist()
    assert any("longer than `max_length: 400`" in line and "rows.jsonl:2, rows.jsonl:4" in line for line in lines)


def test_an_overlong_row_that_is_an_error_says_how_long_it_is_at_least(
    tokenizer: Any, tmp_path: Path, tokenized: list[int]
) -> None:
    rows = [FORMS["text"](text) for text in ("a", LONG, "b")]
    with pytest.raises(UserError, match="too long, and `overlong: error`") as caught:
        load(tokenizer, tmp_path, rows, overlong="error", validation_file=str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl:2: at least 1" in str(caught.value.where)
    assert max(tokenized) < len(LONG)


def test_validation_still_drops_nothing(tokenizer: Any, tmp_path: Path, tokenized: list[int]) -> None:
    (tmp_path / "valid.jsonl").write_text(json.dumps(FORMS["text"](LONG)) + "\n")
    data, _ = load(tokenizer, tmp_path, [FORMS["text"]("a")], validation_file=str(tmp_path / "valid.jsonl"))
    assert max(tokenized) == len(LONG)
    assert data.counts.validation.overlong.number == 1
    assert len(data.validation) == 1
