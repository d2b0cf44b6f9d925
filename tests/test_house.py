"""House rules: small files, short functions, imports that point one way."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = 'mmdet_gdino_lora'
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
SOURCES = sorted(
    [
        ROOT / 'gdino_lora.py',
        *(p for folder in (PACKAGE, 'tools', 'configs') for p in (ROOT / folder).rglob('*.py')),
    ]
)
#: The package's face: what it offers, and `python -m`.
FACE = ('__init__', '__main__', 'public')
#: Whom each room may import beside itself. What is not here is a new room: give it a line.
MAY_IMPORT = {
    'errors': set(),
    'environment': {'errors'},
    'start': set(),
    'shipped': {'errors'},
    'transfer': {'errors'},
    'files': {'errors'},
    # Plain tensors: no model, no text, no files.
    'objective': {'errors', 'transfer'},
    'peft_layers': {'errors'},
    # Whether its weights are adapted decides whether the text tower may remember.
    'text': {'errors', 'files', 'peft_layers', 'transfer'},
    'layers': {'errors', 'peft_layers', 'transfer'},
    'datasets': {'checks', 'errors', 'text'},
    'samples': {'errors', 'text', 'transfer'},
    'phrases': {'text'},
    # The runner's side: no model, no adapter.
    'checks': {'errors', 'text'},
    # What a folder of photos holds, before there is a config.
    'formats': {'checks', 'errors', 'shipped'},
    'engine': {'checks', 'errors', 'files', 'text'},
    'lora': {'checks', 'errors', 'engine', 'files', 'layers', 'peft_layers'},
    'head': {'errors', 'layers', 'objective', 'samples', 'text', 'transfer'},
    'retain': {
        'checks',
        'errors',
        'lora',
        'objective',
        'peft_layers',
        'text',
        'transfer',
        'transformer',
    },
    # Behind the encoder nothing is known of it: the hook hands it to the detector.
    'frozen': {
        'checks',
        'engine',
        'errors',
        'layers',
        'lora',
        'retain',
        'text',
        'transformer',
    },
    'transformer': {'errors', 'layers', 'samples', 'text', 'transfer'},
    'route': {'checks', 'errors', 'lora', 'samples', 'text'},
    'prediction': {'errors', 'engine', 'layers', 'phrases', 'route', 'samples', 'text', 'transfer'},
    'evaluation': {'errors'},
    'changes': {'engine', 'errors', 'head', 'lora'},
    'detector': {
        'changes',
        'checks',
        'errors',
        'engine',
        'layers',
        'lora',
        'phrases',
        'prediction',
        'retain',
        'route',
        'samples',
        'text',
        'transformer',
    },
    'export': {'engine', 'errors', 'layers', 'text', 'transformer'},
    'labelling': {'checks', 'engine', 'errors'},
    # A page of files, and a hook that writes it of a run: nobody but people asks for either.
    'report': {'engine', 'errors', 'files', 'lora'},
    'browse': {'datasets', 'engine', 'errors', 'samples', 'text'},
    'playground': {'errors'},
    # People's: nobody imports from there.
    'commands': {
        'browse',
        'checks',
        'datasets',
        'engine',
        'errors',
        'export',
        'files',
        'formats',
        'labelling',
        'lora',
        'playground',
        'report',
        'shipped',
        'start',
        'text',
    },
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def imported(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Modules that are imported at any depth, each with the names taken; not those for types."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'line {node.lineno}: imports are written in full'
            yield node.module or '', [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for module, names in imported(parsed(path)):
        if module == PACKAGE:
            rooms |= set(names)
        elif module.startswith(f'{PACKAGE}.'):
            rooms.add(module.split('.')[1])
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py')


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_and_functions_are_short() -> None:
    long = []
    for path in SOURCES:
        lines = len(path.read_text(encoding='utf-8').splitlines())
        if lines > LINES_OF_A_FILE:
            long.append(f'{name_of(path)}: {lines} lines')
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LINES_OF_A_FUNCTION:
                    long.append(f'{name_of(path)}: {node.name} has {lines} lines')
    assert long == []


def test_a_room_imports_what_the_table_allows() -> None:
    wrong = []
    for path in SOURCES:
        if PACKAGE not in path.parts or room_of(path) in FACE:
            continue
        room = room_of(path)
        assert room in MAY_IMPORT, f'{room} is a new room: say in MAY_IMPORT whom it may import'
        for other in sorted(rooms_imported(path) - {room} - MAY_IMPORT[room]):
            wrong.append(f'{name_of(path)} imports from {other}')
    assert wrong == []


def test_the_tables_arrows_point_one_way() -> None:
    list(TopologicalSorter(MAY_IMPORT).static_order())  # a circle is an error


def test_pefts_insides_are_known_in_one_room() -> None:
    insides = ('peft.tuners', 'peft.utils')
    wrong = [
        f'{name_of(path)}: {module}'
        for path in SOURCES
        if 'peft_layers' not in path.parts
        for module, _ in imported(parsed(path))
        if module.startswith(insides)
    ]
    assert wrong == []


def test_no_test_module_imports_from_another() -> None:
    for path in (ROOT / 'tests').glob('*.py'):
        modules = [
            f'{module}.{name}' for module, names in imported(parsed(path)) for name in names or ['']
        ]
        assert not [m for m in modules if m.startswith('tests.test_')], path.name


def test_lint_looks_at_every_source_and_at_nobody_elses() -> None:
    said = subprocess.run(['make', '-n', 'lint'], cwd=ROOT, capture_output=True, text=True).stdout
    commands = [line.split() for line in said.splitlines() if ' -m ruff ' in line]
    assert len(commands) == 2
    tests = set((ROOT / 'tests').rglob('*.py'))
    for command in commands:
        checked = {ROOT / word for word in command if (ROOT / word).exists()}
        assert ROOT not in checked
        for path in tests.union(SOURCES, [ROOT / 'setup.py']):
            assert checked & {path, *path.parents}, path


def test_the_architecture_page_names_files_that_exist() -> None:
    page = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    named = {
        word for word in page.split('`')[1::2] if word.endswith(('.py', '/')) and ' ' not in word
    }
    assert len(named) > 10
    assert [
        name
        for name in sorted(named)
        if not ((ROOT / name).exists() or (ROOT / PACKAGE / name).exists())
    ] == []


def test_planted_mistakes_are_still_about_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from mutate import misplaced
    from mutations import MUTATIONS

    assert len(MUTATIONS) >= 40
    assert [message for m in MUTATIONS if (message := misplaced(m, ROOT))] == []
    tests = {test for mutation in MUTATIONS for test in mutation.tests}
    assert [test for test in sorted(tests) if not (ROOT / test).is_file()] == []
