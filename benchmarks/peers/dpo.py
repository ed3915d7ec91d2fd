"""Direct preference optimization over all pairs of every row, three ways. The same loss at every step.

    dpo-trl         TRL's `DPOTrainer`, its fastest settings here: reference computed beforehand, no checkpointing, no
                    autocast over weights in bf16. It knows pairs only, so a row of K answers is K (K - 1) / 2 of them.
    dpo-strongest   a loop from ordinary parts: every answer of a row computed once, prompt included, rows cut by
                    length into micro-batches, logits at label positions, adapter in bf16, fused AdamW
    dpo-trietune    TrieTune's own loop: every prompt computed once

The reference is the base model. Its scores are computed before the first step, and not timed.
"""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, trained_parameters
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from workloads import Workload

from peers.rows import to_tensors
from peers.transformers_trainer import GateCallback, InOrder, common_arguments
from peers.trietune_loop import MAX_NODES, GivenBatches
from trietune.data.answers import AnswerSets
from trietune.device import choose_device
from trietune.evaluation.preferences import score_answers
from trietune.model.assemble import assemble
from trietune.training.loop import StepRange, training_steps
from trietune.training.objectives.by_scores import LearnByScores
from trietune.training.objectives.dpo import Dpo
from trietune.training.optimizer import build_optimizer
from trietune.trie import make_micro_batches

BETA = 0.1
PAIRS_AT_ONCE = 8
# Of the strongest loop, as for its supervised sibling.
TOKENS_AT_ONCE = 4096


def train(job: Job, device: torch.device, gate: Gate) -> Any:
    """Take every step that the gate lets through; returns the trained network with its adapter."""
    engines = {"dpo-trl": train_trl, "dpo-strongest": train_strongest, "dpo-trietune": train_trietune}
    return engines[job.engine](job, device, gate)


def pairs_of(workload: Workload, row: int) -> list[tuple[int, int]]:
    """The (better, worse) sequences of a row."""
    return list(itertools.combinations(workload.answers_of(row), 2))


def split(workload: Workload, sequence: int) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sequence."""
    ids, labels = workload.sequences.row(sequence)
    first = next(at for at, label in enumerate(labels) if label >= 0)
    return ids[:first], ids[first:]


class GatedDPOTrainer(InOrder, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # tokenized already, as for all engines


def train_trl(job: Job, device: torch.device, gate: Gate) -> Any:
    disable_progress_bar()
    workload = job.workload
    examples = []
    for row in np.concatenate(workload.batches):
        for better, worse in pairs_of(workload, int(row)):
            prompt, chosen = split(workload, better)
            examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": split(workload, worse)[1]})
    num_pairs = len(pairs_of(workload, 0)) * workload.batch_size
    at_once = max(n for n in range(1, PAIRS_AT_ONCE + 1) if num_pairs % n == 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GatedDPOTrainer(
            model=add_lora(build_network(job.model, device), job.model),
            args=DPOConfig(
                beta=BETA,
                max_length=None,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=False,
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=num_pairs // at_once,
                **common_arguments(folder, len(workload.batches), device),
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=AutoTokenizer.from_pretrained(job.model.folder),
        )
        trainer.add_callback(GateCallback(gate, trainer.losses, lambda step: workload.batch_size))
        trainer.train()
        return trainer.model.get_base_model()


def train_strongest(job: Job, device: torch.device, gate: Gate) -> Any:
    model = add_lora(build_network(job.model, device), job.model, adapter_in_fp32=False)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    workload = job.workload
    network = model.get_base_model()
    model.train()
    parts_of_step = [cut_by_length(workload, batch) for batch in workload.batches]
    with torch.no_grad():
        reference = {
            sequence: float(score)
            for parts in parts_of_step
            for part in parts
            for sequence, score in scores(network, workload, part, device)
        }
    gate.open()
    for batch, parts in zip(workload.batches, parts_of_step, strict=True):
        num_pairs = sum(len(pairs_of(workload, int(row))) for row in batch)
        total = 0.0
        for part in parts:
            found = dict(scores(network, workload, part, device))
            better, worse = zip(*[pair for row in part for pair in pairs_of(workload, row)], strict=True)
            ratio = {sequence: score - reference[sequence] for sequence, score in found.items()}
            margin = torch.stack([ratio[one] for one in better]) - torch.stack([ratio[one] for one in worse])
            loss = -torch.nn.functional.logsigmoid(BETA * margin).sum() / num_pairs
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        gate(total, len(batch))
    return network


def cut_by_length(workload: Workload, batch: np.ndarray) -> list[list[int]]:
    """Whole rows, those with the longest answers first, in parts whose padded size stays below the bound."""
    offsets = workload.sequences.offsets
    longest = {int(row): max(int(offsets[s + 1] - offsets[s]) for s in workload.answers_of(row)) for row in batch}
    rows = sorted(longest, key=lambda row: -longest[row])
    parts, first = [], 0
    while first < len(rows):
        size = max(1, TOKENS_AT_ONCE // (longest[rows[first]] * len(workload.answers_of(rows[first]))))
        parts.append(rows[first : first + size])
        first += size
    return parts


def scores(network: Any, workload: Workload, rows: list[int], device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """Each sequence of these rows with the summed log-probability of its labels."""
    sequences = [sequence for row in rows for sequence in workload.answers_of(row)]
    plain = [workload.sequences.row(sequence) for sequence in sequences]
    tensors = to_tensors(plain, max(len(ids) for ids, _ in plain), device)
    labels = tensors["labels"][:, 1:]
    hidden = network.get_decoder()(input_ids=tensors["input_ids"][:, :-1], use_cache=False).last_hidden_state
    is_label = labels != -100
    logits = network.get_output_embeddings()(hidden[is_label]).float()
    log_p = -torch.nn.functional.cross_entropy(logits, labels[is_label], reduction="none")
    of_row = is_label.nonzero()[:, 0]
    summed = torch.zeros(len(sequences), device=device).index_add(0, of_row, log_p)
    return list(zip(sequences, summed.unbind(), strict=True))


def answer_sets(workload: Workload) -> AnswerSets:
    assert workload.row_start is not None
    place = np.concatenate([np.arange(len(workload.answers_of(row))) for row in range(len(workload.row_start) - 1)])
    plain = workload.sequences
    return AnswerSets(
        plain.input_ids,
        plain.labels,
        plain.offsets,
        workload.row_start,
        -place.astype(np.float64),
        np.ones(len(plain), bool),
    )


def train_trietune(job: Job, device: torch.device, gate: Gate) -> Any:
    network = add_lora(build_network(job.model, device), job.model).get_base_model()
    place = choose_device(device.type, use_tt=False)
    model = assemble(network, place, attention="rows", fused_layers=True, pack_weights="auto")
    optimizer = build_optimizer(
        "adamw",
        trained_parameters(network),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        device=place,
    )
    workload = job.workload
    sets = answer_sets(workload)
    reference, _ = score_answers(
        model,
        sets,
        np.arange(len(sets)),
        batching="trie",
        max_positions=MAX_NODES,
        check_stop=lambda: None,
        progress=lambda phase, done, total: None,
    )
    steps = training_steps(
        model,
        optimizer,
        GivenBatches(workload.batches),  # type: ignore[arg-type]
        StepRange(len(workload.batches), 0, 1, lambda step: LEARNING_RATE),
        lambda rows: make_micro_batches(sets, sets.sequences_of(rows), batching="trie", max_positions=MAX_NODES),
        seed=1,
        device=place,
        learn=LearnByScores(Dpo(BETA), sets, reference),
    )
    gate.open()
    for step in steps:
        gate(step.loss, len(step.sequence_indices))
    return network
