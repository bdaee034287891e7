"""What members' forwards and mixlm's own work cost: one TOML file, measured or written by hand.

[router]
seconds = 0.002     # of one processor, for each request to a member
delay = 0.0005      # to the server and back
[members.NAME]
weight = 0.6
forward = 0.010     # seconds of a forward of one sequence and one token
sequence = 0.002    # of each further sequence in it
token = 0.003       # of each further token: what a member catches up with, and prompts
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixlm.errors import ConfigError, did_you_mean


class _CostsModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemberCost(_CostsModel):
    """A member's weight, and what its forwards take, in seconds: forward + sequence·(n - 1) + token·(tokens - n).

    slots: sequences in one forward at most. runs: its server samples consecutive tokens itself, in one request.
    device: members with the same name take turns on it; None for machines of its own. replicas: machines that it has.
    """

    weight: float = Field(gt=0)
    forward: float = Field(ge=0)
    sequence: float = Field(default=0.0, ge=0)
    token: float = Field(default=0.0, ge=0)
    slots: int = Field(default=256, ge=1)
    runs: bool = False
    device: str | None = None
    replicas: int = Field(default=1, ge=1)

    def seconds(self, sequences: int, tokens: int) -> float:
        """Return the time of a forward of so many sequences, with so many tokens in all."""
        return self.forward + self.sequence * (sequences - 1) + self.token * (tokens - sequences)


class RouterCost(_CostsModel):
    """Seconds of one processor for each request, seconds on the way to the server and back, and processes."""

    seconds: float = Field(default=0.0, ge=0)
    delay: float = Field(default=0.0, ge=0)
    processes: int = Field(default=1, ge=1)


class PlanCosts(_CostsModel):
    """All costs of an ensemble."""

    members: Mapping[str, MemberCost] = Field(min_length=1)
    router: RouterCost = RouterCost()

    def with_replicas(self, replicas: Mapping[str, int]) -> PlanCosts:
        """Return the same with other numbers of machines. Raises ConfigError for a member that is not there."""
        for name, count in replicas.items():
            if name not in self.members:
                raise ConfigError(f"there is no member {name!r}", did_you_mean(name, self.members))
            if count < 1:
                raise ConfigError(f"{name} has {count} replicas; it must have 1 or more")
            if self.members[name].device is not None and count > 1:
                raise ConfigError(f"{name} shares the device {self.members[name].device!r} and has no replicas")
        members = {
            name: member.model_copy(update={"replicas": replicas.get(name, member.replicas)})
            for name, member in self.members.items()
        }
        return self.model_copy(update={"members": members})


def read_costs(path: Path) -> PlanCosts:
    """Read a file of costs. Raises ConfigError that names the file, the key and what is wrong with it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file of costs {path}", "make one: python -m research.planning FILE --measure -e ENSEMBLE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return PlanCosts.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{path}: {place}: {first['msg']}", "see python -m research.planning --help for the keys"
        ) from error


def write_costs(costs: PlanCosts, path: Path) -> None:
    """Write a file that `read_costs` reads back."""
    import tomli_w

    form: dict[str, Any] = costs.model_dump(exclude_none=True)
    path.write_text(tomli_w.dumps(form), encoding="utf-8")
