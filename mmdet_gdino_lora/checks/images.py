"""Looks at every image of a data set before a run: its header and its end, not its pixels.

What OpenCV can't decode would end the run minutes or hours later; what it decodes otherwise than
meant (16 bit, an orientation in EXIF) would be trained on in silence. Only a file whose end is not
that of a whole image is decoded here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

import cv2
import numpy as np
from PIL import Image

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share

#: Files looked at at once: opening them on a network's disk is waiting.
_THREADS = 8
#: Pixels by which the file and the image may differ in width or height.
_SLACK = 2
#: Path, the size that is listed, and the size when loaded.
_Size = tuple[str, tuple[int, int], tuple[int, int]]
_ORIENTATION = 0x0112
#: EXIF orientations that turn width into height.
_TURNED = (5, 6, 7, 8)


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
    """

    path: str
    broken: str = ''
    cut_short: bool = False
    size: Optional[tuple[int, int]] = None
    turned: bool = False
    sixteen_bits: bool = False


def check_images(
    where: str, folder: str, images: Sequence[Mapping[str, Any]], tolerant: bool = False
) -> list[Finding]:
    """Finds images that are missing, can't be read whole, or are of another size than listed.

    Args:
        where: The annotation file's key and path, as sentences begin.
        folder: Where the images are.
        images: The file's entries of those that will be read.
        tolerant: Whether the pipeline passes over images that can't be read.

    Returns:
        Findings. Fatal are files that OpenCV can't read (unless the pipeline is tolerant), and
        sizes that are wrong for half of the images or more.
    """
    paths = [os.path.join(folder, image['file_name']) for image in images]
    with _quiet(), ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(look, paths))
    return [
        *_unusable(where, seen, tolerant),
        *_sixteen_bits(where, seen),
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
    return Seen(
        path,
        size=image.size,
        turned=image.format == 'JPEG' and image.getexif().get(_ORIENTATION) in _TURNED,
        sixteen_bits=head[24] == 16 if is_png else image.mode.startswith('I;16'),
    )


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
        )
    cut = [image for image in seen if image.cut_short]
    if cut:
        yield Finding(
            f'{where}: {share(len(cut), len(seen), "images")} end early, and OpenCV fills in what '
            f'is missing; fetch them anew; first: {cut[0].path}'
        )


def _sixteen_bits(where: str, seen: Sequence[Seen]) -> Iterator[Finding]:
    deep = [image for image in seen if image.sixteen_bits]
    if deep:
        yield Finding(
            f'{where}: {share(len(deep), len(seen), "images")} have 16 bits per channel, and the '
            'loader keeps the upper 8, so that images of 12 bits come out nearly black; convert '
            f'them to 8 bits over the range that they use; first: {deep[0].path}'
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
        )
    if swapped:
        yield Finding(
            f'{where}: {share(len(swapped), len(seen), "images")} have width and height exchanged '
            'in the file, by which mmdet drops boxes outside; exchange them in the file; '
            f'{_first(*swapped[0])}',
            fatal=len(swapped) >= half,
        )
    if other:
        yield Finding(
            f'{where}: {share(len(other), len(seen), "images")} have another size than the file '
            'says, so boxes do not lie where the objects are, or are dropped as outside; use the '
            f'images that were annotated, or correct the sizes; {_first(*other[0])}',
            fatal=len(other) >= half,
        )


def _first(path: str, listed: Sequence[float], loaded: Sequence[float]) -> str:
    return (
        f'first: {path}, {listed[0]} x {listed[1]} in the file, {loaded[0]} x {loaded[1]} when '
        'loaded'
    )


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= _SLACK for a, b in zip(one, other))
