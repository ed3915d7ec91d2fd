"""Measure what preferences teach, next to TRL on the same pairs and steps.

    python benchmarks/preference_accuracy.py [--sets sample squad] [--steps 100] [--data FOLDER]

What: SmolLM2 trained by DPO for a number of steps with TRL's `DPOTrainer` and with TrieTune's loop (`peers/dpo.py`), on
the same tokens in the same order, from the same first weights. Afterwards both adapters score the same pairs that were
held out: the share of pairs whose better answer is more likely than the other one, before and after, and the share in
which training raised the better answer by more than the other one (TRL's `rewards/accuracies`), with 95% intervals.

    sample   the preferences that TrieTune ships: 160 pairs for training, 40 held out
    squad    answered questions of SQuAD v2: the right answer against the answer to another question about the same
             paragraph; whole articles are held out

Why: equal gradients should end in equal adapters, up to the rounding of bf16. Here one sees that they do, and whether
anything is learned.

What it does not show: speed (`preferences.py`), other objectives, long training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compare import add_model_options, choose_model, say  # noqa: E402
from job import Gate, Job  # noqa: E402
from measure import environment  # noqa: E402
from models import ModelChoice  # noqa: E402
from peers import dpo  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from workloads import SEED, Workload, find_file, flatten, squad_prompt  # noqa: E402

from trietune.demo import demo_preferences  # noqa: E402
from trietune.evaluation.metrics import Measured  # noqa: E402
from trietune.evaluation.preferences import measure_share  # noqa: E402

ENGINES = ("dpo-trl", "dpo-trietune")
SETS = ("sample", "squad")
MAX_LENGTH = 256
HELD_OUT_ARTICLES = 20

# Prompt, better answer, worse answer, as token ids.
Pair = tuple[list[int], list[int], list[int]]


def main() -> None:
    options = parse(sys.argv[1:])
    device = torch.device(options.device)
    model = choose_model(options)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    out = Path(options.out) / f"{options.name or 'preference-accuracy-' + model.name}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name in options.sets:
        train, held_out = read_pairs(name, tokenizer, options)
        for engine in options.engines:
            result = train_once(name, engine, model, train, held_out, device, options)
            results.append(result)
            print(line(result), flush=True)
        run = {"kind": "run", "model": model.record(), **environment(device)}
        out.write_text("".join(json.dumps(result) + "\n" for result in [*results, run]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add_model_options(parser)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    parser.add_argument("--held-out", type=int, default=400, help="pairs of SQuAD that are scored")
    return parser.parse_args(arguments)


# Pairs


def read_pairs(name: str, tokenizer: Any, options: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and pairs that are held out."""
    if name == "sample":
        return _sample(tokenizer, "train.jsonl"), _sample(tokenizer, "valid.jsonl")
    articles = json.loads(find_file(Path(options.data), "squad_v2/train.json").read_text("utf-8"))["data"]
    wanted = options.steps * options.batch_size
    held_out = _squad(tokenizer, articles[:HELD_OUT_ARTICLES], options.held_out)
    return _squad(tokenizer, articles[HELD_OUT_ARTICLES:], wanted), held_out


def _sample(tokenizer: Any, file: str) -> list[Pair]:
    pairs = []
    for text in (demo_preferences() / file).read_text("utf-8").splitlines():
        row = json.loads(text)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = [tokenizer.apply_chat_template(row["prompt"] + row[key])["input_ids"] for key in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in whole)
        pairs.append((prompt, *(ids[len(prompt) :] for ids in whole)))
    return pairs


def _squad(tokenizer: Any, articles: Sequence[Any], wanted: int) -> list[Pair]:
    """A pair for each answered question whose paragraph holds another answer; a random part of them."""
    draw = np.random.default_rng(SEED)
    texts = []
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        answered = [(qa["question"], qa["answers"][0]["text"]) for qa in paragraph["qas"] if qa["answers"]]
        for question, right in answered:
            others = sorted({text for _, text in answered if text.strip().lower() != right.strip().lower()})
            if others:
                prompt = squad_prompt(paragraph["context"], question)
                texts.append((prompt, right, others[int(draw.integers(len(others)))]))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pairs: list[Pair] = []
    for number in draw.permutation(len(texts)):
        prompt, right, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[number])
        pair = (begin + prompt, [*right, tokenizer.eos_token_id], [*other, tokenizer.eos_token_id])
        if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= MAX_LENGTH:
            pairs.append(pair)
        if len(pairs) == wanted:
            break
    return pairs


def as_workload(name: str, pairs: Sequence[Pair], batches: list[np.ndarray], batch_size: int) -> Workload:
    rows = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    return Workload(
        name,
        flatten(rows),
        max_length=MAX_LENGTH,
        batch_size=batch_size,
        batches=batches,
        steps_a_round=1,
        num_too_long=0,
        row_start=2 * np.arange(len(pairs) + 1),
    )


def draw_batches(num_pairs: int, batch_size: int, num_steps: int) -> list[np.ndarray]:
    """Epoch after epoch in new orders; what an epoch has left of a batch is left out."""
    draw = np.random.default_rng(SEED)
    batches: list[np.ndarray] = []
    while len(batches) < num_steps:
        order = draw.permutation(num_pairs)
        batches += [order[first : first + batch_size] for first in range(0, num_pairs - batch_size + 1, batch_size)]
    return batches[:num_steps]


# Training and measuring


class Open(Gate):
    """A gate that lets every step pass, and keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.began = 0.0

    def open(self) -> None:
        self.began = time.perf_counter()

    def __call__(self, loss: float, num_examples: int) -> None:
        self.losses.append(loss)
        if len(self.losses) % 10 == 0:
            say(f"step {len(self.losses)}, {time.perf_counter() - self.began:.0f} s, loss {loss:.4f}")


def train_once(
    name: str,
    engine: str,
    model: ModelChoice,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    batches = draw_batches(len(train), options.batch_size, options.steps)
    gate = Open()
    network = dpo.train(
        Job(engine, model, as_workload(name, train, batches, options.batch_size), device.type), device, gate
    )
    seconds = time.perf_counter() - gate.began
    scored = as_workload(name, held_out, [np.arange(len(held_out))], len(held_out))
    after = score(network, scored, device)
    for module in network.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.zeros_(module.lora_B["default"].weight)
    before = score(network, scored, device)
    return {
        "kind": "preference-accuracy",
        "set": name,
        "engine": engine,
        "steps": options.steps,
        "pairs_per_step": options.batch_size,
        "trained_pairs": len({int(pair) for batch in batches for pair in batch}),
        "held_out_pairs": len(held_out),
        "likelier_before": share(before),
        "likelier_after": share(after),
        "rewarded": share(after - before),
        "margin": float((after - before) @ [1.0, -1.0] @ np.ones(len(held_out)) / len(held_out)) * dpo.BETA,
        "losses": gate.losses,
        "seconds": seconds,
    }


@torch.no_grad()
def score(network: Any, workload: Workload, device: torch.device) -> np.ndarray:
    """Log-probabilities of the better and the worse answer of every pair, by plain rows: fp64 [P, 2]."""
    network.eval()
    found: dict[int, float] = {}
    for part in dpo.cut_by_length(workload, workload.batches[0]):
        found.update((sequence, float(one)) for sequence, one in dpo.scores(network, workload, part, device))
    return np.array([found[sequence] for sequence in range(len(found))]).reshape(-1, 2)


def share(scores: np.ndarray) -> dict[str, float]:
    """Of pairs whose better answer has the greater number, with its interval."""
    measured: Measured = measure_share("share", scores[:, 0] > scores[:, 1], np.arange(len(scores)))
    lowest, highest = measured.intervals["share"]
    return {"share": measured.metrics["share"], "lowest": lowest, "highest": highest}


def line(result: dict[str, Any]) -> str:
    def of(name: str) -> str:
        found = result[name]
        return f"{100 * found['share']:.1f}% ({100 * found['lowest']:.1f} to {100 * found['highest']:.1f})"

    return (
        f"{result['set']:<7} {result['engine']:<13} better answer likelier: {of('likelier_before')} before, "
        f"{of('likelier_after')} after; rewarded {of('rewarded')}, margin {result['margin']:.3f}; "
        f"last losses {' '.join(f'{loss:.4f}' for loss in result['losses'][-3:])}; {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
