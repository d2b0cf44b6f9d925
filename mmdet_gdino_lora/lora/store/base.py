"""Base checkpoints: finding the file, reading it safely, and checking that it fits the detector."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.download import fetch_url, is_url
from mmdet_gdino_lora.files.read import read_file, shards_of
from mmdet_gdino_lora.lora.state import Base, lora_state
from mmdet_gdino_lora.lora.store.convert import check_scores, release_of, to_mmdet
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, plain_tensors

_FOLDER_FILES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin')
# Buffers that files may have or lack: counters, and index tables that every constructor makes anew.
_OPTIONAL_ENDINGS = ('num_batches_tracked', 'position_ids', 'relative_position_index')
# What LLMDet's own files hold beside the detector: the language model that taught it.
_LLMDET = ('lmm.', 'connector.', 'region_connector.', 'image_seperate.', 'ref_point_head.')


def load_base(detector: nn.Module, source: str) -> Base:
    """Loads base weights into a detector that has no adapters yet.

    Args:
        detector: The plain detector.
        source: A path or URL of a checkpoint (``.pth`` or ``.safetensors``) of mmdet's or of the
            official release, or a folder as transformers writes it.

    Returns:
        What was loaded; also kept as ``detector.lora_state.base``.

    Raises:
        ConfigError: If the file is missing, can't be downloaded, is truncated or not a plain
            checkpoint, or belongs to another architecture.
    """
    base = fit_base(detector, base_weights(detector, source), source)
    lora_state(detector).stands_on(base)
    MMLogger.get_current_instance().info('Base loaded from %s', source)
    return base


def base_weights(detector: nn.Module, source: str) -> dict[str, Tensor]:
    """Reads a base's weights under mmdet's names, whichever release they are from.

    Args:
        detector: The detector that will take them, injected or not.
        source: A path or a URL.

    Returns:
        Tensors by plain name.

    Raises:
        ConfigError: As for :func:`load_base`.
    """
    return in_mmdet_names(detector, read_weights(fetch(source)))


def base_of(detector: nn.Module) -> dict[str, Tensor]:
    """Reads the weights of the base that a detector stands on from its file again.

    Args:
        detector: The detector, injected or not.

    Returns:
        Tensors by plain name.

    Raises:
        ConfigError: If the base is random or of unknown origin, or as for :func:`load_base`.
    """
    base = lora_state(detector).base
    if base is None or not base.source:
        raise ConfigError(
            'the base of this detector is random or of unknown origin, so there is nothing to '
            'switch to or to scale an adapter against; set model.base_checkpoint.'
        )
    return base_weights(detector, base_location(base))


def base_location(base: Base) -> str:
    """Finds where a base lies now, for a process that may run in another folder than the last.

    Args:
        base: As recorded.

    Returns:
        Path of a file or folder that exists; else the source as the user gave it.
    """
    paths = (base.path, os.path.expanduser(base.source))
    return next(filter(os.path.exists, paths), base.source)


def unrounded(
    detector: nn.Module,
    tensors: Mapping[str, Tensor],
    base: Optional[Mapping[str, Tensor]] = None,
) -> dict[str, Tensor]:
    """Gives a detector's tensors in float32, whatever ``base_dtype`` it keeps the frozen ones in.

    Args:
        detector: The detector that they are from, injected or not.
        tensors: By plain name.
        base: The base's weights, by plain name; read again from its file where None.

    Returns:
        New tensors on the CPU. Those that are still the base's and that the detector keeps in half
        precision come from the base's file; the others are as they were.

    Raises:
        ConfigError: As for :func:`load_base`.
    """
    state = lora_state(detector)
    rounded = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in (torch.bfloat16, torch.float16) and name not in state.changed
    ]
    if base is None:
        known = rounded and state.base is not None and state.base.source
        base = base_of(detector) if known else {}
    exact = {**tensors, **{name: base[name] for name in rounded if name in base}}
    return {
        name: tensor.to('cpu', torch.float32 if tensor.is_floating_point() else None, copy=True)
        for name, tensor in exact.items()
    }


def in_mmdet_names(detector: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings weights of any known release under mmdet's names.

    Args:
        detector: The detector that will take them, injected or not.
        weights: As read from a file.

    Returns:
        Tensors by plain name.

    Raises:
        ConfigError: If the detector computes scores otherwise than the release does.
    """
    release = release_of(weights)
    if release is None:
        return weights
    weights = to_mmdet(weights, release, plain_tensors(detector))
    check_scores(detector, weights, release)
    return weights


def fit_base(detector: nn.Module, weights: Mapping[str, Tensor], source: str) -> Base:
    """Copies weights under their plain names into a detector, all or nothing.

    Args:
        detector: The detector, injected or not.
        weights: Tensors by plain name.
        source: For messages and for the record.

    Returns:
        The base with its fingerprint.

    Raises:
        ConfigError: If names or shapes don't fit.
    """
    tensors = plain_tensors(detector)
    absent = [
        name
        for name in (LABEL_EMBEDDING,)
        if name in tensors and (name not in weights or weights[name].shape != tensors[name].shape)
    ]
    unused = [*absent, *(() if LABEL_EMBEDDING in tensors else (LABEL_EMBEDDING,))]
    weights = {name: w for name, w in weights.items() if name not in unused}
    _check_names(tensors, weights, absent, source)
    with torch.no_grad():
        for name, weight in weights.items():
            if name in tensors:
                tensors[name].copy_(weight)
    path = os.path.abspath(os.path.expanduser(source))
    path = path if source and os.path.exists(path) else ''
    return Base(source, fingerprint(tensors, absent), frozenset(absent), path)


def _check_names(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], absent: Sequence[str], source: str
) -> None:
    missing = [n for n in tensors if n not in weights and n not in absent and _counts(n)]
    unknown = [n for n in weights if n not in tensors and _counts(n)]
    shapes = [n for n in weights if n in tensors and weights[n].shape != tensors[n].shape]
    if not (missing or unknown or shapes):
        return
    found = []
    if shapes:
        name = shapes[0]
        found.append(
            f'{len(shapes)} weights have another shape ({name} is {tuple(weights[name].shape)} in '
            f'the file and {tuple(tensors[name].shape)} in the model)'
        )
    if missing:
        found.append(f'{len(missing)} of the model are not in the file ({_some(missing)})')
    if unknown:
        found.append(f'{len(unknown)} of the file are not in the model ({_some(unknown)})')
    raise ConfigError(
        f'base checkpoint {source} belongs to another architecture than the config describes: '
        f'{"; ".join(found)}; use the config that the base was made with, or another base.'
    )


def _counts(name: str) -> bool:
    if name.startswith(_LLMDET):
        return False
    return not name.endswith(_OPTIONAL_ENDINGS) and '.pooler.' not in name


def _some(names: Sequence[str], count: int = 3) -> str:
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


def fingerprint(tensors: Mapping[str, Tensor], absent: Sequence[str] = ()) -> dict[str, str]:
    """Computes digests of weights, one for each top-level module.

    Args:
        tensors: By plain name.
        absent: Names that don't count.

    Returns:
        ``{'backbone': hex digest, ...}``; equal exactly if names, shapes, types and bits are.
    """

    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        head = f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode()
        hasher = hashlib.blake2b(head, digest_size=16)
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
        return hasher.digest()

    names = sorted(n for n in tensors if n not in absent and _counts(n))
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, names))
    groups: dict[str, Any] = {}
    for name, value in zip(names, digests):
        group = groups.setdefault(name.split('.')[0], hashlib.blake2b(digest_size=16))
        group.update(value)
    return {group: hasher.hexdigest() for group, hasher in groups.items()}


def fetch(source: str) -> str:
    """Finds a local path for a path or URL.

    Args:
        source: As the user gave it. URLs are kept where torch hub keeps its downloads; on several
            ranks one downloads.

    Returns:
        Path of an existing file.

    Raises:
        ConfigError: If there is no such file, or the URL can't be reached.
    """
    if is_url(source):
        return fetch_url(source)
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        inside = [os.path.join(path, name) for name in _FOLDER_FILES]
        path = next(filter(os.path.isfile, inside), '')
    if not os.path.isfile(path):
        raise ConfigError(
            f'base_checkpoint={source!r}: there is no such file; give the path or URL of a '
            f'checkpoint, or a folder with one of {", ".join(_FOLDER_FILES)}.'
        )
    return path


def read_weights(path: str) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, without running anything that the file may hold.

    Args:
        path: ``.safetensors``, or a file of ``torch.save`` with the weights at the top level or
            under ``state_dict`` or ``model``.

    Returns:
        Tensors by name, on the CPU, without a ``module.`` prefix.

    Raises:
        ConfigError: If the file is truncated, damaged, or holds other things than plain weights.
    """
    if path.endswith('.index.json'):
        content: dict[str, Any] = {}
        for shard in shards_of(path):
            content.update(read_file(shard))
    else:
        content = read_file(path)
    for key in ('state_dict', 'model'):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ConfigError(f'{path} holds no weights; give a checkpoint of a detector.')
    return {name[7:] if name.startswith('module.') else name: w for name, w in weights.items()}
