"""Objectives have the gradients of TRL's own trainers, on the same tokens; only in the benchmarks' environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from parity.test_gradients import FP32_TOLERANCE, FP64_TOLERANCE, build, gradients, relative_error
from parity.test_objectives import VOCABULARY, answer_sets, learn, reference_of
from strategies import flat
from tiny_model import write_tiny_model
from trietune.data.answers import AnswerSets
from trietune.training.objectives.answers import Objective
from trietune.training.objectives.dpo import Dpo
from trietune.training.objectives.ipo import Ipo
from trietune.training.objectives.orpo import Orpo

HAS_TRL = importlib.util.find_spec("trl") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_TRL, reason="benchmarks/requirements.txt is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma2", "gemma3", "qwen3"))]
DTYPES = [(torch.float64, FP64_TOLERANCE), (torch.float32, FP32_TOLERANCE)]
# Whole; cut anywhere, also through a pair; accumulated over three batches.
CUTS = [(10_000, 1), (40, 1), (60, 3)]


def answers_of_one_length(length: int) -> AnswerSets:
    draw = np.random.default_rng(5)
    tokens, labels = [], []
    for _ in range(6):
        prompt = draw.integers(3, VOCABULARY, int(draw.integers(6, 16))).tolist()
        for _ in range(2):
            answer = [*draw.integers(3, VOCABULARY, length - 1).tolist(), 1]
            tokens.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
    plain = flat(tokens, labels)
    grade = np.tile([1.0, 0.0], 6)
    return AnswerSets(plain.input_ids, plain.labels, plain.offsets, np.arange(0, 13, 2), grade, np.ones(12, bool))


def tokenized(sets: AnswerSets) -> list[dict[str, Any]]:
    def split(index: int) -> tuple[list[int], list[int]]:
        begin, end = sets.offsets[index : index + 2]
        ids = sets.input_ids[begin:end].tolist()
        first = int(np.argmax(sets.labels[begin:end] != -100))
        return ids[:first], ids[first:]

    rows = []
    for row in range(sets.num_rows):
        prompt, chosen = split(2 * row)
        other, rejected = split(2 * row + 1)
        assert prompt == other
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


class PlainLogProbabilities:
    """TRL's head computes in fp32, a chunk at a time: this one in the dtype of what it is given."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        chunk: int,
        soft_cap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(hidden, weight, bias) * scale
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        log_p = torch.log_softmax(logits / temperature, -1)
        nothing = torch.zeros_like(log_p[:, 0])  # what TRL only logs
        return log_p.gather(-1, labels[:, None])[:, 0], nothing, nothing, nothing, nothing.bool()


def trl_dpo(network: nn.Module, sets: AnswerSets, folder: Path, **settings: Any) -> tuple[float, dict[str, Any]]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    rows = tokenized(sets)
    trainer = Trainer(
        model=network,
        args=DPOConfig(
            output_dir=str(folder / "out"),
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            max_length=None,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(str(write_tiny_model(folder / "tokenizer"))),
    )
    batch = trainer.data_collator(rows)
    dtype = next(network.parameters()).dtype
    reference = torch.from_numpy(reference_of(sets)).to(dtype)
    batch |= {"ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2]}
    network.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss), gradients(network)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_preferences_have_the_gradients_of_trl(
    name: str,
    family: str,
    dtype: torch.dtype,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trl.trainer import utils

    if dtype == torch.float64:
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", PlainLogProbabilities)
    length = 5
    sets = answer_sets("pairs") if name == "dpo" else answers_of_one_length(length)
    # TRL's IPO takes means: with answers of one length L its margin is ours over L, so its beta is ours times L, and
    # its loss ours over L squared.
    objective: Objective = Dpo(0.3) if name == "dpo" else Ipo(0.4 / length)
    settings = {"beta": 0.3} if name == "dpo" else {"beta": 0.4, "loss_type": ["ipo"]}
    factor = 1.0 if name == "dpo" else float(length**2)
    loss, expected = trl_dpo(build(family, dtype), sets, tmp_path, **settings)
    for max_positions, parts in CUTS:
        learnt, found, _ = learn(
            build(family, dtype), sets, np.split(np.arange(6), parts), objective, "all", max_positions=max_positions
        )
        scaled = {key: gradient / factor for key, gradient in found.items()}
        assert float(learnt.loss) / factor == pytest.approx(loss, rel=tolerance)
        assert relative_error(scaled, expected) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_odds_ratios_have_the_gradients_of_trl(family: str) -> None:
    """TRL's formula is in fp32, and its other term learns the prompt too: so its odds-ratio term by itself."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    sets = answer_sets("pairs")
    network = build(family, torch.float32)
    means = []
    for begin, end in zip(sets.offsets[:-1], sets.offsets[1:], strict=True):
        tokens = torch.from_numpy(sets.input_ids[begin:end].astype(np.int64))[None]
        labels = torch.from_numpy(sets.labels[begin:end].astype(np.int64))[None]
        logits = network(input_ids=tokens, use_cache=False).logits
        means.append(ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
    stacked = torch.cat(means)

    class Settings:
        beta = 0.7
        accelerator = type("", (), {"device": torch.device("cpu")})

    terms = ORPOTrainer.odds_ratio_loss(Settings(), stacked[0::2], stacked[1::2])[0]  # type: ignore[arg-type]
    (-terms.mean()).backward()
    trl_term = gradients(network)
    for max_positions, parts in CUTS:
        both, nothing = (
            learn(
                build(family, torch.float32),
                sets,
                np.split(np.arange(6), parts),
                Orpo(weight),
                "all",
                max_positions=max_positions,
            )[1]
            for weight in (0.7, 0.0)
        )
        # The chosen answers' own loss cancels in the difference, and rounding with it does not.
        ours = {key: both[key] - nothing[key] for key in both}
        assert relative_error(ours, trl_term) < 10 * FP32_TOLERANCE
