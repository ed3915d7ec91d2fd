"""Every objective has the gradients of plain rows, one per answer, through transformers, by the formula as written.

The formulas here are written a second time, from the papers, over plain Python lists of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax

from model.families import in_double, with_adapter
from parity.test_gradients import FP32_TOLERANCE, FP64_TOLERANCE, build, gradients, relative_error
from strategies import flat
from trietune.data.answers import AnswerSets
from trietune.device.cpu import describe_cpu
from trietune.model.causal_lm import TrieModel
from trietune.training.objectives.answers import Objective
from trietune.training.objectives.by_scores import LearnByScores
from trietune.training.objectives.dpo import Dpo
from trietune.training.objectives.ipo import Ipo
from trietune.training.objectives.kto import Kto
from trietune.training.objectives.learning import Learnt, Work
from trietune.training.objectives.orpo import Orpo
from trietune.training.objectives.rank import Rank
from trietune.training.objectives.simpo import Simpo
from trietune.training.objectives.with_chosen import WithChosen
from trietune.trie import MicroBatch, make_micro_batches

VOCABULARY = 120
OTHERS = ("gemma", "gemma2", "gemma3", "qwen3")


def answer_sets(kind: str, *, num_rows: int = 6, seed: int = 3) -> AnswerSets:
    """Rows that share prompts; answers begin alike and differ in length, and one is the beginning of another."""
    draw = np.random.default_rng(seed)
    tokens, labels, grade, trained, starts = [], [], [], [], [0]
    prompts = [draw.integers(3, VOCABULARY, int(draw.integers(6, 16))).tolist() for _ in range(3)]
    for row in range(num_rows):
        prompt = prompts[row % 3] + draw.integers(3, VOCABULARY, int(draw.integers(0, 3))).tolist()
        common = draw.integers(3, VOCABULARY, 2).tolist()
        number = {"pairs": 2, "ranked": 4, "kto": 2}[kind]
        for answer in range(number):
            said = common + draw.integers(3, VOCABULARY, int(draw.integers(1, 6))).tolist()
            if row == 1 and answer == 1:
                said = tokens[-1][len(prompt) : -1][:-1] or said
            said = [*said, 1]
            tokens.append(prompt + said)
            labels.append([-100] * len(prompt) + said)
            trained.append(kind != "kto" or answer == 0)
        starts.append(len(tokens))
        match kind:
            case "pairs":
                grade += [1.0, 0.0]
            case "ranked":
                grade += [2.0, 0.5, 2.0, -1.0]  # the first and the third are a tie
            case _:
                grade += [1.0 if row % 3 else -1.0, 0.0]
    plain = flat(tokens, labels)
    return AnswerSets(
        plain.input_ids, plain.labels, plain.offsets, np.array(starts), np.array(grade), np.array(trained)
    )


def one_hot(sets: AnswerSets) -> AnswerSets:
    """One right answer a row, as ranking has it."""
    grade = np.zeros(len(sets))
    grade[sets.row_start[:-1] + np.arange(sets.num_rows) % 4] = 1.0
    return AnswerSets(sets.input_ids, sets.labels, sets.offsets, sets.row_start, grade, sets.is_trained)


Scores = list[list[Any]]  # of each row, of each answer: (sum, number of labels, reference, grade)


def in_pairs(rows: Scores, term: Callable[[Any, Any], Any], *, only_best: bool = False) -> Any:
    parts = []
    for row in rows:
        for a in row:
            for b in row:
                if a[3] > b[3] and not (only_best and a[3] < max(c[3] for c in row)):
                    parts.append(term(a, b))
    return sum(parts) / len(parts)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + torch.exp(-x))


def dpo(rows: Scores, beta: float, smoothing: float = 0.0) -> Any:
    def term(a: Any, b: Any) -> Any:
        h = (a[0] - a[2]) - (b[0] - b[2])
        return -(1 - smoothing) * torch.log(sigmoid(beta * h)) - smoothing * torch.log(sigmoid(-beta * h))

    return in_pairs(rows, term)


def ipo(rows: Scores, beta: float) -> Any:
    return in_pairs(rows, lambda a, b: ((a[0] - a[2]) - (b[0] - b[2]) - 1 / (2 * beta)) ** 2)


def simpo(rows: Scores, beta: float, gamma: float, *, only_best: bool = False) -> Any:
    def term(a: Any, b: Any) -> Any:
        return -torch.log(sigmoid(beta * (a[0] / a[1] - b[0] / b[1]) - gamma))

    return in_pairs(rows, term, only_best=only_best)


def orpo(rows: Scores, weight: float) -> Any:
    def odds(a: Any) -> Any:
        p = torch.exp(a[0] / a[1])
        return p / (1 - p)

    return in_pairs(rows, lambda a, b: -a[0] / a[1] - weight * torch.log(sigmoid(torch.log(odds(a) / odds(b)))))


def kto(rows: Scores, beta: float, desirable: float, undesirable: float) -> Any:
    z0 = max(0.0, sum((row[1][0] - row[1][2]).item() for row in rows) / len(rows))
    parts = []
    for own, _ in rows:
        t = own[0] - own[2]
        wanted = own[3] > 0
        parts.append(
            desirable * (1 - sigmoid(beta * (t - z0))) if wanted else undesirable * (1 - sigmoid(beta * (z0 - t)))
        )
    return sum(parts) / len(parts)


def rank(rows: Scores, by: str) -> Any:
    def value(a: Any) -> Any:
        return a[0] if by == "sum" else a[0] / a[1]

    parts = []
    for row in rows:
        (right,) = [a for a in row if a[3] == 1]
        parts.append(-torch.log(torch.exp(value(right)) / sum(torch.exp(value(a)) for a in row)))
    return sum(parts) / len(parts)


def with_chosen(rows: Scores, beta: float, weight: float) -> Any:
    best = [a for row in rows for a in row if a[3] == max(b[3] for b in row)]
    return dpo(rows, beta) - weight * sum(a[0] for a in best) / sum(a[1] for a in best)


CASES: dict[str, tuple[Objective, str, str, Callable[[Scores], Any]]] = {
    "dpo": (Dpo(0.3), "pairs", "all", lambda rows: dpo(rows, 0.3)),
    "cdpo, ranked": (Dpo(0.3, 0.2), "ranked", "all", lambda rows: dpo(rows, 0.3, 0.2)),
    "ipo": (Ipo(0.4), "pairs", "all", lambda rows: ipo(rows, 0.4)),
    "simpo": (Simpo(2.0, 0.5), "pairs", "all", lambda rows: simpo(rows, 2.0, 0.5)),
    "simpo, best": (Simpo(2.0, 0.5), "ranked", "best", lambda rows: simpo(rows, 2.0, 0.5, only_best=True)),
    "orpo": (Orpo(0.7), "pairs", "all", lambda rows: orpo(rows, 0.7)),
    "kto": (Kto(0.3, 1.5, 0.7), "kto", "all", lambda rows: kto(rows, 0.3, 1.5, 0.7)),
    "rank by sums": (Rank("sum"), "one of four", "all", lambda rows: rank(rows, "sum")),
    "rank by means": (Rank("mean"), "one of four", "all", lambda rows: rank(rows, "mean")),
    "dpo with chosen": (WithChosen(Dpo(0.3), 0.6), "pairs", "all", lambda rows: with_chosen(rows, 0.3, 0.6)),
}


def sets_of(kind: str) -> AnswerSets:
    return one_hot(answer_sets("ranked")) if kind == "one of four" else answer_sets(kind)


def reference_of(sets: AnswerSets) -> np.ndarray:
    lengths = (sets.labels != -100).astype(float)
    sums = np.add.reduceat(lengths, sets.offsets[:-1])
    # So that KTO's mean is above zero and its clamp does nothing.
    return -6.5 * sums + np.random.default_rng(9).normal(size=len(sums))


def one_row_an_answer(
    network: nn.Module, sets: AnswerSets, rows: np.ndarray, formula: Callable[[Scores], Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    network.zero_grad()
    reference = reference_of(sets)
    scores: Scores = []
    for row in rows:
        own = []
        for index in range(sets.row_start[row], sets.row_start[row + 1]):
            begin, end = sets.offsets[index : index + 2]
            tokens = torch.from_numpy(sets.input_ids[begin:end].astype(np.int64))[None]
            labels = torch.from_numpy(sets.labels[begin + 1 : end].astype(np.int64))
            logits = network(input_ids=tokens, use_cache=False).logits[0, :-1]
            log_p = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
            places = torch.nonzero(labels != -100)[:, 0]
            total = log_p[places, labels[places]].double().sum()
            own.append((total, len(places), reference[index], sets.grade[index]))
        scores.append(own)
    loss = formula(scores)
    loss.backward()
    return loss.item(), gradients(network)


def learn(
    network: nn.Module,
    sets: AnswerSets,
    batches: list[np.ndarray],
    objective: Objective,
    pairs: str,
    *,
    max_positions: int,
    batching: str = "trie",
    keeps_draws: bool = False,
) -> tuple[Learnt, dict[str, torch.Tensor], TrieModel]:
    network.zero_grad()
    model = TrieModel(network, device=torch.device("cpu"), attention="rows" if batching != "padded" else None)
    micro_batches: list[MicroBatch] = []
    for rows in batches:
        sequences = sets.sequences_of(rows)
        for trained in (True, False):
            chosen = sequences[sets.is_trained[sequences] == trained]
            micro_batches += make_micro_batches(sets, chosen, batching=batching, max_positions=max_positions)
    work = Work(np.concatenate(batches), micro_batches, describe_cpu(), lambda: None, None)
    learner = LearnByScores(objective, sets, reference_of(sets), pairs, keeps_draws)
    return learner(model, work), gradients(network), model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)])
def test_an_objective_has_the_gradients_of_one_row_an_answer(
    case: str, family: str, dtype: torch.dtype, tolerance: float
) -> None:
    objective, kind, pairs, formula = CASES[case]
    sets = sets_of(kind)
    rows = np.array([4, 0, 3, 1, 5, 2])
    loss, expected = one_row_an_answer(build(family, dtype), sets, rows, formula)
    network = build(family, dtype)
    # Whole: one pass. Cut anywhere, also through a pair: two. Accumulated: one divisor over several batches.
    for max_positions, batches in ((10_000, [rows]), (40, [rows]), (60, [rows[:1], rows[1:4], rows[4:]])):
        learnt, found, _ = learn(network, sets, batches, objective, pairs, max_positions=max_positions)
        error = relative_error(found, expected)
        assert abs(float(learnt.loss) - loss) / abs(loss) < tolerance
        assert error < tolerance, f"{case}, {family}, {max_positions}: relative error {error:.1e}"


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("case", ["dpo", "kto", "rank by means"])
def test_an_objective_has_the_same_gradients_on_packed_and_padded_rows(case: str, batching: str) -> None:
    objective, kind, pairs, formula = CASES[case]
    sets, rows = sets_of(kind), np.arange(6)
    loss, expected = one_row_an_answer(build("llama", torch.float64), sets, rows, formula)
    for max_positions in (10_000, 60):
        learnt, found, _ = learn(
            build("llama", torch.float64),
            sets,
            [rows],
            objective,
            pairs,
            max_positions=max_positions,
            batching=batching,
        )
        assert abs(float(learnt.loss) - loss) < FP64_TOLERANCE * abs(loss)
        assert relative_error(found, expected) < FP64_TOLERANCE


def test_an_adapters_gradients_are_those_of_one_row_an_answer() -> None:
    objective, kind, pairs, formula = CASES["dpo"]
    sets, rows = sets_of(kind), np.arange(6)
    networks = [with_adapter("llama") for _ in range(2)]
    for network in networks:
        in_double(network.get_base_model())
        network.double()
    base = [network.get_base_model() for network in networks]
    _, expected = one_row_an_answer(base[0], sets, rows, formula)
    for max_positions in (10_000, 40):
        _, found, _ = learn(base[1], sets, [rows], objective, pairs, max_positions=max_positions)
        assert set(found) == {name for name, p in base[1].named_parameters() if p.requires_grad}
        assert relative_error(found, expected) < FP64_TOLERANCE


def test_the_common_beginning_of_two_answers_needs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, kind, _, _ = CASES["dpo"]
    sets, rows = sets_of(kind), np.array([0])
    computed: list[tuple[bool, int]] = []
    label_losses = TrieModel.label_losses

    def counted(self: TrieModel, micro_batch: MicroBatch) -> torch.Tensor:
        computed.append((torch.is_grad_enabled(), len(micro_batch.labels)))
        return label_losses(self, micro_batch)

    monkeypatch.setattr(TrieModel, "label_losses", counted)
    both = sets.sequences_of(rows)
    (whole,) = make_micro_batches(sets, both, batching="trie", max_positions=10_000)
    other = sets.sequences_of(np.array([2]))
    (second,) = make_micro_batches(sets, other, batching="trie", max_positions=10_000)
    work = Work(np.array([0, 2]), [whole, second], describe_cpu(), lambda: None, None)
    model = TrieModel(build("llama", torch.float64), device=torch.device("cpu"), attention="rows")
    LearnByScores(objective, sets, reference_of(sets))(model, work)
    in_pass_1 = sum(number for has_graph, number in computed if not has_graph)
    in_pass_2 = sum(number for has_graph, number in computed if has_graph)
    assert in_pass_1 == len(whole.labels) + len(second.labels)
    assert in_pass_2 == in_pass_1 - 4  # two tokens are common to both answers of each row


def test_a_batch_that_fits_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, kind, pairs, _ = CASES["dpo"]
    sets = sets_of(kind)
    calls: list[bool] = []
    label_losses = TrieModel.label_losses
    monkeypatch.setattr(
        TrieModel,
        "label_losses",
        lambda self, micro_batch: (calls.append(torch.is_grad_enabled()), label_losses(self, micro_batch))[1],
    )
    learn(build("llama", torch.float32), sets, [np.arange(6)], objective, pairs, max_positions=10_000)
    assert calls == [True]


def test_both_passes_draw_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, kind, _, _ = CASES["dpo"]
    sets, rows = sets_of(kind), np.arange(6)
    network = with_adapter("llama", lora_dropout=0.3).get_base_model()
    network.train()
    model = TrieModel(network, device=torch.device("cpu"), attention="rows")
    seen: list[torch.Tensor] = []
    label_losses = TrieModel.label_losses

    def noted(self: TrieModel, micro_batch: MicroBatch) -> torch.Tensor:
        losses = label_losses(self, micro_batch)
        seen.append(losses.detach().clone())
        return losses

    monkeypatch.setattr(TrieModel, "label_losses", noted)
    micro_batches = make_micro_batches(sets, sets.sequences_of(rows), batching="trie", max_positions=40)
    work = Work(rows, micro_batches, describe_cpu(), lambda: torch.manual_seed(5), None)
    torch.manual_seed(5)
    LearnByScores(objective, sets, reference_of(sets), "all", keeps_draws=True)(model, work)
    half = len(seen) // 2
    assert half == len(micro_batches) > 1
    assert all(torch.equal(first, second) for first, second in zip(seen[:half], seen[half:], strict=True))
    # The draws themselves matter: another seed gives other losses.
    torch.manual_seed(6)
    assert not torch.equal(label_losses(model, micro_batches[0]), seen[0])


def test_a_ranked_row_makes_every_pair_but_ties() -> None:
    from trietune.training.objectives.answers import answers_of

    sets = answer_sets("ranked", num_rows=1)
    counts = np.ones(4)
    every = answers_of(sets, np.array([0]), counts, None, "all")
    assert set(zip(every.better.tolist(), every.worse.tolist(), strict=True)) == {
        (0, 1),
        (0, 3),
        (1, 3),
        (2, 1),
        (2, 3),
    }
    best = answers_of(sets, np.array([0]), counts, None, "best")
    assert set(zip(best.better.tolist(), best.worse.tolist(), strict=True)) == {(0, 1), (0, 3), (2, 1), (2, 3)}
    assert every.best.tolist() == [0, 2]


def test_an_answer_without_labels_has_a_mean_of_zero() -> None:
    from trietune.training.objectives.answers import answers_of

    answers = answers_of(answer_sets("pairs", num_rows=1), np.array([0]), np.array([3.0, 0.0]), None, "all")
    assert answers.mean(torch.tensor([-6.0, 0.0], dtype=torch.float64)).tolist() == [-2.0, 0.0]


def test_a_certain_answer_has_finite_odds() -> None:
    from trietune.training.objectives.answers import answers_of

    sets = answer_sets("pairs", num_rows=1)
    answers = answers_of(sets, np.array([0]), np.ones(2), None, "all")
    scores = torch.tensor([0.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss = Orpo(0.5).loss(scores, answers)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()
