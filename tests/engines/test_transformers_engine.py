from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from trained import CORPUS, trained
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from mixlm.engines import EngineSpec
from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import assert_close, random_ids, uncached
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.transformers import runner
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.load_trial import load_runner
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.engines.transformers.runner import ForwardPath
from mixlm.errors import ConfigError, MemoryLimitError, ModelLoadError, TokenizerError
from mixlm.models.cache import ModelMetadata, write_info
from mixlm.types import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 504,
    "pad_token_id": None,
}


def _rows() -> int:
    # More rows than tokens: padding, as many models have.
    return len(trained("gpt2").get_vocab(with_added_tokens=True)) + 5


def build(folder: Path, kind: str, *, template: str | None = CHATML, tokenizer: str = "gpt2") -> Path:
    """Write a tiny random model with a trained tokenizer."""
    torch.manual_seed(0)
    rows = _rows()
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(vocab_size=rows, sliding_window=8, **SIZES)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=rows, **window, **SIZES)),
        "mamba": lambda: MambaForCausalLM(
            MambaConfig(vocab_size=rows, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=504)
        ),
        "qwen3_next": lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(
                vocab_size=rows,
                layer_types=["linear_attention", "full_attention"],
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                **SIZES,
            )
        ),
    }
    model = models[kind]()
    for parameter in model.parameters():
        # Larger weights than a fresh model has, so that its answers depend on what it reads.
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained(tokenizer), eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def load(folder: Path, **options) -> HFEngine:
    options = {"prefix_cache": 0, **options}  # what a test runs, it runs
    return HFEngine.from_pretrained(EngineSpec(str(folder), "tiny", "float32", "cpu", **options), str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(kind: str, **options) -> Path:
        key = json.dumps([kind, options])
        if key not in made:
            made[key] = build(root / f"m{len(made)}", kind, **options)
        return made[key]

    return folder


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3", "mamba", "qwen3_next", "unbatched"])
def engine(request, folders) -> HFEngine:
    if request.param == "unbatched":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mixlm.engines.transformers.attention.register", lambda model: False)
            return load(folders("gemma3"))
    return load(folders(request.param))


@pytest.fixture(scope="module")
def llama(folders) -> HFEngine:
    return load(folders("llama"))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "mamba", "qwen3_next"])
def test_logits_are_those_of_transformers(folders, kind):
    from transformers import AutoModelForCausalLM

    engine = load(folders(kind))
    ids = random_ids(engine, 30)
    reference = AutoModelForCausalLM.from_pretrained(folders(kind), dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()
    session = engine.session()
    session.logits(ids[:11])
    assert_close(session.logits(ids, 6), expected[-6:])


@pytest.mark.slow
def test_a_model_that_takes_no_cache_runs_the_whole_text_again(folders, monkeypatch):
    for kind in ("llama", "mistral", "gemma3", "mamba", "qwen3_next"):
        assert load(folders(kind)).runner.keeps_cache
        assert load(folders(kind)).notes == ()
    monkeypatch.setattr(runner, "_CACHE_NAMES", ())
    engine = load(folders("llama"))
    assert not engine.runner.keeps_cache
    assert "it runs the whole text for every token" in engine.notes[0]
    assert engine.details["not batched"] == "its forward pass takes no cache"
    ids = random_ids(engine, 9)
    session = engine.session()
    session.logits(ids[:5])
    assert_close(session.logits(ids), uncached(load(folders("llama")), ids))


@pytest.mark.slow
def test_models_run_several_sequences_at_once_where_that_gives_the_same(folders, monkeypatch):
    for kind in ("llama", "mistral", "gemma3"):
        assert load(folders(kind)).runner.batches
    for kind, path in (("mamba", "one sequence, token by token"), ("qwen3_next", "one sequence, with snapshots")):
        details = load(folders(kind)).details
        assert details["forwards"] == path
        assert details["not batched"] == "it has layers of the kind linear_attention"
        assert details["snapshots"].startswith("up to 12 of 0.00")
    monkeypatch.setattr("mixlm.engines.transformers.attention._OTHER_OPTIONS", set())
    asks_for_more = load(folders("llama"))
    assert not asks_for_more.runner.batches
    ids = random_ids(asks_for_more, 12)
    assert_close(uncached(asks_for_more, ids), uncached(load(folders("llama")), ids))


def test_roundings_that_a_state_hands_on_are_no_reason_to_run_whole_texts():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=12, tie_word_embeddings=False)
    model = MambaForCausalLM(config).eval()
    for parameter in model.parameters():  # so large that roundings grow
        torch.nn.init.normal_(parameter, std=0.5) if parameter.dim() > 1 else None
    assert load_runner(LoadedModel(model, "m")).path is ForwardPath.STEPS


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_one_forward_serves_many_sessions(folders, kind):
    engine = load(folders(kind))
    rng = np.random.default_rng(3)
    sessions = [engine.session() for _ in range(6)]
    texts = [random_ids(engine, int(rng.integers(1, 30)), i) for i in range(6)]
    for turn in range(4):
        lasts = [int(rng.integers(1, min(4, len(ids)) + 1)) for ids in texts]
        requests = [(s, LogitsRequest(0, ids, last)) for s, ids, last in zip(sessions, texts, lasts, strict=True)]
        for actual, ids, last in zip(engine.respond(requests), texts, lasts, strict=True):
            assert_close(actual, uncached(engine, ids, last))
        if turn:
            assert {session.stats.forwards[-1].batch_size for session in sessions} == {6}
        texts = [
            np.concatenate([ids[: max(1, len(ids) - 2)], random_ids(engine, int(rng.integers(3, 9)), i + turn)])
            for i, ids in enumerate(texts)
        ]


def test_a_forward_takes_no_more_tokens_than_it_may(llama, monkeypatch):
    monkeypatch.setattr(runner, "MAX_BATCH_TOKENS", 20)
    sessions = [llama.session() for _ in range(5)]
    requests = [
        (session, LogitsRequest(0, random_ids(llama, length, length)))
        for session, length in zip(sessions, (8, 9, 9, 50, 3), strict=True)
    ]
    for actual, (_, request) in zip(llama.respond(requests), requests, strict=True):
        assert_close(actual, uncached(llama, request.ids))
    assert [session.stats.forwards[0].batch_size for session in sessions] == [2, 2, 1, 1, 1]


def test_a_long_prompt_is_prefilled_in_chunks_with_the_same_logits(llama, monkeypatch):
    ids = random_ids(llama, 50)
    whole = uncached(llama, ids, 3)
    monkeypatch.setattr(runner, "MAX_BATCH_TOKENS", 16)
    session = llama.session()
    assert_close(session.logits(ids, 3), whole)
    assert_close(session.logits(ids[:45], 20), uncached(llama, ids[:45], 20))
    assert [(forward.tokens, forward.cached) for forward in session.stats.forwards] == [(50, 0), (20, 25)]


def test_the_output_layer_decides_the_rows_and_padding_has_no_bytes(llama):
    assert llama.vocabulary.size == _rows()
    assert llama.vocabulary.tokens[-5:] == (b"",) * 5
    assert llama.context_length == 4096
    assert not llama.device.type.startswith("cuda")
    assert llama.model.dtype is torch.float32


def test_ends_are_gathered_from_tokenizer_config_generation_config_and_template(tmp_path):
    folder = build(tmp_path / "m", "llama")
    tokenizer = trained("gpt2")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.token_to_id("<s>"), 505]}))
    actual = load(folder).vocabulary.end_ids
    assert actual == {504, 505, *(tokenizer.token_to_id(token) for token in ("</s>", "<s>", "<|im_end|>"))}


def test_what_a_conversion_noted_joins_the_special_tokens_and_the_ends(tmp_path):
    folder = build(tmp_path / "m", "llama")
    control, end = 300, 301
    write_info(folder, ModelMetadata("a.gguf", "", "float32", "llama", (control,), (end,), 512))
    engine = load(folder)
    assert {control, end} <= engine.vocabulary.special_ids
    assert end in engine.vocabulary.end_ids
    assert engine.vocabulary.tokens[control] == engine.vocabulary.tokens[end] == b""


def test_a_chat_prompt_is_the_templates_with_its_special_tokens(llama):
    tokenizer = trained("gpt2")
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids = llama.prompts.chat([Message("system", "x <|im_end|>"), Message("user", "the")]).tolist()
    assert [i for i in ids if i in (start, end)] == [start, end, start, end, start]
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nx <|im_end|><|im_end|>\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_given_template_takes_the_place_of_the_models_own(folders):
    engine = load(folders("llama"), template="{{ messages[0].content }}!")
    ids = engine.prompts.chat([Message("user", "the river")])
    assert b"".join(engine.vocabulary.tokens[i] for i in ids) == b"the river!"


def test_a_model_without_a_template_gets_a_plain_question_and_a_note(folders):
    engine = load(folders("llama", template=None))
    ids = engine.prompts.chat([Message("system", "Brief."), Message("user", "Why?")])
    assert b"".join(engine.vocabulary.tokens[i] for i in ids) == b"Brief.\n\nQuestion: Why?\nAnswer:"
    assert engine.stops == ("\nQuestion:",)
    assert "has no chat template" in engine.notes[0]
    assert load(folders("llama")).stops == ()


def test_a_system_message_joins_the_user_message_where_a_template_allows_none(folders):
    engine = load(folders("llama", template=NO_SYSTEM))
    ids = engine.prompts.chat([Message("system", "Brief."), Message("user", "Why?")])
    plain = b"".join(engine.vocabulary.tokens[i] or b"|" for i in ids)
    assert plain == b"|user\nBrief.\n\nWhy?|\n|assistant\n"


def test_a_template_that_refuses_the_messages_is_an_error_with_its_reason(folders):
    engine = load(folders("llama"), template="{{ raise_exception('never') }}")
    for messages in ([Message("user", "x")], [Message("system", "s"), Message("user", "x")]):
        with pytest.raises(ConfigError, match="the chat template of tiny refuses these messages: never"):
            engine.prompts.chat(messages)


def test_a_conversation_without_messages_is_refused(llama):
    with pytest.raises(ConfigError, match="message"):
        llama.prompts.chat([])


def test_a_tokenizers_own_beginning_stands_in_front_of_a_raw_text(tmp_path):
    from tokenizers import processors

    folder = build(tmp_path / "m", "llama", template=None)
    tokenizer = trained("gpt2")
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    engine = load(folder)
    assert engine.prompts.raw("the").tolist()[0] == begin
    chat = engine.prompts.chat([Message("user", "Why?")]).tolist()
    assert [i for i in chat if i in engine.vocabulary.special_ids] == [begin]
    assert chat[0] == begin


def test_a_tokenizer_that_cannot_be_mapped_to_bytes_is_refused_by_name(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = build(tmp_path / "m", "llama")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with pytest.raises(TokenizerError, match=r"the tokenizer of tiny cannot be mapped to bytes.*WordPiece"):
        load(folder)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    folder = build(tmp_path / "m", "llama")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelLoadError, match="tiny cannot be loaded"):
        load(folder)


def test_a_device_that_is_not_there_is_named_with_those_that_are(folders):
    folder = folders("llama")
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device '{device}' is not there .this machine has cpu"):
            HFEngine.from_pretrained(EngineSpec(str(folder), "tiny", "float32", device), str(folder))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_one_error_and_the_session_stays_usable(llama, monkeypatch, error):
    session, ids = llama.session(), random_ids(llama, 6)
    session.logits(ids[:3])

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(llama.model, "forward", fail)
        with pytest.raises(MemoryLimitError, match="too little memory for tiny"):
            session.logits(ids)
    assert_close(session.logits(ids), uncached(llama, ids))


def test_other_errors_of_a_forward_stay_what_they_are(llama, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(llama.model, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        llama.session().logits(random_ids(llama, 3))


def test_the_same_folder_gives_the_same_logits(folders, llama):
    ids = random_ids(llama, 9)
    np.testing.assert_array_equal(uncached(llama, ids), uncached(load(folders("llama")), ids))
