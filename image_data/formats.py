"""Image files: which ones are read, what is in them, and what a damaged one raises."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from PIL import Image, ImageFile, ImageOps

from runtime.bounds import MOST_SIDE
from runtime.errors import UserError, reason
from runtime.files import EXTENSIONS

#: Files that tools.dataset_tool converts.
CONVERTIBLE = EXTENSIONS | {".bmp", ".gif", ".tif", ".tiff"}
#: The decoders that Pillow may try, whatever the name of a file: some others start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
#: What decoding a damaged file may raise.
DAMAGE = (
    ArithmeticError, BadZipFile, EOFError, LookupError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, tarfile.TarError, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Raise UserError if reading ``path`` fails because it is damaged.

    An OSError of the system, such as a missing permission, is passed on.
    """
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} cannot be read ({reason(error)}): fetch it again") from error


def open_image(data: bytes) -> ImageFile.ImageFile:
    """An image file, not decoded yet.

    Raises one of ``DAMAGE`` if it is none, or if its pixels would fill the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MOST_SIDE**2:
        raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_SIDE}^2")
    return image


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an open image has more than 8 bits per channel.

    Pillow silently drops the lower 8 of 16 if there are several channels.
    """
    deep_tiles = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
    return deep_tiles or image.mode.startswith(("I", "F"))


def decode(data: bytes) -> Image.Image | None:
    """An image file (the first frame of several) as RGB, rotated by its EXIF orientation.

    Gray, palette and CMYK images become RGB by Pillow's rules, without colour profiles; alpha is
    composited over white.  None for more than 8 bits per channel.
    """
    with open_image(data) as image:
        if is_deep(image):
            return None
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
