"""Colours and markers, in a light and a dark version, and figures as SVG that follow the page.

The colours are Okabe and Ito's, which colour-blind readers tell apart, a little darker on white
and lighter on black; strategies differ in their markers as well.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...atomic import write_atomically

# Each role's CSS variable, and its colour on light and on dark ground. Figures are drawn in the
# light colours, which are all different, and these are then replaced by the variables.
COLOURS = {
    "--paper": ("#fffffe", "#15181c"),
    "--ink": ("#1b1f24", "#e6e8eb"),
    "--muted": ("#5c6670", "#a0a8b1"),
    "--rule": ("#dde1e6", "#353b42"),
    "--ordinary": ("#5a5f66", "#b3bac2"),
    "--blue": ("#0072b2", "#56b4e9"),
    "--orange": ("#c85200", "#ff9447"),
    "--green": ("#00835f", "#3fcfa2"),
    "--purple": ("#a3478a", "#e59cca"),
    "--ochre": ("#8a6a00", "#e3bf3a"),
    "--teal": ("#17727f", "#66cfdd"),
}
_STRATEGIES = {
    "cubic scaled": ("--blue", "o"),
    "linear unscaled": ("--orange", "s"),
    "cubic unscaled": ("--green", "^"),
    "linear scaled": ("--purple", "D"),
    "squared scaled": ("--ochre", "v"),
    "squared unscaled": ("--teal", "P"),
}
PAPER, INK, MUTED, RULE, ORDINARY = (
    COLOURS[name][0] for name in ("--paper", "--ink", "--muted", "--rule", "--ordinary")
)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# matplotlib numbers these in each figure; on a page with several they would not be unique.
_NUMBERED = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_FONT_FAMILY = re.compile(r"font: ([^;\"]*?px) [^;\"]*")


@dataclass(frozen=True)
class Look:
    """How a strategy is drawn: its colour on light ground, and its marker."""

    colour: str
    marker: str


def looks(strategies: Sequence[str]) -> dict[str, Look]:
    """Of the strategies in one figure, all different as far as the colours go.

    A strategy looks the same in every report. One with further options (cached, say) takes a
    colour and a marker that no other here has.
    """
    own = {name: _STRATEGIES[name] for name in strategies if name in _STRATEGIES}
    taken = {*own.values(), *(_STRATEGIES[base] for s in strategies if (base := _base(s)))}
    spare = [look for look in _STRATEGIES.values() if look not in taken] + [("--ink", "X")]
    others = [name for name in strategies if name not in own]
    own |= {name: spare[min(i, len(spare) - 1)] for i, name in enumerate(others)}
    return {name: Look(COLOURS[own[name][0]][0], own[name][1]) for name in strategies}


def _base(strategy: str) -> str | None:
    """The strategy without further options."""
    words = " ".join(strategy.split()[:2])
    return words if words in _STRATEGIES else None


def css_variables(dark: bool) -> str:
    """The declarations of all colours."""
    return " ".join(f"{name}: {pair[dark]};" for name, pair in COLOURS.items())


def settings() -> dict[str, Any]:
    """matplotlib's settings for all figures."""
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.titlecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "text.color": INK,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "axes.unicode_minus": True,
    }


def save(figure: Any, path: Path, title: str) -> str:
    """Write PATH.png and PATH.svg, and return the SVG for the page."""
    import matplotlib

    figure.get_layout_engine().execute(figure)  # once, not for each file
    figure.set_layout_engine("none")
    dots = io.BytesIO()
    figure.savefig(dots, format="png", dpi=160, metadata={"Software": None})
    write_atomically(path.with_suffix(".png"), dots.getvalue())
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # unique and unchanging names
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = _themed(text.getvalue(), title)
    alone = (
        f"<style>:root {{ {css_variables(dark=False)} }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}</style>"
    )
    first_tag_ends = svg.index(">") + 1
    whole = svg[:first_tag_ends] + alone + svg[first_tag_ends:] + "\n"
    write_atomically(path.with_suffix(".svg"), whole)
    return svg


def _themed(svg: str, title: str) -> str:
    """The <svg> element alone, in the page's colours and type, with a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = _NUMBERED.sub("", svg)
    svg = _FONT_FAMILY.sub(lambda found: f"font: {found[1]} {_FONT}", svg)
    for name, (light, _) in COLOURS.items():
        svg = re.sub(light, f"var({name})", svg, flags=re.IGNORECASE)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
