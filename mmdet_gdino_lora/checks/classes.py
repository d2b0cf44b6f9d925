"""Holds a data set's class names against the categories of its annotation file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmdet_gdino_lora.checks.coco_file import CocoFile
from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share, some


def check_classes(key: str, classes: Sequence[str], coco: CocoFile, trains: bool) -> list[Finding]:
    """Finds class names that the file lacks or has in another order, and names that come twice.

    mmdet drops boxes of unknown names, and numbers the rest in the file's order.

    Args:
        key: Where the data set stands in the config.
        classes: Names that the data set will use.
        coco: Its annotation file.
        trains: Whether it is trained from.

    Returns:
        Findings; a category that is left out of the config is the only one that isn't fatal.
    """
    return (
        _no_names(key, classes)
        or _missing(key, classes, coco)
        or _twice(key, classes, coco)
        or _disordered(key, classes, coco)
        or (_left_out(key, classes, coco) if trains else [])
    )


def check_boxed(key: str, classes: Sequence[str], coco: CocoFile, trains: bool) -> list[Finding]:
    """Finds classes that no box of the file has.

    Args:
        key: Where the data set stands in the config.
        classes: Names that the data set will use.
        coco: Its annotation file.
        trains: Whether it is trained from.

    Returns:
        One finding or none.
    """
    names = {category['id']: category['name'] for category in coco.categories}
    boxed = {names.get(annotation['category_id']) for annotation in coco.annotations}
    without = [name for name in classes if name not in boxed]
    if not without or len(without) == len(classes):  # of a file without boxes more is told
        return []
    fate = (
        'captions of training name them as what is not there, so that the model unlearns them; '
        'label some, or leave them out of metainfo.classes unless that is meant'
        if trains
        else 'no AP is measured of them; label some, to know what became of them'
    )
    which = f'{len(without)} of {len(classes)} classes ({some(without)})'
    return [
        Finding(
            f'{key}.metainfo.classes: {which} have no box in {coco.path}, and {fate}',
            cases=tuple(without),
        )
    ]


def _no_names(key: str, classes: Sequence[str]) -> list[Finding]:
    wrong = [name for name in classes if not isinstance(name, str)]
    if wrong:
        return [
            Finding(
                f'{key}.metainfo.classes holds {some(wrong)} where names are wanted, of which the '
                'caption is made; write every class name in quotes',
                fatal=True,
            )
        ]
    if not classes:
        return [
            Finding(
                f'{key}.metainfo.classes is empty, so there is nothing to detect; name the classes '
                'of the annotation file',
                fatal=True,
            )
        ]
    return []


def _missing(key: str, classes: Sequence[str], coco: CocoFile) -> list[Finding]:
    found = coco.names
    missing = sorted(set(classes) - set(found), key=list(classes).index)
    if not missing:
        return []
    total = len(set(classes))
    which = 'none' if len(missing) == total else f'{len(missing)} of {total} not'
    return [
        Finding(
            f'{key}.metainfo.classes: {which} among the categories of {coco.path} ({some(missing)} '
            f'{"is" if len(missing) == 1 else "are"} missing), so their boxes would be dropped; '
            f'set metainfo=dict(classes=...) to names of the file, which has {some(found, 20)}',
            fatal=True,
        )
    ]


def _twice(key: str, classes: Sequence[str], coco: CocoFile) -> list[Finding]:
    names = _repeated(classes)
    if names:
        return [
            Finding(
                f'{key}.metainfo.classes names {some(names)} twice, and mmdet counts each category '
                'of the file once, so the labels behind it would get other names; name each class '
                'once',
                fatal=True,
            )
        ]
    wanted = [category for category in coco.categories if category['name'] in set(classes)]
    names = _repeated([category['name'] for category in wanted])
    if names:
        return [
            Finding(
                f'{coco.where}: {some(names)} stands twice among the categories, and mmdet numbers '
                "labels by the file's categories, so boxes would get other names; join their "
                'annotations under one category',
                fatal=True,
            )
        ]
    ids = _repeated([category['id'] for category in wanted])
    if ids:
        return [
            Finding(
                f'{coco.where}: several categories have the id {some(ids)}, so boxes of one would '
                'get the name of another; renumber the categories, and their annotations with them',
                fatal=True,
            )
        ]
    return []


def _repeated(values: Sequence[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _disordered(key: str, classes: Sequence[str], coco: CocoFile) -> list[Finding]:
    in_file_order = [name for name in coco.names if name in set(classes)]
    if in_file_order == list(classes):
        return []
    names = tuple(in_file_order)
    shown = repr(names) if len(names) <= 20 else f'<the {len(names)} names in that order>'
    return [
        Finding(
            f'{key}.metainfo.classes: the names stand in another order than the categories of '
            f"{coco.path}, and mmdet numbers labels in the file's order, so boxes would get other "
            f'names; set metainfo=dict(classes={shown})',
            fatal=True,
        )
    ]


def _left_out(key: str, classes: Sequence[str], coco: CocoFile) -> list[Finding]:
    names = {c['id']: c['name'] for c in coco.categories if c['name'] not in set(classes)}
    counts = Counter(names[a['category_id']] for a in coco.annotations if a['category_id'] in names)
    if not counts:
        return []
    return [
        Finding(
            f'{key}.metainfo.classes leaves out {len(counts)} of the {len(coco.categories)} '
            f'categories of {coco.path} ({some(list(counts))}), so '
            f'{share(sum(counts.values()), len(coco.annotations), "boxes")} are trained as '
            'background; name these classes as well, if they are to be detected'
        )
    ]
