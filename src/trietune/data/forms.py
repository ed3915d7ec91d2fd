"""One data set, opened: the form of its rows, how they are asked, and what of them nothing uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trietune.config.settings import Settings
from trietune.data.columns import RowFormat, find_unused
from trietune.data.loading import CheckStop, Loading, Progress, Report, Watch
from trietune.data.preferences import AnswerForm
from trietune.data.prompt_formats import make_prompt_format
from trietune.data.reading import find_row_format, first_conversations, weighting_of
from trietune.data.rows import Rows
from trietune.data.sources import Sources
from trietune.data.templates import PromptFormat, find_columns, find_optional_names, find_text_in_braces
from trietune.data.weights import COLUMN, Weighting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Reader:
    """What all data sets of a call are read with; `cache_folder` can be written to."""

    tokenizer: PreTrainedTokenizerFast
    cache_folder: Path
    report: Report
    progress: Progress
    check_stop: CheckStop

    def loading(
        self,
        settings: Settings,
        row_format: RowFormat,
        form: AnswerForm | None,
        weighting: Weighting | None,
        prompt_format: PromptFormat,
        watch: Watch,
    ) -> Loading:
        """What reads a data set of this form."""
        return Loading(
            settings,
            self.tokenizer,
            row_format,
            form,
            weighting,
            prompt_format,
            self.cache_folder,
            self.report,
            self.progress,
            self.check_stop,
            watch,
        )


def open_to_train(
    settings: Settings,
    sources: Sources,
    reader: Reader,
    *,
    watch: Watch,
    found: tuple[RowFormat, AnswerForm | None] | None = None,
) -> Loading:
    """How the data is read, found from its columns and the settings, with a line for what a user may not expect.

    Args:
        found: the form of the rows, where it is known.

    Raises:
        UserError: the form is not known, or the settings do not fit it.
    """
    report, rows = reader.report, sources.train
    row_format, form = found or find_row_format(settings, sources)
    prompt_format = make_prompt_format(
        settings, reader.tokenizer, row_format, first_conversations(rows, row_format), reader.check_stop
    )
    weighting = weighting_of(settings, sources, row_format, report)
    if row_format.kind == "templates" and settings.prompt_template is None:
        report(
            f"`{rows.name}` is read by its columns: prompt_template {json.dumps(row_format.prompt_template)}, "
            f"completion_template {json.dumps(row_format.completion_template)} (write your own to change them)"
        )
    unused = find_unused(rows.columns(), row_format)
    if weighting is not None and weighting.has_column:
        unused = tuple(name for name in unused if name != COLUMN)
    if unused and (sources.task_name is None or settings.train_file):
        shown = ", ".join(f"`{name}`" for name in unused[:20]) + (
            f" and {len(unused) - 20:,} more" if unused[20:] else ""
        )
        report(f"columns of `{rows.name}` that nothing uses: {shown}")
    if row_format.kind == "templates" and not find_columns(row_format.prompt_template, row_format.template_columns):
        report("`prompt_template` names no column: all prompts are the same text")
    if row_format.kind in ("templates", "answers") and settings.prompt_template is not None:
        for line in _doubts_about(row_format, rows):
            report(line)
    return reader.loading(settings, row_format, form, weighting, prompt_format, watch)


def _doubts_about(row_format: RowFormat, rows: Rows) -> Iterator[str]:
    """What of the user's templates may have been meant otherwise than it is read."""
    first, known = rows.columns(), row_format.template_columns or ()
    templates = {"prompt_template": row_format.prompt_template, "completion_template": row_format.completion_template}
    for key, template in templates.items():
        if texts := find_text_in_braces(template, {*first, *known}):
            shown = ", ".join(f"`{{{text}}}`" for text in texts[:8]) + (", ..." if texts[8:] else "")
            why = "stays text: it is not a column" if len(texts) == 1 else "stay text: they are not columns"
            yield f"`{key}`: {shown} {why}"
        for name in find_optional_names(template, {*first, *known}):
            if name not in first:
                yield f"`{key}`: the first row of `{rows.name}` has no `{name}`, which is empty where a row has none"


def named(report: Callable[[str], None], source: str) -> Callable[[str], None]:
    """`report` for lines that do not say which of several data sets they are about."""
    return lambda line: report(line if f"`{source}`" in line or f" {source}" in line else f"`{source}`: {line}")
