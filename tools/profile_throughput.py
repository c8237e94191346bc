"""Measure both buffer types in turns: throughput, its ceilings, and what limits it. The same as `asyncflow profile`.

python -m tools.profile_throughput --task Toy --inference-latency-s 0.2 --update-latency-s 0.2
"""

from __future__ import annotations

import sys

from asyncflow.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "profile")
    main()
