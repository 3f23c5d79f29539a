"""What a result says of itself: flat, so that every file format can hold it."""

import json
import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cellfm_hub._version import __version__
from cellfm_hub.qc import CellQuality
from cellfm_hub.sequences import BaseCounts

Receipt = dict[str, str | int | float | bool]


@dataclass
class Tally:
    """What happened to the rows of a run, added up as they pass."""

    rows: int = 0
    empty: int = 0
    """Rows without anything the model can use; their vectors are NaN."""
    truncated: int = 0
    """Rows of which only a part fitted into the model's input."""
    facts: dict[str, str | int | float | bool] = field(default_factory=dict)
    """What was read: the matrix, the gene column, the coverage."""
    counts: float = 0.0
    counts_used: float = 0.0
    """Total counts, and those on genes the model knows."""
    tokens_cut: int = 0
    """Tokens that did not fit into the model's input."""
    precisions: list[str] = field(default_factory=list)
    """What the vectors were computed in: more than one where values overflowed on the way."""
    cells: CellQuality = field(default_factory=CellQuality)
    """What the model saw of each cell."""
    bases: BaseCounts = field(default_factory=BaseCounts)

    def add(self, other: "Tally") -> None:
        """Add the tally of other rows of the same data."""
        self.facts |= other.facts
        for precision in other.precisions:
            self.computed_in(precision)
        for name in ("rows", "empty", "truncated", "counts", "counts_used", "tokens_cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cells.extend(other.cells)
        for name, count in vars(other.bases).items():
            setattr(self.bases, name, getattr(self.bases, name) + count)

    def computed_in(self, precision: str) -> None:
        """Note what vectors were computed in."""
        if precision not in self.precisions:
            self.precisions.append(precision)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain numbers and strings, without the columns of single cells, and the precision, which a part notes itself."""
        written = asdict(replace(self, cells=CellQuality()))
        del written["cells"], written["precisions"]
        return written

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> "Tally":
        """Take back what :meth:`as_json` gave."""
        return cls(**{**written, "facts": dict(written["facts"]), "bases": BaseCounts(**written["bases"])})

    def warnings(self) -> list[str]:
        """Say what a user should know without asking."""
        said = []
        if self.empty:
            said.append(f"{self.empty:,} of {self.rows:,} rows hold nothing the model knows; their vectors are NaN")
        if self.truncated:
            bases = f" ({self.bases.truncated:,} bases)" if self.bases.truncated else ""
            said.append(f"{self.truncated:,} of {self.rows:,} rows were longer than the model's input and were cut{bases}")
        if self.bases.upper_cased:
            said.append(f"{self.bases.upper_cased:,} of {self.bases.bases:,} bases were lower case and were upper-cased")
        if self.bases.u_to_t:
            said.append(f"{self.bases.u_to_t:,} U were read as T")
        if self.bases.unknown:
            said.append(f"{self.bases.unknown:,} of {self.bases.bases:,} bases are unknown to the model")
        if self.counts and self.counts_used < 0.5 * self.counts:
            said.append(f"the model knows genes with only {self.counts_used / self.counts:.0%} of all counts")
        return said

    def receipt(self) -> Receipt:
        """Return the tally's own entries."""
        out: Receipt = {"n_rows": self.rows, "n_empty": self.empty, "n_truncated": self.truncated, "tokens_cut": self.tokens_cut}
        if self.precisions:
            out["precision"] = "+".join(self.precisions)
        out |= self.facts
        if self.counts:
            out |= {"counts": self.counts, "counts_used": round(self.counts_used / self.counts, 6)}
        out |= self.cells.medians()
        if self.bases.bases:
            out |= {
                "bases": self.bases.bases,
                "bases_upper_cased": self.bases.upper_cased,
                "bases_u_to_t": self.bases.u_to_t,
                "bases_ambiguous": self.bases.ambiguous,
                "bases_unknown": self.bases.unknown,
                "bases_truncated": self.bases.truncated,
            }
        return out


def versions() -> Receipt:
    """Return the versions that numbers depend on."""
    return {
        "cellfm_hub_version": __version__,
        "python_version": platform.python_version(),
        "torch_version": str(torch.__version__),
        "numpy_version": np.__version__,
    }


def as_text(value: Any) -> str:
    """Write a nested value as one string."""
    return json.dumps(value, sort_keys=True, default=str)
