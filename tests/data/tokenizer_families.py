"""Small tokenizers of the families that matter, each trained here on a few sentences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Review: a fine film , and a very moving one\nOutput: negative positive",
    'Output: {"label": "positive"}\nOutput: {"label": "negative"}',
    "\nContext: The Normans gave their name to Normandy.\n\nQuestion: Who?\n\nAnswer:\nunanswerable",
    "<user> hello there, what is the answer? <assistant> the answer is 42 , and it was always 42",
    "don't split the trees; café naïve 日本語",
] * 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2_CHAT = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_FOLDER = Path(__file__).parents[2].parent / "shared" / "data" / "gemma_tokenizer"


@dataclass(frozen=True)
class Family:
    """A tokenizer, and what is true of it."""

    name: str
    tokenizer: Any
    adds_bos: bool


def llama2() -> Any:
    """SentencePiece BPE as Llama 2 has it: a space is put before every text, bytes stand in for what is unknown."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"], spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_bos(tokenizer, "<s>")
    return _wrap(tokenizer, bos="<s>", eos="</s>", pad="</s>", unk="<unk>", chat_template=LLAMA2_CHAT)


def gemma() -> Any:
    """SentencePiece BPE as Gemma has it: no space of its own, turns with tokens of their own."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _sentencepiece_bpe(special, normalizers.Replace(" ", "▁"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_bos(tokenizer, "<bos>")
    return _wrap(tokenizer, bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", chat_template=GEMMA_CHAT)


def gpt2() -> Any:
    """Byte-level BPE with one special token for everything: beginning, end and padding."""
    return _wrap(
        _byte_level(["<|endoftext|>"]),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        chat_template=None,
    )


def qwen() -> Any:
    """Byte-level BPE without a beginning-of-sequence token, NFC, ChatML."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    return _wrap(tokenizer, bos=None, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHATML)


def smollm2() -> Any:
    """Byte-level BPE whose beginning-of-sequence token is the one that begins a turn; padding is EOS."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(tokenizer, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", chat_template=CHATML)


def unigram() -> Any:
    """SentencePiece unigram with Metaspace, which puts a space before every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    _add_bos(tokenizer, "<s>")
    return _wrap(tokenizer, bos="<s>", eos="</s>", pad="</s>", unk="<unk>", chat_template=None)


BUILDERS = {"llama2": llama2, "gemma": gemma, "gpt2": gpt2, "qwen": qwen, "smollm2": smollm2, "unigram": unigram}


def _sentencepiece_bpe(special: list[str], normalizer: Any) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizer
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    state = json.loads(trained.to_str())
    model = state["model"]
    for byte in range(256):
        model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    # Line feeds are bytes in Llama's vocabulary, and would otherwise have become characters here.
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def _byte_level(special: list[str], normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _add_bos(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _wrap(tokenizer: Tokenizer, *, chat_template: str | None, **special: str | None) -> Any:
    tokens = {f"{name}_token": AddedToken(token, special=True) for name, token in special.items() if token}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    wrapped.chat_template = chat_template
    return wrapped
