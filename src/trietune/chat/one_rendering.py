"""Every prefix of a conversation out of one rendering, where it can be shown to be what rendering the prefix gives.

    messages          m0      m1      m2      m3
    one rendering     before  body 0  body 1  body 2  body 3  after
    of two messages   before  body 0  body 1  after

A template is run once, on messages that record what is asked of them. Up to the end of `k` messages it has run as it
would on these alone, unless it asked for something that depends on the others: their number, one that comes later,
whether this is the last. After its loop it must not read anything that the loop or another statement has set. Prefixes
of which this does not hold are left to be rendered. Without it, a conversation of 4,000 turns takes minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.runtime import LoopContext
from transformers.utils import chat_template_utils

from trietune.chat.prefixes import Prefixes
from trietune.io.json_types import JsonMapping

# Statements that run where they stand, once.
_PLAIN = (nodes.Template, nodes.If, nodes.Scope, nodes.With)


class _DependsOnOthersError(BaseException):
    """The template asked for what every prefix answers in another way. No template catches it."""


def render_once(fields: Sequence[JsonMapping], variables: JsonMapping, source: str) -> Prefixes | None:
    """Messages rendered once; None where the template is not one whose prefixes can be told.

    Args:
        fields: what the template sees of each message.
        variables: what else it sees, by name.
        source: the template.

    Raises whatever the template raises.
    """
    compiled, convert = _compile(source), _converter()
    if compiled is None or convert is None or not has_one_loop(compiled.environment, source):
        return None
    record = _Record(convert(list(fields)))
    pieces: list[str] = []
    try:
        for piece in compiled.root_render_func(compiled.new_context({**variables, "messages": _Recorded(record, 0)})):
            pieces.append(piece)
            record.written += len(piece)
    except _DependsOnOthersError:
        return None
    if record.end is None:  # the loop was left early, or never entered
        return None
    text = "".join(pieces)
    ends = [end if is_shown else None for end, is_shown in zip(record.ends, record.is_shown, strict=True)]
    return Prefixes(text, ends, text[record.end :])


@lru_cache(maxsize=16)
def has_one_loop(environment: Environment, source: str) -> bool:
    """Whether a template writes its messages in one loop, after which nothing depends on what ran before."""
    tree = environment.parse(source)
    ours = _names_of_messages(tree)
    loops = [one for one in tree.find_all(nodes.For) if _reads(one.iter, ours)]
    if len(loops) != 1 or loops[0].test is not None or loops[0].recursive or loops[0].else_:
        return False
    after = _after(tree, loops[0])
    if after is None:
        return False
    changing = _set_names(tree) | ours | {"loop", "self", "caller"}
    return not any(_reads(one, changing) or any(one.find_all((nodes.For, nodes.Macro))) for one in after)


def _after(node: nodes.Node, loop: nodes.For) -> list[nodes.Node] | None:
    """The statements that run once a loop has ended; None if the loop is not in `node`, or runs more than once."""
    if not isinstance(node, _PLAIN):
        return None
    branches: list[Sequence[nodes.Node]] = [node.body]
    if isinstance(node, nodes.If):
        branches += [node.elif_, node.else_]
    for branch in branches:
        for number, one in enumerate(branch):
            rest = [] if one is loop else _after(one, loop)
            if rest is not None:
                return [*rest, *branch[number + 1 :]]
    return None


def _names_of_messages(tree: nodes.Template) -> set[str]:
    """`messages`, and every name that is set to something in which one of these names occurs."""
    found = {"messages"}
    while True:
        before = len(found)
        one: Any
        for one in (*tree.find_all(nodes.Assign), *tree.find_all(nodes.AssignBlock)):
            if any(_reads(child, found) for child in one.iter_child_nodes(exclude=("target",))):
                found |= _targets(one.target)
        for block in tree.find_all(nodes.With):
            if any(_reads(value, found) for value in block.values):
                found |= set().union(*map(_targets, block.targets))
        if len(found) == before:
            return found


def _set_names(tree: nodes.Template) -> set[str]:
    names: set[str] = set()
    one: Any
    for one in (*tree.find_all(nodes.Assign), *tree.find_all(nodes.AssignBlock), *tree.find_all(nodes.For)):
        names |= _targets(one.target)
    for macro in tree.find_all(nodes.Macro):
        names.add(macro.name)
    for block in tree.find_all(nodes.With):
        names |= set().union(*map(_targets, block.targets))
    return names


def _targets(target: nodes.Node) -> set[str]:
    return set(_names(target))


def _reads(node: nodes.Node, names: set[str]) -> bool:
    return not names.isdisjoint(_names(node))


def _names(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, (nodes.Name, nodes.NSRef)):
        yield node.name
    for child in node.iter_child_nodes():
        yield from _names(child)


class _Record:
    """What a run of a template asked, and how far it had written by then."""

    def __init__(self, items: list[object]) -> None:
        self.items = items
        self.written = 0
        self.num_given = 0
        self.is_iterated = False
        self.end: int | None = None
        # Of no message at all nothing is known.
        self.ends: list[int] = [0] * (len(items) + 1)
        self.is_shown = [False] * (len(items) + 1)
        self._unknown_up_to = 0

    def note(self, last: int) -> None:
        """Something was asked that prefixes of up to `last` messages answer in another way."""
        self._unknown_up_to = max(self._unknown_up_to, last)

    def close(self, number: int) -> None:
        """The first `number` messages have been written."""
        self.ends[number] = self.written
        self.is_shown[number] = number > self._unknown_up_to


class _Recorded:
    """Messages as a template sees them. Anything that is not answered here ends the run."""

    __slots__ = ("__first", "__record")

    def __init__(self, record: _Record, first: int) -> None:
        self.__record, self.__first = record, first

    def __getitem__(self, key: object) -> object:
        record, first = self.__record, self.__first
        if isinstance(key, slice):
            if key.stop is not None or key.step not in (None, 1) or not _is_count(key.start or 0):
                raise _DependsOnOthersError
            return _Recorded(record, first + (key.start or 0))
        if not _is_count(key):
            raise _DependsOnOthersError
        assert isinstance(key, int)
        if first + key < len(record.items):
            record.note(first + key)
            return record.items[first + key]
        raise IndexError(key)  # beyond the end of all, and so of every prefix

    def __bool__(self) -> bool:
        if self.__first >= len(self.__record.items):
            raise _DependsOnOthersError
        self.__record.note(self.__first)
        return True

    def __iter__(self) -> Iterator[object]:
        if self.__record.is_iterated:
            raise _DependsOnOthersError
        self.__record.is_iterated = True
        return _Given(self.__record, self.__first)

    def __len__(self) -> int:
        raise _DependsOnOthersError

    def __contains__(self, item: object) -> bool:
        raise _DependsOnOthersError

    def __reversed__(self) -> Iterator[object]:
        raise _DependsOnOthersError

    def __eq__(self, other: object) -> bool:
        raise _DependsOnOthersError

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: object) -> object:
        raise _DependsOnOthersError

    __radd__ = __mul__ = __rmul__ = __add__

    def __str__(self) -> str:
        raise _DependsOnOthersError

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        raise _DependsOnOthersError


class _Given:
    """The loop's own iterator over messages."""

    def __init__(self, record: _Record, first: int) -> None:
        self._record, self._next, self._first = record, first, first

    def __iter__(self) -> _Given:
        return self

    def __next__(self) -> object:
        record = self._record
        frame = sys._getframe(1)
        if frame.f_code is LoopContext._peek_next.__code__:
            raise _DependsOnOthersError  # `loop.last`, `loop.nextitem`
        if frame.f_code is LoopContext.__next__.__code__ and frame.f_back is not None:
            frame = frame.f_back
        # A filter, a macro or a block: not where the template's own loop stands.
        if frame.f_code.co_name != "root":
            raise _DependsOnOthersError
        if self._next > self._first:
            record.close(self._next)
        if self._next >= len(record.items):
            record.end = record.written
            raise StopIteration
        self._next += 1
        return record.items[self._next - 1]


def _is_count(key: object) -> bool:
    return type(key) is int and key >= 0


def _compile(source: str) -> Template | None:
    """The template as transformers compiles it; None in a release that does it in another way."""
    make = getattr(chat_template_utils, "_compile_jinja_template", None)
    template = make(source) if make is not None else None
    return template if isinstance(template, Template) else None


def _converter() -> Any:
    """What transformers makes of messages before a template sees them."""
    to_plain = getattr(chat_template_utils, "_plain_template_data", None)
    with_aliases = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    if to_plain is None or with_aliases is None:
        return None
    return lambda messages: with_aliases(to_plain(messages))
