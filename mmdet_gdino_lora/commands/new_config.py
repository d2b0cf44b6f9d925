"""Writes a config for a folder of labelled photos, and their labels as COCO beside it.

new_config.py PHOTOS [--val PHOTOS] [--names RBC="red blood cell" ...] [-o my_things.py]

Reads COCO json (Roboflow's too), Pascal VOC, YOLO and ODVG. Where nobody split them, a fifth of the
photos is taken off to measure on. Nothing is written into the folder of the photos.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from gdino_lora import typed
from mmdet_gdino_lora.commands.common import (
    add_overwrite,
    config_file,
    read_arguments,
    read_config,
    refuse_overwriting,
)
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import config_path

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmdet_gdino_lora.formats.config import Plan
    from mmdet_gdino_lora.formats.photos import Labelled, Photo

_DRAWN = 'gdino_lora_shapes'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet_gdino_lora.commands.check_dataset import print_findings
    from mmdet_gdino_lora.engine.atomic import write_whole
    from mmdet_gdino_lora.engine.survey import survey
    from mmdet_gdino_lora.formats.config import config_text, need_words
    from mmdet_gdino_lora.formats.recognise import read_photos

    out = _place(args.out, [args.photos, *([args.val] if args.val else [])])
    labelled = read_photos(args.photos, args.format)
    measured = read_photos(args.val, args.format) if args.val else None
    splits, seen = _splits(labelled, measured, args.seed)
    files = {name: out.with_suffix('') / f'{name}.json' for name in splits}
    refuse_overwriting('-o', [str(out), *map(str, files.values())], args.overwrite)
    names, unused = _names(splits)
    prompts = need_words(names, args.names)
    plan, reason = _plan(args, splits, out, names, prompts)

    _write(splits, files)
    write_whole(str(out), config_text(plan))
    _report(splits, seen, names, unused, prompts)
    print(f'\nwritten: {args.out}, and the labels as COCO in {out.with_suffix("")}{os.sep}\n')
    if reason:
        print(
            f'{reason}, so this config stands on the small base of drawn shapes that comes with '
            'this package: good to try things out, and far from what a published base reaches; '
            'where you have a copy of that base, name it with --base FILE\n'
        )
    print(f'checked, as {typed("check-dataset")} {args.out} does:')
    print_findings(survey(read_config(str(out))), shown=1)
    _next(args.out, plan)


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        description='Write a config for a folder of labelled photos: COCO json (Roboflow too), '
        'Pascal VOC, YOLO or ODVG'
    )
    arguments.add_argument('photos', metavar='PHOTOS', help='folder of the photos and their labels')
    arguments.add_argument(
        '--val',
        metavar='PHOTOS',
        help='folder to measure on; default: what PHOTOS calls val, or else a fifth of it',
    )
    arguments.add_argument(
        '--names',
        nargs='+',
        default=[],
        metavar='CLASS=WORDS',
        help='what the model reads where a class name is a code: RBC="red blood cell"',
    )
    arguments.add_argument(
        '-o', '--out', default='my_things.py', help='config to write; default: my_things.py'
    )
    arguments.add_argument(
        '--format', choices=['coco', 'voc', 'yolo', 'odvg'], help='where PHOTOS has several'
    )
    arguments.add_argument(
        '--base',
        default='auto',
        metavar='published|shapes|FILE',
        help='what the adapters stand on: MM Grounding DINO, the small base of drawn shapes that '
        'comes with this package, or a downloaded copy of the former; default: published where it '
        'can be had',
    )
    arguments.add_argument('--seed', type=int, default=0, help='of what is taken off to measure on')
    add_overwrite(arguments)
    return arguments


def _place(out: str, folders: Sequence[str]) -> Path:
    """Where the config goes, which is no place among the photos."""
    path = Path(out).absolute()
    if path.suffix != '.py':
        raise ConfigError(f'-o {out!r}: a config is a .py file; name my_things.py, say')
    if not path.parent.is_dir():
        raise ConfigError(f'-o {out!r}: no folder {str(path.parent)!r}; make it, or name another')
    for folder in folders:
        if Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents:
            raise ConfigError(
                f'-o {out!r} lies in the folder of the photos, {folder!r}, where nothing is '
                'written; name a place outside of it'
            )
    return path


#: By split: whose photos they are, and which.
_Splits = dict[str, tuple['Labelled', list['Photo']]]


def _splits(
    labelled: Labelled, measured: Optional[Labelled], seed: int
) -> tuple[_Splits, list[str]]:
    """Who is trained from, who is measured on, and what is to be told of that."""
    from mmdet_gdino_lora.formats.photos import count_boxes
    from mmdet_gdino_lora.formats.split import take_off

    parts = {name: labelled.split(name) for name in ('train', 'val', 'test')}
    told = [*labelled.told]
    if not count_boxes(parts['train']):
        raise ConfigError(
            f'{str(labelled.root)!r} has no labelled photo to train from: all of them lie in '
            'folders or files that are called val or test; name the folder to train from'
        )
    result: _Splits = {}
    if measured is not None:
        told += measured.told
        if parts['val']:
            told.append(f'--val takes the place of the {len(parts["val"])} photos called val')
        result['val'] = (measured, measured.photos)
    elif parts['val']:
        result['val'] = (labelled, parts['val'])
    else:
        chosen = take_off(parts['train'], seed)
        if not chosen:
            raise ConfigError(
                f'{str(labelled.root)!r} has too few photos ({len(parts["train"])}) to take some '
                'off to measure on; add photos, or name a folder to measure on with --val'
            )
        taken = {photo.path for photo in chosen}
        parts['train'] = [photo for photo in parts['train'] if photo.path not in taken]
        result['val'] = (labelled, sorted(chosen, key=lambda photo: photo.path))
        told.append(f'the photos to measure on were taken off by chance (--seed {seed})')
    if parts['test']:
        result['test'] = (labelled, parts['test'])
    return {'train': (labelled, parts['train']), **result}, told


def _names(splits: _Splits) -> tuple[list[str], list[str]]:
    """Class names with a box anywhere, and those without."""
    from mmdet_gdino_lora.formats.photos import count_boxes

    named = [name for labelled, _ in splits.values() for name in labelled.names]
    boxed = {name for _, photos in splits.values() for name in count_boxes(photos)}
    ordered = list(dict.fromkeys(named))
    return [n for n in ordered if n in boxed], [n for n in ordered if n not in boxed]


def _write(splits: _Splits, files: Mapping[str, Path]) -> None:
    from mmdet_gdino_lora.engine.atomic import write_whole
    from mmdet_gdino_lora.formats.written import as_coco, categories_of

    labelled, _ = splits['train']
    names = list(dict.fromkeys(name for owner, _ in splits.values() for name in owner.names))
    categories = categories_of(names, labelled.ids)
    for name, (owner, photos) in splits.items():
        write_whole(str(files[name]), json.dumps(as_coco(owner, photos, categories)))


def _plan(
    args: argparse.Namespace,
    splits: _Splits,
    out: Path,
    names: Sequence[str],
    prompts: Mapping[str, str],
) -> tuple[Plan, str]:
    """What to write, and why the published base can't be had, where it can't."""
    from mmdet_gdino_lora.formats.config import FEW, Plan

    labelled, photos = splits['train']
    base = 'gdino_lora_few' if len(photos) <= FEW else 'gdino_lora_coco'
    cfg = config_file(config_path(base))
    checkpoint = None
    reason = _out_of_reach(cfg) if args.base == 'auto' else ''
    if reason or args.base == 'shapes':
        base = _DRAWN
    elif args.base not in ('auto', 'published'):
        if not os.path.isfile(args.base):
            raise ConfigError(
                f"--base {args.base!r}: neither 'published', 'shapes' nor a file that is there"
            )
        checkpoint = os.path.abspath(args.base)
    cfg = config_file(config_path(base))
    plan = Plan(
        base=base,
        made_from=f'Written by `{typed("new-config")}` for {labelled.root}, {labelled.format}.',
        photos={name: owner.root.as_posix() for name, (owner, _) in splits.items()},
        folder=out.stem,
        classes=names,
        prompts=prompts,
        samples=_too_many([prompts.get(name, name) for name in names], cfg),
        retained=_retained(cfg, [*names, *prompts.values()]),
        checkpoint=checkpoint,
        images=len(photos),
        measured=len(splits['val'][1]),
        many=len(names) > cfg.model.bbox_head.num_classes,
    )
    return plan, reason


def _out_of_reach(cfg: Config) -> str:
    """Why the published base can't be had here; empty where it can."""
    from mmdet_gdino_lora.files import download
    from mmdet_gdino_lora.text import files

    name, base = cfg.model.language_model.name, cfg.model.base_checkpoint
    if files.is_out_of_reach(name):
        return f'the text model {name!r} is not on this machine and the hub is out of reach'
    if download.is_url(base) and download.is_out_of_reach(base):
        return f'the published base {base} can not be reached from here'
    return ''


def _too_many(words: Sequence[str], cfg: Config) -> bool:
    """Whether the names don't fit into one caption; by their number where no text model is here."""
    from mmdet_gdino_lora.text import CaptionTokenizer
    from mmdet_gdino_lora.text.files import is_at_hand

    text = cfg.model.language_model
    if not is_at_hand(text.name):
        return len(words) > 80  # COCO's, in BERT's vocabulary, fit
    tokenizer = CaptionTokenizer(text.name, text.max_tokens)
    return bool(tokenizer.lengths(words).sum() > tokenizer.max_name_tokens)


def _retained(cfg: Config, names: Sequence[str]) -> Optional[list[str]]:
    """What the base must not forget, less the photos' own names; None where that is all of it."""
    from mmdet_gdino_lora.text.caption import clean_name

    wanted = list((cfg.model.get('retain') or {}).get('names', ()))
    own = {clean_name(name).strip().lower() for name in names}
    kept = [name for name in wanted if clean_name(name).strip().lower() not in own]
    return None if kept == wanted else kept


def _report(
    splits: _Splits,
    told: Sequence[str],
    names: Sequence[str],
    unused: Sequence[str],
    prompts: Mapping[str, str],
) -> None:
    """Prints what was read."""
    from mmdet_gdino_lora.checks.words import some
    from mmdet_gdino_lora.formats.names import is_code
    from mmdet_gdino_lora.formats.photos import count_boxes

    labelled, _ = splits['train']
    print(f'{labelled.root}: {labelled.format}')
    counts = {name: count_boxes(photos) for name, (_, photos) in splits.items()}
    width = max(map(len, [*names, 'without boxes']))
    rows: list[tuple[str, list[Any]]] = [
        ('', list(splits)),
        ('photos', [len(photos) for _, photos in splits.values()]),
        ('without boxes', [sum(not p.boxes for p in photos) for _, photos in splits.values()]),
        ('boxes', [sum(count.values()) for count in counts.values()]),
        *((f'  {name}', [count[name] for count in counts.values()]) for name in names),
    ]
    for name, values in rows:
        print(f'{name:{width + 2}} ' + ' '.join(f'{value:>8}' for value in values))
    for sentence in told:
        print(f'- {sentence}')
    if unused:
        print(
            f'- {len(unused)} classes without a box are left out: {some(unused)}; write them into '
            'classes to ask for them, too'
        )
    codes = [name for name in names if is_code(name) and name not in prompts]
    if codes:
        print(
            f'- {some(codes)} look like codes, and the model reads the names: say what they are '
            f'with --names {codes[0]}="..." (such as --names RBC="red blood cell")'
        )


def _next(out: str, plan: Plan) -> None:
    """Prints what to type."""
    print('\nnext:')
    print(f'  {typed("train")} {out}')
    if not plan.is_drawn:
        print('  (its first run downloads the base and the text model)')
    page = os.path.join('work_dirs', os.path.splitext(os.path.basename(out))[0], 'report.html')
    print(f'  (when it has ended, there is {page})')
