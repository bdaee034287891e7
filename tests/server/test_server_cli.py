"""`mixlm serve` at the command line: what is served, under which names, and what is refused before anything loads."""

from __future__ import annotations

import gc
import signal

import httpx
import pytest
from serving import HELLO

from mixlm.cli import main


@pytest.fixture
def refusal(capsys):
    """Run `mixlm serve` in this process; it returns what is said."""

    def refusal(*arguments: str) -> str:
        assert main(["serve", "--port", "0", *arguments]) == 2  # of two ports the second counts
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("hint: ")
        return said

    return refusal


def test_the_garbage_collector_leaves_alone_what_is_loaded(monkeypatch):
    frozen = []
    monkeypatch.setattr("mixlm.server.http_server.serve", lambda *_, **__: frozen.append(gc.get_freeze_count()))
    monkeypatch.setattr("gc.collect", lambda: 0)  # what earlier tests left is not this one's
    try:
        assert main(["serve", "-m", "toy:1", "--port", "0"]) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000


@pytest.mark.slow
def test_an_ensemble_is_served_until_it_is_told_to_stop(start_process):
    server = start_process("-m", "toy:1", "-m", "toy:2", "--max-tokens", "3")
    [model] = httpx.get(server.url + "/v1/models").json()["data"]
    assert model["id"] == "toy:1+toy:2"
    body = httpx.post(server.url + "/v1/chat/completions", json={"messages": HELLO}).json()
    assert body["usage"]["completion_tokens"] <= 3
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.slow
def test_a_folder_is_served_by_its_files_names_and_shares_its_models(start_process, tmp_path):
    members = '[[members]]\nmodel = "toy:1"\n[[members]]\nmodel = "toy:{}"\n'
    (tmp_path / "plain.toml").write_text(members.format(2))
    (tmp_path / "other.toml").write_text('method = "conventional"\n' + members.format(3))
    count = (
        "from mixlm.engines import toy; plain = toy.load\n"
        "def counted(spec):\n    import sys; print('LOADED', spec.model, file=sys.stderr); return plain(spec)\n"
        "toy.load = counted\n"
    )
    server = start_process("--config", str(tmp_path), preamble=count)
    models = httpx.get(server.url + "/v1/models").json()["data"]
    assert [(model["id"], model["mixlm"]["method"]) for model in models] == [
        ("other", "conventional"),
        ("plain", "mixture"),
    ]
    assert sorted(line.strip() for line in server.lines if "LOADED" in line) == [
        "LOADED toy:1",
        "LOADED toy:2",
        "LOADED toy:3",
    ]


@pytest.mark.slow
def test_names_can_be_given(start_process, tmp_path):
    file = tmp_path / "pair.toml"
    file.write_text('[[members]]\nmodel = "toy:1"\n')
    for arguments, name in (("-m", "toy:1", "--name", "mine"), "mine"), (("-e", str(file)), "pair"):
        server = start_process(*arguments)
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "toy:1", "--seed", "1"), "--seed"),
        (("-m", "toy:1", "--host", "0.0.0.0"), "no API key"),
        (("-m", "toy:1", "--port", "99999"), "port 99999"),
        (("-m", "toy:1", "--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("-m", "toy:1", "--batch", "0"), "max_batch is 0"),
        (("-m", "toy:1", "--timeout", "nan"), "request_timeout is nan"),
        (("-m", "toy:1", "--log", "verbose"), "--log is 'verbose'"),
        (("-m", "toy:1", "--temperature", "0"), "temperature is 0"),
        (("-m", "toy:1", "--method", "speculative", "--draft", "toy:9"), "draft is 'toy:9'"),
        (("-m", "toy:1", "--config", "."), "--config"),
        (("--config", "."), "no ensemble file"),
        (("-m", "toy:1", "--api-keys", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(arguments, message, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(*arguments)


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(start_process, refusal):
    server = start_process("-m", "toy:1")
    assert f"cannot listen on 127.0.0.1 port {server.port}" in refusal("-m", "toy:1", "--port", str(server.port))
