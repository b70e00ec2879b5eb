"""UltraEdit Kernels: change facts in a language model while it serves.

The public names below are loaded on first use, so that importing the package costs nothing and
needs neither triton, transformers nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ultraedit_kernels._version import __version__

if TYPE_CHECKING:
    from ultraedit_kernels.data import EditRequest
    from ultraedit_kernels.delta import EditDelta
    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.operations import (
        edit_values,
        rank_k_update_,
        solve,
        update_statistics,
    )
    from ultraedit_kernels.statistics import Statistics

_HOME = {
    "EditDelta": "delta",
    "EditRequest": "data",
    "Editor": "editor",
    "Statistics": "statistics",
    "edit_values": "operations",
    "rank_k_update_": "operations",
    "solve": "operations",
    "update_statistics": "operations",
}

__all__ = [
    "EditDelta",
    "EditRequest",
    "Editor",
    "Statistics",
    "__version__",
    "edit_values",
    "rank_k_update_",
    "solve",
    "update_statistics",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
