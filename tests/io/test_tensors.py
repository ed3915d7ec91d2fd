"""Our safetensors bytes are the library's, and what is not exactly so is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trietune.io import safetensors as tensors
from trietune.io.safetensors import RawTensor, TensorError

DTYPES = st.sampled_from(["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "|u1", "|b1", "<u2", "<u4", "<u8"])
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)))
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="._"), min_size=1, max_size=30)


@given(st.dictionaries(NAMES.filter(lambda name: ".." not in name and name != "__metadata__"), ARRAYS, max_size=6))
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(arrays: dict[str, Any]) -> None:
    ours = tensors.serialize({name: tensors.from_numpy(array) for name, array in arrays.items()})
    theirs = safetensors.numpy.save(arrays)
    for data in (ours, theirs):
        library = safetensors.numpy.load(data)
        parsed, _ = tensors.parse(data)
        assert set(library) == set(parsed) == set(arrays)
        for name, array in arrays.items():
            assert library[name].tobytes() == parsed[name].to_numpy().tobytes() == array.tobytes()
            assert parsed[name].shape == array.shape


def test_bf16_goes_through_as_bit_patterns() -> None:
    patterns = np.array([[0x3F80, 0xC000], [0x7FC0, 0x0001]], dtype=np.uint16)
    data = tensors.serialize({"w": tensors.from_numpy(patterns, dtype="BF16")}, metadata={"format": "pt"})
    found, metadata = tensors.parse(data)
    assert (found["w"].dtype, metadata) == ("BF16", {"format": "pt"})
    np.testing.assert_array_equal(found["w"].to_numpy(), patterns)
    assert safetensors.deserialize(data)[0][1]["dtype"] == "BF16"


# Numbers in a piece that is written by itself.
LARGE = 2**20 + 1


def test_pieces_give_the_same_bytes_one_at_a_time() -> None:
    alive: list[str] = []

    def make(name: str) -> RawTensor:
        def data() -> Iterator[bytes]:
            for number in range(3):
                alive.append(f"{name}{number}")
                yield name.encode() * 4 * LARGE

        return RawTensor("F32", (3 * LARGE,), data)

    lazy = {name: make(name) for name in "cab"}
    given = tensors.pieces({**lazy, "d": RawTensor("F32", (1,), b"1234"), "e": RawTensor("F32", (1,), b"5678")})
    assert next(given)[8:9] == b"{"
    assert next(given) == b"a" * 4 * LARGE
    assert alive == ["a0"], "more than one piece was asked for"
    assert [bytes(piece[:1]) for piece in given] == [b"a"] * 2 + [b"b"] * 3 + [b"c"] * 3 + [b"1"]
    text = b"".join(tensors.pieces(lazy))
    assert text == tensors.serialize(lazy)
    assert len(text) == tensors.size_bytes(lazy)


def test_a_tensor_that_gives_other_than_its_shape_says_is_an_error() -> None:
    short = {"a": RawTensor("F32", (2,), lambda: iter([b"1234"]))}
    with pytest.raises(TensorError, match="`a` has 4 bytes, its shape says 8"):
        tensors.serialize(short)


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00", "claims"),
        ((2**63).to_bytes(8, "little") + b"{}", "more than"),
        ((1000).to_bytes(8, "little") + b"{}", "the file has"),
        (header(b"[]"), "not an object"),
        (header(b"[" * 100_000), "nests deeper"),
        (header(b'{"a":1,"a":1}'), "there twice"),
        (header(b'{"a":NaN}'), "NaN"),
        (header(b"\xff\xfe{}"), "not UTF-8"),
        (header({"a": 1}), "not described"),
        (header({"a": {**entry(0, 1, [1]), "code": "x"}}, b"x"), "not described"),
        (header({"a": entry(0, 1, [1], "PICKLE")}, b"x"), "not supported"),
        (header({"a": entry(0, 1, [True])}, b"x"), "list of counts"),
        (header({"a": entry(0, 1, [1.0])}, b"x"), "list of counts"),
        (header({"a": entry(0, 1, [1] * 9)}, b"x"), "list of counts"),
        (header({"a": entry(0, 4, [-2, -2])}, b"xxxx"), "list of counts"),
        (header({"a": entry(0, 1, [2**70])}, b"x"), "digits|list of counts"),
        (header({"a": entry(0, 1, [2**62, 4])}, b"x"), "does not match its shape"),
        (header({"a": entry(-1, 0, [1])}, b"x"), "two counts"),
        (header({"a": entry(1, 0, [1])}, b"x"), "lies at"),
        (header({"a": entry(0, 2, [2])}, b"x"), "lies at"),
        (header({"a": entry(0, 1, [1]), "b": entry(0, 1, [1])}, b"x"), "the one before ends"),
        (header({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"xxx"), "the one before ends"),
        (header({"a": entry(0, 1, [1])}, b"xy"), "belong to no tensor"),
        (header({"../../etc/passwd": entry(0, 1, [1])}, b"x"), "not a tensor's name"),
        (header({"a\x00b": entry(0, 1, [1])}, b"x"), "not a tensor's name"),
        (header({"a\nb": entry(0, 1, [1])}, b"x"), "not a tensor's name"),
        (header(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "half a character"),
        (header({"__metadata__": {"a": 1}}), "not text"),
        (header(b"{" + b",".join(b'"%d":{"data_offsets":0}' % n for n in range(200_000)) + b"}"), "more than"),
    ],
)  # fmt: skip
def test_what_is_not_exactly_ours_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(TensorError, match=reason):
        tensors.parse(data)


def test_missing_and_unexpected_tensors_are_counted_and_named() -> None:
    with pytest.raises(TensorError, match=r"\(5 missing: `a`, `b`, `c` and 2 more; 1 unexpected: `x`\)"):
        tensors.check_names(["x"], "abcde")
