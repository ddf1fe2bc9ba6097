"""A virtual machine's memory as a file system you can checkpoint with ``echo save > ctl``.

The library is `ckptfs.open` and `ckptfs.mounted`; importing the package costs nothing until one of them is used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptfs.api.checkpoint import open_checkpoint as open  # noqa: A004
    from ckptfs.api.mount import Mount, mounted

__all__ = ["Mount", "__version__", "mounted", "open"]

_LIBRARY = {
    "open": "ckptfs.api.checkpoint:open_checkpoint",
    "mounted": "ckptfs.api.mount:mounted",
    "Mount": "ckptfs.api.mount:Mount",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562)."""
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _LIBRARY[name].partition(":")
    return getattr(import_module(module), attribute)
