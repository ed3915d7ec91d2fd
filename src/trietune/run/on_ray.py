"""`trietune train --ray`: the workers of a Ray cluster are the processes of one training.

    command    settings -> cluster -> TorchTrainer.fit (a thread) ; events to the console ; a signal to the mailbox
    worker     the same `train` as everywhere, its ranks those that Ray has connected

Ray starts workers, connects them, and starts them again when one or its node is lost. Checkpoints are the run's own:
Ray is told metrics, never a checkpoint, since it removes the folders that it is given. A mistake of the user is no
failure to repeat: the worker says it and returns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trietune.errors import EXIT_RANK_LOST, StopRequested, UserError
from trietune.io.files import make_folders, remove_tree
from trietune.io.json_types import JsonMapping, JsonObject
from trietune.ranks.messages import FailedElsewhere, encode_error, error_elsewhere
from trietune.ranks.ray_cluster import Mailbox, open_cluster
from trietune.run.plan import run_directory
from trietune.run.signals import StopSignals
from trietune.tracking.events import Event, StepFinished
from trietune.tracking.open import open_tracker
from trietune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from trietune.config.settings import Settings

# Folder in `project_dir` for what Ray writes while it watches a training; removed when that has ended.
RAY_FOLDER = ".ray"
POLL_S = 0.2
ASK_S = 0.5
# Whoever is lost is named long before; a first rank may download a model for hours.
TIMEOUT_S = 2 * 24 * 3600
TOLD_MORE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers share a training.

    Attributes:
        fewest, most: the same number, unless the training may go on with fewer and grow again.
        cpus: cores of each; None shares those of this machine evenly, and takes one each on another cluster.
    """

    fewest: int
    most: int
    cpus: int | None = None


def read_workers(text: str | None, cpus: int | None) -> Workers | None:
    """`4`, or `4,16` for a range; None where nothing was asked for.

    Raises:
        UserError: neither.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"`--num-workers {text}` is not a number of workers", next_step="--num-workers 4   (or 4,16)")
    fewest, most = int(parts[0]), int(parts[-1])
    if fewest > most:
        raise UserError(f"`--num-workers {text}` goes down", next_step=f"--num-workers {most},{fewest}")
    return Workers(fewest, most, cpus)


def train_on_ray(
    settings: Settings,
    *,
    workers: Workers | None,
    address: str | None = None,
    restarts: int = 0,
    allowed_changes: frozenset[str] = frozenset(),
    began: float,
    say: Callable[[str], None],
) -> int:
    """Train with the workers of a cluster; returns the exit code.

    Args:
        address: of a cluster that runs; None starts one of this machine.
        restarts: how often to begin again from the newest checkpoint after a worker was lost.
        began: when the command began, as `time.monotonic` tells it.
        say: told what happens beside the run's own events, a line or two at a time.

    Raises:
        UserError: as `train` does; and where Ray is missing, or there is no cluster.
    """
    most = workers.most if workers else 1
    with StopSignals() as signals, open_cluster(address, num_cpus=max(os.cpu_count() or 1, most)) as ray:
        chosen = workers or _default_workers(ray, say)
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        uses_gpus = num_gpus > 0 and settings.device in ("auto", "cuda")
        cpus = chosen.cpus or (1 if address else max((os.cpu_count() or 1) // chosen.most, 1))
        _warn_of_waiting(ray, chosen, cpus, uses_gpus=uses_gpus, say=say)
        # One folder for all attempts: those after the first would otherwise take the next free name.
        directory = run_directory(settings).expanduser().absolute()
        make_folders(directory.parent)
        storage = directory.parent / RAY_FOLDER
        name = f"{directory.name}-{uuid.uuid4().hex[:8]}"
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the command's own node: any other one may be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        config = {
            "settings": {
                **settings.model_dump(mode="json"),
                "project_dir": str(directory.parent),
                "wandb_run_name": directory.name,
            },
            "folder": str(Path.cwd()),
            "allowed_changes": sorted(allowed_changes),
            "began": time.time() - (time.monotonic() - began),
            "mailbox": mailbox,
        }
        heard = _Heard(restarts, say)
        try:
            fit = _Fit(config, chosen, cpus, uses_gpus, restarts, str(storage), name)
            fit.start()
            _listen(ray, mailbox, fit, signals, heard)
        finally:
            heard.tracker.close()
            with contextlib.suppress(OSError):
                remove_tree(storage / name)
                storage.rmdir()
        return _exit_code(heard, fit)


class _Fit(threading.Thread):
    """Ray's own loop, in a thread, so that signals stay with the command."""

    def __init__(
        self,
        config: JsonMapping,
        workers: Workers,
        cpus: int,
        uses_gpus: bool,
        restarts: int,
        storage: str,
        name: str,
    ) -> None:
        super().__init__(daemon=True, name="trietune-ray")
        self.error: BaseException | None = None
        self._arguments = (config, workers, cpus, uses_gpus, restarts, storage, name)

    def run(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # it is looked at when the thread has ended
            self.error = error

    def _fit(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from trietune.ranks.together import backend_for

        config, workers, cpus, uses_gpus, restarts, storage, name = self._arguments
        TorchTrainer(
            work,
            train_loop_config=dict(config),
            scaling_config=ScalingConfig(
                num_workers=workers.most if workers.fewest == workers.most else (workers.fewest, workers.most),
                use_gpu=uses_gpus,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if uses_gpus else {})},
            ),
            torch_config=TorchConfig(backend=backend_for(uses_cuda=uses_gpus), timeout_s=TIMEOUT_S),
            run_config=RunConfig(name=name, storage_path=storage, failure_config=FailureConfig(max_failures=restarts)),
        ).fit()


@dataclass(slots=True)
class _Heard:
    """What the workers have said so far."""

    restarts: int
    say: Callable[[str], None]
    tracker: Tracker = field(default_factory=lambda: open_tracker(tracker="none", writes_files=False))
    attempts: int = 0
    lost: str | None = None
    ended: JsonObject | None = None
    bug: str | None = None

    def hear(self, kind: str, item: Any) -> None:
        match kind:
            case "event":
                self.tracker.emit(item)
            case "began":
                self.attempts += 1
                if self.attempts > 1:
                    self.say(f"{item} workers start again from the newest whole checkpoint")
                self.lost = self.bug = self.ended = None
            case "lost":
                # Each of the others names the one that it waits for.
                if self.lost is None:
                    self.lost = str(item)
                    self.say(self.lost)
            case "bug":
                self.bug = self.bug or str(item)
            case "ended":
                self.ended = item


def _listen(ray: Any, mailbox: Any, fit: _Fit, signals: StopSignals, heard: _Heard) -> None:
    """Show what workers say until they have ended; hand a signal on to them."""
    has_asked = False
    is_over = False
    while not is_over:
        is_over = not fit.is_alive()
        if signals.received is not None and not has_asked:
            has_asked = True
            ray.get(mailbox.ask_to_stop.remote(signals.received.name))
        for kind, item in ray.get(mailbox.take.remote()):
            heard.hear(kind, item)
        fit.join(POLL_S)


def _exit_code(heard: _Heard, fit: _Fit) -> int:
    if heard.ended is not None:
        if (error := heard.ended.get("error")) is not None:
            raised = error_elsewhere(error, "a worker")
            if isinstance(raised, FailedElsewhere):
                # Nobody else has said it here.
                raise UserError(raised.what, where=raised.where, next_step=raised.next_step, exit_code=raised.exit_code)
            raise raised
        return int(heard.ended["exit_code"])
    if heard.bug is not None:
        raise RuntimeError(f"on a worker: {heard.bug}")
    told = " ".join(str(fit.error).split())
    if "storage" in told and "all nodes" in told:
        raise UserError(
            "`project_dir` is not the same folder on all nodes of the cluster, and any of them may write the run",
            next_step="`--set project_dir=FOLDER` on a disk that all nodes see",
        )
    if heard.lost is None:
        heard.say(
            f"error: a worker was lost, or never started: {told[:TOLD_MORE_CHARACTERS] or 'Ray does not say why'}"
        )
    heard.say(
        "next:  the same command with `--resume` resumes from the newest whole checkpoint, with any number of workers"
    )
    return EXIT_RANK_LOST


def work(config: JsonObject) -> None:
    """What each worker does; Ray calls it."""
    import ray

    mailbox = config["mailbox"]

    def tell(kind: str, item: object) -> None:
        # Waited for: this process may end at once.
        ray.get(mailbox.put.remote(kind, item))

    def lose(error: UserError) -> None:
        tell("lost", str(error))
        os._exit(EXIT_RANK_LOST)

    try:
        _train_here(config, tell, lose)
    except FailedElsewhere:
        return
    except UserError as error:
        if error.exit_code == EXIT_RANK_LOST:
            tell("lost", str(error))
            raise RuntimeError(error.what) from None
        tell("ended", {"error": encode_error(error)})
    except StopRequested as stop:
        tell("ended", {"error": encode_error(stop)})
    except Exception as error:
        tell("bug", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        raise


def _train_here(config: JsonObject, tell: Callable[[str, object], None], lose: Callable[[UserError], None]) -> None:
    import ray.train

    from trietune.config import load_config
    from trietune.run.train import train

    is_first = ray.train.get_context().get_world_rank() == 0
    if is_first:
        tell("began", ray.train.get_context().get_world_size())
    folder = Path(config["folder"])
    if folder.is_dir():
        # Where the command was given, so that paths mean what they meant there.
        os.chdir(folder)
    given = dict(config["settings"])
    if (Path(given["project_dir"]) / given["wandb_run_name"]).exists():
        # Begun by an attempt before this one, or to be resumed: the command has chosen a name that was free.
        given["resume_from_checkpoint"] = "auto"
    settings = load_config(None, given, {})
    reporter = _Reporter()
    tracker = None
    if is_first:
        tracker = open_tracker(
            tracker=settings.tracker,
            use_wandb=settings.use_wandb,
            project=settings.wandb_project,
            run_name=settings.wandb_run_name,
            tags=settings.wandb_tags,
            model_to_wandb=settings.model_to_wandb,
            console=_ToCommand(tell, config["mailbox"]),
        )
        tracker.add(reporter)
    run = train(
        settings,
        tracker=tracker,
        followers=Tracker([reporter]),
        allowed_changes=frozenset(config["allowed_changes"]),
        began=time.monotonic() - (time.time() - config["began"]),
        signals=_AskedToStop(config["mailbox"]),
        on_lost=lose,
    )
    if is_first:
        tell("ended", {"exit_code": run.exit_code})


class _ToCommand:
    """Sends the run's events to the command, whose console shows them."""

    name = "console"

    def __init__(self, tell: Callable[[str, object], None], mailbox: Any) -> None:
        self._tell, self._mailbox = tell, mailbox

    def handle(self, event: Event) -> None:
        self._mailbox.put.remote("event", event)

    def close(self) -> None:
        # What was sent is there when this has come back: an actor takes one message after the other.
        self._tell("closed", None)


class _Reporter:
    """Tells Ray the metrics of logged steps. All workers report, or all wait for the one that does not."""

    name = "ray"

    def handle(self, event: Event) -> None:
        if isinstance(event, StepFinished) and event.is_logged:
            import ray.train

            ray.train.report(
                {"step": event.step, **{name: value for name, value in event.metrics.items() if value is not None}}
            )

    def close(self) -> None:
        pass


class _AskedToStop(StopSignals):
    """A stop that the command asks for: workers have no terminal, and train outside of the main thread."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="trietune-stop")

    def __enter__(self) -> StopSignals:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _look(self) -> None:
        import ray

        while not self._over.wait(ASK_S):
            with contextlib.suppress(Exception):  # the command has gone, and with it the cluster
                name = ray.get(self._mailbox.asked.remote(), timeout=10)
                if name is not None and self.received is None:
                    self.received, self.received_at = signal.Signals[name], time.monotonic()


def _default_workers(ray: Any, say: Callable[[str], None]) -> Workers:
    """One for each GPU of the cluster; one where it has none."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    say(
        f"{num_gpus} workers, one for each GPU of the cluster"
        if num_gpus > 1
        else "one worker; `--num-workers N` for more"
    )
    return Workers(max(num_gpus, 1), max(num_gpus, 1))


def _warn_of_waiting(ray: Any, workers: Workers, cpus: int, *, uses_gpus: bool, say: Callable[[str], None]) -> None:
    there = ray.cluster_resources()
    needed = {"CPU": workers.fewest * cpus, **({"GPU": workers.fewest} if uses_gpus else {})}
    short = [
        f"{there.get(name, 0):g} of {count} {name}s" for name, count in needed.items() if there.get(name, 0) < count
    ]
    if short:
        say(f"the cluster has {' and '.join(short)} for {workers.fewest} workers: waiting until it has grown")
