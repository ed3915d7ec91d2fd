"""A base model by folder or file: what is taken, and what each wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trietune.errors import UserError
from trietune.model.base.locate import locate_model

EMPTY_SAFETENSORS = b"\x02\0\0\0\0\0\0\0{}"


def _folder(path: Path, **files: bytes | str) -> Path:
    path.mkdir(exist_ok=True)
    contents: dict[str, bytes | str] = {
        "config.json": json.dumps({"model_type": "llama"}),
        "model.safetensors": EMPTY_SAFETENSORS,
    }
    for name, data in {**contents, **{key.replace("__", "."): value for key, value in files.items()}}.items():
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def _error(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        locate_model(str(name))
    return str(caught.value)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "with space ü")
    found = locate_model(str(folder))
    assert (found.path, found.name, found.source, found.revision) == (folder, str(folder), "folder", None)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/model").path == tmp_path / "model"


def test_a_folder_that_is_named_like_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google").mkdir()
    _folder(tmp_path / "google" / "gemma-1.1-2b-it")
    monkeypatch.chdir(tmp_path)
    assert locate_model("google/gemma-1.1-2b-it").source == "folder"


def test_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = _error("./models/gemma")
    assert "`model_name: ./models/gemma` is not a folder here, and cannot be a hub id" in error
    assert str(tmp_path) in error


def test_a_folder_without_config(tmp_path: Path) -> None:
    (_folder(tmp_path) / "config.json").unlink()
    assert "has no config.json" in _error(tmp_path)


def test_a_folder_whose_config_is_no_json(tmp_path: Path) -> None:
    assert "is not JSON" in _error(_folder(tmp_path, config__json="{'model_type': 'llama'}"))


def test_a_folder_whose_config_names_no_type(tmp_path: Path) -> None:
    assert "names no `model_type`" in _error(_folder(tmp_path, config__json="{}"))


def test_a_folder_with_pickles_alone(tmp_path: Path) -> None:
    (_folder(tmp_path, pytorch_model__bin=b"") / "model.safetensors").unlink()
    error = _error(tmp_path)
    assert "`pytorch_model.bin`, a pickle, which can run any code" in error
    assert "refs/pr/1" in error


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (_folder(tmp_path) / "model.safetensors").unlink()
    assert "has no weights" in _error(tmp_path)


def test_an_adapter_folder(tmp_path: Path) -> None:
    (_folder(tmp_path, adapter_config__json="{}") / "config.json").unlink()
    error = _error(tmp_path)
    assert "is an adapter, not a base model" in error
    assert "base_model_name_or_path" in error


def test_a_folder_with_a_gguf_file_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    error = _error(tmp_path)
    assert "holds GGUF files only" in error
    assert "tiny.gguf" in error


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    error = _error(_folder(tmp_path, model__safetensors=pointer))
    assert "is a Git LFS pointer, not the weights" in error
    assert "lfs pull" in error


def test_a_part_of_a_download(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    (_folder(tmp_path) / "model.safetensors.index.json").write_text(index)
    error = _error(tmp_path)
    assert "lacks 1 of its weight files, the first is `model-2.safetensors`" in error


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_that_points_outside(tmp_path: Path, outside: object) -> None:
    (_folder(tmp_path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
    assert "names a file outside its folder" in _error(tmp_path)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (_folder(tmp_path) / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of weights" in _error(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(EMPTY_SAFETENSORS)
    assert "is a file, but not a .gguf file" in _error(file)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no such file" in _error(tmp_path / "none.gguf")


def test_a_gguf_file_on_the_hub_is_told_how_to_get_it() -> None:
    assert "hf download owner/name tiny.Q4_0.gguf --local-dir ." in _error("owner/name/tiny.Q4_0.gguf")
