"""The benchmark is scripts, not a package: its folder, and that of the examples, are searched for modules."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]
