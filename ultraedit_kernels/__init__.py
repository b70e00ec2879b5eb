"""UltraEdit Kernels: change facts in a language model while it serves.

The public names below are loaded on first use, so that importing the package costs nothing and
needs neither triton, transformers nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ultraedit_kernels._version import __version__

if TYPE_CHECKING:
    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.fleet.client import AsyncClient as AsyncClient
    from ultraedit_kernels.fleet.client import Client as Client
    from ultraedit_kernels.fleet.client import ServerError as ServerError
    from ultraedit_kernels.model.request import EditRequest
    from ultraedit_kernels.ops.operations import (
        edit_values,
        rank_k_update_,
        solve,
        update_statistics,
    )
    from ultraedit_kernels.ops.statistics import Statistics
    from ultraedit_kernels.store.delta import EditDelta

_HOME = {
    "AsyncClient": "fleet.client",
    "Client": "fleet.client",
    "EditDelta": "store.delta",
    "EditRequest": "model.request",
    "Editor": "editor",
    "ServerError": "fleet.client",
    "Statistics": "ops.statistics",
    "edit_values": "ops.operations",
    "rank_k_update_": "ops.operations",
    "solve": "ops.operations",
    "update_statistics": "ops.operations",
}

# Without the clients: httpx, which they need, may be missing where edits are made.
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
    return sorted({*__all__, *_HOME})
