"""What the page brings with it, from their packages: Vega for charts, DataTables for the table."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from prunebench.errors import MissingResource

_PACKAGES = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables"}


def require_libraries() -> None:
    """Find out before the work whether a report can be made.

    Raises:
        MissingResource: A package of the extra is not installed.
    """
    missing = [name for module, name in _PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise MissingResource(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="the report's charts and table are made by it"
            if len(missing) == 1
            else "the report's charts and table are made by them",
            fix="pip install 'prunebench[report]'",
        )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def charts_script() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`."""
    import vl_convert

    return _inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@functools.cache
def table_script() -> str:
    """Return DataTables, with jQuery, as one script that sets `window.DataTable`.

    Raises:
        MissingResource: The file of this version of itables has another form.
    """
    spec = importlib.util.find_spec("itables")
    # the file is read without importing itables, which would import IPython where it is there
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    script = (folder / "html" / "dt_bundle.js").read_text("utf-8")
    # it is a module; an inline script exports nothing, so the export becomes an assignment
    export = re.search(r"export\{[^}]*?([\w$]+) as default[^}]*\};", script)
    if export is None:
        raise MissingResource(
            "this version of itables has no DataTables that a page can use",
            where=str(folder),
            fix="pip install 'prunebench[report]' again, with constraints.txt",
        )
    assignment = f"window.DataTable={export[1]};"
    return _inline(script[: export.start()] + assignment + script[export.end() :])


def _inline(script: str) -> str:
    """Make a script safe inside a `<script>` element: nothing in it may end or nest one."""
    # in JavaScript strings and regular expressions, \/ is / and \! is !
    return re.sub(r"<(?=/script)", r"<\\", script, flags=re.IGNORECASE).replace("<!--", r"<\!--")
