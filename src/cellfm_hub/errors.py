"""Every error the hub raises on purpose.

::

    CellFMError
    ├── ModelNotFoundError          no model of that name
    ├── CheckpointError             something about the weights
    │   ├── WeightsUnavailableError   a file is not here and cannot be fetched
    │   ├── ChecksumError             a file is here, but is not the published one
    │   └── CheckpointFormatError     a file cannot be read, or does not fit the network
    ├── InputError                  something about what was passed in
    │   ├── CountsError               no matrix of raw counts
    │   ├── GeneCoverageError         the model knows next to none of the genes
    │   ├── SpeciesError              the wrong species
    │   ├── SequenceError             a sequence the model cannot take
    │   └── UsageError                options that do not go together
    ├── OutputError                 the result cannot be written
    └── DeviceError                 the device cannot run this

A message is one line that names what was received, what was expected and the next step. On the command line each of them becomes
that line on standard error and exit code 1; a ``UsageError`` exit code 2.
"""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellfm_hub.embedder import Result


class CellFMError(Exception):
    """Base of every error that the hub raises on purpose."""


class ModelNotFoundError(CellFMError, LookupError):
    """No registered model has the given name."""


class CheckpointError(CellFMError):
    """Something is wrong with a checkpoint."""


class WeightsUnavailableError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint is not on this machine and cannot be fetched."""


class ChecksumError(CheckpointError):
    """A file of a checkpoint differs from the published one."""


class CheckpointFormatError(CheckpointError, ValueError):
    """A file of a checkpoint cannot be read, or does not fit the network."""


class InputError(CellFMError, ValueError):
    """What was passed in cannot be used.

    Attributes
    ----------
    finished
        Where a file of sequences breaks off or turns bad: the result for the rows before that place.
    """

    finished: "Result | None" = None


class CountsError(InputError):
    """No matrix of raw counts was found where one is needed."""


class GeneCoverageError(InputError):
    """The genes of the data match next to nothing in the model's vocabulary."""


class SpeciesError(InputError):
    """The data are of another species than the model's."""


class SequenceError(InputError):
    """A sequence is empty, too long, or not made of nucleotides."""


class UsageError(InputError):
    """Options contradict each other, or one of them would have no effect."""


class OutputError(CellFMError, OSError):
    """A result cannot be written."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(place: Path, error: OSError) -> OutputError:
    """Say why a place cannot be written, and what to do: free space only where there is none.

    An error that the hub itself raised is returned as it is: some of them are OSErrors too, but have their own story to tell.
    """
    if isinstance(error, OutputError):
        return error
    full = error.errno in _NO_ROOM or "No space left" in str(error)
    step = "free space there, or choose another place with -o" if full else "choose another place with -o"
    return OutputError(f"{place} cannot be written: {error.strerror or ' '.join(str(error).split())}; {step}")


class DeviceError(CellFMError, RuntimeError):
    """A device is absent, or cannot run what was asked."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the names nearest to `word`, or an empty string."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(names[n]) for n in near)}?" if near else ""
