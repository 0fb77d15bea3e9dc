"""diffusionlab: train, sample, distil and evaluate diffusion models from a config."""

import time

STARTED = time.monotonic()
"""When this program started: nothing of ours is imported before."""

__version__ = "0.1.0"
