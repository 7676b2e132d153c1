"""``python -m loraweave``."""

import sys

from loraweave.cli import main

sys.exit(main())
