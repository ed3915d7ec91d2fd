"""How large the error of a part may be, and how it is said."""

from __future__ import annotations

from trietune.model.proof.passes import Error

# Relative error of a part in fp32, of its values and of its gradients. Over 226 computations of 55 types of model the
# largest right one was 1.9e-6, the smallest wrong one (a position one off, SmolLM2) 2.6e-3: 28 times the one, a 52nd
# of the other.
BOUND = 5e-5
# The same of parts that scan a state, whose rounding adds up along a row. Over 4 kinds and rows of up to 2,500 tokens
# the largest right errors were 1.2e-4 and 1.4e-4, the smallest wrong ones 1.5e-3 (a state rounded to bf16) and 4.7e-2
# (no gradient through it).
SCAN_BOUND, SCAN_BOUND_OF_GRADIENTS = 5e-4, 2e-3
# A kernel that has no fp32, against rows in fp32 on the same queries, keys and values, in relation to all nodes: right
# ones at most 3.8e-3, a scale 10 % off 4.0e-2.
KERNEL_BOUND = 2e-2


def is_within(error: Error, *, is_scan: bool) -> bool:
    """Whether a part's error is one of rounding."""
    if is_scan:
        return error.values <= SCAN_BOUND and error.gradients <= SCAN_BOUND_OF_GRADIENTS
    return error.worst <= BOUND


def number_of(error: Error, is_scan: bool = False) -> str:
    if error.reason is not None:
        return error.reason
    allowed, allowed_of_gradients = (SCAN_BOUND, SCAN_BOUND_OF_GRADIENTS) if is_scan else (BOUND, BOUND)
    if error.gradients / allowed_of_gradients > error.values / allowed:
        return f"{error.gradients:.1e} of a gradient, allowed {allowed_of_gradients:.0e}"
    return f"{error.values:.1e}, allowed {allowed:.0e}"
