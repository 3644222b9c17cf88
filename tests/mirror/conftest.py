"""A mirror in a directory."""

from pathlib import Path

import pytest


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    return tmp_path / "cloud"


@pytest.fixture
def url(cloud: Path) -> str:
    return f"file://{cloud}"
