"""Prints the ids that llama.cpp gives for texts: a program of its own, since a server lives as long as its process.

python tests/models/llama_cpp_tokens.py TEXTS.json WAYS MODEL.gguf...

WAYS: plain, special to read control tokens from the texts too, whole with what stands in front of a text; or several of
them, such as plain,special. It prints the ids by model, way and text.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import xllamacpp

texts, ways, *models = sys.argv[1:]
servers = []
all_ids = []
for model in models:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    servers.append(xllamacpp.Server(params))
    connection = http.client.HTTPConnection(urlsplit(servers[-1].listening_address).netloc)
    all_ids.append([])
    for way in ways.split(","):
        all_ids[-1].append([])
        for text in json.loads(Path(texts).read_text("utf-8")):
            body = {"content": text, "add_special": way == "whole", "parse_special": way == "special"}
            connection.request("POST", "/tokenize", json.dumps(body))
            all_ids[-1][-1].append(json.load(connection.getresponse())["tokens"])
    connection.close()
print("IDS" + json.dumps(all_ids), flush=True)
os._exit(0)
