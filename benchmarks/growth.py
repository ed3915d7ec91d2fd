"""Measure how the cost of an example grows: with questions a paragraph, its length, the batch, and nothing to share.

    python benchmarks/growth.py [--model smollm2|gemma] [--engines strongest trietune]

What: milliseconds an example on random tokens, one thing varied at a time. Random tokens share exactly what is made to
be shared; values do not change the speed. All engines go through the same batches, one point at a time and in turn, as
in `compare.py`; the median of the rounds is reported.

    questions    of one paragraph of 120 tokens, 1 to 32, in batches of 32; 1 is data with nothing to share
    paragraph    tokens shared by 8 questions, 32 to 1024, in batches of 16
    batch        examples in a step, 1 to 64, 8 questions a paragraph
    unshared     tokens of an example that shares nothing, 16 to 512, in batches of 16
    vocabulary   tokens of the model, 16,384 to 262,144 (random weights), 8 questions a paragraph, in batches of 16

Why: a speed-up at one point says little; this shows where it comes from, and that data without shared text loses
nothing.

What it does not show: real length distributions (these are equal), other machines; memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from chart import line_chart  # noqa: E402
from compare import add_model_options, choose_model, default_name, say  # noqa: E402
from job import Job  # noqa: E402
from measure import environment  # noqa: E402
from models import ModelChoice, vocabulary_size  # noqa: E402
from rounds import Worker  # noqa: E402
from worker import ENGINES  # noqa: E402
from workloads import Sequences, Workload, measure_shape, random_questions  # noqa: E402

QUESTION, ANSWER, PARAGRAPH = 14, 5, 120
ACROSS = {
    "questions": "questions a paragraph",
    "paragraph": "tokens of the paragraph that 8 questions share",
    "batch": "examples in a batch",
    "unshared": "tokens of an example that shares nothing",
    "vocabulary": "tokens of the vocabulary",
}


@dataclass(slots=True)
class Point:
    """One value of one thing that grows, and what each engine needed for it.

    Attributes:
        batch_size: examples of its step.
        seconds: of each round, by engine.
    """

    varied: str
    value: int
    model: ModelChoice
    batch_size: int
    sequences: Sequences
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def milliseconds(self, engine: str) -> float:
        """Median over the rounds, an example."""
        return 1000 * statistics.median(self.seconds[engine]) / self.batch_size


def main() -> None:
    options = parse(sys.argv[1:])
    model = choose_model(options)
    points = make_points(options.varied, model, num_rounds=options.rounds)
    results = []
    for of_model, alike in itertools.groupby(points, key=lambda point: point.model):
        here = list(alike)
        workload = join(here, options.rounds)
        run(of_model, workload, here, options)
        results += [to_result(point, workload, at, options.engines) for at, point in enumerate(here)]
        for result in results[-len(here) :]:
            say_point(result)
    device = torch.device(options.device)
    results.append({"kind": "run", "model": model.record(), **environment(device)})
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    name = options.name or f"growth-{default_name(model)}"
    (out / f"{name}.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    for varied in options.varied:
        lines = {
            engine: [(p.value, p.milliseconds(engine)) for p in points if p.varied == varied]
            for engine in options.engines
        }
        chart = line_chart(lines, title=model.label, across=ACROSS[varied], up="milliseconds an example")
        (out / f"{name}-{varied}.svg").write_text(chart)
    say(f"{out / name}.jsonl and its charts written")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add_model_options(parser)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=["strongest", "trietune"])
    parser.add_argument("--varied", nargs="+", choices=list(ACROSS), default=list(ACROSS))
    return parser.parse_args(arguments)


def make_points(varied: Sequence[str], model: ModelChoice, *, num_rounds: int) -> list[Point]:
    """Every point with sequences for a warm-up round and `num_rounds` more."""

    def point(
        name: str, value: int, *, batch_size: int, questions: int, paragraph: int, vocabulary: int | None = None
    ) -> Point:
        of_point = replace(model, vocabulary=vocabulary or model.vocabulary)
        sequences = random_questions(
            vocabulary=vocabulary_size(of_point),
            num_paragraphs=-(-batch_size * (num_rounds + 1) // questions),
            questions=questions,
            paragraph=paragraph,
            question=QUESTION,
            answer=ANSWER,
        )
        return Point(name, value, of_point, batch_size, sequences)

    every = {
        "questions": [
            point("questions", n, batch_size=32, questions=n, paragraph=PARAGRAPH) for n in (1, 2, 4, 8, 16, 32)
        ],
        "paragraph": [
            point("paragraph", n, batch_size=16, questions=8, paragraph=n) for n in (32, 64, 128, 256, 512, 1024)
        ],
        "batch": [point("batch", n, batch_size=n, questions=8, paragraph=PARAGRAPH) for n in (1, 2, 4, 8, 16, 32, 64)],
        "unshared": [
            point("unshared", n, batch_size=16, questions=1, paragraph=max(0, n - QUESTION - ANSWER))
            for n in (20, 32, 64, 128, 256, 512)
        ],
        "vocabulary": [
            point("vocabulary", n, batch_size=16, questions=8, paragraph=PARAGRAPH, vocabulary=n)
            for n in (2**14, 2**15, 2**16, 2**17, 2**18)
        ],
    }
    return [point for name in varied for point in every[name]]


def join(points: Sequence[Point], num_rounds: int) -> Workload:
    """All points as one workload: round after round, one step a point, so that a worker serves them all."""
    first = np.cumsum([0, *(len(point.sequences) for point in points)])
    tokens = np.cumsum([0, *(len(point.sequences.input_ids) for point in points)])
    offsets = [p.sequences.offsets[:-1] + at for p, at in zip(points, tokens[:-1], strict=True)]
    batches = [
        first[at] + np.arange(number * point.batch_size, (number + 1) * point.batch_size)
        for number in range(num_rounds + 1)
        for at, point in enumerate(points)
    ]
    return Workload(
        name="growth",
        sequences=Sequences(
            np.concatenate([point.sequences.input_ids for point in points]),
            np.concatenate([point.sequences.labels for point in points]),
            np.append(np.concatenate(offsets), tokens[-1]),
        ),
        max_length=max(int(np.diff(point.sequences.offsets).max()) for point in points),
        batch_size=max(point.batch_size for point in points),
        batches=batches,
        steps_a_round=1,
        num_too_long=0,
    )


def run(model: ModelChoice, workload: Workload, points: Sequence[Point], options: argparse.Namespace) -> None:
    """Fill in the points' seconds."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        for engine in options.engines:
            job_file = Path(folder) / f"{engine}.job"
            Job(engine, model, workload, options.device).write(job_file)
            workers[engine] = Worker(job_file)
            workers[engine].receive("ready")
        order = random.Random(0)
        for number in range(options.rounds + 1):
            for point in points:
                for engine in order.sample(sorted(workers), len(workers)):
                    reply = workers[engine].round(1)
                    assert reply["examples"] == point.batch_size, f"{engine} chooses its batches itself"
                    if number > 0:
                        point.seconds.setdefault(engine, []).append(reply["seconds"])
            say(f"round {number} of {options.rounds}" if number else "warm")
        for worker in workers.values():
            worker.end()


def to_result(point: Point, workload: Workload, at: int, engines: Sequence[str]) -> dict[str, Any]:
    return {
        "kind": "growth",
        "model": point.model.label,
        "varied": point.varied,
        "value": point.value,
        "batch_size": point.batch_size,
        "per_example": asdict(measure_shape(workload, [workload.batches[at]])),
        "milliseconds_an_example": {engine: point.milliseconds(engine) for engine in engines},
        "seconds_a_step": point.seconds,
    }


def say_point(result: dict[str, Any]) -> None:
    costs = "  ".join(f"{engine} {ms:8.1f} ms" for engine, ms in result["milliseconds_an_example"].items())
    print(f"{result['varied']:<10} {result['value']:>5}   {costs}")


if __name__ == "__main__":
    main()
