"""``python -m xtoken`` is the command ``xtoken``."""

import sys

from .cli import main

sys.exit(main())
