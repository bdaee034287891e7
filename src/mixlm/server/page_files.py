"""The files of the page, and the paths under which they are served."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FOLDER = files("mixlm.server") / "page"


def _paths(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable, str]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _paths(entry, f"{prefix}{entry.name}/")
            continue
        media_type = _MEDIA_TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            yield "/" if entry.name == "index.html" else f"{prefix}{entry.name}", entry, media_type


# By path: the file and its media type. Licences and notes beside them are not served.
PAGE_FILES = {path: (entry, media_type) for path, entry, media_type in _paths(_FOLDER, "/")}
