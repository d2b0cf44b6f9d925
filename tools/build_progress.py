"""Shows of a build's thousands of lines those that tell how far it is: read by install_mmcv.sh."""

from __future__ import annotations

import re
import sys
import time
from typing import Optional

_TOLD = re.compile(
    r'Building wheel for (?:onedl-)?mmcv|(?:Using cached|Processing) \S*mmcv\S*whl|'
    r'Saved \S*mmcv\S*whl|Successfully installed .*'
)
_COUNTER = re.compile(r'\[(\d+)/(\d+)\]')


class Progress:
    """Turns a build's lines into those worth showing.

    Args:
        now: Seconds on a clock, when the build begins.
    """

    def __init__(self, now: float) -> None:
        self._begin = now

    def shown(self, line: str, now: float) -> Optional[str]:
        """Says what to show of a line.

        Args:
            line: Of the build's output.
            now: Seconds on the same clock.

        Returns:
            What to show, or None. Ninja's ``[n/m]`` becomes the share done and the time left, as if
            what is left took as long by the piece as what is done.
        """
        counter = _COUNTER.match(line.strip())
        if counter:
            done, of = map(int, counter.groups())
            left = (now - self._begin) * (of - done) / max(done, 1)
            return f'compiling mmcv: {done} of {of}, {_in_words(left)} left'
        told = _TOLD.search(line)
        if told and told[0].startswith('Building'):
            self._begin = now
        return told[0] if told else None


def _in_words(seconds: float) -> str:
    if seconds < 60:
        return 'less than a minute'
    minutes = round(seconds / 60)
    return 'about 1 minute' if minutes == 1 else f'about {minutes} minutes'


def main() -> None:
    """Reads standard input to its end."""
    progress = Progress(time.monotonic())
    for line in sys.stdin:
        shown = progress.shown(line, time.monotonic())
        if shown:
            print(shown, flush=True)


if __name__ == '__main__':
    main()
