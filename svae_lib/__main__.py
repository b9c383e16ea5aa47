r"""`python -m svae_lib` is `svae`."""

import sys

from svae_lib.cli import main

sys.exit(main())
