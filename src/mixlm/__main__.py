"""The program `mixlm`, and `python -m mixlm`."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def program() -> NoReturn:
    """Run `mixlm`, and end the process without freeing its memory: that of large vocabularies takes a second.

    What runs at exit still does.
    """
    codes: list[int] = []

    def end() -> None:
        with suppress(OSError, ValueError):  # of what cannot be written, the interpreter tells
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            if codes:
                os._exit(codes[0])

    atexit.register(end)  # the last to run, since everything else is imported later
    from mixlm.cli import main

    codes.append(main())
    sys.exit(codes[0])


if __name__ == "__main__":
    program()
