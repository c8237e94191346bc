"""`python -m tools.bench.overlap`; `run` says what it does."""

import sys

from tools.bench.overlap.run import main

if __name__ == "__main__":
    sys.exit(main())
