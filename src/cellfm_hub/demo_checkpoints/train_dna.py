"""Train ``demo-dna``: a Nucleotide Transformer v2 of about a million numbers, on real DNA.

Run ``python -m cellfm_hub.demo_checkpoints.train_dna --data FOLDER --out FOLDER``. FOLDER of the data holds ``dna`` and
``nucleotide-transformer``, see ``model_cards/demo.md`` for what they are and their licences. About 20 minutes on one core. Labels are never
read, and sequences that also stand in a test split or in ``human_nontata_promoters_3k``, on either strand, are left out.

Each batch takes windows of one length at random places, on a random strand, masks 6-mers and asks which they were.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import cellfm_hub as cf
from cellfm_hub.adapter import SequenceAdapter
from cellfm_hub.demo_checkpoints.training import (
    ESM_HEAD,
    Head,
    Masking,
    Schedule,
    Step,
    layout_of,
    random_tensors,
    train,
    trained_tensors,
    write_checkpoint,
)
from cellfm_hub.sequences import reverse_complement
from cellfm_hub.sources.sequences import read_fasta

FAMILY = "nucleotide-transformer"
CONFIG: dict[str, Any] = {
    "architectures": ["EsmForMaskedLM"],
    "model_type": "esm",
    "vocab_size": 4107,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 192,
    "max_position_embeddings": 514,
    "layer_norm_eps": 1e-12,
    "token_dropout": False,
    "position_embedding_type": "rotary",
    "add_bias_fnn": False,
    "tie_word_embeddings": False,
    "emb_layer_norm_before": False,
    "pad_token_id": 1,
    "mask_token_id": 2,
}
MAX_TOKENS = 512
SCHEDULE = Schedule(steps=2000, peak_rate=2e-3, warmup=200, mask_share=(0.15, 0.3), layer=CONFIG["num_hidden_layers"])
TRAIN_ON = (
    "gue/prom_prom_300_tata/train.csv.gz",
    "gue/prom_prom_core_tata/train.csv.gz",
    "gue/splice_reconstructed/dev.csv.gz",
    "gue/mouse_0/train.csv.gz",
    "gue/tf_0/dev.csv.gz",
    "gue/EMP_H3/dev.csv.gz",
    "genomic_benchmarks/human_enhancers_cohn_3k.csv.gz",
)
HELD_BACK = (
    "gue/prom_prom_300_tata/test.csv.gz",
    "gue/prom_prom_core_tata/test.csv.gz",
    "gue/splice_reconstructed/test.csv.gz",
    "genomic_benchmarks/human_nontata_promoters_3k.csv.gz",
)
GENOMES = ("genomes/MT_human.fa", "genomes/MT_orangutan.fa", "genomes/softmasked_hg38_chr13.fa")
LENGTHS = (10, 80)
"""Range of the window, in 6-mers."""
TOKENS_PER_BATCH = 4096
HELD_OUT = 0.02


def read_sequences(data: Path) -> list[str]:
    """Read the training sequences; genomes in pieces of 500 bases."""

    def column(name: str) -> list[str]:
        return [str(s).upper() for s in pd.read_csv(data / "dna" / name)["sequence"]]

    forbidden = {s for name in HELD_BACK for s in column(name)}
    forbidden |= {reverse_complement(s) for s in forbidden}
    found = [s for name in TRAIN_ON for s in column(name)]
    for name in GENOMES:
        for _, sequence in read_fasta(data / "dna" / name):
            found += [sequence[i : i + 500].upper() for i in range(0, len(sequence) - 499, 500)]
    return sorted({s for s in found if s not in forbidden and set(s) <= set("ACGT")})


class Batches:
    """Draws windows of one length."""

    def __init__(self, adapter: SequenceAdapter, sequences: list[str], seed: int) -> None:
        self.adapter, self.rng = adapter, np.random.default_rng(seed)
        self.sequences = sorted(sequences, key=len)
        self.lengths = np.array([len(s) for s in self.sequences])

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """Return one batch."""
        n_tokens = int(self.rng.integers(*LENGTHS, endpoint=True))
        bases = 6 * n_tokens
        first = int(np.searchsorted(self.lengths, bases))  # of the sequences that are long enough
        # A sequence is drawn as often as it is long.
        weights = self.lengths[first:] / self.lengths[first:].sum()
        chosen = first + self.rng.choice(len(weights), TOKENS_PER_BATCH // (n_tokens + 1), p=weights)
        windows = []
        for i in chosen:
            begin = int(self.rng.integers(0, self.lengths[i] - bases, endpoint=True))
            window = self.sequences[i][begin : begin + bases]
            windows.append(reverse_complement(window) if self.rng.random() < 0.5 else window)
        ids = self.adapter.tokenize(windows).ids.reshape(len(windows), n_tokens)
        framed = np.concatenate([np.full((len(windows), 1), self.adapter.prefix[0]), ids], axis=1)
        return Step(cf.Tokens(ids=framed.ravel().astype(np.int32), offsets=np.arange(len(windows) + 1) * (n_tokens + 1)))


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dna/ and nucleotide-transformer/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps, help="0 writes the untrained network")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)

    specials = ("<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>")
    kmers = [a + b + c + d + e + f for a in "ATCG" for b in "ATCG" for c in "ATCG" for d in "ATCG" for e in "ATCG" for f in "ATCG"]
    (given.out / "vocab.txt").write_text("\n".join([*specials, *kmers, *"ATCGN"]), encoding="ascii")
    (given.out / "tokenizer_config.json").write_text(json.dumps({"model_max_length": MAX_TOKENS}) + "\n")
    layout = layout_of(FAMILY, CONFIG)
    begin = random_tensors(layout, given.seed)
    write_checkpoint(given.out, CONFIG, begin)
    if given.steps == 0:
        return

    adapter = cf.load(FAMILY, checkpoint=given.out, device="cpu", precision="float32").adapter
    assert isinstance(adapter, SequenceAdapter)
    head = Head(ESM_HEAD, begin, CONFIG["layer_norm_eps"], adapter.network.get_parameter("words.weight"))
    sequences = read_sequences(given.data)
    print(f"{len(sequences):,} sequences, {sum(map(len, sequences)):,} bases", flush=True)  # noqa: T201 - a program
    shuffled = np.random.default_rng(given.seed).permutation(len(sequences))
    n_held_out = int(HELD_OUT * len(shuffled))
    unseen = Batches(adapter, [sequences[i] for i in shuffled[:n_held_out]], 0)
    held_out = [next(unseen) for _ in range(4)]

    def write(curve: list[dict[str, float]]) -> None:
        write_checkpoint(given.out, CONFIG, trained_tensors(adapter.network, head, ESM_HEAD, layout, begin))
        (given.out / "loss.json").write_text(json.dumps(curve, indent=1) + "\n")

    schedule = Schedule(given.steps, SCHEDULE.peak_rate, SCHEDULE.warmup, SCHEDULE.mask_share, SCHEDULE.layer)
    train(
        adapter.network,
        head,
        iter(Batches(adapter, [sequences[i] for i in shuffled[n_held_out:]], given.seed)),
        held_out,
        schedule,
        masking=Masking(CONFIG["mask_token_id"], tuple(range(len(specials)))),
        seed=given.seed,
        on_report=write,
    )


if __name__ == "__main__":
    main()
