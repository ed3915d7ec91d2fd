"""Every file of `examples/` runs as its first lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import sys, warnings
warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A Llama of 40 thousand random weights with a tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate(["<eos>", "<bos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    folder = tmp_path / "tiny"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "tsv"])
def test_minimal_loop_trains_and_writes_an_adapter_that_peft_loads(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    words = ["good", "fine", "bad", "dull"] * 20
    data = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        rows = [{"prompt": f"{word}: ", "completion": "yes" if word in ("good", "fine") else "no"} for word in words]
        data.write_text("\n".join(map(json.dumps, rows)))
    else:
        data.write_text("sentence\tlabel\n" + "".join(f"{w}\t{int(w in ('good', 'fine'))}\n" for w in words))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT / "examples" / "minimal_loop.py", tiny_model, data, tmp_path / "adapter"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("epoch 1, 80 of 80 examples, loss ")
    assert float(lines[-1].rpartition(" ")[2]) < float(lines[0].rpartition(" ")[2])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_minimal_loop_without_arguments_says_how_to_run_it() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "minimal_loop.py"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "python examples/minimal_loop.py MODEL DATA ADAPTER_FOLDER" in result.stderr


def test_minimal_loop_stays_about_a_hundred_lines() -> None:
    lines = (ROOT / "examples" / "minimal_loop.py").read_text().splitlines()
    assert len(lines) < 115, "it is to be read in one sitting"
