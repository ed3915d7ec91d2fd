"""Every causal type of the installed transformers, small and random: what a trie, padded rows and a proof make of it.

    loop     plain transformers and PEFT, a row an example: the gradients that all others are compared with
    trie     as a run computes it, the proof of every layer in front; again in bf16, and with another layout of heads
    padded   padded rows, proven alike
    caught   the proof again with a broken mask, broken positions, dropped windows, rotation where there is none

    python tests/causal_types/try_types.py [OUT.jsonl] [TYPE ...] [--jobs 2]

A process for each type; a line of JSON for each that is done, so that a second call goes on where the first was ended.
Adapters are random, so that every gradient counts; rows are longer than every window.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

TABLE = Path(__file__).parent / "table.jsonl"
SECONDS_A_TYPE = 900
# Norm of the difference of all adapters' gradients by their norm, in fp32: right ways differ in the order of sums.
EXACT, EXACT_FP64 = 2e-4, 1e-9
# In bf16 the proof, whose parts are fp32, is what tells right from wrong. Gradients of a whole network are further from
# the fp32 loop's, by rounding and by experts that are chosen otherwise: this far, or twice as far as plain rows are.
BF16_FACTOR, BF16_LEAST = 2.0, 0.2
LONGEST = 70
MULTIMODAL = (
    "aria", "cohere2_vision", "glm4v", "glm4v_moe", "idefics3", "internvl", "kimi_k25", "lfm2_vl", "llava",
    "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5",
    "qwen3_vl", "qwen3_vl_moe", "smolvlm",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=TABLE)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    import trietune.model.adapter.export  # noqa: F401  (once, for all processes)
    from causal_types import mutations  # noqa: F401
    from causal_types.small_models import causal_types

    everything = [*causal_types(), *(name for name in MULTIMODAL if name not in causal_types())]
    wanted = arguments.types or everything
    # First how all of them train; then what takes longer.
    for part, is_missing in ((try_type, lambda row: row is None), (complete, _lacks_the_rest)):
        known = {row["type"]: row for row in read_table(arguments.out)}
        missing = [name for name in wanted if is_missing(known.get(name))]
        # Each thread does nothing but wait for its process.
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool, arguments.out.open("a") as file:
            for row in pool.map(partial(try_apart, part), missing, [known.get(name) for name in missing]):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(summary_of(row), flush=True)
    rows = sorted(read_table(arguments.out), key=lambda row: str(row["type"]))
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for way in ("built", "trie", "padded"):
        print(way, dict(Counter(row[way]["status"] for row in rows if way in row)))


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """The rows, of each type the last that was written."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({row["type"]: row for row in map(json.loads, filter(None, lines))}.values())


def summary_of(row: dict[str, Any]) -> str:
    ways = [f"{way} {row[way]['status']}" for way in ("built", "trie", "bf16", "padded", "heads") if way in row]
    said = next((row[way]["said"] for way in ("trie", "padded", "built") if row.get(way, {}).get("said")), "")
    return f"{row['type']:26} {', '.join(ways)} {row.get('caught', '')} {said[:110]}"


Part = Callable[[str, "dict[str, Any] | None"], "dict[str, Any]"]


def try_apart(part: Part, model_type: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """In a process of its own: some types end theirs. It is a copy of this one, which has imported what all need."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, part, model_type, known))
    process.start()
    sender.close()
    row: dict[str, Any] = {"type": model_type, "built": {"status": "crashed", "said": "no answer in time"}}
    if receiver.poll(SECONDS_A_TYPE):
        try:
            row = receiver.recv()
        except EOFError:
            row["built"]["said"] = "its process ended"
    process.kill()
    process.join()
    return row


def _child(sender: Any, part: Part, model_type: str, known: dict[str, Any] | None) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nothing:  # noqa: PTH123  (a device)
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    sender.send(part(model_type, known))


def try_type(model_type: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The first part of the line of the table: how a type trains in fp32."""
    import torch
    import transformers

    from causal_types.small_models import causal_types, small_network

    row: dict[str, Any] = {"type": model_type, "transformers": transformers.__version__}
    row["is_multimodal"] = model_type not in causal_types()
    try:
        network = small_network(model_type)
    except Exception as error:
        return row | {"built": {"status": "not built", "said": _said(error)}}
    row["built"] = {"status": "built", "class": type(network).__name__}
    row["as_decoder"] = getattr(network.config, "is_decoder", None) is True
    del network
    try:
        expected = _plain(model_type, torch.float32)
    except Exception as error:
        return row | {"built": {"status": "not built", "said": f"a plain loop: {_said(error)}"}}
    row["trie"] = _guarded(lambda: _computed(model_type, expected, "rows"))
    row["padded"] = _guarded(lambda: _computed(model_type, expected, None))
    return row


def _lacks_the_rest(row: dict[str, Any] | None) -> bool:
    return row is not None and row.get("trie", {}).get("status") in ("exact", "WRONG") and "caught" not in row


def complete(model_type: str, known: dict[str, Any] | None) -> dict[str, Any]:
    """The rest of the line: in bf16, with other heads, and what is caught."""
    import torch

    assert known is not None
    row, expected = dict(known), _plain(model_type, torch.float32)
    row["bf16"] = _guarded(lambda: _in_bf16(model_type, expected))
    row["heads"] = _guarded(lambda: _other_heads(model_type))
    row["caught"] = {name: _caught(model_type, name, row["trie"], expected) for name in _mutations()}
    return row


def _guarded(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from trietune.errors import UserError

    try:
        return compute()
    except UserError as error:
        return {"status": "refused", "said": error.what, "next": error.next_step}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"status": "crashed", "said": f"{_said(error)} ({Path(where.filename).name}:{where.lineno})"}


def _network(model_type: str, dtype: Any, **changes: Any) -> Any:
    """With random adapters, the same ones each time, and without randomness of its own."""
    import torch

    from causal_types.small_models import small_network
    from trietune.model.adapter.adapter import add_adapter
    from trietune.model.base.folder import ModelFolder
    from trietune.model.base.randomness import silence_rates

    network = small_network(model_type, **changes).to(dtype)
    silence_rates(network)
    add_adapter(network, r=4, alpha=8, base=ModelFolder(Path("x"), "x", "folder"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.05).to(parameter.dtype)
    return network


def _plain(model_type: str, dtype: Any, **changes: Any) -> tuple[float, dict[str, Any]]:
    from model.test_proof import batch, plain_gradients

    return plain_gradients(_network(model_type, dtype, **changes).eval(), batch(), attention=None)


def _computed(model_type: str, expected: Any, way: Any, **changes: Any) -> dict[str, Any]:
    import torch

    network = _network(model_type, torch.float32, **changes)
    model, proof = _proven(network, way, with_gradients=way is not None)
    found: dict[str, Any] = {"status": "proven", "attention": _attention_of(model, proof), "proof": proof.worst}
    if proof.on_whole_rows:
        found["why"] = model.why_whole_rows
    if expected is None:
        return found
    found["difference"] = difference = _difference(_gradients(model, way), expected[1])
    found["status"] = "exact" if difference <= EXACT else "WRONG"
    if difference > EXACT:
        # A network that computes its layers again and again (HRM) makes rounding large; in fp64 right and wrong part.
        twice = _network(model_type, torch.float64, **changes)
        model, _ = _proven(twice, way, with_gradients=False)
        expected = _plain(model_type, torch.float64, **changes)
        found["difference_fp64"] = _difference(_gradients(model, way), expected[1])
        found["status"] = "exact" if found["difference_fp64"] <= EXACT_FP64 else "WRONG"
    return found


def _proven(network: Any, way: Any, *, with_gradients: bool = True, longest: int = LONGEST) -> tuple[Any, Any]:
    """As a run takes a network: refused, or assembled and proven."""
    model = _assembled(network, way)
    return model, _proof_of(model, with_gradients=with_gradients, longest=longest)


def _proof_of(model: Any, *, with_gradients: bool, longest: int) -> Any:
    from trietune.model.proof import prove, random_forests

    forests = random_forests(model.vocabulary_size, longest, device=model.device)
    return prove(model, *forests, family=str(model.network.config.model_type), with_gradients=with_gradients)


def _assembled(network: Any, way: Any) -> Any:
    from trietune.device import choose_device
    from trietune.errors import UserError
    from trietune.model.architecture import check_architecture, why_whole_rows
    from trietune.model.assemble import assemble

    refusal = check_architecture(network)
    if way is not None and refusal is not None:
        raise UserError(f"batches cannot be computed as a trie: {refusal}", next_step="`--set batching=padded`")
    device = choose_device("cpu", use_tt=False)
    why = None if way is None else why_whole_rows(network)
    return assemble(network, device, attention=way, fused_layers=True, why_whole_rows=why)


def _attention_of(model: Any, proof: Any) -> str:
    """How attention runs in the layers that run on the lowest rung."""
    from trietune.model.proof.ladder import BY_ROWS, UNDER_A_MASK
    from trietune.model.replaced import FORWARD_BEFORE
    from trietune.model.states import carries_states

    if proof.on_whole_rows:
        return "whole rows"
    rung = max(proof.rungs.values())
    if model.attention is None:
        return "transformers, eager" if rung == UNDER_A_MASK else "transformers"
    if rung == UNDER_A_MASK:
        return "mask"
    attentions = [module for module in model.network.modules() if hasattr(module, "q_proj")]
    is_fused = attentions and all(FORWARD_BEFORE in vars(module) for module in attentions)
    name = "nodes, fused" if is_fused and rung < BY_ROWS else "nodes"
    return f"{name}, states" if carries_states(model.network) else name


def _gradients(model: Any, way: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    from model.test_proof import batch
    from trietune.trie import make_micro_batches, total_weight

    batching = "padded" if way is None else "trie"
    micro_batches = make_micro_batches(batch(), np.arange(7), batching=batching, max_positions=10_000)
    for micro_batch in micro_batches:
        losses = model.label_losses(micro_batch)
        (losses * torch.from_numpy(micro_batch.label_weight).to(losses.dtype)).sum().div(
            total_weight(micro_batches)
        ).backward()
    return {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    difference = sum(float((found[n].double() - g.double()).square().sum()) for n, g in expected.items()) ** 0.5
    size = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
    return difference / size if size > 0 and difference == difference else float("inf")


def _in_bf16(model_type: str, expected: Any) -> dict[str, Any]:
    import torch

    model, proof = _proven(_network(model_type, torch.bfloat16), "rows", with_gradients=False, longest=40)
    ours = _difference(_gradients(model, "rows"), expected[1])
    plain = _difference(_plain(model_type, torch.bfloat16)[1], expected[1])
    status = "exact" if ours <= max(BF16_FACTOR * plain, BF16_LEAST) else "WRONG"
    return {"status": status, "attention": _attention_of(model, proof), "difference": ours, "plain_rows": plain}


def _other_heads(model_type: str) -> dict[str, Any]:
    """Keys and values of every head, or one for all, where grouped ones were tried."""
    import torch

    from causal_types.small_models import small_config

    text = small_config(model_type).get_text_config()
    if not isinstance(getattr(text, "num_key_value_heads", None), int):
        return {"status": "-"}
    before = int(text.num_key_value_heads)
    number = 1 if before == int(text.num_attention_heads) else int(text.num_attention_heads)
    try:
        expected = _plain(model_type, torch.float32, num_key_value_heads=number)
    except Exception:
        return {"status": "-"}
    return _computed(model_type, expected, "rows", num_key_value_heads=number) | {"key_heads": [before, number]}


def _mutations() -> Any:
    from causal_types.mutations import MUTATIONS

    return MUTATIONS


def _caught(model_type: str, name: str, right: dict[str, Any], expected: Any) -> str:
    """`caught`, `MISSED`, or `-` where there is nothing to break."""
    import pytest
    import torch

    from trietune.errors import UserError
    from trietune.run.proving import windows_of

    happened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        network = _network(model_type, torch.float32)
        if name == "window" and not windows_of(network.config.get_text_config()):
            return "-"
        _mutations()[name](patch, happened)
        try:
            model = _assembled(network, "rows")
            if name == "rotation" and not happened:
                return "-"
            proof = _proof_of(model, with_gradients=False, longest=30)
        except UserError:
            return "caught"
        if not happened:
            return "-"
        # Whole rows that share no products are the network as it is.
        if _attention_of(model, proof) != right["attention"] or (proof.on_whole_rows and max(proof.rungs.values())):
            return "caught"
        if expected is None:
            return "-"
        # What was broken is not what this type computes with, or it went unnoticed.
        return "-" if _difference(_gradients(model, "rows"), expected[1]) <= EXACT else "MISSED"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


if __name__ == "__main__":
    main()
