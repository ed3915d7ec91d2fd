"""`trietune cache`: what the cache folder holds, who uses it, and how to be rid of what nobody uses."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from trietune.cli.options import AsJson
from trietune.cli.printing import print_json, say


def cache(
    prune: Annotated[bool, typer.Option("--prune", help="Remove what nothing has used for so many --days.")] = False,
    days: Annotated[float, typer.Option("--days", min=0, help="With --prune.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List what the caches hold and what uses it."""
    from trietune.io.cache_folder import cache_folder
    from trietune.io.columns import columns
    from trietune.run.caches import list_cache, prune_cache

    entries, now = list_cache(), time.time()
    removed = prune_cache(entries, days=days, now=now) if prune else []
    kept = [entry for entry in entries if entry not in removed]
    if as_json:
        described = [
            {"path": str(entry.path), "kind": entry.kind, "about": entry.about, "size_bytes": entry.size_bytes,
             "days_unused": round(entry.days_unused(now), 2), "used_by": entry.used_by}
            for entry in kept
        ]  # fmt: skip
        print_json({"folder": str(cache_folder()), "entries": described, "removed": [str(one.path) for one in removed]})
        return
    rows = [("size", "last use", "what", "used by", "")]
    rows += [
        (f"{entry.size_bytes / 1e6:,.1f} MB", _ago(entry.days_unused(now)), entry.what, entry.used_by, str(entry.path))
        for entry in kept
    ]
    for line in columns(rows) if kept else []:
        say(line)
    total = sum(entry.size_bytes for entry in kept)
    say(f"{cache_folder()}: {len(kept):,} entries, {total / 1e6:,.1f} MB; all of it can be made or fetched again")
    if prune:
        freed = sum(entry.size_bytes for entry in removed)
        say(f"removed: {len(removed):,} entries that nothing used for {days:g} days, {freed / 1e6:,.1f} MB")


def _ago(days: float) -> str:
    return "today" if days < 1 else "1 day ago" if days < 2 else f"{days:.0f} days ago"
