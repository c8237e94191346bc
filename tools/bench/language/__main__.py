"""`python -m tools.bench.language`; `run` says what it does."""

import sys

from tools.bench.language.run import main

if __name__ == "__main__":
    sys.exit(main())
