"""Says in one line why an interpreter cannot import what simulators need, and which command mends it."""

from __future__ import annotations

import sys

from asyncflow.config.interpreters import how_to_install, installed_version, is_there


def explain_import(error: BaseException, module: str) -> str:
    """Return in one line why this interpreter cannot import what a simulator needs, and what mends it.

    Args:
        error: What was raised.
        module: The simulator's, which was to be imported.
    """
    who = f"{sys.executable} (Python {sys.version_info[0]}.{sys.version_info[1]})"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if error.name != package and is_there(package):
            found = f"its {package} {installed_version(package) or ''}".rstrip()
            return f"{who}: {found} has no module {error.name}; run: {how_to_install(package)}"
        run = f"run: {how_to_install(package)}"
        if package == module.partition(".")[0]:
            named = "name it without .py, and " if module.endswith(".py") else ""
            run = f"if it is a file of yours, {named}set PYTHONPATH to its folder; if it is a published package, {run}"
        return f"{who} has no package {package}; {run}"
    package, is_installed = _find_culprit(error, module)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{who} cannot import {package}: {said}" + (f"; run: {how_to_install(package)}" if is_installed else "")


def _find_culprit(error: BaseException, module: str) -> tuple[str, bool]:
    """Return the package in which an import failed, the innermost installed one or else `module`'s, and which it is."""
    trace, found = error.__traceback__, (module.partition(".")[0], False)
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if "site-packages" in trace.tb_frame.f_code.co_filename and name != "asyncflow":
            found = (name, True)
        trace = trace.tb_next
    return found
