"""The one exception a user is meant to read."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in a config, a path or a file that the user can mend.

    The message is one sentence that names the file or the config key, the value found there and
    the remedy. ``tools/*.py`` print it without a traceback and exit with status 2.
    """
