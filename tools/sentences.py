"""Writes every sentence that the project can say to a person into docs/troubleshooting.md.

They are read from the code: what errors, findings and warnings are made of. Capitals and `...`
stand for what differs from case to case.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'troubleshooting.md'
#: What is below this line is written by this tool.
HEADING = '## Every sentence\n'
INTRO = """
Written by `python tools/sentences.py`. Words in capitals and `...` stand for a file, a key, a value
or a number. What stops a run is under errors; what is told while it goes on, under warnings.
"""
ERRORS = ('ConfigError', 'DiskFullError', 'NonFiniteError', 'NoWordError')
WARNINGS = ('warning', 'warn')


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description='List what the project says').parse_args()
    PAGE.write_text(page(), encoding='utf-8')
    print(f'written: {PAGE.relative_to(ROOT)}')


def page() -> str:
    """The page as it should be: what people wrote, and below it what the code says."""
    by_hand = PAGE.read_text(encoding='utf-8').partition(HEADING)[0]
    text = by_hand + HEADING + INTRO
    said = sorted(set(sentences()))
    for title, kind in (('Errors', 'error'), ('Warnings', 'warning')):
        text += f'\n### {title}\n'
        places = itertools.groupby((s for s in said if s[2] == kind), key=lambda s: s[0])
        for place, told in places:
            text += f'\n`{place}`\n\n' + ''.join(f'- {sentence}\n' for _, sentence, _ in told)
    return text


def sentences() -> Iterator[tuple[str, str, str]]:
    """What is said: the file that says it, the sentence, and ``'error'`` or ``'warning'``."""
    for folder in ('mmdet_gdino_lora', 'tools'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            tree = ast.parse(path.read_text(encoding='utf-8'))
            for node in ast.walk(tree):
                kind = _kind(node) if isinstance(node, ast.Call) and node.args else None
                if kind:
                    # of boxes: the rows come first, and in front of the sentence their number
                    sentence = _text(node.args[_name(node) == 'finding'])
                    if re.search('[a-z]{3}', sentence.replace('...', '')):
                        yield str(path.relative_to(ROOT)), sentence, kind


def _kind(call: ast.Call) -> str | None:
    name = _name(call)
    if name in ERRORS:
        return 'error'
    if name in WARNINGS:
        return 'warning'
    if name not in ('Finding', 'finding'):
        return None
    fatal = [keyword.value for keyword in call.keywords if keyword.arg == 'fatal'] + call.args[
        1 + (name == 'finding') :
    ]
    known = fatal and isinstance(fatal[0], ast.Constant)
    return 'error' if fatal and not (known and not fatal[0].value) else 'warning'


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', '')


def _text(node: ast.expr) -> str:
    """The constant parts of a string, with names in capitals between them."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace('%s', '...').replace('%d', '...')
    if isinstance(node, ast.JoinedStr):
        return ''.join(
            str(part.value) if isinstance(part, ast.Constant) else _text(part.value)
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.Name):
        return node.id.upper()
    if isinstance(node, ast.Attribute):
        return node.attr.upper()
    return '...'


if __name__ == '__main__':
    main()
