"""A conversation at the terminal: `trietune predict RUN` without a text."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trietune.cli.printing import say
from trietune.errors import UserError

if TYPE_CHECKING:
    from trietune.data.examples import Message
    from trietune.evaluation.sampling import Sampling
    from trietune.run.loaded import LoadedModel

_HELP = {
    "/system [TEXT]": "show or replace the system prompt (`/system none`: without one); begins anew",
    "/new": "forget the conversation and begin anew",
    "/temperature T": "draw at this temperature; 0 takes the likeliest token",
    "/top-p P": "draw from the likeliest tokens that make up this share",
    "/help": "this list",
    "/exit": "end; so does Ctrl-D. Ctrl-C ends an answer",
}
_OF_CONVERSATIONS = ("/system", "/new")
_SAME = {
    "/?": "/help",
    "/quit": "/exit",
    "/bye": "/exit",
    "/q": "/exit",
    "/clear": "/new",
    "/reset": "/new",
    "/h": "/help",
}


@dataclass(slots=True)
class Chat:
    """A conversation under way. Models that were not trained on conversations answer one text at a time."""

    opened: LoadedModel
    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    messages: list[Message] = field(default_factory=list)
    answer_line: Callable[[Mapping[str, Any]], str] = lambda record: str(record["text"])

    @property
    def is_conversation(self) -> bool:
        return self.opened.encoder().prompt_format.kind == "chat"

    @property
    def system_prompt(self) -> str:
        return self.opened.encoder().prompt_format.system_prompt

    @property
    def sampling(self) -> Sampling | None:
        from trietune.evaluation.sampling import make_sampling

        return make_sampling(self.temperature, self.top_p)

    def run(self) -> None:
        """Ask and answer until the end of input."""
        # With it, `input` edits lines and remembers them; not every Python has it.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        to_stderr = functools.partial(say, err=True)
        to_stderr(f"{self.opened.name}: write a line; `/help` lists commands, Ctrl-D ends")
        if self.system_prompt:
            to_stderr(f"system prompt: {self.system_prompt}")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                to_stderr("")
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(line):
                        return
                elif line:
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except UserError as error:
                to_stderr(str(error))
            except KeyboardInterrupt:
                to_stderr("\n(stopped; the question and its answer are forgotten)")

    def _command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False ends the conversation."""
        name, _, rest = line.partition(" ")
        name, rest = _SAME.get(name.lower(), name.lower()), rest.strip()
        known = [command for command in _HELP if self.is_conversation or not command.startswith(_OF_CONVERSATIONS)]
        if name == "/exit":
            return False
        if name == "/help":
            for command in known:
                say(f"{command:<16}{_HELP[command]}", err=True)
        elif name == "/new" and self.is_conversation:
            self.messages = []
        elif name == "/system" and self.is_conversation:
            if rest:
                self.opened = self.opened.with_system_prompt("" if rest.lower() == "none" else rest)
                self.messages = []
            say(f"system prompt: {self.system_prompt or 'none'}", err=True)
        elif name in ("/temperature", "/top-p"):
            self._set_sampling("temperature" if name == "/temperature" else "top_p", rest)
        else:
            say(f"there is no command `{name}`: `/help` lists them; `/{line}` asks this line", err=True)
        return True

    def _set_sampling(self, name: str, text: str) -> None:
        from trietune.evaluation.sampling import make_sampling

        try:
            value = float(text)
        except ValueError:
            say(f"`{text}` is not a number", err=True)
            return
        temperature, top_p = (value, self.top_p) if name == "temperature" else (self.temperature, value)
        sampling = make_sampling(temperature, top_p)
        self.temperature, self.top_p = temperature, top_p
        how = (
            "the likeliest token"
            if sampling is None
            else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        )
        say(f"from here on: {how}", err=True)

    def _answer(self, line: str) -> None:
        from trietune.data.examples import Message
        from trietune.evaluation.predict import answer_turn, prompt_length
        from trietune.run.opened import predict

        if not self.is_conversation:
            records = predict(self.opened, [line], max_new_tokens=self.max_new_tokens, sampling=self.sampling)
            say(self.answer_line(records[0]))
            return
        encoder = self.opened.encoder()
        messages = [*self.messages, Message("user", line)]
        turn = answer_turn(
            self.opened.model,
            encoder,
            messages,
            max_positions=self.opened.prove_for(prompt_length(encoder, messages) + self.max_new_tokens),
            max_new_tokens=self.max_new_tokens,
            on_text=lambda piece: say(piece, nl=False),
            sampling=self.sampling,
        )
        say("")
        self.messages = [*messages, turn]
