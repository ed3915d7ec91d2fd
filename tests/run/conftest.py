"""A tiny Llama with a trained tokenizer in a folder, and small data files, for runs of the whole program."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = [
    "a", "the", "film", "plot", "cast", "music", "is", "was", "good", "fine", "bad", "dull", "great", "poor", "and",
    "but", "with", "without", "very", "quite",
]  # fmt: skip
PRAISE = {"good", "fine", "great"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the true Llama architecture: 2 layers, 48 numbers wide, 400 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), 'Review: \nOutput: {"label": "positive"} "negative"'], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attention_bias=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.tsv` (60 rows) and `dev.tsv` (20), in GLUE's form; praise is positive."""
    folder = tmp_path_factory.mktemp("reviews")
    draw = random.Random(5)
    for name, size in (("train.tsv", 60), ("dev.tsv", 20)):
        rows = []
        for _ in range(size):
            words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
            rows.append(f"{' '.join(words)}\t{int(bool(PRAISE & set(words)))}")
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.json` and `dev.json` in SQuAD v2's form, a third of the questions unanswerable."""
    folder = tmp_path_factory.mktemp("questions")
    draw = random.Random(6)
    for name, size in (("train.json", 6), ("dev.json", 3)):
        paragraphs = []
        for number in range(size):
            context = " ".join(draw.choice(WORDS) for _ in range(20))
            qas = []
            for question in range(3):
                start = context.index(" ") + 1
                answer = context[start : context.index(" ", start)]
                answers = [] if question == 2 else [{"text": answer, "answer_start": start}]
                qas.append(
                    {
                        "id": f"{name}-{number}-{question}",
                        "question": f"what is {draw.choice(WORDS)}?",
                        "answers": answers,
                        "is_impossible": not answers,
                    }
                )
            paragraphs.append({"context": context, "qas": qas})
        document = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / name).write_text(json.dumps(document))
    return folder


@pytest.fixture
def overrides(tiny_model: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Settings of a run that takes a second or two; tests change what they look at."""
    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    return {
        "model_name": str(tiny_model),
        "dataset_id": "sst2",
        "train_file": str(reviews / "train.tsv"),
        "validation_file": str(reviews / "dev.tsv"),
        "max_length": 128,
        "dtype": "float32",
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "project_dir": str(tmp_path / "runs"),
        "wandb_run_name": "run",
        "use_wandb": False,
        "steps_freq": 1,
        "device": "cpu",
        "print_examples": False,
    }
