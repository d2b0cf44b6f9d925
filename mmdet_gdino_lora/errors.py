"""The one exception a user is meant to read."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in a config, a path or a file that the user can mend.

    The message is one sentence that names the file or the config key, the value found there and
    the remedy. ``tools/*.py`` print it without a traceback and exit with status 2.

    Args:
        message: The sentence. What torch makes of one that was raised in a loader's worker (its
            traceback, in the message of a new exception of this class) is taken for the sentence
            in there.
    """

    def __init__(self, message: str = '') -> None:
        super().__init__(_sentence(str(message)))


def _sentence(message: str) -> str:
    begin = f'{__name__}.ConfigError: '
    if not (message.startswith('Caught ConfigError in ') and f'\n{begin}' in message):
        return message
    return message.rpartition(f'\n{begin}')[2].strip()


class NoWordError(ConfigError):
    """A class name that no token can stand for."""


class NonFiniteError(ConfigError):
    """Numbers of a training step that are NaN or infinite.

    Attributes:
        where: What they are, such as ``pred_logits of decoder layer 2``.
        images: Which images of the batch they belong to.
    """

    def __init__(self, message: str, where: str, images: tuple[int, ...]) -> None:
        super().__init__(message)
        self.where, self.images = where, images
