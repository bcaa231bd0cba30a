"""What is shared with the faults: a scene, and the Ω that must hold after it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "faults"))
