"""Says what will go wrong with a config's data, before anything is trained.

check_dataset.py CONFIG [--all] [--missing-labels [CHECKPOINT]]

Looks at annotation files, class names and every image of the data that a config trains from and
measures on. Ends with status 1 where a run would stop, or learn something else than was meant.
Labels that are missing take a model to guess at: the base, or what an earlier run has tuned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import add_cfg_options, read_arguments, read_config
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmdet_gdino_lora.checks.findings import Finding
    from mmdet_gdino_lora.engine.survey import Surveyed
    from mmdet_gdino_lora.labelling.detections import Found
    from mmdet_gdino_lora.labelling.missing import Counted

#: Cases of a finding that are listed without --all.
_SHOWN = 5
#: Photos of a data set in which missing labels are looked for, and the score from which on
#: detections are counted.
_PHOTOS, _LOWEST = 200, 0.05


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.

    Raises:
        SystemExit: With 1, where an error was found.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet_gdino_lora.engine.survey import survey

    cfg = read_config(args.config, args.cfg_options)
    # What can't be loaded is told before every image was looked at.
    loaded = None if args.missing_labels is None else _load(cfg, args.missing_labels, args.device)
    sets = survey(cfg)
    print_sets(sets)
    print_classes(sets)
    if loaded is not None:
        add_missing_labels(sets, cfg, *loaded, args.missing_labels)
    errors, warnings = print_findings(sets, None if args.all else _SHOWN)
    if errors or (warnings and args.strict):
        sys.exit(1)


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        description="Say what will go wrong with a config's data; status 1 where a run would stop"
    )
    arguments.add_argument('config', help='config file, or the name of one of ours')
    arguments.add_argument('--all', action='store_true', help='list every case of what is found')
    arguments.add_argument(
        '--strict', action='store_true', help='status 1 where there is a warning, too'
    )
    arguments.add_argument(
        '--missing-labels',
        nargs='?',
        const='',
        metavar='CHECKPOINT',
        help='guess at labels that are missing, on 200 photos, by what the base detects (adapters '
        'off), or by what a checkpoint or an adapter does',
    )
    arguments.add_argument('--device', help='of --missing-labels; default: cuda where there is one')
    add_cfg_options(arguments)
    return arguments


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


def _load(cfg: Config, checkpoint: str, device: Optional[str]) -> tuple[Any, Any]:
    """The detector that is asked, and what its config makes of a photo."""
    from mmdet_gdino_lora.commands.image_demo import load

    if not cfg.get('test_dataloader'):
        raise ConfigError(
            '--missing-labels: the config has no test_dataloader, which says how a photo is read '
            'to detect in it; add one, as the shipped configs have it'
        )
    return load(cfg, checkpoint or None, device)


def add_missing_labels(
    sets: Sequence[Surveyed], cfg: Config, detector: Any, pipeline: Any, checkpoint: str
) -> None:
    """Guesses at labels that are missing in what is trained from, and prints what was counted.

    Args:
        sets: See :func:`~mmdet_gdino_lora.engine.survey.survey`; findings are added to them.
        cfg: The config.
        detector: In eval mode.
        pipeline: Its config's, for one image.
        checkpoint: What the detector was loaded from; empty for the base.
    """
    from mmdet_gdino_lora.labelling.missing import count_beside, findings_of, sample_of

    who = checkpoint or 'the base (adapters off)'
    for one in sets:
        looked = one.looked
        if looked is None or not looked.trains or looked.folder is None:
            continue
        if any(finding.fatal for finding in one.findings):
            one.notes.append(f'{one.key}: missing labels are looked for when its errors are mended')
            continue
        images = sample_of(looked.images, _PHOTOS)
        files = [image['file_name'] for image in images]
        found = _detect(cfg, detector, pipeline, looked.folder, files, looked.names)
        counted = count_beside(looked.coco, images, found, looked.names)
        print(f'\nmissing labels, a guess of {who} on {len(images)} of {len(looked.images)} photos')
        _print_guess(counted)
        one.findings += findings_of(looked.coco.where, looked.folder, counted, len(images), who)


def _detect(
    cfg: Config,
    detector: Any,
    pipeline: Any,
    folder: str,
    files: Sequence[str],
    names: Sequence[str],
) -> dict[str, Found]:
    from tqdm import tqdm

    from mmdet_gdino_lora.labelling.going import detected
    from mmdet_gdino_lora.labelling.photos import photos_of

    photos, loader = photos_of(folder, files), cfg.test_dataloader
    size, workers = loader.get('batch_size', 1), loader.get('num_workers', 0)
    batches = [photos[begin : begin + size] for begin in range(0, len(photos), size)]
    found: dict[str, Found] = {}
    with tqdm(total=len(photos), unit='photo', desc='detecting') as bar:
        parts = detected(detector, pipeline, folder, batches, names, workers, _LOWEST)
        for batch, part in zip(batches, parts):
            found.update(zip((photo.name for photo in batch), part))
            bar.update(len(batch))
    return found


def _print_guess(counted: Sequence[Counted]) -> None:
    """Prints a row for each class; nothing is said of those that the detector doesn't know well."""
    rows: list[list[Any]] = [
        ['class', 'labels', 'found again', 'from score', 'on labels', 'on none', 'missing']
    ]
    for one in counted:
        score, odds = one.surest, one.missing()
        row: list[Any] = [one.name, one.labels, len(one.on_labels)]
        if score is None or odds is None:
            rows.append([*row, '-', '-', '-', 'not known'])
        else:
            free = len(one.beside(score))
            missing = 'too few to tell' if free else 'none seen'
            if one.is_told():
                missing = f'some {odds * one.labels:.0f}'
            rows.append([*row, f'{score:.2f}', one.among(score), free, missing])
    _print_table(rows)


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
