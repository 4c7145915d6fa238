"""What the bench's tests share."""

import os
import sys
from pathlib import Path

# For the processes that the tests start: several test workers share few cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Not through a fixture: the workers' processes look the module up by its name, whatever pytest calls this folder.
sys.path.insert(0, str(Path(__file__).parent))
