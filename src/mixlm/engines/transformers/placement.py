"""Where the weights of a transformers model go, how they are stored there, and how much memory that takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

from mixlm.choices import QUANTIZATIONS
from mixlm.engines.registry import EngineSpec
from mixlm.engines.tokenizer_setup import error_summary, remote_code_error
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, did_you_mean

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_OFFLOAD = "disk"
# Bytes of one weight of a linear layer, with the scales of blocks of 64 in 4 bits.
_QUANTIZED_BYTES = {"bitsandbytes-4bit": 0.5625, "bitsandbytes-8bit": 1.0, "torchao-int8": 1.0}


def loading_options(spec: EngineSpec, dtype: Any, device: Any) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` that say where and how a member is loaded.

    Raises:
        ConfigError: A device is not there, or options exclude each other.
        MixlmError: A library is missing.
    """
    options: dict[str, Any] = {"device_map": {"": device}}
    if spec.device_map is not None:
        options["device_map"] = parse_device_map(spec)
    if spec.max_memory is not None:
        if not isinstance(spec.device_map, str):
            raise ConfigError("max_memory is given, and device_map does not choose devices", "use --device-map auto")
        options["max_memory"] = {_device_key(name): _memory_bytes(name, size) for name, size in spec.max_memory}
    if spec.attn is not None:
        options["attn_implementation"] = spec.attn
    if spec.quantization is not None:
        options["quantization_config"] = quantization_config(spec.quantization, dtype)
    return options


def checked_options(source: str, spec: EngineSpec, dtype: Any, device: Any) -> dict[str, Any]:
    """Return what `loading_options` does, with a device map that fits the model. Raises what `planned_memory` does."""
    options = loading_options(spec, dtype, device)
    if isinstance(options["device_map"], dict) and spec.device_map is not None:
        empty = empty_model(source, spec)
        check_device_map(options["device_map"], empty, spec.name)
        options["device_map"] = expanded_device_map(options["device_map"], empty)
    return options


def parse_device_map(spec: EngineSpec) -> str | dict[str, Any]:
    """Return a member's device map as accelerate takes it. Raises ConfigError for what is not there."""
    device_map = spec.device_map
    if spec.device != "auto":
        raise ConfigError(
            f"device is {spec.device!r} and device_map is given", "leave device out: device_map says where layers go"
        )
    if find_spec("accelerate") is None:
        raise MixlmError("device_map needs accelerate", "install: pip install 'mixlm[hf]'")
    if isinstance(device_map, str):
        if device_map not in _STRATEGIES:
            raise ConfigError(
                f"device_map is {device_map!r}; it must be one of {', '.join(_STRATEGIES)}, or a table of layers",
                did_you_mean(device_map, _STRATEGIES) or "for one device, use --device cpu",
            )
        return device_map
    placed: dict[str, Any] = {}
    for module, name in device_map or ():
        placed[module] = name if name == _OFFLOAD else _present_device(name, f"device_map[{module!r}]")
    return placed


def quantization_config(name: str, dtype: Any) -> Any:
    """Return transformers' configuration for weights that are quantised when they are loaded.

    Raises:
        ConfigError: There is no such quantisation.
        MixlmError: Its library is missing.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization is {name!r}; it must be one of {', '.join(QUANTIZATIONS)}",
            did_you_mean(name, QUANTIZATIONS) or "files that are quantised (GPTQ, AWQ, FP8) need none",
        )
    library = name.partition("-")[0]
    if find_spec(library) is None:
        raise MixlmError(f"quantization {name} needs {library}", f"install: pip install {library}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "bitsandbytes-8bit":
        if str(dtype) == "torch.float32":
            raise ConfigError(
                "quantization bitsandbytes-8bit computes in float16, and dtype is float32",
                "use dtype bfloat16 or float16, or quantization bitsandbytes-4bit",
            )
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bitsandbytes-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def fetch_revision(hub_id: str, revision: str, *, weights: bool = True) -> str:
    """Return the folder of a revision of a hub id, fetched where it is not in the cache. Raises ModelLoadError.

    weights: whether they are fetched too, not only what describes the model.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        folder: str = snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise ModelLoadError(
            f"revision {revision!r} of {hub_id} cannot be fetched: {error_summary(error)}",
            "give a branch, a tag or a commit of the repository",
        ) from error
    return folder


def planned_memory(source: str, spec: EngineSpec, dtype: Any, device: Any) -> dict[str, int]:
    """Return the bytes of weights that loading will take on each device, from the model's configuration alone.

    Files that are quantised already are counted by their size, where they are on this machine. The KV cache and
    activations come on top.

    Raises:
        ConfigError: The device map does not fit the model.
        ModelLoadError: The configuration cannot be read.
    """
    options = loading_options(spec, dtype, device)
    model = empty_model(source, spec)
    sizes = _parameter_sizes(model, spec.quantization, dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        sizes = _file_sizes(source) or sizes
    device_map = options["device_map"]
    if isinstance(device_map, str):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        limits = options.get("max_memory")
        no_split = list(getattr(model, "_no_split_modules", None) or ())
        if device_map != "sequential":
            limits = get_balanced_memory(model, limits, no_split, dtype=dtype, low_zero=device_map == "balanced_low_0")
        device_map = infer_auto_device_map(model, limits, no_split, dtype=dtype)
    check_device_map(device_map, model, spec.name or spec.model)
    memory: dict[str, int] = {}
    for name, size in sizes.items():
        place = device_map.get(_owner(name, device_map), device)  # files may hold what the model has no place for
        key = f"cuda:{place}" if isinstance(place, int) else str(place)
        memory[key] = memory.get(key, 0) + size
    return memory


def check_device_map(device_map: Mapping[str, Any], model: Any, name: str) -> None:
    """Raise ConfigError for a device map with a module that the model lacks, or without a place for some weight."""
    modules = [module for module, _ in model.named_modules()]
    weights = [weight for weight, _ in model.named_parameters(remove_duplicate=False)]
    if unknown := [key for key in device_map if key not in modules and key not in weights]:
        raise ConfigError(
            f"device_map has {unknown[0]!r}, and {name} has no module of that name",
            did_you_mean(unknown[0], modules) or f"its layers are {_example_module(modules)} and so on",
        )
    if homeless := [weight for weight in weights if _owner(weight, device_map) is None]:
        raise ConfigError(
            f"device_map leaves {len(homeless)} weights of {name} without a device, such as {homeless[0]}",
            "give every module one, or '' for all others",
        )


def expanded_device_map(device_map: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a device map in which no key lies below another: accelerate would load the weights of both twice."""
    expanded: dict[str, Any] = {}

    def place(name: str, module: Any, device: Any) -> None:
        device = device_map.get(name, device)
        prefix = f"{name}." if name else ""
        if not any(key != name and key.startswith(prefix) for key in device_map):
            expanded[name] = device
            return
        for tensor, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            expanded[prefix + tensor] = device_map.get(prefix + tensor, device)
        for child_name, child in module.named_children():
            place(prefix + child_name, child, device)

    place("", model, None)
    return {name: device for name, device in expanded.items() if device is not None}


def _example_module(modules: Sequence[str]) -> str:
    """Return the name of a model's first layer."""
    return next((module for module in modules if module.endswith(".0")), modules[-1])


def empty_model(source: str, spec: EngineSpec) -> Any:
    """Return a model without weights, on the meta device. Raises ModelLoadError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise load_error(spec, error) from error
    model.tie_weights()
    return model


def load_error(spec: EngineSpec, error: Exception) -> ModelLoadError:
    """Return the error for a model that transformers cannot load; each family fails in its own way."""
    name = spec.name or spec.model
    if "trust_remote_code" in str(error):
        return remote_code_error(name)
    reason = error_summary(error)
    hint = "give the whole folder of a causal language model"
    if given := [option for option in spec.loading_options if option != "revision"]:  # that is not to blame
        hint = f"leave out {' and '.join(given)}, or change it"
    if "Weights only load failed" in reason:
        reason, hint = "its files of weights hold Python objects, which are not run", "give a folder with safetensors"
    for frame, _ in walk_tb(error.__traceback__):  # transformers says that there are such errors, and not which
        if errors := getattr(frame.f_locals.get("loading_info"), "conversion_errors", None):
            reason = f"its files do not hold what {', '.join(sorted(errors)[:3])} is made of"
            hint = "a file of the model may be missing, or its config.json and its weights are not of one model"
    return ModelLoadError(f"{name} cannot be loaded: {reason}", hint)


def _parameter_sizes(model: Any, quantization: str | None, dtype: Any) -> dict[str, int]:
    """Return the bytes that each parameter will take."""
    import torch

    output = model.get_output_embeddings()
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    size = torch.empty(0, dtype=dtype).element_size()
    return {
        name: int(parameter.numel() * (_QUANTIZED_BYTES[quantization] if quantization and name in linear else size))
        for name, parameter in model.named_parameters()
    }


def _file_sizes(folder: str) -> dict[str, int]:
    """Return the bytes of each tensor in the safetensors files that transformers reads from a folder."""
    sizes: dict[str, int] = {}
    index = Path(folder, "model.safetensors.index.json")
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    for file in filter(Path.is_file, (Path(folder, name) for name in names)):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                sizes[name] = end - start
    return sizes


def _owner(name: str, device_map: Mapping[str, Any]) -> str | None:
    """Return the longest key of a device map that a weight lies below; None where there is none."""
    keys = [key for key in device_map if key in ("", name) or name.startswith(f"{key}.")]
    return max(keys, key=len, default=None)


def _device_key(name: str) -> int | str:
    """Return a device as accelerate's `max_memory` names it: an index for a GPU."""
    kind, _, index = _present_device(name, "max_memory").partition(":")
    return kind if kind == "cpu" else int(index or 0)


def _memory_bytes(name: str, size: str) -> int:
    """Return a size of `max_memory` in bytes. name: the device. Raises ConfigError."""
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size))
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"max_memory of {name} is {size!r}; it must be a number with a unit, 0 or more", "such as 20GiB or 500MB"
        ) from error


def _present_device(name: str | int, place: str) -> str:
    """Return a device's name. Raises ConfigError for one that is not there."""
    from mixlm.engines.transformers.model_loading import parse_device

    text = f"cuda:{name}" if str(name).isdigit() else str(name)
    try:
        return str(parse_device(text))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", error.hint) from error
