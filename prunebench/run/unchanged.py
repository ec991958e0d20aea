"""What a run reads is what its spec was resolved to: a file may have changed in between."""

from __future__ import annotations

from prunebench.calibration.texts import TextIdentity
from prunebench.errors import CheckFailed
from prunebench.evaluate.perplexity import PerplexityTask
from prunebench.models.masks import Masks
from prunebench.results.schema import CalibrationBlock
from prunebench.run.resolve import ResolvedSpec


def require_identity(text: TextIdentity, expected: TextIdentity | None) -> None:
    """Refuse a text that is not the one of the spec.

    Raises:
        CheckFailed: It is another one.
    """
    # `resolve` hashed the text for spec_id; what was read now must be the same content
    if expected is None or (text.name, text.origin) != (expected.name, expected.origin):
        raise _changed(f"the text {text.name}", text.origin, expected.origin if expected else "")


def require_same(
    resolved: ResolvedSpec,
    calibration: CalibrationBlock | None,
    texts: list[PerplexityTask],
    masks: Masks | None,
) -> None:
    """Refuse calibration, texts and masks that are not those of the spec.

    Raises:
        CheckFailed: Some are others.
    """
    spec = resolved.spec
    if calibration is not None and calibration.origin != spec.calibration_origin:
        raise _changed("the calibration text", calibration.origin, str(spec.calibration_origin))
    protocols = tuple(text.protocol for text in texts)
    origins = tuple(text.origin for text in texts)
    # otherwise the result would be filed under the hash of another text
    if protocols != spec.ppl or origins != spec.ppl_origins:
        raise _changed("a text of --ppl", ", ".join(protocols), ", ".join(spec.ppl))
    if masks is not None and masks.origin not in spec.method_options.values():
        raise _changed("the masks", masks.origin, "what they were a moment ago")


def _changed(what: str, read: str, expected: str) -> CheckFailed:
    return CheckFailed(
        f"{what} changed while it was read",
        where=f"read {read}, wanted {expected}",
        fix="leave the files alone while a run begins, and start it again",
    )
