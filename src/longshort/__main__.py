"""`python -m longshort` is the command `longshort`."""

import sys

from longshort.cli import main

sys.exit(main())
