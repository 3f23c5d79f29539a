"""What the benchmarks of CPUs and GPUs share: networks of published shape with random weights, the networks they are compared with, clocks.

Nothing here needs weights, data or anndata.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.fidelity import ROWS, fill, processor
from cellfm_adapters.geneformer.tokenizer import Dictionaries, Tokenizer
from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.engine.run import run_network
from cellfm_hub.nn import Encoder, EncoderConfig
from cellfm_hub.registry import registry
from cellfm_hub.tokens import Tokens, offsets_from_lengths

RESULTS = Path(__file__).parent / "results"
GENES, EXPRESSED = 20_000, 2_190
"""Columns of made-up cells, and how many of them a cell expresses."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Model:
    """A published shape with random weights, and how its default recipe reads it."""

    name: str
    family: str
    published: dict[str, Any]
    """The ``config.json`` that the network was built from."""
    adapter: TokenAdapter
    config: EncoderConfig
    layer: int
    pooling: str
    longest: int
    dim: int

    def run(self, tokens: Tokens, device: torch.device, batch_tokens: int, *, layer: int | None = None, pooling: str | None = None) -> Any:
        """Compute the vectors of all rows, as the hub does."""
        layer, pooling = self.layer if layer is None else layer, pooling or self.pooling
        return run_network(
            lambda batch: self.adapter.row_vectors(batch, layer, pooling),
            tokens,
            dim=self.dim,
            per_token=False,
            device=device,
            batch_tokens=batch_tokens,
            first_only=self.adapter.reads_first_only(pooling),
        )


def make_model(
    name: str,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    cut_layers: int | None = None,
    cut_table: int | None = None,
) -> Model:
    """Build the network of a registered checkpoint, its random weights made on the device.

    For a quick look it may be cut to so many layers, and UCE's table of tokens to so many rows.
    """
    entry = registry().find(name)
    adapter_class, published = entry.adapter_class(), dict(entry.checkpoint.config)
    assert issubclass(adapter_class, TokenAdapter)
    layers = cut_layers or entry.checkpoint.layers
    assert layers is not None
    for key in ("num_hidden_layers", "nlayers", "encoder_depth"):
        if key in published:
            published[key] = layers
    if cut_table and "rows" in published:
        published["rows"] = cut_table
    with torch.device("meta"):
        network = adapter_class.published(published)[0]
    network.to_empty(device=device).eval()
    fill(network, seed=0)
    adapter = adapter_class()
    adapter.network, adapter.layers = network.to(dtype), layers
    made = ROWS[entry.family](published, np.random.default_rng(0), 2, 64)
    adapter.special_ids, adapter.poolings = made.special_ids, made.poolings
    recipe = entry.recipes["default"]
    assert entry.checkpoint.embedding_dim is not None
    return Model(
        name=name,
        family=entry.family,
        published=published,
        adapter=adapter,
        config=replace(encoder_of(network).config, layers=layers),
        layer=max(recipe.output_layer if recipe.output_layer >= 0 else layers + 1 + recipe.output_layer, 1),
        pooling=recipe.pooling or adapter.poolings[0],
        longest=min(entry.checkpoint.max_tokens or 512, 4096),
        dim=entry.checkpoint.embedding_dim,
    )


def encoder_of(network: nn.Module) -> Encoder:
    """Return the transformer inside a network."""
    return next(module for module in network.modules() if isinstance(module, Encoder))


def random_tokens(model: Model, lengths: NDArray[np.int64], seed: int = 0) -> Tokens:
    """Draw rows of the given lengths that the network accepts, all at once: any ids, special ones in their places. At least 4 tokens."""
    rng, config = np.random.default_rng(seed), model.published
    offsets = offsets_from_lengths(np.maximum(lengths, 4))
    first, last, total = offsets[:-1], offsets[1:] - 1, int(offsets[-1])
    values = None
    if model.family == "geneformer":
        ids = rng.integers(4, config["vocab_size"], total)
    elif model.family == "scgpt":  # <cls> with the value of padding, then genes with bins
        ids, values = rng.integers(0, config["ntoken"] - 3, total), rng.integers(1, 51, total).astype(np.float32)
        ids[first], values[first] = config["ntoken"] - 2, -2
    elif model.family == "uce":
        ids = rng.integers(4, vocabulary_of(model), total)
        ids[first] = 3
    elif model.family == "scfoundation":  # genes with log-normalised counts, then target depth and source depth
        genes = config["seq_len"] - 2
        ids, values = rng.integers(0, genes, total), rng.gamma(2, 1, total).astype(np.float32)
        ids[last - 1], values[last - 1] = genes, 4
        ids[last], values[last] = genes + 1, 3.5
    elif model.family == "nucleotide-transformer":
        ids = rng.integers(4, config["vocab_size"] - 5, total)
        ids[first] = 3
    else:  # DNABERT: [CLS] … [SEP]
        ids = rng.integers(5, config["vocab_size"], total)
        ids[first], ids[last] = 1, 2
    return Tokens(ids=ids.astype(np.int32), offsets=offsets, values=values)


def useful_flops(config: EncoderConfig, lengths: NDArray[np.int64], layers: int) -> float:
    """Count the operations of an encoder on real tokens alone."""
    matrices = 4 * config.dim**2 + (3 if config.gated else 2) * config.dim * config.ffn_dim
    n = lengths.astype(np.float64)
    return float(layers * (n * 2 * matrices + 4 * n**2 * config.dim).sum())


# What others run: rows padded to the longest of their batch


class HuggingFace(nn.Module):
    """A BERT of the transformers package, with its language-model head or without. A gate in the feed-forward is left out."""

    def __init__(self, config: EncoderConfig, vocabulary: int, longest: int, *, attention: str, head: bool = False) -> None:
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM, BertModel

        bert = BertConfig(
            vocab_size=vocabulary,
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ffn_dim,
            max_position_embeddings=longest,
            hidden_act="relu" if config.activation == "relu" else "gelu",
            attn_implementation=attention,
        )
        self.head = head
        self.network = BertForMaskedLM(bert) if head else BertModel(bert, add_pooling_layer=False)
        self.eval()

    def forward(self, ids: Tensor, there: Tensor) -> Tensor:
        """Return the last hidden state; with a head the one before, as Geneformer's release does."""
        if self.head:
            out: Tensor = self.network(ids, attention_mask=there.long(), output_hidden_states=True).hidden_states[-2]
            return out
        last: Tensor = self.network(ids, attention_mask=there.long()).last_hidden_state
        return last


class TorchLayers(nn.Module):
    """``nn.TransformerEncoder``, as the releases of scGPT and scFoundation use it: in evaluation it takes torch's "fast path"."""

    def __init__(self, config: EncoderConfig, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, config.dim)
        layer = nn.TransformerEncoderLayer(config.dim, config.heads, config.ffn_dim, activation="relu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, config.layers)
        self.eval()

    def forward(self, ids: Tensor, there: Tensor) -> Tensor:
        """Return the last hidden state."""
        out: Tensor = self.layers(self.words(ids), src_key_padding_mask=~there)
        return out


def padded_batches(
    lengths: NDArray[np.int64], *, rows: int | None = None, budget: int | None = None, multiple: int = 1
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Cut batches in either of two ways; give the rows of each, and to what length they are padded, a multiple of `multiple`.

    `rows`: so many rows a batch, in the order they come in, as the original releases do. `budget`: longest first, as many rows as fit so
    many tokens, padding counted, which is what a careful user would do.
    """
    assert (rows is None) != (budget is None)
    order = np.arange(len(lengths)) if budget is None else np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = lengths[order[start : start + (rows or 1)]].max()
        padded = int(-(-longest // multiple) * multiple)
        index = order[start : start + (rows or max((budget or 0) // padded, 1))]
        yield index, padded
        start += len(index)


def padding(lengths: NDArray[np.int64], **batches: int) -> float:
    """Return padded over real tokens."""
    return float(sum(len(index) * padded for index, padded in padded_batches(lengths, **batches)) / lengths.sum())


@dataclass(frozen=True)
class Padded:
    """A padded forward over all rows, with batches as `padded_batches` cuts them."""

    network: nn.Module
    rows: int | None = None
    budget: int | None = None
    multiple: int = 1
    autocast: torch.dtype | None = None

    def run(self, tokens: Tokens, device: torch.device) -> Tensor:
        """Return the means over real tokens, in the order in which they were computed."""
        pooled = []
        with torch.inference_mode(), torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            for index, padded in padded_batches(tokens.lengths, rows=self.rows, budget=self.budget, multiple=self.multiple):
                part = tokens.take(index)
                there = np.arange(padded) < part.lengths[:, None]
                ids = np.zeros(there.shape, dtype=np.int64)
                ids[there] = part.ids
                real = torch.from_numpy(there).to(device, non_blocking=True)
                hidden = self.network(torch.from_numpy(ids).to(device, non_blocking=True), real)
                real = real[:, : hidden.shape[1], None]  # nn.TransformerEncoder may cut what is padding in all rows
                pooled.append(((hidden * real).sum(1) / real.sum(1)).float())
        return torch.cat(pooled).cpu()


def vocabulary_of(model: Model) -> int:
    """Return the entries of the largest token table."""
    sizes = [m.num_embeddings for m in model.adapter.network.modules() if isinstance(m, nn.Embedding)]
    return max([*sizes, *(len(t) for n, t in model.adapter.network.named_buffers() if n == "tokens")])


# Made-up cells


def made_up_cells(cells: int, seed: int = 0) -> sp.csr_matrix:
    """Cells with some 2,190 expressed genes and counts as they are in life: mostly ones."""
    rng = np.random.default_rng(seed)
    chance = rng.lognormal(0, 1.5, GENES)
    chance = np.minimum(chance / chance.sum() * EXPRESSED * 1.25, 1)
    rows = [np.flatnonzero(rng.random(GENES) < chance) for _ in range(cells)]
    indptr = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    data = rng.geometric(0.45, indptr[-1]).astype(np.float32)
    return sp.csr_matrix((data, np.concatenate(rows).astype(np.int32), indptr), shape=(cells, GENES))


def rank_tokenizer(rng: np.random.Generator) -> tuple[Tokenizer, list[str], np.ndarray]:
    """Make a tokenizer for all the genes, and their names and medians."""
    genes, medians = [f"ENSG{i:011d}" for i in range(GENES)], rng.lognormal(0.5, 0.5, GENES)
    tokens = {"<pad>": 0, "<mask>": 1} | {gene: i + 2 for i, gene in enumerate(genes)}
    dictionaries = Dictionaries(tokens, dict(zip(genes, medians, strict=True)), {gene: gene for gene in genes})
    return Tokenizer(dictionaries, 2048), genes, medians


# Clocks and reports


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """Run all variants in turn, several times; return the shortest time of each. Other work on the machine can only add time."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in variants.items():
            best[name] = min(seconds(call), best.get(name, np.inf))
    return best


def cpu_seconds(call: Callable[[], object]) -> float:
    """Measure the processor time of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def wall_seconds(call: Callable[[], object]) -> float:
    """Measure the time on the wall."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gemm_flops(device: torch.device, dtype: torch.dtype, size: int, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Measure how many operations a second a square matrix product makes."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(5))


def environment() -> dict[str, Any]:
    """Say when, where and with what."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "scipy", "pandas", "anndata", "h5py", "transformers", "datasets", "cellfm-hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "cuda": torch.version.cuda if cuda else None,
        },
        "versions": versions,
    }


def significant(value: Any, digits: int = 3) -> Any:
    """Round every number of a report."""
    if isinstance(value, dict):
        return {key: significant(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [significant(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(significant(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parser(doc: str | None, sections: tuple[str, ...], default: Path) -> argparse.ArgumentParser:
    """Make the options that both benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("sections", nargs="*", choices=[[], *sections], help="what to measure; default: all of it")
    made.add_argument("--smoke", action="store_true", help="tiny inputs: shows that everything runs, measures nothing of worth")
    made.add_argument("--json", type=Path, default=default, help="where to write the results")
    return made
