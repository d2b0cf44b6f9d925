"""Says what will go wrong with a config's data, before anything is trained.

check_dataset.py CONFIG [--all]

Looks at annotation files, class names and every image of the data that a config trains from and
measures on. Ends with status 1 where a run would stop, or learn something else than was meant.
Labels that are missing it can't see: for that it takes a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import add_cfg_options, read_arguments, read_config

if TYPE_CHECKING:
    from mmdet_gdino_lora.checks.findings import Finding
    from mmdet_gdino_lora.engine.survey import Surveyed

#: Cases of a finding that are listed without --all.
_SHOWN = 5


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.

    Raises:
        SystemExit: With 1, where an error was found.
    """
    arguments = argparse.ArgumentParser(
        description="Say what will go wrong with a config's data; status 1 where a run would stop"
    )
    arguments.add_argument('config', help='config file, or the name of one of ours')
    arguments.add_argument('--all', action='store_true', help='list every case of what is found')
    arguments.add_argument(
        '--strict', action='store_true', help='status 1 where there is a warning, too'
    )
    add_cfg_options(arguments)
    args = read_arguments(arguments, argv)

    from mmdet_gdino_lora.engine.survey import survey

    cfg = read_config(args.config, args.cfg_options)
    sets = survey(cfg)
    print_sets(sets)
    print_classes(sets)
    errors, warnings = print_findings(sets, None if args.all else _SHOWN)
    if errors or (warnings and args.strict):
        sys.exit(1)


def print_sets(sets: Sequence[Surveyed]) -> None:
    """Prints a row for each data set.

    Args:
        sets: See :func:`~mmdet_gdino_lora.engine.survey.survey`.
    """
    rows: list[list[Any]] = [['', 'images', 'boxes', 'classes', 'errors', 'warnings']]
    for one in sets:
        sizes: list[Any] = ['-'] * 3
        if one.looked is not None:
            coco = one.looked.coco
            sizes = [len(coco.images), len(coco.annotations), len(one.looked.names)]
        errors = sum(finding.fatal for finding in one.findings)
        rows.append([one.key, *sizes, errors, len(one.findings) - errors])
    _print_table(rows)


def print_classes(sets: Sequence[Surveyed]) -> None:
    """Prints a row for each class: its boxes in each data set, and its tokens.

    Args:
        sets: See :func:`~mmdet_gdino_lora.engine.survey.survey`.
    """
    from mmdet_gdino_lora.engine.survey import tokens_of

    looked = [one for one in sets if one.looked is not None]
    if not looked:
        return
    counts = [one.boxes for one in looked]
    names = list(dict.fromkeys(name for one in looked for name in one.looked.names))  # type: ignore[union-attr]  # as above
    tokens: dict[str, int] = {}
    said = 'the text model is not on this machine, so that tokens are not counted'
    for one in looked:
        counted = tokens_of(one.looked)  # type: ignore[arg-type]  # as above
        if counted is not None:
            lengths, most = counted
            tokens.update(zip(one.looked.names, lengths.tolist()))  # type: ignore[union-attr]
            said = f'a caption of all names: {int(lengths.sum()) + 2} tokens of {most}'
    heads = [one.key.partition('_')[0] for one in looked]
    rows: list[list[Any]] = [['class', *heads, 'tokens']]
    rows += [[name, *(count[name] for count in counts), tokens.get(name, '-')] for name in names]
    print()
    _print_table(rows)
    print(said)


def print_findings(sets: Sequence[Surveyed], shown: Optional[int]) -> tuple[int, int]:
    """Prints what was found, errors first.

    Args:
        sets: See :func:`~mmdet_gdino_lora.engine.survey.survey`.
        shown: Cases of each finding that are listed; None for all.

    Returns:
        Number of errors and of warnings.
    """
    found = list(dict.fromkeys(finding for one in sets for finding in one.findings))
    errors = [finding for finding in found if finding.fatal]
    warnings = [finding for finding in found if not finding.fatal]
    for word, kind in dict(error=errors, warning=warnings).items():
        for finding in kind:
            print(f'\n{word}: {finding.sentence}')
            _print_cases(finding, shown)
    for note in dict.fromkeys(note for one in sets for note in one.notes):
        print(f'\nnote: {note}')
    if errors:
        means = 'a run would stop, or learn something else than was meant'
    else:
        means = 'a run can begin'
    counts = [_counted(len(errors), 'error'), _counted(len(warnings), 'warning')]
    print(f'\n{", ".join(counts)}: {means}')
    return len(errors), len(warnings)


def _counted(count: int, what: str) -> str:
    return f'{count} {what}' + 's' * (count != 1)


def _print_cases(finding: Finding, shown: Optional[int]) -> None:
    """Prints the cases behind the first, which the sentence names."""
    rest = finding.cases[1:]
    for case in rest if shown is None else rest[: shown - 1]:
        print(f'    {case}')
    if shown is not None and len(rest) >= shown:
        print(f'    and {len(rest) - shown + 1} more (--all)')


def _print_table(rows: Sequence[Sequence[Any]]) -> None:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for first, *others in texts:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print('  '.join([first.ljust(widths[0]), *cells]))
