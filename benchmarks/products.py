"""Measure what blocked copies of frozen weights are worth: products of a linear layer, as they come and packed.

    python benchmarks/products.py [--rows 16 80 512 1139 1152] [--dtypes bfloat16 float32]

What: GFLOP/s of `x W'` through `torch.nn.functional.linear` and through oneDNN with a weight that was blocked before
(`pack_weights`, `model/frozen_weight.py`), for the layers of SmolLM2-135M and of Gemma 1.1 2B.

Why: whether packing pays, and from how many rows on, differs between processors, dtypes and versions of the libraries.

What it does not show: the memory that copies take, or how much of a step is products.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

import torch  # noqa: E402
from measure import median_seconds  # noqa: E402
from torch import nn  # noqa: E402

from trietune.model.fast.frozen_weight import FrozenWeight  # noqa: E402

LAYERS = {"SmolLM2-135M": [(576, 576), (576, 1536), (1536, 576)], "Gemma 1.1 2B": [(2048, 16_384), (16_384, 2048)]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 80, 512, 1139, 1152])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    print(f"{'model':<14} {'dtype':<9} {'rows':>5} {'in':>6} {'out':>6}  as it comes   packed   GFLOP/s")
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for model, shapes in LAYERS.items():
            for inner, outer in shapes:
                frozen = FrozenWeight(torch.nn.Linear(inner, outer, bias=False, dtype=dtype).requires_grad_(False))
                frozen.may_pack = True
                for rows in options.rows:
                    x = torch.randn(rows, inner).to(dtype)
                    work = 2e-9 * rows * inner * outer
                    plain = work / median_seconds(lambda x=x, w=frozen.weight: nn.functional.linear(x, w))
                    packed = work / median_seconds(lambda x=x, f=frozen: f.forward(x))
                    name = str(dtype).removeprefix("torch.")
                    print(f"{model:<14} {name:<9} {rows:>5} {inner:>6} {outer:>6} {plain:>12.0f} {packed:>8.0f}")


if __name__ == "__main__":
    main()
