"""Small integers packed to their true width.

A width is cut into pieces of 4, 2 and 1 bits (3 = 2 + 1, low bits first), and each piece has a plane. In the plane of
w-bit pieces a byte holds 8 / w of them, which lie a whole stretch of codes apart: unpacking is one shift and one mask
over the plane for each stretch, on eight bytes at a time, and no code is ever moved sideways. Planes hold a multiple
of 64 codes; the few behind them follow as one string of bits, low bits first. Nothing is lost to padding but the end
of the last byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "packed_size", "unpack_bits"]

_UNIT = 64  # codes: the plane of one bit of so many is one 64-bit word
_EVERY_BYTE = 0x0101010101010101


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 of any shape and below 2^bits, in row-major order -> (ceil(N * bits / 8),) uint8, where they are.

    Raises ValueError for a width outside 1..8, another data type, or a code that is too wide.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"expected codes of uint8, got {codes.dtype}")
    codes = codes.reshape(-1)
    if len(codes) and (highest := int(codes.max())) >= 1 << bits:
        raise ValueError(f"expected codes of {bits} bits, below {1 << bits}, got {highest}")
    whole = len(codes) // _UNIT * _UNIT
    planes = [_pack_plane(codes[:whole], offset, width) for offset, width in _pieces(bits)]
    return torch.cat([*planes, _pack_string(codes[whole:], bits)])


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: (ceil(count * bits / 8),) uint8 -> (count,) uint8, on the same device.

    Raises ValueError for a width outside 1..8 or packed codes of another size.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"expected {count} codes of {bits} bits as uint8 of shape ({packed_size(count, bits)},), "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    if packed.storage_offset() % 8 or packed.data_ptr() % 8:  # a slice of a file; 64-bit words must be aligned
        packed = packed.clone()
    codes = packed.new_empty(count)
    whole = count // _UNIT * _UNIT
    at = 0
    for offset, width in _pieces(bits):
        size = whole * width // 8
        _unpack_plane(packed[at : at + size], codes[:whole], offset, width)
        at += size
    codes[whole:] = _unpack_string(packed[at:], bits, count - whole)
    return codes


def _pieces(bits: int) -> list[tuple[int, int]]:
    """The lowest bit and the width of every piece."""
    pieces, offset = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            pieces.append((offset, width))
            offset += width
    return pieces


def _pack_plane(codes: Tensor, offset: int, width: int) -> Tensor:
    """The bits offset..offset + width - 1 of codes (N,) -> (N * width / 8,)."""
    stretches = codes.view(8 // width, -1)
    plane = torch.zeros_like(stretches[0])
    for i, stretch in enumerate(stretches):
        plane |= (stretch >> offset & (1 << width) - 1) << i * width
    return plane


def _unpack_plane(plane: Tensor, codes: Tensor, offset: int, width: int) -> None:
    """Put a plane's bits into codes (N,), which hold the bits below `offset` already, or nothing if it is 0."""
    words = plane.view(torch.int64)
    mask = _signed(((1 << width) - 1 << offset) * _EVERY_BYTE)  # what a shift brings in from the next byte, it cuts off
    for i, stretch in enumerate(codes.view(torch.int64).view(8 // width, -1)):
        shift = i * width - offset
        shifted = words >> shift if shift > 0 else words << -shift
        if offset == 0:
            torch.bitwise_and(shifted, mask, out=stretch)
        else:
            stretch |= shifted.bitwise_and_(mask)


def _pack_string(codes: Tensor, bits: int) -> Tensor:
    """(N,) codes -> (ceil(N * bits / 8),), one after another; for a few codes."""
    string = (codes[:, None] >> _steps(bits, codes) & 1).reshape(-1)
    string = torch.cat([string, string.new_zeros(-len(string) % 8)]).view(-1, 8)
    return (string << _steps(8, codes)).sum(1, dtype=torch.uint8)


def _unpack_string(packed: Tensor, bits: int, count: int) -> Tensor:
    string = (packed[:, None] >> _steps(8, packed) & 1).reshape(-1)[: count * bits].view(count, bits)
    return (string << _steps(bits, packed)).sum(1, dtype=torch.uint8)


def _steps(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected a width of 1 to 8 bits, got {bits}")
