"""What differs is said or refused; lines of steps that will be taken again are moved, never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trietune.checkpoints.resume import (
    abandon_lines,
    check_differences,
    compare,
    keep_run_id,
    load_run_id,
    new_run_id,
    table_lines,
)
from trietune.errors import UserError
from trietune.io import files

SAVED: dict[str, Any] = {
    "learning_rate": 6e-5, "batch_size": 32, "mesh_shape": (8, 1), "log_level": "INFO", "num_epochs": 1,
    "lr_scheduler_type": "constant", "data_fingerprint": "aa", "base_model": "m", "num_threads": 2, "world_size": 1,
    "versions.torch": "2.13.0", "max_tokens_per_micro_batch": 4096, "wandb_run_name": "a",
}  # fmt: skip


def verdicts(allowed: tuple[str, ...] = (), **changes: Any) -> dict[str, str]:
    changes = {key.replace("versions_", "versions."): value for key, value in changes.items()}
    return {item.key: item.verdict for item in compare(SAVED, {**SAVED, **changes}, allowed)}


def test_nothing_differs_after_a_round_through_json() -> None:
    assert compare(json.loads(json.dumps(SAVED)), SAVED) == []


def test_settings_that_change_nothing_are_not_mentioned() -> None:
    assert verdicts(log_level="DEBUG", wandb_run_name="b") == {}


@pytest.mark.parametrize(
    "change",
    [{"num_threads": 8}, {"world_size": 4}, {"versions_torch": "2.14.0"}, {"max_tokens_per_micro_batch": 512},
     {"num_epochs": 3}],
)  # fmt: skip
def test_harmless_differences_warn(change: dict[str, Any]) -> None:
    assert set(verdicts(**change).values()) == {"warn"}


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-4}, {"data_fingerprint": "bb"}, {"base_model": "n"}, {"batch_size": 16},
     {"num_epochs": 3, "lr_scheduler_type": "linear"}],
)  # fmt: skip
def test_others_refuse_unless_allowed_by_name(change: dict[str, Any]) -> None:
    assert "refuse" in verdicts(**change).values()
    assert "refuse" not in verdicts(tuple(change), **change).values()


def test_a_setting_that_nobody_knows_refuses() -> None:
    found = compare({**SAVED, "later_key": 1}, {**SAVED, "later_key": 2})
    assert [(item.key, item.verdict) for item in found] == [("later_key", "refuse")]


def test_a_key_of_one_side_alone_warns() -> None:
    assert [item.verdict for item in compare(SAVED, {**SAVED, "later_key": 2})] == ["warn"]


def test_the_refusal_is_a_table_with_a_way_out() -> None:
    differences = compare(SAVED, {**SAVED, "learning_rate": 1e-4, "num_threads": 8})
    with pytest.raises(UserError) as caught:
        check_differences(differences, Path("checkpoints/step-00000050"))
    assert caught.value.exit_code == 6
    assert str(caught.value) == (
        "error: this is not the training that step-00000050 belongs to: 1 setting differs\n"
        "                      checkpoint  now\n"
        "       learning_rate  6e-05       0.0001  training differs from here on\n"
        "       nothing was changed\n"
        "next:  set it back, or accept it by name: `--allow-change learning_rate`"
    )
    assert "num_threads" in table_lines(differences)[2]


def write_log(path: Path, steps: list[int], tail: bytes = b"") -> None:
    path.write_bytes(b"".join(b'{"step": %d, "text": "[\xc3\xa4"}\n' % step for step in steps) + tail)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_beyond_the_checkpoint_move_and_a_torn_one_with_them(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    write_log(log, [1, 2, 3, 4], tail=b'{"step": 5, "lo')
    result = abandon_lines(log, 2)
    assert result.num_beyond == 2
    assert result.path == tmp_path / "metrics.abandoned-1.jsonl"
    assert steps_in(log) == [1, 2]
    assert result.path.read_bytes().endswith(b'"}\n{"step": 5, "lo\n')
    assert abandon_lines(log, 2).path is None
    write_log(log, [1, 2, 3])
    assert abandon_lines(log, 2).path == tmp_path / "metrics.abandoned-2.jsonl"


@pytest.mark.parametrize("tail", [b"\0" * 70_000, b'{"st\n', b"\xff\xfe", b"[3]\n"])
def test_whatever_a_crash_leaves_at_the_end_is_taken_out_of_the_log(tmp_path: Path, tail: bytes) -> None:
    log = tmp_path / "metrics.jsonl"
    write_log(log, [1, 2], tail=tail)
    result = abandon_lines(log, 2)
    assert result.num_beyond == 0
    assert result.path is not None
    assert result.path.read_bytes().rstrip(b"\n") == tail.rstrip(b"\n")
    assert steps_in(log) == [1, 2]


def test_a_log_cut_anywhere_keeps_every_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    write_log(log, [1, 2, 3])
    content = log.read_bytes()
    for cut in range(len(content)):
        log.write_bytes(content[:cut])
        abandon_lines(log, 3)
        # The last byte of a line is its break, which is put back.
        assert steps_in(log) == list(range(1, (content[:cut] + b"\n").count(b"}\n") + 1))


def test_a_last_line_that_lost_its_line_break_is_mended(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    write_log(log, [1], tail=b'{"step": 2}')
    assert abandon_lines(log, 2).path is None
    assert steps_in(log) == [1, 2]
    assert log.read_bytes().endswith(b"}\n")


def test_a_stop_between_the_two_files_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "metrics.jsonl"
    write_log(log, [1, 2, 3])
    real_rename = files.rename

    def stop_at_the_log(source: Path, target: Path) -> None:
        if target == log:
            raise KeyboardInterrupt
        real_rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", stop_at_the_log)
        with pytest.raises(KeyboardInterrupt):
            abandon_lines(log, 1)
    assert steps_in(log) == [1, 2, 3]
    abandon_lines(log, 1)
    assert steps_in(log) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.abandoned-1.jsonl", "metrics.jsonl"]


def test_a_run_id_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load_run_id(tmp_path) is None
    keep_run_id(tmp_path, run_id := new_run_id())
    assert load_run_id(tmp_path) == run_id


@pytest.mark.parametrize("data", [b"", b"\xff\n", b"../../x\n"])
def test_a_broken_run_id_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".run-id").write_bytes(data)
    with pytest.raises(UserError, match="does not hold the id of a run"):
        load_run_id(tmp_path)


def test_a_data_set_that_nobody_named_is_no_difference_where_the_data_are_the_same() -> None:
    saved = {"dataset_id": "stanfordnlp/sst2", "data_fingerprint": "a"}
    assert compare(saved, {"dataset_id": None, "data_fingerprint": "a"}) == []
    verdicts = [one.verdict for one in compare(saved, {"dataset_id": None, "data_fingerprint": "b"})]
    assert verdicts == ["refuse", "refuse"]
    [named] = compare(saved, {"dataset_id": "rajpurkar/squad_v2", "data_fingerprint": "a"})
    assert named.verdict == "warn"


@pytest.mark.parametrize(("key", "fingerprint"), [("train_file", "data_fingerprint"), ("model_name", "base_digest")])
def test_the_same_contents_in_another_place_are_the_same_training(key: str, fingerprint: str) -> None:
    def verdicts(then: object, now: object) -> list[str]:
        found = compare({key: "/a/x", fingerprint: then}, {key: "/b/x", fingerprint: now})
        return [item.verdict for item in found if item.key == key]

    assert verdicts("5e0b", "5e0b") == ["warn"]
    assert verdicts("5e0b", "77aa") == ["refuse"]
    assert verdicts(None, None) == ["refuse"]
    assert verdicts("", "") == ["refuse"]
