"""Finished parts, read back in order as one result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from cellfm_hub.blocks import Vectors
from cellfm_hub.errors import InputError
from cellfm_hub.jobs import beside
from cellfm_hub.jobs import parts as files
from cellfm_hub.jobs.content import Content, RowFacts, row_facts
from cellfm_hub.jobs.journal import Part
from cellfm_hub.qc import CellQuality
from cellfm_hub.receipt import Receipt, Tally


def fingerprints(header: Mapping[str, Any]) -> Receipt:
    """Return what tells the files that a result was made from, as its receipts have it."""
    found: Receipt = {"input_fingerprint": header["input"]["sha256"]}
    return found if header["genome"] is None else found | {"genome_fingerprint": header["genome"]["sha256"]}


SLICE = 8192
"""Rows of a fitted model's vectors that are passed on at a time."""


@dataclass(frozen=True)
class Model:
    """One column of a result."""

    key: str
    receipt: Receipt
    width: int
    tally: Tally


class Finished:
    """The result of a run, on disk. Rows pass through memory a part at a time.

    Parameters
    ----------
    header
        The run's, from its journal.
    parts
        The finished parts, in order, each with the folder it is in.
    fitted
        Vectors of models that are fitted to all rows, by the model's place.
    """

    def __init__(self, header: Mapping[str, Any], parts: Sequence[tuple[Path, Part]], fitted: Mapping[int, tuple[Path, Part]]) -> None:
        self._parts, self._fitted = list(parts), dict(fitted)
        self._rows_of_data: int | None = header["rows"]
        """As many rows as the data have, where that was known before they were read."""
        self.per_token: bool = header["per_token"]
        self.qc: bool = header["qc"]
        """Whether what the models saw of each cell is to be written too."""
        self.models = [self._model(header, i) for i in range(len(header["models"]))]
        self._asked: list[Receipt] = [about["receipt"] for about in header["models"]]
        if header["out"] == ".npy":
            self.models[0].receipt["beside"] = " ".join(self.beside())

    def _model(self, header: Mapping[str, Any], place: int) -> Model:
        about = header["models"][place]
        of_model = [self._fitted[place][1]] if place in self._fitted else [part for _, part in self._parts]
        tally, at = Tally(), 0 if place in self._fitted else place
        for part in of_model:
            tally.add(Tally.from_json(part.tallies[at]))
        tally.cells = self.cells(place)
        precisions = dict.fromkeys(precision for part in of_model for precision in part.precisions[at].split("+"))
        receipt = about["receipt"] | {"precision": "+".join(precisions)} | tally.receipt() | header["versions"]
        receipt |= fingerprints(header)
        return Model(about["key"], receipt, of_model[0].widths[at] if of_model else 0, tally)

    @property
    def rows(self) -> int:
        """Inputs in all."""
        return self.models[0].tally.rows

    def check(self) -> None:
        """See that the parts are the rows of the data, for every model, before anything is written.

        Raises
        ------
        InputError
            If there are more of them, or fewer.
        """
        expected = sum(part.rows for _, part in self._parts) if self._rows_of_data is None else self._rows_of_data
        for place, model in enumerate(self.models):
            of_model = [self._fitted[place]] if place in self._fitted else self._parts
            if (found := sum(part.rows for _, part in of_model)) != expected or model.tally.rows != expected:
                msg = f"the finished parts hold {found:,} vectors of {model.key}, the data have {expected:,} rows; {_ANEW}"
                raise InputError(msg)
            for _, part in [] if self.per_token else of_model:
                if (width := part.widths[0 if place in self._fitted else place]) != model.width:
                    msg = f"the finished parts hold vectors of {model.key} of {model.width} and of {width} numbers; {_ANEW}"
                    raise InputError(msg)
        for folder, part in self._fitted.values() if self._parts else ():
            self.check_names(pd.Index(files.read_names(folder / part.file)))

    def check_names(self, index: pd.Index) -> None:
        """See that the rows are those of the table beside which they are written, in its order.

        Raises
        ------
        InputError
            If they are not.
        """
        start = 0
        for names in self.names():
            there = index[start : start + len(names)].astype(str).tolist()
            if there != names:
                differs = next((i for i, (a, b) in enumerate(zip(names, there, strict=False)) if a != b), len(there))
                other = f"is {there[differs]!r}" if differs < len(there) else "does not exist"
                msg = f"row {start + differs:,} of the finished parts is {names[differs]!r}, that row of the data {other}; {_ANEW}"
                raise InputError(msg)
            start += len(names)
        if start != len(index):
            msg = f"the finished parts hold {start:,} rows, the data have {len(index):,}; {_ANEW}"
            raise InputError(msg)

    def names(self) -> Iterator[list[str]]:
        """Give what the rows are called, part by part."""
        if self._parts:
            for folder, part in self._parts:
                yield files.read_names(folder / part.file)
        else:
            folder, part = next(iter(self._fitted.values()))
            names = files.read_names(folder / part.file)
            yield from (names[start : start + SLICE] for start in range(0, len(names), SLICE))

    def vectors(self, place: int) -> Iterator[Vectors]:
        """Give the vectors of a model, by its place, in the same pieces."""
        if place in self._fitted:
            folder, part = self._fitted[place]
            vectors, start = files.read_vectors(folder / part.file, 0), 0
            for names in self.names():
                yield vectors[start : start + len(names)]
                start += len(names)
        else:
            for folder, part in self._parts:
                yield files.read_vectors(folder / part.file, place)

    def row_facts(self, place: int) -> Iterator[RowFacts] | None:
        """Give what each vector of a model was made from, in the same pieces; ``None`` where the model does not say."""
        if place in self._fitted or self.per_token or not self._parts or self._content(place, 0) is None:
            return None
        receipt = self._asked[place]
        return (row_facts(self._content(place, i), vectors, receipt) for i, vectors in enumerate(self.vectors(place)))  # type: ignore[arg-type]

    def _content(self, place: int, number: int) -> Content | None:
        folder, part = self._parts[number]
        return files.read_content(folder / part.file, place)

    def cells(self, place: int) -> CellQuality:
        """Return what a model saw of each cell: nine bytes per row."""
        found = CellQuality()
        for folder, part in [self._fitted[place]] if place in self._fitted else self._parts:
            found.extend(files.read_cells(folder / part.file, 0 if place in self._fitted else place))
        return found

    def qc_columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns that ``qc`` adds to ``obs``, for all models; none where it was not asked for."""
        return {f"{model.key}_{name}": column for model in self.models for name, column in model.tally.cells.columns().items() if self.qc}

    def beside(self) -> list[str]:
        """Return the suffixes of the files that an ``.npy`` of the vectors has beside it."""
        hashed = 0 not in self._fitted and any(files.read_content(folder / part.file, 0) is not None for folder, part in self._parts[:1])
        always = [beside.IDS, beside.RECEIPT]
        return always + [beside.ROWS] * hashed + [beside.QC] * bool(self.qc_columns())

    def tables(self) -> Iterator[Any]:
        """Give one vector per token, as arrow tables."""
        for folder, part in self._parts:
            yield from files.read_tokens(folder / part.file)


_ANEW = "nothing was written; compute them anew with --overwrite"
