"""What ranks tell each other: values, errors, sums; one process is the identity."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import trietune
from ranks import jobs
from ranks.pool import Pool
from trietune.ranks.messages import decode, encode
from trietune.ranks.ranks import ALONE
from trietune.training.loop import step_seed

SOURCE = Path(trietune.__file__).parent


def test_values_travel_as_json_and_bytes() -> None:
    value = {"path": Path("a/b"), "blobs": [b"\x00" * 5, b"", b"x"], "numbers": [0.1, 2**60, None, True], "text": "é"}
    assert decode(encode(value)) == value
    with pytest.raises(TypeError):
        encode({"no": object()})


def test_only_the_room_of_ranks_compares_a_ranks_number() -> None:
    compares = re.compile(r"(ranks?\.number|\bRANK\b|get_rank\()")
    found = {
        path.relative_to(SOURCE).parts[0]
        for path in SOURCE.rglob("*.py")
        if compares.search(path.read_text("utf-8"))
    }  # fmt: skip
    assert found == {"ranks"}


def test_one_process_is_the_identity() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = torch.tensor(1.5)
    assert ALONE.add_up([parameter], loss, [2.0]) == (loss, [2.0])
    assert parameter.grad is None
    assert ALONE.once(lambda: 3) == ALONE.together(lambda: 3) == ALONE.in_turn(lambda: 3) == 3
    assert ALONE.mine(["part"]) == "part"
    assert ALONE.gather("x") == ["x"]


def test_rank_0_draws_what_one_process_draws_and_the_others_something_else() -> None:
    class Second:
        def seed_words(self, words: list[int]) -> list[int]:
            return [*words, 1]

    # A word of 0 at the end would be no word at all.
    assert np.random.SeedSequence([23, 5, 0]).generate_state(1) == np.random.SeedSequence([23, 5]).generate_state(1)
    assert step_seed(23, 5) != step_seed(23, 5, Second())  # type: ignore[arg-type]


def test_rank_0_calls_once_and_all_get_its_value(pool: Pool) -> None:
    results = pool.run(3, jobs.seam, "once")
    assert results == [({"a": b"\x00\xff", "b": [1, 2.5, None]}, calls) for calls in (1, 0, 0)]


def test_what_rank_0_raises_ends_all_with_its_code_and_is_said_once(pool: Pool) -> None:
    first, *others = pool.run(3, jobs.seam, "once fails")
    assert first[0] == "UserError"
    assert {other[0] for other in others} == {"FailedElsewhere"}
    assert {one[2] for one in (first, *others)} == {4}


def test_an_error_of_one_rank_ends_all(pool: Pool) -> None:
    results = pool.run(3, jobs.seam, "together fails")
    assert [result[0] for result in results] == ["FailedElsewhere", "UserError", "FailedElsewhere"]
    assert {result[2] for result in results} == {2}


def test_one_rank_on_a_machine_goes_first(pool: Pool) -> None:
    first, *others = pool.run(3, jobs.seam, "turns")
    assert all(other[0] >= first[1] for other in others)


def test_ranks_that_differ_are_named(pool: Pool) -> None:
    results = pool.run(3, jobs.seam, "agree")
    assert [same for same, _ in results] == [None, None, None]
    differing = [different for _, different in results]
    assert differing[0][0] == "UserError"
    assert "the version of torch differs" in differing[0][1]
    assert re.search(r"rank 0 \(host .*, process \d+\): 2\.0; rank 2 \(host .*, process \d+\): 2\.1", differing[0][1])
    assert {one[0] for one in differing[1:]} == {"FailedElsewhere"}


def test_a_stop_of_one_rank_stops_all_after_the_step_that_told_them(pool: Pool) -> None:
    results = pool.run(3, jobs.seam, "stop")
    assert [before for before, _ in results] == [None, None, None]
    assert [after for _, after in results] == [("StopRequested", "SIGTERM", 143)] * 3


def test_gradients_and_numbers_are_summed_in_one_message(pool: Pool) -> None:
    results = pool.run(3, jobs.seam, "add up")
    for number, (here, nowhere, one, loss, dtype, numbers, words) in enumerate(results):
        assert here == [6.0] * 3
        assert nowhere is None
        assert one == [1.0] * 3
        assert (loss, dtype) == (3.0, "torch.float32")
        assert numbers == [3.0, 30.0]
        assert words == ([23, 5] if number == 0 else [23, 5, number])
