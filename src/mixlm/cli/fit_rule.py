"""`mixlm fit --rule`: the strength and the weights of a combination rule."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlm.cli.display import dim, print_json, print_lines, print_table
from mixlm.cli.inputs import model_identities, score_texts
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared
from mixlm.errors import ConfigError, UsageError
from mixlm.terminal import progress_bars

if TYPE_CHECKING:
    from mixlm.config import EnsembleConfig, MemberConfig
    from mixlm.fitting.gate_trainer import GateKind
    from mixlm.fitting.rule_strength import StrengthFit
    from mixlm.scoring.scores import Scores


def fits_rule(config: EnsembleConfig) -> bool:
    """Whether an ensemble has a rule to fit."""
    return config.combination is not None and config.combination.rule != "average"


def defers(config: EnsembleConfig) -> bool:
    """Whether the rule of an ensemble is defer."""
    return config.combination is not None and config.combination.rule == "defer"


def fit_strength(
    shared: Shared, config: EnsembleConfig, parts: Mapping[str, tuple[str, str]], *, output: Path | None, as_json: bool
) -> int:
    """Fit the strength of the ensemble's rule to the first part of each text, by file; the second is held out.

    output: where the ensemble with the fitted rule is written.
    """
    assert config.combination is not None
    _refuse_fitted(shared, "strength")
    if config.combination.accept is not None:
        raise UsageError(
            f"{shared.ensemble} has a trained gate, and mixlm fit finds the strength of a threshold",
            "add --router FILE to train a gate, or --rule defer for a threshold in its place",
        )
    from mixlm.core.rule_options import build_rule
    from mixlm.fitting import rule_strength
    from mixlm.scoring.rule_scores import text_passages

    parameters = config.rule_options()
    rule_strength.check_fittable(build_rule(parameters.pop("rule"), parameters))
    ensemble = open_ensemble(shared, {})
    train, check = (text_passages(ensemble, [part[i] for part in parts.values() if part[i]]) for i in (0, 1))
    weights_given = shared.numbers() is not None or config.weights() is not None
    with progress_bars() as progress:
        result = rule_strength.fit_strength(ensemble, train, check, fit_weights=not weights_given, progress=progress)
    written = None
    if output is not None:
        combination = config.combination.model_copy(update={"strength": result.strength})
        weights = [round(float(weight), 6) for weight in result.weights]
        written = write_ensemble(config, output, weights, combination=combination)
    if as_json:
        print_json({"members": list(ensemble.names), **result.as_dict()})
    else:
        _show(result, ensemble.names, config.combination.rule, weights_given=weights_given)
    if written is not None:
        dim(written)
    return 0


def fit_gate(
    shared: Shared,
    config: EnsembleConfig,
    parts: Mapping[str, tuple[str, str]],
    router: Path,
    kind: GateKind,
    price: float,
    *,
    cache: bool,
    output: Path | None,
    as_json: bool,
) -> int:
    """Train a gate of rule defer on the first part of each text; the second is held out.

    router, kind: the gate's file, and what it is. price: of a forward of the second member. cache: whether to use
    the cache of scores. output: where the ensemble with the gate is written.
    """
    from mixlm.engines.topk_only import full_distribution_error
    from mixlm.fitting.deferral import DeferralScores, check_members, compare, train_deferral
    from mixlm.fitting.gates import untrained
    from mixlm.routing.base import TOP_K
    from mixlm.routing.gate_router import GateInputs
    from mixlm.scoring.scores import concatenate

    _refuse_fitted(shared, "strength", "by")
    check_members(len(config.members))
    ensemble = open_ensemble(shared, {})
    check_members(len(ensemble.members), one_vocabulary=ensemble.unit.traits.shared_vocabulary)
    observed, engine = ensemble.names[0], ensemble.members[0].engine
    if engine.top_k_limit is not None:
        raise full_distribution_error(engine, "a gate of rule defer")
    watching = ensemble.with_router(untrained(ensemble.names, GateInputs(("top_k",), observed, TOP_K)))
    models = model_identities(config, cache)

    def scored(side: int) -> list[Scores]:
        texts = {name: part[side] for name, part in parts.items() if part[side]}
        return list(score_texts(watching, texts, {}, models, ends=None, system=None).values())

    train, check = scored(0), scored(1)
    with progress_bars() as progress:
        report = None if progress is None else lambda done, _: progress("training the gate", done, done)
        gate = train_deferral(train, kind, price=price, progress=report)
    gate.save(router)
    written = None
    if output is not None:
        from mixlm.config import CombinationConfig

        combination = CombinationConfig(rule="defer", accept=relative_path(router, output))
        weights = [member.weight for member in config.members]
        written = write_ensemble(config, output, weights, combination=combination)
    fitted = DeferralScores.of(concatenate(train))
    rows = compare(
        ensemble.names, fitted, DeferralScores.of(concatenate(check)) if check else fitted, gate, ensemble.weights
    )
    if as_json:
        print_json({"members": list(ensemble.names), "rule": "defer", "rows": [asdict(row) for row in rows]})
    else:
        heads = ["", "bits per byte", f"forwards of {ensemble.names[1]} a token"]
        table = [(row.name, f"{row.bits_per_byte:.4f}", f"{row.forwards:.2f}") for row in rows]
        print_table(heads, table, right=set(heads[1:]))
        print_lines(f"On {'held-out text' if check else 'the training text'}; {observed} runs at every token.")
    dim(f"gate written to {router}, its numbers to {router.with_suffix('.safetensors').name}")
    if written is not None:
        dim(written)
    return 0


def _refuse_fitted(shared: Shared, *names: str) -> None:
    """Raise UsageError for a parameter that is to be fitted."""
    if named := [name for name in names if name in shared.generation]:
        raise UsageError(f"--{named[0]} is what mixlm fit --rule finds", "omit it")


def split_text(text: str, holdout: float) -> tuple[str, str]:
    """Return a text without its last part, and that part, which begins with a space or a line."""
    cut = round(len(text) * (1 - holdout))
    if holdout:
        cut = max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))
        if cut <= 0:
            raise ConfigError("a text is too short to be split at a space", "use --holdout 0")
    return text[:cut], text[cut:]


def relative_path(path: Path, output: Path) -> str:
    """Return a path as an ensemble file has it: relative to the folder of that file."""
    return os.path.relpath(path.resolve(), output.resolve().parent)


def write_ensemble(config: EnsembleConfig, output: Path, weights: Sequence[float | None], **changes: Any) -> str:
    """Write an ensemble file with these weights, and other changes. Returns a line about it."""
    from mixlm.config import write_config

    members = tuple(_with_weight(member, weight) for member, weight in zip(config.members, weights, strict=True))
    write_config(config.model_copy(update={"members": members, **changes}), output)
    return f"ensemble written to {output}: use it with -e {output}"


def _with_weight(member: MemberConfig, weight: float | None) -> MemberConfig:
    """Return a member with its weight and an absolute path, if its model is a path."""
    path = Path(member.model).expanduser()
    local = (path / "config.json").is_file() or path.is_file()
    # The template itself replaces the name of its file.
    return member.model_copy(
        update={"weight": weight, "model": str(path.absolute()) if local else member.model, "template_file": None}
    )


def _show(result: StrengthFit, names: Sequence[str], rule: str, *, weights_given: bool) -> None:
    from mixlm.fitting.rule_strength import WEIGHTED

    rows = [(f"{strength:g}", f"{bits:.4f}") for strength, bits in result.strengths]
    styles = ["bold" if strength == result.strength else "" for strength, _ in result.strengths]
    print_table(["strength", "bits per byte"], rows, right={"strength", "bits per byte"}, styles=styles)
    weights = ""
    if rule in WEIGHTED:
        shares = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, result.weights, strict=True))
        weights = f", with the weights {shares}"
    print_lines(f"Rule {rule}: the training text is the most likely at --strength {result.strength:g}{weights}.")
    if result.at_edge:
        print_lines("No strength beyond it was tried, and one there may be better.")
    where = "the training text" if result.check is None else "held-out text"
    bits = result.train if result.check is None else result.check
    of = "the given" if weights_given else "equal"
    print_lines(f"Bits per byte on {where}: {bits:.4f}; the average, at {of} weights, has {result.average:.4f}.")
