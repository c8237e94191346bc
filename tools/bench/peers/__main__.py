"""`python -m tools.bench.peers`; `run` says what it does."""

import sys

from tools.bench.peers.run import main

if __name__ == "__main__":
    sys.exit(main())
