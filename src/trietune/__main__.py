"""`python -m trietune` is `trietune`."""

import sys

from trietune.cli.app import main

sys.exit(main())
