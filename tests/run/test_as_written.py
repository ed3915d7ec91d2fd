"""What is measured, asked or handed over is the adapter that was written, or one that a line calls unchecked."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from trietune import evaluate, load_config, train
from trietune.cli.app import main
from trietune.errors import UserError
from trietune.model.adapter.adapter import load_adapter
from trietune.model.adapter.export import export_adapter
from trietune.model.adapter.folder import CHECKED_FILES


@pytest.fixture
def run(overrides: dict[str, object]) -> Path:
    return train(load_config(None, overrides)).directory


def flip(path: Path) -> None:
    """One bit near the end: in a weight's exponent, or in a text."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x02 if path.suffix == ".safetensors" else 0x01
    path.write_bytes(data)


def test_a_changed_adapter_is_refused_by_every_command(
    run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = run / "adapter"
    original = {path.name: path.read_bytes() for path in adapter.iterdir()}
    measured = evaluate(run).metrics["eval/loss"]
    commands = (
        ["evaluate", str(run)],
        ["predict", str(run), "--text", "a fine film"],
        ["export", str(run), str(tmp_path / "out")],
        ["export", str(run), str(tmp_path / "out"), "--merge"],
        ["export", str(adapter), str(tmp_path / "out"), "--plain"],
    )
    for name in CHECKED_FILES:
        if name in original:
            flip(adapter / name)
            assert (adapter / name).stat().st_size == len(original[name])
        else:
            (adapter / name).write_text("{{ 'another template' }}")
        for command in commands:
            capfd.readouterr()
            assert main(command) == 2, (name, command)
            error = capfd.readouterr().err
            assert name in error, (name, command)
            assert "is not as it was written" in error
        if name in original:
            (adapter / name).write_bytes(original[name])
        else:
            (adapter / name).unlink()
    (adapter / "prompt_format.json").unlink()
    with pytest.raises(UserError, match=r"prompt_format\.json is missing"):
        evaluate(run)
    (adapter / "prompt_format.json").write_bytes(original["prompt_format.json"])
    (adapter / "manifest.json").write_bytes(original["manifest.json"].replace(b'"step": 6', b'"step": 7'))
    with pytest.raises(UserError, match=r"manifest\.json is refused"):
        export_adapter(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (adapter / "manifest.json").write_bytes(original["manifest.json"])
    assert evaluate(run).metrics["eval/loss"] == measured, "all is as it was"


def test_an_edited_model_card_is_nobodys_business(run: Path, tmp_path: Path) -> None:
    (run / "adapter" / "README.md").write_text("# My adapter\n")
    assert evaluate(run).num_examples == 20
    export_adapter(run, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# My adapter\n"


def test_the_way_named_for_a_change_on_purpose_works(
    run: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, reviews: Path
) -> None:
    adapter, new = run / "adapter", tmp_path / "new"
    on_data = ["--dataset", str(reviews / "dev.tsv"), "--split", "train", "--set", "dtype=float32", "--json"]
    assert main(["evaluate", str(adapter), *on_data]) == 0
    before = json.loads(capfd.readouterr().out.splitlines()[-1])["metrics"]["eval/loss"]
    flip(adapter / "adapter_model.safetensors")
    capfd.readouterr()
    assert main(["evaluate", str(run)]) == 2
    error = capfd.readouterr().err
    command = error.partition("on purpose: `")[2].partition("`")[0]
    assert "NEW" in command, error
    subprocess.run(command.replace("NEW", str(new)), shell=True, check=True)
    assert (adapter / "manifest.json").exists(), "the run keeps what it knows"
    assert main(["evaluate", str(new), *on_data]) == 0
    out, err = capfd.readouterr()
    assert "has no manifest.json, so its files are used unchecked" in err
    assert json.loads(out)["metrics"]["eval/loss"] != before, "the flipped bit changed nothing"
    assert main(["export", str(new), str(tmp_path / "out")]) == 0
    assert "unchecked" in capfd.readouterr().err


def test_a_checkpoint_is_looked_at_like_an_adapter(run: Path) -> None:
    checkpoint = next((run / "checkpoints").iterdir())
    flip(checkpoint / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is not as it was written: adapter_model\.safetensors"):
        export_adapter(checkpoint, run.parent / "out")


def test_a_copy_made_of_links_is_checked_as_well(run: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files in `blobs`, and links to them in `snapshots`."""
    snapshot, blobs = tmp_path / "snapshots" / "0f3a", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(run / "adapter", blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    export_adapter(snapshot, tmp_path / "out")
    flip(blobs / "adapter_config.json")
    with pytest.raises(UserError, match=r"is not as it was written: adapter_config\.json"):
        export_adapter(snapshot, tmp_path / "out-2")


def test_weights_that_change_after_the_look_at_their_size_are_not_used(run: Path, tiny_model: Path) -> None:
    import torch

    from trietune.model.adapter.folder import read_listed
    from trietune.model.base.load import load_network
    from trietune.model.base.locate import locate_model

    listed = read_listed(run / "adapter")
    assert listed is not None
    flip(run / "adapter" / "adapter_model.safetensors")
    network = load_network(locate_model(str(tiny_model)), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UserError, match="SHA-256 differs"):
        load_adapter(network, run / "adapter", listed=listed)
