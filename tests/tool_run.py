"""The README's own example, small enough to run: data, config, base, and its commands."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config

import gdino_lora
from tests.builders import build_cfg, write_base
from tests.run_small import ON_CPU

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
TOOLS = ROOT / 'tools'
IMAGE_SIZE = 64


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf'^```{language}\n(.*?)^```', README, flags=re.M | re.S)


def block(part: str) -> str:
    """The one Python block of the README that holds a text."""
    (found,) = [code for code in blocks('python') if part in code]
    return found


def write_data(root: Path, classes: Sequence[str], splits: Sequence[str]) -> None:
    """Writes noise with boxes, in COCO's format: ROOT/SPLIT/ and ROOT/annotations/SPLIT.json."""
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    for split in splits:
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(2):
            name = f'{number}.jpg'
            noise = rng.integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            cv2.imwrite(str(root / split / name), noise)
            images.append(dict(id=number, file_name=name, width=IMAGE_SIZE, height=IMAGE_SIZE))
            for label in range(len(classes)):
                x, y = rng.integers(0, 30, 2).tolist()
                box = dict(bbox=[x, y, 20, 24], area=480, iscrowd=0, category_id=label + 1)
                annotations.append(dict(box, id=len(annotations) + 1, image_id=number))
        categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def small(cfg: Config) -> Config:
    """Takes a config of mmdet's size down to what a CPU trains in seconds; its ways stay."""
    cfg.model.num_queries = 20
    cfg.model.backbone.update(
        embed_dims=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], with_cp=False, init_cfg=None
    )
    cfg.model.neck.in_channels = [12 * 2**stage for stage in cfg.model.backbone.out_indices]
    cfg.model.encoder.update(num_layers=1, num_cp=0)
    cfg.model.decoder.num_layers = 2
    cfg.model.test_cfg.max_per_img = 20
    cfg.model_wrapper_cfg = ON_CPU
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    cfg.env_cfg.mp_cfg.mp_start_method = 'fork'
    cfg.randomness = dict(seed=0)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.default_hooks.logger.interval = 1
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].update(batch_size=1, num_workers=0, persistent_workers=False)
        dataset = cfg[name].dataset
        while 'dataset' in dataset:  # wrapped
            dataset = dataset.dataset
        dataset.pipeline = list(map(_small_transform, dataset.pipeline))
    return cfg


def _small_transform(step: dict) -> dict:
    if step['type'] == 'RandomChoice' or 'Resize' in step['type']:
        return dict(type='Resize', scale=(IMAGE_SIZE, IMAGE_SIZE), keep_ratio=True)
    return step


def base_for(cfg: Config, path: Path) -> str:
    """Writes a base of the config's architecture."""
    model = copy.deepcopy(cfg.model)
    model.update(type='LoRAGroundingDINO', lora=None, retain=None, base_checkpoint=None)
    # The text model is a config and a vocabulary; its weights are drawn here.
    model.language_model.init_cfg = dict(type='Normal', layer=['Linear', 'Embedding'], std=0.5)
    torch.manual_seed(0)
    return write_base(build_cfg(model), str(path))


@contextmanager
def inside(folder: Path, **environment: str) -> Iterator[None]:
    """Works in a folder, with variables set in the environment."""
    before, old = os.getcwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(old)


def run_tool(command: str, folder: Path) -> None:
    """Runs ``python tools/x.py ...`` as the shell would, but in this process: imports take long.

    Args:
        command: As in the README.
        folder: Where it is typed.

    Raises:
        SystemExit: The tool ended with another status than 0.
    """
    python, script, *arguments = shlex.split(command, comments=True)
    assert python == 'python' and script.startswith('tools/'), command
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        with inside(folder):
            runpy.run_path(str(ROOT / script), run_name='__main__')
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path


def run_typed(command: str, folder: Path) -> None:
    """Runs ``gdino-lora ...``, ``python -m mmdet_gdino_lora ...`` or a file of tools/, as above.

    Args:
        command: As in the README.
        folder: Where it is typed.

    Raises:
        SystemExit: It ended with another status than 0.
    """
    typed = re.sub('^python -m mmdet_gdino_lora', 'gdino-lora', command)
    if not typed.startswith('gdino-lora'):
        run_tool(command, folder)
        return
    argv, started = sys.argv, gdino_lora.starts
    sys.argv = shlex.split(typed, comments=True)
    try:
        with inside(folder):
            gdino_lora.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, gdino_lora.starts = argv, started


def python_of_launcher(command: Sequence[object], folder: Path, programs: Path) -> str:
    """Starts a launcher whose ``python`` says what it is called with, and does nothing.

    Args:
        command: Words of the command line.
        folder: Where it is typed.
        programs: Where that ``python`` is written.

    Returns:
        What the launcher and it said.
    """
    programs.mkdir(exist_ok=True)
    (programs / 'python').write_text('#!/usr/bin/env bash\necho "$@"\n')
    (programs / 'python').chmod(0o755)
    env = dict(os.environ, PATH=f'{programs}:{os.environ["PATH"]}')
    words = list(map(str, command))
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True).stdout


def dry_make(command: str) -> None:
    """`make -n`: that there is such a goal; whole, it makes an environment and runs this suite."""
    done = subprocess.run([*command.split(), '-n'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def dry_pip(command: str) -> None:
    """Without writing, and without the network: the metadata is built and the ranges are met."""
    pip = [sys.executable, '-m', *command.split(), '--dry-run', '--no-deps', '--no-index']
    done = subprocess.run([*pip, '--no-build-isolation'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'mmdet-gdino-lora' in done.stdout


class Things:
    """The run of the README's section on own data: its config, made small, and its checkpoint.

    Attributes:
        folder: Where the README's commands are typed.
        checkpoint: What the README's train command wrote.
        base: Base checkpoint.
    """

    def __init__(self, folder: Path, text_dir: str) -> None:
        self.folder = folder
        write_data(folder / 'data/my_things', ('wheel bolt', 'cracked tile'), ('train', 'val'))
        cv2.imwrite(str(folder / 'photo.jpg'), cv2.imread(f'{folder}/data/my_things/val/0.jpg'))
        shutil.copytree(folder / 'data/my_things/val', folder / 'photos')
        (folder / 'written').mkdir()
        (folder / 'written/configs').symlink_to(ROOT / 'configs')
        (folder / 'written/my_things.py').write_text(block('# my_things.py'))
        with inside(folder, LANG_MODEL=text_dir):
            cfg = small(Config.fromfile('written/my_things.py'))
        self.base = base_for(cfg, folder / 'base.pth')
        cfg.model.base_checkpoint = self.base
        cfg.dump(folder / 'my_things.py')
        run_tool('python tools/train.py my_things.py', folder)
        self.checkpoint = folder / 'work_dirs/my_things/epoch_1.pth'

    def run(self, command: str) -> None:
        """Runs a command of the README's, with this run's names for its checkpoint and photo."""
        stands_for = {
            'work_dirs/my_things/epoch_12.pth': str(self.checkpoint),
            'CHECKPOINT': str(self.checkpoint),
        }
        for name, path in stands_for.items():
            command = command.replace(name, path)
        run_typed(command, self.folder)
