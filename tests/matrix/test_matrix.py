"""Any architecture that transformers knows trains right, or is refused in a sentence: `pytest -m matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix.cases import architectures, tiny_model
from matrix.examine import examine
from matrix.page import line

PAGE = Path(__file__).parents[2] / "docs/models.md"


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", architectures())
def test_an_architecture_is_right_or_refused_as_the_page_says(name, tmp_path):
    row = examine(name, tiny_model(name), tmp_path)
    assert not row.fault
    assert line(row) in PAGE.read_text(), "run python docs/make_models.py"
