"""`python -m tools.stress`; `run` says what it does."""

import sys

from tools.stress.run import main

if __name__ == "__main__":
    sys.exit(main())
