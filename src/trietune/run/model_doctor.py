"""`trietune doctor MODEL`: how a model would train, told from its configuration; no weight is fetched.

config.json --> without weights: sizes, what carries adapters
            --> a random network of its layers, one of each kind --> the proof of a run, on a trie and padded
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trietune.config import load_config
from trietune.device.choose import choose_device
from trietune.device.doctor import Examination, Finding
from trietune.device.memory import bytes_per_position
from trietune.errors import UserError
from trietune.io.places import expand
from trietune.model.adapter.adapter import add_adapter
from trietune.model.assemble import assemble
from trietune.model.base.few_layers import random_network
from trietune.model.base.folder import ModelFolder
from trietune.model.base.hub import fetch_config
from trietune.model.base.load import quiet_library
from trietune.model.base.locate import is_hub_id, locate_model
from trietune.model.base.randomness import silence_rates
from trietune.model.base.shape import NetworkShape, describe_network
from trietune.model.proof import Proof, prove, random_forests
from trietune.model.proof.ladder import BY_ROWS, UNDER_A_MASK
from trietune.model.states import carries_states
from trietune.run.describing import adapter_arguments, uncovered
from trietune.run.planning import BYTES_PER_TRAINED_PARAMETER

# Rows of this many tokens exceed every window of the small network.
LONGEST = 48


def examine_model(
    name: str, overrides: Sequence[str] = (), *, report: Callable[[str], None] = lambda text: None
) -> Examination:
    """Say of one model how it trains, what carries adapters, and what it takes.

    Args:
        name: as `model_name`: a folder, whose weights need not be there, a hub id, of which `config.json` alone is
            fetched, or a GGUF file.
        overrides: of settings, such as `lora_r=32`.
        report: gets what should be read at once.

    Raises:
        UserError: there is no such model, it is not one that generates text, or the settings are wrong.
    """
    settings = load_config(None, [f"model_name={name}", *overrides])
    with tempfile.TemporaryDirectory() as kept:
        base = _config_of(name, Path(kept), report)

        dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        with quiet_library():
            shape = describe_network(
                base, dtype=dtype, adapter=adapter_arguments(settings), base_dropout=settings.base_dropout
            )
        findings = [
            Finding("model", f"{name}: `{shape.config.model_type}`, {shape.num_parameters / 1e6:,.0f} M parameters"),
            *_ways(base, shape, settings),
            *_limits(shape),
            *_adapters(shape, settings),
            _memory(shape, dtype),
        ]
    return Examination(tuple(findings))


def _config_of(name: str, kept: Path, report: Callable[[str], None]) -> ModelFolder:
    """A folder that holds at least the model's `config.json`."""

    place = expand(name)
    if (place / "config.json").is_file() and not (place / "adapter_config.json").is_file():
        data, source = (place / "config.json").read_bytes(), "folder"
    elif not place.exists() and is_hub_id(name):
        repo, _, revision = name.partition("@")
        data, source = fetch_config(repo, revision or None), "hub"
    else:
        return locate_model(name, report=report)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{name}`: its config.json is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("model_type"), str):
        raise UserError(
            f"`{name}`: its config.json names no `model_type`, so it is not clear what model it is",
            next_step="take config.json from the page that the weights come from",
        )
    (kept / "config.json").write_bytes(data)
    return ModelFolder(path=kept, name=name, source="hub" if source == "hub" else "folder")


def _ways(base: ModelFolder, shape: NetworkShape, settings: object) -> list[Finding]:
    """On a trie and, where that is refused, on padded rows: the proof of a run, on a small network of such layers."""
    if shape.refusal is None:
        trie = _try(base, settings, "rows", shape.why_whole_rows)
        if isinstance(trie, tuple):
            return [Finding("trie", f"trains exactly: {trie[0]}"), *(Finding("trie", line, "note") for line in trie[1])]
        said, remedy = trie.what, trie.next_step or ""
    else:
        said, remedy = shape.refusal, ""
    padded = _try(base, settings, None, None)
    if isinstance(padded, tuple):
        remedy = "`--set batching=padded` trains it on plain rows"
        return [Finding("trie", f"refused: {said}", "problem", remedy), Finding("padded", "trains exactly")]
    return [
        Finding("trie", f"refused: {said}", "problem", remedy),
        Finding("padded", f"refused: {padded.what}", "problem"),
    ]


def _try(base: ModelFolder, settings: Any, attention: Any, why: str | None) -> tuple[str, list[str]] | UserError:
    """How it runs and what the proof says, or why it does not."""

    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    try:
        network = random_network(config)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        return UserError(f"a small network of its layers could not be made: {type(error).__name__}: {error}")
    try:
        silence_rates(network)
        add_adapter(network, base=base, **adapter_arguments(settings))
        device = choose_device("cpu", use_tt=False)
        model = assemble(network, device, attention=attention, fused_layers=settings.fused_layers, why_whole_rows=why)
        forests = random_forests(model.vocabulary_size, LONGEST, device=torch.device("cpu"))
        proof = prove(model, *forests, family=str(config.model_type))
    except UserError as error:
        return error
    return _described(model, proof)


def _described(model: Any, proof: Proof) -> tuple[str, list[str]]:

    lines = list(proof.lines[1:])
    if proof.on_whole_rows:
        return "on whole rows, with projections, norms and MLPs once a node", lines
    rung = max(proof.rungs.values())
    how = {BY_ROWS: "attention by rows, some layers unfused", UNDER_A_MASK: "attention under a mask in some layers"}
    text = how.get(rung, "attention by rows, layers fused where they can be")
    if model.attention is not None and carries_states(model.network):
        text += ", states handed on from node to node"
    return text, lines


def _limits(shape: NetworkShape) -> list[Finding]:
    findings = []
    if shape.longest_in_a_trie is not None:
        findings.append(
            Finding(
                "length", f"tries take rows of up to {shape.longest_in_a_trie:,} tokens: beyond, angles change", "note"
            )
        )
    most = getattr(shape.config, "max_position_embeddings", None)
    if isinstance(most, int):
        learnt = ", and there is no vector for a later one" if shape.has_learnt_positions else ""
        findings.append(Finding("positions", f"made for up to {most:,}{learnt}"))
    if shape.base_rates:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in shape.base_rates.items())
        findings.append(Finding("dropout", f"the base model's own is off in training: {rates}"))
    return findings


def _adapters(shape: NetworkShape, settings: Any) -> list[Finding]:
    text = f"{shape.num_trainable:,} parameters on {shape.coverage.share:.0%} of the layers' weights"
    notes = [Finding("adapter", sentence, "note") for sentence in uncovered(settings, shape.coverage)]
    return [Finding("adapter", f"rank {settings.lora_r}: {text}"), *notes]


def _memory(shape: NetworkShape, dtype: Any) -> Finding:

    position = bytes_per_position(
        shape.config, dtype, widths=shape.widths, is_fused=shape.why_whole_rows is None and shape.refusal is None
    )
    weights = shape.num_bytes(dtype)
    trained = BYTES_PER_TRAINED_PARAMETER * shape.num_trainable
    return Finding(
        "memory",
        f"{weights / 1e9:.2f} GB for its weights in {str(dtype).removeprefix('torch.')}, {trained / 1e9:.2f} GB for "
        f"the adapter and its optimizer, about {position / 1e6:.2f} MB for each token of a micro-batch",
    )
