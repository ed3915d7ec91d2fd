"""PyTorch tensors become bytes and come back, in one go and in pieces."""

from __future__ import annotations

import pytest
import torch

from trietune.io.directory import LazyContent
from trietune.io.safetensors import parse
from trietune.model.adapter import tensors as raw_tensors
from trietune.model.adapter.tensors import bytes_to_tensors, copy_into, tensors_to_content

TENSORS = {
    "matrix": torch.arange(185.0).view(37, 5), "transposed": torch.arange(45.0).view(5, 9).t(),
    "number": torch.tensor(3.0), "no rows": torch.empty(0, 3), "no columns": torch.empty(3, 0),
    "half": torch.arange(11).bfloat16(), "wide rows": torch.arange(120.0).view(3, 40), "counts": torch.arange(5),
}  # fmt: skip


def test_pieces_give_the_bytes_of_the_whole_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors_to_content(TENSORS)
    assert isinstance(whole, bytes)
    monkeypatch.setattr(raw_tensors, "_PIECE_BYTES", 64)
    monkeypatch.setattr(raw_tensors, "STREAMED_ABOVE_BYTES", 1000)
    pieces = tensors_to_content(TENSORS)
    assert isinstance(pieces, LazyContent)
    assert pieces.size_bytes == len(whole)
    assert b"".join(pieces.pieces()) == b"".join(pieces.pieces()) == whole
    found = bytes_to_tensors(whole)
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", TENSORS)
def test_numbers_are_put_into_tensors_of_any_layout_and_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_tensors, "_PIECE_BYTES", 64)
    data = tensors_to_content({name: TENSORS[name]})
    assert isinstance(data, bytes)
    raw = parse(data)[0][name]
    for live in (torch.empty_like(TENSORS[name]), torch.zeros(TENSORS[name].shape, dtype=torch.float64)):
        copy_into(live, raw)
        assert torch.equal(live.double(), TENSORS[name].double())
    parameter = torch.nn.Parameter(torch.zeros(TENSORS[name].shape))
    copy_into(parameter, raw)
    assert torch.equal(parameter.detach().double(), TENSORS[name].double())
