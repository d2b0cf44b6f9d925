"""SIGTERM, with which schedulers take a machine away: the run saves, ends, and can go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from mmdet_gdino_lora.engine.agreement import Agreement
from mmdet_gdino_lora.engine.files import PREEMPTED, disk_is_full, last_checkpoint, name_last

STATUS = 128 + signal.SIGTERM
"""What a shell says of a process that SIGTERM ended: the work isn't done."""


@HOOKS.register_module()
class PreemptHook(Hook):
    """On SIGTERM lets the iteration end, saves a checkpoint, and ends the process.

    ``--resume`` goes on from there, with :class:`~.engine.seed_hook.ResumableSeedHook` to the bit,
    also in the middle of an epoch. ``preempted.pth`` is gone as soon as a later checkpoint is
    there. The process ends with status 143.

    On several ranks the signal may reach all or one; all stop at the same iteration
    (:mod:`~.engine.agreement`). A validation that is running comes to its end first. Workers of the
    loaders, which schedulers signal as well, go on until their process ends them.

    Example::

        custom_hooks = [dict(type='ResumableSeedHook'), dict(type='PreemptHook')]
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._agreement: Optional[Agreement] = None
        self._superseded = False

    @property
    def asked(self) -> bool:
        """Whether the signal came, if only in the last iteration or validation."""
        return self._asked

    def before_train(self, runner: Any) -> None:
        """Begins to listen to the signal.

        Args:
            runner: mmengine's runner.
        """
        self._asked = False
        self._agreement = Agreement()
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None and getattr(loop.dataloader, 'num_workers', None):
                loop.dataloader.worker_init_fn = OwnParentOnly(loop.dataloader.worker_init_fn)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._remember)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Notes that another checkpoint takes the place of ``preempted.pth``.

        Args:
            runner: mmengine's runner.
            checkpoint: About to be written.
        """
        self._superseded = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Saves and ends, where the signal came.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
            outputs: Of the model.

        Raises:
            SystemExit: After the signal, the checkpoint being on disk.
        """
        self._clean(runner)
        if self._agreement is None or not self._agreement.tell(self._asked):
            return
        if self.is_last_train_iter(runner):
            return  # what is left is to save and to validate
        path = os.path.join(runner.work_dir, PREEMPTED)
        with disk_is_full(path, runner.work_dir):
            runner.save_checkpoint(
                runner.work_dir, PREEMPTED, by_epoch=False, backend_args=dict(backend='atomic')
            )
            if is_main_process():
                name_last(runner.work_dir, path)
        runner.logger.warning(
            'SIGTERM came: the run was saved after iteration %d to %s and ends here; the same '
            'command with --resume goes on from there.',
            runner.iter + 1,
            path,
        )
        self._agreement.meet()
        self._stop_listening()
        raise SystemExit(STATUS)

    def after_train_epoch(self, runner: Any) -> None:
        """Removes what a later checkpoint has taken the place of.

        Args:
            runner: mmengine's runner.
        """
        self._clean(runner)

    def after_train(self, runner: Any) -> None:
        """Leaves the signal to whoever had it.

        Args:
            runner: mmengine's runner.
        """
        self._clean(runner)
        if self._agreement is not None:
            self._agreement.settle()
        self._stop_listening()

    def _remember(self, number: int, frame: Any) -> None:
        self._asked = True

    def _stop_listening(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _clean(self, runner: Any) -> None:
        if not self._superseded:
            return
        self._superseded = False
        path = os.path.join(runner.work_dir, PREEMPTED)
        if is_main_process() and os.path.isfile(path) and last_checkpoint(runner.work_dir) != path:
            os.remove(path)


class OwnParentOnly:
    """A worker's start, after which SIGTERM from anybody but its own process is ignored.

    A scheduler signals every process of a job. A worker that died of it would take the run down
    before its process has saved.

    Args:
        start: What else a worker begins with.
    """

    def __init__(self, start: Optional[Callable[[int], None]]) -> None:
        self._start = start

    def __call__(self, worker: int) -> None:
        """Begins.

        Args:
            worker: Its number.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self._start is not None:
            self._start(worker)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
