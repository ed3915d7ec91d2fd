"""`trietune report` and `trietune compare`: pages and tests about runs that are on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trietune.cli.options import MaybePath, RunFolder
from trietune.cli.printing import say, say_line
from trietune.io.outputs import write_output


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[MaybePath, typer.Option(help="HTML file, or `-`; default: report.html in the (first) run.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print it instead of writing a page.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it on this machine, refreshed while a run is in progress.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0 picks a free port.")] = 0,
) -> None:
    """Write one page about one run, or several side by side."""
    from trietune.tracking.report.report import render_runs, report_text

    if serve:
        _serve(runs, port)
        return
    if text:
        say(report_text(runs))
        return
    if out is not None and str(out) == "-":
        page_text = render_runs(runs)
        if sys.stdout.isatty():
            say(page_text)
        else:
            sys.stdout.write(page_text)
        return
    page = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    write_output(page, render_runs(runs).encode(), "--out")
    say_line(str(page))


def compare(first: RunFolder, second: Annotated[Path, typer.Argument(help="The run to compare it with.")]) -> None:
    """Test whether one run is better than another, example by example, and name the settings that differ."""
    from trietune.tracking.report.report import compare_text

    say(compare_text([first, second]), nl=False)


def _serve(runs: Sequence[Path], port: int) -> None:
    from trietune.tracking.report.serve import serve_report

    with serve_report(runs, port=port, say=say) as server:
        say("Ctrl-C ends it", err=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("", err=True)
