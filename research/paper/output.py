"""Findings as files: JSON with every number, a Markdown report, and for figures PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixlm.errors import ConfigError
from research.paper.findings import Findings, Speed, read
from research.paper.store import Store
from research.paper.tables import markdown


def write(findings: Findings, store: Store) -> list[Path]:
    """Write all files of an experiment, and return their paths."""
    name = findings.experiment
    paths = [store.write(f"{name}.json", json.dumps(findings.as_dict(), indent=2) + "\n")]
    image = None
    if name.startswith("figure"):
        from research.paper import charts

        paths += charts.save(findings, store.folder)
        image = f"{name}.svg"
    return [*paths, store.write(f"{name}.md", markdown(findings, image=image))]


def joined(findings: Findings, others: Sequence[str | Path]) -> Findings:
    """Add speeds that were measured on other machines: files of the same experiment.

    Raises ConfigError for files of another one, and when two have the same machine and ensemble.
    """
    speeds, notes, ensembles = list(findings.speeds), list(findings.notes), dict(findings.ensembles)
    for path in others:
        more = read(path)
        if more.experiment != findings.experiment:
            raise ConfigError(f"{path} holds {more.experiment}", f"give a file of {findings.experiment}")
        if more.reduced:
            notes.append(f"{', '.join(dict.fromkeys(one.machine for one in more.speeds))}: {more.reduced}")
        for one in more.speeds:
            if _same(one, speeds):
                raise ConfigError(f"{path} and these results both have {one.ensemble} on {one.machine}")
            speeds.append(one)
        ensembles |= more.ensembles
    return replace(findings, speeds=tuple(speeds), notes=tuple(notes), ensembles=ensembles)


def _same(one: Speed, others: Sequence[Speed]) -> bool:
    return any((one.ensemble, one.machine) == (two.ensemble, two.machine) for two in others)
