"""Codes of every width come back from their packed bytes, which are as few as can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from discopt_llm.packing import pack_bits, packed_size, unpack_bits

WIDTHS = range(1, 9)


def random_codes(bits: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (count,), dtype=torch.uint8, generator=generator)


@given(st.sampled_from(WIDTHS), st.integers(0, 700), st.integers(0, 2**32))
def test_codes_come_back_in_no_more_bytes_than_their_bits_take(bits: int, count: int, seed: int) -> None:
    codes = random_codes(bits, count, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-count * bits // 8),) == (packed_size(count, bits),)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_length_around_a_word_comes_back(bits: int) -> None:
    for count in range(200):
        codes = random_codes(bits, count, count)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_a_width_comes_back(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(65)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, len(codes)), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_bit_of_the_packed_bytes_is_one_bit_of_one_code(bits: int) -> None:
    """A truth that no wrong pair of inverses meets: flipping a bit changes one code by a power of two."""
    count = 64 + 16
    packed = torch.zeros(packed_size(count, bits), dtype=torch.uint8)
    seen = set()
    for place in range(8 * len(packed)):
        packed[place // 8] = 1 << place % 8
        codes = unpack_bits(packed, bits, count).tolist()
        packed[place // 8] = 0
        (at,) = (i for i, code in enumerate(codes) if code)
        seen.add((at, codes[at]))
    assert seen == {(at, 1 << bit) for at in range(count) for bit in range(bits)}


def test_codes_are_packed_in_row_major_order() -> None:
    codes = random_codes(3, 6 * 35).view(6, 35)
    assert torch.equal(pack_bits(codes.T, 3), pack_bits(codes.T.contiguous().view(-1), 3))


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_may_begin_anywhere_in_memory(bits: int) -> None:
    codes = random_codes(bits, 333)
    packed = pack_bits(codes, bits)
    for before in range(1, 9):
        slice_ = torch.cat([packed.new_full((before,), 255), packed])[before:]
        assert torch.equal(unpack_bits(slice_, bits, 333), codes)


def test_arguments_are_left_alone() -> None:
    codes = random_codes(5, 333)
    before = codes.clone()
    packed = pack_bits(codes, 5)
    assert torch.equal(codes, before)
    before = packed.clone()
    unpack_bits(packed, 5, 333).fill_(7)
    assert torch.equal(packed, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_is_the_same_on_cuda(bits: int) -> None:
    codes = random_codes(bits, 12_345)
    packed = pack_bits(codes.cuda(), bits)
    assert torch.equal(packed.cpu(), pack_bits(codes, bits))
    assert torch.equal(unpack_bits(packed, bits, len(codes)).cpu(), codes)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="width of 1 to 8 bits, got 9"):
        pack_bits(random_codes(8, 3), 9)
    with pytest.raises(ValueError, match="width of 1 to 8 bits, got 0"):
        unpack_bits(random_codes(8, 3), 0, 3)
    with pytest.raises(ValueError, match=r"codes of uint8, got torch\.int64"):
        pack_bits(torch.arange(3), 3)
    with pytest.raises(ValueError, match="codes of 3 bits, below 8, got 8"):
        pack_bits(torch.tensor([1, 8, 2], dtype=torch.uint8), 3)


def test_packed_codes_of_another_size_are_refused() -> None:
    packed = pack_bits(random_codes(3, 100), 3)
    with pytest.raises(ValueError, match=r"100 codes of 3 bits as uint8 of shape \(38,\), got torch\.uint8 \(37,\)"):
        unpack_bits(packed[:-1], 3, 100)
    with pytest.raises(ValueError, match=r"got torch\.int8 \(38,\)"):
        unpack_bits(packed.view(torch.int8), 3, 100)
