"""`python -m diffdoctor.cli` is the command line."""

import sys

from diffdoctor.cli import main

sys.exit(main())
