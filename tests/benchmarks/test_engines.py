"""The benchmark's engines do the same work: equal losses, step for step, on the same batches."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import chart
import growth
import numpy as np
import pytest
import torch
import workloads
from compare import to_result
from job import FinishedError, Job
from models import ModelChoice, Work, build_network, count_work
from worker import DPO, ENGINES

from tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
pytestmark = [
    # PEFT 0.21 asks transformers 5.23 by a name that the latter has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # And TRL 1.16 sets options by the names that were in use before.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]

# Of a loss after three fp32 steps: sums in another order.
LOSS_TOLERANCE = 1e-5
HAS_TRL = importlib.util.find_spec("trl") is not None
# It chooses its batches itself.
SAME_BATCHES = [name for name in ENGINES if name != "trl-packed"]


class Recorder:
    """A gate that lets everything pass and keeps the losses."""

    def __init__(self, num_steps: int) -> None:
        self.losses: list[float] = []
        self.examples: list[int] = []
        self.opened = 0
        self._num_steps = num_steps

    def open(self) -> None:
        self.opened += 1

    def __call__(self, loss: float, num_examples: int) -> None:
        self.losses.append(loss)
        self.examples.append(num_examples)
        if len(self.losses) == self._num_steps:
            raise FinishedError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelChoice:
    return ModelChoice("smollm2", str(write_tiny_model(tmp_path_factory.mktemp("tiny"))), 2, "float32")


@pytest.fixture(scope="module")
def workload() -> workloads.Workload:
    sequences = workloads.random_questions(
        vocabulary=90, num_paragraphs=12, questions=4, paragraph=20, question=6, answer=3
    )
    return workloads.arrange("test", sequences, max_length=48, batch_size=8, grouped=True, num_rounds=2)


def run(
    engine: str, model: ModelChoice, workload: workloads.Workload, num_steps: int = 3, max_logits: int = 2**40
) -> Recorder:
    recorder = Recorder(num_steps)
    job = Job(engine, model, workload, "cpu", max_logits)
    with pytest.raises(FinishedError):
        importlib.import_module(ENGINES[engine]).train(job, torch.device("cpu"), recorder)
    assert recorder.opened == 1
    return recorder


@pytest.mark.parametrize("engine", [name for name in SAME_BATCHES if name != "minimal"])
def test_engine_takes_the_steps_of_the_minimal_loop(
    engine: str, model: ModelChoice, workload: workloads.Workload
) -> None:
    if engine.startswith("trl") and not HAS_TRL:
        pytest.skip("benchmarks/requirements.txt is not installed")
    expected = run("minimal", model, workload)
    found = run(engine, model, workload)
    assert found.examples == [8, 8, 8]
    worst = max(abs(ours - theirs) / theirs for ours, theirs in zip(found.losses, expected.losses, strict=True))
    assert worst < LOSS_TOLERANCE, f"{engine}: losses {found.losses} instead of {expected.losses}"
    assert found.losses[0] != found.losses[1]


@pytest.mark.parametrize("engine", ["original", "minimal", "trainer"])
def test_a_batch_in_parts_is_the_same_step(engine: str, model: ModelChoice, workload: workloads.Workload) -> None:
    whole = run(engine, model, workload)
    parts = run(engine, model, workload, max_logits=3 * 48 * 99)
    assert Job(engine, model, workload, "cpu", 3 * 48 * 99).rows_at_once(99) == 2
    assert parts.losses == pytest.approx(whole.losses, rel=LOSS_TOLERANCE)


@pytest.mark.skipif(not HAS_TRL, reason="benchmarks/requirements.txt is not installed")
def test_fastest_trl_accumulates_the_same_step(model: ModelChoice, workload: workloads.Workload) -> None:
    large = workloads.arrange("test", workload.sequences, max_length=48, batch_size=16, grouped=True, num_rounds=2)
    found, expected = run("trl-fastest", model, large), run("minimal", model, large)
    assert found.examples == [16, 16, 16]
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)


@pytest.mark.skipif(not HAS_TRL, reason="benchmarks/requirements.txt is not installed")
def test_packed_trl_counts_the_examples_of_its_rows(model: ModelChoice, workload: workloads.Workload) -> None:
    roomy = dataclasses.replace(workload, max_length=100)  # three examples a row
    found = run("trl-packed", model, roomy, num_steps=len(roomy.batches))
    assert sum(found.examples) == pytest.approx(8 * len(roomy.batches), rel=0.15)


def test_batches_are_whole_groups_and_too_long_examples_are_counted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path))
    sequences, num_too_long = workloads.tokenize(tokenizer, [("ab", "c"), ("abcdefgh", "ij")], max_length=8)
    assert num_too_long == 1
    ids, labels = sequences.row(0)
    assert (
        [label for label in labels if label >= 0]
        == ids[-2:]
        == [*tokenizer("c", add_special_tokens=False)["input_ids"], 0]
    )
    assert ids[0] == tokenizer.bos_token_id


def test_work_counts_layers_and_head_alone(model: ModelChoice) -> None:
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert count_work(model) == Work(trunk=2 * layer, head=32 * 99)
    assert Work(10, 100).flops(num_nodes=3, num_labels=2) == 4 * (10 * 3 + 100 * 2)


def test_points_of_growth_share_what_they_say(model: ModelChoice) -> None:
    points = growth.make_points(["questions", "unshared"], dataclasses.replace(model, vocabulary=1000), num_rounds=1)
    joined = growth.join(points, 1)
    for at, point in enumerate(points):
        shape = workloads.measure_shape(joined, [joined.batches[at]])
        if point.varied == "unshared":
            assert shape.distinct_tokens == pytest.approx(shape.real_tokens, rel=0.05)
        else:
            rest = growth.QUESTION + growth.ANSWER - 1
            assert shape.distinct_tokens == pytest.approx(growth.PARAGRAPH / point.value + rest, rel=0.05)
    assert len(np.unique(np.concatenate(joined.batches))) == sum(map(len, joined.batches))


def test_vocabularies_that_grow_are_those_of_the_models(model: ModelChoice) -> None:
    points = growth.make_points(["vocabulary"], model, num_rounds=1)
    first = points[0]
    assert [point.model.vocabulary for point in points] == [point.value for point in points]
    assert first.sequences.input_ids.max() < first.value
    network = build_network(first.model, torch.device("cpu"))
    assert network.get_output_embeddings().weight.shape[0] == first.value
    assert count_work(first.model).head == network.get_output_embeddings().weight.numel()


def test_charts_are_xml() -> None:
    rate = {"median": 2.0, "lowest": 1.5, "highest": 2.5}
    bars = [{"workload": "a & b", "engine": name, "examples_per_second": rate} for name in ("trietune", "trl")]
    lines = chart.line_chart({"trietune": [(1, 2.0), (8, 3.0)]}, title="t", across="x", up="y")
    for text in (chart.bar_chart(bars, title="<t>"), lines):
        assert ElementTree.fromstring(text).tag.endswith("svg")


def test_a_failed_engine_is_reported_as_failed(model: ModelChoice, workload: workloads.Workload) -> None:
    from compare import table
    from rounds import EngineRounds, Measured

    one = EngineRounds("trl", failed="exit code 1: out of memory")
    result = to_result(one, workload, model, Work(1, 1), Measured([one], {"float32": 1.0}))
    assert "failed: exit code 1: out of memory" in table([result])


@pytest.mark.slow
def test_compare_writes_results_a_table_and_a_chart(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "tiny", ("Review: ", "\nOutput:", '{"label": "positive"}', '{"label": "negative"}')
    )
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    (data / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"w{i}\t{i % 2}\n" for i in range(300)))
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "compare.py",
            *("--model-folder", folder, "--dtype", "float32", "--data", data.parent, "--rounds", "1"),
            *("--workloads", "sst2-plain-4", "--engines", "strongest", "trietune", "--out", tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "strongest peer: strongest; weakest: strongest" in result.stdout
    *engines, last = map(json.loads, (tmp_path / "smollm2-float32.jsonl").read_text().splitlines())
    assert {line["engine"] for line in engines} == {"strongest", "trietune"}
    assert last["kind"] == "run"
    assert last["versions"]["torch"] == torch.__version__
    assert last["command"].startswith("python benchmarks/compare.py --model-folder tiny --dtype float32")
    assert (tmp_path / "smollm2-float32.svg").exists()


def test_validation_is_cut_at_whole_paragraphs(tmp_path: Path) -> None:
    import grouping

    table = tmp_path / "dev.tsv"
    table.write_text("sentence\tlabel\na\t1\nb\t0\nc\t1\n")
    assert grouping.first_examples(table, 2) == "sentence\tlabel\na\t1\nb\t0\n"
    questions = tmp_path / "dev.json"
    paragraphs = [{"context": str(n), "qas": [{"id": "x"}] * 3} for n in range(3)]
    questions.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    kept = json.loads(grouping.first_examples(questions, 7))["data"][0]["paragraphs"]
    assert [paragraph["context"] for paragraph in kept] == ["0", "1"]


def test_difference_is_paired_by_seed() -> None:
    import grouping

    setting = {"dataset": "sst2", "batch_size": 32, "learning_rate": 1.0}
    results = [
        {**setting, "seed": seed, "grouped": g, "after": {"eval/loss": seed + 0.5 * g, "eval/accuracy": 1.0}}
        for seed in range(3)
        for g in (True, False)
    ]
    of_seed_3 = {**setting, "seed": 3, "grouped": True, "after": {"eval/loss": 90.0, "eval/accuracy": 0.0}}
    of_other_batches = {**results[0], "batch_size": 4, "after": {"eval/loss": 90.0, "eval/accuracy": 0.0}}
    loss, accuracy = grouping.compare([*results, of_seed_3, of_other_batches], ("sst2", 32, 1.0))
    assert (loss["difference"], loss["interval"]) == (0.5, 0.0)
    assert accuracy["difference"] == 0.0
    assert (loss["grouped"]["seeds"], loss["shuffled"]["mean"]) == (4, 1.0)
    assert grouping.half_interval([1.0, 3.0]) == pytest.approx(12.706, rel=1e-3)


def test_trietune_is_the_reference_of_every_group() -> None:
    from compare import in_groups

    assert in_groups(["a", "b", "c", "trietune"], 3) == [["a", "b", "trietune"], ["c", "trietune"]]
    assert in_groups(["a", "trietune"], 4) == [["a", "trietune"]]
    assert in_groups(["a", "b", "c"], 2) == [["a", "b", "c"]]


def test_a_stopped_comparison_reports_its_whole_rounds(
    model: ModelChoice, workload: workloads.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rounds

    class StubWorker:
        """Takes rounds of one second, until Ctrl-C in the fourth."""

        num_rounds = 0

        def __init__(self, job_file: Path) -> None:
            self.ended = False

        def receive(self, event: str) -> None:
            pass

        def round(self, steps: int) -> dict[str, object]:
            StubWorker.num_rounds += 1
            if StubWorker.num_rounds == 8:
                raise KeyboardInterrupt
            return {"seconds": 1.0, "examples": 8, "losses": [1.0], "peak_memory_bytes": 5}

        def end(self) -> None:
            self.ended = True

    monkeypatch.setattr(rounds, "Worker", StubWorker)
    monkeypatch.setattr(rounds, "matmul_ceiling", lambda dtype, device: 1e9)
    measured = rounds.measure(
        model, workload, ["strongest", "trietune"], torch.device("cpu"), 9, lambda line: None, max_logits=1
    )
    assert measured.is_stopped
    assert [len(one.seconds) for one in measured.engines] == [2, 2]
    assert not any(one.failed for one in measured.engines)


def test_results_name_no_folder_of_this_machine(model: ModelChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    from measure import environment

    monkeypatch.setattr(sys, "argv", ["/a/compare.py", "--model-folder", "/home/somebody/smollm2", "--rounds", "5"])
    command = environment(torch.device("cpu"))["command"]
    assert command == "python benchmarks/compare.py --model-folder smollm2 --rounds 5"
    assert model.record()["folder"] == Path(model.folder).name


@pytest.mark.skipif(not HAS_TRL, reason="benchmarks/requirements.txt is not installed")
@pytest.mark.parametrize("name", ["pairs-equal", "ranked-4"])
def test_engines_of_preferences_take_the_same_steps(
    name: str, model: ModelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workloads.PREFERENCES, name, (12, 6, 2 if name == "pairs-equal" else 4, 4))
    rows = workloads.preferences(name, vocabulary=90, num_rounds=1)
    found = {}
    for engine in DPO:
        recorder = Recorder(3)
        with pytest.raises(FinishedError):
            importlib.import_module(DPO[engine]).train(Job(engine, model, rows, "cpu"), torch.device("cpu"), recorder)
        found[engine] = recorder.losses
    assert found["dpo-trl"] == pytest.approx(found["dpo-trietune"], rel=LOSS_TOLERANCE)
    assert found["dpo-strongest"] == pytest.approx(found["dpo-trietune"], rel=LOSS_TOLERANCE)
    assert found["dpo-trietune"][0] == pytest.approx(math.log(2))
    assert found["dpo-trietune"][1] != found["dpo-trietune"][0]
