"""How many tokens a text has at least, without tokenizing it: tokenizing takes some 400 bytes a character.

    "the film was good"         no token holds two words     at least 4 tokens
    "aaaaaaaaaaaaaaaaa..."      no token is longer than 16   at least a 16th of its bytes

Shown from the tokenizer's own rules. Of one that may pass over text, such as one without a byte fallback or one that
strips spaces, nothing is known, and its texts are tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trietune.chat.conversation import Segment
from trietune.data.encoder import Encoder
from trietune.data.read_row import LengthRules

# Shorter ones cost little.
CHARACTERS_WORTH_A_LOOK = 50_000
_PIECE = 1 << 20
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[[9, 10, 11, 12, 13, 32]] = True
# Bytes for which one byte of NFC's result stands: no character decomposes into more than four, of four bytes each.
_MOST_COMPOSED = 16


@dataclass(frozen=True, slots=True)
class TokenBound:
    """What the tokens of a tokenizer hold at most; `find_bound` makes it.

    Attributes:
        words_of_token: words that begin in it, as ASCII spaces divide them.
        bytes_of_token: of UTF-8 text; None where a token takes the spaces beside it, however many.
        ends: texts of tokens that are taken off at the beginning and the end of a text.
        is_composed: whether the text is brought into NFC first.
        is_metaspace: whether `▁` is a space.
    """

    words_of_token: int
    bytes_of_token: int | None
    ends: tuple[str, ...] = ()
    is_composed: bool = False
    is_metaspace: bool = False

    def least(self, text: str) -> int:
        """The least number of tokens that `text` can have."""
        num_bytes = num_words = 0
        was_space = True
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            if self.is_metaspace:
                piece = piece.replace("▁", " ")
            data = np.frombuffer(piece.encode("utf-8", "replace"), np.uint8)
            is_space = _IS_SPACE[data]
            before = np.concatenate(([was_space], is_space[:-1]))
            num_words += int(np.count_nonzero(before & ~is_space))
            was_space = bool(is_space[-1])
            if not self.is_composed:
                num_bytes += len(data)
            elif piece.isascii():
                num_bytes += len(data) - 1  # the last may be composed with what follows
            else:
                num_bytes += len(data) // _MOST_COMPOSED
        least = num_words // self.words_of_token
        if self.bytes_of_token is not None:
            least = max(least, num_bytes // self.bytes_of_token)
        return max(least - sum(text.count(end) for end in self.ends), 0)


@dataclass(slots=True)
class LeastTokens:
    """Asks the bound only of long texts, and finds it when the first one comes."""

    encoder: Encoder
    _bound: TokenBound | None = None
    _is_found: bool = False

    def of(self, segments: Sequence[Segment], rules: LengthRules) -> int:
        """The least number of tokens that `max_length` is compared with; 0 where nothing is known, or texts are short.

        Of an example whose prompt may be cut, only the first label and what follows count: no cut takes them away.
        """
        if rules.overlong is None:
            return 0
        if rules.overlong == "truncate_prompt":
            first = next((number for number, (_, is_label) in enumerate(segments) if is_label), len(segments))
            segments = segments[first:]
        if sum(len(text) for text, _ in segments) < CHARACTERS_WORTH_A_LOOK:
            return 0
        if not self._is_found:
            backend, words = self.encoder.beginning, self.encoder.prompt_format
            ends = [backend.id_to_token(one) for one in (words.bos_id, words.eos_id) if one is not None]
            self._bound, self._is_found = find_bound(backend, ends), True
        bound = self._bound
        return 0 if bound is None else sum(bound.least(text) for text, _ in segments if text)


def find_bound(backend: Any, ends: Sequence[str | None] = ()) -> TokenBound | None:
    """What a `tokenizers.Tokenizer` shows of itself; None if it may pass over text.

    Args:
        ends: the tokens that begin and end a sequence.
    """
    rules = json.loads(backend.to_str())
    model = rules["model"]
    vocabulary = backend.get_vocab(with_added_tokens=False)
    normalizers, splitters = _flat(rules["normalizer"]), _flat(rules["pre_tokenizer"])
    if model["type"] != "BPE" or not all(map(_keeps_text, splitters)):
        return None
    is_composed = any(rule["type"] == "NFC" for rule in normalizers)
    if not all(rule["type"] == "NFC" or _is_longer(rule) for rule in normalizers):
        return None
    letters = _letters_of_bytes()
    is_bytes = any(rule["type"] == "ByteLevel" for rule in [*normalizers, *splitters])
    if is_bytes and vocabulary.keys() >= letters.keys():
        texts = [bytes(letters.get(one, 63) for one in token) for token in vocabulary]
    elif not is_bytes and model.get("byte_fallback") and vocabulary.keys() >= {f"<0x{n:02X}>" for n in range(256)}:
        texts = [_as_spaces(token) for token in vocabulary]
    else:
        return None
    named = tuple(one for one in ends if one)
    # An end in the tokens must be one in the text: NFC makes K, ` and ; of others, and of ASCII only these.
    if is_composed and not all(one.isascii() and set(one).isdisjoint("K`;") for one in named):
        return None
    if not is_bytes and any(" " in one or "▁" in one for one in named):
        return None
    texts += [_as_spaces(added["content"]) for added in rules["added_tokens"]]
    takes_spaces = any(added["lstrip"] or added["rstrip"] for added in rules["added_tokens"])
    return TokenBound(
        words_of_token=max(1, *(len(text.split()) for text in texts)),
        bytes_of_token=None if takes_spaces else max(1, *map(len, texts)),
        ends=named,
        is_composed=is_composed,
        is_metaspace=not is_bytes,
    )


def _as_spaces(token: str) -> bytes:
    return token.replace("▁", " ").encode("utf-8", "replace")


def _flat(rule: Any) -> list[Any]:
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        inner = rule["normalizers"] if "normalizers" in rule else rule["pretokenizers"]
        return [one for part in inner for one in _flat(part)]
    return [rule]


def _keeps_text(splitter: Any) -> bool:
    """Whether a pre-tokenizer only cuts."""
    if splitter["type"] in ("Split", "Punctuation"):
        return str(splitter.get("behavior", "Isolated")) != "Removed"
    if splitter["type"] == "Metaspace":
        return bool(splitter.get("replacement") == "▁")
    return str(splitter["type"]) in ("ByteLevel", "Digits", "UnicodeScripts")


def _is_longer(normalizer: Any) -> bool:
    """Whether what a normalizer makes of a text never has fewer bytes or words."""
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] == "▁")
    return str(normalizer["type"]) in ("Prepend", "ByteLevel")


def _letters_of_bytes() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes, as GPT-2 chose them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}
