"""Checkpoints that survive being killed, with the adapter in PEFT's format beside them."""

from __future__ import annotations

import os
import shutil
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError


@HOOKS.register_module()
class AdapterCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, killed at any moment without harm.

    Files appear whole under their name or not at all, ``last_checkpoint`` names a file that is
    complete, and a checkpoint that ``max_keep_ckpts`` retires goes after its successor is on disk.
    Beside ``epoch_3.pth`` lies ``epoch_3_adapter/`` with the adapter in PEFT's format; its model
    card gets the metrics of the validation that follows.

    Example::

        default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook', interval=1))

    Args:
        export: Whether to write the adapter's folder.
        **kwargs: As for ``CheckpointHook``.
    """

    def __init__(self, *args: Any, export: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.export = export
        self._exported: Optional[str] = None

    def before_train(self, runner: Any) -> None:
        """As mmengine's.

        Args:
            runner: mmengine's runner.
        """
        if self.backend_args is None and '://' not in str(self.out_dir or runner.work_dir):
            self.backend_args = dict(backend='atomic')
        super().before_train(runner)

    def after_val_epoch(self, runner: Any, metrics: dict) -> None:
        """As mmengine's; the metrics go into the adapter's model card.

        Args:
            runner: mmengine's runner.
            metrics: Of the validation.
        """
        super().after_val_epoch(runner, metrics)
        if self._exported and is_main_process():
            self._export(runner, self._exported, metrics)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        retired: list[str] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            while len(self.keep_ckpt_ids) >= self.max_keep_ckpts:
                retired.append(self._path(self.keep_ckpt_ids.popleft()))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
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
        with (
            atomic(os.path.join(runner.work_dir, 'last_checkpoint')) as partial,
            open(partial, 'w', encoding='utf-8') as file,
        ):
            file.write(self.last_ckpt)
        self._export(runner, _adapter_folder(self.last_ckpt))
        for path in retired:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            shutil.rmtree(_adapter_folder(path), ignore_errors=True)

    def _path(self, step: int) -> str:
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))

    def _export(self, runner: Any, folder: str, metrics: Optional[dict] = None) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not self.export or '://' in folder or not hasattr(model, 'export_adapter'):
            return
        dataset = runner.train_dataloader.dataset
        classes = getattr(dataset, 'metainfo', {}).get('classes', ())
        try:
            if model.export_adapter(folder, classes=classes, metrics=metrics):
                self._exported = folder
        except ConfigError as error:  # the checkpoint is there; training goes on
            runner.logger.warning('No adapter in PEFT format is written: %s', error)
            self.export = False


def _adapter_folder(checkpoint: str) -> str:
    return os.path.splitext(checkpoint)[0] + '_adapter'
