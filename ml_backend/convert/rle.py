"""A mask as Label Studio's brush stores it: the run-length code of thi.ng's rle-pack.

The code packs the bytes of the flattened RGBA image, bit after bit, most significant first:
32 bits number of bytes, 5 bits word size - 1, four times 4 bits run size - 1, then per run one bit
"repeated", 2 bits which run size, that many bits run length - 1, and the byte.
(https://github.com/thi-ng/umbrella, packages/rle-pack; Label Studio's page decodes with it.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["mask_from_rle", "rle_from_mask"]

_CHANNELS = 4  # red, green, blue, alpha, all alike: Label Studio looks at alpha only
_RUN_BITS = np.array((3, 4, 8, 16), np.uint32)
_VALUE_BITS = 8
_LONGEST_RUN = 2 ** int(_RUN_BITS[-1])


def rle_from_mask(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask as a brush region's `rle`.

    Args:
        mask: [H, W] bool.

    Returns:
        The bytes of the code, the very ones that `label_studio_sdk.converter.brush.mask2rle`
        returns for the mask as 0 and 255. That one builds a string run by run and takes 0.6 s for
        a ragged mask of 4000 x 3000 px.
    """
    flat = mask.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = np.diff(ends, prepend=0) * _CHANNELS
    values = flat[ends - 1]

    pieces = -(-lengths // _LONGEST_RUN)  # a long run is written as several
    size_index = np.repeat(np.searchsorted(2 ** _RUN_BITS.astype(np.int64), lengths), pieces)
    size_index = np.minimum(size_index, len(_RUN_BITS) - 1).astype(np.uint32)
    values = np.repeat(values, pieces)
    last = np.cumsum(pieces) - 1
    written = np.full(values.size, _LONGEST_RUN, np.int64)
    written[last] = lengths - (pieces - 1) * _LONGEST_RUN

    run_bits = _RUN_BITS[size_index]
    code = (np.uint32(0b100) | size_index) << run_bits | (written - 1).astype(np.uint32)
    code = code << np.uint32(_VALUE_BITS) | np.where(values, 255, 0).astype(np.uint32)
    code_bits = 1 + 2 + _VALUE_BITS + run_bits
    aligned = (code << (32 - code_bits)).astype(">u4")
    bits = np.unpackbits(aligned.view(np.uint8)).reshape(-1, 32)  # [runs, 32], the code first
    body = bits[np.arange(32) < code_bits[:, None]]
    header = f"{flat.size * _CHANNELS:032b}{_VALUE_BITS - 1:05b}" + "".join(
        f"{size - 1:04b}" for size in _RUN_BITS
    )
    stream = np.concatenate((np.array([*header], np.uint8), body))
    padding = 8 - stream.size % 8  # 1 to 8 bits, as the SDK does it
    packed: list[int] = np.packbits(np.pad(stream, (0, padding))).tolist()
    return packed


def mask_from_rle(
    rle: Sequence[int], *, size_hw: tuple[int, int], threshold: int = 127
) -> NDArray[np.bool_]:
    """Decode a brush region's `rle`.

    Masks that were painted in the browser have soft edges, and alpha values in between.

    Args:
        rle: The bytes of the code.
        size_hw: The image's size (H, W) that it was painted on.
        threshold: A pixel belongs to the mask if its alpha is above.

    Returns:
        [H, W] bool.

    Raises:
        ValueError: If the bytes are none, end too early, or are those of another size.
    """
    height, width = size_hw
    code = bytes(rle)  # which refuses what is no byte
    reader = _BitReader(code)
    size, word_bits = reader.read(32), reader.read(5) + 1
    run_bits = [reader.read(4) + 1 for _ in range(4)]
    if size != height * width * _CHANNELS or word_bits != _VALUE_BITS:
        raise ValueError(
            f"rle must hold {height} x {width} pixels of {_CHANNELS} bytes, got {size} words of "
            f"{word_bits} bits"
        )
    flat = np.empty(size, np.uint8)
    done = 0
    while done < size:
        is_run, size_index = reader.read(1), reader.read(2)
        end = done + reader.read(run_bits[size_index]) + 1
        if end > size:
            raise ValueError(f"rle must hold {size} bytes, got more")
        flat[done:end] = reader.read(word_bits) if is_run else reader.read_bytes(end - done)
        done = end
    return np.asarray(flat[_CHANNELS - 1 :: _CHANNELS].reshape(height, width) > threshold)


class _BitReader:
    """Reads numbers bit by bit, most significant first."""

    def __init__(self, code: bytes) -> None:
        self._code = code
        self._position = 0  # in bits

    def read(self, bits: int) -> int:
        """Read a number of up to 32 bits."""
        start, end = self._advance(bits)
        window = int.from_bytes(self._code[start // 8 : -(-end // 8)], "big")
        return window >> -end % 8 & (1 << bits) - 1

    def read_bytes(self, number: int) -> NDArray[np.uint8]:
        """Read so many bytes, which may begin in the middle of one."""
        start, end = self._advance(number * 8)
        window = np.frombuffer(self._code[start // 8 : -(-end // 8)], np.uint8)
        if start % 8 == 0:
            return window
        return window[:-1] << np.uint8(start % 8) | window[1:] >> np.uint8(8 - start % 8)

    def _advance(self, bits: int) -> tuple[int, int]:
        start, end = self._position, self._position + bits
        if end > len(self._code) * 8:
            raise ValueError(f"rle must be a whole code, got one that ends at byte {start // 8}")
        self._position = end
        return start, end
