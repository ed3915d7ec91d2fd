"""What a model card says of an adapter that a run has trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trietune.data.columns import WrongRow
from trietune.data.encoder import Encoder
from trietune.data.shapes import without_own_text
from trietune.model.adapter.card import CardFacts, Score, model_card
from trietune.run.prepared import Prepared

if TYPE_CHECKING:
    from trietune.evaluation.evaluate import Evaluation

# Shown in the model card.
CARD_SETTINGS = (
    "max_length", "learning_rate", "batch_size", "num_epochs", "lora_r", "lora_alpha", "lora_target_modules", "dtype",
    "seed",
)  # fmt: skip


def describe_adapter(
    prepared: Prepared, title: str, before: Evaluation | None, after: Evaluation | None, encoder: Encoder
) -> str:
    """The card, in Markdown.

    Args:
        title: the run's name.
    """
    scores = []
    if after is not None:
        earlier = before.metrics if before is not None else {}
        scores = [Score(n, value, earlier.get(n), after.num_examples) for n, value in after.metrics.items()]
    data, plan = prepared.data, prepared.plan
    prompt_format = data.prompt_format
    sequences = data.validation if data.validation is not None else data.train
    shown = example = sequences.examples[0]
    if not prepared.settings.card_example:
        shown = without_own_text(prompt_format, example)
    try:
        prompt_ids = encoder.encode_prompt(shown)
    except WrongRow:  # a chat template that looks into the texts refuses placeholders
        prompt_ids = encoder.encode_prompt(replace(shown, prompt="{prompt}", messages=()))
    without_bos = prompt_ids[1:] if prompt_ids[:1] == [prompt_format.bos_id] else prompt_ids
    return model_card(
        CardFacts(
            title=title,
            base=prepared.base,
            example_prompt=str(prepared.tokenizer.decode(without_bos)),
            is_shape=not prepared.settings.card_example,
            bos_id=prompt_format.bos_id,
            stop_ids=prompt_format.stop_ids,
            parses_special_tokens=prompt_format.parses_special_tokens,
            dataset=data.source_name,
            trained_on=data.trained_on,
            measured_on=data.measured_on,
            num_train_examples=plan.num_train,
            scores=scores,
            settings={
                **({} if prepared.settings.objective == "sft" else {"objective": prepared.settings.objective}),
                **{key: getattr(prepared.settings, key) for key in CARD_SETTINGS},
            },
        )
    )
