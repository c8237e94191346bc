"""The type of the fixtures that run `asyncflow`."""

import subprocess
from collections.abc import Callable

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]
