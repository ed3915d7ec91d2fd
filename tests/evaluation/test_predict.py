"""Prediction from raw texts, rows and conversations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trietune.data.examples import Example, Message, Task
from trietune.data.templates import SQUAD_PROMPT, SQUAD_TASK, SST2_PROMPT, SST2_TASK
from trietune.errors import UserError
from trietune.evaluation.evaluate import evaluate_model
from trietune.evaluation.predict import answer_turn, make_examples, predict_labels, predict_text
from trietune.model.causal_lm import TrieModel

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_labels_of_raw_texts_are_those_of_the_evaluation(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder = make_test_encoder(SST2_TASK, prompt_template=SST2_PROMPT)
    model = TrieModel(talkative("gemma"), device=torch.device("cpu"))
    sentences = ["a fine film", "bad", "a {strange} one", "a fine film"]
    predictions = predict_labels(model, encoder, sentences, batching="trie", max_positions=200)
    examples = [Example(s, SST2_PROMPT.replace("{sentence}", s), SST2_TASK.labels[0]) for s in sentences]
    evaluation = evaluate_model(
        model, encode(encoder, examples), encoder, batching="trie", max_positions=200, batch_size=2
    )
    assert [p.label for p in predictions] == [p.text for p in evaluation.predictions]
    for prediction, expected in zip(predictions, evaluation.predictions, strict=True):
        assert prediction.probabilities == pytest.approx(expected.probabilities)
    assert predict_labels(model, encoder, [], batching="trie", max_positions=200) == []


def test_answers_to_rows_are_those_of_the_evaluation(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder = make_test_encoder(SQUAD_TASK, prompt_template=SQUAD_PROMPT, stop_ids=tuple(range(1, 120, 6)))
    model = TrieModel(talkative("qwen3"), device=torch.device("cpu"))
    rows = [{"context": "Rain fell.", "question": question} for question in ("What?", "Who fell?", "When did it?")]
    texts = predict_text(model, encoder, rows, max_positions=200, batch_size=2, max_new_tokens=8)
    prompts = [SQUAD_PROMPT.replace("{context}", row["context"]).replace("{question}", row["question"]) for row in rows]
    sequences = encode(encoder, [Example(prompt, prompt, "Rain", ("Rain",)) for prompt in prompts])
    evaluation = evaluate_model(
        model, sequences, encoder, batching="trie", max_positions=200, batch_size=2, max_new_tokens=8
    )
    assert texts == [p.text for p in evaluation.predictions]
    assert any(texts)


def test_without_a_template_a_text_is_the_whole_prompt(make_test_encoder: Any) -> None:
    prompt_format = make_test_encoder(Task(kind="text")).prompt_format
    [text, row] = make_examples(prompt_format, ["Once {upon", {"prompt": "Once {upon"}])
    assert text.prompt == row.prompt == "Once {upon"


def test_a_chat_takes_a_text_as_the_users_turn(make_test_encoder: Any) -> None:
    encoder = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE, bos_id=None)
    messages = [{"role": "user", "content": "Hi"}]
    [text, row] = make_examples(encoder.prompt_format, ["Hi", {"messages": messages}])
    assert text.messages == row.messages == (Message("user", "Hi"),)
    assert encoder.beginning.decode(encoder.encode_prompt(text)) == "u:Hi\na:"


def test_a_turn_of_a_chat_streams_its_text(talkative: Any, make_test_encoder: Any) -> None:
    encoder = make_test_encoder(
        Task(kind="text"),
        kind="chat",
        chat_template=CHAT_TEMPLATE,
        parses_special_tokens=True,
        bos_id=None,
    )
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    messages = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And you?")]
    pieces: list[str] = []
    turn = answer_turn(model, encoder, messages, max_positions=200, max_new_tokens=12, on_text=pieces.append)
    row = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
    [expected] = predict_text(model, encoder, [row], max_positions=200, batch_size=1, max_new_tokens=12)
    assert turn == Message("assistant", expected)
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert turn == answer_turn(model, encoder, messages, max_positions=200, max_new_tokens=12)


@pytest.mark.parametrize(
    ("fields", "value", "message"),
    [
        (
            {"prompt_template": SQUAD_PROMPT},
            "Who?",
            "error: input 1 is a text, and the prompt of this adapter has 2 columns: `context`, `question`\n"
            'next:  give JSON with them: {"context": "...", "question": "..."}',
        ),
        (
            {"prompt_template": SQUAD_PROMPT},
            {"question": "Who?", "id": "7"},
            "error: input 1 has no `context`, which this adapter's prompt uses\n"
            "       it has `question`, `id`\n"
            'next:  give JSON with all of them: {"context": "...", "question": "..."}',
        ),
        (
            {"prompt_template": SST2_PROMPT},
            {"sentence": ["a", "b"]},
            "error: input 1 cannot be read: column `sentence` holds a list, and a text or number is needed\n"
            "next:  give text or a number there",
        ),
        (
            {"prompt_template": SST2_PROMPT},
            7,
            'error: input 1 is neither a text nor a row of columns\nnext:  give JSON: {"sentence": "..."}',
        ),
        (
            {"kind": "chat", "chat_template": CHAT_TEMPLATE},
            {"text": "Hi"},
            "error: input 1 has no `messages`, and this adapter was trained on chats\n"
            'next:  give a text, or JSON such as {"messages": [{"role": "user", "content": "..."}]}',
        ),
        (
            {"kind": "chat", "chat_template": CHAT_TEMPLATE},
            {"messages": [{"role": "user"}]},
            'error: input 1 cannot be read: "content" of message 1 of `messages` is not text\n'
            'next:  give a text, or JSON such as {"messages": [{"role": "user", "content": "..."}]}',
        ),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(
    fields: dict[str, Any], value: Any, message: str, make_test_encoder: Any
) -> None:
    with pytest.raises(UserError) as refused:
        make_examples(make_test_encoder(Task(kind="text"), **fields).prompt_format, [value])
    assert str(refused.value) == message


def test_a_conversation_that_the_template_refuses_is_a_users_mistake(talkative: Any, make_test_encoder: Any) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    encoder = make_test_encoder(Task(kind="text"), kind="chat", chat_template=refusing)
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    with pytest.raises(UserError, match="roles must alternate"):
        answer_turn(model, encoder, [Message("user", "Hi")], max_positions=200)


def test_an_empty_input_keeps_its_place_where_nothing_stands_before_it(talkative: Any, make_test_encoder: Any) -> None:
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    encoder = make_test_encoder(Task(kind="text"), bos_id=None)
    answers = predict_text(model, encoder, ["Hi", "", "Hi"], max_positions=200, batch_size=2, max_new_tokens=3)
    assert answers[0] == answers[2] != ""
    assert answers[1] == ""
    encoder = make_test_encoder(Task("labels", (" a", " b"), ("a", "b")), bos_id=None)
    labels = predict_labels(model, encoder, ["Hi", "", "Hi"], batching="trie", max_positions=200)
    assert [bool(one.label) for one in labels] == [True, False, True]
    assert labels[1].probabilities == {}


def test_half_a_character_is_refused_in_every_input(make_test_encoder: Any) -> None:
    prompt_format = make_test_encoder(Task(kind="text")).prompt_format
    for bad in ("smile \ud83d", {"prompt": "smile \ud83d"}, "byte \udcff"):
        with pytest.raises(UserError, match="input 2 holds half a character"):
            make_examples(prompt_format, ["fine", bad])
    chat = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE, bos_id=None).prompt_format
    for bad in ("\ud83d", {"messages": [{"role": "user", "content": "\ud83d"}]}):
        with pytest.raises(UserError, match="input 1 holds half a character"):
            make_examples(chat, [bad])


def test_a_conversation_that_the_assistant_begins_is_refused(talkative: Any, make_test_encoder: Any) -> None:
    model = TrieModel(talkative("gemma"), device=torch.device("cpu"))
    encoder = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE, bos_id=None)
    begun = {"role": "assistant", "content": "Hi"}
    for messages in ([begun], [begun, {"role": "user", "content": "Hi"}]):
        with pytest.raises(UserError, match="begins with the assistant"):
            predict_text(model, encoder, [{"messages": messages}], max_positions=200, batch_size=2)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}], "system": "be brief"},
        {"conversations": [{"from": "human", "value": "Hi"}], "system": "be brief"},
        {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}]},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello", "system": "be brief"},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}], "system": None},
    ],
)
def test_a_conversation_is_asked_from_the_columns_that_training_reads(
    row: dict[str, Any], make_test_encoder: Any
) -> None:
    encoder = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE, bos_id=None)
    [example] = make_examples(encoder.prompt_format, [row])
    assert encoder.beginning.decode(encoder.encode_prompt(example)) == "s:be brief\nu:Hi\na:"


def test_a_system_column_that_cannot_be_put_first_is_refused(make_test_encoder: Any) -> None:
    chat = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE).prompt_format
    own = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"}]
    for row, reason in (
        ({"messages": own, "system": "be brief"}, "says something else than the system message"),
        ({"messages": own[1:], "system": ["be brief"]}, "column `system` holds a list"),
    ):
        with pytest.raises(UserError, match=reason):
            make_examples(chat, [row])


def test_a_text_that_was_learned_from_its_first_token_is_asked_from_its_column(make_test_encoder: Any) -> None:
    prompt_format = make_test_encoder(Task(kind="text")).prompt_format
    [text, prompt] = make_examples(prompt_format, [{"text": "Once"}, {"text": "Once", "prompt": "Twice"}])
    assert (text.prompt, prompt.prompt) == ("Once", "Twice")


def test_half_a_character_is_refused_wherever_a_template_may_write_it(make_test_encoder: Any) -> None:
    chat = make_test_encoder(Task(kind="text"), kind="chat", chat_template=CHAT_TEMPLATE, bos_id=None).prompt_format
    user = {"role": "user", "content": "a"}
    for row in (
        {"messages": [{**user, "name": "\ud83d"}]},
        {"messages": [{**user, "role": "us\ud83der"}]},
        {"messages": [user], "tools": [{"name": "\ud83d"}]},
        {"messages": [user], "system": "\ud83d"},
    ):
        with pytest.raises(UserError, match=r"in\.jsonl:7 holds half a character"):
            make_examples(chat, [row], ["in.jsonl:7"])
