"""Fit the costs by which a trie is cut into blocks (`AttentionCost`, `model/row_layout.py`) on this machine.

    python benchmarks/attention.py [--heads 9 --key-heads 3 --head-size 64] [--dtype bfloat16]

What: forward and backward of row attention on buckets of many shapes, each alone; a least-squares fit of microseconds
a bucket, a gathered position, and a score; the fit beside each measured time.

Why: the cut weighs operations against wasted scores. The constants in the code come from two cores with AVX-512; if
this program fits others by more than a factor of two, the cut may be a worse one on this machine.

What it does not show: a whole layer, or what memory costs that another part of the step has pushed out of the caches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

from trietune.run.malloc import keep_freed_memory  # noqa: E402

keep_freed_memory()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import median_seconds  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from trietune.model.attention.row_blocks import AttentionCost, RowLayout, attention_cost, build_row_layout  # noqa: E402
from trietune.model.attention.rows import RowAttention  # noqa: E402
from trietune.trie import build_trie  # noqa: E402

# Blocks, queries and keys of a bucket: answers, questions under paragraphs, paragraphs, whole tries.
SHAPES = [
    (1, 16, 16), (4, 16, 32), (16, 8, 32), (32, 16, 40), (16, 16, 180), (9, 20, 170), (32, 20, 170), (4, 64, 200),
    (2, 128, 256), (1, 150, 150), (1, 330, 330), (3, 330, 330), (1, 512, 512),
]  # fmt: skip


def main() -> None:
    options = parse(sys.argv[1:])
    dtype = getattr(torch, options.dtype)
    seconds = [time_bucket(*shape, options, dtype) for shape in SHAPES]
    known = attention_cost(num_heads=options.heads, head_size=options.head_size, dtype=dtype)
    count, queries, keys = np.array(SHAPES, float).T
    is_whole = (count == 1) & (queries == keys)
    # In the order of `AttentionCost`; a whole trie is one bucket of another kind.
    terms = np.stack((~is_whole, count * (queries + keys), count * queries * keys, is_whole), 1)
    measured = np.array(seconds) * 1e6
    # Relative errors: a small bucket counts as much as a large one.
    found, _ = nnls(terms / measured[:, None], np.ones(len(SHAPES)))
    fitted = AttentionCost(*found)
    print(f"{'blocks':>6} {'queries':>8} {'keys':>5} {'measured us':>12} {'fitted':>8} {'in the code':>12}")
    for shape, microseconds in zip(SHAPES, measured, strict=True):
        print(
            f"{shape[0]:>6} {shape[1]:>8} {shape[2]:>5} {microseconds:>12.0f} "
            f"{estimate(fitted, *shape):>8.0f} {estimate(known, *shape):>12.0f}"
        )
    print(f"fitted {fitted}\nin the code {known}")


def estimate(cost: AttentionCost, num_blocks: int, num_queries: int, num_keys: int) -> float:
    """Microseconds of one bucket."""
    count, queries, keys = np.array(num_blocks), np.array(num_queries), np.array(num_keys)
    is_whole = num_blocks == 1 and num_queries == num_keys
    return float(cost.of_whole(queries, keys) if is_whole else cost.of(count, queries, keys))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args(arguments)


def time_bucket(
    num_blocks: int, num_queries: int, num_keys: int, options: argparse.Namespace, dtype: torch.dtype
) -> float:
    """Seconds of a forward and backward over one bucket."""
    layout, num_nodes = bucket_of(num_blocks, num_queries, num_keys, options, dtype)
    query, key, value = (
        torch.randn(rows * heads, options.head_size).to(dtype).requires_grad_()
        for rows, heads in (
            (num_blocks * num_queries, options.heads),
            (num_nodes, options.key_heads),
            (num_nodes, options.key_heads),
        )
    )
    grad = torch.ones_like(query)

    def step() -> None:
        out = RowAttention.apply(query, key, value, layout, options.head_size**-0.5, None)
        torch.autograd.grad(out, (query, key, value), grad)

    return median_seconds(step)


def bucket_of(
    num_blocks: int, num_queries: int, num_keys: int, options: argparse.Namespace, dtype: torch.dtype
) -> tuple[RowLayout, int]:
    """One bucket: rows of `num_queries` under a shared beginning, of which only they query."""
    shared = num_keys - num_queries
    rows = [[1] * shared + [2 + row] * num_queries + [0] for row in range(num_blocks)]
    tokens = np.concatenate(rows).astype(np.int32)
    labels = np.full(len(tokens), -100, np.int32)
    offsets = np.arange(num_blocks + 1) * (num_keys + 1)
    labels[offsets[1:] - 1] = 0
    trie = build_trie(tokens, labels, offsets)
    layout = build_row_layout(
        trie,
        np.arange(shared, trie.num_nodes),
        window=None,
        num_heads=options.heads,
        num_key_heads=options.key_heads,
        head_size=options.head_size,
        dtype=dtype,
        device=torch.device("cpu"),
        cost=AttentionCost(1e6, 0.0, 1.0),
    )
    [bucket] = layout.buckets
    assert bucket.shape == (num_blocks, num_queries, num_keys), bucket.shape
    return layout, trie.num_nodes


if __name__ == "__main__":
    main()
