"""Which format a folder's labels have, and what they say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Optional

from mmdet_gdino_lora.checks.words import contents
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats import coco, odvg, voc, yolo
from mmdet_gdino_lora.formats.folder import Folder
from mmdet_gdino_lora.formats.photos import Labelled, count_boxes, some_of

#: By what ``--format`` calls them: ``find`` tells the files that hold labels, ``read`` reads them.
FORMATS: dict[str, ModuleType] = dict(coco=coco, voc=voc, yolo=yolo, odvg=odvg)


def read_photos(root: str, wanted: Optional[str] = None) -> Labelled:
    """Reads a folder of labelled photos.

    Args:
        root: Path of the folder.
        wanted: One of :data:`FORMATS`, where the folder has labels in several.

    Returns:
        Its photos.

    Raises:
        ConfigError: No such folder, no images, no labels, labels in two formats, or labels that
            can't be read.
    """
    folder = Folder(Path(root))
    found = {name: files for name, module in FORMATS.items() if (files := module.find(folder))}
    if wanted is not None:
        if wanted not in found:
            raise ConfigError(
                f'{root!r} has no labels in the format {wanted} that --format asks for'
                f'{_instead(list(found))}'
            )
        found = {wanted: found[wanted]}
    if not found:
        raise ConfigError(
            f'{root!r} holds {len(folder.images):,} images and no labels in a format that is known '
            f'here ({_inside(folder)}); export them as COCO json, Pascal VOC, YOLO or ODVG, and '
            'put them into that folder'
        )
    if len(found) > 1:
        (one, files), (other, others) = list(found.items())[:2]
        raise ConfigError(
            f'{root!r} has labels in {len(found)} formats, {FORMATS[one].NAME} '
            f'({some_of(files, folder.root)}) and {FORMATS[other].NAME} '
            f'({some_of(others, folder.root)}); name the one that is right, --format {one} or '
            f'--format {other}'
        )
    ((name, files),) = found.items()
    labelled = FORMATS[name].read(folder, files)
    if not count_boxes(labelled.photos):
        raise ConfigError(
            f'{root!r} holds {len(folder.images):,} images and not one labelled box in its '
            f'{labelled.format} files ({some_of(files, folder.root)}); export the labels with '
            'their boxes'
        )
    known = {photo.path for photo in labelled.photos}
    unlabelled = [path for path in folder.images if path not in known]
    if unlabelled:
        empty = ' (an empty txt says that a photo shows none of the things)' * (name == 'yolo')
        labelled.told.append(
            f'{len(unlabelled):,} photos have no labels and are left out{empty}: '
            f'{some_of(unlabelled, folder.root)}'
        )
    return labelled


def _instead(found: list[str]) -> str:
    if not found:
        return ', nor in another that is known here'
    return f'; it has {" and ".join(found)}'


def _inside(folder: Folder) -> str:
    """What lies where most labels would: beside the first image."""
    return f'beside the first image lie {contents(str(folder.images[0].parent))}'
