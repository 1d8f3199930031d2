from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.core.errors import RequestError, RunError
from sparing.weights.stored import BITS, DROPPED, HEADER, KEPT, decode, encode, parameter


def at_random(size: int, kept: int, seed: int = 0) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


def code(record: Tensor) -> int:
    return int(record[1])


@given(st.lists(st.booleans(), max_size=200))
def test_any_mask_comes_back(flags):
    mask = torch.tensor(flags, dtype=torch.bool)
    record = encode(mask)
    assert record.dtype == torch.uint8
    assert decode(record, mask.shape).equal(mask)


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 3))
def test_random_masks_of_any_density_come_back(size, share, seed):
    mask = at_random(size, round(share * size), seed)
    assert decode(encode(mask), mask.shape).equal(mask)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (), (1,), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("value", [False, True])
def test_shapes_and_constant_masks_come_back_in_a_header(shape, value):
    mask = torch.full(shape, value)
    record = encode(mask)
    assert record.numel() == HEADER.size
    assert decode(record, shape).equal(mask)


def test_a_transposed_mask_comes_back():
    mask = at_random(60, 20).reshape(10, 6).t()
    assert decode(encode(mask), mask.shape).equal(mask)


def test_long_gaps_and_lone_entries_come_back():
    mask = torch.zeros(300_000, dtype=torch.bool)
    # one gap of all is longer than Golomb's parameter may be
    for places in ([0], [299_999], [0, 299_999], [5, 6, 7, 200_000]):
        mask.zero_()
        mask[places] = True
        assert decode(encode(mask), mask.shape).equal(mask)
        assert decode(encode(~mask), mask.shape).equal(~mask)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.3])
def test_gaps_come_within_two_hundredths_of_the_entropy(share):
    mask = at_random(200_000, round(share * 200_000))
    for record in (encode(mask), encode(~mask)):
        bits = 8 * (record.numel() - HEADER.size)
        entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        assert entropy * 200_000 <= bits * 1.001  # a random mask may lie a little below
        assert bits <= 1.02 * entropy * 200_000
    assert code(encode(mask)) == KEPT
    assert code(encode(~mask)) == DROPPED


def test_bits_are_taken_where_they_are_fewer():
    mask = at_random(80_000, 40_000)
    assert code(encode(mask)) == BITS
    assert encode(mask).numel() == HEADER.size + 10_000


@pytest.mark.parametrize(("rows", "columns"), [(24, 384), (8, 384), (8, 768)])
def test_an_adapter_s_fifth_is_stored_in_its_fifth_and_little_more(rows, columns):
    # a bottleneck's or LoRA's matrix in a small transformer, 20 % kept, header and all
    size = rows * columns
    mask = at_random(size, round(0.2 * size))
    kept, coded = int(mask.sum()), encode(mask).numel()
    assert (4 * kept + coded) / (4 * size) <= 0.226
    assert (2 * kept + coded) / (2 * size) <= 0.250


@given(st.integers(1, 400), st.integers(2, 500))
def test_golomb_s_parameter_is_the_best_for_geometric_gaps(count, size):
    if count >= size:
        count = size - 1
    q = 1 - count / size
    m = parameter(count, size)

    def expected_bits(m: int) -> float:
        width = (m - 1).bit_length()
        short = (1 << width) - m
        p_short = (1 - q**short) / (1 - q**m)  # of a remainder below `short`
        return 1 / (1 - q**m) + (width - p_short if m > 1 else 0)

    assert expected_bits(m) <= expected_bits(m + 1) + 1e-9
    assert m == 1 or expected_bits(m) <= expected_bits(m - 1) + 1e-9


def test_a_record_does_not_change_unnoticed():
    # files hold this format: gaps 9, 10, 0 with m = 14 have quotients 0, remainders 9 + 2 and
    # 10 + 2 in four bits, 101|1 and 110|0, and 0 in three, 000|; streams begin with the low bits
    mask = torch.zeros(64, dtype=torch.bool)
    mask[[9, 20, 21]] = True
    record = encode(mask)
    version, kind, m, _check, size, count = HEADER.unpack(bytes(record[: HEADER.size].numpy()))
    assert (version, kind, m, size, count) == (1, KEPT, 14, 64, 3)
    assert record[HEADER.size :].tolist() == [0b000, 0b00_110_101, 0b0, 0b01]
    assert record[: HEADER.size].tolist()[:4] == [1, 1, 14, 0]


@pytest.mark.parametrize("kept", [20, 50, 90])
def test_every_flipped_bit_is_noticed(kept):
    mask = at_random(100, kept)
    record = encode(mask)
    for place in range(record.numel()):
        for bit in range(8):
            broken = record.clone()
            broken[place] ^= 1 << bit
            with pytest.raises(RunError, match="stored mask is"):
                decode(broken, mask.shape)


@pytest.mark.parametrize("kept", [20, 50, 90])
def test_a_record_cut_short_or_too_long_is_noticed(kept):
    mask = at_random(100, kept)
    record = encode(mask)
    for length in range(record.numel()):
        with pytest.raises(RunError, match="broken"):
            decode(record[:length], mask.shape)
    with pytest.raises(RunError, match="broken"):
        decode(torch.cat((record, record[-1:])), mask.shape)


def sealed(kind: int, size: int, m: int, count: int, body: list[int]) -> Tensor:
    """A record with a right checksum and any content."""
    raw = bytes(body)
    head = HEADER.pack(1, kind, m, 0, size, count)
    check = zlib.crc32(raw, zlib.crc32(head))
    whole = HEADER.pack(1, kind, m, check, size, count) + raw
    return torch.from_numpy(np.frombuffer(whole, dtype=np.uint8).copy())


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (sealed(BITS, 8, 0, 0, []), "0 bytes do not hold 8 bits"),
        (sealed(3, 8, 1, 0, []), "header is impossible"),
        (sealed(KEPT, 8, 0, 1, [0]), "header is impossible"),
        (sealed(KEPT, 8, 1, 9, [0, 0]), "header is impossible"),
        (sealed(KEPT, 8, 1, 0, [0]), "no gaps"),
        (sealed(KEPT, 8, 1, 2, [255]), "holds 0 of 2 gaps"),
        (sealed(KEPT, 8, 1, 1, [0b01111111]), None),
        (sealed(KEPT, 6, 1, 1, [0b01111111]), "leads to entry 7 of 6"),
        (sealed(KEPT, 8, 4, 3, [0]), "0 bytes are left for 3 bits"),
        (sealed(KEPT, 8, 1, 1, [0, 0]), "body has 2 bytes instead of 1"),
        (sealed(KEPT, 2**32 - 1, 2**15, 1, [0]), "another"),
    ],
)
def test_impossible_records_with_a_right_checksum_are_told(record, why):
    if why is None:
        assert decode(record, (8,)).nonzero().tolist() == [[7]]
        return
    size = int(np.frombuffer(bytes(record[8:12]), dtype="<u4")[0])
    shape = (8,) if why == "another" else (size,)
    with pytest.raises((RunError, RequestError), match=why):
        decode(record, shape)


def test_a_newer_format_and_another_shape_are_told_apart():
    record = encode(torch.ones(4, dtype=torch.bool))
    with pytest.raises(RequestError, match="has 4 entries"):
        decode(record, (5,))
    record[0] = 2
    with pytest.raises(RunError, match="is of format 2, this version reads 1"):
        decode(record, (4,))


def test_what_is_no_mask_and_no_record_is_refused():
    with pytest.raises(RequestError, match=r"a mask is of torch\.bool"):
        encode(torch.ones(3))
    with pytest.raises(RequestError, match="vector of uint8"):
        decode(torch.zeros(30), (3,))
