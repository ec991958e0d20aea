"""Decode text files: UTF-8 only; any other encoding is named in the error."""

from __future__ import annotations

import codecs
from pathlib import Path

from prunebench.errors import IncompatibleData

_MARKS = {  # UTF-32 first: its byte order mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_GZIP = b"\x1f\x8b"
_NUL_SHARE = 0.1  # half of Latin text in UTF-16 is NUL, and NUL is valid UTF-8


def decode_text(data: bytes, path: Path) -> str:
    """Decode UTF-8 and drop a byte order mark; line ends are not converted.

    Args:
        data: The bytes of the file, decompressed.
        path: The file, for the error.

    Raises:
        IncompatibleData: It is empty, blank, compressed, or in another encoding.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise _encoded(path, name, "the mark at its beginning says so")
    if data.startswith(_GZIP):
        raise IncompatibleData(
            f"{path} is compressed with gzip", fix="give it a name that ends in .gz, or unpack it"
        )
    if data.count(0) > len(data) * _NUL_SHARE:
        raise _encoded(path, "UTF-16", f"{data.count(0):,} of its {len(data):,} bytes are zero")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IncompatibleData(
            f"{path} is not UTF-8 text",
            where=f"byte {data[error.start]:#x} at position {error.start:,}: {error.reason}",
            fix="convert it: iconv -f ISO-8859-1 -t UTF-8 OLD > NEW, or whatever it is in",
        ) from None
    if not text.strip():
        raise IncompatibleData(
            f"{path} is empty" if not text else f"{path} holds nothing but white space",
            fix="name a file with text in it",
        )
    return text


def _encoded(path: Path, name: str, why: str) -> IncompatibleData:
    return IncompatibleData(
        f"{path} is {name} text, and only UTF-8 is read",
        where=why,
        fix=f"convert it: iconv -f {name} -t UTF-8 OLD > NEW",
    )
