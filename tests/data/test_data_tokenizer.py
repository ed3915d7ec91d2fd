"""The rules of token sequences, on every tokenizer family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import BUILDERS, Family, gpt2

from trietune.config import load_config
from trietune.data.columns import RowFormat, WrongRow
from trietune.data.encoder import Encoder, find_stop_ids, hash_tokenizer, load_tokenizer, make_encoder
from trietune.data.examples import IGNORED_LABEL, Example, Message
from trietune.data.preview import split_text
from trietune.data.prompt_formats import make_plain_format, make_prompt_format
from trietune.data.templates import SQUAD_PROMPT, SST2_PROMPT, SST2_TASK, PromptFormat, fill_template
from trietune.errors import UserError

SST2 = Example("1", fill_template(SST2_PROMPT, {"sentence": "a fine film , and moving "}), SST2_TASK.labels[1])
SQUAD = Example(
    "2",
    fill_template(SQUAD_PROMPT, {"context": "The Normans gave their name.", "question": "Who?"}),
    "The Normans",
)
UNANSWERABLE = Example("3", SQUAD.prompt, "unanswerable")
ODD = Example("4", "ends with a space ", "  begins with two, café 日本語\n")
CONVERSATION = Example(
    "5",
    "",
    "it was always 42",
    messages=(
        Message("user", "hello there"),
        Message("assistant", "the answer is 42"),
        Message("user", "what is the answer?"),
        Message("assistant", "it was always 42"),
    ),
)


def encoder_for(tokenizer: Any, make_settings: Any, kind: str = "sst2") -> Encoder:
    prompt_format = make_prompt_format(make_settings(), tokenizer, RowFormat(kind))  # type: ignore[arg-type]
    return make_encoder(tokenizer, prompt_format)


def encode_one(encoder: Encoder, example: Example) -> tuple[list[int], list[int]]:
    encoded = encoder.encode([example])
    assert encoded.lengths.tolist() == [len(encoded.input_ids)]
    return encoded.input_ids.tolist(), encoded.labels.tolist()


@pytest.mark.parametrize("example", [SST2, SQUAD, UNANSWERABLE, ODD], ids=["sst2", "squad", "unanswerable", "odd"])
def test_one_bos_eos_as_last_label_and_text_comes_back(family: Family, make_settings: Any, example: Example) -> None:
    encoder = encoder_for(family.tokenizer, make_settings)
    ids, labels = encode_one(encoder, example)
    bos, eos = family.tokenizer.bos_token_id, family.tokenizer.eos_token_id

    assert (ids[0] == bos) is family.adds_bos
    assert bos not in ids[1:-1]
    assert ids[-1] == eos
    assert labels[-1] == eos
    first = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    assert labels[first:] == ids[first:]
    assert encoder.encode_prompt(example) == ids[:first]
    assert encoder.encode_completion(example.completion) == ids[first:]
    backend = family.tokenizer.backend_tokenizer
    if family.name != "unigram" or example is not ODD:  # it was trained on no such characters, and has no bytes
        assert backend.decode(ids, skip_special_tokens=True) == example.prompt + example.completion
        assert encoder.decode_completion(labels[first:]) == example.completion


def test_text_that_looks_like_a_special_token_stays_text(family: Family, make_settings: Any) -> None:
    if family.name == "unigram":
        pytest.skip("unigram models spell special tokens as words of their vocabulary; no rule of ours can tell")
    encoder = encoder_for(family.tokenizer, make_settings)
    bos = family.tokenizer.bos_token or "<|im_start|>"
    eos = family.tokenizer.eos_token
    ids, labels = encode_one(encoder, Example("1", f"{bos}a {eos} film {bos}\nOutput:", f" fine{eos}"))
    assert family.tokenizer.bos_token_id not in ids[1:-1]
    assert family.tokenizer.eos_token_id not in ids[1:-1]
    assert labels[-1] == family.tokenizer.eos_token_id


def test_prompts_that_were_rendered_elsewhere_get_no_second_bos_and_eos(family: Family, make_settings: Any) -> None:
    encoder = encoder_for(family.tokenizer, make_settings, kind="columns")
    plain = Example("1", "a fine film", " positive")
    bos, eos = family.tokenizer.bos_token or "", family.tokenizer.eos_token
    rendered = Example("2", bos + plain.prompt, plain.completion + eos)
    ids, _ = encode_one(encoder, rendered)
    assert ids.count(family.tokenizer.eos_token_id) == 1 + (bos == eos)
    assert (ids[0] == family.tokenizer.bos_token_id) is (family.tokenizer.bos_token is not None)
    if "llama2" not in family.name and "unigram" not in family.name:
        # Those put their space before the BOS of the text, and before what follows it.
        own = [] if family.adds_bos or not bos else [family.tokenizer.bos_token_id]  # the text's, which is kept
        assert ids == own + encode_one(encoder, plain)[0]
    assert family.tokenizer.bos_token_id not in ids[1:-1]


def test_padding_that_is_eos_hides_no_label(family: Family, make_settings: Any) -> None:
    tokenizer = family.tokenizer
    before = tokenizer.pad_token
    tokenizer.pad_token = tokenizer.eos_token
    try:
        _, labels = encode_one(encoder_for(tokenizer, make_settings), SST2)
    finally:
        tokenizer.pad_token = before
    assert labels.count(tokenizer.eos_token_id) == 1
    assert labels[-1] == tokenizer.eos_token_id


def test_plain_text_is_learnt_from_its_first_predictable_token(family: Family, make_settings: Any) -> None:
    encoder = encoder_for(family.tokenizer, make_settings, kind="text")
    ids, labels = encode_one(encoder, Example("1", "", "the answer is 42"))
    assert labels[0] == IGNORED_LABEL
    assert labels[1:] == ids[1:]
    assert family.tokenizer.backend_tokenizer.decode(ids) == "the answer is 42"


def test_a_batch_is_the_same_as_its_examples_one_by_one(family: Family, make_settings: Any) -> None:
    encoder = encoder_for(family.tokenizer, make_settings)
    examples = [SST2, SQUAD, UNANSWERABLE, SST2, ODD]
    batch = encoder.encode(examples)
    alone = [encode_one(encoder, example) for example in examples]
    assert batch.input_ids.tolist() == [one for ids, _ in alone for one in ids]
    assert batch.labels.tolist() == [one for _, labels in alone for one in labels]
    assert batch.lengths.tolist() == [len(ids) for ids, _ in alone]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.lengths.dtype) == (np.int32, np.int32, np.int64)


def test_every_assistant_turn_is_learnt_and_nothing_else(family: Family, make_settings: Any) -> None:
    if family.tokenizer.chat_template is None:
        with pytest.raises(UserError, match="no chat template"):
            encoder_for(family.tokenizer, make_settings, kind="messages")
        return
    encoder = encoder_for(family.tokenizer, make_settings, kind="messages")
    ids, labels = encode_one(encoder, CONVERSATION)
    tokenizer = family.tokenizer

    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    if family.adds_bos and family.name != "llama2":  # whose template repeats BOS at each turn
        assert ids.count(tokenizer.bos_token_id) == 1
    if family.adds_bos:
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1] != tokenizer.bos_token_id
    spans = label_spans(labels)
    texts = [tokenizer.backend_tokenizer.decode(span, skip_special_tokens=True).strip() for span in spans]
    assert texts == ["the answer is 42", "it was always 42"]
    # Every turn ends with a token that generation stops at.
    assert all(span[-1] in encoder.prompt_format.stop_ids for span in spans)


def test_a_conversation_is_asked_as_it_was_trained(family: Family, make_settings: Any) -> None:
    if family.tokenizer.chat_template is None:
        pytest.skip("this family has no chat template")
    encoder = encoder_for(family.tokenizer, make_settings, kind="messages")
    ids, labels = encode_one(encoder, CONVERSATION)
    last = len(labels) - len(label_spans(labels)[-1])
    assert encoder.encode_prompt(CONVERSATION) == ids[:last]
    asked = Example("6", "", "", messages=CONVERSATION.messages[:-1])
    assert encoder.encode_prompt(asked) == ids[:last]
    first_turn = Example("7", "", "", messages=CONVERSATION.messages[:1])
    first_label = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    assert encoder.encode_prompt(first_turn) == ids[:first_label]


def test_the_rendered_conversation_is_what_the_template_writes(family: Family, make_settings: Any) -> None:
    if family.tokenizer.chat_template is None:
        pytest.skip("this family has no chat template")
    encoder = encoder_for(family.tokenizer, make_settings, kind="messages")
    segments = encoder.segments(CONVERSATION)
    messages = [{"role": one.role, "content": one.content} for one in CONVERSATION.messages]
    rendered = family.tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(text for text, _ in segments) == rendered.rstrip()


def test_generation_stops_at_the_token_that_closes_a_turn(tokenizer: Any, make_settings: Any) -> None:
    chat = encoder_for(tokenizer, make_settings, kind="messages").prompt_format
    assert [tokenizer.convert_ids_to_tokens(one) for one in chat.stop_ids] == ["<eos>", "<end_of_turn>"]
    assert encoder_for(tokenizer, make_settings).prompt_format.stop_ids == (tokenizer.eos_token_id,)
    assert find_stop_ids(tokenizer, chat) == chat.stop_ids


def test_decoding_ends_at_the_first_stop_id(family: Family, make_settings: Any) -> None:
    encoder = encoder_for(family.tokenizer, make_settings)
    ids = encoder.encode_completion(" positive")
    assert encoder.decode_completion([*ids, *encoder.encode_completion(" more")]) == " positive"
    assert encoder.decode_completion(ids[:-1]) == " positive"
    assert encoder.decode_completion([]) == ""


def test_a_template_that_refuses_a_conversation_names_its_reason(tokenizer: Any, make_settings: Any) -> None:
    encoder = encoder_for(tokenizer, make_settings, kind="messages")
    with pytest.raises(WrongRow, match="System role not supported"):
        encoder.encode([Example("1", "", "b", messages=(Message("system", "be kind"), Message("assistant", "b")))])


REWRITING = (
    "{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_learnt_turn_by_turn(tokenizer: Any, make_settings: Any) -> None:
    own = make_settings(chat_template=REWRITING)
    prompt_format = make_prompt_format(own, tokenizer, RowFormat("messages"))
    assert prompt_format.is_turn_by_turn
    assert not encoder_for(tokenizer, make_settings, kind="messages").prompt_format.is_turn_by_turn
    encoder = make_encoder(tokenizer, prompt_format)
    ids, labels = encode_one(encoder, CONVERSATION)
    (span,) = label_spans(labels)
    assert tokenizer.decode(span, skip_special_tokens=True) == "<think></think>it was always 42"
    assert encoder.encode_prompt(CONVERSATION) == ids[: len(ids) - len(span)]
    assert "<think></think>the answer" not in tokenizer.decode(ids)


def test_a_text_begins_as_the_tokenizer_begins_it(make_settings: Any) -> None:
    tokenizer = gpt2()
    hashed = hash_tokenizer(tokenizer)
    assert encoder_for(tokenizer, make_settings).prompt_format.bos_id is None
    tokenizer.init_kwargs["add_bos_token"] = True
    assert encoder_for(tokenizer, make_settings).prompt_format.bos_id == tokenizer.bos_token_id
    assert hash_tokenizer(tokenizer) == hashed  # of adapters that were trained under the first rule
    tokenizer.init_kwargs["add_bos_token"] = False
    assert encoder_for(tokenizer, make_settings).prompt_format.bos_id is None
    assert hash_tokenizer(tokenizer) != hashed


def test_whoever_sets_the_beginning_decides_it(make_settings: Any) -> None:
    tokenizer = gpt2()
    tokenizer.init_kwargs["add_bos_token"] = True
    assert make_prompt_format(make_settings(add_bos=False), tokenizer, RowFormat("columns")).bos_id is None
    tokenizer.init_kwargs["add_bos_token"] = False
    wanted = make_prompt_format(make_settings(add_bos=True), tokenizer, RowFormat("columns"))
    assert wanted.bos_id == tokenizer.bos_token_id
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no beginning-of-sequence token"):
        make_prompt_format(make_settings(add_bos=True), tokenizer, RowFormat("columns"))


def test_a_base_model_is_asked_as_its_tokenizer_says(family: Family) -> None:
    plain = make_plain_format(family.tokenizer)
    assert (plain.kind == "chat") is (family.tokenizer.chat_template is not None)
    encoder = make_encoder(family.tokenizer, plain)
    question = Example("1", "hello there", "", messages=(Message("user", "hello there"),) * (plain.kind == "chat"))
    decoded = family.tokenizer.decode(encoder.encode_prompt(question))
    assert "hello there" in decoded
    assert plain.eos_id in plain.stop_ids


def test_prompt_format_survives_json(family: Family, make_settings: Any) -> None:
    prompt_format = encoder_for(family.tokenizer, make_settings).prompt_format
    assert PromptFormat.from_json(prompt_format.to_json()) == prompt_format
    assert prompt_format.columns == ("sentence",) or prompt_format.columns == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1, "kind": "template"}'])
def test_a_damaged_prompt_format_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="prompt format cannot be read"):
        PromptFormat.from_json(text)


def test_a_later_prompt_format_is_refused() -> None:
    with pytest.raises(UserError, match="version 99"):
        PromptFormat.from_json('{"format_version": 99}')


def test_the_hash_follows_what_decides_ids(family: Family) -> None:
    before = hash_tokenizer(family.tokenizer)
    family.tokenizer(["a film"], padding="max_length", max_length=4, truncation=True)
    assert hash_tokenizer(family.tokenizer) == before
    eos = family.tokenizer.eos_token
    family.tokenizer.eos_token = "a"
    changed = hash_tokenizer(family.tokenizer)
    family.tokenizer.eos_token = eos
    assert changed != before


def test_each_token_shows_the_text_that_it_adds(family: Family, make_settings: Any) -> None:
    ids, _ = encode_one(encoder_for(family.tokenizer, make_settings), SST2)
    texts = split_text(ids, family.tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == family.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_saved_tokenizer_loads(family: Family, tmp_path: Path) -> None:
    if family.name == "gemma-real":
        pytest.skip("large, and the same code")
    family.tokenizer.save_pretrained(tmp_path)
    assert hash_tokenizer(load_tokenizer(tmp_path)) == hash_tokenizer(family.tokenizer)


def test_a_folder_without_tokenizer_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def label_spans(labels: list[int]) -> list[list[int]]:
    """Runs of labels between what is ignored."""
    spans: list[list[int]] = []
    before = IGNORED_LABEL
    for label in labels:
        if label != IGNORED_LABEL:
            if before == IGNORED_LABEL:
                spans.append([])
            spans[-1].append(label)
        before = label
    return spans


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@pytest.mark.parametrize("name", ["llama2", "gemma", "gpt2", "smollm2"])
@given(prompt=TEXT, completion=TEXT)
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back_and_its_prompt_is_asked_as_trained(
    encoders: dict[str, Encoder], name: str, prompt: str, completion: str
) -> None:
    encoder = encoders[name]
    example = Example("1", prompt, completion)
    ids, labels = encode_one(encoder, example)
    num_prompt = len(encoder.encode_prompt(example))
    assert encoder.encode_prompt(example) == ids[:num_prompt]
    first = max(num_prompt, 1)  # nothing predicts the first token of all
    assert labels[first:] == ids[first:]
    assert set(labels[:first]) == {IGNORED_LABEL}
    assert encoder.tokenizer.bos_token_id not in ids[1:-1]
    if prompt:
        assert encoder.decode_completion(ids[num_prompt:]) == completion
        assert ids[num_prompt:] == encoder.encode_completion(completion)
        assert encoder.beginning.decode(ids) == prompt + completion


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    defaults = load_config(environ={})
    tokenizers = {name: BUILDERS[name]() for name in ("llama2", "gemma", "gpt2", "smollm2")}
    return {
        name: make_encoder(tokenizer, make_prompt_format(defaults, tokenizer, RowFormat("sst2")))
        for name, tokenizer in tokenizers.items()
    }
