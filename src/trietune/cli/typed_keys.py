"""What is typed for configuration keys, read and listed; `keys.py` says in which forms.

Loads the settings, so commands import it when one of them is asked for.
"""

from __future__ import annotations

import glob
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from trietune.config.allowed import allowed_values, choices
from trietune.config.documentation import groups
from trietune.config.foreign import FOREIGN_NAMES
from trietune.config.load import overrides_of_file
from trietune.config.names import nearest_key, summary
from trietune.config.settings import Settings
from trietune.config.yaml12 import write_value
from trietune.errors import UserError
from trietune.io.places import expand

if TYPE_CHECKING:
    from typer._click.core import Parameter

# Commands whose first word is a YAML file, and those whose words are texts.
TRAINS = ("train", "estimate")
ASKS = ("predict",)
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z][\w-]*)=(?P<value>.*)", re.DOTALL)
_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz)$", re.IGNORECASE)
# Told apart from a hub id by its form where no such file exists: a mistyped path should not go to the hub.
_PATH = re.compile(r"(\.{0,2}/|~)")


def keys_as_set(args: Sequence[str], own: dict[str, int], *, command: str) -> list[str]:
    """The arguments with each key as `--set KEY=VALUE`, in the order in which they were typed.

    Args:
        own: the command's own options, each with the number of values that it takes.
        command: those that take a YAML file also know `--model` and `--data`.

    Raises:
        UserError: an option that is none, or one without its value.
    """
    reader = _Reader(list(args), own, command)
    reader.read()
    # In front: what follows a `--` is no option.
    return [*(part for item in [*reader.first, *reader.overrides] for part in ("--set", item)), *reader.rest]


@dataclass(slots=True)
class _Reader:
    args: list[str]
    own: dict[str, int]
    command: str
    rest: list[str] = field(default_factory=list)
    # Set before all others: what `--data` puts aside unless it is written again.
    first: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    are_files: list[bool] = field(default_factory=list)
    num_positional: int = 0

    def read(self) -> None:
        files = []
        while self.args:
            word = self.args.pop(0)
            if word == "--":
                self.rest += ["--", *self.args]
                break
            if word in ("-c", "--config") or word.startswith("--config="):
                files.append((word.partition("=")[2] or self._value(word), len(self.overrides)))
            elif word == "--set" or word.startswith("--set="):
                self.overrides.append(word.removeprefix("--set=") if "=" in word else self._value(word))
            elif word.startswith("--") and word.partition("=")[0] not in self.own:
                self._read_key(word)
            elif word.startswith("-"):
                self.rest.append(word)
                if self.own.get(word) and self.args:
                    self.rest.append(self.args.pop(0))
            elif (override := self._assignment(word)) is not None:
                self.overrides.append(override)
            else:
                self.rest.append(word)
                self.num_positional += 1
        if self.command in TRAINS and files and not self.num_positional:
            self.rest.insert(0, files.pop(0)[0])
        for file, position in reversed(files):
            self.overrides[position:position] = overrides_of_file(Path(file))

    def _read_key(self, word: str) -> None:
        from trietune.config.settings import Settings

        typed, has_value, value = word[2:].partition("=")
        key = typed.replace("-", "_").lower()
        if self.command in TRAINS and key in ("model", "data"):
            value = value if has_value else self._value(word)
            self._take_data(value) if key == "data" else self.overrides.append(f"model_name={value}")
            return
        positive = key.removeprefix("no_")
        if key not in Settings.model_fields and positive != key and _is_switch(positive):
            if has_value:
                raise UserError(f"`{word}` takes no value", next_step=f"--no-{_dashed(positive)}")
            self.overrides.append(f"{positive}=False")
            return
        if key in Settings.model_fields:
            self.overrides.append(f"{key}={value if has_value else self._value_of(key, word)}")
            return
        if key in FOREIGN_NAMES:
            # `load_config` answers with our name.
            is_value_next = bool(self.args) and not _is_option(self.args[0])
            self.overrides.append(f"{key}={value if has_value else self.args.pop(0) if is_value_next else True}")
            return
        raise self._unknown(typed)

    def _value_of(self, key: str, word: str) -> str:
        following = self.args[0].lower() if self.args else ""
        if _is_switch(key):
            is_word = following in _TRUE | _FALSE
            return str((self.args.pop(0).lower() if is_word else "true") in _TRUE)
        if _takes_words(key) and following in _TRUE | _FALSE:
            return str(self.args.pop(0).lower() in _TRUE)
        if _takes_words(key) and (not self.args or _is_option(self.args[0])):
            return "True"
        value = self._value(word)
        if _takes_names(key):
            # As several other tools write it: `--lora_target_modules q_proj v_proj`.
            while self.args and re.fullmatch(r"[A-Za-z_][\w-]*", self.args[0]) and not Path(self.args[0]).exists():
                value += f",{self.args.pop(0)}"
        return value

    def _value(self, word: str) -> str:
        if not self.args or _is_option(self.args[0]):
            raise UserError(f"`{word}` needs a value", next_step=f"`trietune {self.command} --help` says which")
        return self.args.pop(0)

    def _take_data(self, value: str) -> None:
        """A file that exists, or looks like one, else a data set of the hub; in place of the data of a YAML file."""
        path = expand(value)
        looks_like_one = _DATA_FILE.search(value) or _PATH.match(value)
        is_file = path.exists() or bool(looks_like_one) or any(glob.iglob(str(path)))  # noqa: PTH207
        key, other = ("train_file", "dataset_id") if is_file else ("dataset_id", "train_file")
        self.data.append(value)
        self.are_files.append(is_file)
        self.first += [f"{other}=null", "validation_file=null", "data_shares=null"]
        if len(set(self.are_files)) > 1:
            # Beside a data set of the hub, files are data sets, too.
            key = "dataset_id"
            self.overrides.append("train_file=null")
        self.overrides.append(f"{key}={as_value(self.data)}")

    def _assignment(self, word: str) -> str | None:
        """`KEY=VALUE`; None for other words: a file, or a text to ask."""
        from trietune.config.settings import Settings

        found = _ASSIGNMENT.fullmatch(word)
        if found is None:
            return None
        key = found["key"].replace("-", "_").lower()
        is_key = key in Settings.model_fields or key in FOREIGN_NAMES
        may_be_typo = self.command not in ASKS and not Path(word).exists()
        return f"{key}={found['value']}" if is_key or may_be_typo else None

    def _unknown(self, typed: str) -> UserError:
        name = typed.replace("_", "-").lower()
        near = get_close_matches(f"--{name}", list(self.own), n=1, cutoff=0.75)
        key = nearest_key(name.replace("-", "_"))
        suggestion = near[0] if near else f"--{_dashed(key)}" if key else None
        step = f"did you mean `{suggestion}`?" if suggestion else f"`trietune {self.command} --help` lists them"
        return UserError(f"No such option: `--{typed}`", next_step=step)


def complete_assignment(incomplete: str) -> list[tuple[str, str]]:
    """For shells: what may stand after `--set`."""
    key, is_whole, _ = incomplete.partition("=")
    if is_whole and key in Settings.model_fields:
        return [(f"{key}={word}", "") for word in choices(key) if f"{key}={word}".startswith(incomplete)]
    return [(f"{name}=", summary(name)) for name in Settings.model_fields if name.startswith(incomplete)]


def key_options(*, takes_data: bool) -> list[Parameter]:
    """An option for each key, under the heading of its group; they are listed, and completed, and read elsewhere."""
    short: list[tuple[list[str], str]] = [(["-c", "--config"], "YAML file whose keys are set, as if each were typed.")]
    if takes_data:
        short.append((["--model"], "Base model: `model_name`."))
        short.append(
            (["--data"], "Training data: `train_file` if there is such a file, else `dataset_id`; may be repeated.")
        )
    maybe_text, heading = Optional[str], "Keys, in short"  # noqa: UP045
    parameters = [_parameter(names[-1][2:], names, maybe_text, text, heading, ()) for names, text in short]
    for title, keys in groups().items():
        parameters += [_key_parameter(key, f"Keys: {title}") for key in keys]

    def listed(**_: object) -> None: ...

    listed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    listed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    made = typer.Typer(add_completion=False)
    made.command()(listed)
    options = [param for param in typer.main.get_command(made).params if param.name != "help"]
    for option in options:
        option.expose_value = False
    return options


def _key_parameter(key: str, panel: str) -> inspect.Parameter:
    words = choices(key)
    about = summary(key)
    text = f"{about[0].upper()}{about[1:]}. Default: {write_value(Settings.model_fields[key].default)}."
    if _is_switch(key):
        return _parameter(key, [f"--{_dashed(key)}/--no-{_dashed(key)}"], Optional[bool], text, panel, ())  # noqa: UP045
    return _parameter(key, [f"--{_dashed(key)}"], Optional[str], text, panel, words)  # noqa: UP045


def _parameter(
    name: str, declarations: list[str], kind: object, text: str, panel: str, words: Iterable[str]
) -> inspect.Parameter:
    words = list(words)
    complete: Callable[[str], list[str]] | None = None
    if words:

        def complete(incomplete: str) -> list[str]:
            return [one for one in words if one.startswith(incomplete)]

    metavar = None if kind is Optional[bool] else "VALUE"  # noqa: UP045
    option = typer.Option(
        *declarations, help=text, rich_help_panel=panel, show_default=False, metavar=metavar, autocompletion=complete
    )
    return inspect.Parameter(
        f"key_{name}", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _is_option(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word) and word != "-"


def _is_switch(key: str) -> bool:
    return (
        key in Settings.model_fields and isinstance(Settings.model_fields[key].default, bool) and not _takes_words(key)
    )


def _takes_words(key: str) -> bool:
    """Whether it is True, False, or a word such as `auto`."""
    return bool(choices(key)) and "True" in allowed_values(key)


def _takes_names(key: str) -> bool:
    return "list of names" in allowed_values(key)


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def as_value(several: Sequence[str]) -> str:
    """What stands behind `KEY=` for one text, as it is, or for several, as a list."""
    return several[0] if len(several) == 1 else f"[{', '.join(map(write_value, several))}]"
