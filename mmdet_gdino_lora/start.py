"""When the package's heavy part is imported: at once, or after a command line is understood."""

from __future__ import annotations

import importlib
import sys


def a_command_starts() -> bool:
    """Whether this process is `gdino-lora`, one of tools/ or `python -m mmdet_gdino_lora`.

    Those call :func:`load` when their arguments are read.
    """
    command = sys.modules.get('gdino_lora')
    if command is not None and command.starts:
        return True
    # Python's own mark of a `-m` whose module isn't found yet.
    return sys.argv[:1] == ['-m'] and 'mmdet_gdino_lora' in sys.orig_argv


def load() -> None:
    """Checks the environment, registers what a config can name, and fills the package's face.

    Raises:
        ConfigError: The environment lacks something.
    """
    public = importlib.import_module('mmdet_gdino_lora.public')
    package = sys.modules['mmdet_gdino_lora']
    vars(package).update({name: getattr(public, name) for name in ('__all__', *public.__all__)})
