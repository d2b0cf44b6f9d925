"""Images that are there twice: in what is trained from and in what is measured on, or in one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share

_THREADS = 8


def check_repeated(
    where: str, paths: Sequence[str], known: Mapping[str, str]
) -> tuple[list[Finding], dict[str, str]]:
    """Finds images to train from that are copies of another.

    Args:
        where: The annotation file's key and path, as sentences begin.
        paths: Of the images.
        known: See :func:`contents_of`.

    Returns:
        One finding or none, and the first path of each content.
    """
    first: dict[str, str] = {}
    again = []
    for path in dict.fromkeys(paths):
        if path in known and first.setdefault(known[path], path) != path:
            again.append(f'{path}, which is {first[known[path]]}')
    if not again:
        return [], first
    count = share(len(again), len(paths), 'images')
    told = Finding(
        f'{where}: {count} are copies of another (the same bytes), so that they weigh more, and '
        f'contradict each other where their boxes differ; take them out; first: {again[0]}',
        cases=tuple(again),
    )
    return [told], first


def check_shared(
    where: str, paths: Sequence[str], known: Mapping[str, str], trained: Mapping[str, str]
) -> list[Finding]:
    """Finds images to measure on that are trained from, too.

    Args:
        where: The annotation file's key and path, as sentences begin.
        paths: Of the images.
        known: See :func:`contents_of`.
        trained: The path of each content that is trained from.

    Returns:
        One finding or none.
    """
    both = [f'{path}, which is {trained[known[path]]}' for path in paths
            if known.get(path) in trained]  # fmt: skip
    if not both:
        return []
    return [
        Finding(
            f'{where}: {share(len(both), len(paths), "images")} are trained from, too (the same '
            'bytes), so that the metric says how well they are remembered; take them out of one of '
            f'the two; first: {both[0]}',
            cases=tuple(both),
        )
    ]


def contents_of(paths: Sequence[str]) -> dict[str, str]:
    """Tells contents apart.

    Args:
        paths: Of files, some of which may be missing.

    Returns:
        By path, for those that are there, a hash where other files have its size, else the size.
    """
    sizes = {path: os.stat(path).st_size for path in paths if os.path.isfile(path)}
    places: dict[str, list[str]] = defaultdict(list)
    for path in sizes:
        places[os.path.realpath(path)].append(path)
    alike = Counter(sizes[same[0]] for same in places.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [f'{sizes[s[0]]}' if alike[sizes[s[0]]] < 2 else '' for s in places.values()]
        hashes = pool.map(lambda pair: pair[1] or _hash(pair[0]), zip(places, names))
        return {p: content for same, content in zip(places.values(), hashes) for p in same}


def _hash(path: str) -> str:
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()
