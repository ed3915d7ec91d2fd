"""docs/models.md from the table of all types.

python tests/causal_types/models_page.py        writes the page
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from causal_types.try_types import read_table

# Types that this version builds as causal language models.
NUM_TYPES = {"5.22.2": 183}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """\
# Models

Which families train, and how. Model types that transformers {transformers} builds as causal language models were made
small and random, and their gradients on a trie were compared with those of a plain loop of transformers and PEFT, a
row at a time. Your own model: `trietune doctor MODEL` says the same of one model, from its `config.json` alone.

{summary}

How a trie is computed, the first way that the self-check proves for every layer:

| way | what it means |
|---|---|
| nodes, fused | each distinct prefix once; attention by rows of the trie, layers with a backward of their own |
| nodes | the same through transformers' own layers |
| nodes, states | and layers with a state along the sequence start each branch from the state above it |
| mask | some layers attend through transformers under an explicit mask, which takes memory |
| whole rows | the network runs on whole rows; projections, norms, MLPs and experts run once a node |
| refused | with the reason, and what to do instead |

Empty columns were not tried yet. `bf16` is the same in bfloat16: proven, and no further from the fp32 loop than
rounding explains. `heads` is another number of key and value heads. `unsettled` is further from the loop in fp32 than
others, on padded rows by the same amount, and was not yet computed in fp64. `WRONG` trains with other gradients than
the loop's, and the self-check does not see it yet: do not use it.
`caught` are mistakes that were made on purpose, each of which the self-check noticed: a broken (m)ask, broken
(p)ositions, a dropped (w)indow, (r)otation of layers that do not rotate; those that a family cannot make are left out.
`as decoder` means that the model's configuration says `"is_decoder": true`, without which such a model sees the tokens
that come.

"""

MULTIMODAL = """\

## Text beside images and sounds

These checkpoints are loaded by their own class. The text decoder trains; towers for images and sounds stay as they are
and carry no adapter. Data with images is refused by name.

"""

NOT_BUILT = """\

## Not tried

The installed transformers did not build a small one of these.

"""

NEXT = """\

## Next

`trietune doctor MODEL` for yours ([commands](commands.md#doctor)). What the self-check compares:
[batches and speed](batches.md#is-it-the-same).
"""


def page_of(rows: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    rows = sorted(rows, key=lambda row: str(row["type"]))
    built = [row for row in rows if row["built"]["status"] == "built"]
    text = [row for row in built if not row.get("is_multimodal")]
    more = [row for row in built if row.get("is_multimodal")]
    page = HEAD.format(transformers=rows[0]["transformers"], summary=_summary(text, rows)) + _table(text)
    if more:
        page += MULTIMODAL + _table(more)
    refused = [row for row in built if row["trie"]["status"] == "refused"]
    if refused:
        page += "\n## Refused on a trie\n\n| type | why | next |\n|---|---|---|\n"
        page += "".join(f"| `{row['type']}` | {_cell(row['trie']['said'])} | {_advice(row)} |\n" for row in refused)
    if lost := [row for row in rows if row["built"]["status"] != "built"]:
        page += NOT_BUILT + ", ".join(f"`{row['type']}`" for row in lost) + ".\n"
    return page + NEXT


def _summary(text: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    ways = Counter(_way(row) for row in text)
    total = NUM_TYPES[rows[0]["transformers"]]
    lines = [f"| {total} types | number |", "|---|---|"]
    lines += [f"| {way} | {number} |" for way, number in ways.most_common()]
    if total > len(text):
        lines.append(f"| not tried yet, or not built | {total - len(text)} |")
    return "\n".join(lines)


def _way(row: dict[str, Any]) -> str:
    trie = row["trie"]
    return f"exact: {trie['attention']}" if trie["status"] == "exact" else str(trie["status"])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| type | trie | padded | bf16 | heads | caught |", "|---|---|---|---|---|---|"]
    for row in rows:
        name = f"`{row['type']}`" + (", as decoder" if row.get("as_decoder") else "")
        caught = "".join(key[0] for key, found in row.get("caught", {}).items() if found == "caught")
        others = [row.get(key, {}).get("status", "") for key in ("padded", "bf16", "heads")]
        lines.append(f"| {name} | {_way(row)} | {' | '.join('' if x == '-' else x for x in others)} | {caught} |")
    return "\n".join(lines) + "\n"


def _advice(row: dict[str, Any]) -> str:
    if row["padded"]["status"] == "exact":
        return "`batching: padded`"
    return "another model: padded rows are refused as well"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page_of(read_table()))
