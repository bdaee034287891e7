"""Where and how a transformers model is loaded: device maps, offloading, quantisation, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_transformers_engine import build

import mixlm
from mixlm.config import parse_config, read_config
from mixlm.engines import EngineSpec, load
from mixlm.engines.contract import random_ids, uncached
from mixlm.engines.transformers.placement import empty_model, planned_memory
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, UnsupportedError
from mixlm.inspection.unloaded import load_described
from mixlm.loading import load_config
from mixlm.scoring.score import identity

SPREAD = (("model.layers.0", "disk"), ("", "cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("placed") / "tiny", "llama")


def spec(folder: Path, **options) -> EngineSpec:
    return EngineSpec(str(folder), "tiny", "float32", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": SPREAD},
        {"device_map": (("", "disk"),)},
        {"device_map": "auto", "max_memory": (("cpu", "100KB"),)},
        {"attn": "eager"},
    ],
    ids=str,
)
def test_weights_elsewhere_give_the_same_logits(folder, options):
    plain, placed = load(spec(folder)), load(spec(folder, **options))
    ids = random_ids(plain, 9)
    np.testing.assert_allclose(uncached(placed, ids, 4), uncached(plain, ids, 4), atol=1e-5)
    session = placed.session()
    session.logits(ids[:5])
    np.testing.assert_allclose(session.logits(ids), uncached(plain, ids), atol=1e-5)
    assert placed.device == torch.device("cpu")


def test_the_plan_says_what_goes_where(folder):
    sizes = {name: weight.numel() * 4 for name, weight in load(spec(folder)).model.named_parameters()}
    on_disk = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))

    def plan(dtype: torch.dtype, **options) -> dict[str, int]:
        placed = spec(folder, **options)
        return planned_memory(empty_model(str(folder), placed), str(folder), placed, dtype, torch.device("cpu"))

    assert plan(torch.float32, device_map=SPREAD) == {"disk": on_disk, "cpu": sum(sizes.values()) - on_disk}
    assert plan(torch.bfloat16) == {"cpu": sum(sizes.values()) // 2}
    limited = {"device_map": "auto", "max_memory": (("cpu:0", "1GB"),)}
    assert plan(torch.float32, **limited) == {"cpu": sum(sizes.values())}


def test_inspect_describes_a_folder_without_loading_it(folder):
    described, loaded = load_described(spec(folder, device_map=SPREAD)), load(spec(folder))
    assert described.weights_bytes == loaded.weights_bytes
    assert described.context_length == loaded.context_length
    assert described.vocabulary.size == loaded.vocabulary.size
    assert described.details["engine"] == "transformers, not loaded"
    assert described.details["memory"].startswith("cpu 0.2 MB, disk 0.0 MB") or "disk" in described.details["memory"]
    with pytest.raises(UnsupportedError, match="not loaded"):
        described.session()


def test_python_names_devices_of_max_memory_as_accelerate_does(folder):
    with pytest.raises(ConfigError, match="max_memory: device 'cuda:7' is not there"):
        mixlm.load(str(folder), device_map="auto", max_memory={7: "1GB", "cpu": "1GB"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": (("model.layers.0", 1), ("", "cpu"))}, r"device_map\['model.layers.0'\]: device 'cuda:1' is"),
        ({"device_map": (("model.layers.7", "cpu"), ("", "cpu"))}, "no module of that name .did you mean 'model"),
        ({"device_map": (("model.layers.0", "cpu"),)}, "leaves 12 weights of tiny without a device, such as model"),
        ({"device_map": "automatic"}, "device_map is 'automatic'; it must be one of auto, .*did you mean 'auto'"),
        ({"device_map": "auto", "device": "cpu"}, "device is 'cpu' and device_map is given"),
        ({"device_map": "auto", "max_memory": (("cuda:9", "1GB"),)}, "max_memory: device 'cuda:9' is not there"),
        ({"device_map": "auto", "max_memory": (("cpu", "lots"),)}, "max_memory of cpu is 'lots'; .*such as 20GiB"),
        ({"device_map": "auto", "max_memory": (("cpu", "-1GB"),)}, "max_memory of cpu is '-1GB'; .* 0 or more"),
        ({"device": "meta"}, "device 'meta' is not there"),
        ({"max_memory": (("cpu", "1GB"),)}, "max_memory is given, and device_map does not choose devices"),
        ({"quantization": "gptq"}, "quantization is 'gptq'; it must be one of bitsandbytes-4bit"),
        ({"revision": "main"}, "revision is given, and .* is on this machine"),
    ],
)
def test_what_does_not_fit_is_refused(folder, options, message):
    for loader in (load, load_described):
        with pytest.raises(ConfigError, match=message):
            loader(spec(folder, **options))


@pytest.mark.parametrize("loader", [load, load_described])
def test_without_accelerate_the_extra_is_named(folder, loader, monkeypatch):
    monkeypatch.setattr("mixlm.engines.registry.find_spec", lambda package: None if package == "accelerate" else True)
    with pytest.raises(MixlmError, match=r"needs accelerate \(install: pip install 'mixlm\[hf\]'\)"):
        loader(spec(folder))


@pytest.mark.parametrize("name", ["bitsandbytes-4bit", "torchao-int8"])
def test_a_library_that_is_missing_is_named(folder, name, monkeypatch):
    monkeypatch.setattr("mixlm.engines.transformers.placement.find_spec", lambda library: None)
    library = name.partition("-")[0]
    with pytest.raises(MixlmError, match=rf"quantization {name} needs {library} \(install: pip install {library}\)"):
        load(spec(folder, quantization=name))


def test_eight_bits_of_bitsandbytes_need_half_precision(folder, monkeypatch):
    monkeypatch.setattr("mixlm.engines.transformers.placement.find_spec", lambda library: True)
    with pytest.raises(ConfigError, match="bitsandbytes-8bit computes in float16, and dtype is float32"):
        load(spec(folder, quantization="bitsandbytes-8bit"))


@pytest.mark.parametrize(("name", "tolerance"), [("bitsandbytes-4bit", 0.5), ("torchao-int8", 0.05)])
def test_quantised_weights_take_less_memory_and_answer_alike(folder, name, tolerance):
    pytest.importorskip(name.partition("-")[0])
    plain, quantised = load(spec(folder)), load(spec(folder, quantization=name))
    assert quantised.weights_bytes < plain.weights_bytes
    ids = random_ids(plain, 9)
    session = quantised.session()
    session.logits(ids[:4])
    np.testing.assert_allclose(session.logits(ids), uncached(quantised, ids), atol=1e-4)
    distributions = [np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                     for row in (uncached(plain, ids)[0], uncached(quantised, ids)[0])]  # fmt: skip
    assert abs(distributions[0] - distributions[1]).sum() / 2 < tolerance


def test_files_that_are_quantised_are_refused_where_their_library_is_missing(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"tiny cannot be loaded: .*(optimum|gptqmodel|GPU)"):
        load(spec(tmp_path))
    described = load_described(replace(spec(tmp_path), dtype="bfloat16"))
    assert described.details["quantization"] == "gptq"
    assert described.weights_bytes == load(spec(folder)).weights_bytes  # of the files, which hold float32


def test_a_revision_is_that_of_a_hub_id_also_where_other_revisions_are_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repo / "snapshots" / "aaaa")
    other = build(repo / "snapshots" / "bbbb", "mistral")
    (repo / "refs").mkdir()
    for name, commit in (("main", "aaaa"), ("v1", "bbbb")):
        (repo / "refs" / name).write_text(commit)
    tagged = EngineSpec("org/tiny", "", "float32", revision="v1")
    engine = load(tagged)
    assert (engine.name, engine.model.config.model_type) == ("tiny", "mistral")
    assert load(replace(tagged, revision=None)).model.config.model_type == "llama"
    assert load_described(tagged).details["memory"]
    ids = ["v1", "main", None]
    assert str(other) in str(identity("org/tiny", revision="v1"))
    assert len({identity("org/tiny", revision=revision) for revision in ids}) == len(ids)


def test_attention_that_is_not_there_is_refused(folder):
    with pytest.raises(ModelLoadError, match=r"tiny cannot be loaded: .*nothing.* \(leave out attn, or change it\)"):
        load(spec(folder, attn="nothing"))


def test_other_engines_take_none_of_it():
    with pytest.raises(UnsupportedError, match="quantization and attn are given, and toy:1 runs in the engine toy"):
        load(EngineSpec("toy:1", "", quantization="torchao-int8", attn="sdpa"))


def test_a_file_and_the_configuration_carry_it(folder, tmp_path):
    (tmp_path / "e.toml").write_text(
        f'[[members]]\nmodel = "{folder}"\nengine = "hf"\ndtype = "float32"\n'
        '[members.device_map]\n"model.layers.0" = "disk"\n"" = "cpu"\n'
    )
    engine = load_config(read_config(tmp_path / "e.toml")).members[0].engine
    assert {str(parameter.device) for parameter in engine.model.parameters()} == {"meta", "cpu"}
    with pytest.raises(ConfigError, match=r"quantization is 'awq'.*'bitsandbytes-4bit'"):
        parse_config({"members": [{"model": "x", "quantization": "awq"}]}, "here")
