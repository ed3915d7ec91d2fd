"""Secrets in fifteen places where they are commonly found; none is in any byte that a run writes or prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer import Forge, open_forge, write_config, write_inputs

from fault_table import Tally

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def canary(name: str) -> str:
    return f"canary{name}7f3e9b1d5a"


FORMS = (
    "hubtoken", "hubtokenfile", "wandbkey", "awskey", "awssecret", "azurekey", "googlekey", "proxypassword",
    "netrcpassword", "endpointpassword", "yamlcomment", "unknownkey", "remotepath", "remotesignature", "datapath",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("secrets"))


@pytest.fixture(scope="module")
def forge(place: Path) -> Iterator[Forge]:
    (place / "seen").mkdir()
    with open_forge(place / "seen") as forge:
        yield forge


def plant(home: Path) -> dict[str, str]:
    """Files in a home directory, and the environment, as people have them."""
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {canary('netrcpassword')}\n")
    (home / "hub").mkdir()
    (home / "hub" / "token").write_text(canary("hubtokenfile"))
    (home / "google.json").write_text(json.dumps({"type": "service_account", "private_key": canary("googlekey")}))
    return {
        "HOME": str(home), "HF_TOKEN": f"hf_{canary('hubtoken')}", "HF_HOME": str(home / "hub"),
        "WANDB_API_KEY": canary("wandbkey"), "WANDB_MODE": "offline", "AWS_ACCESS_KEY_ID": canary("awskey"),
        "AWS_SECRET_ACCESS_KEY": canary("awssecret"), "AWS_DEFAULT_REGION": "us-east-1",
        "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=x;AccountKey={canary('azurekey')};",
        "GOOGLE_APPLICATION_CREDENTIALS": str(home / "google.json"),
        "HTTPS_PROXY": f"http://user:{canary('proxypassword')}@127.0.0.1:9",
        "AWS_ENDPOINT_URL": f"http://user:{canary('endpointpassword')}@127.0.0.1:9",
    }  # fmt: skip


def found_in(*folders: Path) -> dict[str, list[str]]:
    """Which canaries are in which files, in their content or their name."""
    hits: dict[str, list[str]] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            data = str(path).encode() + (path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
            for name in FORMS:
                if canary(name).encode() in data:
                    hits.setdefault(name, []).append(path.name)
    return hits


def test_no_secret_is_in_anything_that_is_written(forge: Forge, place: Path, tmp_path: Path, tally: Tally) -> None:
    environment = plant(tmp_path / "home")
    project = tmp_path / "project"
    storage = {"storage_backend": "s3", "remote_path": "bucket/runs", "sync_to_storage": True}
    config = write_config(place, project, num_epochs=1, tracker="wandb", **storage)
    config.write_text(config.read_text() + f"# my key is {canary('yamlcomment')}\n")
    kept = (place / "config-with-comment.yaml", config.rename(place / "config-with-comment.yaml"))[0]
    life = forge.wait(forge.start("train", kept, environment=environment))
    assert life.exit_code == 3, f"the copies cannot have arrived: {life.text}"
    assert "no copy in s3://bucket/runs" in life.text
    assert (project / "run" / "adapter" / "manifest.json").exists()

    refused = [
        ("--set", f"remote_path=s3://KEY:{canary('remotepath')}@bucket/x"),
        ("--set", f"remote_path=https://host/x?sig={canary('remotesignature')}"),
        ("--set", f"remote_path=s3://KEY:a/{canary('remotepath')}/b@bucket/x"),
        ("--set", f"remote_path=KEY:a/{canary('remotepath')}/b@bucket/x"),
        ("--set", f"train_file=s3://KEY:a/{canary('datapath')}/b@127.0.0.1:9/x.jsonl"),
        ("--set", f"train_file=https://user:{canary('datapath')}@127.0.0.1:9/x.jsonl"),
    ]
    for arguments in refused:
        life = forge.wait(forge.start("train", kept, *arguments, environment=environment))
        assert life.exit_code == 2, life.text
    unknown = place / "unknown.yaml"
    unknown.write_text(kept.read_text() + f"wandb_api_key: {canary('unknownkey')}\n")
    life = forge.wait(forge.start("train", unknown, environment=environment))
    assert life.exit_code == 2, life.text
    assert "wandb_api_key" in life.text

    (place / "seen").mkdir(exist_ok=True)
    hits = found_in(project, place / "seen")
    tally("forms of secrets, every byte searched", len(FORMS), len(FORMS) - len(hits))
    assert not hits, hits
    planted = found_in(tmp_path / "home")
    assert {"netrcpassword", "hubtokenfile", "googlekey"} <= set(planted), "the search itself finds nothing"
