"""What a server says of a model: its name, its context, where its tokenizer is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlm.engines.remote.http_client import HttpClient
from mixlm.errors import ConfigError, UnsupportedError, did_you_mean
from mixlm.models.gguf import find_gguf, tokenizer_folder


@dataclass(frozen=True)
class ModelInfo:
    """A model as its server describes it.

    card: its entry in `/v1/models`. properties: what `/props` (llama.cpp) or `/server_info` (SGLang) has, else empty.
    """

    card: dict[str, Any]
    properties: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's name at the server."""
        return str(self.card["id"])

    @property
    def is_sglang(self) -> bool:
        """Whether the server is SGLang's."""
        return self.card.get("owned_by") == "sglang"

    @property
    def adapter(self) -> str:
        """The name of the LoRA adapter that it is on SGLang's server, "" for none."""
        return self.name if self.card.get("parent") else ""

    @property
    def vocabulary_size(self) -> int:
        """Rows of the output layer, 0 where the server does not say it."""
        return int((self.card.get("meta") or {}).get("n_vocab") or 0)

    @property
    def total_slots(self) -> int:
        """Slots of a llama.cpp server, 0 for others."""
        return int(self.properties.get("total_slots") or 0)

    @property
    def context_length(self) -> int:
        """How many tokens a prompt may have, 0 where the server does not say it.

        SGLang refuses prompts of `max_req_input_len` tokens and more: that is 6 less than the context, or than the
        capacity of its KV cache where that is less.
        """
        model_length = int(self.card.get("max_model_len") or 0)
        if self.is_sglang and (limit := int(self.properties.get("max_req_input_len") or 0) or model_length - 6) > 1:
            return limit - 1
        if model_length:
            return model_length - 1  # one token at least is generated, and has to fit in too
        slot_length = (self.properties.get("default_generation_settings") or {}).get("n_ctx")
        return int(slot_length or (self.card.get("meta") or {}).get("n_ctx") or 0)

    def tokenizer_folder(self) -> Path | None:
        """Return the folder of the tokenizer where the server says its model's path, and this machine has it."""
        paths = (self.properties.get("tokenizer_path"), self.card.get("root"), self.properties.get("model_path"))
        for path in (*paths, self.card.get("id")):
            if isinstance(path, str) and Path(path).exists() and (folder := tokenizer_folder_of(path)) is not None:
                return folder
        return None

    def has_card(self, card: dict[str, Any]) -> bool:
        """Whether the server still describes the model in the same words."""
        return all(card.get(key) == self.card.get(key) for key in ("root", "max_model_len", "meta"))


def tokenizer_folder_of(model: str) -> Path | None:
    """Return the folder of a model's tokenizer: of a folder that has one, or of a GGUF file. None for others."""
    if (gguf := find_gguf(model)) is not None:
        return tokenizer_folder(gguf)  # converted anew where an earlier version converted it
    folder = Path(model).expanduser()
    return folder if (folder / "tokenizer.json").is_file() else None


async def read_model_info(client: HttpClient, name: str) -> ModelInfo:
    """Ask a server for its model.

    Args:
        name: the model's name, "" for the only one.

    Raises:
        EngineError: the server does not answer.
        ConfigError: it asks for a key, or has no such model.
        UnsupportedError: it has no `/v1/models`.
    """
    info = ModelInfo(await read_model_card(client, name), {})
    # SGLang's has had two names: the second until version 0.5.5, and with a warning since.
    for path in ("/server_info", "/get_server_info") if info.is_sglang else ("/props",):
        status, value = await client.request("GET", path)
        if status == 200 and isinstance(value, dict) and value:
            return ModelInfo(info.card, value)
    return info


async def read_model_card(client: HttpClient, name: str) -> dict[str, Any]:
    """Return a model's entry in `/v1/models`; raises what `read_model_info` raises."""
    response = await client.request("GET", "/v1/models")
    if response.status in (401, 403):
        raise ConfigError(
            f"{client.base_url} asks for a key (status {response.status})",
            "name the environment variable that holds it: key_env = NAME, beside model",
        )
    try:
        cards = {str(card["id"]): card for card in response.value["data"]}
    except (TypeError, LookupError):
        raise UnsupportedError(
            f"{client.base_url} has no /v1/models (status {response.status})", "give the URL in front of /v1"
        ) from None
    if not name and len(cards) == 1:
        [name] = cards
    if name not in cards:
        problem = f"no model {name!r}" if name else "several models or none"
        raise ConfigError(
            f"{client.base_url} has {problem}; it has: {', '.join(cards) or 'none'}",
            did_you_mean(name, cards) or "put #NAME after the URL",
        )
    return dict(cards[name])
