"""Launchers start the ranks: ours, mmdet's, torchrun, SLURM's script; on one node and on two."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load

from tests.tool_run import TOOLS, Things, base_for, block, inside, small, write_data
from tests.warm import warm_python

MMDETS = Path(mmdet.__file__).parent / '.mim/tools'
#: How each starts the training of `cat.py` on a node; {port} and {node} are filled in.
LAUNCHERS = {
    'dist_train.sh': f'bash {TOOLS}/dist_train.sh cat.py 1',
    "mmdet's dist_train.sh": f'bash {MMDETS}/dist_train.sh cat.py 1',
    'torchrun': 'python -m torch.distributed.run --nnodes 2 --node_rank {node} --nproc_per_node 1'
    f' --master_addr 127.0.0.1 --master_port {{port}} {TOOLS}/train.py cat.py --launcher pytorch',
}
SRUN = """\
#!/usr/bin/env bash
# A cluster of one task: notes what was asked for and runs the command.
echo "$@" > "$SRUN_LOG"
while [ "$1" != python ]; do shift; done
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1
exec "$@"
"""


@pytest.fixture(scope='module')
def python() -> Iterator[Path]:
    """An interpreter that has imported what training needs."""
    with warm_python() as program:
        (program.parent / 'srun').write_text(SRUN)
        (program.parent / 'srun').chmod(0o755)
        yield program


class Node:
    """A machine of the job, whose launcher is a process of its own.

    Args:
        python: The interpreter on its PATH.
        command: A line for a shell.
        folder: Where it is typed.
        **environment: Variables beside the test's own.
    """

    def __init__(self, python: Path, command: str, folder: Path, **environment: str) -> None:
        path = f'{python.parent}:{os.environ["PATH"]}'
        self._process = subprocess.Popen(
            command,
            shell=True,
            cwd=folder,
            env=dict(
                os.environ, PATH=path, PYTHON_EXEC=str(python), OMP_NUM_THREADS='1', **environment
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def said(self) -> str:
        """Waits for its end, which is to be a good one."""
        output, _ = self._process.communicate(timeout=180)
        assert self._process.returncode == 0, output[-4000:]
        return output


def free_port() -> str:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


# ------------------------------------------------------------------------------ two nodes, one rank


@pytest.fixture(scope='module')
def cats(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a config of mmdet's with the README's two lines, and nothing left to chance."""
    folder = tmp_path_factory.mktemp('cats')
    stock = 'mm_grounding_dino/grounding_dino_swin-t_finetune_8xb4_20e_cat.py'
    (folder / 'cat.py').write_text(
        f"_base_ = 'mmdet::{stock}'\n" + block("model = dict(type='LoRAGroundingDINO', lora=dict(")
    )
    write_data(folder / 'data/cat', ('cat',), ('trainval', 'test'))
    with inside(folder):
        cfg = small(Config.fromfile('cat.py'))
    cfg.model.language_model.name = text_dir
    cfg.load_from = base_for(cfg, folder / 'base.pth')
    cfg.train_dataloader.dataset.data_prefix.img = 'trainval/'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    # Dropout, denoising and augmentation draw numbers of their own on every rank.
    cfg.model.dn_cfg = None
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.model.encoder.fusion_layer_cfg.update(dropout=0.0, drop_path=0.0)
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [s for s in pipeline if s['type'] != 'RandomFlip']
    cfg.train_cfg.max_epochs = 3
    cfg.default_hooks.checkpoint.interval = 3
    cfg.param_scheduler = []
    # Adam's step has the size of its noise.
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.5, weight_decay=0.0)
    cfg.dump(folder / 'cat.py')
    return folder


def adapters(work_dir: Path) -> dict[str, torch.Tensor]:
    weights = torch.load(work_dir / 'epoch_3.pth', weights_only=False)['state_dict']
    return {name: weight for name, weight in weights.items() if '.lora_' in name}


@pytest.fixture(scope='module')
def alone(python: Path, cats: Path) -> dict[str, torch.Tensor]:
    """Adapters after training in one process, by mmdet's own train.py, on the whole batch."""
    options = '--cfg-options train_dataloader.batch_size=2'
    Node(python, f'python {MMDETS}/train.py cat.py --work-dir alone {options}', cats).said()
    return adapters(cats / 'alone')


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_two_nodes_train_as_one_process_with_the_whole_batch(
    python: Path, cats: Path, alone: dict[str, torch.Tensor], tmp_path: Path, launcher: str
) -> None:
    port = free_port()
    nodes = [
        Node(
            python,
            LAUNCHERS[launcher].format(port=port, node=node) + f' --work-dir {tmp_path}',
            cats,
            NNODES='2',
            NODE_RANK=str(node),
            MASTER_ADDR='127.0.0.1',
            PORT=port,
        )
        for node in (0, 1)
    ]
    said, _ = [node.said() for node in nodes]
    assert 'Distributed training: True' in said and 'GPU number: 2' in said
    together = adapters(tmp_path)
    assert together.keys() == alone.keys()
    assert max(alone[name].abs().max() for name in alone if 'lora_B' in name) > 1e-3
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- one node


def test_dist_train_and_dist_test_start_the_ranks(
    python: Path, things: Things, tmp_path: Path
) -> None:
    work_dir = f'{tmp_path}/work dir'  # with a blank

    def launched(command: str) -> str:
        return Node(python, f'bash {TOOLS}/{command}', things.folder, PORT=free_port()).said()

    said = launched(f'dist_train.sh my_things.py 2 --work-dir "{work_dir}"')
    assert 'Distributed training: True' in said and 'GPU number: 2' in said
    checkpoint = f'{work_dir}/epoch_1.pth'
    assert os.path.isfile(checkpoint)
    out = f'{tmp_path}/found.pkl'
    launched(f'dist_test.sh my_things.py "{checkpoint}" 1 --work-dir "{work_dir}" --out "{out}"')
    assert len(load(out)) == 2


@pytest.mark.parametrize('script', [TOOLS / 'slurm_train.sh', MMDETS / 'slurm_train.sh'])
def test_slurm_train_asks_for_the_jobs_size_and_trains(
    python: Path, things: Things, tmp_path: Path, script: Path
) -> None:
    work_dir = f'{tmp_path}/work_dir'
    for path in things.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'tools').symlink_to(MMDETS)  # mmdet's script is typed in a clone of mmdet
    said = Node(
        python,
        f'bash {script} part "a job" my_things.py {work_dir} --cfg-options randomness.seed=3',
        tmp_path,
        GPUS='1',
        GPUS_PER_NODE='1',
        SRUN_ARGS='--quiet --exclusive',
        SRUN_LOG=str(tmp_path / 'srun.log'),
        MASTER_PORT=free_port(),
    ).said()
    asked = (tmp_path / 'srun.log').read_text()
    options = ('-p part', '--job-name=a job', '--gres=gpu:1', '--ntasks=1', '--quiet --exclusive')
    assert [option for option in options if option not in asked] == []
    assert 'seed = 3' in said or 'seed=3' in said
    assert os.path.isfile(f'{work_dir}/epoch_1.pth')
