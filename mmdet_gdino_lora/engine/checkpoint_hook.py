"""Checkpoints that survive being killed, with the adapter in PEFT's format beside them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook

from mmdet_gdino_lora.engine.atomic import remove_partial
from mmdet_gdino_lora.engine.files import (
    PREEMPTED,
    DiskFullError,
    disk_is_full,
    last_checkpoint,
    name_last,
)
from mmdet_gdino_lora.engine.wrapped import detector_of
from mmdet_gdino_lora.errors import ConfigError


@HOOKS.register_module()
class AdapterCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, killed at any moment without harm.

    Files appear whole under their name or not at all, ``last_checkpoint`` names a file that is
    complete, and a checkpoint that ``max_keep_ckpts`` or a better one retires goes after its
    successor is on disk. Beside ``epoch_3.pth`` lies ``epoch_3_adapter/`` with the same weights in
    PEFT's format (with ``EMAHook``: the average), and beside ``best_....pth`` its own. The model
    card gets the metrics of the validation of these weights.

    Example::

        default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook', interval=1))

    Args:
        export: Whether to write the adapter's folder.
        **kwargs: As for ``CheckpointHook``.
    """

    def __init__(self, *args: Any, export: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.export = export
        self._weights: Optional[dict[str, Any]] = None
        self._resumed: Optional[dict[str, Any]] = None
        self._exported = _Exported()

    backend_args: Optional[dict[str, Any]]

    def before_train(self, runner: Any) -> None:
        """Does as mmengine's, with files that are whole or not there.

        What a run that was killed has left is mended: files written in part are removed, and the
        adapter of the last checkpoint is written where it is missing.

        Args:
            runner: mmengine's runner.
        """
        if self.backend_args is None and '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = dict(backend='atomic')
        super().before_train(runner)
        if is_main_process() and '://' not in str(self.out_dir):
            self._mend(runner)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keeps the weights of the checkpoint that a run resumes from, until training begins.

        Args:
            runner: mmengine's runner.
            checkpoint: As other hooks have left it; ``EMAHook`` has put the average aside.
        """
        if runner.cfg.get('resume'):
            average = checkpoint.get('ema_state_dict', {}).items()
            plain = {n.removeprefix('module.'): w for n, w in average if n.startswith('module.')}
            self._resumed = {**checkpoint['state_dict'], **plain}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keeps the weights that are about to be written, for the adapter's folder.

        Args:
            runner: mmengine's runner.
            checkpoint: As other hooks have left it; this one comes last.
        """
        self._weights = checkpoint['state_dict']

    def after_val_epoch(self, runner: Any, metrics: dict) -> None:
        """Does as mmengine's, and tells the metrics in the cards of the weights that were measured.

        Args:
            runner: mmengine's runner.
            metrics: Of the validation.
        """
        super().after_val_epoch(runner, metrics)
        self._weights = None
        if metrics and self._exported.iteration == runner.iter:
            for folder in self._exported.folders:
                detector_of(runner).describe_adapter(folder, _classes(runner), metrics)

    def _save_checkpoint(self, runner: Any) -> None:
        super()._save_checkpoint(runner)
        self._weights = None

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        retired: list[str] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            while len(self.keep_ckpt_ids) >= self.max_keep_ckpts:
                retired.append(self._path(self.keep_ckpt_ids.popleft()))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        with disk_is_full(self.last_ckpt, runner.work_dir):
            runner.save_checkpoint(
                self.out_dir,
                self.filename_tmpl.format(step),
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if not is_main_process():
                return
            name_last(runner.work_dir, self.last_ckpt)
        self._export(runner, self.last_ckpt, meta['iter'])
        for path in retired:
            self._retire(path)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if not self.save_best:
            return
        # mmengine removes the old file before it writes the new one, unless it knows of none.
        old = self._best()
        self._set_best(dict.fromkeys(old))
        with disk_is_full('the best checkpoint', runner.work_dir):
            super()._save_best_checkpoint(runner, metrics)
        new = self._best()
        self._set_best({indicator: path or old.get(indicator) for indicator, path in new.items()})
        if not is_main_process():
            return
        for written in filter(None, new.values()):
            self._export(runner, written, runner.iter)
        for indicator, path in old.items():
            if path and new.get(indicator) not in (None, path):
                self._retire(path)

    def _best(self) -> dict[str, Optional[str]]:
        """Lists the best checkpoint by each of the metrics that choose one."""
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best(self, paths: dict[str, Optional[str]]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _retire(self, checkpoint: str) -> None:
        if self.file_backend.isfile(checkpoint):
            self.file_backend.remove(checkpoint)
        shutil.rmtree(_adapter_folder(checkpoint), ignore_errors=True)

    def _mend(self, runner: Any) -> None:
        resumed, self._resumed = self._resumed, None
        if not os.path.isdir(self.out_dir):
            return
        folders = [entry.path for entry in os.scandir(self.out_dir) if entry.is_dir()]
        for folder in {runner.work_dir, self.out_dir, *filter(_is_adapter_folder, folders)}:
            remove_partial(folder)
        last = last_checkpoint(runner.work_dir)
        if not (runner.iter and resumed and os.path.isfile(last)):
            return
        weights = os.path.join(_adapter_folder(last), 'adapter_model.safetensors')
        if os.path.basename(last) != PREEMPTED and not os.path.isfile(weights):
            self._weights = resumed
            self._export(runner, last, runner.iter)
            self._weights = None

    def _export(self, runner: Any, checkpoint: str, iteration: int) -> None:
        """Writes the adapter beside a checkpoint that has just been written."""
        folder, model = _adapter_folder(checkpoint), detector_of(runner)
        if not self.export or '://' in folder or not hasattr(model, 'export_adapter'):
            return
        if self._exported.iteration != iteration:
            self._exported = _Exported(iteration)
        if folder in self._exported.folders:
            return
        try:
            with disk_is_full(folder, runner.work_dir, folder):
                if model.export_adapter(folder, classes=_classes(runner), weights=self._weights):
                    self._exported.folders.append(folder)
        except DiskFullError:
            raise
        except ConfigError as error:  # the checkpoint is there; training goes on
            runner.logger.warning('No adapter in PEFT format is written: %s', error)
            self.export = False


@dataclasses.dataclass
class _Exported:
    """The folders that hold the weights after a number of iterations."""

    iteration: int = -1
    folders: list[str] = dataclasses.field(default_factory=list)


def _classes(runner: Any) -> Sequence[str]:
    return getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes', ())


def _adapter_folder(checkpoint: str) -> str:
    return os.path.splitext(checkpoint)[0] + '_adapter'


def _is_adapter_folder(path: str) -> bool:
    return path.endswith('_adapter')
