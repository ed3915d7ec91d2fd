"""Print, as a table, which program gives the answers of `trietune predict` to 20 prompts, for models and adapters.

    python tests/handover/table.py [--models llama gemma smollm2 ...] > table.md

Run by the development environment; the readers are in the one that `make test-handover` makes. An answer is that of
greedy decoding, 8 tokens at most: a program that agrees finds each of its tokens the likeliest. "before" is what a
program makes of the files without what the export adds for it: without transformers 4's names in `config.json`, and
with an adapter's scale as llama.cpp reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402

from handover.conftest import READER  # noqa: E402
from handover.models import prompts, write_adapter, write_base  # noqa: E402
from handover.test_other_readers import _base_as_gguf  # noqa: E402
from trietune.data.encoder import load_tokenizer  # noqa: E402
from trietune.errors import UserError  # noqa: E402
from trietune.evaluation.generation import GenerationLimits, generate  # noqa: E402
from trietune.io.safetensors import parse  # noqa: E402
from trietune.model.base.load import load_network, quiet_library  # noqa: E402
from trietune.model.base.locate import locate_model  # noqa: E402
from trietune.model.handover.gguf_files import write_adapter as write_gguf_adapter  # noqa: E402
from trietune.model.handover.gguf_names import names_for  # noqa: E402
from trietune.model.handover.handover import ADAPTER_GGUF, MODEL_GGUF, _model_config, hand_over  # noqa: E402
from trietune.model.handover.rules import check_rules, program, vllm_rank  # noqa: E402
from trietune.model.handover.verify import likeliest_tokens  # noqa: E402
from trietune.run.opened import open_model  # noqa: E402
from trietune.tracking.tracker import Tracker  # noqa: E402

MODELS = ("llama", "gemma", "gemma2", "gemma3", "qwen3", "smollm2")
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "r": 16, "alpha": 3.5},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
}
NEW_TOKENS = 8
# What transformers 5 leaves out of a configuration and transformers 4 looks for.
OLD_NAMES = ("rope_theta", "rope_local_base_freq", "rope_scaling")

Answers = list[tuple[list[int], list[int]]]
"""Prompt and greedy answer, with the stop token if one ended it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    options = parser.parse_args()
    # Names the readers' Python, and is no key of a configuration.
    os.environ.pop("TRIETUNE_HANDOVER_PYTHON", None)
    print("| model | adapter | target | what was run | before | after |", "|---|---|---|---|---|---|", sep="\n")
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder, quiet_library():
            for line in rows(model, Path(folder), options.kinds):
                print("| " + " | ".join(line) + " |", flush=True)


def rows(model: str, folder: Path, kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """The lines of one model."""
    base = locate_model("smollm2-135m-instruct") if model == "smollm2" else write_base(folder / "base", model)
    # Random weights have near ties that f16 decides otherwise; a real model is exported as it is by default.
    form: Any = "f16" if model == "smollm2" else "f32"
    base_gguf = _base_as_gguf(base, folder / "base.gguf")
    asked: dict[str, Any] = {}
    found: list[tuple[str, str, str, str, Any, Any]] = []
    for kind in kinds:
        # Gemma's norms leave little of a small adapter; the real model needs no push.
        noise = 0.02 if model == "smollm2" else 0.4
        adapter = write_adapter(base, folder / kind, noise=noise, **KINDS[kind])
        config = LoraConfig.from_pretrained(adapter)
        answers = ask(adapter, base)
        peft = PeftModel.from_pretrained(load_network(base, dtype=torch.float32, device=torch.device("cpu")), adapter)
        found.append((kind, "transformers", "PEFT, adapter", "", "", agreed(likeliest(peft, answers), answers)))
        merged = hand_over(
            adapter, folder / f"{kind}-tf", target="transformers", base=base, prompts=prompts, merge=True
        )
        old = without_old_names(merged.folder, folder / f"{kind}-old")
        for path in (merged.folder, old):
            asked[str(path)] = {"tokens": [prompt + answer for prompt, answer in answers]}
        found.append(
            (
                kind,
                "transformers",
                "transformers 4.57.6, merged",
                "",
                (str(old), answers),
                (str(merged.folder), answers),
            )
        )
        whole = hand_over(
            adapter, folder / f"{kind}-whole", target="gguf", base=base, prompts=prompts, merge=True, quantization=form
        )
        by_llama = agreed(llama(whole.folder / MODEL_GGUF, None, answers), answers)
        found.append((kind, "gguf, ollama", f"llama.cpp, merged, {form}", "", "", by_llama))
        for target in ("gguf", "ollama", "vllm", "mlx"):
            try:
                check_rules(config, target, where="")
            except UserError as error:
                found.append((kind, target, "rule", "", "", f"refused: {error.what.split(' with ')[1].split(',')[0]}"))
                continue
            done = hand_over(adapter, folder / f"{kind}-{target}", target=target, base=base, prompts=prompts)
            if target == "gguf":
                weak = as_llama_scales(adapter, config, base, folder / f"{kind}-weak.gguf")
                before = agreed(llama(base_gguf, weak, answers), answers)
                after = agreed(llama(base_gguf, done.folder / ADAPTER_GGUF, answers), answers)
                found.append((kind, target, "llama.cpp, base and adapter, f32", "", before, after))
                continue
            share = f"read back: {done.agreement.same_answers} of {done.agreement.prompts}"
            rule = f"rules of {program(target)}" + (
                f", --max-lora-rank {vllm_rank(config)}" if target == "vllm" else ""
            )
            found.append((kind, target, rule, "", "", share))
    by_four = read_with_transformers(asked)
    return [
        (model, kind, target, what, *(_figure(value, by_four) for value in (before, after)))
        for kind, target, what, _, before, after in found
    ]


def _figure(value: Any, by_four: dict[str, Any]) -> str:
    if isinstance(value, str):
        return value
    folder, answers = value
    return agreed(by_four[folder]["likeliest"], answers)


def ask(adapter: Path, base: Any) -> Answers:
    """What `trietune predict` answers: the same model, prompts and decoding, as token ids."""
    opened = open_model(adapter, {"device": "cpu", "dtype": "float32"}, Tracker())
    encoder = opened.encoder()
    form = encoder.prompt_format
    texts = [list(prompt) for prompt in prompts(load_tokenizer(base.path), form)]
    positions = opened.prove_for(max(map(len, texts)) + NEW_TOKENS)
    stops = frozenset(form.stop_ids)
    limits = GenerationLimits(stops, NEW_TOKENS, positions, 20)
    answers = [list(map(int, answer)) for answer in generate(opened.model, texts, limits, check_stop=lambda: None)]
    return [
        (prompt, answer if len(answer) == NEW_TOKENS else [*answer, form.stop_ids[0]])
        for prompt, answer in zip(texts, answers, strict=True)
    ]


def likeliest(network: Any, answers: Answers) -> list[list[int]]:
    network.train(False)
    return [row.tolist() for row in likeliest_tokens(network, [prompt + answer for prompt, answer in answers])]


def agreed(found: Sequence[Sequence[int]], answers: Answers) -> str:
    """ "20 of 20": answers all of whose tokens the program finds the likeliest."""
    same = sum(
        list(row[len(prompt) - 1 : len(prompt) - 1 + len(answer)]) == answer
        for row, (prompt, answer) in zip(found, answers, strict=True)
    )
    return f"{same} of {len(answers)}"


def llama(model: Path, adapter: Path | None, answers: Answers) -> list[list[int]]:
    files = [model] if adapter is None else [model, adapter]
    asked = {"tokens": [prompt + answer for prompt, answer in answers], "exact_cache": True}
    return list(read("read_with_llama_cpp.py", files, asked)["likeliest"])


def read_with_transformers(asked: dict[str, Any]) -> dict[str, Any]:
    return read("read_with_transformers.py", [], {"folders": asked})


def read(script: str, files: Sequence[Path], asked: Any) -> dict[str, Any]:
    done = subprocess.run(
        [READER, Path(__file__).with_name(script), *files],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def without_old_names(merged: Path, out: Path) -> Path:
    """The same folder as transformers 5 by itself writes it."""
    out.mkdir()
    for path in merged.iterdir():
        (out / path.name).symlink_to(path)
    config = json.loads((merged / "config.json").read_bytes())
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in OLD_NAMES}))
    return out


def as_llama_scales(adapter: Path, config: LoraConfig, base: Any, file: Path) -> Path:
    """An adapter's GGUF file whose scale is `lora_alpha / r`, whatever `use_rslora` says."""
    tensors = {
        name: raw.to_numpy().astype(np.float32) * (config.lora_alpha / config.r if ".lora_B." in name else 1)
        for name, raw in parse((adapter / "adapter_model.safetensors").read_bytes())[0].items()
    }
    names = names_for(_model_config(base))
    write_gguf_adapter(file, tensors, names, rank=config.r, quantization="f32", title="adapter")
    return file


if __name__ == "__main__":
    main()
