"""Looks at every image of a data set before a run: its header and its end, not its pixels.

What OpenCV can't decode would end the run minutes or hours later; what it decodes otherwise than
meant (16 bit, an orientation in EXIF) would be trained on in silence. Only a file whose end is not
that of a whole image is decoded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Optional

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share

#: Files looked at at once: opening them on a network's disk is waiting.
_THREADS = 8
#: Pixels by which the file and the image may differ in width or height.
_SLACK = 2
#: Path, the size that is listed, and the size when loaded.
_Size = tuple[str, tuple[int, int], tuple[int, int]]
#: How the names of image files end, whatever their case.
ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
_ORIENTATION = 0x0112
#: EXIF orientations that turn width into height.
_TURNED = (5, 6, 7, 8)
#: Those that don't.
_MOVED = (2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of an image file without its pixels.

    Attributes:
        path: Of the file.
        broken: Why no loader could read it; empty for one that can be read.
        cut_short: Whether the file ends early, though OpenCV decodes what is there.
        size: Width and height in the header; None where the header is unknown to Pillow.
        turned: Whether OpenCV exchanges width and height for EXIF's orientation.
        sixteen_bits: Whether it has 16 bits per channel.
        moved: Whether OpenCV mirrors it, or turns it upside down, for EXIF's orientation.
        cmyk: Whether its colours are those of print.
        clear: Whether it has transparent places.
    """

    path: str
    broken: str = ''
    cut_short: bool = False
    size: Optional[tuple[int, int]] = None
    turned: bool = False
    sixteen_bits: bool = False
    moved: bool = False
    cmyk: bool = False
    clear: bool = False


def check_images(
    where: str,
    folder: str,
    images: Sequence[Mapping[str, Any]],
    tolerant: bool = False,
    shown: bool = False,
) -> list[Finding]:
    """Finds images that are missing, can't be read whole, or are of another size than listed.

    Args:
        where: The annotation file's key and path, as sentences begin.
        folder: Where the images are.
        images: The file's entries of those that will be read.
        tolerant: Whether the pipeline passes over images that can't be read.
        shown: Whether a bar shows how far it is, where somebody sees it.

    Returns:
        Findings. Fatal are files that OpenCV can't read (unless the pipeline is tolerant), and
        sizes that are wrong for half of the images or more.
    """
    paths = [os.path.join(folder, image['file_name']) for image in images]
    with _quiet(), ThreadPoolExecutor(_THREADS) as pool:
        seen = list(
            tqdm(pool.map(look, paths), 'images', len(paths), disable=None if shown else True)
        )
    return [
        *_unusable(where, seen, tolerant),
        *_changed(where, seen),
        *_sizes(where, images, seen),
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the screen what Pillow and OpenCV say of odd metadata and damaged files."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def look(path: str) -> Seen:
    """Looks at an image file's header and end.

    Args:
        path: Of the file.

    Returns:
        What was seen.
    """
    try:
        with open(path, 'rb') as file:
            length = file.seek(0, os.SEEK_END)
            if not length:
                return Seen(path, 'is empty')
            file.seek(0)
            head = file.read(32)
            file.seek(max(0, length - 16))
            end = file.read()
            file.seek(0)
            try:
                with Image.open(file) as image:
                    seen = _header(path, image, head)
            except Exception:  # Pillow's decoders raise whatever a damaged file leads them to
                seen = None
    except FileNotFoundError:
        return Seen(path, 'is not there')
    except OSError as error:
        return Seen(path, f'can not be opened ({error.strerror})')
    if seen is not None and _is_whole(head, end, length):
        return seen
    return _decoded(path, head, seen)


def _header(path: str, image: Image.Image, head: bytes) -> Seen:
    is_png = head.startswith(b'\x89PNG')
    orientation = image.getexif().get(_ORIENTATION, 1)
    obeyed = orientation != 1 and _is_turned_by_opencv(image.format or '')
    return Seen(
        path,
        size=image.size,
        turned=obeyed and orientation in _TURNED and image.format != 'TIFF',  # Pillow turns these
        sixteen_bits=head[24] == 16 if is_png else image.mode.startswith('I;16'),
        moved=obeyed and orientation in _MOVED,
        cmyk=image.mode == 'CMYK',
        clear=_is_clear(image),
    )


def _is_clear(image: Image.Image) -> bool:
    """Whether a pixel is transparent: programs write alpha channels that say nothing, too."""
    if 'transparency' not in image.info and image.mode not in ('RGBA', 'LA', 'PA'):
        return False
    return bool(np.asarray(image.convert('RGBA'))[..., 3].min() < 255)


@cache
def _is_turned_by_opencv(kind: str) -> bool:
    """Whether OpenCV obeys the EXIF orientation of a format: of JPEG's always, else newer ones do.

    Args:
        kind: Pillow's name of it.
    """
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    file = io.BytesIO()
    try:
        Image.new('RGB', (2, 1)).save(file, kind, exif=exif)
        pixels = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, KeyError, ValueError, cv2.error):  # formats that one of the two can't write
        return False
    return pixels is not None and pixels.shape[:2] == (2, 1)


def _is_whole(head: bytes, end: bytes, length: int) -> bool:
    """Whether the file ends as its format does; a format without a mark at its end never does."""
    if head.startswith(b'\xff\xd8'):
        return end.endswith(b'\xff\xd9')
    if head.startswith(b'\x89PNG'):
        return end[-8:-4] == b'IEND'
    if head.startswith(b'RIFF'):
        return length >= 8 + int.from_bytes(head[4:8], 'little')
    if head.startswith(b'BM'):
        return length >= int.from_bytes(head[2:6], 'little')
    return False


def _decoded(path: str, head: bytes, seen: Optional[Seen]) -> Seen:
    try:
        pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    if pixels is None:
        start = head.lstrip().lower()
        is_page = start.startswith((b'<html', b'<!doctype'))
        return Seen(path, 'is a web page' if is_page else 'is damaged or no image')
    if seen is None:
        return Seen(path)
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:  # as above
        return dataclasses.replace(seen, cut_short=True)
    return seen


def _unusable(where: str, seen: Sequence[Seen], tolerant: bool) -> Iterator[Finding]:
    broken = [image for image in seen if image.broken]
    if broken:
        fate = (
            'the pipeline (ignore_empty=True) passes over them'
            if tolerant
            else 'the run would stop at the first that it meets'
        )
        reasons = ', '.join(
            f'{sum(image.broken == reason for image in broken)} {reason}'
            for reason in dict.fromkeys(image.broken for image in broken)
        )
        yield Finding(
            f'{where}: {share(len(broken), len(seen), "images")} can not be read, and {fate} '
            f'({reasons.replace(" is ", " ")}); fetch them anew, correct data_prefix.img, or take '
            f'them out of the file; first: {broken[0].path}, which {broken[0].broken}',
            fatal=not tolerant or len(broken) == len(seen),
            cases=tuple(f'{image.path}, which {image.broken}' for image in broken),
        )
    cut = [image for image in seen if image.cut_short]
    if cut:
        yield Finding(
            f'{where}: {share(len(cut), len(seen), "images")} end early, and OpenCV fills in what '
            f'is missing; fetch them anew; first: {cut[0].path}',
            cases=tuple(image.path for image in cut),
        )


def _changed(where: str, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Images that the loader makes something else of, by what they are."""

    def finding(kind: str, problem: str) -> Iterator[Finding]:
        paths = tuple(image.path for image in seen if getattr(image, kind))
        if paths:
            count = share(len(paths), len(seen), 'images')
            yield Finding(f'{where}: {count} {problem}; first: {paths[0]}', cases=paths)

    yield from finding(
        'sixteen_bits',
        'have 16 bits per channel, and the loader keeps the upper 8, so that images of 12 bits '
        'come out nearly black; convert them to 8 bits over the range that they use',
    )
    yield from finding(
        'moved',
        'are mirrored or upside down until they are loaded (their EXIF orientation), and their '
        'boxes are right only if the label tool showed them as viewers do; look at some, or turn '
        'the pixels, drop the EXIF orientation and label those',
    )
    yield from finding(
        'cmyk',
        'are CMYK, and the loader makes RGB of them without their colour profile, so that colours '
        'differ from what a viewer shows; convert them to RGB',
    )
    yield from finding(
        'clear',
        'have transparent places, and the loader drops the transparency, so that the colours below '
        'it show, often black; put them on the ground that they are seen on',
    )


def _sizes(
    where: str, images: Sequence[Mapping[str, Any]], seen: Sequence[Seen]
) -> Iterator[Finding]:
    """Images that are loaded in another size than the file says, by kind."""
    turned: list[_Size] = []
    swapped: list[_Size] = []
    other: list[_Size] = []
    for image, got in zip(images, seen):
        if got.size is None:
            continue
        listed = (image['width'], image['height'])
        loaded = got.size[::-1] if got.turned else got.size
        if _alike(listed, loaded):
            continue
        kind = turned if got.turned and _alike(listed, got.size) else other
        kind = swapped if kind is other and _alike(listed[::-1], loaded) else kind
        kind.append((got.path, listed, loaded))
    half = len(seen) / 2
    if turned:
        yield Finding(
            f'{where}: {share(len(turned), len(seen), "images")} are turned by a quarter when they '
            'are loaded (their EXIF orientation), while width, height and so the boxes are those '
            'of the image before it is turned; turn the pixels and drop the EXIF orientation, or '
            f'annotate the images as they are shown; {_first(*turned[0])}',
            fatal=len(turned) >= half,
            cases=tuple(image[0] for image in turned),
        )
    if swapped:
        yield Finding(
            f'{where}: {share(len(swapped), len(seen), "images")} have width and height exchanged '
            'in the file, by which mmdet drops boxes outside; exchange them in the file; '
            f'{_first(*swapped[0])}',
            fatal=len(swapped) >= half,
            cases=tuple(image[0] for image in swapped),
        )
    if other:
        yield Finding(
            f'{where}: {share(len(other), len(seen), "images")} have another size than the file '
            'says, so boxes do not lie where the objects are, or are dropped as outside; use the '
            f'images that were annotated, or correct the sizes; {_first(*other[0])}',
            fatal=len(other) >= half,
            cases=tuple(image[0] for image in other),
        )


def _first(path: str, listed: Sequence[float], loaded: Sequence[float]) -> str:
    return (
        f'first: {path}, {listed[0]} x {listed[1]} in the file, {loaded[0]} x {loaded[1]} when '
        'loaded'
    )


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= _SLACK for a, b in zip(one, other))
