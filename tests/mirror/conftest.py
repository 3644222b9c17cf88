"""A mirror in a directory. What reaches a disk is not what these tests are about."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    return tmp_path / "cloud"


@pytest.fixture
def url(cloud: Path) -> str:
    return f"file://{cloud}"
