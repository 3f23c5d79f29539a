"""Sequences as genome people have them: FASTA, FASTQ, BED and VCF with a genome; good, odd and damaged."""

import gzip
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.sequences import reverse_complement
from cellfm_hub.sources.genome import Genome, read_bed, read_vcf
from cellfm_hub.sources.sequences import read_fasta, sequence_blocks
from golden_cases import DATA, PORTABLE

pytest.importorskip("pyfaidx", reason="a dependency of cellfm-hub is not installed")

GENOMES = DATA / "dna" / "genomes"


def dnabert2() -> cf.Embedder:
    return cf.load("dnabert2", checkpoint=PORTABLE / "dnabert2-basic" / "checkpoint", device="cpu", precision="float32")


def refused(call: Callable[[], Any], *says: str, error: type[errors.InputError] = errors.SequenceError) -> None:
    """Check that a call raises one line that holds the given words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in says:
        assert word in message, message


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fasta_text(records: dict[str, str], width: int = 60, end: str = "\n") -> str:
    lines = []
    for name, sequence in records.items():
        lines += [f">{name}", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return "".join(line + end for line in lines)


# FASTA and FASTQ

RECORDS = {"one": "ACGTTGCATTGACCA" * 9, "two": "acgtnNRYKM", "three": "T"}


@pytest.mark.parametrize("name", ["x.fa", "x.fasta.gz", "reads", "x.fa.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("width", [1, 7, 60, 10_000])
def test_fasta(tmp_path: Path, name: str, end: str, width: int) -> None:
    path = write(tmp_path / name, fasta_text(RECORDS, width, end))
    assert dict(read_fasta(path)) == RECORDS


def test_gzip_is_seen_from_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(gzip.compress(fasta_text(RECORDS).encode()))
    assert dict(read_fasta(path)) == RECORDS
    # Files of bgzip and of "cat a.gz b.gz" have several members.
    path.write_bytes(gzip.compress(b">a\nAC\n") + gzip.compress(b"GT\n>b\nA"))
    assert list(read_fasta(path)) == [("a", "ACGT"), ("b", "A")]


def test_odd_fasta(tmp_path: Path) -> None:
    """Byte-order mark, text after the name, blank lines, empty and repeated records, no name, no last line end."""
    text = "\ufeff\n>a some text\nAC\n\nGT\n>empty\n>a\nTT\n>\nGG\n>spaced  \nA \n>last\n>ünïcode\nC"
    got = list(read_fasta(write(tmp_path / "x.fa", text)))
    assert got == [("a", "ACGT"), ("empty", ""), ("a", "TT"), ("3", "GG"), ("spaced", "A"), ("last", ""), ("ünïcode", "C")]


def test_ids_are_the_row_names(tmp_path: Path) -> None:
    """In the order of the file, repeated ones too; an empty record is a row of NaN and is counted."""
    path = write(tmp_path / "x.fa", ">b\nACGT\n>empty\n>b\nGATTACA\n>a\nACGT\n")
    result = dnabert2().run(path)
    assert result.names == ["b", "empty", "b", "a"]
    assert isinstance(result.values, np.ndarray)
    assert np.isnan(result.values).all(axis=1).tolist() == [False, True, False, False]
    assert result.receipt["n_empty"] == 1
    np.testing.assert_allclose(result.values[0], result.values[3], atol=2e-6)
    assert dnabert2().run(pd.Series(["A", "C"], index=["x", "y"])).names == ["x", "y"]
    assert dnabert2().run({"p": "A", "q": "C"}).names == ["p", "q"]
    assert dnabert2().run(["A", "C"]).names == ["0", "1"]


@pytest.mark.parametrize("width", [1, 5, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["x.fq", "x.fastq.gz"])
def test_fastq(tmp_path: Path, width: int, end: str, name: str) -> None:
    """Also over several lines, and with qualities that look like headers."""
    rng = random.Random(0)
    lines = []
    for record, sequence in RECORDS.items():
        quality = "".join(rng.choice("@+>I#") for _ in sequence)
        lines += [f"@{record} text"] + [sequence[i : i + width] for i in range(0, len(sequence), width)]
        lines += [rng.choice(["+", f"+{record}"])] + [quality[i : i + width] for i in range(0, len(quality), width)]
    path = write(tmp_path / name, "".join(line + end for line in lines))
    assert dict(read_fasta(path)) == RECORDS


def test_empty_fastq_record(tmp_path: Path) -> None:
    assert list(read_fasta(write(tmp_path / "x.fq", "@a\n\n+\n\n@b\nAC\n+\nII\n"))) == [("a", ""), ("b", "AC")]


@pytest.mark.parametrize(
    "text", ["@a\nACGT\n+\nIII", "@a\nACGT\n+\nIIIII\n", "@a\nACGT\n", "@a\nACGT\n+\nIIII\nrest\n", "@a\nAC\n+\nI\n@b\nAC\n+\nII\n"]
)
def test_damaged_fastq(tmp_path: Path, text: str) -> None:
    refused(lambda: list(read_fasta(write(tmp_path / "x.fq", text))), "x.fq", "not FASTQ", "cut short")


def test_reading_streams(tmp_path: Path) -> None:
    """A file is never in memory as a whole."""
    rng = np.random.default_rng(0)
    path = tmp_path / "big.fa.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        line = "".join(rng.choice(list("ACGT"), 100_000)) + "\n"
        for i in range(1000):
            file.write(f">{i}\n{line}")
    tracemalloc.start()
    bases = sum(len(s) for block in sequence_blocks(path) for s in block.sequences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bases == 100_000_000
    assert peak < 60e6


# Damaged and foreign input


def test_protein(tmp_path: Path) -> None:
    path = write(tmp_path / "p.fa", ">sp|P69905|HBA_HUMAN\nMVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF\n")
    for model in (dnabert2(), cf.load("kmer")):
        refused(lambda m=model: m.encode(path), "sp|P69905|HBA_HUMAN", "'L' at position 3", "nucleotides", "Proteins")  # type: ignore[misc]


def test_rna() -> None:
    """U is read as T, and counted."""
    model = dnabert2()
    np.testing.assert_array_equal(model.encode(["ACGUUGCA", "uuu"]), model.encode(["ACGTTGCA", "TTT"]))
    model.encode(["ACGUUGCA", "uuu"])
    assert model.receipt is not None
    assert model.receipt["bases_u_to_t"] == 5
    assert model.receipt["bases_upper_cased"] == 3


@pytest.mark.parametrize("name", ["x.fa.gz", "x.bed.gz", "x.vcf.gz", "x.fq.gz"])
def test_gzip_cut_short(tmp_path: Path, name: str) -> None:
    genome = write(tmp_path / "g.fa", fasta_text({"chr1": "ACGT" * 500}))
    text = {
        "fa": ">a\n" + "ACGT\n" * 3000,
        "bed": "chr1\t0\t10\n" * 2000,
        "vcf": "chr1\t1\t.\tA\tC\n" * 2000,
        "fq": "@a\nAC\n+\nII\n" * 2000,
    }
    rng = random.Random(0)
    noise = "".join(f">n{rng.random()}\nACGT\n" for _ in range(2000)) if "fa" in name else ""
    path = write(tmp_path / name, text[name.split(".")[1]] + noise)
    path.write_bytes(path.read_bytes()[:-30])
    options = {"genome": genome} if "bed" in name or "vcf" in name else {}
    refused(lambda: list(sequence_blocks(path, **options)), name, "complete gzip", "download it again")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.fa", b"ACGT\n", "begins with 'ACGT'"),
        ("x.fa", b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not text"),
        ("x.fa.gz", b"not gzip at all", "not a complete gzip"),
        ("x.fa", b"", "no sequences"),
        ("x.fa", b"\n\n", "no sequences"),
        ("x.fq.gz", gzip.compress(b"", mtime=0), "no sequences"),
    ],
)
def test_not_sequences(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(lambda: list(sequence_blocks(path)), says)


def test_wrong_arguments(tmp_path: Path) -> None:
    model, wrong = dnabert2(), errors.InputError
    genome = write(tmp_path / "g.fa", ">chr1\nACGT\n")
    bed = write(tmp_path / "x.bed", "chr1\t0\t4\n")
    vcf = write(tmp_path / "x.vcf", "##fileformat=VCFv4.2\nchr1\t2\t.\tC\tG\n")
    refused(lambda: model.encode(tmp_path / "none.fa"), "does not exist", error=wrong)
    refused(lambda: model.encode(tmp_path), "is a folder", error=wrong)
    refused(lambda: model.encode(bed), "genome=", error=wrong)
    refused(lambda: model.encode(vcf), "genome=", error=wrong)
    refused(lambda: model.encode(["ACGT"], genome=genome), "BED or VCF", error=wrong)
    refused(lambda: model.encode(genome, genome=genome), "BED or VCF", error=wrong)
    refused(lambda: model.encode(bed, genome=tmp_path / "none.fa"), "none.fa", "FASTA", error=wrong)
    refused(lambda: model.encode(bed, genome=bed), "does not start with '>'", error=wrong)
    refused(lambda: model.encode(bed, genome=write(tmp_path / "g.fa.gz", ">chr1\nACGT\n")), "gunzip", error=wrong)
    refused(lambda: model.encode(bed, genome=genome, level="variant"), "VCF", error=wrong)
    refused(lambda: model.encode(["ACGT"], level="variant"), "VCF", error=wrong)
    refused(lambda: model.encode_tokens(model.tokenize(["ACGT"]), level="variant"), "VCF", error=wrong)
    refused(lambda: model.encode(vcf, genome=genome, window=0), "window=0", error=wrong)
    refused(lambda: model.encode(vcf, genome=genome, level="variant", pooling="nothing"), "pooling", error=wrong)
    for single in ("ACGTACGT", "ACGT" * 1000, "ACGT..GT" * 1000):
        refused(lambda s=single: model.encode(s), "single string", error=wrong)  # type: ignore[misc]
    geneformer = cf.load("geneformer", checkpoint=PORTABLE / "geneformer-v1-basic" / "checkpoint", device="cpu")
    refused(lambda: geneformer.encode(None, genome=genome), "genome", "not an option", error=wrong)
    refused(lambda: geneformer.encode(None, window=7), "window", "not an option", error=wrong)


@pytest.mark.parametrize("text", [">a\nACGT\nAC\nACGT\n", ">a\nAC\n>a\nGT\n"])
def test_genomes_that_cannot_be_indexed(tmp_path: Path, text: str) -> None:
    """Lines of unequal length inside a record, and a name twice."""
    refused(lambda: Genome(write(tmp_path / "g.fa", text)), "g.fa", "cannot be indexed", error=errors.InputError)


# Intervals

CHROMOSOMES = {"chr1": "ACGTTGCAnnRYacgtKM" * 40, "chr2": "GATTACA", "chrM": "TTGACC" * 50}


@st.composite
def intervals(draw: st.DrawFn) -> tuple[str, int, int, str]:
    chromosome = draw(st.sampled_from(list(CHROMOSOMES)))
    start = draw(st.integers(0, len(CHROMOSOMES[chromosome])))
    return chromosome, start, draw(st.integers(start, len(CHROMOSOMES[chromosome]))), draw(st.sampled_from("+-."))


COMPLEMENT = dict(zip("ACGTRYKMSWNacgtrykmswn", "TGCAYRMKSWNtgcayrmkswn", strict=True))


def straightforward(sequence: str, start: int, end: int, strand: str) -> str:
    """Cut base by base."""
    bases = [sequence[i] for i in range(start, end)]
    return "".join(COMPLEMENT[base] for base in reversed(bases)) if strand == "-" else "".join(bases)


@settings(deadline=None, max_examples=40)
@given(
    places=st.lists(intervals(), min_size=1, max_size=8), width=st.integers(1, 80), end=st.sampled_from(["\n", "\r\n"]), named=st.booleans()
)
def test_intervals(tmp_path_factory: pytest.TempPathFactory, places: list[Any], width: int, end: str, named: bool) -> None:
    folder = tmp_path_factory.mktemp("bed")
    genome = write(folder / "g.fa", fasta_text(CHROMOSOMES, width, end))
    lines = ["track name=x", "# a comment", "", "browser position chr1"]
    lines += [f"{c}\t{a}\t{b}\t{f'peak{i}' if named else '.'}\t0\t{strand}" for i, (c, a, b, strand) in enumerate(places)]
    bed = write(folder / "x.bed", "".join(line + end for line in lines))
    with Genome(genome) as opened:
        got = list(read_bed(bed, opened))
    assert [sequence for _, sequence in got] == [straightforward(CHROMOSOMES[c], a, b, strand) for c, a, b, strand in places]
    plain = [f"{c}:{a}-{b}" + ("" if strand == "." else f"({strand})") for c, a, b, strand in places]
    assert [name for name, _ in got] == ([f"peak{i}" for i in range(len(places))] if named else plain)


def test_three_columns_and_blanks(tmp_path: Path) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    bed = write(tmp_path / "x.bed.gz", "chr2 1 4\nchr2\t0\t7\n")
    (block,) = sequence_blocks(bed, genome=genome)
    assert (block.names, block.sequences) == (["chr2:1-4", "chr2:0-7"], ["ATT", "GATTACA"])
    peaks = write(tmp_path / "x.narrowPeak", "chr2\t1\t4\tp\t0\t-\t1\t1\t1\t1\n")
    (block,) = sequence_blocks(peaks, genome=genome)
    assert (block.names, block.sequences) == (["p"], ["AAT"])


@pytest.mark.skipif(not GENOMES.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["phiX174", "lambda", "MT_human", "MT_orangutan", "softmasked_hg38_chr13", "yersinia_pPCP1_NC_005816"])
def test_windows_of_real_genomes(tmp_path: Path, name: str) -> None:
    """Windows on both strands over a whole genome, base by base."""
    genome = write(tmp_path / "g.fa", (GENOMES / f"{name}.fa").read_bytes().decode())
    records: dict[str, str] = {}
    for line in (GENOMES / f"{name}.fa").read_text().splitlines():
        if line.startswith(">"):
            chromosome = line[1:].split()[0]
            records[chromosome] = ""
        else:
            records[chromosome] += line.strip()
    places = [(c, a, min(a + 331, len(s)), strand) for c, s in records.items() for a in range(0, len(s), 331) for strand in "+-"]
    bed = write(tmp_path / "x.bed", "".join(f"{c}\t{a}\t{b}\t.\t0\t{strand}\n" for c, a, b, strand in places))
    with Genome(genome) as opened:
        assert opened.lengths == {c: len(s) for c, s in records.items()}
        got = [sequence for _, sequence in read_bed(bed, opened)]
    assert got == [straightforward(records[c], a, b, strand) for c, a, b, strand in places]
    vectors = cf.embed(bed, "kmer", genome=genome)
    np.testing.assert_array_equal(vectors, cf.embed(got, "kmer"))

    assert dict(read_fasta(genome)) == records
    snvs = [(c, i, s[i].upper(), COMPLEMENT[s[i].upper()]) for c, s in records.items() for i in range(0, len(s), 997)]
    vcf = write(tmp_path / "x.vcf", "".join(f"{c}\t{i + 1}\t.\t{ref}\t{alt}\n" for c, i, ref, alt in snvs))
    with Genome(genome) as opened:
        windows = list(read_vcf(vcf, opened, 101))
    for (_, reference, alternative), (c, i, _, alt) in zip(windows, snvs, strict=True):
        around = records[c][max(i - 50, 0) : i + 51]
        assert reference == around
        allele = alt.lower() if records[c][i].islower() else alt
        assert alternative == around[: min(i, 50)] + allele + around[min(i, 50) + 1 :]


@pytest.mark.skipif(not GENOMES.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize("name", ["phiX174", "lambda", "MT_human"])
def test_whole_genomes(name: str) -> None:
    """DNABERT-2 takes them whole; the Nucleotide Transformer in windows, whatever line ends and case."""
    path = GENOMES / f"{name}.fa"
    ((_, sequence),) = read_fasta(path)
    model = dnabert2()
    layer = 0 if name == "lambda" else 1  # attention over 20,000 tokens takes its time
    got = model.encode(path, output_layer=layer)
    assert model.tokenize(path).lengths[0] > 512
    np.testing.assert_array_equal(got, model.encode([sequence.upper()], output_layer=layer))
    tiled = cf.load("nt", checkpoint=PORTABLE / "nt-v2-basic" / "checkpoint", device="cpu", precision="float32")
    refused(lambda: tiled.encode(path), f"{len(sequence):,} bases", "long='tile'")
    bases = tiled.encode(path, long="tile", level="base")
    assert bases.values.shape[0] == len(sequence)
    assert np.isfinite(bases.values).all()


def test_index_is_remade_when_old_and_kept_elsewhere_when_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    genome = write(tmp_path / "g.fa", ">chr1\nACGT\n")
    with Genome(genome) as opened:
        assert opened.lengths == {"chr1": 4}
    assert (tmp_path / "g.fa.fai").read_text() == "chr1\t4\t6\t4\t5\n"
    write(genome, ">chr1\nACGTACGT\n")
    os.utime(tmp_path / "g.fa.fai", (0, 0))
    with Genome(genome) as opened:
        assert opened.lengths == {"chr1": 8}
    (tmp_path / "g.fa.fai").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Genome(genome) as opened:
        assert opened.fetch("chr1", 2, 6, "x") == "GTAC"
    assert not (tmp_path / "g.fa.fai").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chr2\t3\t8", ["line 2", "chr2:3-8", "7 bases"]),
        ("2\t0\t4", ["line 2", "no sequence '2'", "'chr2'"]),
        ("MT\t0\t4", ["no sequence 'MT'", "'chrM'"]),
        ("chr7\t0\t4", ["no sequence 'chr7'", "chr1"]),
        ("chr2\t5\t3", ["chr2:5-3"]),
        ("chr2\t-1\t3", ["not BED"]),
        ("chr2\t1", ["not BED"]),
        ("chr2\tone\t3", ["not BED"]),
        ("chr2\t1\t3\tx\t0\tplus", ["strand 'plus'"]),
    ],
)
def test_bad_intervals(tmp_path: Path, line: str, says: list[str]) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    bed = write(tmp_path / "x.bed", f"chr1\t0\t4\n{line}\n")
    refused(lambda: list(sequence_blocks(bed, genome=genome)), *says)


def test_chr_the_other_way(tmp_path: Path) -> None:
    genome = write(tmp_path / "g.fa", ">1\nACGT\n>MT\nAC\n")
    refused(lambda: list(sequence_blocks(write(tmp_path / "x.bed", "chr1\t0\t4\n"), genome=genome)), "no sequence 'chr1'", "'1'")
    refused(lambda: list(sequence_blocks(write(tmp_path / "x.bed", "chrM\t0\t4\n"), genome=genome)), "no sequence 'chrM'", "'MT'")


# Variants


@st.composite
def variants(draw: st.DrawFn) -> tuple[str, int, str, str]:
    name = draw(st.sampled_from(["chr2", "chrM"]))
    chromosome = CHROMOSOMES[name]
    start = draw(st.integers(0, len(chromosome) - 1))
    reference = chromosome[start : start + draw(st.integers(1, 4))]
    return name, start, reference, draw(st.text(st.sampled_from("ACGT"), min_size=1, max_size=5))


@settings(deadline=None, max_examples=60)
@given(called=st.lists(variants(), min_size=1, max_size=6), window=st.integers(4, 90))
def test_windows_around_variants(tmp_path_factory: pytest.TempPathFactory, called: list[Any], window: int) -> None:
    """Against the chromosome with the allele put in; REF stands in the middle."""
    folder = tmp_path_factory.mktemp("vcf")
    genome = write(folder / "g.fa", fasta_text(CHROMOSOMES))
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    vcf = write(folder / "x.vcf", header + "".join(f"{c}\t{start + 1}\t.\t{ref}\t{alt}\t.\tPASS\t.\n" for c, start, ref, alt in called))
    with Genome(genome) as opened:
        got = list(read_vcf(vcf, opened, window))
    for (name, reference, alternative), (c, start, ref, alt) in zip(got, called, strict=True):
        chromosome = CHROMOSOMES[c]
        left = start - (window - len(ref)) // 2
        right = left + window
        mutated = chromosome[:start] + alt + chromosome[start + len(ref) :]
        left = max(left, 0)
        assert reference == chromosome[left:right]
        assert alternative == mutated[left : min(right, len(chromosome)) + len(alt) - len(ref)]
        assert name == f"{c}:{start + 1}:{ref}>{alt}"


@pytest.mark.parametrize("options", [{}, {"reverse_complement": "mean"}, {"pooling": "max"}, {"long": "tile"}, {"pooling": "mean-bases"}])
def test_variant_level_is_a_difference(tmp_path: Path, options: dict[str, Any]) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    vcf = write(tmp_path / "x.vcf.gz", "chr2\t2\trs1\tA\tC\nchr2\t2\trs2\tA\tG,T\nchrM\t1\t.\tTTGA\tT\n")
    models = [dnabert2(), cf.load("nt", checkpoint=PORTABLE / "nt-v2-basic" / "checkpoint", device="cpu", precision="float32")]
    for model in models if "pooling" in options else [*models, cf.load("kmer")]:
        if "long" in options:
            model.adapter.max_tokens = 6  # type: ignore[attr-defined]
        result = model.run(vcf, level="variant", genome=genome, window=40, **options)
        assert result.names == ["rs1", "rs2:G", "rs2:T", "chrM:1:TTGA>T"]
        with Genome(genome) as opened:
            pairs = list(read_vcf(vcf, opened, 40))
        reference, alternative = (model.encode([pair[i] for pair in pairs], **options) for i in (1, 2))
        assert isinstance(result.values, np.ndarray)
        np.testing.assert_allclose(result.values, alternative - reference, atol=4e-6)
        assert np.abs(result.values).max() > 1e-3
        assert result.receipt["level"] == "variant"
        assert result.receipt["window"] == 40


def test_alleles_as_sequences(tmp_path: Path) -> None:
    """Without ``level="variant"`` both windows are rows."""
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    vcf = write(tmp_path / "x.vcf", "chr2\t2\trs1\tA\tC\n")
    result = dnabert2().run(vcf, genome=genome, window=5)
    assert result.names == ["rs1/ref", "rs1/alt"]
    np.testing.assert_array_equal(result.values, dnabert2().encode(["GATT", "GCTT"]))
    assert dnabert2().tokenize(vcf, genome=genome, window=5).lengths.tolist() == dnabert2().tokenize(["GATT", "GCTT"]).lengths.tolist()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("chr2\t2\t.\tC\tG", ["line 2", "REF is 'C'", "has 'A'", "assembly"]),
        ("2\t2\t.\tA\tG", ["no sequence '2'", "'chr2'"]),
        ("chr2\t9\t.\tA\tG", ["not inside 'chr2'", "7 bases"]),
        ("chr2\t2\t.\tA\t<DEL>", ["ALT '<DEL>'", "bcftools"]),
        ("chr2\t2\t.\tA\tG,*", ["ALT '*'"]),
        ("chr2\t2\t.\tA\t.", ["ALT '.'"]),
        ("chr2\t0\t.\tA\tG", ["not inside"]),
        ("chr2 2 . A G", ["not VCF"]),
        ("chr2\t1\t.\tGATTACA\tG", ["REF has 7 bases", "window=6"]),
    ],
)
def test_bad_variants(tmp_path: Path, line: str, says: list[str]) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    vcf = write(tmp_path / "x.vcf", f"chr2\t2\t.\tA\tG\n{line}\n")
    refused(lambda: list(sequence_blocks(vcf, genome=genome, window=6)), *says)


def test_reverse_complement_of_a_soft_mask() -> None:
    assert reverse_complement("ACgtn") == "nacGT"


@pytest.mark.parametrize("alternatives", ["", "T,", ",T"])
def test_an_allele_of_nothing(alternatives: str, tmp_path: Path) -> None:
    genome = write(tmp_path / "g.fa", f">chr1\n{'ACGTTGCA' * 20}\n")
    vcf = write(tmp_path / "x.vcf", f"chr1\t10\trs1\tC\t{alternatives}\t.\n")
    with Genome(genome) as opened, pytest.raises(errors.SequenceError, match="ALT '' is not a sequence of bases"):
        list(read_vcf(vcf, opened, 20))


@pytest.mark.parametrize("digits", ["9" * 5000, "٣"])
def test_places_that_are_no_numbers(digits: str, tmp_path: Path) -> None:
    genome = write(tmp_path / "g.fa", f">chr1\n{'ACGTTGCA' * 20}\n")
    bed = write(tmp_path / "x.bed", f"chr1\t1\t{digits}\n")
    vcf = write(tmp_path / "x.vcf", f"chr1\t{digits}\trs1\tC\tT\t.\n")
    with Genome(genome) as opened:
        for read in (lambda: read_bed(bed, opened), lambda: read_vcf(vcf, opened, 20)):
            with pytest.raises(errors.SequenceError, match=r"is not (BED|VCF)"):
                list(read())
