"""Read the dictionaries that authors pickled, and look through any pickle before something unpickles it.

The reader builds dictionaries, strings, numbers and numpy scalars, and refuses anything else by name. Before it, the opcodes are looked
through, because a few bytes of a pickle can ask for more memory or time than there is: a place in the memo beyond all others, or a tuple
of tuples of tuples that is used as a key, and takes for ever to hash.
"""

import io
import math
import pickle  # noqa: TID251 - the restricted reader below is the one permitted use
import pickletools
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from cellfm_hub.errors import CheckpointFormatError
from cellfm_hub.stand_ins import refuse_stand_ins
from cellfm_hub.text_files import read_json_object

MAX_PICKLE_BYTES = 16 * 2**20
"""The largest published dictionary has 4 MB, the pickle inside the largest file of tensors 3 MB; in memory one can take sixty times its
size."""

MAX_OPCODES = 4_000_000
"""Half a million are in the largest published dictionary; looking at so many takes ten seconds."""

MAX_DEPTH = 16
"""Of tuples in tuples; in published files there are three."""
MAX_HASHED = 2**16
"""Values that are looked at to hash a tuple."""

_OPCODE_NAMES = (
    "PROTO FRAME MARK STOP EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
    " PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT"
    " BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8"
    " GLOBAL STACK_GLOBAL REDUCE BUILD INST"
)
_DICTIONARY_OPCODES = frozenset(_OPCODE_NAMES.split())
"""What protocols 0 to 5 write for dictionaries of strings, numbers and numpy scalars, and what names the class of anything else."""

_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"}), frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD"})
_PLAIN = (0, 1)
"""Depth of tuples in a value, and how many values are looked at to hash it."""
_MARK = (-1, 0)


class PickleError(ValueError):
    """A pickle is refused before anything of it is built."""


def look_through(pickled: bytes | IO[bytes], opcodes: Collection[str] | None = None) -> None:
    """Follow the opcodes of a pickle without building anything.

    Parameters
    ----------
    pickled
        The pickle, or a file at its beginning, which is then left at its end.
    opcodes
        The only ones that are allowed; ``None``: all.

    Raises
    ------
    PickleError
        If it is damaged, or would take more memory or time than its size says.
    """
    stack: list[tuple[int, int]] = []
    memo: dict[int, tuple[int, int]] = {}
    try:
        argument: Any
        for n, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            name = opcode.name
            if n >= MAX_OPCODES:
                msg = f"it has more than {MAX_OPCODES:,} opcodes"
                raise PickleError(msg)
            if opcodes is not None and name not in opcodes:
                msg = f"its opcode {name} is in no dictionary of strings and numbers"
                raise PickleError(msg)
            if name in _GETS:
                stack.append(memo[argument])
            elif name in _PUTS or name == "MEMOIZE":
                place = len(memo) if name == "MEMOIZE" else argument
                if place > len(memo) + 1:  # some writers count from 1; memory is taken for all places before this one
                    msg = f"it puts a value at place {place:,} of a memo of {len(memo):,}"
                    raise PickleError(msg)
                memo[place] = stack[-1]
            elif name == "MARK":
                stack.append(_MARK)
            elif not opcode.stack_before:
                stack += [_PLAIN] * len(opcode.stack_after)
            else:
                stack += _step(opcode, stack)
    except PickleError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        msg = f"it is damaged, {' '.join(str(error).split())[:200] or type(error).__name__}"
        raise PickleError(msg) from error


def _step(opcode: pickletools.OpcodeInfo, stack: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Take from the stack what an opcode takes; return what it puts there."""
    before, taken = opcode.stack_before, list[tuple[int, int]]()
    single = len(before)
    if pickletools.markobject in before:
        single = before.index(pickletools.markobject)
        while (top := stack.pop()) != _MARK:
            taken.append(top)
    taken += [stack.pop() for _ in range(single)]
    if opcode.name in _TUPLES or opcode.name in _CALLS:  # a call may return its arguments, as torch.Size does
        depth = max((depth for depth, _ in taken), default=0) + (opcode.name in _TUPLES)
        hashed = sum(hashed for _, hashed in taken) + 1
        if depth > MAX_DEPTH or hashed > MAX_HASHED:
            msg = f"it nests tuples {depth} deep around {hashed:,} values"
            raise PickleError(msg)
        return [(depth, hashed)]
    if opcode.name == "DUP":
        return taken * 2
    return [_PLAIN] * len(opcode.stack_after)


class _ForbiddenError(Exception):
    """A pickle asks for something that a dictionary does not need."""


class NumpyDtype:
    """Stands in for ``numpy.dtype`` while unpickling: knows only plain numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if not (isinstance(code, str) and len(code) == 2 and code[0] in "iuf" and code[1] in "1248"):
            msg = f"numpy dtype {str(code)[:40]!r}"
            raise _ForbiddenError(msg)
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class NumpyScalar:
    """Stands in for numpy's reconstruction of a scalar: makes the plain number."""

    def __new__(cls, dtype: NumpyDtype, data: bytes) -> int | float:  # type: ignore[misc]  # that is the point
        """Return the number."""
        number: int | float = np.frombuffer(data, dtype=dtype.dtype, count=1)[0].item()
        return number

    def __setstate__(self, state: object) -> None:
        """Never called with a number: keeps a pickle from changing this class."""
        raise _ForbiddenError(str(type(state)))


NUMPY_NUMBERS: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "scalar"): NumpyScalar,
    ("numpy._core.multiarray", "scalar"): NumpyScalar,
    ("numpy", "dtype"): NumpyDtype,
}
"""What pickled numpy scalars ask for -> what stands in for it."""


class _DictionaryUnpickler(pickle.Unpickler):
    _ALLOWED: ClassVar[dict[tuple[str, str], type]] = NUMPY_NUMBERS

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            msg = " ".join(f"{module}.{name}".split())[:100]
            raise _ForbiddenError(msg) from None


def read_pickled_dict(path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of strings to strings or numbers, without running any code in it.

    Only dictionaries, strings, integers, floats and numpy number scalars are rebuilt. Anything else, a class or function above all,
    is refused by name before it is looked up.

    Raises
    ------
    CheckpointFormatError
        Naming what the file wanted to load.
    """
    if path.suffix == ".json":  # the converted form
        return _plain_dict(path, read_json_object(path))
    refuse_stand_ins(path)
    if (size := path.stat().st_size) > MAX_PICKLE_BYTES:
        msg = f"{path} has {size:,} bytes; a dictionary has at most {MAX_PICKLE_BYTES:,}"
        raise CheckpointFormatError(msg)
    pickled = path.read_bytes()
    try:
        look_through(pickled, _DICTIONARY_OPCODES)
        content = _DictionaryUnpickler(io.BytesIO(pickled)).load()
    except _ForbiddenError as error:
        msg = f"{path} is refused: it asks for {error}, but a dictionary holds only str, int, float and numpy numbers;"
        msg += " get the file from its authors"
        raise CheckpointFormatError(msg) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200]
        msg = f"{path} cannot be read as a pickled dictionary ({type(error).__name__}: {reason}); download it again"
        raise CheckpointFormatError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}; expected a dictionary"
        raise CheckpointFormatError(msg)
    return _plain_dict(path, content)


def _plain_dict(path: Path, content: dict[Any, Any]) -> dict[str, Any]:
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float):
            msg = f"{path} maps {type(key).__name__} to {type(value).__name__}; expected str to str or number"
            raise CheckpointFormatError(msg)
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"{path} maps {key[:100]!r} to {value}; expected a finite number"
            raise CheckpointFormatError(msg)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            msg = f"{path} maps {key[:100]!r} to a number of {value.bit_length():,} bits; expected at most 64"
            raise CheckpointFormatError(msg)
    return content
