"""Which prompts prove a hand-over: the run's own validation examples, or shipped ones for an adapter without a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config import load_config
from trietune.data import make_encoder
from trietune.data.examples import Example, Message
from trietune.data.load import load_parts
from trietune.data.prompt_formats import make_plain_format
from trietune.data.several import form_of
from trietune.data.templates import fill_template
from trietune.demo import demo_reviews
from trietune.errors import UserError
from trietune.io.cache_folder import cache_folder
from trietune.model.adapter.export import base_name_of, find_adapter
from trietune.model.handover.handover import hand_over
from trietune.run.opening import locate_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from trietune.data.templates import PromptFormat
    from trietune.model.handover.gguf_files import Quantization
    from trietune.model.handover.handover import HandedOver
    from trietune.model.handover.rules import Target
    from trietune.tracking.tracker import Tracker

NUM_PROMPTS = 20
# Longer ones are cut: they prove nothing more, and two models in fp32 read each.
LONGEST_PROMPT = 512


def export_to(
    source: Path,
    out: Path,
    tracker: Tracker,
    *,
    target: Target,
    merge: bool = False,
    quantization: Quantization | None = None,
) -> HandedOver:
    """Export a run's or an adapter's folder for the program of `target`; see `trietune.model.handover.handover`.

    Raises:
        UserError: what the program does not take, `out` is taken, or an export that answers otherwise.
    """

    def prompts(tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat | None) -> Sequence[Sequence[int]]:
        found = _of_the_run(source, tokenizer, prompt_format, tracker)
        if not found:
            tracker.info(
                f"no run with validation examples here: {NUM_PROMPTS} built-in sentences check the export instead"
            )
            found = shipped_prompts(tokenizer, prompt_format)
        return [prompt[-LONGEST_PROMPT:] for prompt in found]

    base = locate_base(base_name_of(find_adapter(source)), tracker)
    return hand_over(
        source,
        out,
        target=target,
        base=base,
        prompts=prompts,
        merge=merge,
        quantization=quantization,
        report=tracker.info,
    )


def _of_the_run(
    source: Path, tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat | None, tracker: Tracker
) -> Sequence[Sequence[int]]:
    """Prompts of the run's first validation examples; none for an adapter without a run, or if its data has moved."""
    if prompt_format is None or not (source / "config.yaml").is_file():
        return ()
    try:
        parts = load_parts(
            load_config(source / "config.yaml", ()),
            tokenizer,
            "validation",
            prompt_format=prompt_format,
            cache_folder=cache_folder() / "data",
            report=tracker.info,
            progress=lambda phase, done, total: None,
            check_stop=lambda: None,
        )
    except UserError as error:
        tracker.warn(f"the run's validation data cannot be read ({error.what})")
        return ()
    encoder = make_encoder(tokenizer, prompt_format)
    own = form_of(prompt_format)
    alike = [one.sequences for one in parts if len(parts) == 1 or form_of(one.prompt_format) == own]
    examples = [sequences.examples[index] for sequences in alike for index in range(min(NUM_PROMPTS, len(sequences)))]
    return [encoder.encode_prompt(example) for example in examples[:NUM_PROMPTS]]


def shipped_prompts(tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat | None) -> list[list[int]]:
    """Twenty sentences that come with TrieTune, in the adapter's prompt format or as they are."""
    lines = (demo_reviews() / "dev.tsv").read_text("utf-8").splitlines()[1 : NUM_PROMPTS + 1]
    sentences = [line.split("\t")[0].strip() for line in lines]
    used = prompt_format or make_plain_format(tokenizer)
    encoder = make_encoder(tokenizer, used)
    found = []
    for sentence in sentences:
        if used.kind == "chat":
            example = Example(id="", prompt="", completion="", messages=(Message("user", sentence),))
        else:
            columns = used.columns
            text = fill_template(used.prompt_template, dict.fromkeys(columns, sentence)) if columns else sentence
            example = Example(id="", prompt=text, completion="")
        found.append(encoder.encode_prompt(example))
    return found
