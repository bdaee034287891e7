"""Members that share weights: other prompts and LoRA adapters on one copy of a model."""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_transformers_engine import build
from transformers import AutoModelForCausalLM

from mixlm.config import parse_config, read_config
from mixlm.engines import EngineSpec
from mixlm.engines.base import total_weight_bytes
from mixlm.engines.contract import assert_close, random_ids, uncached
from mixlm.engines.transformers import adapters
from mixlm.engines.transformers.engine import HFEngine
from mixlm.engines.transformers.loaded_model import LoadedModel
from mixlm.errors import MixlmError, ModelLoadError, UnsupportedError
from mixlm.inspection import inspect
from mixlm.inspection.unloaded import load_described
from mixlm.loading import load_config
from mixlm.types import Message
from mixlm.verification.check import check

TARGETS = {"a": ["q_proj", "v_proj", "down_proj"], "b": ["k_proj", "o_proj", "up_proj", "v_proj"]}


def adapter(folder: Path, base: Path, **options) -> Path:
    """Write a random LoRA adapter of a model."""
    torch.manual_seed(len(folder.name))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, LoraConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = build(root / "base", "llama")
    member_options = {name: adapter(root / name, base, target_modules=targets) for name, targets in TARGETS.items()}
    return {"base": base, **member_options}


def spec(folders: dict[str, Path], **options) -> EngineSpec:
    return EngineSpec(str(folders["base"]), "tiny", "float32", "cpu", **options)


@pytest.fixture(scope="module")
def base(folders) -> HFEngine:
    return HFEngine.from_pretrained(spec(folders), str(folders["base"]))


@pytest.fixture(scope="module")
def engines(folders, base) -> dict[str | None, HFEngine]:
    """The model without an adapter and with either, on one copy of the weights."""
    return {None: base, **{name: base.with_spec(spec(folders, adapter=str(folders[name]))) for name in TARGETS}}


def merged(folders: dict[str, Path], name: str | None, ids: np.ndarray) -> np.ndarray:
    """The logits after the last of `ids` of a model of its own, with the adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    if name is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, folders[name]).merge_and_unload()
    with torch.inference_mode():
        return model(torch.tensor(ids[None]), use_cache=False).logits[0, -1:].float().numpy()


@pytest.mark.slow
def test_logits_are_those_of_merged_models_in_any_order(folders, engines):
    ids = random_ids(engines[None], 12)
    sessions = {name: engine.session() for name, engine in engines.items()}
    outputs = {}
    for end, name in [(4, "a"), (7, None), (5, "b"), (9, "a"), (12, "b"), (11, None), (12, "a"), (12, None)]:
        outputs[name] = sessions[name].logits(ids[:end])
        assert_close(outputs[name], merged(folders, name, ids[:end]))
    for left, other in [(None, "a"), (None, "b"), ("a", "b")]:
        assert np.abs(outputs[left] - outputs[other]).max() > 0.1


def test_each_sequence_has_a_cache_of_its_own(engines):
    ids = random_ids(engines[None], 9)
    first_session, second_session = engines["a"].session(), engines["b"].session()
    for end in (3, 6, 9):
        first_session.logits(ids[:end])
        second_session.logits(ids[:end])
    assert [(f.tokens, f.cached) for f in first_session.stats.forwards] == [(3, 0), (3, 3), (3, 6)]
    assert_close(first_session.logits(ids), uncached(engines["a"], ids))
    assert_close(second_session.logits(ids), uncached(engines["b"], ids))


def test_weights_are_held_once(folders, engines):
    base, a, b = engines.values()
    assert a.model is b.model is base.model
    member_options = {name: engine.weights_bytes - base.weights_bytes for name, engine in engines.items()}
    files = {name: (folders[name] / "adapter_model.safetensors").stat().st_size for name in TARGETS}
    for name in TARGETS:
        assert 0.5 * files[name] < member_options[name] < files[name]
    assert total_weight_bytes(engines.values()) == base.weights_bytes + member_options["a"] + member_options["b"]
    assert total_weight_bytes([a, a]) == a.weights_bytes
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    assert size == total_weight_bytes(engines.values())


def test_inspect_says_what_members_on_one_model_will_take_before_it_is_loaded(folders, engines, monkeypatch):
    monkeypatch.setattr(HFEngine, "from_pretrained", lambda *_: 1 / 0)
    specs = [spec(folders), *(spec(folders, adapter=str(folders[name])) for name in TARGETS)]
    described = [load_described(each) for each in [*specs, replace(specs[1], system="x")]]
    assert described[1].details["adapter"] == str(folders["a"])
    assert [engine.weights_bytes for engine in described[:3]] == [engine.weights_bytes for engine in engines.values()]
    assert total_weight_bytes(described) == total_weight_bytes(engines.values())


def test_the_same_adapter_twice_is_loaded_once(folders, engines):
    before = total_weight_bytes(engines.values())
    path = str(folders["base"].parent / "a")
    again = engines["b"].with_spec(spec(folders, adapter=path, template="{{ messages[0].content }}"))
    assert total_weight_bytes([*engines.values(), again]) == before
    ids = random_ids(again, 5)
    assert_close(uncached(again, ids), uncached(engines["a"], ids))


@pytest.mark.slow
def test_sequences_take_beginnings_of_texts_from_their_own_adapter_only(folders, engines):
    ids = random_ids(engines["a"], 40, 9)
    engines["a"].drop_prefixes()
    for _ in range(2):
        for name, engine in engines.items():
            np.testing.assert_allclose(engine.session().logits(ids), merged(folders, name, ids), atol=1e-4)
    again = engines["b"].with_spec(spec(folders, adapter=str(folders["b"]), template="{{ messages[0].content }}"))
    for engine in [*engines.values(), again]:
        session = engine.session()
        session.logits(ids)
        assert session.stats.cached_tokens == 39  # whatever the template: the ids are the same
    engines["a"].drop_prefixes()
    engines["a"].session().logits(ids)
    assert [engine.session().cached_tokens(ids) for engine in engines.values()] == [
        0,
        *(39 * (n == "a") for n in TARGETS),
    ]


@pytest.mark.slow
def test_threads_do_not_switch_each_others_adapters(engines):
    ids = random_ids(engines[None], 30)
    expected = {name: uncached(engine, ids) for name, engine in engines.items()}
    wrong = []

    def work(name: str | None) -> None:
        for _ in range(20):
            actual = uncached(engines[name], ids)
            if np.abs(actual - expected[name]).max() > 1e-3:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in [*engines, *engines]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_switch_that_is_interrupted_is_made_again(base, engines, monkeypatch):
    ids = random_ids(base, 5)
    expected = {name: uncached(engine, ids) for name, engine in engines.items()}
    uncached(base, ids)

    class Interrupted:
        def __setattr__(self, name: str, value: object) -> None:
            raise KeyboardInterrupt

    layers = base.loaded.adapters.layers
    with monkeypatch.context() as patched:
        patched.setattr(base.loaded.adapters, "layers", [*layers[:5], Interrupted(), *layers[5:]])
        with pytest.raises(KeyboardInterrupt):
            uncached(engines["a"], ids)
    for name in ("a", None, "b"):
        assert_close(uncached(engines[name], ids), expected[name])


def members(folders: dict[str, Path], *overrides: dict, **options):
    specs = [{"model": str(folders["base"]), "dtype": "float32", "device": "cpu", **options} for options in overrides]
    return load_config(parse_config({"members": specs, **options}, "here"))


@pytest.mark.slow
def test_an_ensemble_over_adapters_and_prompts_holds_one_model_and_samples_the_exact_distribution(folders):
    seen = []
    plain = "{% for m in messages %}{{ m.content }} {% endfor %}"
    variants = [{}, {"adapter": str(folders["a"])}, {"system": "the river"}, {"template": plain}]
    config = {
        "members": [
            {"model": str(folders["base"]), "dtype": "float32", "device": "cpu", **options} for options in variants
        ]
    }
    ensemble = load_config(parse_config(config, "here"), weights=[0.4, 0.3, 0.2, 0.1], progress=seen.append)
    assert len(seen) == 1
    assert ensemble.names == ("base", "base+a", "base-2", "base-3")
    assert len({id(member.engine.model) for member in ensemble.members}) == 1
    sizes = [member.engine.weights_bytes for member in ensemble.members]
    assert (
        total_weight_bytes(member.engine for member in ensemble.members) == sizes[1] > sizes[0] == sizes[2] == sizes[3]
    )
    assert check(ensemble, "the bird", samples=600, options={"top_k": 6}).equal
    actual = inspect(ensemble, measure=False)
    assert actual.weights_bytes == sizes[1]
    assert [member.shares for member in actual.members] == [None, "base", "base", "base"]
    assert actual.members[1].details["adapter"] == str(folders["a"])
    assert actual.members[3].reading["template"] == "given"
    prompts = [member.prompt for member in actual.members]
    assert prompts[0] == prompts[1]
    assert "<|im_start|>system\nthe river<|im_end|>" in prompts[2]
    assert prompts[3] == "Why is the sky blue? "


def test_members_that_differ_in_nothing_share_an_engine_and_other_weights_are_loaded(folders):
    ensemble = members(folders, {}, {}, {"system": "x"}, {"dtype": "bfloat16"})
    first, second, third, fourth = (member.engine for member in ensemble.members)
    assert first is second is not third
    assert third.model is first.model is not fourth.model


def test_members_that_differ_in_their_prompts_alone_are_run_in_one_forward(folders):
    ensemble = members(folders, {"system": "x"}, {"system": "the river"}, {"adapter": str(folders["a"])}, {})
    settings = ensemble.settings(method="conventional", seed=1, max_tokens=3, ignore_end=True)
    sessions = [member.engine.session() for member in ensemble.members]
    ensemble.context(settings, sessions).start(ensemble.encode_prompt("u", settings)).finish()
    assert [{forward.batch_size for forward in session.stats.forwards} for session in sessions] == [{3}, {3}, {1}, {3}]


def test_a_members_own_system_message_stands_in_front_of_others(folders):
    [engine] = (member.engine for member in members(folders, {"system": "one <|im_end|>"}).members)
    user = Message("user", "u")

    def read(*messages: Message) -> str:
        ids = engine.prompts.chat(messages).tolist()
        return b"".join(engine.vocabulary.tokens[i] or b"|" for i in ids).decode()

    assert read(user) == "|system\none <|im_end|>|\n|user\nu|\n|assistant\n"
    assert read(Message("system", "two"), user) == "|system\none <|im_end|>\n\ntwo|\n|user\nu|\n|assistant\n"
    assert engine.prompts.raw("u").tolist() == engine.encoder.encode(b"u").ids


@pytest.mark.slow
def test_a_models_only_member_may_have_an_adapter(folders):
    [engine] = (member.engine for member in members(folders, {"adapter": str(folders["a"]), "name": "poet"}).members)
    ids = random_ids(engine, 6)
    assert_close(uncached(engine, ids), merged(folders, "a", ids))
    assert engine.name == "poet"


def test_an_adapter_is_found_beside_the_ensemble_file(folders):
    path = folders["base"].parent / "e.toml"
    path.write_text('[[members]]\nmodel = "base"\nadapter = "a"\n')
    [member] = read_config(path).members
    assert member.adapter == str(folders["a"])


def test_an_adapter_that_is_not_there_is_named(folders, tmp_path):
    with pytest.raises(ModelLoadError, match=r"the adapter .*nothing cannot be loaded.*adapter_config\.json"):
        members(folders, {"adapter": str(tmp_path / "nothing")})


def test_an_adapter_of_another_model_is_refused_and_leaves_the_model_as_it_was(folders, base, tmp_path):
    ids = random_ids(base, 6)
    before = uncached(base, ids)
    other = build(tmp_path / "other", "mamba")
    wrong = adapter(tmp_path / "wrong", other, target_modules=["in_proj"])
    with pytest.raises(ModelLoadError, match=r"the adapter .*wrong does not fit tiny.*trained on this model"):
        base.with_spec(spec(folders, adapter=str(wrong)))
    shapes = adapter(tmp_path / "shapes", folders["base"], target_modules=["q_proj"], r=4)
    from safetensors.torch import load_file, save_file

    file = shapes / "adapter_model.safetensors"
    save_file({key: tensor[:, :-1].contiguous() for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelLoadError, match=r"the adapter .*shapes does not fit another"):
        base.with_spec(replace(spec(folders, adapter=str(shapes)), name="another"))
    assert_close(uncached(base, ids), before)


def test_an_adapter_that_changes_the_model_itself_is_refused(folders, base, tmp_path):
    saved = adapter(tmp_path / "head", folders["base"], target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match=r"replaces lm_head of the model, which other members share .merge it"):
        base.with_spec(spec(folders, adapter=str(saved)))


def test_another_kind_of_adapter_is_refused_by_name(folders, base, tmp_path):
    IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((folders["a"] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UnsupportedError, match=r"is of the kind IA3 .LoRA adapters can be switched"):
        base.with_spec(spec(folders, adapter=str(tmp_path)))


def test_a_toy_takes_a_system_message_and_no_adapter():
    ensemble = load_config(parse_config({"members": [{"model": "toy:1", "system": "one"}, {"model": "toy:1"}]}, "here"))
    first, second = (len(member.engine.prompts.chat([Message("user", "two")])) for member in ensemble.members)
    assert first > second
    with pytest.raises(UnsupportedError, match="toy:1 is a toy, which takes no adapter"):
        load_config(parse_config({"members": [{"model": "toy:1", "adapter": "x"}]}, "here"))


@pytest.mark.parametrize("model", ["shape:smollm2-135m", "http://localhost:1"])
def test_what_has_no_weights_of_its_own_takes_no_adapter(model):
    with pytest.raises(UnsupportedError, match=f"{model} takes no adapter"):
        load_config(parse_config({"members": [{"model": model, "adapter": "x"}]}, "here"))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("mixlm.engines.transformers.adapters.find_spec", lambda _: None)
    with pytest.raises(Exception, match=r"the adapter x needs peft .install: pip install 'mixlm\[peft\]'"):
        LoadedModel(torch.nn.Linear(1, 1), "tiny").add("x", "tiny")


def refusal(folders, base, folder: Path) -> str:
    """Return why an adapter is refused; the model without adapters is as before, to the last bit."""
    ids = random_ids(base, 9)
    before = uncached(base, ids, 9)
    with pytest.raises(MixlmError) as raised:
        base.with_spec(spec(folders, adapter=str(folder)))
    np.testing.assert_array_equal(uncached(base, ids, 9), before)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_are_initialised_out_of_the_models_weights_are_refused(folders, base, tmp_path, kind):
    folder = adapter(tmp_path / "it", folders["base"], target_modules=["q_proj"], init_lora_weights=kind)
    assert f"changes the weights of the model, which other members share (init_lora_weights is '{kind}')" in refusal(
        folders, base, folder
    )


@pytest.mark.parametrize(
    "options",
    [
        {"alora_invocation_tokens": [3, 4]},
        {"trainable_token_indices": [3, 4]},
        {"layer_replication": [[0, 2], [0, 2]]},
    ],
    ids=str,
)
def test_adapters_that_are_more_than_a_switch_are_refused_by_the_field_that_says_so(folders, base, tmp_path, options):
    folder = adapter(tmp_path / "it", folders["base"], target_modules=["q_proj"], **options)
    assert f"has {next(iter(options))}" in refusal(folders, base, folder)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "LORA"))
def test_every_other_kind_of_adapter_is_refused_by_its_name(folders, base, tmp_path, kind):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert str(tmp_path) in refusal(folders, base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"layers_to_transform": [1]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_plain_adapters_of_every_shape_give_what_peft_gives(folders, base, tmp_path, options):
    ids = random_ids(base, 9)
    before = uncached(base, ids, 9)
    folder = adapter(tmp_path / "it", folders["base"], **{"target_modules": ["q_proj", "v_proj"], **options})
    weights = load_file(folder / "adapter_model.safetensors")
    noise = {
        name: weight + 0.1 * torch.randn_like(weight) if "lora_" in name else weight for name, weight in weights.items()
    }
    save_file(noise, folder / "adapter_model.safetensors")
    engine = base.with_spec(spec(folders, adapter=str(folder)))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
        expected = PeftModel.from_pretrained(model, folder)(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    assert_close(uncached(engine, ids, 9), expected)
    assert np.abs(expected - before).max() > 0.05
    np.testing.assert_array_equal(uncached(base, ids, 9), before)


def test_an_adapter_whose_file_replaces_embeddings_is_refused(folders, base, tmp_path):
    folder = adapter(tmp_path / "it", folders["base"], target_modules=["embed_tokens"])
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    assert "it replaces model.embed_tokens.weight of the model" in refusal(folders, base, folder)


def test_an_adapter_that_peft_runs_otherwise_is_refused(folders, base, tmp_path, monkeypatch):
    folder = adapter(tmp_path / "it", folders["base"], target_modules=["q_proj"])
    own = adapters.peft_logits
    monkeypatch.setattr(adapters, "peft_logits", lambda *arguments: own(*arguments).flip(0))
    assert "another distribution than PEFT's own forward pass" in refusal(folders, base, folder)


def test_an_adapter_whose_file_lacks_a_weight_is_refused(folders, base, tmp_path):
    folder = adapter(tmp_path / "it", folders["base"], target_modules=["q_proj", "v_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "lora_B" not in name}, folder / "adapter_model.safetensors"
    )
    assert "its file lacks" in refusal(folders, base, folder)
