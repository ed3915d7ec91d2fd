"""Forms of data that are known by the names of their columns, each with the templates that it is read by.

instruction, input, output        Alpaca; `input` may be missing or empty
question, answer                  with `context` before them, if there is one
query, response                   and `input`, `output`; and `prompt`, `response`
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownForm:
    """Columns by which a form is known, those that it may have besides, and its templates."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    prompt_template: str
    completion_template: str


# The words of Stanford Alpaca, with and without an input.
_ALPACA = (
    "Below is an instruction that describes a task{#INPUT}, paired with an input that provides further context{/INPUT}"
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "{#INPUT}### Input:\n{INPUT}\n\n{/INPUT}### Response:\n"
)


def _alpaca(name: str, extra: str, answer: str) -> KnownForm:
    template = _ALPACA.replace("INPUT", extra)
    return KnownForm(name, ("instruction", answer), (extra,), template, f"{{{answer}}}")


KNOWN_FORMS = (
    _alpaca("Alpaca", "input", "output"),
    _alpaca("Dolly", "context", "response"),
    KnownForm(
        "questions and answers",
        ("question", "answer"),
        ("context",),
        "{#context}Context: {context}\n\n{/context}Question: {question}\nAnswer:",
        " {answer}",
    ),
    KnownForm("queries and responses", ("query", "response"), (), "{query}\n", "{response}"),
    KnownForm("prompts and responses", ("prompt", "response"), (), "{prompt}\n", "{response}"),
    KnownForm("inputs and outputs", ("input", "output"), (), "{input}\n", "{output}"),
)


def find_known_form(columns: Collection[str]) -> KnownForm | None:
    """The first form whose columns are all there."""
    return next((form for form in KNOWN_FORMS if set(form.required) <= set(columns)), None)
