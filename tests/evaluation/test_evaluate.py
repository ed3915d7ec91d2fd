"""Evaluation by task, against what the plain network says to each example."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from trietune.data.examples import Example, Task, TokenSequences
from trietune.data.templates import SQUAD_TASK, SST2_TASK
from trietune.errors import UserError
from trietune.evaluation.evaluate import choose_examples, evaluate_model, longest_completion
from trietune.evaluation.metrics import exact_match, f1_score, wilson_interval
from trietune.evaluation.predict import predict_labels
from trietune.model.causal_lm import TrieModel

# Sums of fp32 losses in another order.
FP32_ROUNDING = 1e-5

SENTENCES = (
    "a fine film",
    "a dull film",
    "fine",
    "a fine fine mess",
    "not bad",
    "bad",
    "a film",
    "so so",
    "a fine film",
)
QUESTIONS = (
    Example("q1", "The Normans came in 1066.\nWho?\n", "The Normans", ("The Normans", "Normans")),
    Example("q2", "The Normans came in 1066.\nWhen?\n", "1066", ("1066",)),
    Example("q3", "The Normans came in 1066.\nWhy?\n", "unanswerable"),
    Example("q4", "Rain fell.\nWhat fell?\n", "Rain", ("Rain", "rain fell")),
    Example("q5", "Rain fell.\nWho fell?\n", "unanswerable"),
)


def reviews() -> list[Example]:
    return [
        Example(f"dev.tsv:{number}", f"Review: {sentence}\nOutput:", SST2_TASK.labels[number % 2])
        for number, sentence in enumerate(SENTENCES, start=2)
    ]


@torch.no_grad()
def token_losses(network: Any, encoder: Any, example: Example) -> np.ndarray:
    encoded = encoder.encode([example])
    tokens = torch.from_numpy(encoded.input_ids.astype(np.int64))
    log_probs = network(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
    is_label = torch.from_numpy(encoded.labels[1:] != -100)
    losses = -log_probs[torch.arange(len(tokens) - 1), tokens[1:]][is_label]
    return losses.numpy().astype(np.float64)


@torch.no_grad()
def answer_alone(network: Any, encoder: Any, example: Example, max_new_tokens: int) -> str:
    prompt = encoder.encode_prompt(example)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and tokens[-1] not in encoder.prompt_format.stop_ids:
        tokens.append(int(network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return str(encoder.decode_completion(tokens[len(prompt) :])).strip()


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_label_tasks_get_loss_and_accuracy_from_every_label_of_every_example(
    batching: Any, talkative: Any, make_test_encoder: Any, encode: Any
) -> None:
    network, encoder, examples = talkative("gemma2"), make_test_encoder(SST2_TASK), reviews()
    model = TrieModel(network, device=torch.device("cpu"), attention=None if batching == "padded" else "rows")
    done: list[tuple[str, int, int]] = []
    evaluation = evaluate_model(
        model,
        encode(encoder, examples),
        encoder,
        batching=batching,
        max_positions=120,
        batch_size=4,
        progress=lambda *at: done.append(at),
    )
    losses = [
        [token_losses(network, encoder, Example("", example.prompt, label)) for label in SST2_TASK.labels]
        for example in examples
    ]
    sums = np.array([[label.sum() for label in row] for row in losses])
    gold = np.array([SST2_TASK.labels.index(example.completion) for example in examples])
    gold_losses = np.concatenate([row[right] for row, right in zip(losses, gold, strict=True)])
    predicted = sums.argmin(axis=1)
    num_right = int((predicted == gold).sum())
    assert 0 < num_right < len(examples), "a network that is always right or wrong shows nothing"

    assert evaluation.num_examples == len(examples)
    assert list(evaluation.metrics) == ["eval/loss", "eval/perplexity", "eval/accuracy"]
    assert evaluation.metrics["eval/loss"] == pytest.approx(gold_losses.mean(), rel=FP32_ROUNDING)
    assert evaluation.metrics["eval/perplexity"] == pytest.approx(math.exp(gold_losses.mean()), rel=10 * FP32_ROUNDING)
    assert evaluation.metrics["eval/accuracy"] == num_right / len(examples)
    assert evaluation.intervals["eval/accuracy"] == wilson_interval(num_right, len(examples))
    assert [p.text for p in evaluation.predictions] == [SST2_TASK.label_names[label] for label in predicted]
    assert [p.id for p in evaluation.predictions] == [example.id for example in examples]
    probabilities = np.exp(-sums) / np.exp(-sums).sum(axis=1, keepdims=True)
    found = [[p.probabilities[name] for name in SST2_TASK.label_names] for p in evaluation.predictions]
    assert np.abs(np.array(found) - probabilities).max() < 10 * FP32_ROUNDING
    assert done[-1] == ("labels", len(examples), len(examples))


@pytest.mark.parametrize("attention", ["rows", None])
def test_question_answering_gets_answers_their_scores_and_the_loss(
    attention: Any, talkative: Any, make_test_encoder: Any, encode: Any
) -> None:
    network = talkative("qwen3")
    # Ends often enough that answers differ in length.
    encoder = make_test_encoder(SQUAD_TASK, stop_ids=tuple(range(1, 120, 6)))
    sequences = encode(encoder, QUESTIONS)
    model = TrieModel(network, device=torch.device("cpu"), attention=attention)
    evaluation = evaluate_model(
        model,
        sequences,
        encoder,
        batching="trie" if attention else "padded",
        max_positions=500,
        batch_size=3,
        max_new_tokens=9,
    )
    expected = [answer_alone(network, encoder, question, max_new_tokens=9) for question in QUESTIONS]
    assert [p.text for p in evaluation.predictions] == expected
    assert len(set(expected)) > 1
    assert [p.gold for p in evaluation.predictions] == [question.answers for question in QUESTIONS]
    gold = [question.answers for question in QUESTIONS]
    scores = [exact_match(text, answers) for text, answers in zip(expected, gold, strict=True)]
    assert evaluation.metrics["eval/exact_match"] == pytest.approx(np.mean(scores))
    scores = [f1_score(text, answers) for text, answers in zip(expected, gold, strict=True)]
    assert evaluation.metrics["eval/f1"] == pytest.approx(np.mean(scores))
    losses = np.concatenate([token_losses(network, encoder, question) for question in QUESTIONS])
    assert evaluation.metrics["eval/loss"] == pytest.approx(losses.mean(), rel=FP32_ROUNDING)
    assert {"eval/has_answer_exact_match", "eval/no_answer_exact_match"} < evaluation.metrics.keys()


def test_a_perfect_model_answers_perfectly(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder, network = make_test_encoder(SQUAD_TASK), talkative("llama")
    sequences = encode(encoder, QUESTIONS)
    learn_by_heart(network, sequences)
    model = TrieModel(network, device=torch.device("cpu"))
    evaluation = evaluate_model(model, sequences, encoder, batching="trie", max_positions=500, batch_size=3)
    assert [p.text for p in evaluation.predictions] == [question.completion for question in QUESTIONS]
    rates = {name: value for name, value in evaluation.metrics.items() if name not in ("eval/loss", "eval/perplexity")}
    assert set(rates.values()) == {1.0}
    assert len(rates) == 6


def test_answers_may_be_left_out(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder = make_test_encoder(SQUAD_TASK)
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    how: dict[str, Any] = {"batching": "trie", "max_positions": 500, "batch_size": 3}
    sequences = encode(encoder, QUESTIONS)
    quick = evaluate_model(model, sequences, encoder, **how, generate=False)
    whole = evaluate_model(model, sequences, encoder, **how)
    assert list(quick.metrics) == ["eval/loss", "eval/perplexity"]
    assert quick.predictions == []
    assert quick.metrics["eval/loss"] == pytest.approx(whole.metrics["eval/loss"], rel=FP32_ROUNDING)


def test_any_other_task_is_measured_by_its_loss(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    network, encoder = talkative("mistral"), make_test_encoder(Task(kind="text"))
    model = TrieModel(network, device=torch.device("cpu"))
    evaluation = evaluate_model(
        model, encode(encoder, QUESTIONS), encoder, batching="packed", max_positions=500, batch_size=3
    )
    losses = np.concatenate([token_losses(network, encoder, question) for question in QUESTIONS])
    assert evaluation.metrics["eval/loss"] == pytest.approx(losses.mean(), rel=FP32_ROUNDING)
    assert evaluation.num_examples == len(QUESTIONS)


@pytest.mark.parametrize("task", [SST2_TASK, SQUAD_TASK, Task(kind="text")])
def test_an_empty_set_has_no_numbers(task: Task, talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder = make_test_encoder(task)
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    evaluation = evaluate_model(model, encode(encoder, []), encoder, batching="trie", max_positions=500, batch_size=3)
    assert (evaluation.metrics, evaluation.intervals, evaluation.num_examples) == ({}, {}, 0)


def test_a_subset_is_random_fixed_and_by_seed() -> None:
    chosen = choose_examples(1000, 50, seed=1)
    assert len(set(chosen.tolist())) == 50
    assert np.all(np.diff(chosen) > 0)
    assert np.array_equal(chosen, choose_examples(1000, 50, seed=1))
    assert not np.array_equal(chosen, choose_examples(1000, 50, seed=2))
    # Not the first ones: data sets come sorted.
    assert chosen.max() > 500
    assert choose_examples(7, None, seed=1).tolist() == choose_examples(7, 9, seed=1).tolist() == list(range(7))


def test_a_subset_is_measured_as_those_examples_alone(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder, examples = make_test_encoder(SST2_TASK), reviews()
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    how: dict[str, Any] = {"batching": "trie", "max_positions": 500, "batch_size": 3}
    subset = evaluate_model(model, encode(encoder, examples), encoder, **how, max_examples=4, seed=3)
    chosen = [examples[index] for index in choose_examples(len(examples), 4, seed=3)]
    alone = evaluate_model(model, encode(encoder, chosen), encoder, **how)
    assert subset.num_examples == 4
    assert subset.metrics == pytest.approx(alone.metrics, rel=FP32_ROUNDING)
    assert [p.id for p in subset.predictions] == [example.id for example in chosen]
    assert [examples[p.index].id for p in subset.predictions] == [example.id for example in chosen]


def test_a_completion_that_is_no_label_is_named(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    encoder = make_test_encoder(SST2_TASK)
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    sequences = encode(encoder, [*reviews(), Example("dev.tsv:99", "Review: x\nOutput:", " neutral")])
    with pytest.raises(UserError, match=r"dev\.tsv:99` is none of the 2 labels of this task: `neutral`"):
        evaluate_model(model, sequences, encoder, batching="trie", max_positions=500, batch_size=3)


def test_labels_of_one_name_share_their_probability(talkative: Any, make_test_encoder: Any, encode: Any) -> None:
    labels = (" no", " yes", " yes ")
    encoder = make_test_encoder(Task("labels", labels, ("no", "yes", "yes")))
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    sequences = encode(encoder, [Example(f"{n}", "Review: x\nOutput:", labels[n % 3]) for n in range(6)])
    how: Any = {"batching": "trie", "max_positions": 500}
    found = evaluate_model(model, sequences, encoder, batch_size=3, **how)
    [said] = predict_labels(model, encoder, ["Review: x\nOutput:"], **how)
    for probabilities in (said.probabilities, *(one.probabilities for one in found.predictions)):
        assert list(probabilities) == ["no", "yes"]
        assert math.isclose(sum(probabilities.values()), 1.0, rel_tol=1e-9)
    right = sum(one.text == one.gold[0] for one in found.predictions)
    assert found.metrics["eval/accuracy"] == right / 6


def test_answers_of_own_data_are_compared_with_their_completions(
    talkative: Any, make_test_encoder: Any, encode: Any
) -> None:
    long = "the parcel comes back within thirty days of its arrival here"
    encoder = make_test_encoder(Task("answers"))
    model = TrieModel(talkative("llama"), device=torch.device("cpu"))
    how: Any = {"batching": "trie", "max_positions": 500, "batch_size": 3}
    for completion, gold, names in (
        (f" {long}", (long,), {"exact_match", "f1", "rouge_l"}),
        (" red", ("red",), {"exact_match", "f1"}),
        (" unanswerable", (), {"exact_match", "f1"}),
    ):
        found = evaluate_model(model, encode(encoder, [Example("1", "q:", completion)] * 2), encoder, **how)
        assert found.predictions[0].gold == gold
        assert {name.removeprefix("eval/") for name in found.metrics} >= names
        assert ("eval/rouge_l" in found.metrics) == ("rouge_l" in names)


def test_answers_may_be_as_long_as_the_longest_gold_one(make_test_encoder: Any, encode: Any) -> None:
    sequences = encode(make_test_encoder(SQUAD_TASK), QUESTIONS)
    assert longest_completion(sequences) == len("unanswerable") + 1


def learn_by_heart(network: Any, sequences: TokenSequences) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    tokens = torch.from_numpy(sequences.input_ids.astype(np.int64))
    rows = [tokens[first:last] for first, last in pairwise(sequences.offsets.tolist())]
    for _ in range(40):
        optimizer.zero_grad()
        for row in rows:
            logits = network(input_ids=row[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, row[1:]).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        ("unanswerable", (), True),
        ("Unanswerable.", (), True),
        ("", (), True),
        ("in 1066", (), False),
        ("the 1066", ("1066", "in 1066"), True),
        ("unanswerable", ("1066",), False),
    ],
)
def test_an_answer_is_right_when_the_metric_counts_it(text: str, gold: tuple[str, ...], verdict: bool) -> None:
    from trietune.data.examples import Task
    from trietune.evaluation.evaluate import Prediction, is_right

    assert is_right(Prediction(0, "q", text, gold), Task("answers")) is verdict
