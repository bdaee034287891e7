"""The files of the page, and the paths under which they are served."""

from __future__ import annotations

from pathlib import Path

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FOLDER = Path(__file__).with_name("page")
# By path: the file and its media type. Licences and notes beside them are not served.
PAGE_FILES = {
    f"/{file.relative_to(_FOLDER).as_posix()}".removesuffix("index.html"): (file, _MEDIA_TYPES[file.suffix])
    for file in sorted(_FOLDER.rglob("*"))
    if file.suffix in _MEDIA_TYPES
}
