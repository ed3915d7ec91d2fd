"""`python -m trietune` is `trietune`."""

import sys

from trietune.cli import main

sys.exit(main())
