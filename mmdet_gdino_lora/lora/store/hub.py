"""Adapters on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mmdet_gdino_lora.errors import ConfigError

_OF_THE_HUB = ('huggingface_hub', 'httpx', 'httpx2', 'requests')
"""Packages whose exceptions say that the hub can't be reached, or refuses."""


def check_hub(repo: str) -> None:
    """Checks what can be known before anything is built or sent.

    Args:
        repo: Name on the hub, ``owner/name``.

    Raises:
        ConfigError: The name is none, the hub is switched off, or nobody is logged in.
    """
    option = f'--push-to-hub {repo!r}'
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f'{option}: {error} Write owner/name.') from error
    if '/' not in repo:
        raise ConfigError(f'{option}: say whose it is; write owner/{repo}.')
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f'{option}: HF_HUB_OFFLINE=1 in the environment forbids to talk to the hub; unset it, '
            'or leave --push-to-hub out.'
        )
    if not get_token():
        raise ConfigError(
            f'{option}: no token of the hub is at hand; log in with "hf auth login", or set '
            'HF_TOKEN.'
        )


def push_folder(folder: str, repo: str, files: Sequence[str], *, private: bool = False) -> str:
    """Sends files of a folder to the hub, in one commit.

    Args:
        folder: Where they are.
        repo: Name on the hub; made where it doesn't exist.
        files: Their names. What else is in the folder stays here.
        private: Whether a repository that is made is seen by its owner alone.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: As :func:`check_hub`; or the hub can't be reached, or refuses.
    """
    check_hub(repo)
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message='Grounding DINO adapter',
        )
    except Exception as error:
        if type(error).__module__.partition('.')[0] not in _OF_THE_HUB:
            raise
        said = ' '.join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f'--push-to-hub {repo!r}: {constants.ENDPOINT} did not take it ({said[:300]}); the '
            f'adapter is in {folder}: see to the token and the name, and push again.'
        ) from error
    return str(address)
