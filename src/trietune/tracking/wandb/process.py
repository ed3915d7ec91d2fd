"""The process that talks to W&B, so that nothing W&B does can hold up or end a training run.

It is started as a script with this file's path, imports nothing of TrieTune, reads one JSON object per line from stdin
and writes one per line to stdout:

    {"do": "start", "settings": {...}, "config": {...}}      {"told": "started", "url": ..., "directory": ...}
    {"do": "log", "values": {"trainer/step": 10, ...}}       {"told": "failed", "reason": ...}
    {"do": "histograms", "step": 10, "histograms": {name: [counts, edges]}, "num_not_finite": 0}
    {"do": "artifact", "name": ..., "directory": ..., ...}   {"told": "warning", "text": ...}
    {"do": "finish", "exit_code": 0, "summary": {...}}       {"told": "finished", "num_failures": {}}, or "late"

The end of stdin without `finish` means that the run died: W&B then hears of a failed run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

STEP_AXIS = "trainer/step"


def main() -> None:
    """Serve one run until it finishes or its process is gone."""
    # W&B's helper inherits the standard streams, and may outlive this process: it must not hold the pipes open.
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever W&B prints is not a reply
    run: Any = None
    num_failures: Counter[str] = Counter()
    for line in requests:
        message = json.loads(line)
        if message["do"] == "start":
            try:
                run = start(message["settings"], message["config"])
            except BaseException as error:  # W&B's own exits included
                reply(replies, "failed", reason=describe(error))
                return
            reply(replies, "started", url=run.url if message["settings"]["mode"] == "online" else None)
            continue
        try:
            if message["do"] == "finish":
                run.summary.update(message["summary"])
                try:
                    run.finish(exit_code=message["exit_code"])
                except TimeoutError:
                    reply(replies, "late")
                else:
                    reply(replies, "finished", num_failures=num_failures)
                return
            record(run, message)
        except Exception as error:
            if is_end_of_service(error):
                reply(replies, "failed", reason=f"its service has ended ({describe(error)})")
                return
            num_failures[message["do"]] += 1
            if num_failures[message["do"]] == 1:  # the rest is counted
                reply(replies, "warning", text=f"{message['do']} not recorded: {describe(error)}")
    if run is not None:
        run.finish(exit_code=1)


def start(settings: dict[str, Any], config: dict[str, object]) -> object:
    """Open the run, with the run's own steps as the axis of every curve.

    W&B drops values whose step is not larger than the last one; on an axis of our own, a resumed run may repeat steps.
    """
    import wandb

    arguments = ("project", "name", "id", "tags", "dir", "mode", "resume")
    known = set(wandb.Settings.model_fields) - set(arguments)
    run = wandb.init(
        **{name: settings[name] for name in arguments},
        config=config,
        settings=wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
    )
    run.define_metric(STEP_AXIS)
    run.define_metric("*", step_metric=STEP_AXIS, step_sync=True)
    return run


def record(run: Any, message: dict[str, Any]) -> None:
    """Hand one message to W&B."""
    import wandb

    if message["do"] == "log":
        run.log(message["values"])
    elif message["do"] == "histograms":
        values = {name: wandb.Histogram(np_histogram=pair) for name, pair in message["histograms"].items()}
        if message["num_not_finite"]:
            values["watch/not_finite"] = message["num_not_finite"]
        run.log({STEP_AXIS: message["step"], **values})
    elif message["do"] == "artifact":
        if not Path(message["directory"]).is_dir():
            raise FileNotFoundError(f"{message['directory']} was removed before it could be sent")
        artifact = wandb.Artifact(
            message["name"], type="model", description=message["description"], metadata=message["metadata"]
        )
        artifact.add_dir(message["directory"])
        run.log_artifact(artifact, aliases=message["aliases"])
    else:
        raise ValueError(f"unknown message {message['do']!r}")


def is_end_of_service(error: Exception) -> bool:
    """Whether W&B's helper `wandb-core` is gone, so that every further call would fail alike."""
    return isinstance(error, ConnectionError) or type(error).__name__ in ("MailboxClosedError", "HandleAbandonedError")


def reply(replies: TextIO, told: str, **content: object) -> None:
    """Write one reply; a run that is gone reads none."""
    try:
        replies.write(json.dumps({"told": told, **content}) + "\n")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), replies.fileno())


def describe(error: BaseException) -> str:
    """The exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:300]


if __name__ == "__main__":
    main()
