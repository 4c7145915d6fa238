"""What the bench's tests share."""

import sys
from pathlib import Path

# Not through a fixture: the workers' processes look the module up by its name, whatever pytest calls this folder.
sys.path.insert(0, str(Path(__file__).parent))
