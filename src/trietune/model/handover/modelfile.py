"""Ollama's `Modelfile`: which weights, how text becomes a prompt, where an answer ends.

Ollama's templates are Go's, chat templates are Jinja, and there is no translation of one into the other. But most chat
templates put a fixed text before and behind each message. That text is found by asking the Jinja template about
messages that are easy to recognize; the result is compared with Jinja on other conversations, and where it differs no
template is written and the reason is said.

    TEMPLATE \"\"\"Review: {{ .Prompt }}
    Output:\"\"\"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trietune.data.templates import PromptFormat

Render = Callable[[Sequence[Mapping[str, str]]], str]

_MARK = "\u2045{}\u2046"  # brackets that no template uses
_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi"),),
    (("system", "Be short."), ("user", "Hi")),
    (("user", "Hi"), ("assistant", "Hello!"), ("user", "And\nthen?")),
    (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)


@dataclass(frozen=True, slots=True)
class ChatForm:
    """Fixed texts around messages: `around` by role, `without_system` before the first message if none is a system's,
    `ask` before the answer."""

    around: Mapping[str, tuple[str, str]]
    without_system: str
    ask: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, as the Go template makes it."""
        head = "" if messages[0]["role"] == "system" else self.without_system
        parts = [before + m["content"] + behind for m in messages for before, behind in [self.around[m["role"]]]]
        return head + "".join(parts) + self.ask

    def go_template(self) -> str:
        """The same as Ollama's template."""
        branches = "".join(
            f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}'
            for index, (role, (before, behind)) in enumerate(self.around.items())
        )
        head = ""
        if self.without_system:
            head = '{{ if ne (index .Messages 0).Role "system" }}' + self.without_system + "{{ end }}"
        return f"{head}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.ask}"


def chat_form(render: Render) -> ChatForm | None:
    """The fixed texts of a chat template; None if it is not of that kind.

    Args:
        render: messages to the prompt that asks for the next answer, without the beginning-of-sequence token.
    """
    marked = {role: _MARK.format(role) for role in ("system", "user", "assistant", "again")}

    def message(role: str, mark: str | None = None) -> dict[str, str]:
        return {"role": role, "content": marked[mark or role]}

    try:
        full = render([message("system"), message("user"), message("assistant"), message("user", "again")])
        plain = render([message("user")])
        two = render([message("system"), message("user")])
    except Exception:  # templates refuse conversations with errors of many classes, for example one without a system
        return _without_system_role(render, marked)
    pieces = _split(full, [marked[name] for name in ("system", "user", "assistant", "again")])
    first = _split(two, [marked["system"], marked["user"]])
    alone = _split(plain, [marked["user"]])
    if pieces is None or first is None or alone is None:
        return None
    before_system, to_user, to_assistant, to_again, end = pieces
    # Where one message's closing text ends and the next one's opening begins is told by what all turns share.
    user_open = _common_end(_common_end(to_user, to_again), alone[0])
    behind_user = _common_start(end, to_assistant)
    form = ChatForm(
        around={
            "system": (before_system, to_user[: len(to_user) - len(user_open)]),
            "user": (user_open, behind_user),
            "assistant": (to_assistant[len(behind_user) :], to_again[: len(to_again) - len(user_open)]),
        },
        without_system=alone[0][: len(alone[0]) - len(user_open)],
        ask=end[len(behind_user) :],
    )
    return form if _is_right(form, render, has_system=True) else None


def _without_system_role(render: Render, marked: Mapping[str, str]) -> ChatForm | None:
    """As `chat_form`, for templates that know no system message, such as Gemma's."""
    messages = [
        {"role": "user", "content": marked["user"]},
        {"role": "assistant", "content": marked["assistant"]},
        {"role": "user", "content": marked["again"]},
    ]
    try:
        pieces = _split(render(messages), [marked["user"], marked["assistant"], marked["again"]])
    except Exception:  # as above
        return None
    if pieces is None:
        return None
    user_open, to_assistant, to_again, end = pieces
    behind_user = _common_start(end, to_assistant)
    if not to_again.endswith(user_open):
        return None
    form = ChatForm(
        around={
            "user": (user_open, behind_user),
            "assistant": (to_assistant[len(behind_user) :], to_again[: len(to_again) - len(user_open)]),
        },
        without_system="",
        ask=end[len(behind_user) :],
    )
    return form if _is_right(form, render, has_system=False) else None


def _is_right(form: ChatForm, render: Render, *, has_system: bool) -> bool:
    for probe in _PROBES:
        if not has_system and probe[0][0] == "system":
            continue
        messages = [{"role": role, "content": text} for role, text in probe]
        try:
            if form.render(messages) != render(messages):
                return False
        except Exception:  # a template may refuse any of them
            return False
    return True


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _common_start(one: str, other: str) -> str:
    return _common_end(one[::-1], other[::-1])[::-1]


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-1 - size] == other[-1 - size]:
        size += 1
    return one[len(one) - size :]


def modelfile(
    prompt_format: PromptFormat | None,
    *,
    weights: str,
    adapter: str | None,
    stops: Sequence[str],
    form: ChatForm | None,
    notes: Sequence[str],
) -> str:
    """The text of a Modelfile.

    Args:
        weights: what stands behind FROM.
        adapter: what stands behind ADAPTER; None for a merged model.
        stops: texts that end an answer.
        form: how a chat is written; None leaves Ollama to choose by the chat template inside the weights.
        notes: comments at the top.
    """
    lines = [f"# {note}" for note in notes]
    lines.append(f"FROM {weights}")
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if (template := _template(prompt_format, form)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append("PARAMETER temperature 0")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _template(prompt_format: PromptFormat | None, form: ChatForm | None) -> str | None:
    if form is not None:
        return form.go_template()
    if prompt_format is None or prompt_format.kind == "chat":
        return None
    columns = prompt_format.columns
    if prompt_format.kind == "template" and len(columns) == 1 and not prompt_format.optional_columns:
        before, behind = (
            part.replace("{{", "{").replace("}}", "}")
            for part in prompt_format.prompt_template.split("{" + columns[0] + "}", 1)
        )
        return f"{before}{{{{ .Prompt }}}}{behind}"
    # Several columns: whoever asks writes the whole prompt.
    return "{{ .Prompt }}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
