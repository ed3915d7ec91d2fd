"""The shape of a prompt: what it always says, with a name in braces in place of each text of the data.

    Review: {sentence}\\nOutput:

A model card is published; the texts that somebody trained on are theirs.
"""

from __future__ import annotations

from dataclasses import replace

from trietune.data.examples import Example, Message
from trietune.data.templates import PromptFormat, fill_template


def without_own_text(prompt_format: PromptFormat, example: Example) -> Example:
    """The example with placeholders for every text that the data brought; a conversation keeps its roles."""
    if prompt_format.kind == "chat":
        messages = tuple(Message(message.role, f"{{{message.role} message}}") for message in example.messages)
        return replace(example, prompt="", completion="", messages=messages, tools="")
    filled = {name: f"{{{name}}}" for name in prompt_format.columns}
    template = prompt_format.prompt_template
    prompt = fill_template(template, filled, prompt_format.template_columns) if template else "{prompt}"
    return Example(id="", prompt=prompt, completion="")
