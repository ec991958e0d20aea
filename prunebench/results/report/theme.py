"""Colors and type of the page and its charts, light and dark, as CSS variables and Vega config."""

from __future__ import annotations

from typing import Any

# The eight series colors differ in lightness too, so that they can be told apart without hue;
# against `back`, every color has a contrast of at least 4.5.
LIGHT = {
    "ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e7eb", "front": "#c9d0d8", "back": "#ffffff",
    "s0": "#2563b0", "s1": "#c2410c", "s2": "#0f7b5f", "s3": "#9d3f8c", "s4": "#8a6d00",
    "s5": "#4b5a6b", "s6": "#b4232f", "s7": "#1d7fa3",
}  # fmt: skip
DARK = {
    "ink": "#e8ebee", "muted": "#a3adb8", "grid": "#2c343d", "front": "#46525e", "back": "#14181d",
    "s0": "#7db3ff", "s1": "#ff9d66", "s2": "#56d3ab", "s3": "#e79bd8", "s4": "#e0c14e",
    "s5": "#aebccb", "s6": "#ff8f98", "s7": "#74d0ef",
}  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}
SHAPES = (
    "circle", "square", "triangle-up", "diamond", "cross", "triangle-down",
    "M0,-1.4L.5,-.5L1.4,0L.5,.5L0,1.4L-.5,.5L-1.4,0L-.5,-.5Z", "M-1,-.6L0,-1L1,-.6L1,.6L0,1L-1,.6Z",
)  # fmt: skip
"""Of points: the shapes of Vega, a star and a hexagon."""
_SERIES = 8
_SCREEN_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_PAPER_FONT = "Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def vega_config(theme: str, *, paper: bool = False) -> dict[str, Any]:
    """Return the Vega-Lite config of a theme; `paper` has a white ground and a common font."""
    colors = THEMES[theme]
    font = _PAPER_FONT if paper else _SCREEN_FONT
    text = {"labelFontSize": 11.5, "titleFontSize": 12, "titleFontWeight": "normal"}
    inks = {"labelColor": colors["ink"], "titleColor": colors["muted"]}
    return {
        "background": colors["back"] if paper else None,
        "font": font,
        "view": {"stroke": None},
        "range": {"category": [colors[f"s{i}"] for i in range(_SERIES)]},
        "axis": {
            **text, **inks, "gridColor": colors["grid"], "domainColor": colors["muted"],
            "tickColor": colors["muted"], "labelLimit": 260, "titlePadding": 8,
        },
        "legend": {**text, **inks, "orient": "bottom", "labelLimit": 420, "symbolStrokeWidth": 1.6},
        "title": {
            "color": colors["ink"], "subtitleColor": colors["muted"], "anchor": "start",
            "fontSize": 13, "fontWeight": "bold", "subtitleFontSize": 11.5, "offset": 10,
        },
    }  # fmt: skip


def theme_params(theme: str) -> dict[str, str]:
    """Return the colors that charts name by a parameter, such as the ink of a dense line."""
    return {name: THEMES[theme][name] for name in ("ink", "muted", "front", "back")}
