"""`python -m pyflannel` is `pyflannel-udp`."""

import sys

from pyflannel.cli import main

sys.exit(main())
