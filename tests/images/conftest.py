"""The folder that most tests of reading change."""

import drawings
import pytest


@pytest.fixture
def folder(tmp_path):
    """A flawless category."""
    return drawings.draw_category(tmp_path / "part")
