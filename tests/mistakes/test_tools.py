"""Mistakes on the command line of the tools: none ends in a traceback, none costs a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.fileio import load
from safetensors.torch import load_file

import gdino_lora
from mmdet_gdino_lora.commands.common import config_file
from mmdet_gdino_lora.lora.store.base import read_weights
from tests.mistakes.typed import Mistake, files, make, warnings_of_the_log
from tests.run_small import config
from tests.tool_run import Things, run_tool

TRAIN = 'python tools/train.py CONFIG'
MERGE = 'python tools/merge_adapter.py my_things.py'
EXPORT = 'python tools/export_adapter.py my_things.py'
DEMO_END = 'photo.jpg --texts "wheel bolt . cracked tile" --score-thr 0 --out NEW/found.png'

TYPED = [
    Mistake('a config with a syntax error', TRAIN,
            r"config '.*mistake.py', line 2: '\(' was never closed; correct that line",
            'model = dict(\n    lora=dict(r=4)'),
    Mistake('a config with a name that is not', TRAIN,
            r"config '.*mistake.py', line 2: NameError: name 'ranks' is not defined; correct that",
            'model = dict(lora=dict(r=ranks))'),
    Mistake('a syntax error in the config of the demo',
            f'python tools/image_demo.py CONFIG CHECKPOINT {DEMO_END}',
            "config '.*mistake.py', line 2: .*; correct that line", 'model = = 3'),
    Mistake('a config that is not there', 'python tools/train.py gone.py', "config 'gone.py': "),
    Mistake('a picture in place of a config', 'python tools/train.py photo.jpg',
            "config 'photo.jpg': .*; give the path of a .py file"),
    Mistake('a folder in place of a config', 'python tools/train.py data', "config 'data': "),
    Mistake('a setting without =', TRAIN + ' --cfg-options model.lora.r',
            "--cfg-options 'model.lora.r': a setting is written KEY=VALUE, without spaces"),
    Mistake('a setting with spaces around =', TRAIN + ' --cfg-options model.lora.r = 8',
            "--cfg-options 'model.lora.r': a setting is written KEY=VALUE, without spaces"),
    Mistake('a setting without a key', TRAIN + ' --cfg-options =8',
            "--cfg-options '=8': a setting is written"),
    Mistake('a setting of merging without =', MERGE + ' CHECKPOINT NEW/a.pth --cfg-options a',
            "--cfg-options 'a': a setting is written KEY=VALUE"),
    Mistake('a bracket that is not closed', TRAIN + ' --cfg-options "model.lora.preset=[all"',
            r"--cfg-options 'model.lora.preset=\[all': a bracket is missing"),
    Mistake('a setting inside of a number', TRAIN + ' --cfg-options model.lora.r.value=8',
            '--cfg-options .*model.lora.r.value.* does not fit .*mistake.py'),
    Mistake('merging a base', MERGE + ' BASE NEW/out.pth',
            'base.pth holds no adapter: it is a base, or merged already; give the checkpoint of a'),
    Mistake('exporting a base', EXPORT + ' BASE NEW/adapter', 'base.pth holds no adapter: '),
    Mistake('merging what is not there', MERGE + ' gone.pth NEW/out.pth',
            "adapter 'gone.pth': no such file or folder"),
    Mistake('merging a folder of images', MERGE + ' data/my_things/train NEW/out.pth',
            'data/my_things/train is a folder without adapter_model.safetensors, .* give the'),
    Mistake('testing a folder of images',
            'python tools/test.py CONFIG data/my_things/train --work-dir NEW',
            'data/my_things/train is a folder without adapter_model.safetensors'),
    Mistake('merging over a file', MERGE + ' CHECKPOINT base.pth',
            "out: 'base.pth' is there already; name another, or write over it with --overwrite"),
    Mistake('exporting over a folder', EXPORT + ' CHECKPOINT ADAPTER',
            "folder: '.*epoch_1_adapter/adapter_config.json' is there already; name another"),
    Mistake('exporting into a file', EXPORT + ' CHECKPOINT photo.jpg',
            "folder 'photo.jpg' is a file; name a folder"),
    Mistake('shrinking over a file',
            'python tools/shrink_checkpoint.py base.pth ADAPTER/adapter_model.safetensors',
            "out: '.*/adapter_model.safetensors' is there already; name another"),
    Mistake('a folder of another rank', 'python tools/merge_adapter.py CONFIG ADAPTER NEW/out.pth',
            'was trained with r=16, the config says lora.r=8; set lora.r=16',
            'model = dict(lora=dict(r=8))'),
]  # fmt: skip


@pytest.mark.parametrize('mistake', TYPED, ids=lambda mistake: mistake.what)
def test_it_is_told_in_one_sentence_and_no_file_changes(
    mistake: Mistake, things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = files(things.folder)
    status, error, _ = make(mistake, things, tmp_path, capsys)
    assert status == 2
    assert error.startswith('error: ') and error.count('\n') == 1
    assert re.search(mistake.told, error), error
    assert 'Traceback' not in error
    assert files(things.folder) == before
    assert not list(tmp_path.rglob('*.pth')) and not list(tmp_path.rglob('adapter*'))


def test_a_syntax_error_in_a_base_of_the_config_names_the_base(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'below.py').write_text('a = 1\nb = (\n')
    (tmp_path / 'above.py').write_text("_base_ = 'below.py'\n")
    row = Mistake('', 'python tools/train.py NEW/above.py', '')
    status, error, _ = make(row, things, tmp_path, capsys)
    assert status == 2 and "/below.py', line 2: '(' was never closed" in error


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    for defect in (ValueError('a'), OSError(5, 'b'), KeyError('c')):
        with pytest.raises(type(defect)):
            gdino_lora.run(lambda defect=defect: (_ for _ in ()).throw(defect))
    path = tmp_path / 'config.py'
    path.write_text('value = __import__("json").loads("{")\n')
    with pytest.raises(ValueError, match='Expecting'):  # raised in json, not in the config
        config_file(str(path))


def test_a_full_disk_is_told_without_a_traceback(capsys: pytest.CaptureFixture) -> None:
    def write() -> None:
        with open('/dev/full', 'wb', buffering=0) as file:
            file.write(b'weights')

    with pytest.raises(SystemExit) as end:
        gdino_lora.run(write)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count('\n') == 1
    assert 'the disk that the run writes to is full' in error and '--resume' in error


def test_a_learning_rate_that_diverges_ends_in_one_sentence(
    text_dir: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = config(str(tmp_path / 'run'), text_dir, base, by_epoch=True, epochs=1)
    cfg.optim_wrapper.optimizer.lr = 1e30
    cfg.param_scheduler = None
    cfg.dump(tmp_path / 'config.py')
    with warnings_of_the_log(), pytest.raises(SystemExit) as end:
        run_tool(f'python tools/train.py {tmp_path}/config.py', tmp_path)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.splitlines()[-1].startswith('error: pred_') and 'lower the learning rate' in error
    assert 'Traceback' not in error


# -------------------------------------------------------------------- what was meant is done


def test_an_adapters_folder_is_merged_exported_and_tested_as_its_checkpoint_is(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = {}
    for name in ('CHECKPOINT', 'ADAPTER'):
        new = tmp_path / name.lower()
        new.mkdir()
        for command in (
            f'{MERGE} {name} NEW/merged.safetensors',
            f'{EXPORT} {name} NEW/adapter',
            f'python tools/image_demo.py my_things.py {name} {DEMO_END}',
        ):
            assert make(Mistake('', command, ''), things, new, capsys).status == 0, command
        weights = read_weights(f'{new}/merged.safetensors')
        factors = load_file(new / 'adapter/adapter_model.safetensors')
        made[name] = weights, factors, (new / 'found.png').read_bytes()
    (merged, factors, picture), (their_merged, their_factors, their_picture) = made.values()
    assert merged.keys() == their_merged.keys() and factors.keys() == their_factors.keys()
    assert [name for name in merged if not torch.equal(merged[name], their_merged[name])] == []
    assert [name for name in factors if not torch.equal(factors[name], their_factors[name])] == []
    assert picture == their_picture


def test_an_adapters_folder_scores_as_its_checkpoint_does(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'found.pkl'
    row = Mistake('', f'python tools/test.py CONFIG ADAPTER --work-dir NEW/run --out {out}', '')
    assert make(row, things, tmp_path, capsys).status == 0
    scores = load(out)[0]['pred_instances']['scores']
    # The checkpoint's, of the same image under the same names.
    image = 'data/my_things/val/0.jpg --texts "wheel bolt . cracked tile" --score-thr 0'
    command = f'python tools/image_demo.py my_things.py {things.checkpoint} {image}'
    run_tool(f'{command} --out {tmp_path}/found.png', things.folder)
    printed = re.findall(r'  (0\.\d\d)  \[', capsys.readouterr().out)
    assert sorted(printed) == sorted(f'{score:.2f}' for score in scores.tolist())
    assert len(set(printed)) > 1


def test_overwriting_is_done_where_it_is_asked_for(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'out.pth').write_text('old')
    row = Mistake('', f'{MERGE} CHECKPOINT NEW/out.pth --overwrite', '')
    assert make(row, things, tmp_path, capsys).status == 0
    assert os.path.getsize(tmp_path / 'out.pth') > 1000
    assert not [name for name in files(tmp_path) if 'partial' in name]
