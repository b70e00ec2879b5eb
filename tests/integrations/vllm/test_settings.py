"""Keys of the environment, and the word that none is wanted. More: test_serve, test_operators."""

from __future__ import annotations

import pytest

from ultraedit_kernels.integrations.vllm.settings import KEYS_VARIABLE, edit_keys, require_key


@pytest.mark.parametrize(
    ("value", "keys"),
    [(None, []), ("", []), (" , ", []), ("a", ["a"]), (" a ,,b", ["a", "b"])],
)
def test_edit_keys_are_separated_by_commas(value: str | None, keys: list[str]) -> None:
    assert edit_keys({} if value is None else {KEYS_VARIABLE: value}) == keys


def test_without_a_key_somebody_must_have_agreed() -> None:
    require_key(["a"], False)
    require_key([], True)
    with pytest.raises(ValueError, match=r"no key: .*--edit-api-key .* --edit-without-key"):
        require_key([], False)
