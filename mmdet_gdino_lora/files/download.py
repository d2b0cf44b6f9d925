"""Files behind a URL: over https, whole, and the ones that were meant."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from typing import IO, Any, Optional
from urllib.error import URLError
from urllib.parse import parse_qs, urldefrag, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import MMLogger
from tqdm import tqdm

from mmdet_gdino_lora.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two processes would fetch one file at the same time
    fcntl = None  # type: ignore[assignment]  # there is no such module to type

_SILENCE, _ATTEMPTS, _CHUNK = 60, 5, 2**20  # seconds, number, bytes
_PATIENCE = 10.0  # seconds that a server has to say whether it has a file
# mmdet publishes files under names that end in the first digits of their sha256.
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$')
_DATE = re.compile(r'(19|20)\d\d[01]\d[0-3]\d')


class _Refused(Exception):
    """A reason, in words, for which trying again is no use."""


def is_url(source: str) -> bool:
    """Tells whether a source is to be fetched, and not a path.

    Args:
        source: As the user gave it.
    """
    return urlsplit(source).scheme in ('http', 'https')


def check_url(source: str, key: str = 'base_checkpoint') -> None:
    """Refuses a URL that could bring other bytes than its owner's, or names no file.

    Args:
        source: Of http or https.
        key: The config key that holds it.

    Raises:
        ConfigError: For http to another machine, for a URL without a file's name, and for a hash
            that is none.
    """
    if not _is_private(source):
        raise ConfigError(
            f'{key}={source!r}: http brings whatever somebody on the way puts there; write '
            'https://, or fetch the file yourself and give its path.'
        )
    if _name(source) in ('', '.', '..') or '\\' in _name(source):
        raise ConfigError(f'{key}={source!r} names no file; give the URL of the checkpoint itself.')
    digest = _given_hash(source)
    if digest is not None and not re.fullmatch('[0-9a-f]{8,64}', digest):
        raise ConfigError(
            f'{key}={source!r}: sha256={digest!r} is no hash; write the 8 to 64 first digits of '
            "the file's sha256, or leave #sha256= out."
        )


def fetch_url(source: str, key: str = 'base_checkpoint') -> str:
    """Brings a URL's file to where torch hub keeps its downloads, once.

    On several ranks the first one downloads. What the URL says of the file's hash, in
    ``#sha256=...`` or in a name as mmdet's, is compared with the file, also with one that is there
    already.

    Args:
        source: The URL.
        key: The config key that holds it.

    Returns:
        Path of the file.

    Raises:
        ConfigError: If the URL is refused or can't be reached, or the file isn't the one meant.
    """
    check_url(source, key)
    path = _kept_at(source)
    told: list[Optional[str]] = [None]
    if is_main_process():
        try:
            _bring(source, path)
        except (_Refused, URLError, HTTPException, OSError, ValueError) as error:
            told[0] = ' '.join(str(error).split()) or type(error).__name__
    broadcast_object_list(told)
    if told[0] is None and not os.path.isfile(path):
        told[0] = 'the first rank has it, and this machine does not share its folder'
    if told[0] is not None:
        raise ConfigError(
            f'{key}={source!r} cannot be downloaded ({told[0]}); fetch it elsewhere and put it at '
            f'{path}, or give the path of a local copy.'
        )
    return path


def is_out_of_reach(source: str) -> bool:
    """Tells whether a URL's file is neither here nor to be had, after one try.

    Args:
        source: The URL.
    """
    if os.path.isfile(_kept_at(source)):
        return False
    url = urldefrag(source).url
    asked = Request(url, headers={'User-Agent': 'torch.hub'})  # whose answer nobody reads
    try:
        with _opener(url).open(asked, timeout=_PATIENCE):
            return False
    except (_Refused, URLError, HTTPException, OSError):
        return True


def _kept_at(source: str) -> str:
    return os.path.join(torch.hub.get_dir(), 'checkpoints', _name(source))


def _bring(source: str, path: str) -> None:
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # One name for all attempts: what a killed process left is written over by the next.
        with _alone(f'{path}.partial') as partial:
            if not os.path.exists(path):
                _download(source, partial)
                _check_hash(source, partial.name)
                partial.flush()
                os.fsync(partial.fileno())
                os.replace(partial.name, path)
                return
    if not os.path.isfile(path):
        raise _Refused(f'{path} is a folder')
    _check_hash(source, path)


@contextmanager
def _alone(path: str) -> Iterator[IO[bytes]]:
    """A file to write, that no other process writes; removed where it was not moved away."""
    while True:
        with open(path, 'ab+') as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had the lock before has moved or removed the file that was opened here.
            if not (
                os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            ):
                continue
            file.truncate(0)
            try:
                yield file
            finally:
                if os.path.exists(path):
                    os.remove(path)
            return


def _download(source: str, file: IO[bytes]) -> None:
    """Writes the URL's whole content; goes on where a connection ended early."""
    url, failure = urldefrag(source).url, 'the connection ended early'
    opener, validator = _opener(url), None
    MMLogger.get_current_instance().info('Downloading %s', url)
    for _ in range(_ATTEMPTS):
        there = os.fstat(file.fileno()).st_size
        headers = {'User-Agent': 'torch.hub'}
        if there and validator:
            headers.update({'Range': f'bytes={there}-', 'If-Range': validator})
        try:
            with opener.open(Request(url, headers=headers), timeout=_SILENCE) as answer:
                if not (answer.status == 206 and _starts_at(answer.headers, there)):
                    file.truncate(0)
                    there = 0
                validator = _validator(answer.headers)
                if _copy(answer, file, there):
                    return
        except HTTPException as error:  # of a body in chunks that ends early
            failure = f'{failure}: {error}'
        except (ConnectionError, TimeoutError) as error:
            failure = str(error) or type(error).__name__
    raise _Refused(f'{failure}, {_ATTEMPTS} times')


def _copy(answer: Any, file: IO[bytes], there: int) -> bool:
    """Appends a body to a file; tells whether the file is whole now."""
    length = answer.headers.get('Content-Length')
    if length is None and answer.headers.get('Transfer-Encoding', '') != 'chunked':
        raise _Refused('the server does not say how long the file is')
    total = there + int(length) if length is not None else None
    if total is not None and total - there > shutil.disk_usage(os.path.dirname(file.name)).free:
        raise _Refused(f'it has {total:,} bytes, more than are free there')
    # What has come by then is kept where the connection ends.
    with tqdm(total=total, initial=there, unit='B', unit_scale=True, unit_divisor=1024) as bar:
        while part := answer.read1(_CHUNK):
            file.write(part)
            bar.update(len(part))
    file.flush()
    return total is None or os.fstat(file.fileno()).st_size == total


def _starts_at(headers: Mapping[str, str], there: int) -> bool:
    return headers.get('Content-Range', '').startswith(f'bytes {there}-')


def _validator(headers: Mapping[str, str]) -> Optional[str]:
    """What tells the server whether the rest that is asked for is the same file's."""
    tag = headers.get('ETag')
    return tag if tag and not tag.startswith('W/') else headers.get('Last-Modified')


class _StaysPrivate(HTTPRedirectHandler):
    """Follows no redirection from https to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Optional[Request]:
        """Makes the request for where a redirection leads.

        Args:
            req: The request that was redirected.
            fp: Its answer.
            code: Its status.
            msg: Its reason.
            headers: Its headers.
            newurl: Where it leads.

        Returns:
            The next request.
        """
        if not _is_private(newurl):
            raise _Refused(f'it leads to {newurl}, which is not https')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str) -> OpenerDirector:
    handlers: list[Any] = [_StaysPrivate()]
    if _is_loopback(url):  # a proxy would look for it on its own machine
        handlers.append(ProxyHandler({}))
    return build_opener(*handlers)


def _is_private(url: str) -> bool:
    return urlsplit(url).scheme == 'https' or (urlsplit(url).scheme == 'http' and _is_loopback(url))


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ''
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(url: str) -> str:
    return os.path.basename(urlsplit(url).path)


def _given_hash(url: str) -> Optional[str]:
    """The sha256 that a URL promises, whole or its beginning."""
    given = parse_qs(urlsplit(url).fragment, keep_blank_values=True).get('sha256')
    if given:
        return given[0].lower()
    in_name = _HASH_IN_NAME.search(_name(url))
    # Eight digits may as well be a day.
    return None if in_name is None or _DATE.fullmatch(in_name[1]) else in_name[1]


def _check_hash(url: str, path: str) -> None:
    wanted = _given_hash(url)
    if wanted is None:
        return
    hasher = hashlib.sha256()
    with open(path, 'rb') as file:
        while part := file.read(_CHUNK):
            hasher.update(part)
    if not hasher.hexdigest().startswith(wanted):
        raise _Refused(
            f'the file has the sha256 {hasher.hexdigest()}, not {wanted} as the URL says; '
            f'remove {path} where it is'
            if not path.endswith('.partial')
            else f'what came has the sha256 {hasher.hexdigest()}, not {wanted} as the URL says'
        )
