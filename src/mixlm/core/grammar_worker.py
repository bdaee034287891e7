"""Compiles the grammar on stdin and computes its first mask. `grammar_check` runs this file in a process of its own.

It imports nothing of mixlm, so that it starts fast. Arguments: limits of memory (bytes) and of the time from its first
line of output on (seconds), 0 for no limit.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

# Of the thread that compiles. It is less than other threads have: the compiler recurses, and the process ends
# where the stack does.
_STACK_BYTES = 4 << 20
# Lines of its output; the second has the seconds that compiling took.
STARTED, DONE = "started", "done"


class _Bytes:
    """A vocabulary of the 256 bytes and an end-of-text token."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Compile the grammar; the process is killed where that exceeds the limits."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    try:
        import resource
    except ImportError:  # there are no such limits on Windows
        pass
    else:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    import llguidance

    def compile_grammar(source: str) -> float:
        start = time.monotonic()
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer(_Bytes()), source, log_level=0)
        seconds = time.monotonic() - start
        if not matcher.is_error():
            matcher.compute_bitmask()
        return seconds

    print(STARTED, flush=True)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whoever started it may ignore the signal
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process; 0 is none
    threading.stack_size(_STACK_BYTES)
    with ThreadPoolExecutor(1) as pool:
        print(DONE, pool.submit(compile_grammar, sys.stdin.buffer.read().decode()).result())


if __name__ == "__main__":
    main()
