"""When a file was made, as its document says it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator


def _require_iso(text: str) -> str:
    # fromisoformat reads 20260131 and 2026-W05-6 too, which sort otherwise, or pandas does not read
    if not datetime.fromisoformat(text).isoformat().startswith(text):
        raise ValueError(f"not a time such as 2026-01-31T10:00:00+00:00: {text!r}")
    return text


Moment = Annotated[str, AfterValidator(_require_iso)]
