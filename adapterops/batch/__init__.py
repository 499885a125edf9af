"""Many adapters at a time: finding them, running over them, mirroring and resuming outputs.

One bad item is reported and the rest goes on; the exit code is the worst.
"""

from adapterops.batch.outputs import is_done, mirror, mirrored, recorded, skip_done
from adapterops.batch.run import Outcome, run_many
from adapterops.batch.search import Item, find, is_one

__all__ = [
    "Item",
    "Outcome",
    "find",
    "is_done",
    "is_one",
    "mirror",
    "mirrored",
    "recorded",
    "run_many",
    "skip_done",
]
