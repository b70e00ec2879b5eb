"""The four operations as the formulas read: the public name of `ops.reference`."""

from ultraedit_kernels.ops.reference import (
    edit_values,
    rank_k_update_,
    solve,
    update_statistics,
)

__all__ = ["edit_values", "rank_k_update_", "solve", "update_statistics"]
