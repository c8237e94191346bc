"""Plain values from strangers' files: YAML whose aliases do not explode, and how deeply values are nested.

The limits hold for any values.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 64  # copying, comparing and writing values recurse
MAX_YAML_VALUES = 100_000  # a configuration has some hundred


def is_deep(value: Any) -> bool:
    """Tell whether lists and mappings, as JSON gives them, are nested deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def load_yaml(text: str, are_all_texts: bool = False) -> Any:
    """Return what YAML means, as `yaml.safe_load` does; or with every plain value as the text that it is.

    Raises:
        yaml.YAMLError: It is not YAML, or an alias means what it stands in.
        ValueError: With its aliases written out, it is larger than `MAX_YAML_VALUES`, or nested too deeply; also for a
            value that its own tag refuses.
    """
    loader: Any = (yaml.BaseLoader if are_all_texts else yaml.SafeLoader)(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _num_values(root, {}, 0) > MAX_YAML_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_YAML_VALUES} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _num_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node is with its aliases written out; each node is counted once."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if id(node) not in known:
        known[id(node)] = MAX_YAML_VALUES + 1  # what stands within itself has no end
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [each for child in children for each in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_num_values(child, known, depth + 1) for child in flat)
    return known[id(node)]
