"""`--ray` without a cluster: its options, what the command makes of what workers say, and what is said without Ray."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks.test_runs import command_line
from trietune.cli.app import main
from trietune.errors import EXIT_RANK_LOST, StopRequested, UserError
from trietune.ranks import ray_cluster
from trietune.ranks.messages import encode_error
from trietune.ranks.ray_cluster import Mailbox
from trietune.run.on_ray import Workers, _exit_code, _Heard, read_workers
from trietune.tracking.events import Message
from trietune.tracking.tracker import Tracker


@pytest.mark.parametrize(
    ("text", "workers"), [("4", Workers(4, 4)), ("4,16", Workers(4, 16)), (" 1 , 2 ", Workers(1, 2)), (None, None)]
)
def test_workers_are_a_number_or_a_range(text: str | None, workers: Workers | None) -> None:
    assert read_workers(text, None) == workers


@pytest.mark.parametrize("text", ["", "0", "two", "1,2,3", "-1", "1,", "8,4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--num-workers"):
        read_workers(text, None)


def test_without_ray_the_way_to_it_is_said(overrides: dict[str, object], capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    try:
        import ray  # noqa: F401
    except ImportError:
        assert main(["train", "--ray", *command_line(overrides)]) == 2
        assert "pip install 'trietune[ray]'" in capfd.readouterr().err
        assert not Path(str(overrides["project_dir"])).exists()
    else:
        pytest.skip("Ray is installed here")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--num-workers", "2"], "`--num-workers` is for `--ray`"),
        (["--address", "auto"], "`--address` is for `--ray`"),
        (["--cpus-per-worker", "2"], "`--cpus-per-worker` is for `--ray`"),
        (["--ray", "--nproc", "2"], "both start processes"),
        (["--ray", "--num-workers", "none"], "is not a number of workers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 2
    assert text in capfd.readouterr().err


def test_a_plan_for_workers_starts_no_cluster(overrides: dict[str, object], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--ray", "--num-workers", "2,4", "--dry-run", *command_line(overrides)]) == 0
    assert "4 processes; each computes its part" in capfd.readouterr().out


def test_a_mailbox_keeps_order_and_is_emptied_once() -> None:
    mailbox = Mailbox()
    mailbox.put("event", 1)
    mailbox.put("ended", {"exit_code": 0})
    assert mailbox.take() == [("event", 1), ("ended", {"exit_code": 0})]
    assert mailbox.take() == []
    assert mailbox.asked() is None
    mailbox.ask_to_stop("SIGINT")
    assert mailbox.asked() == "SIGINT"


class Fit(threading.Thread):
    error: BaseException | None = None


def heard(*items: tuple[str, Any]) -> tuple[_Heard, list[str]]:
    said: list[str] = []
    made = _Heard(2, said.append, Tracker())
    for kind, item in items:
        made.hear(kind, item)
    return made, said


def lost(rank: int) -> tuple[str, str]:
    return "lost", f"error: rank {rank} has not been heard of"


def test_a_run_that_ends_well_has_its_exit_code() -> None:
    made, said = heard(("began", 2), ("ended", {"exit_code": 3}))
    assert _exit_code(made, Fit()) == 3  # type: ignore[arg-type]
    assert said == []


def test_of_several_that_name_the_lost_one_the_first_is_heard() -> None:
    made, said = heard(("began", 4), lost(1), lost(2), ("began", 3), ("ended", {"exit_code": 0}))
    assert said == [
        "error: rank 1 has not been heard of",
        "3 workers start again from the newest whole checkpoint",
    ]
    assert _exit_code(made, Fit()) == 0  # type: ignore[arg-type]


def test_a_lost_worker_without_restarts_ends_with_7() -> None:
    made, said = heard(("began", 4), lost(1))
    assert _exit_code(made, Fit()) == EXIT_RANK_LOST  # type: ignore[arg-type]
    assert said[0].startswith("error: rank 1")
    assert "--resume" in said[1]


def test_a_worker_of_which_nobody_knows_is_said_in_rays_words() -> None:
    fit = Fit()
    fit.error = RuntimeError("the node\n died")
    made, said = heard(("began", 4))
    assert _exit_code(made, fit) == EXIT_RANK_LOST  # type: ignore[arg-type]
    assert "a worker was lost, or never started: the node died" in said[0]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("no such file", exit_code=2), UserError, "no such file"),
        (StopRequested("SIGINT", 130), StopRequested, "SIGINT"),
    ],
)
def test_what_a_worker_raises_is_raised_here(error: Exception, kind: type[Exception], text: str) -> None:
    made, _ = heard(("began", 2), ("ended", {"error": encode_error(error)}))
    with pytest.raises(kind, match=text) as raised:
        _exit_code(made, Fit())  # type: ignore[arg-type]
    assert raised.value.exit_code == error.exit_code  # type: ignore[attr-defined]


def test_a_bug_on_a_worker_is_a_bug_here() -> None:
    made, _ = heard(("began", 2), ("bug", "ValueError: nonsense"))
    with pytest.raises(RuntimeError, match="nonsense"):
        _exit_code(made, Fit())  # type: ignore[arg-type]


def test_events_reach_the_console() -> None:
    class Heard:
        name = "heard"

        def __init__(self) -> None:
            self.events: list[Any] = []

        def handle(self, event: Any) -> None:
            self.events.append(event)

        def close(self) -> None:
            pass

    listener = Heard()
    made = _Heard(0, print, Tracker([listener]))
    made.hear("event", Message("loading"))
    assert listener.events == [Message("loading")]


def test_restarts_keep_the_folder_of_the_first_attempt(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the name is taken the run lies in `run-2`, and `--resume` alone would take the older one."""
    from trietune.ranks import launch

    commands: list[list[str]] = []

    def record(command: list[str], count: int, *, say: Callable[[str], None], **options: Any) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(launch, "launch", record)
    (Path(str(overrides["project_dir"])) / "run").mkdir(parents=True)
    for more in (["--restarts", "1"], []):
        assert main(["train", "--nproc", "2", *more, *command_line(overrides)]) == 0
    first, second = commands
    assert first[-1] == "--set=wandb_run_name=run-2"
    assert "--set=wandb_run_name=run-2" not in second


@pytest.mark.parametrize(("errors", "attempts"), [(1, 2), (9, 3)])
def test_ray_is_started_again_where_the_machine_was_too_busy(errors: int, attempts: int) -> None:
    started: list[dict[str, object]] = []

    def init(**options: object) -> None:
        started.append(options)
        if len(started) <= errors:
            raise Exception("The current node timed out during startup.")

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    if errors < attempts:
        ray_cluster._start(ray, {"address": "local"})
    else:
        with pytest.raises(UserError, match="Ray does not start on this machine: The current node timed out"):
            ray_cluster._start(ray, {"address": "local"})
    assert len(started) == attempts


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_named_without_asking_ray(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no Ray cluster at `{address}`: ")):
        ray_cluster._connect(None, {"address": address})


def test_an_address_where_somebody_listens_is_handed_to_ray() -> None:
    asked: list[str] = []
    ray = SimpleNamespace(init=lambda address: asked.append(address))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ray_cluster._connect(ray, {"address": address})
    ray_cluster._connect(ray, {"address": "auto"})
    assert asked == [address, "auto"]
