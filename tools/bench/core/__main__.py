"""`python -m tools.bench.core`; `run` says what it does."""

import sys

from tools.bench.core.run import main

if __name__ == "__main__":
    sys.exit(main())
