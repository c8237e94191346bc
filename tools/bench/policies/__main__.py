"""`python -m tools.bench.policies`; `run` says what it does."""

import sys

from tools.bench.policies.run import main

if __name__ == "__main__":
    sys.exit(main())
