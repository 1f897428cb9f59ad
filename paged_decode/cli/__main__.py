"""`python -m paged_decode.cli`, where the console command is not on the path."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
