from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import mixlm
from mixlm.errors import ModelLoadError, ModelNotFoundError
from mixlm.models.cache import installed, remove
from mixlm.models.fetch import fetch_models
from mixlm.models.resolve import resolve


def a_folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).touch()
    return path


def test_a_folder(tmp_path, monkeypatch):
    folder = a_folder(tmp_path / "llama", "config.json")
    result = resolve(str(folder))
    assert (result.path_or_id, result.name, result.local) == (str(folder), "llama", True)
    monkeypatch.chdir(folder)
    assert resolve(".") == result


def test_a_folder_without_config(tmp_path):
    folder = a_folder(tmp_path / "llama", "small.gguf")
    with pytest.raises(ModelNotFoundError, match=r"lacks config\.json") as caught:
        resolve(str(folder))
    assert "small.gguf" in (caught.value.hint or "")


def test_a_gguf_file_that_is_not_there(tmp_path):
    a_folder(tmp_path / "x", "small-q4.gguf")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(str(tmp_path / "x" / "small-q8.gguf"))
    assert "small-q4.gguf" in (caught.value.hint or "")
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve(str(tmp_path / "y" / "small.gguf"))


def test_a_catalog_model_that_is_not_installed(tiny, pip, quiet):
    with pytest.raises(ModelNotFoundError, match="not installed") as caught:
        resolve("tiny")
    assert caught.value.hint == "mixlm models get tiny"
    fetch_models("tiny", quiet)
    result = resolve("tiny")
    assert (result.name, result.local) == ("tiny", True)


def test_a_folder_called_like_a_model_does_not_hide_it(tiny, pip, quiet, tmp_path, monkeypatch):
    a_folder(tmp_path / "here" / "tiny", "notes.txt")
    monkeypatch.chdir(tmp_path / "here")
    fetch_models("tiny", quiet)
    assert resolve("tiny").path_or_id.endswith("models/tiny")


def test_a_hub_id_is_left_to_transformers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    result = resolve("org/Model-1B")
    assert (result.path_or_id, result.name, result.local) == ("org/Model-1B", "Model-1B", False)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lost)
    with pytest.raises(ModelNotFoundError, match="hub does not answer") as caught:
        resolve("org/smollm2-135")
    assert caught.value.hint == "did you mean 'smollm2-135m'?"


def test_a_hub_id_in_the_hub_cache(tmp_path, monkeypatch):
    snapshot = a_folder(tmp_path / "snapshot", "config.json", "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    result = resolve("org/Model-1B")
    assert (result.path_or_id, result.name, result.local) == (str(snapshot), "Model-1B", True)


def test_a_slip_in_a_path_is_no_hub_id(tmp_path, monkeypatch):
    a_folder(tmp_path / "models" / "llama", "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="did you mean 'models/llama'"):
        resolve("models/lama")


@pytest.mark.parametrize(("spec", "near"), [("smolm2-135m", "'smollm2-135m'"), ("gemma-3", "'gemma-3-270m'")])
def test_a_slip_in_a_name(spec, near):
    with pytest.raises(ModelNotFoundError, match=f"did you mean {near}"):
        resolve(spec)


def test_a_name_like_nothing_lists_what_is_known(monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lost)
    with pytest.raises(ModelNotFoundError, match=r"no model 'zzz'.*known names: smollm2-135m, gemma-3-270m"):
        resolve("zzz")
    with pytest.raises(ModelNotFoundError, match="empty"):
        resolve(" ")


def test_a_name_without_owner_is_asked_of_the_hub_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert resolve("gpt2").path_or_id == "gpt2"


def test_a_file_that_is_no_model_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(ModelNotFoundError, match=r"no model 'notes.txt': not a folder, a .gguf file or a known name"):
        resolve("notes.txt")


def test_what_was_tried_is_said(tmp_path, monkeypatch):
    def lost(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lost)
    with pytest.raises(ModelNotFoundError, match=r"no folder, installed model or catalog model .* hub does not answer"):
        resolve("gpt2")


def test_a_hub_model_of_gguf_files_alone_names_them(tmp_path, monkeypatch):
    class Info:
        siblings = (type("File", (), {"rfilename": "small-q4.gguf"}), type("File", (), {"rfilename": "README.md"}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: Info())
    with pytest.raises(ModelNotFoundError, match=r"mixlm models get org/m/small-q4\.gguf"):
        resolve("org/m")
    with pytest.raises(ModelNotFoundError, match=r"mixlm models get org/m/small-q4\.gguf"):
        resolve("org/m/small-q4.gguf")
    with pytest.raises(ModelNotFoundError, match=r"has no file small-q5\.gguf .*did you mean 'small-q4\.gguf'"):
        fetch_models("org/m/small-q5.gguf")


def test_a_gguf_file_of_ones_own_is_installed_and_removed(tmp_path, quiet, write_gguf):
    file = write_gguf(tmp_path / "mine.gguf", context=64)
    [model] = fetch_models(str(file), quiet)
    assert (model.name, model.source) == ("mine", str(file))
    assert fetch_models(str(file), quiet) == [model]
    assert [installed_model.name for installed_model in installed()] == ["mine"]
    other = tmp_path / "other" / "mine.gguf"
    other.parent.mkdir()
    write_gguf(other, context=32)
    with pytest.raises(ModelLoadError, match=r"another model is installed as mine .*mixlm models rm mine"):
        fetch_models(str(other), quiet)
    assert remove("mine", quiet).name == "mine"
    assert installed() == []
    assert file.is_file()
    with pytest.raises(ModelNotFoundError, match="no model 'mine' is installed"):
        remove("mine", quiet)


@pytest.mark.parametrize(
    ("page", "hint"),
    [
        ("https://huggingface.co/org/Model-1B", "name the model by its id: org/Model-1B"),
        ("hf.co/org/Model-1B/tree/main", "name the model by its id: org/Model-1B"),
        ("https://huggingface.co/org/M/resolve/main/q/m-q4.gguf?download=true", "mixlm models get org/M/q/m-q4.gguf"),
    ],
)
def test_a_page_of_the_hub_is_no_model(page, hint, quiet, monkeypatch):
    # Also where the packages for servers are missing.
    monkeypatch.setattr("mixlm.engines.registry.find_spec", lambda name: None if name == "aiohttp" else find_spec(name))
    for look in (resolve, mixlm.load, lambda name: fetch_models(name, quiet)):
        with pytest.raises(ModelNotFoundError, match="is a page of the Hugging Face hub") as caught:
            look(page)
        assert caught.value.hint == hint


def test_an_ensemble_file_is_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="is an ensemble file, not a model"):
        resolve(str(tmp_path / "pair.toml"))
