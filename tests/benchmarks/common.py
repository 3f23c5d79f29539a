"""What the benchmarks of CPUs and GPUs share: networks of published shape with random weights, the networks they are compared with, clocks.

Nothing here needs weights, data or anndata.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from cellfm_hub.tokens import Tokens

RESULTS = Path(__file__).parent / "results"
GENES, EXPRESSED = 20_000, 2_190
"""Columns of made-up cells, and how many of them a cell expresses."""


@dataclass(frozen=True)
class Model:
    """A published shape with random weights, and how its default recipe reads it."""

    name: str
    family: str
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


def make_model(name: str, *, seed: int = 0, cut_layers: int | None = None) -> Model:
    """Build the network of a registered checkpoint on the CPU. `cut_layers`: only so many, for a quick look."""
    entry = registry().find(name)
    adapter_class, config = entry.adapter_class(), dict(entry.checkpoint.config)
    assert issubclass(adapter_class, TokenAdapter)
    layers = entry.checkpoint.layers
    assert layers is not None
    if cut_layers is not None:
        for key in ("num_hidden_layers", "nlayers", "encoder_depth"):
            if key in config:
                config[key] = cut_layers
        layers = cut_layers
    with torch.device("meta"):
        network = adapter_class.published(config)[0]
    network.to_empty(device="cpu").eval()
    fill(network, seed)
    adapter = adapter_class()
    adapter.network, adapter.layers = network, layers
    made = ROWS[entry.family](config, np.random.default_rng(seed), 2, 64)
    adapter.special_ids, adapter.poolings = made.special_ids, made.poolings
    recipe = entry.recipes["default"]
    encoder = next(module for module in network.modules() if isinstance(module, Encoder))
    assert entry.checkpoint.embedding_dim is not None
    return Model(
        name=name,
        family=entry.family,
        adapter=adapter,
        config=encoder.config,
        layer=max(recipe.output_layer if recipe.output_layer >= 0 else layers + 1 + recipe.output_layer, 1),
        pooling=recipe.pooling or adapter.poolings[0],
        longest=min(entry.checkpoint.max_tokens or 512, 4096),
        dim=entry.checkpoint.embedding_dim,
    )


def random_tokens(model: Model, lengths: NDArray[np.int64], seed: int = 0) -> Tokens:
    """Draw rows of the given lengths that the network accepts."""
    entry = registry().find(model.name)
    rng = np.random.default_rng(seed)
    parts = [ROWS[model.family](entry.checkpoint.config, rng, 1, 2 * int(n) + 64).tokens for n in lengths]
    ids = [np.resize(part.ids, n) for part, n in zip(parts, lengths, strict=True)]
    values = None if parts[0].values is None else np.concatenate([np.resize(p.values, n) for p, n in zip(parts, lengths, strict=True)])
    return Tokens(ids=np.concatenate(ids), offsets=np.concatenate(([0], np.cumsum(lengths))), values=values)


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


@dataclass(frozen=True)
class Padded:
    """A padded forward over all rows: fixed number of rows a batch, in file order or longest first."""

    network: nn.Module
    rows: int
    by_length: bool = False
    autocast: torch.dtype | None = None

    def run(self, tokens: Tokens, device: torch.device) -> Tensor:
        """Return the means over real tokens, in the order in which they were computed."""
        order = np.argsort(-tokens.lengths, kind="stable") if self.by_length else np.arange(len(tokens))
        pooled = []
        with torch.inference_mode(), torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            for start in range(0, len(order), self.rows):
                part = tokens.take(order[start : start + self.rows])
                ids = torch.from_numpy(part.padded()).to(device).long()
                there = torch.arange(ids.shape[1], device=device) < torch.from_numpy(part.lengths).to(device)[:, None]
                hidden = self.network(ids, there)[:, : there.shape[1]].float()
                there = there[:, : hidden.shape[1]]
                pooled.append((hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True))
        return torch.cat(pooled)


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
    for package in ("torch", "numpy", "numba", "scipy", "transformers", "datasets", "cellfm-hub"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
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
