"""One policy in one safetensors file: its tensors, how to build it, and the environment it was made for.

Files are written atomically. `--checkpoint` and `asyncflow eval` name them in several ways, all resolved here. Pickled
code is never read: a checkpoint of robomimic, a pickle, is described and refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import asyncflow
from asyncflow.checksums import check_file
from asyncflow.config.contracts import name_of
from asyncflow.config.lerobot_folder import is_lerobot_folder, with_export
from asyncflow.config.overrides import write_override
from asyncflow.config.plain_values import is_deep
from asyncflow.config.robomimic_file import SUFFIXES as ROBOMIMIC_SUFFIXES
from asyncflow.config.robomimic_file import load_robomimic_file
from asyncflow.config.sections import PolicyConfig
from asyncflow.envs.mapping import NameMapping
from asyncflow.errors import CheckpointError, ConfigError
from asyncflow.files import expand_user, follow, write_atomically
from asyncflow.policies.policy_header import read_policy_config, read_spec
from asyncflow.simulators.spec import EnvSpec

FORMAT = "asyncflow-policy"
FORMAT_VERSION = 1
FILE_NAME = "policy.safetensors"
CLASS = "class"  # of the header: of a user's own policy, its name in place of a configuration
SHARED = "shared"  # of the header: name -> name under which the same tensor is stored; absent without tied weights
ASSETS = Path(__file__).parents[1] / "assets"
MAX_REPORTED_TENSORS = 4
# Exploration, which a configuration may change between pre-training and fine-tuning.
LEARNED_NOISE = "sampler.noise_logit"
NOISE_LEVEL = "sampler.noise_level"
_CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class PolicyFile:
    """A policy file's content.

    Attributes:
        path: Where it lies.
        tensors: The policy's state, by the names of `state_dict`.
        policy_config: What builds a policy that these tensors fit.
        env_spec: The environment that the policy was made for.
    """

    path: Path
    tensors: dict[str, Tensor]
    policy_config: PolicyConfig
    env_spec: EnvSpec

    @cached_property
    def mapping(self) -> NameMapping:
        """The mapping from the names of `env_spec` to the policy's.

        Raises:
            ConfigError: The two do not fit together.
        """
        return NameMapping(self.policy_config.mapping, self.env_spec)


def save_policy(path: str | Path, policy: nn.Module, policy_config: PolicyConfig | None, env_spec: EnvSpec) -> None:
    """Write a policy file, replacing an old one in a single step: a reader sees the old file or the new one."""
    state = policy.state_dict()
    shared = find_shared(state)
    tensors = {name: _own_memory(tensor) for name, tensor in state.items() if name not in shared}
    write_atomically(Path(path), save(tensors, metadata=_make_metadata(policy, shared, policy_config, env_spec)))


def _make_metadata(
    policy: nn.Module, shared: dict[str, str], policy_config: PolicyConfig | None, env_spec: EnvSpec
) -> dict[str, str]:
    header: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "asyncflow": asyncflow.__version__,
        "env": asdict(env_spec),
    }
    if policy_config is None:
        header[CLASS] = name_of(policy)
    else:
        header["policy"] = policy_config.model_dump()
    if shared:
        header[SHARED] = shared
    # One key: safetensors writes several in an order of its own, which differs between runs.
    return {FORMAT: json.dumps(header, sort_keys=True)}


def _own_memory(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU that is the whole of its memory, which safetensors asks for; a view is copied."""
    alone = tensor.detach().cpu().contiguous()
    return alone if alone.untyped_storage().nbytes() == alone.nbytes else alone.clone()


def find_shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each tensor that an earlier name holds as well (tied weights), that name."""
    first: dict[Any, str] = {}
    shared = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        kept = first.setdefault(place, name)
        if kept != name and tensor.numel():
            shared[name] = kept
    return shared


def check_saving(policy: nn.Module, policy_config: PolicyConfig | None, env_spec: EnvSpec) -> None:
    """Try, without their numbers, what `save_policy` will do: a run would learn only at its first checkpoint.

    Raises:
        ConfigError: A part of the policy or of the environment's description cannot be stored; names it.
    """
    state, source = policy.state_dict(), name_of(policy) if policy_config is None else policy_config.source
    for name, tensor in state.items():
        if problem := _find_problem(tensor):
            raise ConfigError(f"{source}: its state_dict holds {name}, {problem}")
    check_finite(state, source)  # as every reader of the file does
    try:
        _make_metadata(policy, {}, policy_config, env_spec)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env.task = {env_spec.task}: its spec (EnvSpec) cannot be stored as JSON: {_one_line(error)}"
        ) from error


def _find_problem(tensor: Any) -> str | None:
    """Return why a part of a state cannot be stored and loaded again."""
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        return f"a {kind} (get_extra_state); a policy file holds tensors alone: register a buffer instead"
    if tensor.layout == torch.strided and _is_expanded(tensor):
        return "whose numbers share memory (expand), so that none can be loaded into it; make it with clone()"
    try:
        save({"tensor": tensor.new_empty(0)})
    except Exception as error:  # safetensors and torch have errors of their own, for sparse tensors and odd types
        return f"a tensor of {tensor.dtype}, {tensor.layout}, which cannot be stored: {_one_line(error)}"
    return None


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def load_policy_file(path: str | Path) -> PolicyFile:
    """Read a policy file; in a checkpoint it must have the checksum that was written beside it.

    Raises:
        CheckpointError: As `read_policy_file`, or its checksum differs.
    """
    check_file(Path(path))
    return read_policy_file(Path(path))


def read_policy_file(path: Path, *, is_any_class: bool = False) -> PolicyFile:
    """Read a policy file, whatever its checksum.

    Args:
        path: The file.
        is_any_class: Whether its tensors may be those of a user's own class, which asyncflow cannot build.

    Raises:
        CheckpointError: It is missing, truncated, not safetensors, or not written by asyncflow, or a weight is not
            finite; one that robomimic wrote is described.
    """
    header = _read_header(path)
    if CLASS in header and not is_any_class:
        raise CheckpointError(
            f"{path}: holds a policy of the class {header[CLASS]}, which asyncflow cannot build; go on with "
            "asyncflow.Trainer.resume(path, policy=...)"
        )
    try:
        tensors = _restore_shared(path, load_file(path), header)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged: {_one_line(error)}") from None
    check_finite(tensors, str(path))
    try:
        policy_config = PolicyConfig() if CLASS in header else with_export(read_policy_config(header), path.parent)
    except (ConfigError, ValueError) as error:
        raise _damaged(path, error) from None
    return PolicyFile(path, tensors, policy_config, _parse_env(header, path))


def read_env_spec(path: Path) -> EnvSpec:
    """Return the environment that a policy file was made for; its tensors are not read.

    Raises:
        CheckpointError: As `read_policy_file`.
    """
    return _parse_env(_read_header(path), path)


def _parse_env(header: dict[str, Any], path: Path) -> EnvSpec:
    try:
        return read_spec(header)
    except (ConfigError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, or written by another version of asyncflow: {_one_line(error)}")


def _restore_shared(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors under all of their names."""
    try:
        return tensors | {name: tensors[kept] for name, kept in header.get(SHARED, {}).items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: asyncflow's metadata is damaged: {SHARED} must map names to tensors") from None


def _read_header(path: Path) -> dict[str, Any]:
    """Return asyncflow's part of a safetensors header; the tensors are not touched."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(min(size, path.stat().st_size))).get("__metadata__", {})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from None
    except (struct.error, ValueError, AttributeError, RecursionError):
        _refuse_robomimic(path)
        raise CheckpointError(f"{path}: not a safetensors file, or truncated") from None
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        raise CheckpointError(f"{path}: a safetensors file without asyncflow's metadata (key {FORMAT!r})")
    try:
        header: dict[str, Any] = json.loads(metadata[FORMAT])
        version = header["version"]
        if is_deep(header):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: asyncflow's metadata is damaged") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this asyncflow reads {FORMAT_VERSION}")
    return header


def _refuse_robomimic(path: Path) -> None:
    """Say what a checkpoint of robomimic is: it bounds its actions by a tanh, so that no policy here equals its own.

    Raises:
        CheckpointError: The file is robomimic's by its suffix.
    """
    if path.suffix in ROBOMIMIC_SUFFIXES:
        file = load_robomimic_file(path)
        origin = f"algorithm {file.algo_name!r}, environment {file.env_meta.get('env_name')!r}"
        raise CheckpointError(
            f"{path}: a robomimic policy ({origin}), which asyncflow cannot run; "
            f"it can take the environment: {write_override('env.env_meta', str(path))}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def resolve_checkpoint(name: str) -> Path:
    """Return the policy file that a name means.

    Args:
        name: A .safetensors file, a checkpoint folder, a run folder (its last checkpoint), or shipped weights.

    Raises:
        CheckpointError: Nothing of that name exists.
    """
    path = follow(expand_user(name))
    last = follow(path / "checkpoints" / "last")
    for candidate in (path, path / FILE_NAME, last / FILE_NAME, ASSETS / f"{name}.safetensors"):
        if _is_file(candidate):
            return candidate
    if is_lerobot_folder(path):
        raise CheckpointError(
            f"checkpoint {name}: a LeRobot policy folder, which names no environment; `asyncflow train --checkpoint` "
            "fine-tunes it, and its run can be evaluated"
        )
    raise CheckpointError(
        f"checkpoint {name}: not found; give a run folder, a checkpoint folder, a .safetensors file, "
        f"or shipped weights: {', '.join(shipped_weights())}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or may not be looked at
        return False


def shipped_weights() -> list[str]:
    """Return the names of the weights that come with asyncflow."""
    return sorted(path.stem for path in ASSETS.glob("*.safetensors"))


def load_into(policy: nn.Module, file: PolicyFile) -> None:
    """Copy a file's tensors into a policy; the noise it explores with stays its own where the two differ in kind.

    Raises:
        CheckpointError: Names or shapes differ; the message names the tensors and both shapes.
    """
    own = policy.state_dict()
    tensors = _adapt_exploration(own, file.tensors)
    check_tensors(own, tensors, str(file.path))
    narrowed = {name: x.to(own[name].dtype) for name, x in tensors.items() if x.dtype != own[name].dtype}
    check_finite(narrowed, f"{file.path}, in the policy's types,")
    policy.load_state_dict(tensors)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with which every decision would be NaN.

    Raises:
        CheckpointError: A number is not finite; the message names the source and the tensors. An attention mask, which
            holds 0 and -inf alone, is let through.
    """
    names = [name for name, x in tensors.items() if x.is_floating_point() and not _is_finite(x)]
    if names:
        rest = len(names) - MAX_REPORTED_TENSORS
        more = f" and {rest} more" if rest > 0 else ""
        raise CheckpointError(f"{source}: holds NaN or inf in {', '.join(names[:MAX_REPORTED_TENSORS])}{more}")


def _is_finite(tensor: Tensor) -> bool:
    x = tensor if tensor.dtype in _CASTABLE else tensor.float()  # of eight bits, few functions are defined
    return bool(x.isfinite().all() or (x.ndim > 1 and ((x == 0) | (x == -torch.inf)).all()))


def check_tensors(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], source: str) -> None:
    """Compare what a policy needs with what was stored.

    Raises:
        CheckpointError: Names or shapes differ, or types other than those of floating point, between which weights are
            converted; the message names the source, the tensors and what differs.
    """
    problems = _find_mismatches(own, stored)
    if problems:
        rest = len(problems) - MAX_REPORTED_TENSORS
        more = f" and {rest} more" if rest > 0 else ""
        shown = "; ".join(problems[:MAX_REPORTED_TENSORS])
        raise CheckpointError(f"{source} does not fit the policy (policy vs checkpoint): {shown}{more}")


def _adapt_exploration(own: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to load when `policy.noise_method`, `learn_noise` or `noise_level` may have been changed.

    One set of weights serves every noise method, and the noise level is a value of the configuration.
    """
    tensors = dict(stored)
    if LEARNED_NOISE in own:
        tensors.setdefault(LEARNED_NOISE, own[LEARNED_NOISE])
    else:
        tensors.pop(LEARNED_NOISE, None)
    if NOISE_LEVEL in own and NOISE_LEVEL in stored:
        tensors[NOISE_LEVEL] = own[NOISE_LEVEL]
    return tensors


def _find_mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        ours, its = expected.get(name), found.get(name)
        if _shape(ours) != _shape(its):
            problems.append(f"{name} {_shape(ours)} vs {_shape(its)}")
        elif ours is not None and its is not None and not _is_castable(its.dtype, ours.dtype):
            problems.append(f"{name} {ours.dtype} vs {its.dtype}")
    return problems


def _is_castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Tell whether weights of one type may be stored as another: those of eight bits would need their scale."""
    return source == target or {source, target} <= _CASTABLE


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
