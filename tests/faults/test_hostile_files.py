"""Files made to harm their reader: each is refused by one of our own errors, quickly, in little memory, alone.

Nothing named in them is imported, and nothing outside the folder is read, written or followed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import stat
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fault_table import Tally
from trietune.checkpoints.store import CheckpointStore
from trietune.errors import UserError
from trietune.io import manifest, strict_json
from trietune.io import safetensors as tensors
from trietune.io.directory import DamagedDirectory, read_directory, write_directory
from trietune.io.manifest import FileEntry, Manifest, ManifestInfo

INFO = ManifestInfo(run_id="run1", step=50)
SHA256_OF_X = hashlib.sha256(b"x").hexdigest()
MAX_SECONDS = 1.0
MAX_BYTES = 64 * 2**20
REFUSED: list[str] = []


class Trap:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> Any:
        return (exec, ("import hostile_module",))


def pickled() -> bytes:
    return pickle.dumps(Trap())


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
        archive.writestr("../../outside", b"x")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("../../outside")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    return file.getvalue()


def manifest_of(**changes: Any) -> bytes:
    """A manifest with its right digest and any content, as an attacker can make it."""
    document: dict[str, Any] = {
        "details": {}, "files": {}, "format_version": "1.0", "kind": "checkpoint", "metrics": {}, "run_id": "run1",
        "step": 50,
    }  # fmt: skip
    document |= changes
    digest = hashlib.sha256(json_of({**document, "digest": ""})).hexdigest()
    return json_of({**document, "digest": digest})


def json_of(document: Any) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def naming(name: str, size: Any = 1, sha256: Any = SHA256_OF_X) -> bytes:
    return manifest_of(files={name: {"sha256": sha256, "size": size}})


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: Any = 0, end: Any = 1, shape: Any = (1,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# What `manifest.json` is, in a folder that holds one file, `a.bin`, with the byte `x`.
MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": pickled(),
    "a zip archive": zipped(),
    "a tar archive": tarred(),
    "a gzip bomb": gzip.compress(bytes(2**20), mtime=0),
    "UTF-16": manifest_of().decode().encode("utf-16"),
    "with a byte order mark": b"\xef\xbb\xbf" + manifest_of(),
    "a list": b"[]\n",
    "deep": b"[" * 3_000_000,
    "deep objects": b'{"a":' * 500_000,
    "a hundred megabytes": b" " * 5 * 2**20,
    "a million names": b'{"files": {' + b",".join(b'"%d":{}' % n for n in range(1_000_000)) + b"}}",
    "ten thousand names": manifest_of(files={f"f{n}": {"sha256": "0" * 64, "size": 1} for n in range(10_000)}),
    "a key twice": manifest_of().replace(b'"step": 50', b'"step": 50,\n  "step": 51'),
    "NaN": manifest_of(metrics={"eval/loss": float("nan")}),
    "a number beyond all": manifest_of(metrics={"x": 1}).replace(b'"x": 1', b'"x": 1e999'),
    "a million digits": manifest_of(step=50).replace(b'"step": 50', b'"step": ' + b"9" * 1_000_000),
    "a lone surrogate": manifest_of(run_id="\ud800"),
    "an escaped surrogate": manifest_of(run_id="run1").replace(b'"run1"', b'"\\ud800"'),
    "a newer format": manifest_of(format_version="7.0"),
    "a format that is code": manifest_of(format_version="__import__('hostile_module')"),
    "another key": manifest_of(code="import hostile_module"),
    "a run id of a megabyte": manifest_of(run_id="x" * 2**20),
    "a step that is true": manifest_of(step=True),
    "a negative step": manifest_of(step=-1),
    "a fractional step": manifest_of(step=50.0),
    "another step": manifest_of(step=51),
    "another run": manifest_of(run_id="run2"),
    "another kind": manifest_of(kind="adapter"),
    "an unknown kind": manifest_of(kind="module"),
    "metrics that are code": manifest_of(metrics={"eval/loss": "import hostile_module"}),
    "details that are a list": manifest_of(details=[]),
    "files that are a list": manifest_of(files=["a.bin"]),
    "an entry that is text": manifest_of(files={"a.bin": "x"}),
    "a path upwards": naming("../outside"),
    "a path from the root": naming("/etc/passwd"),
    "a path with a separator": naming("sub/a.bin"),
    "a path with a backslash": naming("..\\outside"),
    "a name with NUL": naming("a.bin\x00.txt"),
    "a name with a line break": naming("a\nb"),
    "a hidden name": naming(".bashrc"),
    "an empty name": naming(""),
    "a name of dots": naming(".."),
    "a name of 300 letters": naming("a" * 300),
    "a name in full width": naming("\uff41.bin"),
    "itself": naming("manifest.json"),
    "two names that a Mac takes for one": manifest_of(
        files={name: {"sha256": "0" * 64, "size": 1} for name in ("a.bin", "A.bin")}
    ),
    "a negative size": naming("a.bin", size=-1),
    "a size that is true": naming("a.bin", size=True),
    "a size beyond the disk": naming("a.bin", size=2**62),
    "a hash in capitals": naming("a.bin", sha256="A" * 64),
    "a hash that is a path": naming("a.bin", sha256="../" * 21 + "x"),
    "a wrong hash": naming("a.bin", sha256="0" * 64),
    "a blank more": manifest_of() + b" ",
    "another order": json.dumps(json.loads(manifest_of())).encode(),
}

TENSORS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": pickled(),
    "a torch archive": zipped(),
    "a tar archive": tarred(),
    "a gzip bomb": gzip.compress(bytes(2**20), mtime=0),
    "a header of an exabyte": (2**60).to_bytes(8, "little") + b"{}",
    "a header of all bits": b"\xff" * 8 + b"{}",
    "a header beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "a header of 16 MB that is not JSON": header(b"[" * 16_000_000),
    "a million names": header(b"{" + b",".join(b'"%d":0' % n for n in range(1_000_000)) + b"}"),
    "a hundred thousand and one tensors": header(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(100_001)) + b"}"
    ),
    "deep": header(b'{"a":' * 200_000),
    "a name twice": header(b'{"a":{},"a":{}}'),
    "a shape that overflows": header({"a": entry(shape=[2**62, 2**62])}, b"x"),
    "a shape of a million sizes": header({"a": entry(shape=[1] * 1_000_000)}, b"x"),
    "a shape with a number beyond all": header(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"x"),
    "a negative shape": header({"a": entry(shape=[-1, -1])}, b"x"),
    "an offset before the data": header({"a": entry(-8, -7)}, b"x"),
    "an offset beyond the data": header({"a": entry(0, 2**40, [2**40])}, b"x"),
    "tensors that overlap": header({"a": entry(), "b": entry()}, b"x"),
    "a gap": header({"a": entry(), "b": entry(2, 3)}, b"xxx"),
    "bytes of nobody": header({"a": entry()}, b"x" + pickled()),
    "a dtype that is code": header({"a": entry(dtype="__import__('hostile_module')")}, b"x"),
    "a name upwards": header({"../../outside": entry()}, b"x"),
    "a name with NUL": header({"a\x00": entry()}, b"x"),
    "a name of a megabyte": header({"a" * 2**20: entry()}, b"x"),
    "metadata that are objects": header({"__metadata__": {"a": {}}}),
}


def special_manifest(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "manifest.json").unlink()
    make(folder / "manifest.json")


def special_payload(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "a.bin").unlink()
    make(folder / "a.bin")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as endpoint:
        here = Path.cwd()
        os.chdir(path.parent)  # the whole path may be longer than a socket's name can be
        try:
            endpoint.bind(path.name)
        finally:
            os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device needs root")


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "an endless device": make_device,
    "a folder": lambda path: path.mkdir(),
    "a link outside": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a hard link to another file": lambda path: os.link(__file__, path) if same_disk(path) else path.touch(),
    "a terabyte of holes": make_sparse,
}


def same_disk(path: Path) -> bool:
    return Path(__file__).stat().st_dev == path.parent.stat().st_dev


def write_whole(folder: Path) -> Path:
    return write_directory(folder, {"a.bin": b"x"}, info=INFO).path


def store_of(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, "run1", 3, 0, "eval/loss", "min")


def refuse(read: Callable[[], object], *errors: type[Exception]) -> str:
    """Run `read` under watch and return what it said; anything but one of our refusals fails the test."""

    def too_slow(*_: object) -> None:
        raise AssertionError("it hangs")

    before = set(sys.modules)
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(20)
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(errors) as caught:
            read()
        seconds, (_, peak) = time.process_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        signal.alarm(0)
    # tracemalloc itself makes allocations several times slower.
    assert seconds < 3 * MAX_SECONDS, f"{seconds:.1f} s"
    assert peak < MAX_BYTES, f"{peak:,} bytes"
    assert "hostile_module" not in set(sys.modules) - before
    REFUSED.append(str(caught.value))
    return REFUSED[-1]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(name: str, tmp_path: Path) -> None:
    path = write_whole_in_run(tmp_path)
    (path / "manifest.json").write_bytes(MANIFESTS[name])
    refuse(lambda: store_of(tmp_path).load("last", fresh_if_none=True), UserError)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints"]


@pytest.mark.parametrize("where", ["manifest", "payload"])
@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_what_is_no_plain_file_is_refused(name: str, where: str, tmp_path: Path) -> None:
    path = write_whole_in_run(tmp_path)
    (special_manifest if where == "manifest" else special_payload)(path, SPECIAL_FILES[name])
    refuse(lambda: store_of(tmp_path).load("last", fresh_if_none=True), UserError)


def test_a_terabyte_of_holes_that_its_manifest_vouches_for_is_refused_for_its_size(tmp_path: Path) -> None:
    path = write_whole_in_run(tmp_path)
    special_payload(path, make_sparse)
    (path / "manifest.json").write_bytes(manifest.serialize(Manifest(INFO, {"a.bin": FileEntry(2**40, "0" * 64)})))
    assert "more than the memory that is free" in refuse(lambda: read_directory(path), UserError)


def test_a_link_to_a_whole_checkpoint_elsewhere_is_refused(tmp_path: Path) -> None:
    elsewhere = write_whole(tmp_path / "elsewhere")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000050").symlink_to(elsewhere)
    refuse(lambda: store_of(tmp_path / "run").load("last", fresh_if_none=True), UserError)


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_a_link_to_the_very_bytes_is_still_a_link(name: str, tmp_path: Path) -> None:
    path = write_whole_in_run(tmp_path)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link" in refuse(lambda: read_directory(path), DamagedDirectory)


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors_are_refused(name: str) -> None:
    refuse(lambda: tensors.parse(TENSORS[name]), tensors.TensorError)


def test_there_are_enough_of_them(tally: Tally) -> None:
    tally("hostile checkpoints and tensors", len(REFUSED), len(REFUSED))
    assert len(MANIFESTS) + len(TENSORS) + 2 * len(SPECIAL_FILES) + 2 >= 60


def write_whole_in_run(run: Path) -> Path:
    folder = run / "checkpoints"
    folder.mkdir()
    return write_whole(folder / "step-00000050")


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
CONFIGS: dict[str, Any] = {
    "a core to import": {**CONFIG, "megatron_core": "hostile_module", "megatron_config": {}},
    "another kind": {**CONFIG, "peft_type": "PROMPT_TUNING"},
    "an unknown key": {**CONFIG, "custom_pipeline": "hostile_module"},
    "a model to fetch": {**CONFIG, "eva_config": {"rho": 2}},
    "a start that loads": {**CONFIG, "init_lora_weights": "pissa"},
    "a rank of a billion": {**CONFIG, "r": 10**9},
    "a rank that is true": {**CONFIG, "r": True},
    "an alpha that is NaN": b'{"peft_type":"LORA","r":4,"lora_alpha":NaN,"target_modules":["q"]}',
    "a key twice": b'{"peft_type":"LORA","r":4,"r":5,"lora_alpha":8,"target_modules":["q"]}',
    "deep": b'{"a":' * 100_000,
    "two megabytes": b" " * (2 * 2**20),
    "a pickle": pickled(),
    "a list": [],
    "names that are numbers": {**CONFIG, "target_modules": [1, 2]},
    "layers copied a million times": {**CONFIG, "layer_replication": [[0, 10**6]]},
}


@pytest.mark.slow
def test_hostile_adapter_configs_are_refused(tally: Tally) -> None:
    from trietune.model.adapter.config import parse_config

    # PEFT never sees the module that this names; endless patterns are in tests/model/test_module_names.py.
    mapping = {"parent_library": "hostile_module", "base_model_class": "x"}
    read = parse_config(json.dumps({**CONFIG, "auto_mapping": mapping}).encode(), where="adapter_config.json")
    assert read.auto_mapping is None
    assert "hostile_module" not in sys.modules
    for document in CONFIGS.values():
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        refuse(lambda data=data: parse_config(data, where="adapter_config.json"), UserError)  # type: ignore[misc]
    tally("hostile adapter_config.json", len(CONFIGS), len(CONFIGS))


def test_the_reader_of_checkpoints_knows_no_pickle_and_no_archive() -> None:
    folder = Path(manifest.__file__).parent
    for source in folder.glob("*.py"):
        text = source.read_text()
        for word in ("pickle", "torch.load", "tarfile", "zipfile", "shutil.unpack", "eval(", "exec(", "mmap"):
            assert f"import {word}" not in text
            assert f" {word}" not in text.replace('"""', "") or word in ("mmap",), f"{source.name} has {word}"


def test_texts_full_of_brackets_are_no_attack() -> None:
    assert strict_json.parse(json.dumps({"template": "[" * 100 + '\\"{'}).encode())["template"][:3] == "[[["


def test_a_whole_one_is_read(tmp_path: Path) -> None:
    assert read_directory(write_whole(tmp_path / "step-00000050"))[1] == {"a.bin": b"x"}
    with pytest.raises(DamagedDirectory):
        read_directory(tmp_path / "nowhere")
