"""`python -m tools.bench.gym`; `run` says what it does."""

import sys

from tools.bench.gym.run import main

if __name__ == "__main__":
    sys.exit(main())
