"""Read the settings of a checkpoint (``config.json``, ``args.json``) into a family's dataclass, every value checked.

A family writes what it reads as a dataclass whose annotations say what is possible: :data:`Size` and :data:`Layers` for numbers that shape
the network, :data:`TokenId`, :data:`Positive`, ``bool``, ``Literal``. No value is converted: ``"8"``, ``8.0`` and ``True`` are no number of
heads.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cellfm_hub.errors import CheckpointFormatError

Size = Annotated[int, Field(ge=1, le=10_000_000)]
"""A width, a number of heads, of rows of a table, of tokens."""
Layers = Annotated[int, Field(ge=1, le=1000)]
"""How many blocks: each is built one by one, so an absurd number would never end."""
TokenId = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""The small number of a norm, and the like."""
Finite = Annotated[float, Field(allow_inf_nan=False)]

ConfigT = TypeVar("ConfigT")


def parse_config(kind: type[ConfigT], config: Mapping[str, Any], origin: str, file: str = "config.json") -> ConfigT:
    """Take the fields of a dataclass from the contents of a file; other keys are ignored.

    Parameters
    ----------
    kind
        The dataclass. Its attribute ``divides``, if any, maps a field to another that must be a whole multiple of it: heads to width.
    config
        The contents.
    origin, file
        Name of the checkpoint and of the file, for messages.

    Raises
    ------
    CheckpointFormatError
        If a key without a default is missing, or a value is not possible.
    """
    wanted = fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in wanted if f.name not in config and f.default is MISSING]
    if missing:
        msg = f"the configuration of {origin} lacks {', '.join(missing)}; expected the {file} of the published checkpoint"
        raise CheckpointFormatError(msg)
    hints = get_type_hints(kind, include_extras=True)
    values = {f.name: check_value(hints[f.name], config[f.name], f.name, origin, file) for f in wanted if f.name in config}
    parsed = kind(**values)
    for part, whole in getattr(kind, "divides", {}).items():
        if getattr(parsed, whole) % getattr(parsed, part):
            msg = f"{file} of {origin} has {whole}={getattr(parsed, whole)}, which {part}={getattr(parsed, part)} does not divide;"
            raise CheckpointFormatError(msg + " use the file of the published checkpoint")
    return parsed


def check_value(expected: Any, value: Any, key: str, origin: str, file: str) -> Any:
    """Return a value of a file, if it is what is expected.

    Raises
    ------
    CheckpointFormatError
        Naming file, key, value and expectation.
    """
    try:
        return TypeAdapter(expected, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
        wish = error.errors()[0]["msg"].replace("Input should be", "expected")
        msg = f"{file} of {origin} has {key}={shown}; {wish[:1].lower()}{wish[1:]}, use the file of the published checkpoint"
        raise CheckpointFormatError(msg) from error
