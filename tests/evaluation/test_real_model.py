"""The sample model on the sample questions: answers and losses on a trie are those of padded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trietune.data.columns import choose_row_format, example_maker
from trietune.data.encoder import find_bos_id, load_tokenizer
from trietune.data.files import read_rows
from trietune.data.templates import SQUAD_PROMPT, SQUAD_TASK
from trietune.demo import demo_questions, smollm2_gguf
from trietune.errors import UserError
from trietune.evaluation.generation import GenerationLimits, generate_and_score
from trietune.model.base.load import load_network
from trietune.model.base.locate import locate_model
from trietune.model.causal_lm import TrieModel

# Sums over 30 layers in fp32, in another order.
FP32_ROUNDING = 1e-4
NUM_QUESTIONS = 12


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_of_the_sample_model_are_those_of_padded_rows(make_test_encoder: Any, encode: Any) -> None:
    try:
        folder = locate_model(str(smollm2_gguf()))
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(folder.path)
    eos_id = int(tokenizer.eos_token_id)
    encoder = make_test_encoder(
        SQUAD_TASK,
        tokenizer=tokenizer,
        prompt_template=SQUAD_PROMPT,
        bos_id=find_bos_id(tokenizer),
        eos_id=eos_id,
        stop_ids=(eos_id,),
    )
    rows = [row for _, row in read_rows(demo_questions() / "dev.json")][:NUM_QUESTIONS]
    row_format = choose_row_format(
        list(rows[0]), task_name="squad", prompt_template=None, completion_template=None, source="dev.json"
    )
    make_example = example_maker(row_format)
    sequences = encode(encoder, [make_example(row, str(number)) for number, row in enumerate(rows)])
    network = load_network(folder, dtype=torch.float32, device=torch.device("cpu"))
    limits = GenerationLimits(frozenset({eos_id}), max_new_tokens=8, max_positions=4096, batch_size=8)
    outcomes = [
        generate_and_score(
            TrieModel(network, device=torch.device("cpu"), attention=attention), sequences, np.arange(len(rows)), limits
        )
        for attention in (None, "rows")
    ]
    (rows_answers, rows_losses, rows_weights), (trie_answers, trie_losses, trie_weights) = outcomes
    assert trie_answers == rows_answers
    assert len({len(answer) for answer in trie_answers}) > 1
    assert np.array_equal(trie_weights, rows_weights)
    difference = np.abs(trie_losses - rows_losses).max()
    assert difference < FP32_ROUNDING * rows_losses.max(), f"largest difference of a loss: {difference:.2e}"
