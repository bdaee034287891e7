"""A model of transformers: from its files, of which all must be there, or on the tensors of one that is loaded."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger
from shutil import rmtree
from tempfile import mkdtemp
from traceback import walk_tb
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mixlm.engines.base import EngineSpec
from mixlm.engines.tokenizer_setup import error_summary, remote_code_error
from mixlm.engines.transformers.self_test import Tolerance, sample_ids
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, UnsupportedError, memory_errors

_LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # of a configuration: tokens of a text
# What stands in files beside weights that are quantised.
_SCALES = re.compile(r"\.(weight_scale\w*|scales|SCB)$")


def load_model(source: str, spec: EngineSpec, options: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Return a model in which every weight is from its files, and notes on weights that it has no place for.

    source: folder or hub id. options: keywords of `from_pretrained` that say where and how it is loaded.

    Raises:
        ModelLoadError: it cannot be loaded, or its files do not fit its configuration.
        MemoryLimitError: the device has too little memory.
    """
    name = spec.name
    offload = mkdtemp(prefix="mixlm-offload-") if spec.device_map is not None else None
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of weights is in the loading info
    # They warn of what was asked for; the second one in each layer of each forward pass.
    for warning in ("accelerate.big_modeling", "bitsandbytes.autograd._functions"):
        getLogger(warning).setLevel("ERROR")
    try:
        with memory_errors(name):
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                **options,
                offload_folder=offload,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # an error below, with all their names
            )
    except MixlmError:
        raise
    except Exception as error:
        raise load_error(spec, error) from error
    finally:
        logging.set_verbosity(verbosity)
    notes = _check_weights(name, info)
    if offload is not None:
        model = _on_devices(model)
        weakref.finalize(model, rmtree, offload, ignore_errors=True)
    return model.eval(), notes


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


def _on_devices(model: Any) -> Any:
    """Return a model that was spread over devices. Its `device` is where inputs go, also with weights on disk."""
    if model.device.type != "meta":
        return model
    main = next((place for place in model.hf_device_map.values() if place not in ("cpu", "disk")), "cpu")
    device = torch.device("cuda", main) if isinstance(main, int) else torch.device(main)
    model.__class__ = type(type(model).__name__, (type(model),), {"device": property(lambda _: device)})
    return model


def _check_weights(name: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Check what transformers reports of a model's weights. Returns notes. Raises ModelLoadError."""
    unexpected = _listed(info["unexpected_keys"])
    if missing := _listed(info["missing_keys"]):
        also = f"; they hold {unexpected}, which it has no place for" if unexpected else ""
        raise ModelLoadError(
            f"the files of {name} lack {missing}{also}",
            "a file of the model may be missing, or its weights were saved under other names"
            + (", such as with a prefix" if unexpected else ""),
        )
    if mismatched := info["mismatched_keys"]:
        key, actual, expected = min(mismatched)
        raise ModelLoadError(
            f"{len(mismatched)} of the weights of {name} have other sizes than its config.json says, such as {key}: "
            f"{tuple(actual)} instead of {tuple(expected)}",
            "its config.json and its weights must be of one model",
        )
    if scales := _listed(filter(_SCALES.search, info["unexpected_keys"])):
        raise ModelLoadError(
            f"the weights of {name} are quantised, and its config.json does not say how: its files hold {scales}",
            "its config.json lacks its quantization_config",
        )
    return (f"the files of {name} hold {unexpected}, which the model has no place for",) if unexpected else ()


def _listed(keys: Iterable[str]) -> str:
    """Return the number of weights and the first of their names; empty for none."""
    names = sorted(keys)
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})" if names else ""


def share_weights(model: Any, name: str) -> Any:
    """Return a model of its own on the tensors of a loaded one, which keeps its mode, its attention and its hooks.

    Of a PEFT model it is the base model with the adapters that are active, merged or not. name: for messages.

    Raises:
        ConfigError: it is none.
        UnsupportedError: its adapter is more than a part of the model's layers (prompt and prefix tuning, aLoRA).
    """
    model = getattr(model, "_orig_mod", model)  # of one that torch.compile was called for: what it compiles
    is_adapted = hasattr(model, "get_base_model")
    kind = type(model.active_peft_config).__name__ if is_adapted else ""
    if is_adapted and getattr(model.active_peft_config, "is_prompt_learning", False):
        raise UnsupportedError(
            f"the adapter of {name} puts tokens of its own in front of the text ({kind})",
            "use LoRA or another adapter that changes layers",
        )
    base = model.get_base_model() if is_adapted else model
    output = getattr(base, "get_output_embeddings", lambda: None)()
    if output is None or getattr(base, "config", None) is None:
        raise ConfigError(
            f"{type(base).__name__} is no causal language model of transformers",
            "hand over (model, tokenizer): what AutoModelForCausalLM and AutoTokenizer load",
        )
    try:
        shared = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)}).eval()
        complete = not is_adapted or _is_all(shared)
    except Exception as error:
        raise ModelLoadError(
            f"{name} cannot be shared: {type(error).__name__}: {error_summary(error)}",
            "save it with save_pretrained, and name the folder",
        ) from error
    if not complete:
        raise UnsupportedError(
            f"the adapter of {name} does more than its layers do, such as to look for where it begins ({kind})",
            "use LoRA or another adapter that changes layers alone",
        )
    return shared.get_base_model() if is_adapted else shared


def _is_all(adapted: Any) -> bool:
    """Whether the base model of a PEFT model, with the adapters in its layers, computes what the PEFT model does."""
    base = adapted.get_base_model()
    begins = [
        i for config in adapted.peft_config.values() for i in getattr(config, "alora_invocation_tokens", None) or ()
    ]
    tokens = [*sample_ids(vocabulary_size(base)).tolist(), *begins, 0]
    ids = torch.tensor([tokens], device=base.device)
    with torch.inference_mode():
        rows, expected = (
            model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy() for model in (base, adapted)
        )
    tolerance = Tolerance.of(base.dtype)
    return tolerance.distance(zip(rows, expected, strict=True)) < tolerance.largest


def _tensors(model: Any) -> Iterator[Any]:
    """Yield all tensors of a model: parameters, buffers, and those that layers keep otherwise, as quantised ones do."""
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        # What libraries for quantisation keep beside a tensor: bitsandbytes' `quant_state` of a parameter.
        inner = [part for value in values if hasattr(value, "__dict__") for part in vars(value).values()]
        inner += [part for value in inner if hasattr(value, "__dict__") for part in vars(value).values()]
        yield from (value for value in [*values, *inner] if isinstance(value, torch.Tensor))


def context_length(model: Any) -> int:
    """Return how many tokens a model has positions for; 1 << 20 where nothing says so."""
    config = model.config.get_text_config()
    length = next((int(size) for name in _LENGTHS if (size := getattr(config, name, None))), 1 << 20)
    # RoBERTa and its kin count positions from that of padding on.
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            length = min(length, int(layer.num_embeddings) - int(layer.padding_idx) - 1)
    return length


def vocabulary_size(model: Any) -> int:
    """Return how many tokens a model has logits for. Raises UnsupportedError for a model of audio and the like."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        raise UnsupportedError(
            f"{type(model).__name__} has no output layer of one vocabulary", "name a causal language model of text"
        )
    return int(weight.shape[0])


def quantization(model: Any, spec: EngineSpec) -> str | None:
    """Return how a model's weights are quantised: as its spec or its files say. None where they are not."""
    config = getattr(model.config, "quantization_config", None)
    if spec.quantization is not None or config is None:
        return spec.quantization
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def count_bytes(tensors: Iterable[Any]) -> int:
    """Return the memory of tensors; of quantised ones of torchao, that of what they are made of."""
    return sum(
        count_bytes(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        if hasattr(tensor, "__tensor_flatten__")
        else int(tensor.nbytes)
        for tensor in tensors
    )


def parse_device(name: str) -> torch.device:
    """Return torch's device of a name; "auto" is CUDA where there is one. Raises ConfigError for one that is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it has no memory")
    except (RuntimeError, AssertionError) as error:
        devices = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ConfigError(f"device {name!r} is not there", f"this machine has {devices}") from error
    return device


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return torch's dtype of a name; "auto" is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    fast = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32
