"""An index of a genome is used only if it describes the file that is read; times of change decide nothing."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cellfm_hub as cf
from cellfm_hub import errors
from cellfm_hub.sources import fasta_index
from cellfm_hub.sources.genome import Genome
from cellfm_hub.sources.sequences import sequence_blocks
from test_sequence_files import fasta_text, refused, write

pytest.importorskip("pyfaidx", reason="a dependency of cellfm-hub is not installed")

CHROMOSOMES = {"chr1": "ACGTTGCATTGACCA" * 12, "chr2 of somebody": "GATTACA", "chrM": "TTGACC" * 30}


def sequences(genome: Path) -> dict[str, str]:
    with Genome(genome) as opened:
        return {name: opened.fetch(name, 0, length, "x") for name, length in opened.lengths.items()}


def by_first_word(records: dict[str, str]) -> dict[str, str]:
    return {name.split()[0]: sequence for name, sequence in records.items()}


def without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta_index, "_build", lambda path: pytest.fail(f"{path} was read anew"))


def test_replaced_by_an_older_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an archive unpacks it. Ten letters more in the title would shift every base by ten."""
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    bed = write(tmp_path / "x.bed", "chr1\t50\t110\n")
    assert next(sequence_blocks(bed, genome=genome)).sequences == [CHROMOSOMES["chr1"][50:110]]
    index = (tmp_path / "g.fa.fai").read_bytes()
    write(genome, genome.read_text().replace(">chr1", ">chr1 version 2"))
    os.utime(genome, (0, 0))
    with caplog.at_level(logging.WARNING, "cellfm_hub"):
        assert next(sequence_blocks(bed, genome=genome)).sequences == [CHROMOSOMES["chr1"][50:110]]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "g.fa.fai is not the index of g.fa as it is now" in said
    assert (tmp_path / "g.fa.fai").read_bytes() == index, "the user's file is left alone"
    (made,) = (cf.settings.cache_dir / "genomes").iterdir()
    assert str(made) in said


def test_the_index_in_the_cache_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    write(tmp_path / "g.fa.fai", "chr1\t7\t6\t7\t8\n")
    assert sequences(genome) == by_first_word(CHROMOSOMES)
    with monkeypatch.context() as patch:
        without_building(patch)
        assert sequences(genome) == by_first_word(CHROMOSOMES)
    others = {"chr1": "ACGT" * 50, "chr3": "GG"}
    write(genome, fasta_text(others))
    os.utime(genome, (0, 0))
    assert sequences(genome) == others


def test_an_older_index_that_fits_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying does not keep times; that of samtools may be in any order."""
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    sequences(genome)
    fai = tmp_path / "g.fa.fai"
    os.utime(fai, (0, 0))
    without_building(monkeypatch)
    assert sequences(genome) == by_first_word(CHROMOSOMES)
    fai.write_text("".join(sorted(fai.read_text().splitlines(keepends=True), reverse=True)))
    assert sequences(genome) == by_first_word(CHROMOSOMES)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "\n",
        "chr1\t180\t6\n",
        "chr1\t180\t6\t60\t61\t0\n",
        "chr1\t180\t6\t60\t61\n",  # cut short behind the first line
        "chr1\t180\t6\t60\t61\nchr2\t7\t206\t7\t8\nchr2\t7\t206\t7\t8\nchrM\t180\t220\t60\t61\n",
        "chr1\t180\t6\t60\t61\nchr2\t7\t207\t7\t8\nchrM\t180\t220\t60\t61\n",
        "chr1\t181\t6\t60\t61\nchr2\t7\t207\t7\t8\nchrM\t180\t220\t60\t61\n",
        "chr1\t-180\t6\t60\t61\n",
        "chr1\t180\t-6\t60\t61\n",
        "chr1\t180\t6\t0\t0\n",
        "chr1\t180\t6\t61\t60\n",
        "chr1\t999999999999999999999\t6\t60\t61\n",
        "chr1\t18\u00bd\t6\t60\t61\n",
        "\x00\xff not an index",
    ],
)
def test_damaged_indices(tmp_path: Path, damaged: str) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    fai = tmp_path / "g.fa.fai"
    fai.write_bytes(damaged.encode("latin-1"))
    assert sequences(genome) == by_first_word(CHROMOSOMES)
    assert fai.read_bytes() == damaged.encode("latin-1")


@st.composite
def fasta_files(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """Text and content: few names, so that files resemble each other."""
    names = draw(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3, unique=True))
    records = {name: draw(st.text(st.sampled_from("ACgtN"), max_size=12)) for name in names}
    end, width = draw(st.sampled_from(["\n", "\r\n"])), draw(st.integers(1, 7))
    titles = {name: name + draw(st.sampled_from(["", " ", " b", " longer title", "\tx"])) for name in names}
    text = fasta_text({titles[name]: sequence for name, sequence in records.items()}, width, end)
    if draw(st.booleans()):
        text = text.removesuffix(end)
    elif end == "\n" and draw(st.booleans()):  # pyfaidx takes no blank lines between others of "\r\n"
        text += end
    return text, records


@settings(deadline=None, max_examples=300)
@given(one=fasta_files(), other=fasta_files())
# As many bytes, other lines: one base less, one line end more.
@example(one=(">a\nACGTAC\nGT\n", {"a": "ACGTACGT"}), other=(">a\nACG\nTAG\nT\n", {"a": "ACGTAGT"}))
@example(one=(">a\nACGT\n>b\nA\n", {"a": "ACGT", "b": "A"}), other=(">a\nAC\nT\n>b\nA\n", {"a": "ACT", "b": "A"}))
def test_the_index_of_another_file(
    tmp_path_factory: pytest.TempPathFactory, one: tuple[str, dict[str, str]], other: tuple[str, dict[str, str]]
) -> None:
    """Whatever stood there before: the bases are those of the file, to the last stretch."""
    folder = tmp_path_factory.mktemp("genomes")
    genome = write(folder / "g.fa", one[0])
    assert sequences(genome) == one[1]
    index = (folder / "g.fa.fai").read_bytes()
    write(genome, other[0])
    os.utime(genome, (0, 0))
    assert sequences(genome) == other[1]
    assert (folder / "g.fa.fai").read_bytes() == index
    with Genome(genome) as opened:
        for name, bases in other[1].items():
            for start in range(len(bases) + 1):
                for end in range(start, len(bases) + 1):
                    assert opened.fetch(name, start, end, "x") == bases[start:end]


def test_names_without_bases(tmp_path: Path) -> None:
    for text in (">a\n>b\nAC\n>c", ">a\n>b\nAC\n>c\n", ">a\n\n>b\nAC\n\n>c\n\n"):
        assert sequences(write(tmp_path / "g.fa", text)) == {"a": "", "b": "AC", "c": ""}


@pytest.mark.parametrize(
    "text",
    [">a\nAC\nACGT\n>b\nA\n", ">a\nAC\nACGT\n", ">a\nACGT\nAC\nACGT\n", ">a\nAC\n\nAC\n", ">a\nAC\n\n\n>b\nA\n", ">a\nA\n>b\nC\n>a\nG\n"],
)
def test_what_has_no_index(tmp_path: Path, text: str) -> None:
    """A last line longer than the others among them, which pyfaidx lets pass, and reads wrong."""
    refused(lambda: Genome(write(tmp_path / "g.fa", text)), "g.fa", "cannot be indexed", error=errors.InputError)


def test_lines_of_unequal_length_behind_an_index_that_fits(tmp_path: Path) -> None:
    """As many bytes in all, and the first line as it should be: no base is given that is not where the index says."""
    genome = write(tmp_path / "g.fa", ">a\nACGT\nACGTA\nCGT\nACGT\nAC\n")
    write(tmp_path / "g.fa.fai", "a\t18\t3\t4\t5\n")
    with Genome(genome) as opened:
        assert opened.fetch("a", 1, 4, "x") == "CGT"
        assert opened.fetch("a", 13, 18, "x") == "CGTAC"
        for start, end in ((4, 6), (5, 7), (8, 10), (2, 6), (0, 18)):
            refused(lambda start=start, end=end: opened.fetch("a", start, end, "x"), f"a:{start}-{end}", "lines of equal length")  # type: ignore[misc]


@pytest.mark.parametrize("content", [">a\nACGT\n", ">a\nAC>T\nACGT\n", ">a\nACG\nACGTA\n", ">a\nAC T\nACGT\n", ""])
def test_changed_while_it_is_open(tmp_path: Path, content: str) -> None:
    genome = write(tmp_path / "g.fa", ">a\nACGT\nACGT\n")
    with Genome(genome) as opened:
        write(genome, content)
        refused(lambda: opened.fetch("a", 1, 7, "line 7"), "line 7", "a:1-7", "g.fa", "changed")


def test_an_index_that_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    genome = write(tmp_path / "g.fa", fasta_text(CHROMOSOMES))
    monkeypatch.setattr(os, "access", lambda *_: False)
    write(tmp_path / "cache", "a file, where a folder should be")
    assert sequences(genome) == by_first_word(CHROMOSOMES)
    assert "cannot be kept" in caplog.text
