"""Where the weights of a transformers model go, how they are stored there, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int, get_balanced_memory
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from mixlm.choices import QUANTIZATIONS
from mixlm.engines.base import EngineSpec
from mixlm.engines.transformers.model_loading import load_error, parse_device
from mixlm.errors import ConfigError, MixlmError, did_you_mean

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# Bytes of one weight of a linear layer, with the scales of blocks of 64 in 4 bits.
_QUANTIZED_BYTES = {"bitsandbytes-4bit": 0.5625, "bitsandbytes-8bit": 1.0, "torchao-int8": 1.0}


def loading_options(spec: EngineSpec, dtype: Any, device: Any, empty: Callable[[], Any]) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` that say where and how a member is loaded.

    dtype: of the weights that are not quantised. device: where there is no device map. empty: makes the model without
    weights, see `empty_model`, which a table of layers must fit.

    Raises:
        ConfigError: A device is not there, or options exclude each other or do not fit the model.
        MixlmError: A library is missing.
    """
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if spec.device_map is not None:
        options["device_map"] = _device_map(spec, empty)
    if spec.max_memory is not None:
        if not isinstance(spec.device_map, str):
            raise ConfigError("max_memory is given, and device_map does not choose devices", "use --device-map auto")
        options["max_memory"] = dict(_memory_limit(*limit) for limit in spec.max_memory)
    if spec.attn is not None:
        options["attn_implementation"] = spec.attn
    if spec.quantization is not None:
        options["quantization_config"] = _quantization_config(spec.quantization, dtype)
    return options


def _device_map(spec: EngineSpec, empty: Callable[[], Any]) -> str | dict[str, Any]:
    """Return a member's device map as accelerate takes it."""
    device_map = spec.device_map
    if spec.device != "auto":
        raise ConfigError(
            f"device is {spec.device!r} and device_map is given", "leave device out: device_map says where layers go"
        )
    if isinstance(device_map, str):
        if device_map not in _STRATEGIES:
            raise ConfigError(
                f"device_map is {device_map!r}; it must be one of {', '.join(_STRATEGIES)}, or a table of layers",
                did_you_mean(device_map, _STRATEGIES) or "for one device, use --device cpu",
            )
        return device_map
    places = {
        module: name if name == "disk" else str(_present_device(name, f"device_map[{module!r}]"))
        for module, name in device_map or ()
    }
    model = empty()
    _check_device_map(places, model, spec.name)
    return _expanded(places, model)


def _quantization_config(name: str, dtype: Any) -> Any:
    """Return transformers' configuration for weights that are quantised when they are loaded."""
    if name not in QUANTIZATIONS:
        raise ConfigError(
            f"quantization is {name!r}; it must be one of {', '.join(QUANTIZATIONS)}",
            did_you_mean(name, QUANTIZATIONS) or "files that are quantised (GPTQ, AWQ, FP8) need none",
        )
    library = name.partition("-")[0]
    if find_spec(library) is None:
        raise MixlmError(f"quantization {name} needs {library}", f"install: pip install {library}")
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


def planned_memory(model: Any, source: str, spec: EngineSpec, dtype: Any, device: Any) -> dict[str, int]:
    """Return the bytes of weights that loading will take on each device, from the model's configuration alone.

    Files that are quantised already are counted by their size, where they are on this machine. The KV cache and
    activations come on top. model: without weights, see `empty_model`. source: its folder or hub id. Raises what
    `loading_options` raises.
    """
    options = loading_options(spec, dtype, device, lambda: model)
    sizes = _parameter_sizes(model, spec.quantization, dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        sizes = _file_sizes(source) or sizes
    device_map = options["device_map"]
    if isinstance(device_map, str):
        limits = options.get("max_memory")
        no_split = list(getattr(model, "_no_split_modules", None) or ())
        if device_map != "sequential":
            limits = get_balanced_memory(model, limits, no_split, dtype=dtype, low_zero=device_map == "balanced_low_0")
        device_map = infer_auto_device_map(model, limits, no_split, dtype=dtype)
    memory: dict[str, int] = {}
    for name, size in sizes.items():
        place = device_map.get(_owner(name, device_map), device)  # files may hold what the model has no place for
        key = f"cuda:{place}" if isinstance(place, int) else str(place)
        memory[key] = memory.get(key, 0) + size
    return memory


def _check_device_map(device_map: Mapping[str, Any], model: Any, name: str) -> None:
    """Raise ConfigError for a device map with a module that the model lacks, or without a place for some weight."""
    modules = [module for module, _ in model.named_modules()]
    weights = [weight for weight, _ in model.named_parameters(remove_duplicate=False)]
    if unknown := [key for key in device_map if key not in modules and key not in weights]:
        example = next((module for module in modules if module.endswith(".0")), modules[-1])
        raise ConfigError(
            f"device_map has {unknown[0]!r}, and {name} has no module of that name",
            did_you_mean(unknown[0], modules) or f"its layers are {example} and so on",
        )
    if homeless := [weight for weight in weights if _owner(weight, device_map) is None]:
        raise ConfigError(
            f"device_map leaves {len(homeless)} weights of {name} without a device, such as {homeless[0]}",
            "give every module one, or '' for all others",
        )


def _expanded(device_map: Mapping[str, Any], model: Any) -> dict[str, Any]:
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


def empty_model(source: str, spec: EngineSpec) -> Any:
    """Return a model without weights, on the meta device. Raises ModelLoadError."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise load_error(spec, error) from error
    model.tie_weights()
    return model


def _parameter_sizes(model: Any, quantization: str | None, dtype: Any) -> dict[str, int]:
    """Return the bytes that each parameter will take."""
    output = model.get_output_embeddings()
    layers = [item for item in model.named_modules() if isinstance(item[1], torch.nn.Linear) and item[1] is not output]
    linear = {f"{name}.weight" for name, _ in layers}
    size = dtype.itemsize if quantization is None else _QUANTIZED_BYTES[quantization]
    return {
        name: int(weight.numel() * (size if name in linear else dtype.itemsize))
        for name, weight in model.named_parameters()
    }


def _file_sizes(folder: str) -> dict[str, int]:
    """Return the bytes of each tensor in the safetensors files of a folder; none where not all of them are there."""
    try:
        files = get_local_safetensors_metadata(folder).files_metadata.values()
    except (FileNotFoundError, NotASafetensorsRepoError):
        return {}
    tensors = [item for file in files for item in file.tensors.items()]
    return {name: tensor.data_offsets[1] - tensor.data_offsets[0] for name, tensor in tensors}


def _owner(name: str, device_map: Mapping[str, Any]) -> str | None:
    """Return the longest key of a device map that a weight lies below; None where there is none."""
    keys = [key for key in device_map if key in ("", name) or name.startswith(f"{key}.")]
    return max(keys, key=len, default=None)


def _memory_limit(name: str, size: str) -> tuple[int | str, int]:
    """Return a device as accelerate's `max_memory` names it, an index for a GPU, and its size in bytes."""
    device = _present_device(name, "max_memory")
    try:
        return device.type if device.type == "cpu" else device.index or 0, int(convert_file_size_to_int(size))
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"max_memory of {name} is {size!r}; it must be a number with a unit, 0 or more", "such as 20GiB or 500MB"
        ) from error


def _present_device(name: str | int, place: str) -> torch.device:
    """Return a device. Raises ConfigError for one that is not there. place: what is wrong, for the message."""
    try:
        return parse_device(f"cuda:{name}" if str(name).isdigit() else str(name))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", error.hint) from error
