"""Findings as files: JSON with every number, a Markdown report, and for figures PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixlm.errors import ConfigError
from research.paper.findings import Findings, SpeedFinding, read
from research.paper.store import ResultStore
from research.paper.tables import markdown


def write(findings: Findings, store: ResultStore) -> list[Path]:
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
            notes.append(f"{', '.join(dict.fromkeys(speed.machine for speed in more.speeds))}: {more.reduced}")
        for speed in more.speeds:
            if _same(speed, speeds):
                raise ConfigError(f"{path} and these results both have {speed.ensemble} on {speed.machine}")
            speeds.append(speed)
        ensembles |= more.ensembles
    return replace(findings, speeds=tuple(speeds), notes=tuple(notes), ensembles=ensembles)


def _same(finding: SpeedFinding, others: Sequence[SpeedFinding]) -> bool:
    return any((finding.ensemble, finding.machine) == (other.ensemble, other.machine) for other in others)
