"""Compare AdamW over one buffer with torch's own AdamW, on real steps of SmolLM2-135M.

    python benchmarks/adamw.py [--pairs 20] [--folder FOLDER]

One network takes all steps, on the same batches of the sample reviews: forward and backward, then clipping, update and
zeroing by each optimizer in turn. What is compared is the processor time of this process on one thread, so other work
on the machine changes it little, and each pair is taken within a second or two of the other.

    flat      trietune's FlatAdamW, with torch's fused kernel
    fused     torch.optim.AdamW(fused=True)
    foreach   torch.optim.AdamW(foreach=True)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import ModelChoice, add_lora, build_network, find_smollm2, trained_parameters
from torch import Tensor, nn
from transformers import AutoTokenizer
from workloads import Workload, real_workload

from trietune.device import choose_device
from trietune.model.assemble import assemble
from trietune.training.flat_adamw import FlatAdamW
from trietune.training.gradients import accumulate_gradients
from trietune.trie import make_micro_batches

OPTIONS = {"lr": 1e-6, "weight_decay": 0.01}
MOST_NODES = 16_384


@dataclass(slots=True)
class Contender:
    """An optimizer over the adapter, and where it wants its gradients."""

    name: str
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    seconds: list[float]

    def update(self) -> None:
        """What a step does once all gradients are there; the time of this process is kept."""
        given = [parameter.grad for parameter in self.parameters]
        for parameter, own in zip(self.parameters, self.gradients, strict=True):
            if own is not None:
                assert parameter.grad is not None
                own.copy_(parameter.grad)
                parameter.grad = own
        began = time.process_time()
        owned = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(owned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.process_time() - began)
        for parameter, grad in zip(self.parameters, given, strict=True):
            parameter.grad = grad


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=20, help="steps at each batch size")
    arguments.add_argument("--folder", help="of SmolLM2; default: the sample model")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[4, 32], help="examples per step")
    arguments.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = arguments.parse_args()
    torch.set_num_threads(1)
    choice = ModelChoice("smollm2", find_smollm2(options.folder), layers=0, dtype=options.dtype)
    device = choose_device("cpu", use_tt=False)
    network = add_lora(build_network(choice, torch.device("cpu")), choice).get_base_model()
    network.train()
    parameters = trained_parameters(network)
    flat = FlatAdamW(parameters, **OPTIONS, fused=True)
    views: list[Tensor | None] = [parameter.grad for parameter in parameters]
    contenders = [
        Contender("flat", flat, parameters, views, []),
        Contender("fused", torch.optim.AdamW(parameters, **OPTIONS, fused=True), parameters, [None] * len(views), []),
        Contender(
            "foreach", torch.optim.AdamW(parameters, **OPTIONS, foreach=True), parameters, [None] * len(views), []
        ),
    ]
    model = assemble(network, device, attention="rows", fused_layers=True, pack_weights="auto")
    tokenizer = AutoTokenizer.from_pretrained(choice.folder)
    for size in options.sizes:
        workload = real_workload(f"sst2-plain-{size}", tokenizer, Path("demo"), num_rounds=options.pairs)
        print(json.dumps(compare(model, workload, contenders, options.pairs)), flush=True)


def compare(model: Any, workload: Workload, contenders: list[Contender], num_steps: int) -> dict[str, Any]:
    """Medians in milliseconds, and each contender's whole step as a share of the first one's, with its quartiles."""
    for contender in contenders:
        contender.seconds.clear()
    gradients: list[float] = []
    parameters = contenders[0].parameters
    for number, batch in enumerate(workload.batches[: num_steps + 1]):
        micro_batches = make_micro_batches(workload.sequences, batch, batching="trie", max_positions=MOST_NODES)
        for parameter in parameters:
            parameter.grad = None
        began = time.process_time()
        accumulate_gradients(model, micro_batches)
        gradients.append(time.process_time() - began)
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            contender.update()
    first = contenders[0]
    result: dict[str, Any] = {"batch_size": workload.batch_size, "steps": num_steps, "gradients_ms": ms(gradients[1:])}
    for contender in contenders:
        result[f"{contender.name}_ms"] = ms(contender.seconds[1:])
        ratios = [
            (work + own) / (work + base)
            for work, own, base in zip(gradients[1:], contender.seconds[1:], first.seconds[1:], strict=True)
        ]
        result[f"{contender.name}_step"] = [round(one, 4) for one in statistics.quantiles(ratios, n=4)]
    return result


def ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


if __name__ == "__main__":
    main()
