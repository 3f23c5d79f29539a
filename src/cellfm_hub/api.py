"""The two functions most people need: `embed` and `load`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import pandas as pd
import torch
from numpy.typing import NDArray

from cellfm_hub._settings import settings
from cellfm_hub.blocks import Vectors
from cellfm_hub.checkpoints import CheckpointFiles
from cellfm_hub.convert import convert_used
from cellfm_hub.embedder import Embedder
from cellfm_hub.engine.device import Precision, choose_device, choose_dtype
from cellfm_hub.errors import InputError
from cellfm_hub.receipt import Receipt
from cellfm_hub.registry import registry
from cellfm_hub.request import EncodeOptions, OnEmpty
from cellfm_hub.sequences import Long
from cellfm_hub.sources.genome import WINDOW
from cellfm_hub.suitability import check_origin, check_suits, check_switches

if TYPE_CHECKING:
    from anndata import AnnData


def load(
    model: str,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> Embedder:
    """Load a model.

    Parameters
    ----------
    model
        A checkpoint (``"geneformer-v2-104m"``), or a family (``"geneformer"``) for its default checkpoint. ``list_models()`` lists them.
    device
        ``"auto"`` (CUDA, else MPS, else CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.
    precision
        ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    checkpoint
        A folder with the files of the model as published; nothing is downloaded then.
    revision
        Commit on the Hugging Face hub to use instead of the pinned one.
    options
        Switches of the family; ``cellfm info MODEL`` lists them.
    batch_tokens
        Tokens that are computed together; default: by device. Changes speed and memory, and no vector beyond rounding.
    seed
        For models that sample.

    Raises
    ------
    ModelNotFoundError
        If no model has that name.
    InputError
        If an option is unknown or has a wrong value.
    WeightsUnavailableError
        If a file is neither here nor can be fetched.
    CheckpointFormatError
        If the files do not fit together.
    DeviceError
        If the device is not here.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> m = cf.load("kmer", options={"k": 3})
    >>> m.encode(["ACGTACGT", "TTTTTTTT"]).shape
    (2, 64)
    """
    entry = registry().find(model)
    chosen = choose_device(device)
    # What the card measured holds for the published weights only.
    fidelity = entry.fidelity("bfloat16") if checkpoint is None and revision is None else None
    embedder = _open(
        model,
        device=chosen,
        dtype=choose_dtype(precision, chosen, fidelity),
        guard_overflow=precision == "auto" and chosen.type == "cuda",
        checkpoint=checkpoint,
        revision=revision,
        options=options,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    if checkpoint is None and settings.convert:
        convert_used(embedder.files)
    return embedder


def load_tokenizer(
    model: str,
    *,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> Embedder:
    """Load a model as :func:`load` does, but leave its weights on disk: it can tokenize and not embed."""
    return _open(
        model,
        device=torch.device("meta"),
        dtype=torch.float32,
        guard_overflow=False,
        checkpoint=checkpoint,
        revision=revision,
        options=options,
        batch_tokens=None,
        seed=seed,
    )


def _open(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    guard_overflow: bool,
    checkpoint: str | Path | None,
    revision: str | None,
    options: dict[str, Any] | None,
    batch_tokens: int | None,
    seed: int,
) -> Embedder:
    """Find the files of a model and build its adapter."""
    entry = registry().find(model)
    # Somebody's folder is not known to be the family's default checkpoint.
    is_family = model.lower() in (entry.family, *entry.card.cellfm.aliases)
    name = entry.family if checkpoint is not None and is_family else entry.name
    adapter_class = entry.adapter_class()
    parsed = adapter_class.options.parse(options, entry.name)
    check_origin(entry, checkpoint, revision)
    files = CheckpointFiles(entry, None if checkpoint is None else Path(checkpoint), revision)
    files.check_use()
    return Embedder(
        name,
        entry,
        adapter_class.load(files, parsed, device, dtype),
        files,
        options=parsed,
        device=device,
        dtype=dtype,
        guard_overflow=guard_overflow,
        batch_tokens=batch_tokens,
        seed=seed,
    )


class EmbedOptions(EncodeOptions, total=False):
    """Keyword options of :func:`embed`."""

    key_added: str | None
    device: str
    precision: Precision
    checkpoint: str | Path | None
    revision: str | None
    options: dict[str, Any] | None
    qc: bool


Sequences = str | Path | list[str] | dict[str, str] | pd.Series


@overload
def embed(data: Sequences, model: str, **options: Unpack[EmbedOptions]) -> Vectors: ...
@overload
def embed(data: "AnnData", model: str, *, copy: Literal[False] = False, **options: Unpack[EmbedOptions]) -> None: ...
@overload
def embed(data: "AnnData", model: str, *, copy: Literal[True], **options: Unpack[EmbedOptions]) -> "AnnData": ...
def embed(
    data: Any,
    model: str,
    *,
    layer: str | None = None,
    gene_ids: str | None = None,
    species: str | None = None,
    key_added: str | None = None,
    copy: bool = False,
    recipe: str = "default",
    pooling: str | None = None,
    output_layer: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_tokens: int | None = None,
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
    on_empty: OnEmpty | None = None,
    progress: bool | None = None,
    long: Long = "error",
    overlap: int = 0,
    reverse_complement: Literal["mean"] | None = None,
    genome: str | Path | None = None,
    window: int = WINDOW,
    qc: bool = False,
) -> "AnnData | Vectors | None":
    """Embed cells or sequences with a published model.

    Parameters
    ----------
    data
        An AnnData object; or the path of a file, store or folder of cells, a list, dict or Series of sequences, or the path of a FASTA,
        FASTQ, BED or VCF file. :meth:`cellfm_hub.Embedder.encode` names the formats.
    model
        Name of a family or checkpoint; ``list_models()`` lists them.
    key_added
        AnnData only: key in ``obsm`` and ``uns["cellfm"]``. Default: ``X_`` and the name of the model as given.
    copy
        AnnData only: return a copy with the result instead of writing into `data`.
    layer, gene_ids, species, recipe, pooling, output_layer, batch_tokens, seed, on_empty, progress
        See :meth:`cellfm_hub.Embedder.encode`.
    long, overlap, reverse_complement, genome, window
        The same, for sequences only.
    device, precision, checkpoint, revision, options
        See :func:`cellfm_hub.load`.
    qc
        AnnData only: add what the model saw of each cell to ``obs``.

    Returns
    -------
    For an AnnData object ``None`` (or the copy), and these fields are set:

    ``.obsm[key_added]``
        ``(n_obs, d)`` float32; NaN for cells without any gene the model knows.
    ``.uns["cellfm"][key_added]``
        The receipt: model, revision and hash of the weights, recipe, coverage, precision, seed, versions.
    ``.obs[f"{key_added}_genes_used"]``, with `qc`
        Expressed genes of the cell that the model knows, int32; 0 where the model gets nothing of the cell.
    ``.obs[f"{key_added}_counts_used"]``, with `qc`
        Share of the cell's counts that are on these genes, float32; NaN without counts.
    ``.obs[f"{key_added}_truncated"]``, with `qc`
        Whether only a part of these genes fitted into the model's input, bool.

    For anything else ``(n, d)`` float32.

    Raises
    ------
    CellFMError
        One line that says what came, what was expected and what to do.

    Examples
    --------
    >>> import cellfm_hub as cf
    >>> adata = cf.datasets.pbmc700()
    >>> cf.embed(adata, "pca", options={"n_components": 20})
    >>> adata.obsm["X_pca"].shape
    (700, 20)
    """
    is_anndata = hasattr(data, "obsm") and hasattr(data, "uns")
    if not is_anndata and (copy or key_added is not None or qc):
        msg = f"copy, key_added and qc are for AnnData objects; for {type(data).__name__} the vectors are returned, leave them out"
        raise InputError(msg)
    encode = EncodeOptions(
        batch_tokens=batch_tokens,
        seed=seed,
        layer=layer,
        gene_ids=gene_ids,
        species=species,
        recipe=recipe,
        pooling=pooling,
        output_layer=output_layer,
        on_empty=on_empty,
        progress=progress,
        long=long,
        overlap=overlap,
        reverse_complement=reverse_complement,
        genome=genome,
        window=window,
    )
    if is_anndata and not isinstance(receipts := data.uns.get("cellfm", {}), Mapping):
        msg = f"adata.uns['cellfm'] is a {type(receipts).__name__}; the receipt goes there, into a dict: rename what is there"
        raise InputError(msg)
    entry = registry().find(model)
    check_switches(entry, options)
    check_suits(data, model, entry, **encode)
    embedder = load(
        model,
        device=device,
        precision=precision,
        checkpoint=checkpoint,
        revision=revision,
        options=options,
    )
    result = embedder.run(data, **encode)
    if not is_anndata:
        return result.values
    target = data.copy() if copy else data
    store(target, key_added or default_key(model), result.values, receipt=result.receipt, qc=result.qc if qc else {})  # type: ignore[arg-type]
    return target if copy else None


def default_key(model: str) -> str:
    """Return the key a result is stored under: ``X_`` and the name the user gave."""
    return f"X_{model.replace('/', '_')}"


def store(adata: "AnnData", key: str, values: Vectors, *, receipt: Receipt, qc: Mapping[str, NDArray[Any]]) -> None:
    """Write a result into an AnnData object; the columns `qc` go to ``obs``, named by `key`."""
    with warnings.catch_warnings():
        # Writing into a view makes it an object of its own, which is what the caller wants.
        warnings.filterwarnings("ignore", message=".*view.*")
        adata.obsm[key] = values
        receipts = dict(adata.uns.get("cellfm", {}))
        receipts[key] = receipt
        adata.uns["cellfm"] = receipts
        for name, column in qc.items():
            adata.obs[f"{key}_{name}"] = column
