"""A real server of vLLM over a tiny model, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

_STARTED_WITHIN = 240.0


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A model of two layers with a byte vocabulary, as transformers saves it, and real enough for vLLM to run."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    vocabulary = {name: i for i, name in enumerate([*names, "<end>", "<turn>", "ab", "cd"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<end>", "<turn>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM runs on a CPU
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=256,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@contextmanager
def served(
    model: Path, *options: str, port: int = 0, plugin: bool = True, key: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """vLLM's server in a process of its own, and its URL."""
    if port == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    environment = {
        "VLLM_PLUGINS": "mixlm" if plugin else "",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16"]
    command += ["--block-size", "32", "--enforce-eager", "--kv-cache-memory-bytes", "100000000"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--generation-config", "vllm", *options]
    command += ["--api-key", key] if key else []
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + _STARTED_WITHIN
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), urlopen(f"{url}/health", timeout=1):
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"vLLM did not start: {' '.join(command)}")
            yield process, url
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            # Its workers are processes of their own, and outlive a server that is killed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
