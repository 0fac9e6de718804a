"""The list of deliberate mistakes keeps up with the kernels: each still finds its line.

Whether the tests catch them takes minutes: `python -m tools.mutations`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.mutations import MUTATIONS, ROOT, Mutation, copy_tree, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.mistake)
def test_mutation_applies(mutation: Mutation) -> None:
    """Each mistake can still be made."""
    text = (ROOT / "kernels" / "triton" / f"{mutation.kernel}.py").read_text()
    assert text.count(mutation.right) == 1
    assert mutation.wrong != mutation.right
    assert (ROOT / "tests/kernels" / f"test_{mutation.tests}.py").exists()


def test_mutation_copy_only(tmp_path: Path) -> None:
    """A mistake is made in the copy alone."""
    mutation = MUTATIONS[0]
    original = (ROOT / "kernels" / "triton" / f"{mutation.kernel}.py").read_text()
    mutate(mutation, copy_tree(tmp_path))
    assert (ROOT / "kernels" / "triton" / f"{mutation.kernel}.py").read_text() == original
    for package in ("kernels", "mantrans/kernels"):  # the tests import the latter
        changed = (tmp_path / package / "triton" / f"{mutation.kernel}.py").read_text()
        assert changed == original.replace(mutation.right, mutation.wrong) != original


def test_mutation_line_moved(tmp_path: Path) -> None:
    stale = MUTATIONS[0]._replace(right="no such line")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate(stale, copy_tree(tmp_path))
