"""Prints the ids that llama.cpp gives for texts: a program of its own, since a server lives as long as its process.

python tests/models/llama_cpp_tokens.py MODEL.gguf TEXTS.json [special]

special: control tokens are read from the texts.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
server = xllamacpp.Server(params)
all_ids = []
for text in json.loads(Path(sys.argv[2]).read_text("utf-8")):
    body = json.dumps({"content": text, "add_special": False, "parse_special": sys.argv[3:] == ["special"]}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
    with urllib.request.urlopen(request) as response:
        all_ids.append(json.load(response)["tokens"])
print("IDS" + json.dumps(all_ids), flush=True)
os._exit(0)
