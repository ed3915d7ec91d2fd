"""Text becomes token ids, by rules that training, evaluation and use share.

    <bos>  prompt  completion  <eos>         one BOS, never two; EOS is the last label
           -100..  labels      label

Prompt and completion are tokenized apart, so that the prompt's tokens in training are those in use, whatever follows.
Some tokenizers put a space before every text that they are given (Llama 2's does). A completion does not begin a
text, so it is tokenized without that space: decoding the whole gives prompt and completion, character for character.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from trietune.chat.conversation import Segment
from trietune.data.chat import TemplateTooSlowError, is_answer, split_turns
from trietune.data.columns import WrongRow
from trietune.data.examples import IGNORED_LABEL, Example, Message
from trietune.data.system_prompt import with_system_prompt
from trietune.data.templates import PromptFormat
from trietune.errors import UserError
from trietune.io.causes import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder, a `transformers` tokenizer.

    Raises:
        UserError: there is none, or it has no fast form, or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # Special tokens of odd kinds are only met when their numbers are asked for.
        _ = tokenizer.all_special_ids, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    except Exception as error:  # whatever is wrong with the files, transformers raises a different class for each
        raise UserError(
            f"the tokenizer of `{folder.name}` cannot be loaded: {first_line(error)}",
            where=str(folder),
            next_step="the folder needs `tokenizer.json` and `tokenizer_config.json`; download the model again",
        ) from None
    loaded = cast("PreTrainedTokenizerFast", tokenizer)
    check_tokenizer(loaded, name=folder.name)
    return loaded


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, *, name: str) -> None:
    """Refuse what cannot be used.

    Raises:
        UserError: no fast form, or no end-of-sequence token.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"the tokenizer of `{name}` has no fast form (`tokenizer.json`), and slow ones are not supported",
            next_step="convert it once: `AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)`",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of `{name}` has no end-of-sequence token, so a model could not learn to stop",
            next_step='add `"eos_token": "..."` to its tokenizer_config.json',
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything about a tokenizer that decides ids: vocabulary, rules, special tokens, chat template."""
    backend = _plain_backend(tokenizer)
    parts = [backend.to_str(), repr(sorted(tokenizer.special_tokens_map.items()))]
    parts.append(repr(_bos_id_as_first_hashed(tokenizer)))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def find_bos_id(tokenizer: PreTrainedTokenizerFast, add_bos: bool | Literal["auto"] = "auto") -> int | None:
    """The id to begin every sequence with; None for none.

    Args:
        add_bos: "auto" does what the tokenizer does, and so what the model was trained with; see
            docs/decisions/0014-the-tokenizer-decides-the-beginning.md.

    Raises:
        UserError: a beginning-of-sequence token is asked for, and the tokenizer has none.
    """
    bos_id = tokenizer.bos_token_id
    if add_bos is True and bos_id is None:
        raise UserError(
            "`add_bos: True`, and the tokenizer has no beginning-of-sequence token",
            next_step='`add_bos: auto`, or add `"bos_token": "..."` to its tokenizer_config.json',
        )
    if bos_id is None or add_bos is False:
        return None
    is_wanted = add_bos is True or tokenizer.init_kwargs.get("add_bos_token") is True
    return int(bos_id) if is_wanted or adds_bos(tokenizer) else None


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before a text by itself."""
    return tokenizer.bos_token_id in _plain_backend(tokenizer).encode("a").ids


def _bos_id_as_first_hashed(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The beginning that `auto` meant when tokenizers were first hashed; the hashes of old adapters hold it."""
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        return None
    declines_it = tokenizer.init_kwargs.get("add_bos_token") is False
    return None if declines_it and not adds_bos(tokenizer) else int(bos_id)


def find_stop_ids(
    tokenizer: PreTrainedTokenizerFast,
    prompt_format: PromptFormat,
    conversations: Sequence[Example] = (),
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """The ids that end an answer: EOS, and in a conversation the token that the chat template closes a turn with.

    Args:
        conversations: some of the data: the first one is for templates that refuse a plain one, and calls of tools may
            end in a way of their own.

    Raises:
        UserError: the chat template cannot be used.
    """
    if prompt_format.kind != "chat":
        return (prompt_format.eos_id,)
    encoder = make_encoder(tokenizer, prompt_format, check_stop=check_stop)
    encoded = _encode_probe(encoder, conversations)
    closing = encoded.input_ids[encoded.labels != IGNORED_LABEL].tolist()
    closing += _ends_of_calls(encoder, conversations)
    special = set(tokenizer.all_special_ids) | {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return tuple(dict.fromkeys([prompt_format.eos_id, *(one for one in closing if one in special)]))


def _ends_of_calls(encoder: Encoder, conversations: Sequence[Example]) -> list[int]:
    """The token before EOS of answers that call a tool."""
    ends: list[int] = []
    for example in conversations:
        calls = [at for at, one in enumerate(example.messages) if one.role == "assistant" and "tool_calls" in one.more]
        if not calls:
            continue
        with contextlib.suppress(WrongRow):
            encoded = encoder.encode([_up_to(example, calls[0])])
            ends += encoded.input_ids[-2:-1].tolist()
    return ends


def _up_to(example: Example, index: int) -> Example:
    """The conversation up to one of its answers, all of which are learned."""
    first, *rest = example.messages[: index + 1]
    return replace(example, messages=(first, *(replace(one, weight=1.0) for one in rest)))


def _encode_probe(encoder: Encoder, conversations: Sequence[Example]) -> EncodedExamples:
    plain = (Message("user", "a"), Message("assistant", "b"))
    probes = [Example("", "", "b", messages=one) for one in (plain, (Message("system", "s"), *plain))]
    for example in conversations:
        end = next((at for at, one in enumerate(example.messages) if one.role == "assistant" and at), None)
        if end is not None:
            own = _up_to(example, end)
            same_roles = tuple(Message(one.role, "b" if one.role == "assistant" else "a") for one in own.messages)
            probes += [replace(own, messages=same_roles), own]
            break
    reason: WrongRow | None = None
    for probe in probes:
        try:
            return encoder.encode([probe])
        except TemplateTooSlowError as error:
            reason = error
            break  # the others would take as long
        except WrongRow as error:
            reason = error
    raise UserError(
        f"the chat template cannot be used: {reason}",
        where="a conversation of the data" if len(probes) > 2 else "a plain conversation of user and assistant",
        next_step="chat_template: FILE.jinja     (a template that renders these conversations, and asks for an answer "
        "with what it writes before one)",
    )


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """Examples as tokens, flat.

    Attributes:
        input_ids: int32 [tokens].
        labels: int32 [tokens], `IGNORED_LABEL` where nothing is to be learned.
        lengths: int64 [examples], tokens of each.
        weights: float64 [tokens], what multiplies the loss of each label; None where that is 1 everywhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Encoder:
    """A prompt format with the tokenizer that carries it out. Make it by `make_encoder`."""

    prompt_format: PromptFormat
    tokenizer: PreTrainedTokenizerFast
    beginning: Any  # tokenizers.Tokenizer, for text that begins a sequence
    continuation: object  # the same without a space of its own in front
    check_stop: Callable[[], None] = lambda: None  # asked while a conversation is rendered

    def encode(self, examples: Sequence[Example]) -> EncodedExamples:
        """Token ids and labels of examples, tokenized as one batch.

        Raises:
            WrongRow: a conversation that the chat template refuses.
        """
        return self.encode_segments([self.segments(example) for example in examples])

    def encode_segments(self, segments: Sequence[Sequence[Segment]]) -> EncodedExamples:
        """`encode` for examples that have been cut into segments already."""
        firsts = self._tokenize(self.beginning, [one[0][0] for one in segments])
        others = iter(self._tokenize(self.continuation, [text for one in segments for text, _ in one[1:]]))
        pieces: list[list[int]] = []
        are_labels: list[bool] = []
        num_pieces = [len(one) + 2 for one in segments]
        for one, first in zip(segments, firsts, strict=True):
            pieces += (self._beginning_of_sequence(), self._without_bos(first))
            pieces += (next(others) for _ in one[1:])
            pieces[-1] = self._without_eos(pieces[-1])
            pieces.append([self.prompt_format.eos_id])
            are_labels.append(False)
            are_labels += (is_label for _, is_label in one)
            are_labels.append(one[-1][1])  # the end is learned with what it ends
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        input_ids = np.fromiter(chain.from_iterable(pieces), np.int32, int(sizes.sum()))
        labels = np.where(np.repeat(np.array(are_labels, bool), sizes), input_ids, np.int32(IGNORED_LABEL))
        lengths = np.add.reduceat(sizes, np.cumsum([0, *num_pieces[:-1]])) if segments else np.zeros(0, np.int64)
        # Nothing comes before a first token, so nothing can predict it; it has a label only without BOS and prompt.
        labels[np.cumsum(lengths) - lengths] = IGNORED_LABEL
        return EncodedExamples(input_ids, labels, lengths)

    def encode_prompt(self, example: Example) -> list[int]:
        """The token ids that the completion of an example follows: the very ids of training.

        Messages that end with the assistant's turn are cut before it; others are asked for an answer.
        """
        if example.messages:
            messages = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
            segments = self._turns(messages, example.tools, add_generation_prompt=True)
        else:
            segments = [(example.prompt, False)] if example.prompt else []
        ids = self._beginning_of_sequence()
        for index, (text, _) in enumerate(segments):
            piece = self._tokenize(self.continuation if index else self.beginning, [text])[0]
            ids = ids + (piece if index else self._without_bos(piece))
        return ids

    def encode_completion(self, completion: str) -> list[int]:
        """The token ids of a completion after a prompt, EOS included: the very ids of training."""
        return [*self._without_eos(self._tokenize(self.continuation, [completion])[0]), self.prompt_format.eos_id]

    def decode_completion(self, ids: Sequence[int]) -> str:
        """The text of generated token ids up to the first stop id, its leading space kept."""
        stops = self.prompt_format.stop_ids
        end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
        # Decoders that drop the space in front of a text would drop the completion's own: decode behind a letter.
        anchor = self.beginning.encode("a", add_special_tokens=False).ids
        decoded = self.beginning.decode([*anchor, *ids[:end]], skip_special_tokens=True)
        return str(decoded[len(self.beginning.decode(anchor, skip_special_tokens=True)) :])

    def segments(self, example: Example) -> list[Segment]:
        """An example as the texts that are tokenized apart, each with whether it is to be learned."""
        if example.messages:
            return self.learnt(example, self.said(example))
        if not example.prompt:
            return [(example.completion, True)]
        return [(example.prompt, False), (example.completion, True)]

    def said(self, example: Example) -> list[Segment]:
        """A conversation as texts, each with whether the assistant says it."""
        return self._turns(example.messages, example.tools, add_generation_prompt=False)

    def learnt(self, example: Example, said: Sequence[Segment]) -> list[Segment]:
        """`said`, without the answers whose weight is 0."""
        answers = iter(self.answers(example))
        return [(text, is_said and next(answers).weight != 0) for text, is_said in said]

    def answers(self, example: Example) -> list[Message]:
        """The messages of a conversation that its tokens may learn: each answer, or the last one."""
        messages = with_system_prompt(example.messages, self.prompt_format.system_prompt)
        answers = [message for index, message in enumerate(messages) if is_answer(message, index)]
        return answers[-1:] if self.prompt_format.is_turn_by_turn else answers

    def _turns(self, messages: Sequence[Message], tools: str = "", *, add_generation_prompt: bool) -> list[Segment]:
        return split_turns(
            with_system_prompt(messages, self.prompt_format.system_prompt),
            tokenizer=self.tokenizer,
            chat_template=self.prompt_format.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            check_stop=self.check_stop,
            only_last=self.prompt_format.is_turn_by_turn,
        )

    def _tokenize(self, backend: Any, texts: Sequence[str]) -> list[list[int]]:
        # A task's few completions, and the turns of a system prompt, come again and again.
        distinct = list(dict.fromkeys(texts))
        # transformers sets these on the same object at each of its own calls.
        backend.encode_special_tokens = not self.prompt_format.parses_special_tokens
        backend.no_truncation()
        backend.no_padding()
        ids = [encoding.ids for encoding in backend.encode_batch_fast(distinct, add_special_tokens=False)]
        if len(distinct) == len(texts):
            return ids
        ids_of = dict(zip(distinct, ids, strict=True))
        return [ids_of[text] for text in texts]

    def _beginning_of_sequence(self) -> list[int]:
        return [] if self.prompt_format.bos_id is None else [self.prompt_format.bos_id]

    def _without_bos(self, ids: list[int]) -> list[int]:
        start = 0
        while start < len(ids) and ids[start] == self.prompt_format.bos_id:
            start += 1
        return ids[start:] if start else ids

    def _without_eos(self, ids: list[int]) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] == self.prompt_format.eos_id:
            end -= 1
        return ids[:end] if end < len(ids) else ids


def make_encoder(
    tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat, *, check_stop: Callable[[], None] = lambda: None
) -> Encoder:
    """The encoder of a prompt format.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        check_stop: asked while a conversation is rendered; what it raises passes through.
    """
    beginning = _plain_backend(tokenizer)
    return Encoder(prompt_format, tokenizer, beginning, _continuation(beginning), check_stop)


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _continuation(backend: Any) -> object:
    """The tokenizer without the rules that put a space before a text; the same object if it has none of them."""
    from tokenizers import Tokenizer

    rules = {"normalizer": _rules_of(backend.normalizer), "pre_tokenizer": _rules_of(backend.pre_tokenizer)}
    bare = {name: _without_prefix(rule) for name, rule in rules.items()}
    if bare == rules:
        return backend
    return Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), **bare}))


def _rules_of(component: Any) -> object:
    return None if component is None else json.loads(component.__getstate__())


def _without_prefix(rule: Any) -> object:
    if rule is None:
        return None
    if rule["type"] == "Sequence":
        key = "normalizers" if "normalizers" in rule else "pretokenizers"
        return {**rule, key: [bare for inner in rule[key] if (bare := _without_prefix(inner)) is not None]}
    if rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return {**rule, "prepend_scheme": "never"}
    if rule["type"] == "ByteLevel":
        return {**rule, "add_prefix_space": False}
    return rule
