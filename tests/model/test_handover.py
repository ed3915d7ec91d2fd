"""Exports for other programs: what is written, what is refused by name, and that a wrong one is never called done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

from handover.models import prompts, write_adapter, write_base
from slow_cases import slow_but
from trietune.errors import UserError
from trietune.io.safetensors import parse
from trietune.model.base.load import quiet_library
from trietune.model.handover import gguf_files
from trietune.model.handover import handover as module
from trietune.model.handover.gguf_files import read_back
from trietune.model.handover.gguf_names import names_for
from trietune.model.handover.gguf_tokenizer import read_gguf_tokenizer
from trietune.model.handover.handover import ADAPTER_GGUF, MODEL_GGUF, MODELFILE, hand_over
from trietune.model.handover.modelfile import chat_form, modelfile
from trietune.model.handover.rules import RULES, TARGETS, check_rules, vllm_rank

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def read_metadata(file: Path) -> dict[str, Any]:
    """The scalar metadata of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if len(field.data) == 1}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet_library():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture(scope="module")
def adapter(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "a", use_rslora=True, r=8, alpha=3.5)


def _out(base: Any, adapter: Path, out: Path, target: Any, **more: Any) -> Any:
    return hand_over(adapter, out, target=target, base=base, prompts=prompts, **more)


# What is written


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_gets_an_adapter_that_was_read_back(base: Any, adapter: Path, tmp_path: Path, target: str) -> None:
    done = _out(base, adapter, tmp_path / "out", target)
    assert done.agreement.same == done.agreement.positions > 300
    assert done.agreement.same_answers == done.agreement.prompts == 20
    assert 0 < done.floor.same <= done.floor.positions == done.agreement.positions
    assert done.commands
    names = {path.name for path in done.folder.iterdir()}
    own = {"gguf": {ADAPTER_GGUF}, "ollama": {ADAPTER_GGUF, MODELFILE}, "mlx": {"adapters.safetensors"}}
    assert own.get(target, {"adapter_model.safetensors", "README.md"}) | {"prompt_format.json"} <= names
    assert done.num_bytes == sum(path.stat().st_size for path in done.folder.iterdir())


def test_llama_cpps_scale_is_that_of_rslora(base: Any, adapter: Path, tmp_path: Path) -> None:
    """llama.cpp multiplies by alpha / rank; rsLoRA by alpha / sqrt(rank)."""
    file = _out(base, adapter, tmp_path / "out", "gguf").folder / ADAPTER_GGUF
    metadata, tensors = read_metadata(file), read_back(file)
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert metadata["general.architecture"] == "llama"
    name = "blk.0.ffn_down.weight"
    written = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"] * metadata["adapter.lora.alpha"] / 8
    trained, _ = parse((adapter / "adapter_model.safetensors").read_bytes())
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    a, b = (trained[f"{prefix}.lora_{part}.weight"].to_numpy() for part in "AB")
    assert written == pytest.approx(b @ a * 3.5 / 8**0.5, abs=1e-6)


def test_rows_of_queries_are_in_llama_cpps_order(base: Any, adapter: Path, tmp_path: Path) -> None:
    tensors = read_back(_out(base, adapter, tmp_path / "out", "gguf").folder / ADAPTER_GGUF)
    trained, _ = parse((adapter / "adapter_model.safetensors").read_bytes())
    b = trained["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].to_numpy() * 3.5 / 8**0.5
    stored = tensors["blk.0.attn_q.weight.lora_b"]
    # 4 heads of 16: the rotary pair of row 0 is row 8 in transformers and row 1 in llama.cpp.
    assert stored[0] == pytest.approx(b[0], abs=1e-6)
    assert stored[1] == pytest.approx(b[8], abs=1e-6)


def test_mlx_reads_turned_matrices_and_one_scale(base: Any, adapter: Path, tmp_path: Path) -> None:
    out = _out(base, adapter, tmp_path / "out", "mlx").folder
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["scale"] == pytest.approx(3.5 / 8**0.5)
    assert config["lora_parameters"]["rank"] == 8
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    written, _ = parse((out / "adapters.safetensors").read_bytes())
    assert written["model.layers.1.mlp.up_proj.lora_a"].shape == (64, 8)
    assert written["model.layers.1.mlp.up_proj.lora_b"].shape == (8, 96)


def test_vllm_is_told_the_rank(base: Any, adapter: Path, tmp_path: Path) -> None:
    done = _out(base, adapter, tmp_path / "out", "vllm")
    assert "--enable-lora --max-lora-rank 8 " in done.commands[0]
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), done.folder)
    assert by_peft.peft_config["default"].use_rslora


@pytest.mark.parametrize(("r", "expected"), [(1, 1), (4, 8), (16, 16), (33, 64), (300, 320), (512, 512)])
def test_vllms_ranks_are_steps(r: int, expected: int) -> None:
    assert vllm_rank(LoraConfig(r=r)) == expected


@pytest.mark.parametrize("family", slow_but(["llama", "gemma", "gemma3", "qwen3"], "gemma"))
@pytest.mark.parametrize("quantization", ["f32", "q8_0"])
def test_a_merged_gguf_was_read_back(tmp_path: Path, family: str, quantization: Any) -> None:
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(base, tmp_path / "adapter", use_dora=True, modules_to_save=["norm"])
    done = _out(base, adapter, tmp_path / "out", "gguf", merge=True, quantization=quantization)
    metadata = read_metadata(done.folder / MODEL_GGUF)
    assert done.agreement.share > (0.999 if quantization == "f32" else 0.9)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    rope = "rope.freq_base"
    assert metadata[f"{metadata['general.architecture']}.{rope}"] == (1e6 if family == "gemma3" else 777.0)
    assert [path.name for path in done.folder.iterdir()] == [MODEL_GGUF]


@pytest.mark.parametrize("target", ["transformers", "vllm", "mlx"])
def test_merged_models_of_the_others_are_one_folder(base: Any, adapter: Path, tmp_path: Path, target: str) -> None:
    done = _out(base, adapter, tmp_path / "out", target, merge=True)
    assert done.agreement.share > 0.999
    assert json.loads((done.folder / "config.json").read_text())["rope_theta"] == 777.0


def test_f16_that_cannot_hold_a_value_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", alpha=1e7)
    with pytest.raises(UserError, match="f16 cannot hold the values of `blk"):
        _out(base, adapter, tmp_path / "out", "gguf", quantization="f16")
    assert not (tmp_path / "out").exists()


# Refusals


VARIANTS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "bias": {"bias": "all"},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "r": {"r": 513},
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.what)
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_program_does_not_take_is_refused_by_name(rule: Any, target: Any) -> None:
    config = LoraConfig(target_modules=["q_proj"], **VARIANTS[rule.what])
    if target not in rule.targets:
        check_rules(config, target, where="a")
        return
    with pytest.raises(UserError, match=f"does not take an adapter with `{rule.what}`") as raised:
        check_rules(config, target, where="a")
    assert raised.value.where == rule.source
    assert "--merge" in str(raised.value.next_step)


def test_a_family_that_llama_cpp_files_are_not_written_for_is_named() -> None:
    with pytest.raises(UserError, match="its family is `phi3`"):
        names_for({"model_type": "phi3"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, "a window are not where"),
        ({"query_pre_attn_scalar": 7}, "query_pre_attn_scalar: 7"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "scaled by `longrope`"),
    ],
)
def test_a_form_that_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], named: str) -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64,
              "head_dim": 16, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}  # fmt: skip
    names_for(config)
    with pytest.raises(UserError, match=named):
        names_for({**config, **change})


def test_a_tokenizer_without_a_rule_is_refused(tmp_path: Path) -> None:
    from tiny_model import write_tiny_model

    folder = write_tiny_model(tmp_path)
    with pytest.raises(UserError, match="its kind is WordLevel"):
        read_gguf_tokenizer(folder, vocabulary_size=98)


def test_four_bits_need_llama_cpp(base: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="`llama-quantize`, which is not installed"):
        _out(base, adapter, tmp_path / "out", "gguf", merge=True, quantization="q4_k_m")
    assert not (tmp_path / "out").exists()


# Faults


def test_an_adapter_read_with_another_scale_is_never_called_done(
    base: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without folding, a reader that takes alpha / rank for rsLoRA's scale has another model."""
    loaded = module.load_adapter_files

    def load(network: Any, files: Any, *, where: str) -> Any:
        if where != str(adapter):
            config = {**json.loads(files["adapter_config.json"]), "use_rslora": False}
            files = {**files, "adapter_config.json": json.dumps(config).encode()}
        return loaded(network, files, where=where)

    monkeypatch.setattr(module, "fold_scale", lambda files, where: dict(files))
    monkeypatch.setattr(module, "load_adapter_files", load)
    with pytest.raises(UserError, match="does not answer like base and adapter"):
        _out(base, adapter, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_was_written_wrong_is_found(
    base: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(file: Path) -> dict[str, np.ndarray]:
        found = read_back(file)
        found[min(found)] = found[min(found)] + 1
        return found

    monkeypatch.setattr(module, "read_back", spoiled)
    with pytest.raises(UserError, match="read back and is not what was written"):
        _out(base, adapter, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_gguf_that_answers_otherwise_is_never_called_done(
    base: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trietune.model.handover.gguf_names._reorder", lambda rows, heads: rows)
    with pytest.raises(UserError, match="does not answer like base and adapter"):
        _out(base, adapter, tmp_path / "out", "gguf", merge=True, quantization="f32")
    assert not (tmp_path / "out").exists()


# Modelfiles

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
COUNTS = "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}"


def _renderer(template: str) -> Any:
    from jinja2 import Environment

    def refuse(text: str) -> None:
        raise ValueError(text)

    compiled = Environment().from_string(template)
    return lambda messages: compiled.render(messages=messages, add_generation_prompt=True, raise_exception=refuse)


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("Be kind", ""), GEMMA], ids=["chatml", "plain", "gemma"])
def test_a_chat_template_of_texts_around_messages_is_found(template: str) -> None:
    render = _renderer(template)
    form = chat_form(render)
    assert form is not None
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three\n"}]  # fmt: skip
    if template != GEMMA:
        messages = [{"role": "system", "content": "s"}, *messages]
    else:
        messages[2]["content"] = "three"
    assert form.render(messages) == render(messages)


def test_a_chat_template_that_does_more_is_left_alone() -> None:
    assert chat_form(_renderer(COUNTS)) is None


def test_ollamas_template_says_what_stands_around_messages() -> None:
    form = chat_form(_renderer(GEMMA))
    assert form is not None
    assert form.go_template() == (
        '{{ range .Messages }}{{ if eq .Role "user" }}<start_of_turn>user\n{{ .Content }}<end_of_turn>\n'
        '<start_of_turn>model\n{{ else if eq .Role "assistant" }}{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}'
    )


def test_a_modelfile_has_weights_template_and_stops(base: Any, adapter: Path, tmp_path: Path) -> None:
    text = (_out(base, adapter, tmp_path / "out", "ollama").folder / MODELFILE).read_text()
    assert text == (
        "# Every text began with `<s>` in training, and this tokenizer does not add it: begin plain prompts with "
        "`<s>`. Without it, some answers differ.\n"
        f"FROM {base.path}\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """Review: {{ .Prompt }}\nOutput:"""\n'
        "PARAMETER temperature 0\n"
        'PARAMETER stop "</s>"\n'
    )


@pytest.mark.parametrize("began", [True, False])
def test_a_beginning_that_the_tokenizer_does_not_make_is_said(tmp_path: Path, began: bool) -> None:
    """Both ways: training began texts with the token against the tokenizer's habit, or without it."""
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter")
    file = adapter / "prompt_format.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "bos_id": fields["bos_id"] if began else None}))
    told = _out(base, adapter, tmp_path / "unlike", "transformers").notes
    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fields["bos_id"])]
    )
    tokenizer.save(str(base.path / "tokenizer.json"))
    told_of_other = _out(base, adapter, tmp_path / "like", "transformers").notes
    assert any("Every text began with `<s>`" in note for note in told) is began
    assert any("No text began with `<s>`" in note for note in told_of_other) is not began


def test_stops_are_quoted() -> None:
    text = modelfile(None, weights="./m", adapter=None, stops=['"\n\\'], form=None, notes=())
    assert 'PARAMETER stop "\\"\\n\\\\"' in text
    assert "{{ .Prompt }}" not in text


def test_likeliest_tokens_need_no_cache() -> None:
    """The largest difference of logits says nothing; agreement does: equal models agree everywhere."""
    from trietune.model.handover.verify import agreement

    one = (torch.tensor([1, 2, 3]), torch.tensor([4]))
    other = (torch.tensor([1, 0, 3]), torch.tensor([4]))
    found = agreement(one, other)
    assert (found.same, found.positions, found.same_answers, found.prompts) == (3, 4, 2, 2)
    assert str(found) == "75.00% of 4 positions, 2 of 2 first tokens of answers"
