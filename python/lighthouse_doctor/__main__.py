"""`python -m lighthouse_doctor`, the same as `lighthouse doctor`."""

import sys

from lighthouse_doctor.command import main

sys.exit(main(sys.argv[1:]))
