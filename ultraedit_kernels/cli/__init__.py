"""The console script, `ultraedit`; `app` lists its commands.

Results go to stdout; progress, notes and errors to stderr. Exit status: 0 when the work was done,
also if some edits do not hold (the output says so); 1 for an error; 2 for wrong usage.
"""

from __future__ import annotations

import sys

REMEDY = "{} is not installed; pip install 'ultraedit-kernels[transformers]'"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; `sys.argv` if None).

    Returns:
        The exit status, see the module. Nothing is raised: errors are printed.
    """
    try:
        from ultraedit_kernels.cli.app import app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"error: {REMEDY.format(missing.name)}", file=sys.stderr)
        return 1
    try:
        app(args=argv, prog_name="ultraedit")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ImportError as error:
        needs = error.name == "transformers"
        _error(REMEDY.format(error.name) if needs else str(error))
    except OSError as error:
        _error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (TypeError, ValueError) as error:
        _error(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not be imported
            raise
        _error(f"{error}\ntry a smaller --turn-size, --dtype bfloat16 or --device cpu")
    return 1


def _error(text: str) -> None:
    from ultraedit_kernels.cli.show import ERR

    ERR.print(f"error: {text}", soft_wrap=True)
