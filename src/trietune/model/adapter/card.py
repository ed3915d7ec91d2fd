"""The README.md of an adapter or a merged model: what it is, how good it is, and code that runs as it stands.

The front matter is what the hub indexes: the base model, the library, the license carried on from the base, the data
and the scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from trietune.demo.locations import DEMO_MODEL, INSTALL_MODEL, MODEL_PACKAGE
from trietune.io.metric_names import hub_name
from trietune.model.base.folder import ModelFolder

_PROMPT_LINE = "prompt = "
_LOAD_MERGED = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "import torch",
    "",
    'folder = "."  # where this README lies',
    "model = AutoModelForCausalLM.from_pretrained(folder)",
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "model.eval()",
    "",
)


@dataclass(frozen=True, slots=True)
class Score:
    """One metric on `num_examples` validation examples; `before` is the base model's, where it was measured."""

    name: str
    after: float
    before: float | None = None
    num_examples: int | None = None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says.

    `title` names the adapter. `dataset` names the data for people; `trained_on` are the hub's ids of the training
    data, `measured_on` that of the validation data, none for files of one's own: only then the card claims them.
    `example_prompt` is one whole prompt as the model saw it in training, or (`is_shape`) its shape with names in
    braces; it stands without the beginning-of-sequence token; `bos_id` is put before it, `stop_ids` end an answer.
    `parses_special_tokens`: whether special tokens in the prompt's text are meant. `settings` are shown as a table.
    `is_merged`: the folder holds a whole model and no adapter.
    """

    title: str
    base: ModelFolder
    example_prompt: str
    bos_id: int | None
    stop_ids: Sequence[int]
    parses_special_tokens: bool = False
    is_shape: bool = False
    dataset: str | None = None
    trained_on: Sequence[str] = ()
    measured_on: str | None = None
    num_train_examples: int | None = None
    scores: Sequence[Score] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    is_merged: bool = False


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        f"---\n{_metadata(facts).to_yaml()}\n---",
        f"# {facts.title}",
        _summary(facts),
        _scores(facts.scores),
        f"## Use\n\n{_beginning(facts)}```python\n{usage_code(facts)}```",
        _settings(facts.settings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def usage_code(facts: CardFacts) -> str:
    """Python that loads the model from the card's own folder and answers the example prompt."""
    special = "" if facts.parses_special_tokens else ", split_special_tokens=True"
    bos = f"[{facts.bos_id}] + " if facts.bos_id is not None else ""
    lines = [
        *(_LOAD_MERGED if facts.is_merged else _load_adapter(facts.base)),
        _PROMPT_LINE + repr(facts.example_prompt) + ("  # put your text where braces are" if facts.is_shape else ""),
        f"tokens = {bos}tokenizer(prompt, add_special_tokens=False{special}).input_ids",
        "output = model.generate(",
        "    input_ids=torch.tensor([tokens]),",
        "    attention_mask=torch.ones(1, len(tokens), dtype=torch.long),",
        "    max_new_tokens=64,",
        "    do_sample=False,",
        f"    eos_token_id={list(facts.stop_ids)},",
        f"    pad_token_id={facts.stop_ids[0]},",
        ")",
        "print(tokenizer.decode(output[0, len(tokens):], skip_special_tokens=True))",
    ]
    return "\n".join(lines) + "\n"


def merged_card(card: str) -> str:
    """The card of an adapter, as `model_card` wrote it, turned into that of the merged model.

    A card that somebody rewrote is kept as far as it is theirs: only the lines that load the adapter and the front
    matter's library and tag are exchanged.
    """
    load = re.compile(r"(?<=```python\n).*?(?=^" + re.escape(_PROMPT_LINE) + ")", re.DOTALL | re.MULTILINE)
    card = load.sub(lambda match: "\n".join(_LOAD_MERGED) + "\n", card, count=1)
    card = card.replace("A LoRA adapter for `", "A merged model, made from `", 1)
    head, separator, body = card.partition("\n---\n")
    head = head.replace("library_name: peft", "library_name: transformers").replace("- lora\n", "")
    return head + separator + body


def base_license(base: ModelFolder) -> str | None:
    """The license that the base model's own card names, in the hub's spelling."""
    readme = base.path / "README.md"
    if not readme.is_file():
        return None
    try:
        metadata = metadata_load(readme)
    except Exception:  # a stranger's front matter may be anything; a card without a license is still a card
        return None
    license = metadata.get("license") if isinstance(metadata, dict) else None
    return license if isinstance(license, str) else None


def _metadata(facts: CardFacts) -> ModelCardData:
    measured_on = facts.measured_on
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measured_on,
            dataset_name=measured_on,
            metric_type=known_as,
            metric_value=round(score.after, 6),
        )
        for score in facts.scores
        if measured_on and (known_as := hub_name(score.name))
    ]
    return ModelCardData(
        base_model=facts.base.name if facts.base.source == "hub" else None,
        library_name="transformers" if facts.is_merged else "peft",
        license=base_license(facts.base),
        datasets=list(facts.trained_on) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        pipeline_tag="text-generation",
        tags=["trietune"] if facts.is_merged else ["lora", "trietune"],
        model_name=facts.title if results else None,
        eval_results=results or None,
    )


def _summary(facts: CardFacts) -> str:
    kind = "A merged model, made from" if facts.is_merged else "A LoRA adapter for"
    revision = f", revision `{facts.base.revision}`" if facts.base.revision else ""
    lines = [f"{kind} `{facts.base.name}`{revision}, trained with TrieTune."]
    if facts.dataset:
        count = f" ({facts.num_train_examples:,} examples)" if facts.num_train_examples is not None else ""
        lines.append(f"Data: `{facts.dataset}`{count}.")
    return "\n".join(lines)


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = [
        f"| {score.name} | {_number(score.before)} | {_number(score.after)} | {_count(score)} |" for score in scores
    ]
    return "\n".join(["## Scores", "", "| metric | base model | this model | examples |", "|---|---|---|---|", *rows])


def _beginning(facts: CardFacts) -> str:
    """In plain words, since servers of plain text may leave the token out: their answers then differ."""
    if facts.bos_id is None:
        return ""
    return (
        f"In training every text began with token {facts.bos_id}, the tokenizer's beginning-of-sequence token, once. "
        "Where a tokenizer does not add it\nby itself, plain prompts need it in front; the code below adds it.\n\n"
    )


def _settings(settings: Mapping[str, object]) -> str:
    if not settings:
        return ""
    rows = [f"| `{name}` | `{value}` |" for name, value in settings.items()]
    return "\n".join(["## Settings", "", "| key | value |", "|---|---|", *rows])


def _load_adapter(base: ModelFolder) -> list[str]:
    imports = ["from peft import PeftModel"]
    if base.name == DEMO_MODEL:
        imports = ["from importlib.metadata import files", "", *imports]
    elif base.source == "gguf":
        imports = ["from pathlib import Path", "", *imports]
    names = "AutoModelForCausalLM, AutoTokenizer" + (", GgufConfig" if base.source == "gguf" else "")
    return [
        *imports,
        f"from transformers import {names}",
        "import torch",
        "",
        *_load_base(base),
        'model = PeftModel.from_pretrained(model, ".")  # the folder where this README lies',
        "model.eval()",
        "",
    ]


def _load_base(base: ModelFolder) -> list[str]:
    if base.source == "gguf":
        find = f"gguf = Path({base.name!r})"
        if base.name == DEMO_MODEL:
            find = f'gguf = next(file.locate() for file in files("{MODEL_PACKAGE}") if file.suffix == ".gguf")'
        return [
            *([f"# {INSTALL_MODEL}"] if base.name == DEMO_MODEL else []),
            find,
            'where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}',
            "model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))",
            "tokenizer = AutoTokenizer.from_pretrained(**where)",
        ]
    revision = f", revision={base.revision!r}" if base.revision else ""
    return [
        f"model = AutoModelForCausalLM.from_pretrained({base.name!r}{revision})",
        f"tokenizer = AutoTokenizer.from_pretrained({base.name!r}{revision})",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(score: Score) -> str:
    return "" if score.num_examples is None else f"{score.num_examples:,}"
