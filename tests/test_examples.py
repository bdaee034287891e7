"""What lies in examples/ is read by what it is for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mixlm.config import EnsembleConfig, parse_config, read_config

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
yaml = pytest.importorskip("yaml")


def services(config: EnsembleConfig) -> set[str]:
    """Hosts that an ensemble's members are behind, without the number of a replica."""
    urls = [url for member in config.members for url in member.model.split(",")]
    return {url.removeprefix("http://").partition(":")[0].partition(".")[0].partition("-")[0] for url in urls}


def test_the_ensemble_of_the_compose_file_names_its_services():
    composed = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
    assert services(read_config(EXAMPLES / "pair.toml")) == set(composed["services"]) - {"mixlm"}
    assert set(composed["services"]["mixlm"]["depends_on"]) == set(composed["services"]) - {"mixlm"}


def test_the_ensemble_in_kubernetes_names_every_replica_of_its_members():
    folder = EXAMPLES / "kubernetes"
    members = list(yaml.safe_load_all((folder / "members.yaml").read_text()))
    mixlm = {manifest["kind"]: manifest for manifest in yaml.safe_load_all((folder / "mixlm.yaml").read_text())}
    config = parse_config(tomllib.loads(mixlm["ConfigMap"]["data"]["pair.toml"]), "pair.toml")
    sets = {member["metadata"]["name"]: member["spec"] for member in members if member["kind"] == "StatefulSet"}
    headless = {member["metadata"]["name"] for member in members if member["kind"] == "Service"}
    assert {spec["serviceName"] for spec in sets.values()} == headless == set(sets) == services(config)
    for member in config.members:
        wanted = [
            f"http://{member.name}-{i}.{member.name}:8000#{member.name}" for i in range(sets[member.name]["replicas"])
        ]
        assert member.model.split(",") == wanted
