"""Tiny random models of every causal family of transformers: does each answer by its ids alone?

    python -m research.families [--family NAME ...] [--output docs/families.md]

Each family's configuration is made small, windows and the like included, and its model filled with random weights in
float32. The engine is then compared with plain forward passes of whole texts by transformers: with a KV cache, rolled
back, in parts, at several last positions, in a batch, and after another sequence. A family is right, or refused when it
is loaded, with a sentence. Each family has a process of its own, with a time limit, since some crash.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mixlm.engines.requests import LogitsRequest
from mixlm.engines.tokenizer_setup import error_summary
from mixlm.engines.toy import toy_text
from mixlm.engines.transformers.dummy_weights import dummy_tokens
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.self_test import total_variation
from mixlm.errors import MixlmError

SECONDS = 40  # of processor time of one family
TOLERANCE = 1e-4  # total variation, float32
_LARGEST_TOLERANCE = 1e-3  # of families that multiply roundings
LENGTH = 44  # tokens, more than five times the windows below
VOCABULARY = 160
COLUMNS = ("cached", "rolled back", "in parts", "last positions", "after another", "in a batch")
_LAYERS = 4

# By the name of a field, wherever it stands in a configuration; the first pattern that matches.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|n_tokens|vocab_size_per_layer_input", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers", _LAYERS),
    (r"num_key_value_heads|n_kv_heads?|num_global_key_value_heads|swa_num_key_value_heads|num_kv_heads", 2),
    (r"((en|de)coder_)?(num_)?(attention_)?heads|num_attention_heads|n_heads?|swa_num_attention_heads", 4),
    (r"hidden_size|d_model|n_embd|dim|model_dim|embed_dim|word_embed_proj_dim|embedding_size|emb_dim", 32),
    (r"(global_|swa_|attention_)?head_dim|d_kv|kv_channels|v_head_dim|qk_(nope|rope)_head_dim|qk_head_dim", 8),
    (r"rotary_dim", 4),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"index_(n|num)_heads|index_heads|o_groups", 2),
    (r"index_head_dim", 16),
    (r"index_topk|sliding_window|window_size|attention_window_size|attention_chunk_size|local_window|block_length", 8),
    (r"\w*intermediate_size\w*|\w*ffn_(hidden_)?(dim|size)|d_ff|n_inner|dim_ff|mlp_hidden_size", 48),
    (r"num_experts_per_tok\w*|top_k_experts|moe_top_?k|num_selected_experts|experts_per_token|moe_num_active\w*", 2),
    (r"(moe_)?num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts|num_shared_experts|num_expert_groups?", 1),
    (r"max_position_embeddings|n_positions|max_seq_len\w*|n_ctx|max_sequence_length|max_target_positions", 512),
    (r"original_max_position_embeddings", 16),
    (r"hidden_size_per_layer_input", 8),
    (r"\w*token_id|\w*_id", 3),
)


def _shrink(fields: Mapping[str, Any], layers: list[int], count: int) -> dict[str, Any]:
    """Return a configuration's fields with small sizes. layers: which of its `count` layers are kept."""
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key == "per_layer_config" and value:
            numbers = {int(layer): part for layer, part in value.items()}
            chosen = [(index, layer) for index, layer in enumerate(layers) if layer in numbers]
            small[key] = {index: _shrink(numbers[layer], layers, count) for index, layer in chosen}
        elif isinstance(value, dict):
            small[key] = _shrink(value, layers, count)
        elif isinstance(value, list) and len(value) == count and count > 1:
            small[key] = [value[layer] for layer in layers]
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes = (size for pattern, size in _SIZES if re.fullmatch(pattern, key))
            small[key] = min(value, next(sizes, value)) if value > 0 else value
        else:
            small[key] = value
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if fields.get("head_dim") == sum(fields.get(f"qk_{part}_head_dim") or 0 for part in ("nope", "rope")):
        small["head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


# What the families need beyond that; `None` removes a field, so that the class derives it again.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3], "mamba_expand": 2},
    "granitemoehybrid": {
        **{**_MAMBA, "mamba_expand": 2},
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "bailing_hybrid": {"linear_head_dim": 8, "linear_num_heads": 4},
    "blenderbot": {"encoder_layers": _LAYERS},
    "blt": {
        **{f"{part}_config.hidden_size_global": 32 for part in ("encoder", "decoder")},
        "encoder_hash_byte_group_vocab": 50,
    },
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _ALTERNATING},
    },
    "dbrx": {
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
        "attn_config.kv_n_heads": 2,
        "ffn_config.moe_top_k": 2,
    },
    "dots1": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "layer_types": _ALTERNATING,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "dots3_note_text": {"head_dim": 16},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 2, "layer_types": _ALTERNATING, "intermediate_size": [48] * _LAYERS},
        **{"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "laurel_rank": 8},
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "ministral": {"head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "qwen4_exp_text": {
        **{f"linear_{part}_head_dim": 8 for part in ("key", "value")},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_lowrank": 8},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 4, "ple_layer_ids": [1], "eos_token_id": 3, "heads_per_ngram": 2},
        **{"ngram_vocab_size_base": 50, "split_ngram_parts": 1, "ple_embed_dim": 32},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "rwkv": {"attention_hidden_size": 32},
    "xlnet": {"d_head": 8},
    "xlstm": {"embedding_dim": 32, "num_heads": 2, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"mamba_d_state": 8, "mamba_dt_rank": 2, "attention_hidden_size": None, "attention_head_dim": None},
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 4, "mamba_headdim": None, "kv_channels": None},
        **{"attention_hidden_size": None, "attention_head_dim": None, "hybrid_layer_ids": None},
    },
}

# What transformers itself does not run on the ids of a text alone.
_NO_TEXT = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it drafts from the states of a main model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "it writes audio in codebooks"),
}


def tiny_config(family: str) -> Any:
    """Return a family's configuration with small sizes; that of its text model, where that is all of its causal one."""
    config_class = CONFIG_MAPPING[family]
    fields = config_class().to_dict()
    text = config_class().get_text_config(decoder=True)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if causal is not None and type(text) is not config_class and not issubclass(config_class, causal.config_class):
        return tiny_config(text.model_type)
    count = int(getattr(text, "num_hidden_layers", 0) or 0)
    types = list(getattr(text, "layer_types", None) or ["layer"] * count)
    # One of each type, then the first ones, in their order.
    first = [types.index(kind) for kind in dict.fromkeys(types)]
    rest = [layer for layer in range(count) if layer not in first]
    layers = sorted((first + rest)[:_LAYERS])
    for key in ("transformers_version", "architectures", "dtype", "id2label", "label2id"):
        fields.pop(key, None)
    small = _shrink(fields, layers, count)
    for key, value in _OVERRIDES.get(family, {}).items():
        part: dict[str, Any] = small
        *path, last = key.split(".")
        for name in path:
            part = part[name]
        if value is None:
            part.pop(last, None)
        else:
            part[last] = value
    return config_class(**small)


def tiny_model(family: str) -> Any:
    """Return a family's model with random weights, larger than fresh ones so that logits depend on what is read."""
    torch.manual_seed(0)
    config = tiny_config(family)
    if hasattr(config, "is_decoder"):
        config.is_decoder = _OVERRIDES.get(family, {}).get("is_decoder", config.is_decoder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)  # of a model of several modalities
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.25)
            elif name.endswith("bias") and parameter.dim() == 1:
                parameter.normal_(std=0.1)
    return model


class _Reference:
    """Logits by transformers alone: each of a forward pass of the whole text, without a KV cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[bytes, np.ndarray] = {}
        # Frequencies of dynamic NTK stay those of a longer text until a short one comes.
        self._remembers = '"dynamic"' in model.config.to_json_string()
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        key = ids.tobytes()
        if key not in self._known:
            with torch.no_grad():
                if self._remembers:
                    self._model(input_ids=torch.tensor(ids[None, :1]), **self._options)
                self._known[key] = self._model(input_ids=torch.tensor(ids[None]), **self._options).logits[0, -1].numpy()
        return self._known[key]

    def noise(self, ids: np.ndarray) -> float:
        """Return what a change of the embeddings by one unit in the last place changes: a total variation."""

        def rounded(_: Any, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
            return embeddings.nextafter(embeddings.flip(-1))

        handle = self._model.get_input_embeddings().register_forward_hook(rounded)
        try:
            with torch.no_grad():
                changed = self._model(input_ids=torch.tensor(ids[None]), **self._options).logits[0, -1].numpy()
        finally:
            handle.remove()
        return total_variation(changed, self(ids))


def _ways(engine: HFEngine, texts: list[np.ndarray]) -> Iterator[tuple[str, Any]]:
    """Yield what is done with an engine: the name of a column, and pairs of a text and the logits after it."""

    def request(session: Any, ids: np.ndarray, last: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
        [rows] = engine.respond([(session, LogitsRequest(0, ids, last))])
        return [(ids[: len(ids) - last + 1 + index], row) for index, row in enumerate(rows)]

    text, other, third = texts
    session = engine.session()
    steps = [pair for end in range(1, LENGTH + 1) for pair in request(session, text[:end])]
    yield "cached", [*steps[:3], *steps[3::5], *steps[-2:]]
    yield "rolled back", [pair for end in (30, 29, 12, 40, 3, 24) for pair in request(session, text[:end])]
    session = engine.session()
    yield "in parts", [pair for end in (5, 19, 21, 38, LENGTH) for pair in request(session, text[:end])]
    session = engine.session()
    yield (
        "last positions",
        [
            pair
            for end, last in ((12, 6), (20, 3), (31, 11), (LENGTH, 18))
            for pair in request(session, text[:end], last)
        ],
    )
    session = engine.session()
    request(session, other[:33])
    joined = np.concatenate([other[:9], third[:20]])
    yield "after another", [*request(session, text[:21]), *request(session, other[:20]), *request(session, joined, 4)]
    sessions = [engine.session() for _ in texts]
    pairs = []
    for ends in ((7, 40, 1), (8, 41, 19), (30, 20, 20), (31, 42, 44)):
        prefixes = [ids[:end] for ids, end in zip(texts, ends, strict=True)]
        requests = [(session, LogitsRequest(0, ids, 1)) for session, ids in zip(sessions, prefixes, strict=True)]
        pairs += [(ids, rows[-1]) for ids, rows in zip(prefixes, engine.respond(requests), strict=True)]
    yield "in a batch", pairs


def examine(family: str) -> dict[str, Any]:
    """Return a row of the table: the way the engine runs a family and the largest distances, or why it is refused."""
    try:
        model, reference = tiny_model(family), _Reference(tiny_model(family))
        rng = np.random.default_rng(0)
        texts = [rng.integers(10, VOCABULARY - 10, LENGTH) for _ in range(3)]
        if family not in _NO_TEXT:
            reference(texts[0])
    except Exception as error:
        return {"family": family, "untested": _NO_TEXT.get(family) or error_summary(error)}
    row: dict[str, Any] = {"family": family}
    try:
        runner = load_runner(LoadedModel(model, family))
        tokens, begin = dummy_tokens(int(model.get_output_embeddings().weight.shape[0]))
        engine = HFEngine(family, toy_text(tokens, len(tokens), begin), 1 << 20, runner)
        row["runs"] = engine.details.get("forwards", "several sequences")
        row["reason"] = engine.details.get("not batched", "")
        for column, pairs in _ways(engine, texts):
            row[column] = max(total_variation(logits, reference(ids)) for ids, logits in pairs)
        if any(row[column] >= TOLERANCE for column in COLUMNS):
            noise = max(reference.noise(ids) for ids in texts)
            row["tolerance"] = min(max(TOLERANCE, 10 * noise), _LARGEST_TOLERANCE)  # every layer rounds
    except MixlmError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["fault"] = f"{type(error).__name__} was raised: {error_summary(error)}"
    return row


def examine_apart(family: str) -> dict[str, Any]:
    """Return a row of the table, computed in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.write(write, json.dumps(examine(family)).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        return {"family": family, "untested": f"it took more than {SECONDS} s of processor time"}
    row: dict[str, Any] = json.loads(content) if content else {"family": family, "fault": f"ended with status {status}"}
    return row


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a family's answers are equal in every way, or it is refused."""
    tolerance = row.get("tolerance", TOLERANCE)
    return "fault" not in row and all(row[column] < tolerance for column in COLUMNS if column in row)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page with the table."""
    right = [row for row in rows if "runs" in row and is_right(row)]
    refused = [row for row in rows if "refused" in row]
    untested = [row for row in rows if "untested" in row]
    wrong = [row for row in rows if not is_right(row)]
    lines = [
        "# Model families",
        "",
        f"Every causal family of transformers {transformers.__version__}, as a tiny random model in float32, against",
        "forward passes of whole texts by transformers alone: `python -m research.families`. "
        f"{len(right)} of {len(rows)} give",
        f"equal answers, {len(refused)} are refused when they are loaded, {len(untested)} are not tested,",
        f"and {len(wrong)} are wrong. The figures are the largest total variation of a next-token distribution,",
        "0 below 1e-6. They may be larger than 1e-4 where a change of the embeddings by one unit in the last place",
        "changes a distribution by a tenth of that.",
        "",
        "*Runs*: *several sequences* run in one forward pass with KV caches; *one sequence* runs at a time with",
        "its cache, *with snapshots* of a recurrent state to roll back to, or *token by token* where a pass from the",
        "state can have one token only; *one whole text* is run for every token. *Reason*: why no batches.",
        "",
        f"| family | runs | {' | '.join(COLUMNS)} | reason |",
        f"|---|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for row in rows:
        if "runs" in row and ("fault" not in row and "refused" not in row):
            figures = ["0" if row[column] < 1e-6 else f"{row[column]:.0e}" for column in COLUMNS]
            lines.append(f"| {row['family']} | {row['runs']} | {' | '.join(figures)} | {row.get('reason', '')} |")
    for title, key in (("Refused", "refused"), ("Wrong", "fault"), ("Not tested", "untested")):
        if part := [row for row in rows if key in row]:
            lines += ["", f"## {title}", "", "| family | what is said |", "|---|---|"]
            lines += [f"| {row['family']} | {row[key].replace('|', '/')} |" for row in part]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Test the families and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", action="append", help="one family; may be repeated; all by default")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    examine("llama")  # what all families import is imported once
    rows = []
    for family in arguments.family or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows.append(examine_apart(family))
        print("right" if is_right(rows[-1]) else "WRONG", json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(table(rows), encoding="utf-8")
    sys.exit(0 if all(map(is_right, rows)) else 1)


if __name__ == "__main__":
    main()
