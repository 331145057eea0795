"""`runs.py` is imported by name: from tests, and from the configurations of runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
