"""How a turn of edits is computed; `turn.py` is the page to read first."""
