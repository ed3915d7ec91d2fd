"""A tokenizer of transformers as llama.cpp's own: its pieces, their kinds, its rule for splitting text.

llama.cpp does not read regular expressions from a file; it knows the rules of families by name. So the rule in
`tokenizer.json` is recognized here, and one that is not known is refused: another rule would split digits or spaces in
another way, and the model would see other tokens than in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trietune.errors import UserError

# As `tokenizer.json` of these families has them; the names are those of llama.cpp's `llama-vocab.cpp`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _TEKKEN: "tekken"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# Pieces that no merge makes, such as single letters, are tried before all others.
_SCORE_OF_LETTERS = 0.0


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """Attributes: `model` and `pre` are llama.cpp's names; `scores` are empty where merges decide."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    has_space_prefix: bool


def read_gguf_tokenizer(folder: Path, *, vocabulary_size: int) -> GgufTokenizer:
    """The tokenizer of a model folder. Raises `UserError` for one that llama.cpp has no rule for."""
    content = json.loads((folder / "tokenizer.json").read_bytes())
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(f"its kind is {model.get('type')}")
    vocabulary: dict[str, int] = dict(model["vocab"])
    added = {int(token["id"]): token for token in content.get("added_tokens") or ()}
    ids = {number: text for text, number in vocabulary.items()} | {n: t["content"] for n, t in added.items()}
    merges = tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens = tuple(ids.get(number, f"[PAD{number}]") for number in range(vocabulary_size))
    unknown = model.get("unk_token")
    kinds = tuple(_kind(number, ids, added, unknown, is_sentencepiece) for number in range(vocabulary_size))
    if not is_sentencepiece:
        return GgufTokenizer("gpt2", _splitting_rule(content), tokens, (), kinds, merges, False)
    return GgufTokenizer(
        model="llama",
        pre="default",
        tokens=tokens,
        scores=_scores(tokens, kinds, model["merges"]),
        kinds=kinds,
        merges=(),
        has_space_prefix=_has_space_prefix(content),
    )


def _kind(
    number: int,
    ids: Mapping[int, str],
    added: Mapping[int, Mapping[str, object]],
    unknown: object,
    is_sentencepiece: bool,
) -> int:
    if number not in ids:
        return _UNUSED
    if ids[number] == unknown and is_sentencepiece:
        return _UNKNOWN
    if number in added:
        return _CONTROL if added[number].get("special") else _USER_DEFINED
    text = ids[number]
    return _BYTE if is_sentencepiece and len(text) == 6 and text.startswith("<0x") else _NORMAL


def _splitting_rule(content: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rule in `pre_tokenizer`."""
    rule = content.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [part.get("type") for part in parts]
    normalizer = (content.get("normalizer") or {}).get("type")
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and normalizer is None:
        return "gpt-2"
    splits_digits = kinds[:1] == ["Digits"] and parts[0].get("individual_digits")
    if kinds == ["Digits", "ByteLevel"] and splits_digits and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = (parts[0].get("pattern") or {}).get("Regex")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise _unknown(f"its rule for splitting text ({' then '.join(map(str, kinds)) or 'none'}) is not one of theirs")


def _scores(tokens: tuple[str, ...], kinds: tuple[int, ...], merges: Any) -> tuple[float, ...]:
    """SentencePiece joins the pair with the highest score first; merges are in that order already."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return tuple(
        -float(ranks[token]) - 1
        if kind == _NORMAL and token in ranks
        else _SCORE_OF_LETTERS
        if kind == _NORMAL
        else -1e3
        for token, kind in zip(tokens, kinds, strict=True)
    )


def _has_space_prefix(content: Mapping[str, object]) -> bool:
    rules = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in rules or '"prepend_scheme": "first"' in rules or '"prepend_scheme": "always"' in rules


def _unknown(why: str) -> UserError:
    return UserError(
        f"llama.cpp cannot read this model's tokenizer as it was trained: {why}",
        where="GGUF files are written for the tokenizers of GPT-2, SmolLM, Llama, Qwen, Mistral and Gemma",
        next_step="--to transformers, vllm or mlx",
    )
