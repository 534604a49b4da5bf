"""PNG files that Pillow reads but cannot write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png16(channels: int, kind: int, side: int = 2) -> bytes:
    """side x side random pixels with 16 bits per channel; ``kind`` is the colour type of PNG."""
    rows = b"".join(
        b"\0" + np.random.default_rng(y).bytes(2 * side * channels) for y in range(side)
    )
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, kind, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts
    )
