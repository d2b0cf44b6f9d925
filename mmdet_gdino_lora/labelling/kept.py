"""What was detected so far, kept beside the output: a run that is killed goes on from there.

One line of JSON for the settings, and one for each batch, written at once and only ever added. A
batch stands there whole or not at all: what a detector finds in a photo depends, in the last
digits, on the photos beside it, so that a batch is gone through again as it was or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.engine.atomic import write_whole
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.labelling.detections import Found
from mmdet_gdino_lora.labelling.photos import Photo


class Kept:
    """The file of what was detected so far.

    Args:
        path: Of the file; it is begun where there is none.
        settings: What the detections depend on, by what a person calls it.
        thresholds: As they were typed, on which the detections don't depend.
        overwrite: Whether a file of other settings is begun anew.

    Attributes:
        path: Of the file.
        known: How many batches were in it.
        thresholds: With which it was begun.

    Raises:
        ConfigError: The file is of other settings, and nobody asked to overwrite it.
    """

    def __init__(
        self,
        path: str,
        settings: Mapping[str, Any],
        thresholds: Sequence[str],
        overwrite: bool,
    ) -> None:
        self.path, self.thresholds = path, list(thresholds)
        self._batches: dict[str, list[Found]] = {}
        before = self._read()
        different = [] if before is None else _differing(before, settings)
        if different and not overwrite:
            raise ConfigError(
                f'{path} holds what an earlier start of this command detected, with other settings '
                f'(it differs in {some(different)}); give the same to go on from it, begin anew '
                'with --overwrite, or name another OUT'
            )
        self.known = 0 if different else len(self._batches)
        if before is None or different:
            self._batches.clear()
            self.thresholds = list(thresholds)
            write_whole(
                path, json.dumps(dict(settings=settings, thresholds=self.thresholds)) + '\n'
            )

    def of(self, batch: Sequence[Photo]) -> Optional[list[Found]]:
        """What was found in a batch's photos; None where that isn't known.

        Args:
            batch: The same photos in the same order, none of them changed since.
        """
        return self._batches.get(_key(batch))

    def add(self, batch: Sequence[Photo], found: list[Found]) -> None:
        """Keeps what was found in a batch.

        Args:
            batch: Photos.
            found: In each.
        """
        line = dict(photos=_key(batch), found=[one.as_json() for one in found])
        with open(self.path, 'ab') as file:
            file.write(json.dumps(line).encode() + b'\n')
            file.flush()
            os.fsync(file.fileno())
        self._batches[_key(batch)] = found

    def remove(self) -> None:
        """Removes the file: the output is written."""
        os.remove(self.path)

    def _read(self) -> Optional[dict[str, Any]]:
        """Reads the file and cuts off a last line that isn't whole; returns its settings."""
        if not os.path.isfile(self.path):
            return None
        with open(self.path, 'rb+') as file:
            content = file.read()
            whole = content.rfind(b'\n') + 1
            file.truncate(whole)
        first, *lines = content[:whole].split(b'\n')
        for line in lines:
            try:
                batch = json.loads(line)
                self._batches[batch['photos']] = [Found(**found) for found in batch['found']]
            except (ValueError, KeyError, TypeError):
                continue  # not whole: the disk lost it, and its photos are gone through again
        try:
            head = json.loads(first)
            self.thresholds = head['thresholds']
            return dict(head['settings'])
        except (ValueError, KeyError, TypeError):
            return None


def fingerprint(checkpoint: str) -> str:
    """What a checkpoint is known by.

    Args:
        checkpoint: File, or folder of an adapter.

    Returns:
        SHA-256 of it, or of the folder's files.
    """
    inside = sorted(os.listdir(checkpoint)) if os.path.isdir(checkpoint) else ['']
    result = hashlib.sha256()
    for name in inside:
        path = os.path.join(checkpoint, name) if name else checkpoint
        if os.path.isfile(path):
            with open(path, 'rb') as file:
                while block := file.read(1 << 20):
                    result.update(block)
    return result.hexdigest()


def digest(*parts: Any) -> str:
    """What parts of a config are known by.

    Args:
        *parts: Of it.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _key(batch: Sequence[Photo]) -> str:
    return json.dumps([[photo.name, photo.size, photo.changed] for photo in batch])


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    now = json.loads(json.dumps(now))
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]
