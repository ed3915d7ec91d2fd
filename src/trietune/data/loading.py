"""One split as token sequences: out of the cache, or tokenized now and kept there."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trietune.config.settings import Settings
from trietune.data.cache import CacheWriter, make_key, open_cached
from trietune.data.columns import RowFormat
from trietune.data.counts import Count, SplitCounts, describe, name_places
from trietune.data.encode_answers import tokenize_answers
from trietune.data.encode_rows import tokenize_rows
from trietune.data.encoder import make_encoder
from trietune.data.examples import IGNORED_LABEL, TokenSequences
from trietune.data.held_out import HELD_OUT_SEED
from trietune.data.preferences import AnswerForm
from trietune.data.read_row import LengthRules
from trietune.data.rows import Rows
from trietune.data.sources import Sources
from trietune.data.templates import PromptFormat, find_columns, plain_fields, split_template
from trietune.data.weights import COLUMN, Weighting, is_weight_text
from trietune.errors import StopRequested, UserError
from trietune.io.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Report = Callable[[str], None]
Progress = Callable[[str, int, int | None], None]
CheckStop = Callable[[], None]

# `max_length: auto` where no model says how long a sequence may be.
UNBOUNDED = 2**31 - 1
# Which rows are accepted, and how: an entry of the cache that was made by other rules is not used.
READING_VERSION = 5


@dataclass(frozen=True, slots=True)
class Watch:
    """The files of all splits as they were before the first look into any: columns, counts and rows are of one time.

    A key is made before rows are read, so what is read later must be what the key was made of.
    """

    rows: tuple[Rows, ...]
    stamps: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, sources: Sources) -> Watch:
        rows = tuple(rows for rows in (sources.train, sources.validation, sources.test) if rows is not None)
        return cls(rows, tuple(one.stamp() for one in rows))

    def check(self) -> None:
        """Raise `UserError` if a file was written to since."""
        for rows, stamp in zip(self.rows, self.stamps, strict=True):
            if rows.stamp() != stamp:
                raise _changed_meanwhile(rows)


@dataclass(frozen=True, slots=True)
class Loading:
    """What the splits of one call share."""

    settings: Settings
    tokenizer: PreTrainedTokenizerFast
    row_format: RowFormat
    form: AnswerForm | None
    weighting: Weighting | None
    prompt_format: PromptFormat
    cache_folder: Path
    report: Report
    progress: Progress
    check_stop: CheckStop
    watch: Watch

    def load(
        self,
        rows: Rows,
        *,
        is_training: bool,
        held_out: np.ndarray | None,
        limit: int | None = None,
        is_rest: bool = False,
    ) -> tuple[TokenSequences, SplitCounts, str]:
        """A split from the cache, or made now; its counts; its key.

        Args:
            held_out: bool [rows]; training leaves these out, everything else takes only these.
            is_rest: whether `held_out` holds the rows that training takes, to be measured.
        """
        self.check_stop()
        # Evaluation measures every label alike.
        weighting = self.weighting if is_training else None
        rules = LengthRules(
            max_length=UNBOUNDED if self.settings.max_length == "auto" else self.settings.max_length,
            overlong=self.settings.overlong if is_training else None,
            keeps_empty=not is_training,
            ignored_label=self.settings.ignored_index if self.row_format.kind == "tokens" else IGNORED_LABEL,
        )
        fingerprint = rows.fingerprint()
        key = make_key(
            rows=fingerprint,
            recipe=_deciding_fields(self.row_format),
            prompt_format=_deciding_fields(self.prompt_format),
            rules=asdict(rules),
            tokenizers=metadata.version("tokenizers"),
            held_out=None if held_out is None else [HELD_OUT_SEED, int(held_out.sum()), is_training or is_rest],
            **({"is_rest": True} if is_rest else {}),
            limit=limit,
            **({} if self.form is None else {"answers": _fields_of(self.form)}),
            **({} if weighting is None else {"weights": asdict(weighting)}),
        )
        entry = make_key(fingerprint=key, reading_version=READING_VERSION)
        found = open_cached(self.cache_folder, entry)
        if found is None:
            sequences, counts = self._tokenize(rows, fingerprint, rules, entry, is_training, held_out, limit, weighting)
        else:
            self.watch.check()
            sequences, counts = found[0], SplitCounts.from_dict(found[1])
        for line in describe(counts, is_training=is_training, max_length=rules.max_length):
            self.report(line)
        if not len(sequences):
            raise _nothing_left(counts, rules.max_length)
        # Checkpoints of the first version name data only by `key`, and such rows gave other sequences then.
        has_unlearnt = (counts.unlearnt.number or counts.without_weight.number) and weighting is None
        if counts.without_labels.number or counts.padded.number or counts.num_with_more or has_unlearnt:
            key = make_key(fingerprint=key, reading_version=2)
        return sequences, counts, key

    def _tokenize(
        self,
        rows: Rows,
        fingerprint: str,
        rules: LengthRules,
        key: str,
        is_training: bool,
        held_out: np.ndarray | None,
        limit: int | None,
        weighting: Weighting | None,
    ) -> tuple[TokenSequences, SplitCounts]:
        total = rows.quick_count() if held_out is None else int((held_out != is_training).sum())
        total = limit if total is None else min(total, limit or total)
        phase = f"tokenizing {'training' if is_training else 'validation'} data"
        placed = rows.read()
        if held_out is not None and not is_training:
            placed = compress(placed, held_out)
        common: JsonObject = {
            "source": rows.name,
            "encoder": make_encoder(self.tokenizer, self.prompt_format, check_stop=self.check_stop),
            "rules": rules,
            "check_stop": self.check_stop,
            "progress": lambda done: self.progress(phase, done, total),
            "left_out": held_out if is_training else None,
            "row_format": self.row_format,
            "first_columns": rows.columns(),
        }
        placed = islice(placed, _last_row(held_out, limit))
        with CacheWriter(self.cache_folder, key) as writer:
            try:
                if self.form is None:
                    forbids = is_training and COLUMN not in rows.columns() and not is_weight_text(self.row_format)
                    counts = tokenize_rows(
                        placed,
                        writer,
                        weighting=weighting,
                        forbids_weights=forbids,
                        **common,
                    )
                else:
                    counts = tokenize_answers(placed, writer, form=self.form, **common)
            except StopRequested:
                raise
            except Exception:
                self.watch.check()  # what is wrong with the rows may be that they are half written
                raise
            self.watch.check()
            if rows.fingerprint() != fingerprint:
                raise _changed_meanwhile(rows)
            return writer.finish(asdict(counts)), counts


def _deciding_fields(words: RowFormat | PromptFormat) -> JsonObject:
    """What of a row format or prompt format decides tokens.

    Names of columns do only where templates mean others than they meant when only identifiers were columns; a
    checkpoint of that time then resumes with the same fingerprint.
    """
    fields = plain_fields(words) if isinstance(words, PromptFormat) else asdict(words)
    columns = fields.pop("template_columns")
    if not fields.get("system_prompt"):  # as it was before there was one
        fields.pop("system_prompt", None)
    if fields.get("message_columns") == ("messages",):
        del fields["message_columns"]
    templates = (words.prompt_template, words.completion_template)
    if all(split_template(one, columns) == split_template(one) for one in templates):
        return fields
    return {**fields, "template_columns": [find_columns(one, columns) for one in templates]}


def _fields_of(form: AnswerForm) -> JsonObject:
    """What of a form decides tokens; its columns stand in the row format where they do."""
    fields = asdict(form)
    del fields["template_columns"]
    return fields


def _last_row(held_out: np.ndarray | None, limit: int | None) -> int | None:
    """How many rows hold the first `limit` that are not held out."""
    if held_out is None or limit is None:
        return limit
    taken = np.flatnonzero(~held_out)
    return int(taken[limit - 1]) + 1 if limit <= len(taken) else None


def _changed_meanwhile(rows: Rows) -> UserError:
    return UserError(
        f"`{rows.name}` changed while it was being read, so it is not clear what was read",
        where="nothing was kept",
        next_step="wait until the file is complete, then run the same command again",
    )


def _nothing_left(counts: SplitCounts, max_length: int) -> UserError:
    """What left no example, the most telling reason first."""
    reasons: tuple[tuple[Count, str, str], ...] = (
        (
            counts.overlong,
            f"all {{}} are longer than `max_length: {max_length}`",
            "raise `max_length`, or write `overlong: truncate_prompt`",
        ),
        (
            counts.without_weight,
            "none of the {} is to be learned from: their weights are 0, or `loss` or `train` is false",
            "check the column `weight`, or the keys `weight`, `loss` and `train` of its messages",
        ),
        (
            counts.without_pair,
            "none of the {} prefers one answer to another: `chosen` and `rejected` are equal",
            "check the column `rejected` (or `scores`, `ranking`) of the file",
        ),
        (
            counts.without_labels,
            "none of the {} has a label, so there is nothing to learn",
            "check `labels` (and `ignored_index`) of the data",
        ),
        (
            counts.without_completion,
            "none of the {} can be learned from: their completions are empty",
            "check the column of what is to be learned: its name, the last message, or `completion_template`",
        ),
    )
    count, said, next_step = next((reason for reason in reasons if reason[0].number), reasons[-1])
    rows = f"{counts.read:,} {'examples' if count is counts.overlong else 'rows'} of `{counts.source}`"
    return UserError(said.format(rows), where=name_places(count.samples, count.number), next_step=next_step)


def writable(cache_folder: Path, report: Report) -> Path:
    """The cache folder; if nothing can be written there, a temporary one that lasts as long as the process."""
    try:
        (cache_folder / "tokens").mkdir(parents=True, exist_ok=True)
        # An entry is a folder that gets its name when it is whole; not every file system renames folders.
        with tempfile.TemporaryDirectory(dir=cache_folder / "tokens", prefix=".trying-") as tried:
            (Path(tried) / "building").mkdir()
            (Path(tried) / "building").rename(Path(tried) / "whole")
            return cache_folder
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="trietune-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        report(f"the cache folder {cache_folder} cannot be written ({error.strerror}): tokens are not kept this time")
        return folder
