"""Tiny base models with tokenizers that llama.cpp has rules for, and adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from model.families import FAMILIES, _random_weights
from tiny_model import CHAT_TEMPLATE
from trietune.data.prompt_formats import make_plain_format
from trietune.model.adapter.adapter import adapter_files, add_adapter
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import quiet_library
from trietune.model.base.locate import locate_model

TEXTS = [
    "the film is good, and the music was great", "a dull plot; the cast isn't bad", "it was 12 or 3,456 minutes",
    "quite   fine\n\nwithout a plot", "THE END?! (of 1984)", "naïve café — déjà vu", "you'll see, they've won",
]  # fmt: skip
FAMILY_NAMES = ("llama", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "mistral")


def write_base(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> ModelFolder:
    """A model of the family with random weights, a vocabulary of 400 and another rotary base than the default."""
    config = FAMILIES[family]().config
    config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim = 400, 64, 96, 16
    if family == "gemma3":
        # The pattern that llama.cpp knows: every sixth layer without a window.
        config.num_hidden_layers = 6
        config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    if family == "qwen2":
        config.use_sliding_window, config.sliding_window = False, None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    if family == "mistral":
        config.sliding_window = None
    if "full_attention" not in config.rope_parameters:
        config.rope_parameters["rope_theta"] = 777.0
    for name, value in changes.items():
        setattr(config, name, value)
    with quiet_library():
        network = _random_weights(type(FAMILIES[family]())(config))
        network.to(dtype).save_pretrained(folder)
    (write_sentencepiece if family.startswith("gemma") else write_bpe)(folder)
    return locate_model(str(folder))


def write_bpe(folder: Path, split: Any = None) -> None:
    """A byte-level tokenizer; GPT-2's rule for splitting, or another."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=398,
        special_tokens=["<pad>", "</s>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    _save(backend, folder)


def write_sentencepiece(folder: Path) -> None:
    """A tokenizer as Gemma's: spaces are letters, what is unknown falls apart into bytes."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=130, special_tokens=["<unk>"], show_progress=False)
    learnt.train_from_iterator([text.replace(" ", "▁") for text in TEXTS for _ in range(4)], trainer)
    import json

    content = json.loads(learnt.to_str())["model"]
    pieces = sorted(content["vocab"], key=content["vocab"].get)[1:]
    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {
        token: number for number, token in enumerate([*specials, *(f"<0x{n:02X}>" for n in range(256)), *pieces])
    }
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in content["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _save(backend, folder, unk_token="<unk>")


def _save(backend: Tokenizer, folder: Path, **more: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>", **more
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def write_adapter(base: ModelFolder, folder: Path, *, is_chat: bool = False, noise: float = 0.1, **more: Any) -> Path:
    """An adapter that changes answers, with its prompt format."""
    from dataclasses import replace

    from trietune.data.encoder import load_tokenizer

    with quiet_library():
        network = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        peft_model = add_adapter(network, **{"r": 4, "alpha": 12, "base": base, "seed": 1, **more})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    for name, data in adapter_files(peft_model, base).items():
        (folder / name).write_bytes(data)
    tokenizer = load_tokenizer(base.path)
    # Against the tokenizer's habit, as `add_bos: true` has it: what differs from it must be said and carried over.
    form = replace(make_plain_format(tokenizer), bos_id=tokenizer.bos_token_id)
    if not is_chat:
        form = replace(form, kind="template", prompt_template="Review: {sentence}\nOutput:", chat_template="")
    (folder / "prompt_format.json").write_text(form.to_json())
    (folder / "README.md").write_text("# An adapter\n")
    return folder


def prompts(tokenizer: Any, prompt_format: Any) -> list[list[int]]:
    """For `hand_over`: the shipped ones."""
    from trietune.run.handover import shipped_prompts

    return shipped_prompts(tokenizer, prompt_format)
