"""The command line: the only place that parses arguments, prints, and draws progress."""

import os

# Before torch is imported: OpenMP threads that wait for each other sleep instead of spinning. On a machine that does
# something else too (ComfyUI, say), spinning made the same conversion up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
