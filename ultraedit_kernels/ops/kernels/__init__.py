"""The four operations as Triton kernels: names and results as in `ultraedit_kernels.ops.reference`.

One file per operation, each read top to bottom: kernel (its docstring is the formula), launcher,
public function. `ultraedit_kernels.ops.operations` imports this package only for tensors on a GPU,
or where it is forced to. Block sizes are fixed: a serving host must not spend seconds on autotuning
in the middle of a turn. Names inside kernels: `b_` block of values, `p_` pointer, `o_` offset, `m_`
mask, `i_` index.
"""

from ultraedit_kernels.ops.kernels.gram import solve
from ultraedit_kernels.ops.kernels.statistics import update_statistics
from ultraedit_kernels.ops.kernels.update import rank_k_update_
from ultraedit_kernels.ops.kernels.weighting import edit_values

__all__ = ["edit_values", "rank_k_update_", "solve", "update_statistics"]
