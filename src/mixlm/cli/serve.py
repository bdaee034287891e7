"""`mixlm serve`: ensembles behind an OpenAI-compatible API, and a web page."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mixlm.cli.display import dim
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, flag, with_shared
from mixlm.errors import ConfigError, MixlmError, UsageError
from mixlm.option_spec import OptionSpec

if TYPE_CHECKING:
    from mixlm.engines import Engine, EngineSpec
    from mixlm.ensemble import Ensemble

_DEFAULT_BATCH = 16
# Each holds a KV cache of its own in llama.cpp, allocated at the start.
_MAX_DEFAULT_SLOTS = 8
_LEVELS = ("debug", "info", "warning", "error")


_server = functools.partial(flag, panel="Server")


@with_shared()
def serve(
    shared: Shared,
    config: Annotated[
        Path | None,
        _server("--config FOLDER", "Serve every ensemble file (*.toml) in this folder, under its file name."),
    ] = None,
    name: Annotated[
        str | None, _server("--name NAME", "The model name for requests. Default: the file name, or the member names.")
    ] = None,
    host: Annotated[str, _server("--host HOST", "The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _server("--port N", "The port; 0 selects a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        _server(
            "--api-keys FILE",
            "Require an API key. Each line is a name and the SHA-256 of a key. Or set MIXLM_API_KEYS=KEY,KEY.",
        ),
    ] = None,
    open_to_all: Annotated[bool, _server("--open", "Accept requests from other machines without API keys.")] = False,
    allow_host: Annotated[
        list[str] | None,
        _server("--allow-host NAME", "Accept this Host header too, for example that of a proxy. Repeatable."),
    ] = None,
    batch: Annotated[
        int | None,
        _server(
            "--batch N",
            "The number of completions generated together. Default: 16; for members in llama.cpp, at most their "
            "slots, 8 of them.",
        ),
    ] = None,
    queue: Annotated[
        int, _server("--queue N", "The number of requests that can wait; further ones get status 429.")
    ] = 64,
    timeout: Annotated[float, _server("--timeout S", "The time limit of a request, in seconds.")] = 300.0,
    grace: Annotated[float, _server("--grace S", "On shutdown, wait S seconds for completions to finish.")] = 30.0,
    stall_timeout: Annotated[
        float, _server("--stall-timeout S", "Report a failing health once a step of the models takes S seconds.")
    ] = 120.0,
    max_body: Annotated[int, _server("--max-body BYTES", "The maximum size of a request body.")] = 1 << 20,
    max_prompt: Annotated[int, _server("--max-prompt N", "The maximum length of a prompt, in characters.")] = 200_000,
    traces: Annotated[
        str | None,
        _server("--traces URL", "Send traces to this URL (OTLP over HTTP). Default: OTEL_EXPORTER_OTLP_ENDPOINT."),
    ] = None,
    log: Annotated[
        str, _server("--log LEVEL", f"The log level: {', '.join(_LEVELS)}. Logs are JSON Lines on stderr.")
    ] = "info",
) -> int:
    """Serve an ensemble as one model through an OpenAI-compatible API.

    Give clients the base URL http://127.0.0.1:8000/v1; a web page is at /. Sampling and generation options given here
    are the defaults for requests.
    """
    missing = [module for module in ("starlette", "uvicorn", "prometheus_client") if find_spec(module) is None]
    if missing:
        raise MixlmError(f"serving needs {' and '.join(missing)}", "install: pip install 'mixlm[serve]'")
    from mixlm.server.api_keys import load_api_keys
    from mixlm.server.app import ServerApp
    from mixlm.server.http_server import ListenAddress, log_to_stderr
    from mixlm.server.http_server import serve as run
    from mixlm.server.limits import ServerLimits
    from mixlm.server.model_registry import ModelRegistry
    from mixlm.server.tracing import tracer_for

    OptionSpec(choices=_LEVELS).check("--log", log)
    limits = ServerLimits(
        max_batch=_DEFAULT_BATCH if batch is None else batch,
        max_queue=queue,
        request_timeout=timeout,
        grace_period=grace,
        stall_timeout=stall_timeout,
        max_body_bytes=max_body,
        max_prompt_chars=max_prompt,
    )
    keys = load_api_keys(api_keys, os.environ)
    address = ListenAddress(host, port, tuple(name.lower() for name in allow_host or ()))
    if not address.is_loopback and not keys and not open_to_all:
        raise UsageError(
            f"{host} can be reached from other machines, and no API key is required",
            "give --api-keys FILE, or --open to accept any request",
        )
    tracer = tracer_for(traces, os.environ)
    listener = address.bind()
    try:
        ensembles = _ensembles(shared, config, name, limits.max_batch)
        together = _most_together(ensembles, limits.max_batch)
        if together < limits.max_batch and batch is not None:
            dim(f"note: {together} completions run together, as members in llama.cpp have so many slots")
        limits = replace(limits, max_batch=together)
        registry = ModelRegistry(ensembles)
        log_to_stderr(log)
        app = ServerApp(registry, limits, keys, address.allowed_hosts, tracer)
        names = ", ".join(model.name for model in registry)
        # What is loaded stays: the garbage collector need not look at it again, with all threads waiting.
        gc.collect()
        gc.freeze()
        run(app, listener, on_ready=lambda url: dim(f"serving {names} at {url}"))
    finally:
        listener.close()
    return 0


def _ensembles(shared: Shared, folder: Path | None, name: str | None, batch: int) -> dict[str, Ensemble]:
    """Load the ensembles, by name. Models that several ensembles share are loaded once."""
    if shared.seed is not None:
        raise UsageError("--seed would make all completions of a prompt equal", "send the seed with a request")
    if folder is None:
        ensemble = _open(shared, {}, batch)
        file = shared.ensemble.stem if shared.ensemble is not None else None
        return {name or file or "+".join(ensemble.names): ensemble}
    if shared.model or shared.ensemble is not None or shared.weights is not None or name is not None:
        raise UsageError("--config selects the ensembles", "omit -m, -e, -w and --name")
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise ConfigError(f"there is no ensemble file (*.toml) in {folder}", "mixlm fit --output writes one")
    engines: dict[EngineSpec, Engine] = {}
    return {path.stem: _open(replace(shared, ensemble=path), engines, batch) for path in paths}


def _most_together(ensembles: Mapping[str, Ensemble], batch: int) -> int:
    """Return how many completions can run together without taking one another's slots."""
    together = batch
    for ensemble in ensembles.values():
        engines = [member.engine for member in ensemble.members]
        for engine in engines:
            if engine.max_sequences is not None:
                sharing = sum(other.batch_key == engine.batch_key for other in engines)
                together = max(min(together, engine.max_sequences // sharing), 1)
    return together


def _open(shared: Shared, engines: dict[EngineSpec, Engine], batch: int) -> Ensemble:
    """Load one ensemble; the options given here are the defaults for requests."""
    options = shared.options()
    ensemble = open_ensemble(shared, options, engines=engines, sequences=min(batch, _MAX_DEFAULT_SLOTS))
    ensemble.defaults = ensemble.settings(**options)
    # Raises now, rather than at the first request, if these options are not possible.
    ensemble.context(ensemble.defaults)
    return ensemble
