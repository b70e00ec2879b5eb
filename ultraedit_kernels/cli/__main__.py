"""`python -m ultraedit_kernels.cli`."""

import sys

from ultraedit_kernels.cli import main

sys.exit(main())
