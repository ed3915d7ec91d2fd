"""Steps of `trietune.training.loop` leave the adapter where `examples/minimal_loop.py` leaves it.

The two share no code below transformers: one knows tries, fused adapters and merged labels, the other padded rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from model.families import FAMILIES
from strategies import FlatSequences, flat, question_batch
from trietune.data.encoder import load_tokenizer
from trietune.demo import smollm2_gguf
from trietune.device.cpu import describe_cpu
from trietune.errors import UserError
from trietune.model.base.locate import locate_model
from trietune.model.causal_lm import TrieModel
from trietune.model.fast.linear import fuse_linears
from trietune.training.loop import Step, StepRange, training_steps
from trietune.training.optimizer import build_optimizer
from trietune.training.sampler import Sampler
from trietune.trie import make_micro_batches

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]
# As a part of the update, after one step and after twenty. AdamW divides each gradient by its own size, so where one is
# nearly zero a rounding error of 2^-24 becomes 1e-5.
UPDATE_TOLERANCE = 2e-4
# And the same as a part of the weights.
WEIGHTS_TOLERANCE = 1e-5
# In a trained network many gradients are a thousand times smaller than others of their tensor, and the first step of
# AdamW makes all of them equally long: where rounding decides the sign, the two step in opposite directions.
TRAINED_UPDATE_TOLERANCE = 2e-2
TRAINED_WEIGHTS_TOLERANCE = 1e-4


def load_minimal_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", ROOT / "examples" / "minimal_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


minimal_loop: Any = load_minimal_loop()


def with_adapter(network: Any) -> Any:
    """LoRA with both matrices away from zero, so that A has a gradient from the first step on."""
    torch.manual_seed(11)
    model = minimal_loop.add_lora(network, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], unit: dict[str, torch.Tensor]
) -> float:
    """Largest over all tensors of |ours - theirs| / |unit|."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / unit[name].norm()) for name in theirs)


def rows_of(sequences: FlatSequences, indices: np.ndarray) -> list[tuple[list[int], list[int]]]:
    bounds = [(sequences.offsets[i], sequences.offsets[i + 1]) for i in indices]
    return [(sequences.input_ids[a:b].tolist(), sequences.labels[a:b].tolist()) for a, b in bounds]


def steps_of_trietune(
    model: Any, sequences: FlatSequences, *, num_steps: int, batch_size: int, batching: str, max_positions: int
) -> Iterator[Step]:
    network = model.get_base_model()
    assert fuse_linears(network) > 0
    device = describe_cpu()
    optimizer = build_optimizer(
        "adamw",
        [p for p in network.parameters() if p.requires_grad],
        learning_rate=minimal_loop.LEARNING_RATE,
        weight_decay=minimal_loop.WEIGHT_DECAY,
        device=device,
    )
    return training_steps(
        TrieModel(network, device=device.torch_device, attention=None if batching == "padded" else "rows"),
        optimizer,
        Sampler(len(sequences), batch_size=batch_size, seed=5),
        StepRange(num_steps, 0, 1, lambda step: minimal_loop.LEARNING_RATE),
        lambda batch: make_micro_batches(sequences, batch, batching=batching, max_positions=max_positions),  # type: ignore[arg-type]
        seed=1,
    )


def compare(
    make_network: Any, sequences: FlatSequences, *, num_steps: int, batch_size: int, batching: str, max_positions: int
) -> tuple[float, float]:
    """Train both on the same batches; how far apart the adapters end, as parts of the update and of the weights."""
    ours, theirs = with_adapter(make_network()), with_adapter(make_network())
    before = adapter_weights(theirs)
    optimizer = minimal_loop.make_optimizer(theirs)
    theirs.train()
    options = {"batch_size": batch_size, "batching": batching, "max_positions": max_positions}
    for step in steps_of_trietune(ours, sequences, num_steps=num_steps, **options):
        loss = minimal_loop.train_step(theirs, optimizer, rows_of(sequences, step.sequence_indices))
        assert abs(step.loss - loss) / loss < 1e-4, f"step {step.number}: loss {step.loss}, minimal loop {loss}"
    after = adapter_weights(theirs)
    update = {name: after[name] - before[name] for name in after}
    found = adapter_weights(ours)
    return largest_difference(found, after, update), largest_difference(found, after, after)


def check(differences: tuple[float, float], update_tolerance: float, weights_tolerance: float) -> None:
    of_update, of_weights = differences
    assert of_update < update_tolerance, f"adapters differ by {of_update:.1e} of the update"
    assert of_weights < weights_tolerance, f"adapters differ by {of_weights:.1e} of their size"


def no_short_sequences(sequences: FlatSequences) -> FlatSequences:
    rows = [row for row in rows_of(sequences, np.arange(len(sequences))) if any(label >= 0 for label in row[1][1:])]
    return flat([ids for ids, _ in rows], [labels for _, labels in rows])


@pytest.mark.parametrize("batching", ["trie", "packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_equals_the_minimal_loop(family: str, batching: str) -> None:
    sequences = no_short_sequences(question_batch(np.random.default_rng(3), vocabulary=120))
    differences = compare(
        FAMILIES[family], sequences, num_steps=1, batch_size=len(sequences), batching=batching, max_positions=60
    )
    check(differences, UPDATE_TOLERANCE, WEIGHTS_TOLERANCE)


def test_twenty_steps_equal_the_minimal_loop() -> None:
    generator = np.random.default_rng(4)
    sequences = no_short_sequences(question_batch(generator, vocabulary=120, paragraphs=6, questions=5))
    differences = compare(
        FAMILIES["llama"], sequences, num_steps=20, batch_size=6, batching="trie", max_positions=10_000
    )
    check(differences, UPDATE_TOLERANCE, WEIGHTS_TOLERANCE)


@pytest.mark.slow
def test_one_step_of_smollm2_equals_the_minimal_loop() -> None:
    try:
        folder = locate_model(str(smollm2_gguf()))
    except UserError as error:
        pytest.skip(str(error))
    from transformers import AutoModelForCausalLM

    from trietune.demo import demo_reviews

    tokenizer = load_tokenizer(folder.path)
    examples = minimal_loop.read_examples(demo_reviews() / "train.tsv")[:16]
    rows = [minimal_loop.tokenize(tokenizer, prompt, completion) for prompt, completion in examples]
    sequences = flat([ids for ids, _ in rows], [labels for _, labels in rows])
    differences = compare(
        lambda: AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32),
        sequences,
        num_steps=1,
        batch_size=16,
        batching="trie",
        max_positions=10_000,
    )
    check(differences, TRAINED_UPDATE_TOLERANCE, TRAINED_WEIGHTS_TOLERANCE)
