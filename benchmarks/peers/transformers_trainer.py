"""transformers' `Trainer` on a PEFT model, rows padded to the longest of a batch.

Its defaults, but for what would make steps differ: no clipping, a constant learning rate, the batches in our order. It
sees whole batches; only where their logits do not fit does it accumulate smaller ones.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from job import LEARNING_RATE, WEIGHT_DECAY, Gate, Job
from models import add_lora, build_network, vocabulary_size
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from workloads import Workload


def train(job: Job, device: torch.device, gate: Gate) -> None:
    workload = job.workload
    model = add_lora(build_network(job.model, device), job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model.folder)
    at_once = job.rows_at_once(vocabulary_size(job.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GatedTrainer(
            model=model,
            args=TrainingArguments(
                per_device_train_batch_size=at_once,
                gradient_accumulation_steps=workload.batch_size // at_once,
                **common_arguments(folder, len(workload.batches), device),
            ),
            train_dataset=as_rows(workload),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.add_callback(GateCallback(gate, trainer.losses, lambda step: workload.batch_size))
        trainer.train()


def common_arguments(folder: str, num_steps: int, device: torch.device) -> dict[str, Any]:
    """What does not change the cost of a step but its numbers, and silence."""
    return {
        "output_dir": folder,
        "max_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
    }


def as_rows(workload: Workload) -> list[dict[str, list[int]]]:
    """The batches' examples in order, as the trainers read them."""
    rows = [workload.sequences.row(int(index)) for batch in workload.batches for index in batch]
    return [{"input_ids": ids, "labels": labels} for ids, labels in rows]


class InOrder:
    """Mixed into a trainer: examples in the order given, and each forward's loss kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss)
        return loss


class GatedTrainer(InOrder, Trainer):
    pass


class GateCallback(TrainerCallback):
    """Stops at the gate after every optimizer step, and before the first."""

    def __init__(self, gate: Gate, losses: list[torch.Tensor], examples_in_step: Any) -> None:
        self._gate = gate
        self._losses = losses
        self._examples_in_step = examples_in_step
        self._step = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step == 0:
            self._gate.open()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Losses of the micro-batches of a step are parts of its mean already.
        loss = float(torch.stack(self._losses).sum())
        self._losses.clear()
        self._step += 1
        self._gate(loss, self._examples_in_step(self._step - 1))
