"""A mistake as a person makes it: what is typed, with which config, and what is told."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from mmengine.logging import MMLogger

from tests.tool_run import Things, run_tool

_NUMBER = itertools.count()


class Mistake(NamedTuple):
    """One row of a table.

    Attributes:
        what: The mistake in words.
        command: What is typed; CONFIG is ``things``' config with the row's changes, CHECKPOINT its
            checkpoint, ADAPTER the folder beside that, BASE its base, NEW a folder of the test's.
        told: Regular expression of the sentence.
        config: Code at the end of the config.
        stops: Whether the tool ends with it; else it is a warning, and the run goes on.
    """

    what: str
    command: str
    told: str
    config: str = ''
    stops: bool = True


class Told(NamedTuple):
    """What a tool said.

    Attributes:
        status: It ended with.
        error: On stderr.
        warnings: In the log.
    """

    status: int
    error: str
    warnings: list[str]


def make(mistake: Mistake, things: Things, new: Path, capsys: pytest.CaptureFixture) -> Told:
    """Makes a mistake.

    Args:
        mistake: Of a table.
        things: A run that ended well, whose data and checkpoint are used.
        new: The test's own folder.
        capsys: pytest's.

    Returns:
        What was told.
    """
    config = new / 'mistake.py'
    config.write_text(f"_base_ = '{things.folder}/my_things.py'\n{mistake.config}\n")
    adapter = str(things.checkpoint).replace('.pth', '_adapter')
    command = mistake.command
    names = dict(
        CONFIG=config, CHECKPOINT=things.checkpoint, ADAPTER=adapter, BASE=things.base, NEW=new
    )
    for name, path in names.items():
        command = command.replace(name, str(path))
    capsys.readouterr()
    status = 0
    with warnings_of_the_log() as warnings:
        try:
            run_tool(command, things.folder)
        except SystemExit as end:
            status = end.code
    return Told(status, capsys.readouterr().err, warnings)


@contextmanager
def warnings_of_the_log() -> Iterator[list[str]]:
    """Collects what mmengine's logs are warned of; they are not in Python's tree of loggers."""
    found: list[str] = []
    write = MMLogger.callHandlers

    def collecting(logger: MMLogger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            found.append(record.getMessage())
        write(logger, record)

    # A new one writes to the stdout of now; the last run's may be closed.
    MMLogger.get_instance(f'mistake_{next(_NUMBER)}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMLogger, 'callHandlers', collecting)
        yield found


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder: size and time of every file, by path."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if '__pycache__' not in path.parts:
            stat = path.lstat()
            size_and_time = (stat.st_size, stat.st_mtime_ns) if path.is_file() else (0, 0)
            found[str(path.relative_to(folder))] = size_and_time
    return found
