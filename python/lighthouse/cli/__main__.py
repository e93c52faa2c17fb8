"""`python -m lighthouse.cli`, the `lighthouse` command where its script is not on the path."""

import sys

from lighthouse.cli import main

sys.exit(main())
