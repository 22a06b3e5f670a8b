"""`python -m minireft`: the same as `minireft`."""

import sys

from .cli import main

sys.exit(main())
