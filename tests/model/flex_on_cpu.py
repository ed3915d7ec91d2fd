"""FlexAttention's plain form on the CPU, forward and backward, in any dtype, instead of a compiled kernel.

The library refuses inputs that require gradients there, because no CPU kernel has a backward. Its plain form has one:
the dense formula under the same mask and score functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.nn.attention import flex_attention as library

from trietune.model.attention import flex as flex_attention


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_validate_device", lambda query, key, value: None)
        patch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(flex_attention, "compiled", lambda: library.flex_attention)
        yield
