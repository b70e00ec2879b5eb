"""The zero-copy twin: a Hugging Face model whose parameters are views of vLLM's own tensors.

The side pass that computes an edit needs a model it can differentiate; vLLM's modules are built
for serving. Both hold the same numbers, so the twin is built on the meta device and its parameters
are pointed at vLLM's storage. Merged weights (`qkv_proj`, `gate_up_proj`) are split by `narrow`.
Only the edited modules own a copy, the shadow: an edit changes the shadow, and `Twin.publish` makes
it live.

Under tensor parallelism each rank has a twin of its part of the model: the same class, built for
its share of the heads and of the MLP's width, which gathers and adds up where vLLM's layers do.

An engine that only takes changes computed elsewhere needs no twin: `build_weights` gives it the
shadows of the edited weights alone.

`build` makes both, `meta` the empty model, `locate` says which of vLLM's tensors a parameter is,
and `refuse` what cannot be edited, and why.
"""

from ultraedit_kernels.integrations.vllm.twin.build import Twin, build_twin, build_weights
from ultraedit_kernels.integrations.vllm.twin.refuse import UnsupportedModelError

__all__ = ["Twin", "UnsupportedModelError", "build_twin", "build_weights"]
