"""Masked modelling, for the miniature checkpoints: what both training programs share.

A checkpoint with random weights is written in the published layout and loaded by the hub like any other. Its network is then trained, and
written back into the same layout. So tokens and network are by construction those that the adapter will use.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cellfm_hub.adapter import TokenAdapter
from cellfm_hub.nn import PackedBatch, segment_mean
from cellfm_hub.nn.meta import meta_device
from cellfm_hub.registry import registry
from cellfm_hub.tokens import Tokens
from cellfm_hub.weights import Layout

_INIT_STD = 0.02


@dataclass(frozen=True)
class HeadKeys:
    """Published names of the parts of a language-model head: ``decoder(norm(activation(dense(x)))) + bias``."""

    dense: str
    norm: str
    bias: str
    decoder: str
    words: str
    """The embedding of the tokens; the decoder where that is tied to it."""
    tied: bool
    activation: Callable[[Tensor], Tensor]


BERT_HEAD = HeadKeys(
    dense="cls.predictions.transform.dense",
    norm="cls.predictions.transform.LayerNorm",
    bias="cls.predictions.bias",
    decoder="cls.predictions.decoder.weight",
    words="bert.embeddings.word_embeddings.weight",
    tied=True,
    activation=F.relu,
)
ESM_HEAD = HeadKeys(
    dense="lm_head.dense",
    norm="lm_head.layer_norm",
    bias="lm_head.bias",
    decoder="lm_head.decoder.weight",
    words="esm.embeddings.word_embeddings.weight",
    tied=False,
    activation=F.gelu,
)


class Head(nn.Module):
    """Scores tokens for masked places."""

    def __init__(self, keys: HeadKeys, tensors: dict[str, Tensor], eps: float, words: nn.Parameter) -> None:
        super().__init__()
        width = words.shape[1]
        self.activation = keys.activation
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(tensors[keys.bias].clone())
        self.decoder = words if keys.tied else nn.Parameter(tensors[keys.decoder].clone())
        self.dense.load_state_dict({name: tensors[f"{keys.dense}.{name}"] for name in ("weight", "bias")})
        self.norm.load_state_dict({name: tensors[f"{keys.norm}.{name}"] for name in ("weight", "bias")})

    def forward(self, hidden: Tensor, candidates: Tensor | None) -> Tensor:
        """Return the scores of `candidates` (ids; ``None``: all tokens), ``(M, C)``, for masked places ``(M, D)``."""
        x = self.norm(self.activation(self.dense(hidden)))
        if candidates is None:
            return F.linear(x, self.decoder, self.bias)
        return F.linear(x, self.decoder[candidates], self.bias[candidates])

    def published(self, keys: HeadKeys) -> dict[str, Tensor]:
        """Return the tensors under their published names."""
        named = {f"{keys.dense}.{name}": tensor for name, tensor in self.dense.state_dict().items()}
        named |= {f"{keys.norm}.{name}": tensor for name, tensor in self.norm.state_dict().items()}
        named[keys.bias] = self.bias.detach()
        if not keys.tied:
            named[keys.decoder] = self.decoder.detach()
        return named


def layout_of(family: str, config: dict[str, Any]) -> Layout:
    """Return the layout of a checkpoint's file."""
    adapter = registry().find(family).adapter_class()
    assert issubclass(adapter, TokenAdapter)
    with meta_device():
        return adapter.published(config)[1]


def random_tensors(layout: Layout, seed: int) -> dict[str, Tensor]:
    """Draw an untrained checkpoint: matrices normal with standard deviation 0.02, norms 1, biases 0, as BERT and ESM begin."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, key in layout.items():
        if not key.required:
            continue
        if name.endswith("bias"):
            tensors[name] = torch.zeros(key.shape)
        elif "norm" in name.lower():
            tensors[name] = torch.ones(key.shape)
        else:
            tensors[name] = torch.randn(key.shape, generator=generator) * _INIT_STD
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors``, in float16."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    halves = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # readable by all, as every other file of a package


def trained_tensors(network: nn.Module, head: Head, keys: HeadKeys, layout: Layout, begin: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of the published file from a trained network; what no one trains stays as it began."""
    state = network.state_dict()
    tensors = dict(begin)
    for name, key in layout.items():
        if key.to is not None:
            index, parts = key.part
            tensors[name] = state[key.to].chunk(parts)[index]
    return tensors | head.published(keys)


@dataclass(frozen=True)
class Step:
    """One batch of unmasked rows."""

    tokens: Tokens
    candidates: NDArray[np.int64] | None = None
    """Token ids that the head chooses among, ascending; ``None``: all."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    peak_rate: float
    warmup: int
    mask_share: tuple[float, float]
    """Each batch draws its own share of masked tokens from this range."""
    layer: int
    """Number of layers."""

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to nothing."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden."""

    mask_id: int
    special: tuple[int, ...]
    """Never hidden, never asked for."""


def masked_loss(
    network: nn.Module, head: Head, step: Step, *, layer: int, masking: Masking, share: float, rng: np.random.Generator
) -> Tensor:
    """Return the cross-entropy of masked tokens, asked for in two ways.

    Each from the state of its own place, as BERT does; and all those of a row from the mean state of what was left visible, which is what
    becomes the row's vector. Of the chosen tokens 80 % become ``<mask>``, 10 % another token and 10 % stay.
    """
    tokens = step.tokens
    chosen = (rng.random(len(tokens.ids)) < share) & ~np.isin(tokens.ids, masking.special)
    fate = rng.random(len(tokens.ids))
    choices = step.candidates if step.candidates is not None else np.unique(tokens.ids)
    ids = np.where(chosen & (fate < 0.8), masking.mask_id, tokens.ids)
    ids = np.where(chosen & (fate >= 0.9), rng.choice(choices, len(ids)), ids).astype(np.int32)
    batch = PackedBatch.from_tokens(Tokens(ids=ids, offsets=tokens.offsets), torch.device("cpu"))
    hidden, is_chosen = network(batch, layer), torch.from_numpy(chosen)
    candidates = None if step.candidates is None else torch.from_numpy(step.candidates)
    truth = torch.from_numpy(tokens.ids[chosen].astype(np.int64))
    if candidates is not None:
        truth = torch.searchsorted(candidates, truth)
    by_place = F.cross_entropy(head(hidden[is_chosen], candidates), truth)
    row = torch.arange(len(tokens)).repeat_interleave(batch.segment_lengths)[is_chosen]
    by_row = head(segment_mean(hidden, batch, ~is_chosen), candidates).log_softmax(dim=-1)
    loss: Tensor = by_place - by_row[row, truth].mean()
    return loss


def train(
    network: nn.Module,
    head: Head,
    steps: Iterator[Step],
    held_out: list[Step],
    schedule: Schedule,
    *,
    masking: Masking,
    seed: int,
    every: int = 100,
    on_report: Callable[[list[dict[str, float]]], None] = lambda _curve: None,
) -> list[dict[str, float]]:
    """Train in place.

    Returns
    -------
    The loss curve: step, mean training loss since the entry before, loss on `held_out` with fixed masks, minutes so far.
    """
    network.requires_grad_(requires_grad=True).train()
    named = [*network.named_parameters(), *head.named_parameters()]
    unique = {id(parameter): (name, parameter) for name, parameter in named}
    decayed = [p for _, p in unique.values() if p.ndim > 1]
    plain = [p for _, p in unique.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.98)
    )
    rng = np.random.default_rng(seed)
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    begin = time.perf_counter()

    def report(step: int) -> None:
        with torch.no_grad():
            fixed = np.random.default_rng(0)
            losses = [
                masked_loss(network, head, s, layer=schedule.layer, masking=masking, share=schedule.mask_share[0], rng=fixed)
                for s in held_out
            ]
        minutes = (time.perf_counter() - begin) / 60
        curve.append({"step": step, "train": round(float(np.mean(recent)), 4), "held_out": round(float(torch.stack(losses).mean()), 4)})
        print(f"{curve[-1]} {minutes:.1f} min", flush=True)  # noqa: T201 - a program
        recent.clear()
        on_report(curve)

    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        share = float(rng.uniform(*schedule.mask_share))
        loss = masked_loss(network, head, next(steps), layer=schedule.layer, masking=masking, share=share, rng=rng)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([*decayed, *plain], 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            report(step + 1)
    network.requires_grad_(requires_grad=False).eval()
    return curve
