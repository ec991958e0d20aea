"""Short names for people: `wiki` for a protocol's id, `Wanda` for `my_package.pruners:Wanda`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from prunebench.options import options_of
from prunebench.spec import RunSpec

_USUAL_SEQLEN = options_of(RunSpec)["ppl_seqlen"].value
_VERSION = re.compile(r"v[\d.]+")
_MODULE = re.compile(r"[^\s+]*:")


def short_protocol(protocol: str) -> str:
    """Return `wiki` for `wiki-sample/held-out/512/v1`, `arc_easy` for a task's id.

    The window is named where it is not the default of `--ppl-seqlen`: `wikitext2@2048`.
    """
    parts = protocol.split("/")
    if parts[0] == "lm-eval" and len(parts) > 2:
        return parts[1]
    if len(parts) > 2 and parts[2].isdigit():
        text, _, seqlen, *rest = parts
        name = text.removesuffix("-raw").removesuffix("-sample")
        name += "" if int(seqlen) == _USUAL_SEQLEN else f"@{seqlen}"
        return "/".join([name, *(part for part in rest if not _VERSION.fullmatch(part))])
    return protocol


def short_text(name: str) -> str:
    """Return `c4` for `c4-sample/rest`, the part of a text that is calibrated on."""
    return name.removesuffix("/rest").removesuffix("-sample")


def kind_of_text(name: str) -> str:
    """Return `wiki` for a text and for a protocol that scores it, whatever part of it they take."""
    # WikiText and wiki-sample are both of Wikipedia
    return "wiki" if name.startswith("wiki") else short_text(name.split("/")[0])


def short_method(name: str) -> str:
    """Return the class of a `module:Class`, and any other name as it is.

    Of a method with a recovery, `wanda + my_package:Mine`, each part is shortened.
    """
    return _MODULE.sub("", name)


def short_names(names: Iterable[str], shorten: Callable[[str], str]) -> dict[str, str]:
    """Return a short name for each.

    Where several would share a short name, the parts between slashes in which they differ stand
    behind it: `piqa/first-100` and `piqa/first-500`. A name keeps its long form where that is no
    shorter, or does not tell it apart.
    """
    names = list(dict.fromkeys(names))
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(shorten(name), []).append(name)
    short = {}
    for first, group in alike.items():
        shared = set.intersection(*(set(name.split("/")) for name in group))
        for name in group:
            own = [part for part in name.split("/") if part not in shared]
            short[name] = "/".join([first, *own])
    counts = Counter(short.values())
    return {
        name: short[name] if counts[short[name]] == 1 and len(short[name]) <= len(name) else name
        for name in names
    }
