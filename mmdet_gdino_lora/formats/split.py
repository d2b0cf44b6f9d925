"""A validation set taken off by chance: by photo, with every class on both sides where possible."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from mmdet_gdino_lora.formats.photos import Photo

SHARE = 0.2


def take_off(photos: Sequence[Photo], seed: int, share: float = SHARE) -> list[Photo]:
    """Chooses photos to measure on; the others are trained from.

    Copies of one photo (the same bytes, or Roboflow's augmented ones) stay on one side. The same
    photos and seed give the same choice, in whatever order the disk lists them.

    Args:
        photos: All that there are.
        seed: Of chance.
        share: Of them to choose, about.

    Returns:
        The chosen. Each class of two photos or more has one among them and one among the others;
        none where every photo is the last of some class.
    """
    groups: dict[Hashable, list[Photo]] = defaultdict(list)
    for key, photo in zip(_keys(photos), photos):
        groups[key].append(photo)
    order = sorted(groups.values(), key=lambda group: str(group[0].path))
    random.Random(seed).shuffle(order)
    classes = [{box.name for photo in group for box in photo.boxes} for group in order]
    left = Counter(name for names in classes for name in names)
    wanted = max(1, round(share * len(photos)))
    chosen: list[int] = []
    covered: set[str] = set()

    def take(place: int) -> None:
        chosen.append(place)
        covered.update(classes[place])
        left.subtract(classes[place])

    def is_free(place: int) -> bool:
        return place not in chosen and all(left[name] > 1 for name in classes[place])

    for name, _ in sorted(left.items(), key=lambda item: (item[1], item[0])):  # the rarest first
        free = [p for p in range(len(order)) if name in classes[p] and is_free(p)]
        if name not in covered and free:
            take(free[0])
    for place in range(len(order)):
        taken = sum(len(order[p]) for p in chosen)
        if is_free(place) and taken + len(order[place]) <= wanted:
            take(place)
    return [photo for place in chosen for photo in order[place]]


def _keys(photos: Sequence[Photo]) -> list[Hashable]:
    """What copies of one photo have in common."""
    sizes = [photo.path.stat().st_size if photo.path.is_file() else -1 for photo in photos]
    shared = {size for size, count in Counter(sizes).items() if count > 1 and size > 0}
    result: list[Hashable] = []
    for photo, size in zip(photos, sizes):
        original, mark, _ = photo.path.name.partition('.rf.')  # IMG_1_jpg.rf.<hash>.jpg
        if mark:
            result.append((str(photo.path.parent), original))
        else:
            result.append(digest(photo.path) if size in shared else str(photo.path))
    return result


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
