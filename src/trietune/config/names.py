"""Names of keys: which one was meant by a name that is none, and how a name is shown."""

from __future__ import annotations

import difflib
import re

from trietune.config.foreign import FOREIGN_NAMES, remedy_for
from trietune.config.problems import Problem
from trietune.config.secrets import without_secrets
from trietune.config.settings import Settings
from trietune.errors import in_short


def unknown_key(key: str, value: object, origin: str) -> Problem:
    """What to say of a key that is none: it spelt well, ours for another tool's name, or the nearest one."""
    in_file = ", line " in origin
    what = f"unknown key `{printable(key)}` {'in' if in_file else 'from'} {origin}"
    remove = "remove the line" if in_file else "leave it out"
    name = key.strip().lower().replace("-", "_")
    if name in Settings.model_fields:
        return Problem(what, "keys are written in small letters with `_`", f"write `{name}`")
    if name in FOREIGN_NAMES:
        foreign = FOREIGN_NAMES[name]
        ours = " and ".join(f"`{ours}` ({summary(ours)})" for ours in foreign.keys)
        why = f"a name in {foreign.tools}" + (f"; here it is {ours}" if ours else "; there is no such key here")
        why += f"\n{foreign.difference}" if foreign.difference else ""
        remedy = remedy_for(name, without_secrets(value)) or remove
        return Problem(what, why, remedy if origin != "--set" else _as_options(remedy))
    nearest = nearest_key(name)
    if nearest is not None:
        return Problem(what, f"did you mean `{nearest}` ({summary(nearest)})?", f"write `{nearest}`, or {remove}")
    return Problem(what, "docs/configuration.md describes every key, and `trietune init sst2` writes them", remove)


def _as_options(remedy: str) -> str:
    """`learning_rate: 1e-4` of a file as it is typed: `--learning-rate 1e-4`."""

    def option(found: re.Match[str]) -> str:
        key, value = found[1], found[2].strip('"')
        return found[0] if key not in Settings.model_fields else f"`--{key.replace('_', '-')} {value}`"

    return re.sub(r"`(\w+): ([^`]*)`", option, remedy)


def nearest_key(name: str) -> str | None:
    """The key that is spelt most like `name`, its words in any order; None if none is near."""
    by_spelling = {key: key for key in Settings.model_fields}
    by_words = {_sorted_words(key): key for key in Settings.model_fields}
    for spelling, keys in ((name, by_spelling), (_sorted_words(name), by_words)):
        near = difflib.get_close_matches(spelling, keys, n=1, cutoff=0.75)
        if near:
            return keys[near[0]]
    return None


def printable(text: str) -> str:
    """Text of a file or a command line as it can safely be shown on a terminal: one line, no control characters."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return in_short(shown)


def _sorted_words(name: str) -> str:
    return "_".join(sorted(name.split("_")))


def summary(key: str) -> str:
    """The first sentence of the key's description as a phrase: "rank of the adapter"."""
    first = (Settings.model_fields[key].description or key).replace("\n", " ").split(". ")[0].split(": ")[0].rstrip(".")
    return first if first[:2].isupper() else first[0].lower() + first[1:]
