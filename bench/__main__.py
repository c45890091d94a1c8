"""`python -m kinora.bench`: the same program as `kinora bench`."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
