"""What the tools share: mmdet's arguments, reading the config, and errors told in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Callable, Optional

# The checkout that a tool lies in is the one it runs.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# What mmengine and mmdet make Python and torch say in every run.
for _message in ('pkg_resources is deprecated', 'torch.meshgrid: in an upcoming release'):
    warnings.filterwarnings('ignore', message=_message)


def run(main: Callable[[], None]) -> None:
    """Runs a tool. A ``ConfigError`` ends it with one sentence and status 2, without a traceback.

    So does what ends a run from outside, such as a loader's worker that is killed.

    Args:
        main: The tool.
    """
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        sys.stdout.flush()
        print(f'error: {sentence}', file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> Optional[str]:
    try:
        from mmdet_gdino_lora.engine.endings import ending
    except Exception:  # the package can't be imported, which may be what the error says
        return str(error) if type(error).__name__ == 'ConfigError' else None
    return ending(error)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that mmdet's train.py and test.py have in common.

    Args:
        description: Of the tool.

    Returns:
        Parser with ``config``, ``--work-dir``, ``--cfg-options`` and ``--launcher``.
    """
    from mmengine.config import DictAction

    result = argparse.ArgumentParser(description=description)
    result.add_argument('config', help='config file')
    result.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; default: work_dirs/ and the config name',
    )
    result.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='replace settings of the config, such as model.lora.r=8 or '
        'model.lora.preset="[encoder,decoder]"; lists and tuples in quotes, without spaces',
    )
    result.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes --local-rank or --local_rank, as its version has it.
    result.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return result


def read_config(
    path: str,
    options: Optional[dict] = None,
    work_dir: Optional[str] = None,
    launcher: str = 'none',
    local_rank: int = 0,
):
    """Reads a config and puts the command line's settings into it.

    Args:
        path: Config file.
        options: ``--cfg-options``.
        work_dir: ``--work-dir``; else the config's own, else ``work_dirs/<name of the config>``.
        launcher: ``--launcher``.
        local_rank: ``--local_rank``, where the launcher does not set it in the environment.

    Returns:
        An mmengine ``Config``.

    Raises:
        ConfigError: The environment lacks something, or the file or an option is not right.
    """
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    from mmdet.utils import setup_cache_size_limit_of_dynamo
    from mmengine.config import Config

    import mmdet_gdino_lora  # noqa: F401  first of all: it checks the environment
    from mmdet_gdino_lora.errors import ConfigError

    setup_cache_size_limit_of_dynamo()
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise ConfigError(f'config {path!r}: {error}; give the path of a config file') from error
    cfg.launcher = launcher
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(f'--cfg-options {options} does not fit {path}: {error}') from error
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', os.path.splitext(os.path.basename(path))[0])
    return cfg


def build_runner(cfg):
    """Builds the runner that the config asks for.

    Args:
        cfg: An mmengine ``Config``.

    Returns:
        mmengine's ``Runner``, or the one that ``runner_type`` names.

    Raises:
        ConfigError: ``load_from`` is a file that is truncated or no checkpoint; mmengine would
            find out only when everything else is built.
    """
    from mmdet.registry import RUNNERS
    from mmengine.runner import Runner

    from mmdet_gdino_lora.lora.store.base import read_file

    if cfg.get('load_from') and os.path.isfile(cfg.load_from):
        read_file(cfg.load_from)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
