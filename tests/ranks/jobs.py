"""What the pool's processes do: a training of a small model through the product's own loop, and a whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from model.families import FAMILIES, in_double
from parity.test_objectives import answer_sets, one_hot
from strategies import question_batch
from trietune.data.answers import AnswerSets
from trietune.data.examples import IGNORED_LABEL
from trietune.device.cpu import describe_cpu
from trietune.model.causal_lm import TrieModel
from trietune.ranks.opening import open_ranks
from trietune.ranks.ranks import ALONE
from trietune.training.gradients import MicroBatchTooLargeError
from trietune.training.loop import StepRange, training_steps
from trietune.training.objectives.answers import Objective
from trietune.training.objectives.by_scores import LearnByScores
from trietune.training.objectives.dpo import Dpo
from trietune.training.objectives.ipo import Ipo
from trietune.training.objectives.kto import Kto
from trietune.training.objectives.learning import Learn
from trietune.training.objectives.orpo import Orpo
from trietune.training.objectives.rank import Rank
from trietune.training.objectives.sft import LearnWeightedLabels, learn_labels
from trietune.training.objectives.simpo import Simpo
from trietune.training.objectives.with_chosen import WithChosen
from trietune.training.optimizer import build_optimizer
from trietune.training.sampler import Sampler
from trietune.training.schedule import learning_rate_schedule
from trietune.trie import make_micro_batches
from trietune.trie.dealing import deal_step


def train_family(
    family: str = "llama",
    *,
    num_steps: int = 30,
    batch_size: int = 6,
    batches_per_step: int = 1,
    batching: str = "trie",
    max_grad_norm: float | None = None,
    dropout: float = 0.0,
    optim: str = "adamw",
    max_positions: int = 200,
    dtype: torch.dtype = torch.float64,
    runs_out_on: int | None = None,
    wants_stop_on: int | None = None,
    has_weights: bool = False,
    objective: str = "",
) -> dict[str, Any]:
    """Adapter, losses and counts after some steps, as this rank has them."""
    ranks = open_ranks()
    try:
        return _train_family(
            ranks, family, num_steps, batch_size, batches_per_step, batching, max_grad_norm, dropout, optim,
            max_positions, dtype, runs_out_on, wants_stop_on, has_weights, objective,
        )  # fmt: skip
    finally:
        ranks.close()


def _train_family(
    ranks: Any,
    family: str,
    num_steps: int,
    batch_size: int,
    batches_per_step: int,
    batching: Any,
    max_grad_norm: float | None,
    dropout: float,
    optim: str,
    max_positions: int,
    dtype: torch.dtype,
    runs_out_on: int | None,
    wants_stop_on: int | None,
    has_weights: bool,
    objective: str,
) -> dict[str, Any]:
    number = ranks.mine(range(ranks.count))
    torch.manual_seed(7)
    network = FAMILIES[family]()
    network = in_double(network) if dtype == torch.float64 else network.to(dtype)
    torch.manual_seed(8)
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(network, config)
    model = TrieModel(network, device=torch.device("cpu"), attention=None if batching == "padded" else "rows")
    data = question_batch(np.random.default_rng(0), vocabulary=120, paragraphs=5, questions=4)
    learn: Learn = learn_labels
    if has_weights:
        data, learn = _weighted(data)
    rows: Any = data
    if objective:
        rows, learn = answers_to_learn(objective, keeps_draws=dropout > 0)
    parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(
        optim, parameters.values(), learning_rate=2e-3, weight_decay=0.01, device=describe_cpu()
    )
    state = {"max_positions": max_positions, "cuts": [], "failures": 0}

    def cut(sequences: np.ndarray) -> Any:
        return [
            micro_batch
            for part in (rows.apart(sequences) if objective else [sequences])
            for micro_batch in make_micro_batches(rows, part, batching=batching, max_positions=state["max_positions"])
        ]

    def cut_rows(indices: np.ndarray) -> Any:
        return cut(rows.sequences_of(indices) if objective else indices)

    def smaller(error: MicroBatchTooLargeError) -> None:
        state["max_positions"] = max(error.num_positions // 2, error.longest)
        state["cuts"].append(state["max_positions"])

    losses: list[float] = []
    metrics: list[dict[str, float]] = []
    counts = []
    if runs_out_on == number:
        model.label_losses = _failing_at(model.label_losses, 3)  # type: ignore[method-assign]
    with closing(
        training_steps(
            model,
            optimizer,
            Sampler(rows.num_rows if objective else len(data), batch_size=batch_size, seed=3),
            StepRange(
                num_steps,
                0,
                batches_per_step,
                learning_rate_schedule("constant", peak=2e-3, num_steps=num_steps, num_warmup_steps=0),
            ),
            cut_rows,
            seed=5,
            max_grad_norm=max_grad_norm,
            cut_smaller=smaller,
            learn=learn,
            ranks=ranks,
            deal=None
            if ranks is ALONE
            else lambda indices: deal_step(
                rows,
                rows.sequences_of(indices) if objective else indices,
                ranks.count,
                batching=batching,
                label_cost=0.26,
            ),
            make_part=cut,
            wants_stop=lambda: wants_stop_on == number and len(losses) == 2,
        )
    ) as steps:
        for step in steps:
            losses.append(float(step.loss))
            metrics.append(dict(step.metrics))
            counts.append((step.num_labels, step.num_tokens, step.num_positions, step.num_stopping))
            if step.num_stopping:
                break
    tensors = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    digest = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()
    return {"adapter": tensors, "losses": losses, "counts": counts, "digest": digest, "cuts": state["cuts"],
            "metrics": metrics}  # fmt: skip


def answers_to_learn(objective: str, *, keeps_draws: bool = False) -> tuple[AnswerSets, Learn]:
    """Rows of answers, and what learns from them with some reference; `dpo`, or `dpo, sft` with the sft loss added."""
    name, _, with_chosen = objective.partition(", ")
    made: Objective = {
        "dpo": Dpo(0.1, 0.1), "ipo": Ipo(0.2), "simpo": Simpo(2.0, 0.5), "orpo": Orpo(0.3),
        "kto": Kto(0.1, 1.0, 1.3), "rank": Rank("sum"),
    }[name]  # fmt: skip
    sets = answer_sets({"kto": "kto", "rank": "ranked"}.get(name, "pairs"), num_rows=10)
    sets = one_hot(sets) if name == "rank" else sets
    reference = np.random.default_rng(9).normal(-20.0, 3.0, len(sets)) if made.needs_reference else None
    return sets, LearnByScores(
        WithChosen(made, 0.3) if with_chosen else made, sets, reference, "all", keeps_draws=keeps_draws
    )


def _weighted(data: Any) -> tuple[Any, Learn]:
    """The data with weights of labels, some negative; a label of weight 0 is none, as in data that is read."""
    weights = np.random.default_rng(4).choice([-0.5, 0.0, 1.0, 2.5], len(data.labels))
    data = replace(data, labels=np.where(weights == 0, IGNORED_LABEL, data.labels))
    return data, LearnWeightedLabels.of(data, weights)


def _failing_at(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function`, out of memory at its call number `call`."""
    made = []

    def failing(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == call:
            raise torch.OutOfMemoryError("out of memory, for this test")
        return function(*arguments)

    return failing


def seam(kind: str) -> Any:
    """What each method of the seam gives, on this rank."""
    ranks = open_ranks()
    try:
        number = ranks.mine(range(ranks.count))
        return SEAM[kind](ranks, number)
    finally:
        ranks.close()


def _reported(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", None)


def _raise(error: Exception) -> None:
    raise error


def _seam_once(ranks: Any, number: int) -> Any:
    calls = []
    value = ranks.once(lambda: (calls.append(1), {"a": b"\x00\xff", "b": [1, 2.5, None]})[1])
    return value, len(calls)


def _seam_once_fails(ranks: Any, number: int) -> Any:
    from trietune.errors import UserError

    return _reported(lambda: ranks.once(lambda: _raise(UserError("the disk is full", next_step="x", exit_code=4))))


def _seam_together_fails(ranks: Any, number: int) -> Any:
    from trietune.errors import UserError

    return _reported(lambda: ranks.together(lambda: _raise(UserError("bad here", exit_code=2)) if number == 1 else 5))


def _seam_turns(ranks: Any, number: int) -> Any:
    import time

    def work() -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(0.2)
        return began, time.monotonic()

    return ranks.in_turn(work)


def _seam_agree(ranks: Any, number: int) -> Any:
    same = _reported(lambda: ranks.agree({"the data": "abc"}))
    return same, _reported(lambda: ranks.agree({"the data": "abc", "the version of torch": f"2.{number // 2}"}))


def _seam_stop(ranks: Any, number: int) -> Any:
    from trietune.errors import StopRequested

    def check() -> None:
        if number == 1:
            raise StopRequested("SIGTERM", 143)

    return _reported(lambda: ranks.stop_together(check, 0)), _reported(lambda: ranks.stop_together(check, 1))


def _seam_add_up(ranks: Any, number: int) -> Any:
    here, nowhere, one = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    here.grad = torch.full((3,), float(number + 1))
    if number == 1:
        one.grad = torch.ones(3)
    loss, numbers = ranks.add_up([here, nowhere, one], torch.tensor(float(number)), [1.0, 10.0 * number])
    return (
        here.grad.tolist(), nowhere.grad, one.grad.tolist(), float(loss), str(loss.dtype), numbers,
        ranks.seed_words([23, 5]),
    )  # fmt: skip


SEAM: dict[str, Callable[[Any, int], Any]] = {
    "once": _seam_once,
    "once fails": _seam_once_fails,
    "together fails": _seam_together_fails,
    "turns": _seam_turns,
    "agree": _seam_agree,
    "stop": _seam_stop,
    "add up": _seam_add_up,
}


def whole_run(settings: dict[str, Any], *, react: str = "", allowed_changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """`trietune.train` on this rank, and what it said."""
    from trietune import load_config
    from trietune.run.train import train as train_run
    from trietune.tracking.jsonl import FilesListener
    from trietune.tracking.tracker import Tracker

    heard = _Heard(REACTIONS.get(react, lambda event: None))
    tracker = Tracker([heard])
    tracker.add(FilesListener())
    try:
        run = train_run(load_config(None, settings), tracker=tracker, allowed_changes=frozenset(allowed_changes))
    except Exception as error:
        return {"error": (type(error).__name__, str(error), getattr(error, "exit_code", None)), "said": heard.said}
    return {
        "status": run.status, "step": run.step, "exit_code": run.exit_code, "directory": str(run.directory),
        "adapter": str(run.adapter), "before": dict(run.before), "after": dict(run.after), "said": heard.said,
        "metrics": heard.metrics, "plan": heard.plan,
    }  # fmt: skip


class _Heard:
    name = "heard"

    def __init__(self, react: Callable[[Any], None]) -> None:
        self.said: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self.plan: dict[str, str] = {}
        self.react = react

    def handle(self, event: Any) -> None:
        from trietune.tracking.events import Message, RunStarted, StepFinished

        if isinstance(event, Message):
            self.said.append(event.text)
        if isinstance(event, StepFinished):
            self.metrics.append(dict(event.metrics))
        if isinstance(event, RunStarted):
            self.plan = dict(event.plan)
            FOLDERS.append(event.directory)
        self.react(event)

    def close(self) -> None:
        pass


def _signal_at_step_3(event: Any) -> None:
    """A signal to rank 0 alone."""
    import os
    import signal

    from trietune.tracking.events import StepFinished

    if isinstance(event, StepFinished) and event.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def _move_folder_at_step_3(event: Any) -> None:
    from trietune.tracking.events import StepFinished

    if isinstance(event, StepFinished) and event.step == 3:
        FOLDERS[-1].rename(FOLDERS[-1].with_name("moved"))


# Of the runs that this process has begun.
FOLDERS: list[Path] = []
REACTIONS: dict[str, Callable[[Any], None]] = {
    "signal at step 3": _signal_at_step_3,
    "folder moved at step 3": _move_folder_at_step_3,
}


def run_with_odd_rank(settings: dict[str, Any], odd: dict[str, Any]) -> dict[str, Any]:
    """A whole run in which rank 1 has other settings."""
    import os

    return whole_run({**settings, **odd} if os.environ["RANK"] == "1" else settings)


def memory_of_layers(folder: str) -> dict[str, int]:
    """Bytes of the base model that this rank holds, sharded and whole."""
    from pathlib import Path

    from torch.distributed.tensor import DTensor

    from trietune.model.base.load import load_network
    from trietune.model.base.load_sharded import load_sharded
    from trietune.model.base.locate import locate_model

    ranks = open_ranks()
    try:
        base = locate_model(str(Path(folder)), report=lambda text: None, progress=lambda *done: None)
        sharded = load_sharded(base, dtype=torch.float32, device=torch.device("cpu"))
        whole = load_network(base, dtype=torch.float32, device=torch.device("cpu"))

        def own(p: Any) -> int:
            return int((p.to_local() if isinstance(p, DTensor) else p).numel())

        reference = dict(whole.named_parameters())
        equal = all(
            torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, reference[name])
            for name, p in sharded.named_parameters()
        )
        buffers = dict(whole.named_buffers())
        equal = equal and all(torch.equal(b, buffers[name]) for name, b in sharded.named_buffers())
        return {
            "own": sum(own(p) for p in sharded.get_decoder().layers.parameters()),
            "whole": sum(p.numel() for p in whole.get_decoder().layers.parameters()),
            "equal": int(equal),
        }
    finally:
        ranks.close()


def train_folder(folder: str, *, is_sharded: bool, num_steps: int = 8, objective: str = "") -> dict[str, Any]:
    """The adapter after some steps in fp64 on the base model in `folder`, whole in one process or sharded over all."""
    from contextlib import nullcontext

    from torch.distributed.tensor import DTensor

    from trietune.model.adapter.adapter import add_adapter
    from trietune.model.assemble import assemble
    from trietune.model.base.load import load_network
    from trietune.model.base.load_sharded import gathering, load_sharded
    from trietune.model.base.locate import locate_model

    ranks = open_ranks()
    ranks.has_equal_passes = is_sharded
    try:
        base = locate_model(folder, report=lambda text: None, progress=lambda *done: None)
        load = load_sharded if is_sharded else load_network
        network = load(base, dtype=torch.float64, device=torch.device("cpu"))
        peft_model = add_adapter(network, r=2, alpha=4, base=base, seed=3)
        whole = gathering(network) if is_sharded else nullcontext
        model = assemble(network, describe_cpu(), attention="rows", fused_layers=True, whole=whole)
        trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        assert not any(isinstance(p, DTensor) for p in trained.values())
        optimizer = build_optimizer(
            "adamw", trained.values(), learning_rate=2e-3, weight_decay=0.01, device=describe_cpu()
        )
        data: Any = question_batch(np.random.default_rng(0), vocabulary=100, paragraphs=5, questions=4)
        learn: Learn = learn_labels
        num_rows = len(data)
        if objective:
            data, learn = answers_to_learn(objective)
            num_rows = data.num_rows

        def cut(sequences: np.ndarray) -> Any:
            return [
                micro_batch
                for part in (data.apart(sequences) if objective else [sequences])
                for micro_batch in make_micro_batches(data, part, batching="trie", max_positions=50)
            ]

        def sequences_of(indices: np.ndarray) -> np.ndarray:
            return data.sequences_of(indices) if objective else indices

        rate = learning_rate_schedule("constant", peak=2e-3, num_steps=num_steps, num_warmup_steps=0)
        steps = training_steps(
            model,
            optimizer,
            Sampler(num_rows, batch_size=5, seed=3),
            StepRange(num_steps, 0, 1, rate),
            lambda indices: cut(sequences_of(indices)),
            seed=5,
            learn=learn,
            ranks=ranks,
            deal=None
            if ranks is ALONE
            else lambda indices: deal_step(data, sequences_of(indices), ranks.count, batching="trie", label_cost=0.26),
            make_part=cut,
        )
        losses = [float(step.loss or 0) for step in steps]
        layers = list(network.get_decoder().layers.named_parameters())
        return {
            "adapter": {name: p.detach().numpy().copy() for name, p in trained.items()},
            "losses": losses,
            "prunes_last": model.prunes_last,
            "is_let_go": all(isinstance(p, DTensor) for name, p in layers if "lora_" not in name),
        }  # fmt: skip
    finally:
        ranks.close()


def loading_error(folder: str) -> str:
    """What is said of a folder that cannot be loaded in parts."""
    from trietune.errors import UserError
    from trietune.model.base.load_sharded import load_sharded
    from trietune.model.base.locate import locate_model

    ranks = open_ranks()
    try:
        base = locate_model(folder, report=lambda text: None, progress=lambda *done: None)
        load_sharded(base, dtype=torch.float32, device=torch.device("cpu"))
    except UserError as error:
        return str(error)
    finally:
        ranks.close()
    return ""
