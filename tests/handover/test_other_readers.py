"""What transformers 4 and llama.cpp make of an export is what base and adapter make of the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from handover.conftest import Read
from handover.models import FAMILY_NAMES, TEXTS, prompts, write_adapter, write_base, write_bpe
from trietune.data.encoder import load_tokenizer, make_encoder
from trietune.data.templates import PromptFormat
from trietune.model.adapter.adapter import load_adapter
from trietune.model.adapter.export import export_adapter
from trietune.model.base.load import load_network, quiet_library
from trietune.model.handover.gguf_files import Vocabulary, write_model
from trietune.model.handover.gguf_names import names_for
from trietune.model.handover.gguf_tokenizer import read_gguf_tokenizer
from trietune.model.handover.handover import ADAPTER_GGUF, MODEL_GGUF, _model_config, hand_over
from trietune.model.handover.verify import likeliest_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# Both compute in fp32, one of them in another order.
LOSS_TOLERANCE = 1e-4
# llama.cpp keeps keys and values in f16; with random weights some tokens are nearly equally likely.
LEAST_AGREEMENT = 0.97
# Eight bits move the near ties of random weights more: 90% were measured at worst.
LEAST_AGREEMENT_Q8_0 = 0.85


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet_library():
        yield


def _adapted(base: Any, adapter: Path) -> Any:
    network = load_network(base, dtype=torch.float32, device=torch.device("cpu"))
    return load_adapter(network, adapter)


def _rows(vocabulary: int = 390) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, vocabulary, (35,), generator=generator).tolist() for _ in range(20)]


def _losses(network: Any, rows: list[list[int]]) -> list[float]:
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0]
        found.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item())
    return found


def _share(found: list[list[int]], expected: Any) -> float:
    pairs = [
        (a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other.tolist(), strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_4_reads_the_merged_model_as_it_was_trained(tmp_path: Path, read: Read, family: str) -> None:
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(base, tmp_path / "adapter", is_chat=True)
    merged = export_adapter(adapter, tmp_path / "merged", merge=True).folder
    rows = _rows()
    messages = [{"role": "user", "content": "a film"}]
    found = read("transformers", merged, tokens=rows, text=TEXTS[5], messages=messages)
    assert found["version"].startswith("4.")
    expected = _losses(_adapted(base, adapter), rows)
    largest = max(abs(a - b) for a, b in zip(found["losses"], expected, strict=True))
    assert largest < LOSS_TOLERANCE, f"largest difference of a loss {largest:.1e}"
    tokenizer = load_tokenizer(base.path)
    assert found["ids"] == tokenizer(TEXTS[5], add_special_tokens=False).input_ids
    assert found["prompt"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_without_the_old_names_transformers_4_is_silently_wrong(tmp_path: Path, read: Read) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter")
    merged = export_adapter(adapter, tmp_path / "merged", merge=True).folder
    file = merged / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "rope_theta"}))
    rows = _rows()
    found = read("transformers", merged, tokens=rows)["losses"]
    expected = _losses(_adapted(base, adapter), rows)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) > 100 * LOSS_TOLERANCE


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("quantization", ["f32", "q8_0"])
def test_llama_cpp_answers_like_the_merged_model(tmp_path: Path, read: Read, family: str, quantization: Any) -> None:
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(base, tmp_path / "adapter", use_rslora=True)
    done = hand_over(
        adapter, tmp_path / "out", target="gguf", base=base, prompts=prompts, merge=True, quantization=quantization
    )
    rows = _rows()
    found = read("llama_cpp", done.folder / MODEL_GGUF, tokens=rows, text=TEXTS[5])
    share = _share(found["likeliest"], likeliest_tokens(_adapted(base, adapter), rows))
    assert share > (LEAST_AGREEMENT if quantization == "f32" else LEAST_AGREEMENT_Q8_0), f"{share:.1%}"
    assert found["adds_bos"], "training put one before every text"


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "r": 16, "alpha": 3.5}], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3", "qwen3"])
def test_llama_cpp_answers_like_base_and_adapter(tmp_path: Path, read: Read, family: str, more: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", family)
    # Gemma's norms leave little of a small adapter.
    adapter = write_adapter(base, tmp_path / "adapter", noise=0.4, **more)
    done = hand_over(adapter, tmp_path / "out", target="gguf", base=base, prompts=prompts)
    model = _base_as_gguf(base, tmp_path / "base.gguf")
    rows = _rows()
    expected = likeliest_tokens(_adapted(base, adapter), rows)
    alone = _share(read("llama_cpp", model, tokens=rows)["likeliest"], expected)
    share = _share(read("llama_cpp", model, done.folder / ADAPTER_GGUF, tokens=rows)["likeliest"], expected)
    assert share > LEAST_AGREEMENT, f"{share:.1%}"
    assert alone < share - 0.01, "the adapter does something"


def _base_as_gguf(base: Any, file: Path) -> Path:
    config = _model_config(base)
    tokenizer = read_gguf_tokenizer(base.path, vocabulary_size=int(config["vocab_size"]))
    tied = bool(config["tie_word_embeddings"])

    def tensors() -> Any:
        with safe_open(base.path / "model.safetensors", framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not (tied and name == "lm_head.weight"):
                    yield name, opened.get_tensor(name).float().numpy()

    vocabulary = Vocabulary(tokenizer, 2, 1, (1,), False, "")
    write_model(file, tensors(), names_for(config), config, vocabulary, quantization="f32", title="base")
    return file


def _splits() -> dict[str, Any]:
    from tokenizers import Regex, pre_tokenizers

    from trietune.model.handover.gguf_tokenizer import _LLAMA3, _QWEN2

    def by(pattern: str) -> Any:
        parts = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        return pre_tokenizers.Sequence(parts)

    return {
        "gpt-2": None,
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": by(_LLAMA3),
        "qwen2": by(_QWEN2),
    }


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gemma"])
def test_llama_cpp_cuts_text_into_the_tokens_of_training(tmp_path: Path, read: Read, kind: str) -> None:
    base = write_base(tmp_path / "base", "gemma" if kind == "gemma" else "llama")
    if kind != "gemma":
        write_bpe(base.path, _splits()[kind])
    adapter = write_adapter(base, tmp_path / "adapter")
    done = hand_over(adapter, tmp_path / "out", target="gguf", base=base, prompts=prompts, merge=True)
    tokenizer = load_tokenizer(base.path)
    form = PromptFormat.from_json((adapter / "prompt_format.json").read_text())
    encoder = make_encoder(tokenizer, form)
    for text in TEXTS:
        found = read("llama_cpp", done.folder / MODEL_GGUF, tokens=[], text=text)["ids"]
        expected = encoder._tokenize(encoder.beginning, [text])[0]
        assert found == expected, text
