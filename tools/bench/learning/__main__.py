"""`python -m tools.bench.learning`; `run` says what it does."""

import sys

from tools.bench.learning.run import main

if __name__ == "__main__":
    sys.exit(main())
