"""What is typed where a command belongs and is none: names of other tools, typos, a file; and what to type here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from typer.core import TyperGroup

from trietune.errors import UserError

if TYPE_CHECKING:
    from typer._click.core import Command, Context

_CHAT = "trietune predict {run}     (at a terminal, without a text, it is a conversation)"
_SERVERS = "trietune export {run} OUT --merge --to vllm     (or ollama, gguf, mlx; the last lines say how to start it)"
_INIT = "trietune init     (or `trietune train` for the sample run)"
_LIST = "trietune report {run} --text     (`trietune checkpoints {run}` lists checkpoints)"
_MERGE = "trietune export {run} OUT --merge"
_TRAIN = "trietune train {file}"
_PREDICT = 'trietune predict {run} "a text"     (or --input FILE)'
# {run} and {file} are the first word that follows, or a placeholder.
ANSWERS: Mapping[str, str] = {
    **dict.fromkeys(("chat", "talk", "webchat", "repl", "interactive"), _CHAT),
    **dict.fromkeys(("merge", "merge-lora", "fuse", "merge-and-unload", "merge-adapter"), _MERGE),
    **dict.fromkeys(("serve", "api", "server", "deploy", "vllm"), _SERVERS),
    **dict.fromkeys(("push", "upload", "publish", "push-to-hub"), "trietune export {run} --push OWNER/NAME"),
    **dict.fromkeys(("convert", "quantize", "gguf"), "trietune export {run} OUT --merge --to gguf --quantize q8_0"),
    **dict.fromkeys(("finetune", "fine-tune", "tune", "sft", "lora", "fit", "run", "launch"), _TRAIN),
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "kto", "rank"), "trietune train {file} --objective {name}"),
    **dict.fromkeys(("eval", "test", "benchmark", "score"), "trietune evaluate {run}"),
    **dict.fromkeys(("generate", "inference", "infer", "ask", "complete"), _PREDICT),
    **dict.fromkeys(("preprocess", "prepare", "validate", "plan", "preview"), "trietune train {file} --dry-run"),
    "resume": "trietune train {file} --resume",
    "config": "trietune train {file} --show-config     (`trietune init` writes a file)",
    **dict.fromkeys(("new", "create", "setup", "quickstart", "template"), _INIT),
    **dict.fromkeys(("ls", "list", "status", "runs"), _LIST),
    **dict.fromkeys(("webui", "ui", "studio", "dashboard", "show", "view", "plot"), "trietune report {run} --serve"),
    **dict.fromkeys(("env", "info", "check", "diagnose"), "trietune doctor"),
    "version": "trietune --version",
    "diff": "trietune compare {run} OTHER",
    "login": "hf auth login     (of huggingface_hub; a token may also be in the variable HF_TOKEN)",
}  # fmt: skip


class Commands(TyperGroup):
    """The group of all commands."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        """The command that is meant.

        Raises:
            UserError: there is none of this name; it says what to type.
        """
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            raise unknown_command(name, args[1:], list(self.commands))
        return super().resolve_command(ctx, args)


def unknown_command(name: str, following: Sequence[str], known: Sequence[str]) -> UserError:
    """What to say of a word that is no command."""
    from trietune.config.names import printable

    words = [word for word in following if not word.startswith("-")]
    what = f"there is no command `{printable(name)}`"
    lowered = name.lower().replace("_", "-")
    if lowered == "help":
        command = words[0] if words and words[0] in known else None
        more = "" if command else "     (`trietune COMMAND --help` explains one)"
        return UserError(
            "`help` is an option here", next_step=f"trietune {f'{command} ' if command else ''}--help{more}"
        )
    if lowered.endswith((".yaml", ".yml")):
        return UserError(what, next_step=f"trietune train {printable(name)}")
    if lowered in ANSWERS:
        run = printable(words[0]) if words else "runs/NAME"
        file = printable(words[0]) if words else "FILE.yaml"
        step = ANSWERS[lowered].format(run=run, file=file, name=lowered)
        return UserError(what, next_step=step.replace(" OUT ", f" {printable(words[1])} ") if words[1:] else step)
    near = get_close_matches(lowered, known, n=1, cutoff=0.6)
    if near:
        return UserError(
            what, next_step=f"did you mean `{' '.join(['trietune', near[0], *map(printable, words[:1])])}`?"
        )
    return UserError(what, where=f"commands: {', '.join(known)}", next_step="`trietune --help` explains them")
