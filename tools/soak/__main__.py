"""`python -m tools.soak`; `run` says what it does."""

import sys

from tools.soak.run import main

if __name__ == "__main__":
    sys.exit(main())
