"""Train the same steps with all memory, then with an address space that a whole batch does not fit into.

A head of 30,000 tokens makes a micro-batch large: 120 KB a label and copy. How much a step needs is measured in the run
with all memory; a part of it that is enough for half a batch is all that the other gets. Prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strategies import flat
from trietune.model.causal_lm import TrieModel
from trietune.training import gradients, loop
from trietune.training.gradients import MicroBatchTooLargeError
from trietune.training.loop import Step, StepRange
from trietune.training.sampler import Sampler
from trietune.trie import MicroBatch, make_micro_batches

VOCABULARY = 30_000
LABELS = 16
BATCH_SIZE = 64
PART_OF_NEED = 0.75
NUM_STEPS = 2


def main() -> None:
    warnings.simplefilter("ignore")
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, VOCABULARY, 20).tolist() for _ in range(BATCH_SIZE * NUM_STEPS)]
    sequences = flat(tokens, [[-100] * (20 - LABELS) + sequence[-LABELS:] for sequence in tokens])
    expected, _, unlimited = train(sequences, None)
    [need] = unlimited["need"]
    found, steps, trouble = train(sequences, int(PART_OF_NEED * need))
    print(
        json.dumps(
            {
                "difference": float((found - expected).norm() / expected.norm()),
                "num_micro_batches": [step.num_micro_batches for step in steps],
                **trouble,
            }
        )
    )


def train(sequences: Any, headroom: int | None) -> tuple[torch.Tensor, list[Step], dict[str, list[Any]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    network = LlamaForCausalLM(config)
    network.requires_grad_(False)
    network.model.layers[0].mlp.requires_grad_(True)
    model = TrieModel(network, device=torch.device("cpu"))
    parameters = [p for p in network.parameters() if p.requires_grad]
    max_positions = 10**6
    trouble: dict[str, list[Any]] = {"failures": [], "errors": [], "need": []}

    def cut(indices: np.ndarray) -> list[MicroBatch]:
        return make_micro_batches(sequences, indices, batching="trie", max_positions=max_positions)

    def halve(error: MicroBatchTooLargeError) -> None:
        nonlocal max_positions
        trouble["failures"].append(error.num_positions)
        max_positions = max(error.num_positions // 2, error.longest)

    def listen(error: BaseException) -> bool:
        is_memory = recognize(error)
        if is_memory:
            trouble["errors"].append(str(error))
        return is_memory

    recognize, gradients.is_out_of_memory = gradients.is_out_of_memory, listen
    sampler = Sampler(len(sequences), batch_size=BATCH_SIZE, seed=0)
    steps = []
    for step in loop.training_steps(
        model,
        torch.optim.AdamW(parameters, lr=1e-2),
        sampler,
        StepRange(NUM_STEPS, 0, 1, lambda number: 1e-2),
        cut,
        seed=0,
        cut_smaller=halve,
    ):
        steps.append(step)
        if len(steps) == 1 and headroom is None:
            Path("/proc/self/clear_refs").write_text("5")  # the most that was held is from now on
            held = status_bytes("VmRSS")
        elif len(steps) == 1:
            limit = status_bytes("VmSize") + headroom
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        elif headroom is None:
            trouble["need"].append(status_bytes("VmHWM") - held)
    gradients.is_out_of_memory = recognize
    return torch.cat([p.detach().flatten() for p in parameters]), steps, trouble


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
