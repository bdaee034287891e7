"""The program `mixlm`, and `python -m mixlm`."""

import atexit
import os
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

# Names of the frames above `program` where it is the process's program: the script that pip installs, and `-m`.
_AS_PROGRAM = (["<module>"], ["<module>", "_run_code", "_run_module_as_main"])


def program() -> NoReturn:
    """Run `mixlm`, and end the process without freeing its memory: that of large vocabularies takes a second.

    What runs at exit still does. In a process that is more than this program, the memory is freed as ever.
    """
    frame: FrameType | None = sys._getframe(1)
    callers: list[str] = []
    while frame is not None:
        callers.append(frame.f_code.co_name)
        frame = frame.f_back
    codes: list[int] = []

    def end() -> None:
        with suppress(OSError, ValueError):  # of what cannot be written, the interpreter tells
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            if codes:
                os._exit(codes[0])

    # It has to be the last to run, so the first to be registered.
    if callers in _AS_PROGRAM and atexit._ncallbacks() == 0:
        atexit.register(end)
    try:
        from mixlm.cli import main

        codes.append(main())
    except KeyboardInterrupt:  # before `main` could take it
        print("mixlm: interrupted", file=sys.stderr)
        codes.append(130)
    sys.exit(codes[0])


if __name__ == "__main__":
    program()
