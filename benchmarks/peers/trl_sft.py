"""TRL's `SFTTrainer`, three ways.

    trl            as it comes: bf16 autocast, gradient checkpointing, rows padded to the longest of a batch
    trl-packed     as it comes with `packing=True`: rows of `max_length` filled by best-fit decreasing
    trl-fastest    the fastest of its settings here: padded, no checkpointing, no autocast over weights in bf16, and
                   a batch accumulated from parts of 8 rows: 32 at once took 17 GB without checkpointing

All compute logits at label positions only, TRL's default. The model comes in the benchmark's dtype; by its name alone
TRL would load it in fp32. Packing decides itself which examples meet in a row, so `trl-packed` alone takes other
batches: as many rows as hold `batch_size` examples on average; the examples in them are counted exactly.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from job import Gate, Job
from models import add_lora, build_network
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset

from peers.transformers_trainer import GateCallback, InOrder, as_rows, common_arguments

ROWS_AT_ONCE = 8


class GatedSFTTrainer(InOrder, SFTTrainer):
    pass


def train(job: Job, device: torch.device, gate: Gate) -> None:
    disable_progress_bar()
    workload = job.workload
    rows = as_rows(workload)
    is_packed = job.engine == "trl-packed"
    settings: dict[str, object] = {"max_length": workload.max_length, "packing": is_packed}
    settings["per_device_train_batch_size"] = workload.batch_size
    if job.model.dtype == "float32":
        settings["bf16"] = False
    dataset = Dataset.from_list(rows)
    if is_packed:
        num_rows = len(pack_dataset(dataset, workload.max_length, "bfd"))
        settings["per_device_train_batch_size"] = max(1, round(workload.batch_size * num_rows / len(rows)))
        settings["num_train_epochs"] = 1000  # `max_steps` ends it; rows may be fewer than steps need
    if job.engine == "trl-fastest":
        at_once = max(n for n in range(1, ROWS_AT_ONCE + 1) if workload.batch_size % n == 0)
        settings |= {"gradient_checkpointing": False, "bf16": False, "per_device_train_batch_size": at_once}
        settings["gradient_accumulation_steps"] = workload.batch_size // at_once
    with tempfile.TemporaryDirectory() as folder:
        trainer = GatedSFTTrainer(
            model=add_lora(build_network(job.model, device), job.model),
            args=SFTConfig(**settings, **common_arguments(folder, len(workload.batches), device)),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(job.model.folder),
        )
        trainer.add_callback(GateCallback(gate, trainer.losses, _example_counter(trainer, workload.batch_size)))
        trainer.train()


def _example_counter(trainer: GatedSFTTrainer, batch_size: int):  # type: ignore[no-untyped-def]
    dataset = trainer.train_dataset
    if "seq_lengths" not in dataset.column_names:
        return lambda step: batch_size
    counts = [len(lengths) for lengths in dataset["seq_lengths"]]
    size = trainer.args.per_device_train_batch_size
    batches = [sum(counts[first : first + size]) for first in range(0, len(counts), size)]
    return lambda step: batches[step % len(batches)]
