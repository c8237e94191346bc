"""The substeps of an environment step, all in one compiled function: MuJoCo's steps and the arms' torques between them.

It calls MuJoCo's shared library and numpy's own BLAS by address, on the model's and the data's own memory, and computes
what `osc_law` computes, in the same arithmetic and order: results are equal bit for bit. Compiled by numba, which
robosuite brings, once for a machine. Where an address cannot be found, there is no such function, and `fast_step` goes
on as before.

An error within MuJoCo ends the process, as it does in C; a worker is then replaced.

It is given the arrays that `OscLaw` has; their shapes are described there.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple

import mujoco
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from robosuite.utils.numba import jit_decorator

from asyncflow.simulators.robosuite.osc_law import compiled_law

if TYPE_CHECKING:
    from asyncflow.simulators.robosuite.osc_law import OscLaw

_ROW_MAJOR, _COLUMN_MAJOR, _AS_IT_IS = 101, 102, 111  # of CBLAS
_GEMV_NAMES = ("scipy_cblas_dgemv64_", "cblas_dgemv64_")  # in numpy 2 and numpy 1


class Functions(NamedTuple):
    """Addresses of the C functions that are called.

    Attributes:
        step1: `mj_step1`.
        step2: `mj_step2`.
        jac_site: `mj_jacSite`.
        full_mass: `mj_fullM`.
        gemv: The `cblas_dgemv` that `numpy.dot` calls.
    """

    step1: int
    step2: int
    jac_site: int
    full_mass: int
    gemv: int


@functools.lru_cache(maxsize=None)
def find_functions() -> Functions | None:
    """Return the addresses of what is called; None where one of them is not to be found."""
    libraries = [ctypes.CDLL(str(path)) for path in sorted(Path(mujoco.__file__).parent.glob("libmujoco.so*"))]
    found = [_find_address(libraries, name) for name in ("mj_step1", "mj_step2", "mj_jacSite", "mj_fullM")]
    gemv = next(filter(None, (_find_address(list(_blas_libraries()), name) for name in _GEMV_NAMES)), None)
    addresses = [each for each in (*found, gemv) if each is not None]
    return Functions(*addresses) if len(addresses) == len(Functions._fields) else None


def _blas_libraries() -> Iterator[ctypes.CDLL]:
    """Yield the libraries that numpy brings along, among them the one that `numpy.dot` calls."""
    for path in sorted((Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")):
        yield ctypes.CDLL(str(path))


def _find_address(libraries: list[ctypes.CDLL], name: str) -> int | None:
    for library in libraries:
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    return None


def _caller(arguments: list[Any]) -> Any:
    """Return a function for compiled code that calls an address with arguments of these types, and returns nothing."""

    @intrinsic
    def call(typing_context: Any, address: Any, given: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kinds = [context.get_value_type(each) for each in arguments]
            function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
            unpacked = cgutils.unpack_tuple(builder, values[1])
            cast = [context.cast(builder, *each) for each in zip(unpacked, given.types, arguments)]
            builder.call(function, cast)
            return context.get_dummy_value()

        return types.void(types.intp, given), generate

    return call


_call_step = _caller([types.intp, types.intp])
_call_jac_site = _caller([types.intp, types.intp, types.intp, types.intp, types.int32])
_call_full_mass = _caller([types.intp, types.intp, types.intp])
_call_gemv = _caller(
    [
        types.int32, types.int32, types.int64, types.int64, types.float64, types.intp, types.int64, types.intp,
        types.int64, types.float64, types.intp, types.int64,
    ]
)  # fmt: skip


def _multiply(gemv: int, layout: tuple[int, int, int], matrix: Any, vector: Any, out: Any) -> None:
    """Do what `numpy.dot(matrix, vector, out)` does; the layout is the matrix's order, rows and columns."""
    order, num_rows, num_columns = layout
    lead = num_columns if order == _ROW_MAJOR else num_rows
    _call_gemv(
        gemv,
        (
            order, _AS_IT_IS, num_rows, num_columns, 1.0, matrix.ctypes.data, lead, vector.ctypes.data, 1, 0.0,
            out.ctypes.data, 1,
        ),
    )  # fmt: skip


_multiply = jit_decorator(_multiply)


def _actuate(functions: Any, model: int, data: int, arm: Any) -> None:
    """Write the torques of one arm; as `OscLaw.actuate`."""
    _, _, jac_site, fill_mass, gemv = functions
    site, first_dof, full, state, law, limits = arm
    position, orientation, full_mass, sparse_mass, all_velocities = full
    site_position, site_rotation, qpos, qvel, bias, ctrl = state
    task, joints, mass, jacobian, half_position, half_orientation, wrench, decoupled, torques = law
    num_joints, num_dofs = len(qpos), len(all_velocities)

    _call_jac_site(jac_site, (model, data, position.ctypes.data, orientation.ctypes.data, site))
    _call_full_mass(fill_mass, (model, full_mass.ctypes.data, sparse_mass.ctypes.data))
    _multiply(gemv, (_ROW_MAJOR, 3, num_dofs), position, all_velocities, task[8])
    _multiply(gemv, (_ROW_MAJOR, 3, num_dofs), orientation, all_velocities, task[9])
    for i in range(3):
        task[4, i] = site_position[i]
        for j in range(3):
            task[5 + i, j] = site_rotation[3 * i + j]
        for j in range(num_joints):
            jacobian[i, j] = half_position[i, j] = position[i, first_dof + j]
            jacobian[3 + i, j] = half_orientation[i, j] = orientation[i, first_dof + j]
    for i in range(num_joints):
        joints[1, i], joints[2, i] = qpos[i], qvel[i]
        for j in range(num_joints):
            mass[i, j] = full_mass[first_dof + i, first_dof + j]
    compiled_law(task, joints, mass, (jacobian, half_position, half_orientation), wrench)
    _multiply(gemv, (_COLUMN_MAJOR, 3, 3), wrench[8:17], wrench[0:3], decoupled[0:3])
    _multiply(gemv, (_COLUMN_MAJOR, 3, 3), wrench[18:27], wrench[4:7], decoupled[3:6])
    _multiply(gemv, (_COLUMN_MAJOR, num_joints, 6), jacobian, decoupled, torques)
    low, high = limits
    for i in range(num_joints):
        torque = (torques[i] + bias[i]) + joints[3, i]
        ctrl[i] = np.minimum(np.maximum(torque, low[i]), high[i])


_actuate = jit_decorator(_actuate)


def _run(functions: Any, model: int, data: int, arms: Any, count: int) -> None:
    for _ in range(count):
        _call_step(functions[0], (model, data))
        for arm in arms:
            _actuate(functions, model, data, arm)
        _call_step(functions[1], (model, data))


_run = jit_decorator(_run)


class Substeps:
    """Runs substeps of one simulation."""

    def __init__(self, functions: Functions, model: Any, data: Any, arms: list[OscLaw]) -> None:
        """Look up the memory that lasts as long as the simulation and its controllers.

        Args:
            functions: What is called.
            model: MuJoCo's `MjModel`.
            data: Its `MjData`.
            arms: The laws of all arms, whose goals robosuite sets at the first substep.
        """
        self._keep = (model, data)
        self._arguments = (
            tuple(functions), model._address, data._address, tuple(arm.compiled_arguments() for arm in arms),
        )  # fmt: skip

    def run(self, count: int) -> None:
        """Let that many substeps pass, each from `mj_step1` to `mj_step2`."""
        _run(*self._arguments, count)


def make_substeps(model: Any, data: Any, arms: list[OscLaw]) -> Substeps | None:
    """Return what runs substeps; None where a function is not found, or robosuite's macros switch numba off."""
    functions = find_functions() if isinstance(_run, numba.core.dispatcher.Dispatcher) else None
    return None if functions is None else Substeps(functions, model, data, arms)
