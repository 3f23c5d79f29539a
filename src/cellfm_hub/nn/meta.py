"""Build networks without memory and without values: shapes alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInitialValues(TorchFunctionMode):
    """Leaves parameters as they are made."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Make modules on the meta device.

    Initial values are not drawn. There is nothing to draw them into, but for those of an embedding torch would load its compiler, which
    takes more than a second.

    Examples
    --------
    >>> with meta_device():
    ...     torch.nn.Embedding(60_000, 512).weight.device
    device(type='meta')
    """
    with torch.device("meta"), _NoInitialValues():
        yield
