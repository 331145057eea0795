"""`runs.py` is imported by name: from tests, and from the configurations of runs. Their pictures are not drawn."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmegatron.train.report.loss_curve", lambda records, path, **options: path)
        yield
