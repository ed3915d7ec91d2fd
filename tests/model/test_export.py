"""Hand-over: the adapter's folder, its plain form, and the merged model give the logits of base and adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.families import FAMILIES
from trietune.errors import UserError
from trietune.model.adapter.adapter import WEIGHTS_FILE, adapter_files, add_adapter, load_adapter
from trietune.model.adapter.config import CONFIG_FILE
from trietune.model.adapter.export import base_name_of, export_adapter, find_adapter
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import quiet_library
from trietune.model.base.locate import locate_model

# PEFT 0.21 asks transformers 5.23 under a name that the latter is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(3, 19)[None]
# A product merged into one matrix is summed in another order: about 1e-6 of logits of order one.
FLOAT32_TOLERANCE = 1e-4


def _base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> ModelFolder:
    with quiet_library():
        FAMILIES[family]().to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return locate_model(str(folder))


def _adapter(base: ModelFolder, folder: Path, **more: Any) -> Path:
    network = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    peft_model = add_adapter(network, **{"r": 4, "alpha": 12, "base": base, "seed": 1, **more})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    for name, data in adapter_files(peft_model, base).items():
        (folder / name).write_bytes(data)
    (folder / "prompt_format.json").write_text('{"bos_id": null}')
    (folder / "README.md").write_text("# An adapter\n")
    return folder


def _logits(network: Any) -> torch.Tensor:
    network.train(False)
    with torch.no_grad():
        logits: torch.Tensor = network(TOKENS).logits
    return logits


def _together(base: ModelFolder, adapter: Path) -> torch.Tensor:
    return _logits(load_adapter(_network(base.path), adapter))


def _network(folder: Path) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return network


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with quiet_library():
        yield


def test_an_exported_adapter_is_the_folder_that_peft_loads(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter")
    done = export_adapter(adapter, tmp_path / "out")
    assert {path.name for path in done.folder.iterdir()} == {
        CONFIG_FILE,
        WEIGHTS_FILE,
        "prompt_format.json",
        "README.md",
    }
    assert done.num_bytes == sum(path.stat().st_size for path in done.folder.iterdir())
    by_peft = PeftModel.from_pretrained(_network(base.path), done.folder)
    assert torch.equal(_logits(by_peft), _together(base, adapter))


def test_a_run_is_as_good_as_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "run" / "adapter")
    assert find_adapter(tmp_path / "run") == find_adapter(adapter) == adapter
    assert export_adapter(tmp_path / "run", tmp_path / "out").folder == tmp_path / "out"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_has_its_scale_in_the_weights(tmp_path: Path, use_rslora: bool) -> None:
    base = _base(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter", use_rslora=use_rslora)
    out = export_adapter(adapter, tmp_path / "out", plain=True).folder
    config = json.loads((out / CONFIG_FILE).read_text())
    assert (config["lora_alpha"], config["r"], config["use_rslora"]) == (4, 4, False)
    difference = (_together(base, out) - _together(base, adapter)).abs().max().item()
    assert 0 <= difference < FLOAT32_TOLERANCE, f"largest difference {difference:.1e}"
    assert (out / WEIGHTS_FILE).read_bytes() != (adapter / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("more", "named"), [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["norm"]}, "modules_to_save")]
)
def test_what_has_no_plain_form_is_refused(tmp_path: Path, more: dict[str, Any], named: str) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter", **more)
    with pytest.raises(UserError, match=f"cannot be made plain: it has `{named}`"):
        export_adapter(adapter, tmp_path / "out", plain=True)
    assert not (tmp_path / "out").exists()


MERGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a norm trained whole": {"modules_to_save": ["norm"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("variant", MERGED)
def test_a_merged_model_needs_no_adapter(tmp_path: Path, variant: str) -> None:
    base = _base(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter", **MERGED[variant])
    said: list[str] = []
    done = export_adapter(adapter, tmp_path / "out", merge=True, report=said.append)
    expected = _together(base, adapter)
    difference = (_logits(_network(done.folder)) - expected).abs().max().item()
    assert difference < FLOAT32_TOLERANCE, f"largest difference {difference:.1e}"
    assert (expected - _logits(_network(base.path))).abs().max() > 0.1, "the adapter does something"
    assert set(done.logit_differences) == {"float32"}
    assert "in float32" in said[-1]
    assert not (done.folder / CONFIG_FILE).exists()
    assert (done.folder / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    assert (done.folder / "prompt_format.json").exists()


def test_a_merged_model_is_as_large_as_its_base(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", dtype=torch.bfloat16)
    done = export_adapter(_adapter(base, tmp_path / "adapter"), tmp_path / "out", merge=True)
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert set(done.logit_differences) == {"float32", "bfloat16"}
    assert done.logit_differences["float32"] < FLOAT32_TOLERANCE < done.logit_differences["bfloat16"]


def test_a_merge_that_would_change_the_model_is_refused(tmp_path: Path) -> None:
    """Embedding and head of Gemma are one tensor: what is merged into one would act in the other."""
    base = _base(tmp_path / "base", family="gemma")
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="the merged model would not be the trained one"):
        export_adapter(adapter, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_adapter(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    assert (export_adapter(adapter, tmp_path / "out").folder / CONFIG_FILE).exists()


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        export_adapter(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="holds no adapter"):
        export_adapter(tmp_path, tmp_path / "out")


def test_nothing_remains_of_an_export_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")

    def fail(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export_adapter(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_base_is_named_with_its_revision(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    on_hub = ModelFolder(base.path, "owner/tiny", "hub", revision="abc")
    assert base_name_of(_adapter(on_hub, tmp_path / "adapter")) == "owner/tiny@abc"
    assert base_name_of(_adapter(base, tmp_path / "another")) == str(base.path)


def test_others_may_read_it(tmp_path: Path) -> None:
    done = export_adapter(_adapter(_base(tmp_path / "base"), tmp_path / "adapter"), tmp_path / "out", merge=True)
    (tmp_path / "probe").touch()
    expected = (tmp_path / "probe").stat().st_mode
    assert {path.stat().st_mode for path in done.folder.iterdir()} == {expected}


@pytest.mark.parametrize("name", ["README.md", "prompt_format.json", "chat_template.jinja"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str, merge: bool) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "secret").write_text("mine alone")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to("../secret")
    assert (adapter / name).read_text() == "mine alone", "the link leads there"
    with pytest.raises(UserError, match="is a link that leads out of its folder"):
        export_adapter(adapter, tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "prompt_format.json"])
def test_a_link_to_itself_is_no_plain_file(tmp_path: Path, name: str) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(name)
    with pytest.raises(RuntimeError, match="Symlink loop"):
        (adapter / name).resolve()
    with pytest.raises(UserError, match=r"not a plain file|holds no adapter"):
        export_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_out_of_the_base_is_not_followed_by_a_merge(tmp_path: Path, name: str) -> None:
    base = _base(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter")
    (tmp_path / "secret").write_text("mine alone")
    (base.path / name).unlink(missing_ok=True)
    (base.path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link that leads out of its folder"):
        export_adapter(adapter, tmp_path / "out", merge=True, base=base)
    assert not (tmp_path / "out").exists()


def test_links_within_a_folder_and_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (adapter / "README.md").rename(adapter / "card.md")
    (adapter / "README.md").symlink_to("card.md")
    export_adapter(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# An adapter\n"
    assert not (tmp_path / "out" / "README.md").is_symlink()
    cache = tmp_path / "models--owner--adapter"
    (cache / "snapshots").mkdir(parents=True)
    (adapter / "README.md").unlink()
    (adapter / "card.md").rename(adapter / "README.md")
    adapter.rename(cache / "blobs")
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir()
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(list(export_adapter(snapshot, tmp_path / "again").folder.iterdir())) == 4


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    adapter = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    (adapter / "README.md").unlink()
    os.mkfifo(adapter / "README.md")
    with pytest.raises(UserError, match=r"README.md is not a plain file"):
        export_adapter(adapter, tmp_path / "out")
