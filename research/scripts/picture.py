"""Make docs/reply.svg: a real completion of the demo pair, as a terminal shows it.

Usage: python -m research.scripts.picture [PROMPT]   (after `make models`)
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

WIDTH = 92
PROMPT = sys.argv[1] if len(sys.argv) > 1 else "Why is the sky blue?"
OPTIONS = ["--max-tokens", "90", "--seed", "7"]
DARK = TerminalTheme(
    (24, 26, 31),
    (214, 216, 220),
    [
        (60, 63, 70), (224, 108, 117), (152, 195, 121), (229, 192, 123),
        (97, 175, 239), (198, 120, 221), (86, 182, 194), (214, 216, 220),
    ],
    [
        (92, 99, 112), (240, 113, 120), (165, 214, 134), (240, 200, 130),
        (110, 185, 250), (210, 130, 235), (100, 200, 210), (240, 240, 242),
    ],
)  # fmt: skip
# rich's own frame names fonts to fetch; a picture in a repository uses what the reader has.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-label="A completion in a terminal, each piece in the colour of the model that wrote it">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px; \
line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def terminal_output(command: list[str]) -> str:
    """Run a command on a pseudo-terminal of WIDTH columns and return all it wrote."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = io.BytesIO()
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        output.write(data)
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed:\n{output.getvalue().decode(errors='replace')}")
    return output.getvalue().decode()


def screen(written: str) -> str:
    """Return what a spinner's lines leave on the screen: each line as it was last written."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        last = line.split("\x1b[2K")[-1].split("\r")[-1]
        for control in ("\x1b[?25l", "\x1b[?25h", "\x1b[1A"):
            last = last.replace(control, "")
        if not any(0x2800 <= ord(c) <= 0x28FF for c in last):  # a spinner, gone by then
            lines.append(last)
    return "\n".join(lines).strip("\n")


def main() -> None:
    """Write the picture."""
    shown = f'$ mixlm generate "{PROMPT}"\n'
    written = terminal_output([str(Path(sys.executable).parent / "mixlm"), "generate", PROMPT, *OPTIONS])
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text(shown, style="bold"), Text.from_ansi(screen(written)), sep="", soft_wrap=False)
    target = Path(__file__).parents[2] / "docs" / "reply.svg"
    svg = console.export_svg(title="mixlm", theme=DARK, code_format=FRAME, unique_id="reply")
    target.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")
    print(target)


if __name__ == "__main__":
    main()
