"""`mixlm serve`: ensembles behind the API that tools already speak, and a page to look at them."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mixlm.cli.display import dim
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.errors import ConfigError, MixlmError, UsageError, did_you_mean

if TYPE_CHECKING:
    from mixlm.engines import Engine, EngineSpec
    from mixlm.ensemble import Ensemble

_LEVELS = ("debug", "info", "warning", "error")


def _server(*names: str, metavar: str, text: str) -> Any:
    return Option(*names, metavar=metavar, help=text, rich_help_panel="Server")


@with_shared
def serve(
    shared: Shared,
    config: Annotated[
        Path | None,
        _server("--config", metavar="FOLDER", text="Serve every ensemble file (*.toml) in it, by its file's name."),
    ] = None,
    name: Annotated[
        str | None, _server("--name", metavar="NAME", text="What requests call the ensemble. Default: its members.")
    ] = None,
    host: Annotated[str, _server("--host", metavar="HOST", text="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, _server("--port", metavar="N", text="Which port; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        _server(
            "--api-keys",
            metavar="FILE",
            text="Ask for a key. A line is a name and the SHA-256 of a key. Or MIXLM_API_KEYS=KEY,KEY.",
        ),
    ] = None,
    open_to_all: Annotated[
        bool,
        Option("--open", help="Listen beyond this machine without keys.", rich_help_panel="Server"),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        _server("--allow-host", metavar="NAME", text="A further Host name to answer under, such as a proxy's."),
    ] = None,
    batch: Annotated[int, _server("--batch", metavar="N", text="Replies written together.")] = 16,
    queue: Annotated[int, _server("--queue", metavar="N", text="Replies that may wait; more get 429.")] = 64,
    timeout: Annotated[float, _server("--timeout", metavar="S", text="Seconds that a request may take.")] = 300.0,
    grace: Annotated[
        float, _server("--grace", metavar="S", text="Seconds for replies to finish when told to stop.")
    ] = 30.0,
    max_body: Annotated[int, _server("--max-body", metavar="BYTES", text="Size of a request.")] = 1 << 20,
    max_prompt: Annotated[int, _server("--max-prompt", metavar="N", text="Characters of a prompt.")] = 200_000,
    traces: Annotated[
        str | None,
        _server(
            "--traces",
            metavar="URL",
            text="Send traces there, by OTLP over HTTP. Default: what OTEL_EXPORTER_OTLP_ENDPOINT says.",
        ),
    ] = None,
    log: Annotated[
        str, _server("--log", metavar="LEVEL", text=f"{', '.join(_LEVELS)}; JSON lines on stderr.")
    ] = "info",
) -> int:
    """Serve an ensemble as one model through an OpenAI-compatible API.

    Give clients the base URL http://127.0.0.1:8000/v1; a web page is at /. Sampling and generation options given here
    are the defaults for requests.
    """
    missing = [one for one in ("starlette", "uvicorn", "prometheus_client") if find_spec(one) is None]
    if missing:
        raise MixlmError(f"serving needs {' and '.join(missing)}", "install: pip install 'mixlm[serve]'")
    from mixlm.server.api_keys import load_api_keys
    from mixlm.server.app import ServerApp
    from mixlm.server.http_server import ListenAddress, log_to_stderr
    from mixlm.server.http_server import serve as run
    from mixlm.server.limits import ServerLimits
    from mixlm.server.model_registry import ModelRegistry
    from mixlm.server.tracing import tracer_for

    if log not in _LEVELS:
        raise ConfigError(f"--log is {log!r}; it must be one of {', '.join(_LEVELS)}", did_you_mean(log, _LEVELS))
    limits = ServerLimits(max_batch=batch, queue=queue, timeout=timeout, grace=grace, body=max_body, prompt=max_prompt)
    keys = load_api_keys(api_keys, os.environ)
    address = ListenAddress(host, port, tuple(one.lower() for one in allow_host or ()))
    if not address.local and not keys and not open_to_all:
        raise UsageError(
            f"{host} can be reached from other machines, and no API key is asked for",
            "give --api-keys FILE, or --open to let anyone in",
        )
    tracing = tracer_for(traces, os.environ)
    listening = address.listen()
    try:
        registry = ModelRegistry(_ensembles(shared, config, name))
        log_to_stderr(log)
        server = ServerApp(registry, limits, keys, address.hosts, tracing)
        names = ", ".join(one.name for one in registry)
        run(server, listening, ready=lambda url: dim(f"serving {names} at {url}"))
    finally:
        listening.close()
    return 0


def _ensembles(shared: Shared, folder: Path | None, name: str | None) -> dict[str, Ensemble]:
    """Load what is to be served, by name. Models that several ensembles have in common are loaded once."""
    if shared.seed is not None:
        raise UsageError("--seed would make all replies to a prompt the same", "send the seed with a request")
    if folder is None:
        ensemble = _opened(shared, {})
        file = shared.ensemble.stem if shared.ensemble is not None else None
        return {name or file or "+".join(ensemble.names): ensemble}
    if shared.model or shared.ensemble is not None or shared.weights is not None or name is not None:
        raise UsageError("--config says which ensembles there are", "leave out -m, -e, -w and --name")
    paths = sorted(folder.glob("*.toml"))
    if not paths:
        raise ConfigError(f"there is no ensemble file (*.toml) in {folder}", "mixlm fit --output writes one")
    engines: dict[EngineSpec, Engine] = {}
    return {one.stem: _opened(replace(shared, ensemble=one), engines) for one in paths}


def _opened(shared: Shared, engines: dict[EngineSpec, Engine]) -> Ensemble:
    """Load one ensemble; the options given here hold where a request says nothing."""
    options = shared.options()
    ensemble = open_ensemble(shared, options, engines=engines)
    ensemble.defaults = ensemble.settings(**options)
    # What cannot be written by these options is better known now than at the first request.
    ensemble.context(ensemble.defaults)
    return ensemble
