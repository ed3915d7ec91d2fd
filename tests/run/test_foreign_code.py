"""Python that comes with weights is never run, whatever stands on stdin: no question is asked at any door."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model.test_gguf import HEADS, HIDDEN, KEY_HEADS, LAYERS, MIDDLE, TOKENS, _write
from trietune.errors import UserError
from trietune.model.base.locate import locate_model

SOURCES = Path(__file__).parents[2] / "src" / "trietune"
TRAP = "from pathlib import Path\nPath(__file__).with_name('TRAPPED').touch()\nraise RuntimeError('it ran')\n"
AUTO_MAP = {
    "AutoConfig": "trap.Config",
    "AutoModelForCausalLM": "trap.Model",
    "AutoTokenizer": ["trap.Tokenizer", "trap.Tokenizer"],
}


def run(script: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home / "hub"), "TRIETUNE_CACHE": str(home / "cache")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input="y\n" * 1000,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def trapped(home: Path) -> list[Path]:
    """Where the trap's code has been run: in its folder, or in the copy that transformers makes of it."""
    return list(home.rglob("TRAPPED"))


def set_trap(folder: Path) -> None:
    (folder / "trap.py").write_text(TRAP)
    tokenizer = {"auto_map": AUTO_MAP, "tokenizer_class": "TrapTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.slow
def test_nothing_beside_a_gguf_file_is_read(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path / "download"
    folder.mkdir()
    file = folder / "tiny.gguf"
    _write(LlamaForCausalLM(config), file, gguf.GGMLQuantizationType.F32)
    set_trap(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": AUTO_MAP}))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 123456, "suppress_tokens": [7]}')
    (folder / "chat_template.jinja").write_text("a hostile template")
    (folder / "adapter_config.json").write_text("{}")
    script = (
        "import sys\nfrom trietune.data.encoder import load_tokenizer\n"
        "from trietune.model.base.locate import locate_model\n"
        "found = locate_model(sys.argv[1])\nload_tokenizer(found.path)\nprint(found.path)"
    )
    done = run(script, str(file), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not trapped(tmp_path)
    entry = Path(done.stdout.strip().splitlines()[-1])
    names = {path.name for path in entry.iterdir()}
    assert not names & {"trap.py", "adapter_config.json"}
    kept = "".join(path.read_text() for path in entry.iterdir() if path.suffix in (".json", ".jinja"))
    for foreign in ("auto_map", "trap", "123456", "hostile"):
        assert foreign not in kept

    script = (
        "import sys\nfrom transformers import AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], gguf_file='tiny.gguf')"
    )
    done = run(script, str(folder), home=tmp_path)
    assert "[y/N]" in done.stdout + done.stderr, "the files beside it tempt nobody"
    assert trapped(tmp_path), "and `y` runs nothing"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "trap"])
def test_code_in_a_base_folder_is_not_run(tmp_path: Path, tiny_model: Path, model_type: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_model.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": AUTO_MAP}))
    set_trap(base)
    script = """
import sys
import torch
from trietune.data.encoder import load_tokenizer
from trietune.errors import UserError
from trietune.model.base.shape import describe_network
from trietune.model.base.load import load_network
from trietune.model.base.locate import locate_model

base = locate_model(sys.argv[1])
for door in (
    lambda: load_tokenizer(base.path),
    lambda: load_network(base, dtype=torch.float32, device=torch.device("cpu")),
    lambda: describe_network(base, dtype=torch.float32, adapter={"r": 2, "alpha": 4}),
):
    try:
        door()
        print("opened")
    except UserError as error:
        print("refused", str(error).splitlines()[0])
"""
    done = run(script, str(base), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("opened") + done.stdout.count("refused") == 3
    assert "[y/N]" not in done.stdout + done.stderr
    assert not trapped(tmp_path)


def test_a_base_with_an_adapter_in_it_is_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "auto_mapping": {"x": "y"}}))
    with pytest.raises(UserError, match="holds both a model and an adapter"):
        locate_model(str(base))

    reached: list[object] = []
    monkeypatch.setattr("peft.PeftConfig.from_pretrained", lambda *args, **kwargs: reached.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AutoModelForCausalLM.from_pretrained(base)
    assert reached, "transformers leaves it alone"


@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": "org/kernel@main:forward"},
        {"attn_implementation": {"text_config": "org/kernel"}},
        {"text_config": {"_attn_implementation": "org/kernel"}},
        {"_attn_implementation_internal": "org/kernel"},
        {"experts_implementation": "org/experts"},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "paged|org/kernel"},
        {"use_kernels": True},
        {"per_layer_config": {"0": {"attn_implementation": "org/kernel"}}},
        {"sub_configs": [{"a": 1}, {"attn_implementation": "org/kernel"}]},
    ],
)
def test_a_base_that_asks_for_kernels_is_refused(tmp_path: Path, tiny_model: Path, asked: dict[str, object]) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **asked}))
    with pytest.raises(UserError, match="may be code from elsewhere"):
        locate_model(str(base))


def test_a_kernel_would_have_been_asked_for(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attn_implementation": "org/kernel"}))
    asked: list[object] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda implementation, **_: asked.append(implementation) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        AutoModelForCausalLM.from_pretrained(base)
    assert asked == ["org/kernel"]


def test_what_transformers_itself_writes_is_taken(tmp_path: Path, tiny_model: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    usual = {"_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "attn_implementation": None}
    (base / "config.json").write_text(json.dumps({**config, **usual}))
    assert locate_model(str(base)).path == base


def test_every_door_says_that_no_code_is_trusted() -> None:
    doors = 0
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            if ast.unparse(node.func.value) == "PeftModel":
                continue  # reads a configuration and tensors that `model/adapter/reread.py` wrote
            doors += 1
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if None in given and "trust_remote_code" not in given:
                assert path.name == "gguf.py", "`**source` there holds it, and the test above walks through"
                continue
            value = given.get("trust_remote_code")
            assert isinstance(value, ast.Constant), f"{path.name}:{node.lineno}"
            assert value.value is False, f"{path.name}:{node.lineno}"
    assert doors >= 7
