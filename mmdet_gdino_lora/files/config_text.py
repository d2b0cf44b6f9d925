"""Configs as text inside checkpoints, which mmengine runs as Python when it resumes."""

from __future__ import annotations

import ast
import sys
from collections.abc import MutableMapping
from typing import Any

from mmdet_gdino_lora.errors import ConfigError

# Of a checkpoint's parts: where mmengine keeps the text, and reads it again.
_PLACES = (('meta', 'cfg'), ('meta', 'config'), ('message_hub', 'runtime_info', 'cfg'))
_CALLS, _NAMES = ('dict', 'float', 'set'), ('inf', 'nan')


def check_config_texts(path: str, content: MutableMapping[str, Any]) -> None:
    """Sees to it that the configs in a checkpoint are data, as mmengine writes them.

    ``Runner.resume`` hands such a text to ``Config.fromstring``, which runs it. Modules that it
    wants imported, and that this run has not, are left out of it: nothing of them is needed.

    Args:
        path: Of the checkpoint, for the message.
        content: What was read from it; changed in place.

    Raises:
        ConfigError: If one of them is a program.
    """
    for place in _PLACES:
        part: Any = content
        for key in place[:-1]:
            part = part.get(key) if isinstance(part, MutableMapping) else None
        if isinstance(part, MutableMapping) and isinstance(part.get(place[-1]), str):
            part[place[-1]] = _as_data(path, '.'.join(place), part[place[-1]])


def _as_data(path: str, place: str, text: str) -> str:
    refusal = ConfigError(
        f'{path}: the config in {place} is a program and not the plain settings that mmengine '
        'writes, and the file is not read because resuming would run it; use another copy, or '
        'take the weights alone out of it with tools/shrink_checkpoint.py.'
    )
    # mmengine fills in {{ }} before it parses, so that anything could come of them.
    if '{{' in text:
        raise refusal
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text  # mmengine parses it in the same way, and runs nothing
    kept: list[ast.stmt] = []
    for statement in body:
        if not (
            isinstance(statement, ast.Assign)
            and all(isinstance(t, ast.Name) and t.id != '_base_' for t in statement.targets)
            and _is_data(statement.value)
        ):
            raise refusal
        if _imports_nothing_new(statement):
            kept.append(statement)
    return text if len(kept) == len(body) else ast.unparse(ast.Module(kept, []))


def _imports_nothing_new(statement: ast.Assign) -> bool:
    if all(t.id != 'custom_imports' for t in statement.targets if isinstance(t, ast.Name)):
        return True
    names = [n.value for n in ast.walk(statement.value) if isinstance(n, ast.Constant)]
    return all(name in sys.modules for name in names if isinstance(name, str))


def _is_data(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        return (
            isinstance(node.func, ast.Name) and node.func.id in _CALLS and all(map(_is_data, parts))
        )
    if isinstance(node, ast.Name):
        return node.id in _NAMES
    if isinstance(node, ast.Dict):
        return all(_is_data(part) for part in [*node.keys, *node.values] if part is not None)
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return all(map(_is_data, node.elts))
    if isinstance(node, ast.UnaryOp):
        return _is_data(node.operand)
    return isinstance(node, ast.Constant)
