"""`python -m longshort`, and what torchrun starts."""

import os
import sys

from longshort.cli import main

status = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    # Everything is saved and closed by now. Threads that are still on their way out have been seen to abort a process
    # here, one in twenty on a busy machine, and torchrun takes that for a failure.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
