"""`python -m mixlm`."""

import sys

from mixlm.cli import main

sys.exit(main())
