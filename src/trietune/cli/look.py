"""What `--dry-run` shows of the data: what was left out and why, a few examples as they are read, and the longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trietune.data.preview import ExamplePreview
    from trietune.run.prepare import Prepared

NUM_SHOWN = 3
# Of the longest example, tokens at its beginning and at its end.
TOKENS_AT_EACH_END = 150


@dataclass(frozen=True, slots=True)
class Look:
    """Attributes:
    left_out: sentences, each with its number and places.
    examples: the first ones; none with `print_examples: False`, nor the longest.
    """

    left_out: list[str]
    examples: list[ExamplePreview]
    longest: ExamplePreview | None

    def lines(self) -> list[str]:
        """For people."""
        lines = ["", "counted", *(f"  {sentence}" for sentence in self.left_out)] if self.left_out else []
        for preview in self.examples:
            lines += ["", f"example {preview.id}: what the model reads, with [label tokens] in brackets"]
            lines.append(_marked(preview))
        if self.longest is not None:
            num_tokens = len(self.longest.tokens)
            lines += ["", f"longest example, {self.longest.id}: {num_tokens:,} tokens", _marked(self.longest)]
        return lines


def look_at(prepared: Prepared) -> Look:
    """What a prepared run would read."""
    from trietune.data.counts import describe
    from trietune.data.preview import preview_examples, preview_longest

    counts, max_length = prepared.data.counts, int(prepared.settings.max_length)
    left_out = describe(counts.train, is_training=True, max_length=max_length)[1:]
    if counts.validation is not None:
        left_out += describe(counts.validation, is_training=False, max_length=max_length)[1:]
    if not prepared.settings.print_examples:
        return Look(left_out, [], None)
    train, tokenizer = prepared.data.train, prepared.tokenizer
    return Look(left_out, preview_examples(train, tokenizer, NUM_SHOWN), preview_longest(train, tokenizer))


def _marked(preview: ExamplePreview) -> str:
    from trietune.tracking.wording import visible

    tokens = preview.tokens
    texts = [f"[{visible(token.text)}]" if token.is_label else visible(token.text) for token in tokens]
    if len(texts) > 3 * TOKENS_AT_EACH_END:
        hidden = len(texts) - 2 * TOKENS_AT_EACH_END
        texts[TOKENS_AT_EACH_END:-TOKENS_AT_EACH_END] = [f"\n... {hidden:,} tokens are not shown ...\n"]
    return "".join(texts)


def as_json(preview: ExamplePreview) -> dict[str, Any]:
    """For programs."""
    tokens = [[token.text, token.is_label] for token in preview.tokens]
    return {"id": preview.id, "num_tokens": len(tokens), "tokens": tokens}
