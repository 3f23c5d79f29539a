"""Find and read Geneformer's dictionaries, in any of the forms in which they are passed around."""

import csv
import io
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from cellfm_adapters.geneformer.tokenizer import Dictionaries
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.errors import CheckpointFormatError, WeightsUnavailableError
from cellfm_hub.safe_files import read_json_object, read_pickled_dict, read_text

CORPORA = {"gc104M": "geneformer", "gc30M": "geneformer/gene_dictionaries_30m"}
"""Training corpus -> folder of its dictionaries in the published repository. V2 and the 95M models use gc104M, V1 gc30M."""

_NAMES = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")


def find_dictionaries(files: CheckpointFiles, folder: Path | None, vocab_size: int) -> Dictionaries:
    """Return the dictionaries that fit the weights.

    Parameters
    ----------
    files
        The checkpoint; dictionaries beside the weights are found (in text form, or as pickles at their published places), then those in
        the cache or on the hub.
    folder
        The user's choice: a folder with pickles, their JSON form (``token_dictionary.json``, …) or their text form (``tokens.tsv``),
        or with one such folder per corpus.
    vocab_size
        Rows of the embedding table.

    Raises
    ------
    WeightsUnavailableError
        If there are none.
    CheckpointFormatError
        If those that there are belong to other weights.
    """
    if folder is not None:
        found = _in_folder(folder)
        if not found:
            expected = ", ".join(f"{name}_gc104M.pkl" for name in _NAMES)
            msg = f"dictionaries={str(folder)!r} holds none; expected {expected}, or tokens.tsv, as released"
            raise WeightsUnavailableError(msg)
        return _fitting(found, vocab_size, files.origin)
    if (tokens := files.find("tokens.tsv")) is not None:
        beside = _read_text(tokens, files.find("aliases.tsv"))
        return _fitting({str(tokens): lambda: beside}, vocab_size, files.origin)
    if files.folder is not None and (found := _beside_weights(files)):
        return _fitting(found, vocab_size, files.origin)
    corpus = _corpus_of(files, vocab_size)
    get = files.get_cached
    return _read_pickles(*(get(f"{CORPORA[corpus]}/{name}_{corpus}.pkl") for name in _NAMES))


def _fitting(found: dict[str, Callable[[], Dictionaries]], vocab_size: int, origin: str) -> Dictionaries:
    sizes = {}
    for place, read in found.items():
        dictionaries = read()
        if len(dictionaries.tokens) == vocab_size:
            return dictionaries
        sizes[place] = len(dictionaries.tokens)
    shown = ", ".join(f"{place} has {size:,}" for place, size in sizes.items())
    msg = f"the weights of {origin} have {vocab_size:,} tokens, but {shown}: dictionaries and weights are of different generations."
    msg += " V1 needs gc30M (25,426), V2 and the 95M models gc104M (20,275); name the right folder with options={'dictionaries': ...}"
    raise CheckpointFormatError(msg)


def _corpus_of(files: CheckpointFiles, vocab_size: int) -> str:
    """Say which published dictionaries weights of this size need."""
    sizes = {25_426: "gc30M", 20_275: "gc104M"}
    if vocab_size not in sizes:
        msg = f"the weights of {files.origin} have {vocab_size:,} tokens, which no published dictionary has (25,426 or 20,275);"
        msg += " name their own with options={'dictionaries': 'folder'}"
        raise CheckpointFormatError(msg)
    return sizes[vocab_size]


def _beside_weights(files: CheckpointFiles) -> dict[str, Callable[[], Dictionaries]]:
    found: dict[str, Callable[[], Dictionaries]] = {}
    for corpus, place in CORPORA.items():
        paths = [files.find(f"{place}/{name}_{corpus}.pkl", f"{name}_{corpus}.pkl") for name in _NAMES]
        if all(paths):
            found[corpus] = lambda paths=paths: _read_pickles(*paths)  # type: ignore[misc]
    return found


def _in_folder(folder: Path) -> dict[str, Callable[[], Dictionaries]]:
    """List the sets of dictionaries in a folder, at its top or in its usual sub-folders."""
    found: dict[str, Callable[[], Dictionaries]] = {}
    for place in (folder, *(folder / sub for sub in (*CORPORA, *CORPORA.values()))):
        for corpus in CORPORA:
            pickles = [place / f"{name}_{corpus}.pkl" for name in _NAMES]
            if all(path.is_file() for path in pickles):
                found[f"{place} ({corpus})"] = lambda pickles=pickles: _read_pickles(*pickles)  # type: ignore[misc]
        if (place / "tokens.tsv").is_file():
            aliases = place / "aliases.tsv" if (place / "aliases.tsv").is_file() else None
            found[f"{place / 'tokens.tsv'}"] = lambda place=place, aliases=aliases: _read_text(place / "tokens.tsv", aliases)  # type: ignore[misc]
        if (place / "token_dictionary.json").is_file():
            found[f"{place / 'token_dictionary.json'}"] = lambda place=place: _read_jsons(place)  # type: ignore[misc]
    return found


def _dictionaries(tokens: dict[str, Any], medians: dict[str, Any], mapping: dict[str, Any], origin: Path) -> Dictionaries:
    for what, content, kind in (("token", tokens, int), ("median", medians, int | float), ("mapping", mapping, str)):
        if wrong := next((key for key, value in content.items() if not isinstance(value, kind)), None):
            msg = f"the {what} dictionary of {origin} maps {wrong!r} to {content[wrong]!r}; it is not a {what} dictionary"
            raise CheckpointFormatError(msg)
    # Counts are divided by the median.
    if wrong := next((key for key, value in medians.items() if not 0 < value < inf), None):
        msg = f"the median dictionary of {origin} maps {wrong!r} to {medians[wrong]!r}, expected numbers above 0; use the published file"
        raise CheckpointFormatError(msg)
    return Dictionaries(tokens, medians, mapping)


def _read_pickles(tokens: Path, medians: Path, mapping: Path) -> Dictionaries:
    return _dictionaries(read_pickled_dict(tokens), read_pickled_dict(medians), read_pickled_dict(mapping), tokens.parent)


def _read_jsons(folder: Path) -> Dictionaries:
    tokens, medians, mapping = ("token_dictionary.json", "gene_median.json", "ensembl_mapping.json")
    read = read_json_object
    return _dictionaries(read(folder / tokens), read(folder / medians), read(folder / mapping), folder)


def _read_text(tokens: Path, aliases: Path | None) -> Dictionaries:
    """Read ``tokens.tsv`` and, where there is one, ``aliases.tsv``; an apostrophe is an ordinary letter in them."""

    def rows(path: Path) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE))

    try:
        entries = rows(tokens)
        genes = [entry for entry in entries if entry["median"]]
        mapping = {entry["token"].upper(): entry["token"] for entry in genes}
        if aliases is not None:
            mapping |= {entry["alias"]: entry["ensembl_id"] for entry in rows(aliases)}
        return _dictionaries(
            {entry["token"]: int(entry["token_id"]) for entry in entries},
            {entry["token"]: float(entry["median"]) for entry in genes},
            mapping,
            tokens.parent,
        )
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        msg = f"{tokens} or the aliases beside it are no table of tokens ({type(error).__name__}: {str(error)[:200]}); expected the columns"
        msg += " token_id, token, median, and alias, ensembl_id"
        raise CheckpointFormatError(msg) from error
