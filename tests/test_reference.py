from ultraedit_kernels import reference
from ultraedit_kernels.ops import reference as formulas


def test_the_public_module_has_the_four_operations():
    assert sorted(reference.__all__) == reference.__all__
    assert set(reference.__all__) == {"edit_values", "rank_k_update_", "solve", "update_statistics"}
    for name in reference.__all__:
        assert getattr(reference, name) is getattr(formulas, name)
