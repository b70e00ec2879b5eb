"""Where the keys of the /v1/edits routes come from. Settings: `ultraedit_kernels.settings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

KEYS_VARIABLE = "ULTRAEDIT_API_KEY"
"""Environment variable with the edit keys, separated by commas: vLLM logs its options."""


LEADER_KEY_VARIABLE = "ULTRAEDIT_LEADER_KEY"
"""Environment variable with the key of the leader that a server follows, if it is another one."""


def edit_keys(environ: Mapping[str, str]) -> list[str]:
    """The edit keys of the environment."""
    return [key for part in environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip())]


def require_key(keys: Sequence[str], without_key: bool) -> None:
    """Raise ValueError where everybody could edit and nobody has agreed to that."""
    if not keys and not without_key:
        raise ValueError(
            "/v1/edits has no key: everybody who reaches the port could change the model; give "
            f"--edit-api-key or --api-key (or set {KEYS_VARIABLE} or VLLM_API_KEY), or agree to it "
            "with --edit-without-key (setting without_key)"
        )
