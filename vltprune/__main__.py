"""`python -m vltprune` is `vltprune`."""

import sys

from .cli.main import main

sys.exit(main())
