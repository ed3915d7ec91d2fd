"""Every causal type of the installed transformers, small and random, trained three SGD steps in three ways.

    trie, padded       `train` with `batching: trie` and `batching: padded`, as a user would run them
    loop               plain transformers and PEFT, a row at a time

    python tests/causal_types/try_types.py OUT.jsonl [TYPE ...] [--jobs 2] [--dtype float32]

A process for each type; a line of JSON for each that is done, so that a second call goes on where the first was ended.
What is compared: the adapters after the three steps, relative to how far they moved.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS_PER_TYPE = 240
LEARNING_RATE = 0.5
STEPS = 3
# fp32, three steps: right ways differ in the order of sums; the largest seen is 7e-6. bf16 rounds at every layer.
EXACT = {"float32": 1e-4, "bfloat16": 0.2}
TARGETS = {"r": 4, "alpha": 8, "seed": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=list(EXACT))
    arguments = parser.parse_args()
    import trietune.model.adapter.export
    import trietune.run.session  # noqa: F401  (once, for all processes)
    from causal_types.small_models import causal_types

    done = {row["type"] for row in read_table(arguments.out) if row["dtype"] == arguments.dtype}
    missing = [name for name in arguments.types or causal_types() if name not in done]
    # Each thread does nothing but wait for its process.
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool, arguments.out.open("a") as file:
        for row in pool.map(lambda name: try_type_apart(name, arguments.dtype), missing):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(summary_of(row), flush=True)
    rows = read_table(arguments.out)
    for way in ("built", "trie", "padded"):
        print(way, dict(Counter(row[way]["status"] for row in rows if way in row)))


def read_table(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def summary_of(row: dict[str, Any]) -> str:
    ways = [f"{way} {row[way]['status']}" for way in ("built", "trie", "padded", "loop") if way in row]
    said = next((row[way]["said"] for way in ("padded", "trie", "loop", "built") if row.get(way, {}).get("said")), "")
    return f"{row['type']:26} {', '.join(ways)}  {said[:110]}"


def try_type_apart(model_type: str, dtype: str) -> dict[str, Any]:
    """In a process of its own: some types end theirs. It is a copy of this one, which has imported what all need."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, model_type, dtype))
    process.start()
    sender.close()
    row: dict[str, Any] = {"type": model_type, "dtype": dtype, "built": {"status": "crashed", "said": "no answer"}}
    if receiver.poll(SECONDS_PER_TYPE):
        try:
            row = receiver.recv()
        except EOFError:
            row["built"]["said"] = "its process ended"
    process.kill()
    process.join()
    return row


def _child(sender: Any, model_type: str, dtype: str) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nothing:  # noqa: PTH123  (a device)
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    sender.send(try_type(model_type, dtype))


def try_type(model_type: str, dtype: str = "float32") -> dict[str, Any]:
    """The line of the table."""
    import transformers

    row: dict[str, Any] = {"type": model_type, "dtype": dtype, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRIETUNE_CACHE"] = str(folder / "cache")
        try:
            _write_model(model_type, folder / "model")
        except Exception as error:
            return row | {"built": {"status": "not built", "said": _said(error)}}
        row["built"] = {"status": "built"}
        _write_examples(folder / "train.jsonl")
        adapters: dict[str, Any] = {}
        for way in ("loop", "padded", "trie"):
            row[way], adapters[way] = _try(way, folder, dtype)
        for way in ("padded", "trie"):
            if row[way]["status"] != "ran" or row["loop"]["status"] != "ran":
                continue
            row[way]["difference"] = difference = _difference(adapters[way], adapters["loop"])
            row[way]["status"] = "exact" if difference <= EXACT[dtype] else "WRONG"
    return row


def _write_model(model_type: str, folder: Path) -> None:
    from causal_types.small_models import small_network
    from tiny_model import write_tiny_model

    write_tiny_model(folder)
    for file in (folder / "config.json", folder / "model.safetensors", folder / "generation_config.json"):
        file.unlink(missing_ok=True)
    network = small_network(model_type)
    network.save_pretrained(folder)


def _write_examples(path: Path) -> None:
    """Forty that share beginnings of several lengths, most of them longer than the windows of the small models."""
    draw = random.Random(4)
    text = lambda n: "".join(draw.choice("abcdefgh ") for _ in range(n))  # noqa: E731
    stems = [text(18), text(9)]
    stems += [stems[0][:12] + text(6), stems[1] + text(7)]
    lines = [{"p": draw.choice(stems) + text(draw.randint(0, 8)), "c": text(draw.randint(1, 4))} for _ in range(40)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def _settings(folder: Path, dtype: str, batching: str) -> Any:
    from trietune.config import load_config

    return load_config(
        None,
        {
            "model_name": str(folder / "model"), "train_file": str(folder / "train.jsonl"), "prompt_template": "{p}",
            "completion_template": "{c}", "max_length": 64, "batch_size": 40, "num_epochs": STEPS, "optim": "sgd",
            "weight_decay": 0.0, "learning_rate": LEARNING_RATE, "dtype": dtype, "batching": batching, "device": "cpu",
            "lora_r": TARGETS["r"], "lora_alpha": TARGETS["alpha"], "seed": TARGETS["seed"], "use_wandb": False,
            "print_examples": False, "save_strategy": "no", "project_dir": str(folder / "runs"),
            "wandb_run_name": batching,
        },
    )  # fmt: skip


def _try(way: str, folder: Path, dtype: str) -> tuple[dict[str, Any], Any]:
    from trietune.errors import UserError
    from trietune.io.safetensors import parse
    from trietune.run.session import train
    from trietune.tracking.tracker import Tracker

    try:
        if way == "loop":
            return {"status": "ran"}, _loop(folder, dtype)
        run = train(_settings(folder, dtype, way), tracker=Tracker())
        assert run.adapter is not None
        tensors = parse((run.adapter / "adapter_model.safetensors").read_bytes())[0]
        return {"status": "ran"}, {name: tensor.to_numpy() for name, tensor in tensors.items()}
    except UserError as error:
        return {"status": "refused", "said": str(error).replace("\n", " ")}, None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"status": "crashed", "said": f"{_said(error)} ({Path(where.filename).name}:{where.lineno})"}, None


def _loop(folder: Path, dtype: str) -> dict[str, Any]:
    """Plain transformers and PEFT; only where the adapter begins, and what it is on, is as in a run."""
    import torch

    from trietune.model.adapter.adapter import adapter_tensors, add_adapter
    from trietune.model.base.folder import ModelFolder
    from trietune.model.base.load import load_network
    from trietune.run.prepare import adapter_arguments, prepare
    from trietune.tracking.tracker import Tracker

    settings = _settings(folder, dtype, "padded")
    base = ModelFolder(folder / "model", "x", "folder")
    data = prepare(settings, Tracker(), lambda: None).data.train
    network = load_network(base, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    peft_model = add_adapter(network, base=base, **adapter_arguments(settings)).eval()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    offsets = data.offsets.tolist()
    for _ in range(STEPS):
        total = sum(int((data.labels[begin + 1 : end] != -100).sum()) for begin, end in itertools.pairwise(offsets))
        for begin, end in itertools.pairwise(offsets):
            ids = torch.tensor(data.input_ids[begin:end].tolist())[None]
            labels = torch.tensor(data.labels[begin:end].tolist())
            logits = peft_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[1:], reduction="sum") / total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().float().numpy().copy() for name, tensor in adapter_tensors(peft_model).items()}


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of all numbers, relative to the largest of B, which begins as 0."""
    if set(one) != set(other):
        return float("inf")
    moved = max(float(abs(tensor).max()) for name, tensor in other.items() if "lora_B" in name)
    found = max(float(abs(one[name] - tensor).max()) for name, tensor in other.items())
    return found / moved if moved > 0 and found == found else float("inf")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]


if __name__ == "__main__":
    main()
