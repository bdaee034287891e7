"""`mixlm bench`: how fast each method writes with the user's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from mixlm.cli.display import dim, json_text, print_json, progress_bars
from mixlm.cli.inputs import check_writable
from mixlm.cli.loading import open_ensemble
from mixlm.cli.options import Shared, with_shared
from mixlm.cli.tables import console, print_table
from mixlm.errors import ConfigError

_HEADS = ("method", "tokens/s", "bytes/s", "first token", "outside forwards", "forwards")
_NUMBERS = frozenset(_HEADS[1:])


@with_shared
def bench(
    shared: Shared,
    tokens: Annotated[int, Option("--tokens", metavar="N", help="How many tokens each run writes.")] = 64,
    repeats: Annotated[int, Option("--repeats", metavar="N", help="How often each method runs.")] = 5,
    prompt: Annotated[
        str | None, Option("--prompt", metavar="TEXT", help="What the replies answer.", show_default=False)
    ] = None,
    json_file: Annotated[
        str | None,
        Option("--json", metavar="FILE", help="Write the report to FILE; '-' prints it in place of the tables."),
    ] = None,
) -> int:
    """Measure the speed of every method."""
    if json_file not in (None, "-"):
        check_writable("--json", Path(json_file))
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", "leave --prompt out to take the default")
    options = shared.options()
    ensemble = open_ensemble(shared, options)
    from mixlm.benchmark import bench as measure

    more: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    with progress_bars(single=True) as progress:
        found = measure(ensemble, tokens=tokens, repeats=repeats, options=options, progress=progress, **more).as_dict()
    if json_file == "-":
        print_json(found)
        return 0
    _show(found)
    if json_file is not None:
        Path(json_file).write_text(json_text(found) + "\n", encoding="utf-8")
        dim(f"written to {json_file}")
    return 0


def _show(found: dict[str, Any]) -> None:
    rows = [
        (
            f"single {', '.join(one['members'])}" if one["method"] == "single" else one["method"],
            f"{one['tokens_per_second']:.1f}",
            f"{one['bytes_per_second']:.0f}",
            f"{one['seconds_to_first_token']:.3f} s",
            f"{one['outside_forwards_share']:.1%}" if "outside_forwards_share" in one else "",
            " + ".join(f"{number:g}" for number in one["forwards"].values()),  # in the order of the members
        )
        for one in found["runs"]
    ]
    print_table(_HEADS, rows, right=_NUMBERS)
    print_table(("speed of", "ratio"), [(name, f"{one:.2f}") for name, one in found["ratios"].items()], right={"ratio"})
    where = found["environment"]
    if "peak_memory_bytes" in where:
        weights, peak = (f"{where[name] / 1e9:.2f} GB" for name in ("weights_bytes", "peak_memory_bytes"))
        console().print(f"weights {weights} · peak memory {peak}", style="dim", soft_wrap=True)
    parts = [str(where[name]) for name in ("accelerator", "processor", "system") if where.get(name)]
    if parts:
        console().print(" · ".join(parts), style="dim", soft_wrap=True)
