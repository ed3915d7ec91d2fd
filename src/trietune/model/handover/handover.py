"""`trietune export --to TARGET`: a folder that the program of that name takes, proved before it is called done.

gguf           adapter.gguf or model.gguf, for llama.cpp, LM Studio and whatever else reads GGUF
ollama         the same and a Modelfile
vllm           the adapter as PEFT's folder, or a merged model
mlx            adapters.safetensors in mlx-lm's own form, or a merged model
transformers   the adapter as PEFT's folder, or a merged model
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from trietune.data.encoder import adds_bos, load_tokenizer, make_encoder
from trietune.data.examples import Message
from trietune.data.templates import PromptFormat
from trietune.errors import UserError
from trietune.io.places import expand
from trietune.io.safetensors import RawTensor, from_numpy, parse, serialize
from trietune.io.whole_folder import whole_folder
from trietune.model.adapter.adapter import load_adapter_files
from trietune.model.adapter.config import CONFIG_FILE, parse_config
from trietune.model.adapter.export import export_adapter, find_adapter, fold_scale
from trietune.model.adapter.folder import (
    MAX_TEXT_BYTES,
    PROMPT_FILE,
    WEIGHTS_FILE,
    read_adapter,
    read_listed,
    read_plain_file,
)
from trietune.model.base.folder import ModelFolder
from trietune.model.base.load import load_network, quiet_library
from trietune.model.handover.gguf_files import (
    Quantization,
    Vocabulary,
    adapted_part,
    read_back,
    write_adapter,
    write_model,
)
from trietune.model.handover.gguf_names import GgufNames, names_for
from trietune.model.handover.gguf_tokenizer import read_gguf_tokenizer
from trietune.model.handover.mlx import ADAPTER_FILE, mlx_files
from trietune.model.handover.modelfile import chat_form, modelfile
from trietune.model.handover.rules import Target, check_rules, needs_folding, program, vllm_rank
from trietune.model.handover.verify import (
    Agreement,
    Reference,
    agreement,
    check_agreement,
    check_tensors,
    likeliest_tokens,
    make_reference,
)

Report = Callable[[str], None]
Prompts = Callable[[Any, PromptFormat | None], Sequence[Sequence[int]]]

MODEL_GGUF, ADAPTER_GGUF, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"
# Relative error by norm of a tensor in each format: bf16 keeps 8 bits, f16 11, and a block of q8_0 about 8.
_TENSOR_TOLERANCES = {"f32": 1e-6, "bf16": 4e-3, "f16": 1e-3, "q8_0": 1e-2, "q4_k_m": 0.2}


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What was written and how it was proved.

    Attributes:
        agreement: how what was read back agrees with base and adapter in fp32.
        floor: the same for base and adapter in bf16 against themselves in fp32.
        commands: to use it, for a shell.
        notes: what a user must know, in whole sentences.
    """

    folder: Path
    num_bytes: int
    agreement: Agreement
    floor: Agreement
    commands: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=list)


def hand_over(
    adapter: Path,
    out: Path,
    *,
    target: Target,
    base: ModelFolder,
    prompts: Prompts,
    merge: bool = False,
    quantization: Quantization | None = None,
    report: Report = lambda text: None,
) -> HandedOver:
    """Write `adapter` for `target` to the new folder `out`, whole, proved, or not at all.

    Args:
        adapter: an adapter's folder or a run's.
        prompts: gives the token ids of prompts to prove it with, from the tokenizer and the prompt format.
        merge: a whole model instead of an adapter.
        quantization: number format of a GGUF file; by default f16 for a model and f32 for an adapter.

    Raises:
        UserError: what the program does not take, `out` is taken, or an export that answers otherwise.
    """
    folder = find_adapter(adapter)
    files = read_adapter(folder, read_listed(folder))
    config = parse_config(files[CONFIG_FILE], where=str(folder / CONFIG_FILE))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`{out}` exists already", next_step="choose another name, or remove it first")
    if quantization is not None and target not in ("gguf", "ollama"):
        raise UserError(
            f"`--quantize {quantization}` applies to GGUF files, which {program(target)} does not read",
            next_step="--to gguf, or leave it out",
        )
    if not merge:
        check_rules(config, target, where=str(folder / CONFIG_FILE))
    model_config = _model_config(base)
    names = names_for(model_config) if target in ("gguf", "ollama") else None
    tokenizer = load_tokenizer(base.path)
    prompt_format = _prompt_format(folder)
    # Fails before anything slow.
    vocabulary = _vocabulary(base, model_config, tokenizer, prompt_format) if names and merge else None
    asked = prompts(tokenizer, prompt_format)
    with whole_folder(out) as staging:
        job = _Job(folder, files, base, target, out.name, names, model_config, vocabulary, prompt_format, report)
        if merge:
            kept, form = _merged(job, staging, quantization or "f16")
        else:
            kept, form = _apart(job, staging, quantization or "f32")
        reference = _reference(job, asked)
        found = agreement(reference.likeliest, likeliest_tokens(kept(), reference.prompts))
        check_agreement(found, reference, number_format=form, what=f"the export for {program(target)}")
        notes = [*(names.notes if names else ()), *_bos_notes(tokenizer, prompt_format, job)]
        if target == "ollama":
            _write_modelfile(job, staging, tokenizer, merge=merge, notes=notes)
        num_bytes = sum(path.stat().st_size for path in staging.iterdir())
    commands = _commands(job, out, vllm_rank(config) if target == "vllm" and not merge else None, merge=merge)
    return HandedOver(out, num_bytes, found, reference.floor, commands, notes)


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    files: Mapping[str, bytes]
    base: ModelFolder
    target: Target
    title: str
    names: GgufNames | None
    model_config: Mapping[str, Any]
    vocabulary: Vocabulary | None
    prompt_format: PromptFormat | None
    report: Report


def _apart(job: _Job, staging: Path, quantization: Quantization) -> tuple[Callable[[], object], str]:
    """Write the adapter; returns what loads it from what was written, and its number format."""
    config = parse_config(job.files[CONFIG_FILE], where=str(job.folder / CONFIG_FILE))
    files = dict(job.files)
    if needs_folding(config, job.target):
        files = fold_scale(files, where=str(job.folder))
        config = parse_config(files[CONFIG_FILE], where=CONFIG_FILE)
    tensors = {name: raw.to_numpy().astype(np.float32) for name, raw in parse(files[WEIGHTS_FILE])[0].items()}
    form = "f32"
    if job.target in ("gguf", "ollama"):
        assert job.names is not None
        form = "f16" if quantization in ("q8_0", "q4_k_m") else quantization
        file = staging / ADAPTER_GGUF
        write_adapter(file, tensors, job.names, rank=config.r, quantization=quantization, title=job.title)
        read = _adapter_of_gguf(read_back(file), tensors, job.names)
        check_tensors(read, tensors, tolerance=_TENSOR_TOLERANCES[form], what=ADAPTER_GGUF)
        tensors = read
    elif job.target == "mlx":
        layers = int(job.model_config["num_hidden_layers"])
        for name, data in mlx_files(config, tensors, num_layers=layers).items():
            (staging / name).write_bytes(data)
        read = _adapter_of_mlx((staging / ADAPTER_FILE).read_bytes(), tensors)
        check_tensors(read, tensors, tolerance=0.0, what=ADAPTER_FILE)
    else:
        export_adapter(job.folder, staging / "adapter", base=job.base)
        for path in (staging / "adapter").iterdir():
            path.rename(staging / path.name)
        (staging / "adapter").rmdir()
        files = read_adapter(staging)
        tensors = {name: raw.to_numpy().astype(np.float32) for name, raw in parse(files[WEIGHTS_FILE])[0].items()}
    for name in ("prompt_format.json",):
        if (job.folder / name).is_file() and not (staging / name).exists():
            shutil.copyfile(job.folder / name, staging / name)

    def load() -> object:
        weights = serialize({name: from_numpy(values) for name, values in tensors.items()})
        network = load_network(job.base, dtype=torch.float32, device=torch.device("cpu"), report=job.report)
        return load_adapter_files(network, {**files, WEIGHTS_FILE: weights}, where=str(staging))

    return load, form


def _merged(job: _Job, staging: Path, quantization: Quantization) -> tuple[Callable[[], object], str]:
    """Write the whole model; returns what loads it from what was written, and its number format."""
    merged = staging / "merged"
    export_adapter(job.folder, merged, merge=True, base=job.base, report=job.report)
    if job.target not in ("gguf", "ollama"):
        for path in merged.iterdir():
            path.rename(staging / path.name)
        merged.rmdir()
        dtype = str(json.loads((staging / "config.json").read_bytes())["dtype"])
        form = {"bfloat16": "bf16", "float16": "f16"}.get(dtype, "float32")

        def load_folder() -> object:
            with quiet_library():
                network = AutoModelForCausalLM.from_pretrained(
                    staging, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
                )
            network.train(False)
            return network

        return load_folder, form
    assert job.names is not None
    assert job.vocabulary is not None
    file = staging / MODEL_GGUF
    tied = bool(job.model_config.get("tie_word_embeddings"))
    write_model(
        file,
        _merged_tensors(merged, without_head=tied),
        job.names,
        job.model_config,
        job.vocabulary,
        quantization=quantization,
        title=job.title,
    )
    shutil.rmtree(merged)
    names = job.names

    def load_gguf() -> object:
        written = read_back(file)
        network = load_network(job.base, dtype=torch.float32, device=torch.device("cpu"), report=job.report)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if tied and name == "lm_head.weight":
                    continue
                values = names.restored(name, written.pop(names.name(name)))
                parameter.copy_(torch.from_numpy(np.array(values)))
        written.pop("rope_freqs.weight", None)
        if written:
            raise UserError(f"{MODEL_GGUF} holds {len(written)} extra tensors, the first is `{min(written)}`")
        return network

    return load_gguf, quantization


def _merged_tensors(folder: Path, *, without_head: bool) -> Iterator[tuple[str, np.ndarray]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not (without_head and name == "lm_head.weight"):
                    yield name, opened.get_tensor(name).float().numpy()


def _reference(job: _Job, prompts: Sequence[Sequence[int]]) -> Reference:
    network = load_network(job.base, dtype=torch.float32, device=torch.device("cpu"), report=job.report)
    return make_reference(load_adapter_files(network, job.files, where=str(job.folder)), prompts)


def _adapter_of_gguf(
    written: Mapping[str, np.ndarray], meant: Mapping[str, np.ndarray], names: GgufNames
) -> dict[str, np.ndarray]:
    """The tensors of an adapter's GGUF file under PEFT's names, in PEFT's order of rows."""
    found, left = {}, dict(written)
    for name in meant:
        base_name, part = adapted_part(name)
        values = left.pop(f"{names.name(base_name)}.{part}", None)
        if values is not None:
            found[name] = names.restored(base_name, values) if part == "lora_b" else values
    return found | left


def _adapter_of_mlx(data: bytes, meant: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    left: dict[str, RawTensor] = dict(parse(data)[0])
    found = {}
    for name in meant:
        base_name, part = adapted_part(name)
        found[name] = left.pop(f"{base_name.removesuffix('.weight')}.{part}").to_numpy().T
    return found | {name: raw.to_numpy() for name, raw in left.items()}


def _model_config(base: ModelFolder) -> dict[str, object]:
    """The base's configuration with `rope_parameters`, as the installed transformers reads it."""
    with quiet_library():
        content: dict[str, object] = (
            AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
            .get_text_config()
            .to_dict()
        )
    return content


def _prompt_format(folder: Path) -> PromptFormat | None:
    if not os.path.lexists(folder / PROMPT_FILE):
        return None
    data = read_plain_file(folder, PROMPT_FILE, max_bytes=MAX_TEXT_BYTES, listed=read_listed(folder))
    return PromptFormat.from_json(data.decode("utf-8", "replace"), where=str(folder / PROMPT_FILE))


def _vocabulary(
    base: ModelFolder, config: Mapping[str, Any], tokenizer: Any, prompt_format: PromptFormat | None
) -> Vocabulary:
    size = int(config["vocab_size"])
    bos_id = tokenizer.bos_token_id
    template = prompt_format.chat_template if prompt_format is not None else ""
    if not template and prompt_format is None and isinstance(tokenizer.chat_template, str):
        template = tokenizer.chat_template
    return Vocabulary(
        tokenizer=read_gguf_tokenizer(base.path, vocabulary_size=size),
        bos_id=bos_id,
        eos_id=tokenizer.eos_token_id,
        stop_ids=prompt_format.stop_ids if prompt_format is not None else (tokenizer.eos_token_id,),
        # What training put before every text, the file puts there too, whatever the tokenizer's own habit is.
        adds_bos=prompt_format.bos_id is not None if prompt_format is not None else adds_bos(tokenizer),
        chat_template=template,
    )


def _bos_notes(tokenizer: Any, prompt_format: PromptFormat | None, job: _Job) -> list[str]:
    """In plain words, where a server would begin a text in another way than training did."""
    is_added = adds_bos(tokenizer)
    if prompt_format is None or (prompt_format.bos_id is not None) is is_added:
        return []
    token = tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id)
    if is_added:
        if job.vocabulary is not None:
            return [f"No text began with `{token}` in training; this file keeps llama.cpp from adding it."]
        return [
            f"No text began with `{token}` in training, and this tokenizer adds it: "
            "ask it for none (`add_special_tokens=False`). With it, some answers differ."
        ]
    if job.vocabulary is not None:
        return [f"Every text began with `{token}` in training; this file makes llama.cpp add it, so do not write it."]
    return [
        f"Every text began with `{token}` in training, and this tokenizer does not add it: "
        f"begin plain prompts with `{token}`. Without it, some answers differ."
    ]


def _write_modelfile(job: _Job, staging: Path, tokenizer: Any, *, merge: bool, notes: Sequence[str]) -> None:
    stop_ids = job.prompt_format.stop_ids if job.prompt_format is not None else (tokenizer.eos_token_id,)
    form, comments = None, list(notes)
    if job.prompt_format is not None and job.prompt_format.kind == "chat":
        encoder = make_encoder(tokenizer, job.prompt_format)
        bos = "" if job.prompt_format.bos_id is None else tokenizer.convert_ids_to_tokens(job.prompt_format.bos_id)

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            turns = [Message(message["role"], message["content"]) for message in messages]
            text = "".join(piece for piece, _ in encoder._turns(turns, add_generation_prompt=True))
            return text.removeprefix(bos)

        form = chat_form(render)
        if form is None:
            comments.append("The chat template does more than put texts around messages, so Ollama chooses one itself.")
    weights = f"./{MODEL_GGUF}" if merge else _base_for_ollama(job.base)
    text = modelfile(
        job.prompt_format,
        weights=weights,
        adapter=None if merge else f"./{ADAPTER_GGUF}",
        stops=[str(tokenizer.convert_ids_to_tokens(number)) for number in stop_ids],
        form=form,
        notes=comments,
    )
    (staging / MODELFILE).write_text(text, encoding="utf-8")


def _base_for_ollama(base: ModelFolder) -> str:
    if base.source == "gguf" and Path(base.name).suffix == ".gguf":
        return str(expand(base.name).resolve())
    return str(base.path.resolve())


def _commands(job: _Job, out: Path, rank: int | None, *, merge: bool) -> list[str]:
    match job.target, merge:
        case "transformers", True:
            return [f"AutoModelForCausalLM.from_pretrained({str(out)!r})"]
        case "transformers", False:
            return [f"PeftModel.from_pretrained(base, {str(out)!r})"]
        case "vllm", True:
            return [f"vllm serve {out}"]
        case "vllm", False:
            return [f"vllm serve {job.base.name} --enable-lora --max-lora-rank {rank} --lora-modules {out.name}={out}"]
        case "mlx", True:
            return [f"mlx_lm.generate --model {out} --prompt ..."]
        case "mlx", False:
            return [f"mlx_lm.generate --model {job.base.name} --adapter-path {out} --prompt ..."]
        case "gguf", True:
            return [f"llama-cli -m {out / MODEL_GGUF} -p ..."]
        case "gguf", False:
            return [f"llama-cli -m BASE.gguf --lora {out / ADAPTER_GGUF} -p ..."]
        case _:
            return [f"cd {out} && ollama create {out.name} -f {MODELFILE}", f"ollama run {out.name}"]
