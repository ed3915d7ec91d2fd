"""Real training processes without a cold start each: everything is imported once, then forked for every run.

Reads one JSON object per line: `{"arguments": [...], "output": FILE}` forks a process that is `trietune ...` and
answers its id; `{"wait": ID}` answers its exit status as `waitpid` gives it. Nothing computes before the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import warnings

import torch

# PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
warnings.simplefilter("ignore", FutureWarning)


def import_all() -> None:
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import trietune.cli.app
    import trietune.evaluation.evaluate
    import trietune.model.adapter.adapter
    import trietune.model.causal_lm
    import trietune.run.session
    import trietune.training.loop
    import trietune.training.optimizer  # noqa: F401


def become_trietune(arguments: list[str], output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["trietune", *arguments]
    code = 1
    try:
        from trietune.cli.app import main

        code = main()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def set_clock_back() -> None:
    import itertools
    import time

    now, looks = time.time(), itertools.count()
    time.time = lambda: now - 3600 * next(looks)
    from trietune.tracking.jsonl import FilesListener

    FilesListener.__init__.__kwdefaults__["now"] = time.time


def main() -> None:
    import_all()
    answer("ready")
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            answer(os.waitpid(command["wait"], 0)[1])
            continue
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(command["environment"])
            if command["clock"] == "back":
                set_clock_back()
            torch.set_num_threads(command["num_threads"])
            become_trietune(command["arguments"], command["output"])
        answer(pid)


def answer(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
