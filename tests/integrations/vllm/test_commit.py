"""What a commit can rely on."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.commit import check_connector, why_stale


def config(connector: str, **extra: Any) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )


def child(connector: str) -> dict[str, str]:
    return {"kv_connector": connector, "kv_role": "kv_both"}


@pytest.mark.parametrize(
    "transfer",
    [
        None,
        config("OffloadingConnector"),  # --kv-offloading-size
        config("SimpleCPUOffloadConnector"),
        config("MultiConnector", connectors=[child("OffloadingConnector")]),
    ],
)
def test_connectors_that_can_be_reset_are_taken(transfer: Any) -> None:
    assert why_stale(transfer) == ""


@pytest.mark.parametrize(
    "transfer",
    [
        config("ExampleConnector"),
        config(
            "MultiConnector", connectors=[child("OffloadingConnector"), child("ExampleConnector")]
        ),
    ],
)
def test_a_connector_that_would_keep_stale_keys_is_refused_with_the_reason(transfer: Any) -> None:
    reason = why_stale(transfer)
    assert "the KV connector ExampleConnector has no reset_cache" in reason
    with pytest.raises(RuntimeError, match="UltraEdit cannot start: the KV connector"):
        check_connector(transfer)
    assert "keys and values of the old weights" in reason and "reset_prefix_cache" in reason
