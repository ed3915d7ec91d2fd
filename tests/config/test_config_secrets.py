"""Credentials in addresses: refused where an address is wanted, masked wherever one is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trietune.checkpoints.remote.open import open_storage
from trietune.checkpoints.remote.storage import refuse_credentials
from trietune.cli.app import main
from trietune.config import load_config
from trietune.config.secrets import without_secrets
from trietune.errors import UserError

# Neither these keys nor these secrets are anybody's; the second has the form of AWS's own example.
KEY, SECRET, BARE = "AKIAEXAMPLE", "wJalr/K7M/bPxRfi", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
FORMS = {
    "plain": "s3://{key}:hunter2@bucket/runs",
    "slashes": "s3://{key}:{secret}@bucket/runs",
    "one slash lost": "s3:/{key}:{secret}@bucket/runs",
    "no scheme": "{key}:{secret}@bucket/runs",
    "two slashes alone": "//{key}:{secret}@bucket/runs",
    "at signs": "s3://{key}:{secret}@x@bucket/runs",
    "question mark and hash": "s3://{key}:a?b#c/{secret}@bucket",
    "no name": "s3://:{secret}@bucket",
    "the secret alone": "s3://{bare}@bucket/runs",
    "the secret alone, no scheme": "{bare}@bucket/runs",
    "ends in a slash": "s3://{key}:{secret}/@bucket",
    "begins with a slash": "{key}:/{secret}@bucket",
    "capitals": "S3://{key}:{secret}@bucket",
    "another scheme": "az+x.y-1://{key}:{secret}@account",
    "encoded": "s3://{key}:wJalr%2FK7M%2FbPx@bucket",
    "with a port": "https://{key}:{secret}@host:9000/bucket",
}


def fill(form: str) -> str:
    return FORMS[form].format(key=KEY, secret=SECRET, bare=BARE)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_masked_in_text_and_refused_as_an_address(form: str) -> None:
    address = fill(form)
    for text in (address, f"`{address}` cannot be read", f"remote_path={address}", json.dumps({"a": address})):
        shown = without_secrets(text)
        for part in ("hunter2", *SECRET.split("/"), *BARE.split("/"), "wJalr%2F"):
            assert part not in shown, (text, shown)
        assert "***@" in shown
    with pytest.raises(UserError, match="carries a password, a key or a signature"):
        open_storage("s3", address)
    public = load_config(None, {"wandb_project": address, "train_file": address}).dump_public()
    assert not [part for part in ("hunter2", *SECRET.split("/"), *BARE.split("/")) if part in json.dumps(public)]


@pytest.mark.parametrize("form", FORMS)
def test_no_message_of_a_command_shows_it(form: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    address = fill(form)
    for key in ("train_file", "dataset_id", "model_name", "remote_path"):
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({key: address, "device": "cpu", "max_steps": "many"}))
        assert main(["train", str(config)]) == 2
        out, err = capfd.readouterr()
        for part in ("hunter2", *SECRET.split("/"), *BARE.split("/")):
            assert part not in out + err, err


OTHERS = (
    "https://user:hf_{0}@hub.example/owner/name", "hf_{0}", "sk-proj-{0}", "github_pat_{0}", "glpat-{0}",
    "xoxb-{0}", "AIza{0}{0}", "HF_TOKEN={0}", "WANDB_API_KEY={0}", "AWS_SECRET_ACCESS_KEY={0}/a", "PASSWORD={0}",
    "Authorization: Bearer {0}", "https://host/x?u=https%3A%2F%2Fuser%3A{0}%40host%2Fy", "s3%3a//key:{0}%40bucket",
    "DefaultEndpointsProtocol=https;AccountName=x;AccountKey={0}==;EndpointSuffix=y",
    "https://account.blob.example/c?sv=2022&sig={0}%3D", "https://host/x?X-Amz-Signature={0}&y=1",
)  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("key", ["train_file", "validation_file", "model_name", "project_dir", "init_adapter"])
def test_other_secrets_are_masked_in_every_key_that_takes_a_place(
    form: str, key: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drawn = "Ab3dEf6hIj9kLm2nOp5q"
    value = form.format(drawn)
    assert drawn not in json.dumps(without_secrets({"a": [value, (value,)]}))
    public = load_config(None, {"wandb_tags": [value], key: value}).dump_public()
    assert drawn not in json.dumps(public)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({key: value, "device": "cpu", "max_steps": "many"}))
    assert main(["train", str(config)]) == 2
    assert drawn not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "text",
    [
        "TRIETUNE_TOKEN=no", "the bearer token", "Bearer of news", "max_tokens=12345678", "eos_token=</s>abcdef",
        "s3://bucket/runs", "s3://bucket/runs@v1", "https://huggingface.co/google/gemma-2b", "google/gemma-2b@main",
        "train.tsv:17: not JSON", "Q:{question}@A:{answer}", "someone@example.org", "C:\\runs\\x", "12:30 at a@b.org",
        "git@github.com:owner/name.git", "/mnt/disk/runs", "a loss of 0.5: fine",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("backend", "address"),
    [
        ("s3", "s3://bucket/runs"), ("s3", "bucket/runs@v1"), ("local", "/mnt/runs"), ("local", "runs"),
        ("azure", "abfs://container@account.dfs.core.windows.net/runs"), ("hf", "owner/name"),
    ],
)  # fmt: skip
def test_addresses_without_secrets_are_taken(backend: str, address: str) -> None:
    refuse_credentials(address)
