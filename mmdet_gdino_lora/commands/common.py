"""What the commands share: mmdet's arguments, reading the config, building the runner."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import names, typed_config
from mmdet_gdino_lora.start import load

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner


def read_arguments(
    arguments: argparse.ArgumentParser, argv: Optional[Sequence[str]]
) -> argparse.Namespace:
    """Reads a command line, and then imports what the command needs: help doesn't wait for that.

    Args:
        arguments: Of the command.
        argv: Arguments; None: the process's own.

    Returns:
        What was given.

    Raises:
        ConfigError: A setting is none, or the environment lacks something.
    """
    args = arguments.parse_args(argv)
    load()
    return args


class _Settings(argparse.Action):
    """mmengine's ``DictAction``, which tells what is no setting."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        for setting in values:
            if not setting.partition('=')[0] or '=' not in setting:
                raise ConfigError(
                    f'--cfg-options {setting!r}: a setting is written KEY=VALUE, without '
                    'spaces; write model.lora.r=8, say'
                )
            if any(setting.count(a) != setting.count(b) for a, b in ('()', '[]')):
                raise ConfigError(
                    f'--cfg-options {setting!r}: a bracket is missing; lists are written in '
                    'quotes and without spaces, such as "model.lora.preset=[encoder,decoder]"'
                )
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option)


def add_cfg_options(arguments: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``.

    Args:
        arguments: Of the command.
    """
    arguments.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Settings,
        metavar='KEY=VALUE',
        help='replace settings of the config, such as model.lora.r=8 or '
        'model.lora.preset="[encoder,decoder]"; lists and tuples in quotes, without spaces',
    )


def add_overwrite(arguments: argparse.ArgumentParser) -> None:
    """Adds ``--overwrite``.

    Args:
        arguments: Of the command.
    """
    arguments.add_argument(
        '--overwrite', action='store_true', help='write over files that are there'
    )


def refuse_overwriting(what: str, paths: Sequence[str], overwrite: bool) -> None:
    """Ends a command that would write over files.

    Args:
        what: The argument that names them.
        paths: Files that the command is going to write.
        overwrite: ``--overwrite``.

    Raises:
        ConfigError: One is there, and nobody asked for it.
    """

    there = [path for path in paths if os.path.lexists(path)]
    if there and not overwrite:
        raise ConfigError(
            f'{what}: {there[0]!r} is there already; name another, or write over it with '
            '--overwrite'
        )


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that mmdet's train.py and test.py have in common.

    Args:
        description: Of the command.

    Returns:
        Parser with ``config``, ``--work-dir``, ``--cfg-options`` and ``--launcher``.
    """
    result = argparse.ArgumentParser(description=description)
    result.add_argument('config', help='config file, or the name of one of ours: gdino_lora_coco')
    result.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; default: work_dirs/ and the config name',
    )
    add_cfg_options(result)
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
) -> Config:
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
    load()
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    setup_cache_size_limit_of_dynamo()
    path = typed_config(path)
    cfg = config_file(path)
    cfg.launcher = launcher
    try:
        cfg.merge_from_dict(options or {})
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f'--cfg-options {options} does not fit {path}: {error}') from error
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', os.path.splitext(os.path.basename(path))[0])
    return cfg


def config_file(path: str) -> Config:
    """Reads a config file.

    Args:
        path: Of the file.

    Returns:
        An mmengine ``Config``.

    Raises:
        ConfigError: It is not there, no config, or holds code that does not run.
    """
    from mmengine.config import Config

    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f'config {path!r}: {error}; give the path of a config file, or the '
            f'name of one of ours: {", ".join(names())}'
        ) from error
    except SyntaxError as error:
        found = error if error.lineno else error.__context__  # mmengine's own is of words alone
        line, says = getattr(found, 'lineno', '?'), getattr(found, 'msg', error)
        raise ConfigError(
            f'config {_read_last(error, path)!r}, line {line}: {says}; correct that line'
        ) from error
    except OSError as error:
        raise ConfigError(f'config {path!r}: {error}; give the path of a .py file') from error
    except Exception as error:
        # What the code in a config raises is its author's to mend; anything else is a defect.
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not last.filename.endswith('.py') or not _is_config(last.filename, path):
            raise
        raise ConfigError(
            f'config {last.filename!r}, line {last.lineno}: {type(error).__name__}: {error}; '
            'correct that line'
        ) from error


def _read_last(error: BaseException, path: str) -> str:
    """The config that mmengine was reading: the one that was asked for, or one of its bases."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_locals.get('filename') for frame in frames if 'file' in frame.f_code.co_name]
    return str([path, *filter(None, names)][-1])


def _is_config(file: str, path: str) -> bool:
    """Tells whether a file's code is a config's own: the config, or one of its bases."""
    return os.path.samefile(file, path) or 'configs' in file.split(os.sep)


def read_source(source: str, adapter_wanted: bool = False) -> Optional[dict]:
    """Reads what is to be loaded, before a detector is built for it.

    Args:
        source: Checkpoint file, or a folder in PEFT's format.
        adapter_wanted: Whether weights without an adapter are refused.

    Returns:
        The checkpoint's content; None for a folder, whose names only a detector can tell.

    Raises:
        ConfigError: It is not there or damaged, or holds no adapter.
    """
    from mmdet_gdino_lora.files.read import read_file
    from mmdet_gdino_lora.lora.store.folder import read_folder

    if os.path.isdir(source):
        read_folder(source)
        return None
    content = read_file(source)
    if adapter_wanted and not any('.lora_' in name for name in content.get('state_dict', content)):
        raise ConfigError(
            f'{source} holds no adapter: it is a base, or merged already; give the checkpoint of a '
            'training run, or the folder of an adapter'
        )
    return content


def load_source(detector: Any, source: str, content: Optional[dict]) -> dict:
    """Loads a checkpoint, or the folder of an adapter, into a detector.

    Args:
        detector: As the config describes it.
        source: Checkpoint file, or a folder in PEFT's format.
        content: Of :func:`read_source`.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        ConfigError: The adapter is one of another config or base.
    """
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    from mmdet_gdino_lora.lora.store.folder import folder_as_checkpoint

    content = folder_as_checkpoint(detector, source) if content is None else content
    _load_checkpoint_to_model(detector, content)
    return content.get('meta', {})


def build_runner(cfg: Config) -> Runner:
    """Builds the runner that the config asks for.

    Args:
        cfg: An mmengine ``Config``.

    Returns:
        mmengine's ``Runner``, or the one that ``runner_type`` names.

    Raises:
        ConfigError: What the run begins with is a file that is truncated or no checkpoint, or none
            to resume from; mmengine would find out only when everything else is built.
    """
    from mmdet.registry import RUNNERS
    from mmengine.runner import Runner, find_latest_checkpoint

    from mmdet_gdino_lora.checks.findings import tell
    from mmdet_gdino_lora.checks.resumed import check_checkpoint
    from mmdet_gdino_lora.files.read import read_file

    start = cfg.get('load_from')
    if cfg.get('resume') and not start:
        start = find_latest_checkpoint(cfg.work_dir)
    if start and os.path.isfile(start):
        content = read_file(start)
        if cfg.get('resume'):
            tell(check_checkpoint(cfg, start, content))
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
