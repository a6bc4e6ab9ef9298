"""python -m migsim.accuracy, which tools/accuracy runs."""

import sys

from migsim.accuracy.command import main

sys.exit(main())
