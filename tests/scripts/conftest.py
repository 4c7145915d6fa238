"""Puts the scripts where Python finds them, as it does for a script's own neighbours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
