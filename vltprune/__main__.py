"""Entry point of `python -m vltprune`, which runs the command `vltprune`."""

import sys

from .cli.main import main

sys.exit(main())
