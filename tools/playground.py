"""Serves a page to try a tuned detector on: `gdino-lora playground` of this checkout."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gdino_lora import run_command

if __name__ == '__main__':
    run_command('playground')
