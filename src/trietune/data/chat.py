"""Conversations through a chat template, cut where the assistant speaks.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n      what the model is given
    Hello!<|im_end|>                                            what it has to say: labels
    \\n<|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\n
    Well.<|im_end|>                                             labels

A turn begins where the template, given all that went before, asks for an answer. So what the model is given in training
is, character for character, what it is given in use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trietune.data.examples import Message
from trietune.data.recipes import WrongRow

Segment = tuple[str, bool]  # text, and whether it is to be learnt

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def split_turns(
    messages: Sequence[Message], *, tokenizer: Any, chat_template: str, add_generation_prompt: bool
) -> list[Segment]:
    """The rendered conversation as alternating segments, text that is given and text that is to be learnt.

    With `add_generation_prompt` the last segment asks for the next answer; without it, the last one is an answer.

    Raises:
        WrongRow: the template refuses the conversation, or writes its earlier turns anew as it goes on.
    """
    full = _render(messages, tokenizer, chat_template, add_generation_prompt)
    segments: list[Segment] = []
    end = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        given = _render(messages[:index], tokenizer, chat_template, True)
        is_last = index == len(messages) - 1 and not add_generation_prompt
        said = full if is_last else _render(messages[: index + 1], tokenizer, chat_template, False)
        if not (full.startswith(said) and said.startswith(given) and len(given) >= end):
            return _split_at_markers(messages, tokenizer, chat_template, add_generation_prompt)
        segments += [(full[end : len(given)], False), _without_space_behind(full[len(given) : len(said)])]
        end = len(given) + len(segments[-1][0])
    if add_generation_prompt:
        segments.append((full[end:], False))
    return segments


def _without_space_behind(text: str) -> Segment:
    """The line break that templates write behind `<|im_end|>` comes after the model has stopped: nothing to learn."""
    return text.rstrip(), True


def _split_at_markers(
    messages: Sequence[Message], tokenizer: Any, chat_template: str, add_generation_prompt: bool
) -> list[Segment]:
    """For templates that mark with `{% generation %}` what the assistant says."""
    if not _GENERATION_MARKER.search(chat_template):
        raise WrongRow(
            "the chat template writes earlier turns in another way once later ones follow, so what an answer was "
            "given cannot be told"
        )
    from transformers.utils.chat_template_utils import render_jinja_template

    # Annotated as text there; with this flag it is a pair of lists, the texts and the spans of each.
    render: Any = render_jinja_template
    rendered, spans = render(
        conversations=[_to_dicts(messages)],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    full = rendered[0]
    segments: list[Segment] = []
    end = 0
    for start, stop in spans[0]:
        segments += [(full[end:start], False), _without_space_behind(full[start:stop])]
        end = start + len(segments[-1][0])
    if add_generation_prompt:
        segments.append((full[end:], False))
    return segments


def _render(messages: Sequence[Message], tokenizer: Any, chat_template: str, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                _to_dicts(messages),
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except TemplateError as error:
        raise WrongRow(f"the chat template refuses it: {error}") from None


def _to_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
