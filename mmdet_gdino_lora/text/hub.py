"""Whether the Hugging Face hub answers, asked before something is wanted of it."""

from __future__ import annotations

from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

#: Seconds that the hub has to answer.
PATIENCE = 10.0


def is_network_error(error: Exception) -> bool:
    """Tells whether an error is of the client that huggingface_hub talks to the hub with.

    Args:
        error: Of ``requests``, ``httpx`` or ``httpx2``, as it is of huggingface_hub's version; it
            lets these through.
    """
    packages = {base.__module__.partition('.')[0] for base in type(error).__mro__}
    return not packages.isdisjoint({'requests', 'httpx', 'httpx2'})


@cache
def hub_is_out_of_reach() -> bool:
    """Tells whether the hub can't be reached, after one try; huggingface_hub makes six per file.

    Asked once per process, with huggingface_hub's own client, which knows proxies and certificates.

    Returns:
        False also where ``HF_HUB_OFFLINE`` is set: huggingface_hub tries nothing then.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:
        if not (isinstance(error, OSError) or is_network_error(error)):
            raise
        return True
    return False
