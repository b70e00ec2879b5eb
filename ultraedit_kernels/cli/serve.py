"""`ultraedit serve`."""

from __future__ import annotations

import typer


def serve(context: typer.Context) -> None:
    """Serve MODEL with vLLM and take edits at /v1/edits; `ultraedit serve --help` says more."""
    from ultraedit_kernels.integrations.vllm import serve as server

    raise typer.Exit(server.main(context.args))
