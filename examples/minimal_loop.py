"""LoRA fine-tuning of a causal language model in a hundred flat lines of transformers and peft.

    python examples/minimal_loop.py MODEL DATA ADAPTER_FOLDER

It computes what TrieTune computes, one padded row an example, with nothing hidden: read it to see what a step is, and
change it to try an idea. The parity tests take it as a second opinion, the benchmarks as a baseline.

MODEL is a hub id or a folder. DATA is `.jsonl` with `prompt` and `completion`, or `.tsv` with `sentence` and `label` (0
or 1) as in SST-2. The adapter loads with `peft.PeftModel.from_pretrained`.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED_LABEL = -100
BATCH_SIZE, NUM_EPOCHS, SEED = 16, 1, 23
LEARNING_RATE, WEIGHT_DECAY = 5e-4, 0.01


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of every row."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [(row["prompt"], row["completion"]) for row in rows]
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = {"0": "negative", "1": "positive"}
    return [(f"Review: {row['sentence']}\nOutput:", f' {{"label": "{names[row["label"]]}"}}') for row in rows]


def tokenize(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids and labels; tokenized apart, so that the prompt's tokens are those that a user's prompt will have."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids = begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt_ids + completion_ids, [IGNORED_LABEL] * len(prompt_ids) + completion_ids


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """One tensor a field, each [examples, longest row]; padding is on the right, is not seen and has no label."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED_LABEL] * (width - len(labels)) for _, labels in rows]),
    }


def mean_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of `-log p(label)` over all labels of the batch: the output at a position predicts the next token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    predictions, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
    return cross_entropy(predictions.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)


def train_step(model, optimizer, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """One optimizer step on one batch; returns its loss before the update."""
    loss = mean_loss(model, {name: tensor.to(model.device) for name, tensor in pad(rows).items()})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def add_lora(model, r: int = 8, alpha: int = 16):
    """Freeze the model and put adapters on all of its linear layers but the head."""
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def make_optimizer(model) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def main(model_name: str, data: Path, adapter_folder: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = add_lora(AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32))
    optimizer = make_optimizer(model)
    rows = [tokenize(tokenizer, prompt, completion) for prompt, completion in read_examples(data)]

    model.train()
    for epoch in range(NUM_EPOCHS):
        order = torch.randperm(len(rows)).tolist()
        for first in range(0, len(rows), BATCH_SIZE):
            loss = train_step(model, optimizer, [rows[i] for i in order[first : first + BATCH_SIZE]])
            print(f"epoch {epoch + 1}, {min(first + BATCH_SIZE, len(rows))} of {len(rows)} examples, loss {loss:.4f}")
    model.save_pretrained(adapter_folder)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
