"""`python -m vltprune` is `vltprune`."""

import sys

from .cli import main

sys.exit(main())
