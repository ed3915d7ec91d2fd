"""Use a trained model: labels with their probabilities, answers, and a conversation.

"a fine film"                               -> positive 0.98, negative 0.02        a task with labels
{"context": "...", "question": "..."}       -> "in 1066"                           answers, from columns
"Once upon a time"                          -> " there was ..."                    any other text, as it is
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trietune.data.columns import WrongRow, conversation_to_ask
from trietune.data.encoder import Encoder
from trietune.data.examples import Example, Message
from trietune.data.messages import read_tools
from trietune.data.templates import PromptFormat, fill_template, to_text
from trietune.errors import UserError
from trietune.evaluation.generation import GenerationLimits, generate
from trietune.evaluation.sampling import Sampling
from trietune.evaluation.scoring import (
    CheckStop,
    FlatSequences,
    label_log_probabilities,
    label_probabilities,
    names_of,
    no_progress,
    no_stop,
    sum_by_name,
)
from trietune.io.half_characters import find_half_character
from trietune.io.json_types import JsonMapping
from trietune.model.causal_lm import TrieModel
from trietune.trie import Batching

Input = str | JsonMapping
"""A text, or a row with the columns that the prompt template names; anything else in a file of JSON is refused."""

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class LabelPrediction:
    """The most likely label by its short name, and the probability of each."""

    label: str
    probabilities: Mapping[str, float]


def predict_labels(
    model: TrieModel,
    encoder: Encoder,
    inputs: Sequence[Input],
    *,
    batching: Batching,
    max_positions: int,
    check_stop: CheckStop = no_stop,
) -> list[LabelPrediction]:
    """The label of each input, for a prompt format whose task has labels; an empty prompt has none.

    Raises:
        UserError: an input does not have what the prompt template asks for.
    """
    task = encoder.prompt_format.task
    all_prompts = [encode_prompt(encoder, example) for example in make_examples(encoder.prompt_format, inputs)]
    prompts = [prompt for prompt in all_prompts if prompt]
    if not prompts:
        return [LabelPrediction("", {}) for _ in all_prompts]
    lengths = np.array([len(prompt) for prompt in prompts])
    input_ids = np.concatenate([np.array(prompt, np.int32) for prompt in prompts])
    probabilities = label_probabilities(
        label_log_probabilities(
            model,
            FlatSequences.without_labels(input_ids, lengths),
            np.arange(len(prompts)),
            [np.array(encoder.encode_completion(label), np.int32) for label in task.labels],
            batching=batching,
            max_positions=max_positions,
            check_stop=check_stop,
            progress=no_progress,
        )
    )
    names, group = names_of(task)
    found = (
        LabelPrediction(names[int(row.argmax())], dict(zip(names, row.tolist(), strict=True)))
        for row in sum_by_name(probabilities, group, len(names))
    )
    return [next(found) if prompt else LabelPrediction("", {}) for prompt in all_prompts]


def predict_text(
    model: TrieModel,
    encoder: Encoder,
    inputs: Sequence[Input],
    *,
    max_positions: int,
    batch_size: int,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    check_stop: CheckStop = no_stop,
    sampling: Sampling | None = None,
) -> list[str]:
    """What the model says to each input, greedily unless `sampling` draws; spaces at both ends are left out.

    An empty prompt has no answer.

    Raises:
        UserError: an input does not have what the prompt template asks for.
    """
    prompts = [encode_prompt(encoder, example) for example in make_examples(encoder.prompt_format, inputs)]
    limits = _limits(
        encoder,
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
        batch_size=batch_size,
        sampling=sampling,
    )
    answers = iter(generate(model, [prompt for prompt in prompts if prompt], limits, check_stop=check_stop))
    # Without a single token, not even BOS, a model has nothing to go on from.
    return [encoder.decode_completion(next(answers)).strip() if prompt else "" for prompt in prompts]


def answer_turn(
    model: TrieModel,
    encoder: Encoder,
    messages: Sequence[Message],
    *,
    max_positions: int,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    check_stop: CheckStop = no_stop,
    on_text: Callable[[str], None] | None = None,
    sampling: Sampling | None = None,
) -> Message:
    """The assistant's next turn in a conversation.

    Args:
        messages: all turns so far; the last one is not the assistant's.
        on_text: called with each new piece of text as it is generated; the pieces together are the turn.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    conversation = _conversation(messages)
    _check_text(conversation, "the conversation")
    prompt = encode_prompt(encoder, conversation)
    limits = _limits(
        encoder, max_new_tokens=max_new_tokens, max_positions=max_positions, batch_size=1, sampling=sampling
    )
    stream = _TextStream(encoder, on_text or (lambda piece: None))
    [answer] = generate(model, [prompt], limits, check_stop=check_stop, on_token=lambda _, token: stream.add(token))
    text = encoder.decode_completion(answer).strip()
    stream.finish(text)
    return Message("assistant", text)


def longest_prompt(encoder: Encoder, inputs: Sequence[Input]) -> int:
    """Tokens of the longest prompt of `inputs`; raises as `predict_text` does."""
    examples = make_examples(encoder.prompt_format, inputs)
    return max((len(encode_prompt(encoder, example)) for example in examples), default=0)


def prompt_length(encoder: Encoder, messages: Sequence[Message]) -> int:
    """Tokens of a conversation, up to where the assistant's next turn begins."""
    return len(encode_prompt(encoder, _conversation(messages)))


def make_examples(
    prompt_format: PromptFormat, inputs: Sequence[Input], places: Sequence[str] | None = None
) -> list[Example]:
    """The prompts of inputs that have no completion yet.

    A template with one column takes a text as that column, a chat as the user's turn; data without a template takes it
    as the whole prompt. A row is read by the names of its columns.

    Args:
        places: what each input is called in an error; None counts them.

    Raises:
        UserError: a text for a template with several columns, or a row that lacks a column.
    """
    names = [f"input {number}" for number in range(1, len(inputs) + 1)] if places is None else places
    examples = [_make_example(prompt_format, value, name) for value, name in zip(inputs, names, strict=True)]
    for example, name in zip(examples, names, strict=True):
        _check_text(example, name)
    return examples


def _check_text(example: Example, name: str) -> None:
    parts = [part for message in example.messages for part in (message.role, message.content, message.more)]
    if half := find_half_character(example.prompt, example.tools, *parts):
        raise UserError(
            f"{name} holds half a character, or a byte that is not UTF-8 ({half})",
            next_step="give the text as UTF-8; in JSON, both halves: \\ud83d\\ude00",
        )


def _make_example(prompt_format: PromptFormat, value: Input, name: str) -> Example:
    if prompt_format.kind == "chat":
        if isinstance(value, str):
            return _conversation([Message("user", value)])
        try:
            messages = conversation_to_ask(value) if isinstance(value, Mapping) else None
            if messages is not None:
                return _conversation(messages, read_tools(value.get("tools")))
        except TypeError as error:
            raise UserError(f"{name} cannot be read: {error}", next_step=_ADVICE_MESSAGES) from None
        raise UserError(f"{name} has no `messages`, and this adapter was trained on chats", next_step=_ADVICE_MESSAGES)
    columns = tuple(name for name in prompt_format.columns if name not in prompt_format.optional_columns)
    if isinstance(value, str):
        if not prompt_format.prompt_template:
            return Example(id=name, prompt=value, completion="")
        if len(columns) != 1:
            raise UserError(
                f"{name} is a text, and the prompt of this adapter has {len(columns)} columns: {_named(columns)}",
                next_step=f"give JSON with them: {_sample_row(columns)}",
            )
        value = {columns[0]: value}
    if not isinstance(value, Mapping):
        raise UserError(
            f"{name} is neither a text nor a row of columns",
            next_step=f"give JSON: {_sample_row(columns or ('prompt',))}",
        )
    if not prompt_format.prompt_template:
        # Texts that are learned from their first token on stand in `text`.
        columns = ("text",) if "text" in value and "prompt" not in value else ("prompt",)
    missing = [column for column in columns if column not in value]
    if missing:
        raise UserError(
            f"{name} has no {_named(missing)}, which this adapter's prompt uses",
            where=f"it has {_named(list(value)) or 'no columns'}",
            next_step=f"give JSON with all of them: {_sample_row(columns)}",
        )
    try:
        template = prompt_format.prompt_template
        if template:
            prompt = fill_template(template, value, prompt_format.template_columns)
        else:
            prompt = to_text(value[columns[0]], columns[0])
        return Example(id=name, prompt=prompt, completion="")
    except TypeError as error:
        raise UserError(f"{name} cannot be read: {error}", next_step="give text or a number there") from None


_ADVICE_MESSAGES = 'give a text, or JSON such as {"messages": [{"role": "user", "content": "..."}]}'


def encode_prompt(encoder: Encoder, example: Example) -> list[int]:
    """The token ids that the model is asked with.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    try:
        return encoder.encode_prompt(example)
    except WrongRow as error:
        raise UserError(
            f"this conversation cannot continue: {error}", next_step="start a new one with the user's turn"
        ) from None


def _conversation(messages: Sequence[Message], tools: str = "") -> Example:
    return Example(id="", prompt="", completion="", messages=tuple(messages), tools=tools)


def _named(columns: Sequence[str]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _sample_row(columns: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{column}": "..."' for column in columns) + "}"


def _limits(
    encoder: Encoder, *, max_new_tokens: int, max_positions: int, batch_size: int, sampling: Sampling | None
) -> GenerationLimits:
    return GenerationLimits(
        stop_ids=frozenset(encoder.prompt_format.stop_ids),
        max_new_tokens=max_new_tokens,
        max_positions=max_positions,
        batch_size=batch_size,
        sampling=sampling,
    )


class _TextStream:
    """Tokens become text as they come: a piece is passed on once it cannot change any more."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], None]) -> None:
        self._encoder = encoder
        self._on_text = on_text
        self._tokens: list[int] = []
        self._num_passed_on = 0

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self._encoder.decode_completion(self._tokens).lstrip()
        # A character of several tokens decodes to U+FFFD until it is whole; trailing spaces may yet be cut off.
        end = len(text.rstrip("\ufffd").rstrip())
        self._pass_on(text[:end])

    def finish(self, text: str) -> None:
        self._pass_on(text)

    def _pass_on(self, text: str) -> None:
        if len(text) > self._num_passed_on:
            self._on_text(text[self._num_passed_on :])
            self._num_passed_on = len(text)
