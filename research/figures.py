"""What all figures have in common: style, colours, files. Needs matplotlib (the extra `paper`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlm.errors import ConfigError, MixlmError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which all readers can tell apart.
BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
# Lines and marks differ too, for print without colours.
MIXTURE: Mapping[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o"}
CONVENTIONAL: Mapping[str, Any] = {"color": RED, "linestyle": "--", "marker": "s", "markerfacecolor": "white"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "mixlm",
    "savefig.dpi": 200,
}
_FORMS = (".png", ".svg")
_COLOURS = 64


def require(path: Path | None = None) -> None:
    """Raise MixlmError when matplotlib is missing, ConfigError for a file that is no figure."""
    if path is not None and path.suffix.lower() not in _FORMS:
        raise ConfigError(f"the figure's file is {path.name}", f"its name ends in {' or '.join(_FORMS)}")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise MixlmError(f"figures need matplotlib: {error}", "pip install 'mixlm[paper]'") from error


def save(figure: Figure, *paths: Path) -> None:
    """Write a figure as SVG, or as PNG with a palette, by each path's name; without the date, to compare files."""
    for path in paths:
        if path.suffix.lower() == ".svg":
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        else:
            figure.savefig(path, bbox_inches="tight")
            _reduce_to_palette(path)


def _reduce_to_palette(path: Path) -> None:
    """Store a PNG with 64 colours, which takes a third of the space and looks the same."""
    from PIL import Image  # matplotlib depends on it

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
