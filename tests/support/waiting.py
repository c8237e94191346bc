"""A thread that waits, seen from outside: no test has to guess whether it has come to that."""

import threading

PATIENCE_S = 60.0  # what is waited for comes in milliseconds; a busy machine may take longer


class Waiting:
    """A function in a thread of its own that is expected to wait on a condition."""

    def __init__(self, function, condition):
        self._has_waited, self._result, self._error = threading.Event(), None, None
        self._wait, condition.wait = condition.wait, self._notice
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def waits(self):
        """Tell whether it has come to wait; whoever takes the condition's lock then finds it waiting."""
        return self._has_waited.wait(PATIENCE_S)

    def finish(self):
        """Return or raise what the function did."""
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise TimeoutError("it still waits")
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, function):
        try:
            self._result = function()
        except Exception as error:
            self._error = error

    def _notice(self, timeout=None):
        self._has_waited.set()
        return self._wait(timeout)
