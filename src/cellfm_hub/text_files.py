"""Read text and JSON that somebody else wrote: strictly, and without more memory or time than a file of its size deserves."""

import json
import math
from pathlib import Path
from typing import Any

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.stand_ins import refuse_stand_ins

MAX_TEXT_BYTES = 64 * 2**20
"""The largest published file, in JSON, has 17 MB; in memory one can take twenty times its size."""


def read_text(path: Path) -> str:
    """Read a text file.

    Raises
    ------
    CheckpointFormatError
        If it is not UTF-8, or larger than any that is published.
    """
    return _decoded(path, "text in UTF-8")


def _decoded(path: Path, kind: str) -> str:
    refuse_stand_ins(path)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        msg = f"{path} has {size:,} bytes; a file of text has at most {MAX_TEXT_BYTES:,}"
        raise CheckpointFormatError(msg)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not valid {kind} ({error}); download it again"
        raise CheckpointFormatError(msg) from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Stricter than Python's own reader: a number has at most 4,300 digits and is finite, and no name stands twice in an object, of which
    Python would silently take the last.

    Raises
    ------
    CheckpointFormatError
        If it is no JSON, or larger than any that is published.
    """
    text = _decoded(path, "JSON")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not valid JSON ({error}); download it again"
        raise CheckpointFormatError(msg) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        msg = f"{path} holds a JSON {type(content).__name__}; expected an object"
        raise CheckpointFormatError(msg)
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        msg = f"{text[:40]} is not a finite number"
        raise ValueError(msg)
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        msg = f"{twice[:100]!r} stands twice in an object"
        raise ValueError(msg)
    return content
