"""A model of transformers from its files: where its weights go, how they are stored, and whether all are there."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from logging import getLogger
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from mixlm.engines.registry import EngineSpec
from mixlm.errors import ConfigError, MixlmError, ModelLoadError, UnsupportedError, memory_errors
from mixlm.models.resolve import resolve

_LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # of a configuration: tokens of a text
# What stands in files beside weights that are quantised.
_SCALES = re.compile(r"\.(weight_scale\w*|scales|SCB)$")


def find_model(spec: EngineSpec, *, weights: bool = True) -> tuple[str, str]:
    """Return the folder or hub id of the model that a spec names, and its name.

    weights: whether those of a revision are fetched too, not only what describes it.

    Raises:
        ConfigError: there is a revision, and the model is no hub id.
        ModelNotFoundError, ModelLoadError: there is no such model, or it cannot be fetched.
    """
    resolved = resolve(spec.model, "float32" if spec.dtype == "float32" else "bfloat16", spec.revision)
    source, name = resolved.path_or_id, spec.name or resolved.name
    if spec.revision is None:
        return source, name
    if not resolved.on_hub:
        raise ConfigError(
            f"revision is given, and {spec.model} is on this machine", "leave it out; revisions are of hub ids"
        )
    if not resolved.local:
        from mixlm.engines.transformers.placement import fetch_revision

        source = fetch_revision(source, spec.revision, weights=weights)
    return source, name


def load_model(source: str, spec: EngineSpec, dtype: Any, device: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a model in which every weight is from its files, and notes on weights that it has no place for.

    Args:
        source: folder or hub id.
        spec: where and how it is loaded, see `placement`.
        dtype: torch's, of the weights that are not quantised.
        device: torch's, where there is no device map.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name = spec.name
    options: dict[str, Any] = {"device_map": {"": device}}
    if spec.loading_options:
        from mixlm.engines.transformers.placement import checked_options

        options = checked_options(source, spec, dtype, device)
    offload = mkdtemp(prefix="mixlm-offload-") if spec.device_map is not None else None
    if offload is not None:
        options["offload_folder"] = offload
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
                dtype=dtype,
                **options,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # an error below, with all their names
            )
    except MixlmError:
        raise
    except Exception as error:
        from mixlm.engines.transformers.placement import load_error

        raise load_error(spec, error) from error
    finally:
        logging.set_verbosity(verbosity)
    notes = _check_weights(name, info)
    if offload is not None:
        model = _on_devices(model)
        weakref.finalize(model, rmtree, offload, ignore_errors=True)
    return model.eval(), notes


def _on_devices(model: Any) -> Any:
    """Return a model that was spread over devices. Its `device` is where inputs go, also with weights on disk."""
    import torch

    places = list(dict.fromkeys(getattr(model, "hf_device_map", {}).values()))
    if model.device.type != "meta":
        return model
    main = next((place for place in places if place not in ("cpu", "disk")), "cpu")
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


def hidden_size(model: Any) -> int:
    """Return how many numbers a hidden state of a model has."""
    return int(model.get_output_embeddings().weight.shape[1])


def quantization(model: Any, spec: EngineSpec) -> str | None:
    """Return how a model's weights are quantised: as its spec or its files say. None where they are not."""
    config = getattr(model.config, "quantization_config", None)
    if spec.quantization is not None or config is None:
        return spec.quantization
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def parse_device(name: str) -> Any:
    """Return torch's device of a name; "auto" is CUDA where there is one. Raises ConfigError for one that is absent."""
    import torch

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


def parse_dtype(name: str, device: Any) -> Any:
    """Return torch's dtype of a name; "auto" is bfloat16 where the device computes in it, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else torch.float32
