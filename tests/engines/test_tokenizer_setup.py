"""A tokenizer as engines set it up: folders as transformers reads them, and the tokens around turns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA2, MISTRAL, PHI3, QWEN3
from tokenizers import AddedToken, Tokenizer, models
from trained import ALL, trained

from mixlm.engines.base import EngineSpec
from mixlm.engines.tokenizer_setup import TokenizerSetup, configured_end_ids
from mixlm.errors import ModelLoadError, TemplateError, TokenizerError
from mixlm.tokenization.tokenizer_folder import _read_backend
from mixlm.tokenization.vocabulary import token_names
from mixlm.types import Message

SPECIAL_MAP = {
    "bos_token": {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
    "eos_token": "</s>",
    "additional_special_tokens": ["<|extra|>", "<|im_end|>"],
}
DECODER = {
    "500": {"content": "<|im_start|>", "special": True, "rstrip": True, "lstrip": False, "normalized": False},
    "600": {"content": "<|later|>", "special": False, "normalized": True, "single_word": True},
    "601": {"content": "<|pad|>", "special": False},
}
FOLDERS: dict[str, dict[str, object]] = {
    "bare": {},
    "config": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}},
    "none": {"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>", "add_bos_token": True}},
    "objects": {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<eos>", "lstrip": True}}},
    "map": {"special_tokens_map.json": SPECIAL_MAP, "tokenizer_config.json": {"eos_token": "<|im_end|>"}},
    "added": {"added_tokens.json": {"<more>": 504, "<|extra|>": 505}, "special_tokens_map.json": SPECIAL_MAP},
    "decoder": {
        "tokenizer_config.json": {"added_tokens_decoder": DECODER, "pad_token": "<|pad|>", "eos_token": "</s>"},
        "special_tokens_map.json": SPECIAL_MAP,
    },
    "extra": {"tokenizer_config.json": {"additional_special_tokens": ["<|x|>"], "image_token": "<image>"}},
    "named": {"tokenizer_config.json": {"extra_special_tokens": {"audio_token": "<audio>"}, "unk_token": "<unk>"}},
    "empty": {"tokenizer_config.json": {"added_tokens_decoder": {}, "extra_special_tokens": [], "bos_token": "<s>"}},
    "template": {"tokenizer_config.json": {"chat_template": CHATML, "bos_token": "<s>"}},
    "templates": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}]
        }
    },
    "file": {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": CHATML},
    "more files": {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": "x"},
}


def write(folder: Path, files: dict[str, object], *, plain: tuple[str, ...] = ()) -> Path:
    """Write a folder with a trained tokenizer. plain: added tokens that are not special."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trained("gpt2")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def flags(token: AddedToken) -> tuple[object, ...]:
    return token.content, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
    from transformers import AutoTokenizer

    from mixlm.tokenization.tokenizer_folder import read_tokenizer

    folder = write(tmp_path / "m", FOLDERS[name])
    if "tokenizer_config.json" not in FOLDERS[name]:
        (folder / "tokenizer_config.json").write_text("{}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    reference = AutoTokenizer.from_pretrained(folder)
    actual = read_tokenizer(folder)
    assert dict(actual.named) == reference.special_tokens_map
    assert len(actual) == len(reference)
    assert {i: flags(token) for i, token in actual.backend.get_added_tokens_decoder().items()} == {
        i: flags(token) for i, token in reference.backend_tokenizer.get_added_tokens_decoder().items()
    }
    for text in ("the <s> river</s> <|im_start|>  x <|later|> y<|extra|><more> <eos>z", "Größe\n\n12345"):
        for special in (True, False):
            expected = reference(text, add_special_tokens=special)["input_ids"]
            assert actual.backend.encode(text, add_special_tokens=special).ids == expected
    expected_template = reference.get_chat_template() if reference.chat_template else None
    assert actual.chat_template == expected_template


@pytest.mark.parametrize("name", ALL)
def test_a_tokenizer_is_the_one_that_the_library_reads(name, tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizer = trained(name)
    tokenizer.add_tokens([AddedToken("<more>", lstrip=True, single_word=True), AddedToken("the", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|special|>", rstrip=True, normalized=True)])
    tokenizer.save(str(file))
    expected = Tokenizer.from_file(str(file))
    actual, vocabulary = _read_backend(file)
    assert actual.to_str() == expected.to_str()
    assert bool(vocabulary) is isinstance(expected.model, models.BPE)
    assert token_names(actual, vocabulary) == token_names(expected)


def test_tokenizers_of_other_forms_are_left_to_the_library(tmp_path):
    file = tmp_path / "tokenizer.json"
    trained("gpt2").save(str(file))
    data = json.loads(file.read_text())
    older = {**data, "model": {**data["model"], "merges": [" ".join(merge) for merge in data["model"]["merges"]]}}
    moved = [{**token, "id": token["id"] + 7} for token in data["added_tokens"]]
    cut = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    for form in (older, {**data, "truncation": cut}, {**data, "added_tokens": moved}):
        file.write_text(json.dumps(form))
        actual, vocabulary = _read_backend(file)
        assert actual.to_str() == Tokenizer.from_file(str(file)).to_str()
        assert vocabulary == {}
    file.write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ModelLoadError, match="the tokenizer of m cannot be loaded"):
        TokenizerSetup.load(str(tmp_path), "m")


def test_a_template_beside_a_processor_is_found(tmp_path):
    from mixlm.tokenization.tokenizer_folder import read_tokenizer

    assert read_tokenizer(write(tmp_path, {"chat_template.json": {"chat_template": CHATML}})).chat_template == CHATML


def test_templates_without_a_default_are_an_error_with_their_names(tmp_path):
    folder = write(tmp_path, {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "x"}]}})
    with pytest.raises(TemplateError, match=r"tokenizer_config.json has the chat templates rag, and none is 'default'"):
        TokenizerSetup.load(str(folder), "m")


def test_a_broken_template_is_an_error_with_file_member_and_line(tmp_path):
    folder = write(tmp_path, {"chat_template.jinja": "a\n{% if %}"})
    with pytest.raises(TemplateError, match=r"the chat template of m \(chat_template.jinja\), line 2: Expected an exp"):
        TokenizerSetup.load(str(folder), "m")
    good = TokenizerSetup.load(str(write(tmp_path / "good", {})), "m")
    with pytest.raises(TemplateError, match=r"the chat template of other, line 1: "):
        good.text_interface(EngineSpec("m", "other", template="{{"), 600)


def test_a_template_that_fails_is_a_note_at_load_and_an_error_at_a_prompt(tmp_path):
    folder = write(tmp_path, {"chat_template.jinja": "\n{{ messages[0] / 2 }}"})
    text = TokenizerSetup.load(str(folder), "m").text_interface(EngineSpec("m", "m"), 600)
    assert "line 2, fails: TypeError" in text.notes[-1]
    with pytest.raises(
        TemplateError, match=r"the chat template of m \(chat_template.jinja\), line 2, fails: TypeError"
    ):
        text.prompts.chat([Message("user", "x")])
    assert text.prompts.raw("x").size


TURNS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], []),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], ["\n\n", "<table>"]),
    "phi3": (PHI3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], ["<|raw|>"]),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "deepseek": (DEEPSEEK, ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], ["<think>", "</think>"]),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], ["[TOOL_CALLS]", "[", "user"]),
    "llama2": (LLAMA2, ["[INST]", "[/INST]", "<<SYS>>"], ["[x]"]),
}


def changed(folder: Path, **parts: object) -> Path:
    """Change parts of a folder's tokenizer."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


def test_padding_and_truncation_that_training_left_in_the_file_are_not_of_the_text(tmp_path):
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>", "direction": "Right", "pad_to_multiple_of": None}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    plain = write(tmp_path / "plain", {"chat_template.jinja": CHATML})
    padded = changed(
        write(tmp_path / "padded", {"chat_template.jinja": CHATML}),
        padding={"strategy": {"Fixed": 90}, **pad},
        truncation=cut,
    )
    texts = [TokenizerSetup.load(str(each), "m").text_interface(EngineSpec("m", "m"), 600) for each in (plain, padded)]
    expected, actual = (text.prompts.chat([Message("user", "a river")]).tolist() for text in texts)
    assert actual == expected
    expected, actual = (text.prompts.raw("the old bridge").tolist() for text in texts)
    assert actual == expected


def test_a_post_processor_that_the_library_panics_over_is_an_error(tmp_path):
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<absent>", "type_id": 0}}]}
    folder = changed(write(tmp_path, {}), post_processor={**processor, "pair": [], "special_tokens": {}})
    with pytest.raises(TokenizerError, match="the tokenizers library cannot encode ''"):
        TokenizerSetup.load(str(folder), "m")


@pytest.mark.parametrize("name", TURNS)
def test_what_a_template_writes_around_turns_is_control_whatever_the_file_says(name, tmp_path):
    template, control, text_tokens = TURNS[name]
    if name == "llama2":
        control = control[:2]
    files: dict[str, object] = {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}
    # A tokenizer without special tokens but these two.
    folder = write(tmp_path, {**files, "chat_template.jinja": template}, plain=(*control, *text_tokens))
    data = json.loads((folder / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in ("<s>", "</s>")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    setup = TokenizerSetup.load(str(folder), "m")
    text = setup.text_interface(EngineSpec("m", "m"), 700)
    backend = setup.tokenizer.backend
    ids = {token: backend.token_to_id(token) for token in (*control, *text_tokens)}
    assert all(ids[token] in text.vocabulary.special_ids for token in control)
    assert not any(ids[token] in text.vocabulary.special_ids for token in text_tokens)
    typed = text.prompts.chat([Message("user", " ".join(control) + "x")])
    plain = text.prompts.chat([Message("user", "x")])
    for token in control:
        assert np.sum(typed == ids[token]) == np.sum(plain == ids[token])
        assert ids[token] not in text.prompts.raw(f"a{token}b")
    assert any(ids[token] in plain for token in control)
    end = control[-1] if name not in ("mistral", "llama2") else "</s>"
    assert backend.token_to_id(end) in text.vocabulary.end_ids


def test_turn_tokens_of_a_given_template_are_control_too(tmp_path):
    folder = write(tmp_path, {}, plain=("<|turn|>", "<think>"))
    setup = TokenizerSetup.load(str(folder), "m")
    template = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}<|turn|>assistant: <think>"
    text = setup.text_interface(EngineSpec("m", "m", template=template), 600)
    turn, think = (setup.tokenizer.backend.token_to_id(token) for token in ("<|turn|>", "<think>"))
    assert turn in text.vocabulary.special_ids
    assert turn in text.vocabulary.end_ids
    assert think not in text.vocabulary.special_ids
    assert turn not in setup.text_interface(EngineSpec("m", "m"), 600).vocabulary.special_ids
    assert np.sum(text.prompts.chat([Message("user", "<|turn|>")]) == turn) == 2


def test_an_end_of_text_that_the_file_lists_as_text_is_control(tmp_path):
    folder = write(tmp_path, {}, plain=("<|stop|>",))
    (stop,) = (trained("gpt2").get_vocab_size(),)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    text = TokenizerSetup.load(str(folder), "m").text_interface(EngineSpec("m", "m"), 600)
    assert stop in text.vocabulary.end_ids
    assert stop not in text.prompts.raw("x<|stop|>")


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, {}, []),
        ({"eos_token_id": 1}, None, [1]),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [2, 3]}}, {"eos_token_id": 4}, [2, 3, 4]),
        ({"eos_token_id": [5]}, {"eos_token_id": [5, 6]}, [5, 5, 6]),
        (None, {"eos_token_id": 7}, [7]),
        ({"eos_token_id": -1}, {"eos_token_id": [-1, 8]}, [8]),
        (None, None, []),
    ],
)
def test_ends_of_text_are_those_of_both_configurations(config, generation, ends, tmp_path):
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert configured_end_ids(str(tmp_path)) == ends


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        b"\xff",
        '{"a":' * 3000,
        *(f'{{"eos_token_id": {value}}}' for value in ('"2"', "[true]", "1.5", "1099511627776")),
    ],
)
def test_a_configuration_that_is_broken_is_an_error_that_names_the_file(file, content, tmp_path):
    folder = write(tmp_path, {})
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelLoadError, match=rf"{file} cannot be read: "):
        TokenizerSetup.load(str(folder), "m")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "'list' object"),
        ('{"source": "x"}', "control"),
        ('{"control": [0], "ends": [0.5]}', "'float' object"),
        ('{"control": [], "ends": [], "colour": 1}', "it has colour, which this version does not know"),
    ],
)
def test_what_a_converted_model_says_of_itself_is_not_left_out(content, reason, tmp_path):
    folder = write(tmp_path, {})
    (folder / "mixlm.json").write_text(content)
    with pytest.raises(ModelLoadError, match=rf"mixlm.json cannot be read: .*{reason}"):
        TokenizerSetup.load(str(folder), "m")


@pytest.mark.slow
def test_a_folder_with_its_tokenizer_is_read_without_transformers(tmp_path):
    folder = write(tmp_path, FOLDERS["file"])
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from mixlm.engines.base import EngineSpec; from mixlm.engines.tokenizer_setup import TokenizerSetup\n"
        "from mixlm.types import Message\n"
        f"text = TokenizerSetup.load({str(folder)!r}, 'm').text_interface(EngineSpec('m', 'm'), 600)\n"
        "text.prompts.chat([Message('user', 'x')])\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert dict(os.environ) == before"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
