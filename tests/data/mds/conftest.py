"""One process of mosaicml-streaming for all tests here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from oracle import Oracle  # noqa: E402


@pytest.fixture(scope="session")
def mosaic() -> Iterator[Any]:
    pytest.importorskip("zstandard")
    started = Oracle()
    yield started
    started.close()
