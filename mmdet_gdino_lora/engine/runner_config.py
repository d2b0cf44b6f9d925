"""What a detector may know of the run it is part of, without a hook in the user's config.

mmengine's ``RuntimeInfoHook``, always on, leaves the run's config in the message hub as text. A
detector that reads it there serves users who add two lines to their config and no hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import find_latest_checkpoint


def runner_config() -> Mapping[str, Any]:
    """Reads the config of the current mmengine run.

    Returns:
        The config; empty outside a run.
    """
    hub = MessageHub.get_current_instance()
    text = hub.get_info('cfg') if 'cfg' in hub.runtime_info else None
    return _parse(text) if text else {}


@lru_cache(maxsize=1)
def _parse(text: str) -> Config:
    # The run has imported its ``custom_imports`` by now, so that this finds them imported.
    return Config.fromstring(text, '.py')


def checkpoint_at_start() -> str:
    """The checkpoint that the current mmengine run begins with.

    Returns:
        ``load_from``; where the run resumes without one, the latest checkpoint of its folder; empty
        outside a run, and where weights are random at first.
    """
    config = runner_config()
    if config.get('load_from'):
        return str(config['load_from'])
    if config.get('resume') and config.get('work_dir'):
        return find_latest_checkpoint(config['work_dir']) or ''
    return ''


def annotations_follow_resize(config: Mapping[str, Any]) -> bool:
    """Tells whether a run's validation boxes are in the original image's pixels.

    Args:
        config: A run's config.

    Returns:
        True where ``LoadAnnotations`` stands behind the resizing transform in the validation
        pipeline, as in mmdet's own test pipelines: the boxes are then not resized.
    """
    names = _transform_names(config)
    if 'LoadAnnotations' not in names:
        return False
    return any('Resize' in name for name in names[: names.index('LoadAnnotations')])


def _transform_names(config: Mapping[str, Any]) -> Sequence[str]:
    dataset = (config.get('val_dataloader') or {}).get('dataset', {})
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return [str(transform['type']) for transform in dataset.get('pipeline', [])]
