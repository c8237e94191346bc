"""One tree of exceptions. `cli.py` turns a `ConfigError` into exit code 2, everything else into 1."""


class AsyncflowError(Exception):
    """Root of every error that asyncflow raises on purpose."""


class ConfigError(AsyncflowError):
    """The user asked for something impossible; the message is one line naming key, value and what is allowed."""


class EnvError(AsyncflowError):
    """A simulator or its worker process failed."""


class CollectorError(AsyncflowError):
    """The collector thread failed; the cause carries its traceback."""


class TrainingError(AsyncflowError):
    """Training diverged; going on would not help."""


class ContractError(ConfigError):
    """Code from elsewhere breaks its contract; one line names it, its method, what came and what was expected."""


class CheckpointError(ConfigError):
    """A checkpoint is missing, foreign, corrupt, or does not fit the policy."""
