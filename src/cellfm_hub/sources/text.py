"""Lines of a text file, plain or gzipped, with line ends of any system."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from cellfm_hub.errors import InputError, SequenceError


def read_lines(path: Path) -> Iterator[str]:
    """Read lines, without their ends, as they come. Whether a file is gzipped is seen from its first bytes.

    Raises
    ------
    InputError
        If there is no such file.
    SequenceError
        If it is cut short, or not text.
    """
    if not path.exists() or path.is_dir():
        msg = f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give the path of a FASTA, FASTQ, BED or VCF file"
        raise InputError(msg)
    try:
        with path.open("rb") as plain:
            packed = path.suffix == ".gz" or plain.peek(2)[:2] == b"\x1f\x8b"
            # utf-8-sig: files from Windows may begin with a byte-order mark.
            with io.TextIOWrapper(gzip.GzipFile(fileobj=plain) if packed else plain, encoding="utf-8-sig") as file:
                for line in file:
                    yield line.rstrip("\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{path} is not a complete gzip file ({error}); copy or download it again"
        raise SequenceError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path} holds bytes that are not text; expected a FASTA, FASTQ, BED or VCF file"
        raise SequenceError(msg) from error
