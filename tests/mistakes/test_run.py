"""Mistakes in a run's settings and paths: each is told in one sentence, before anything is built.

A row that lets the run go on is told as a warning; here such a run is ended by the last check of
all, that of the folder to write to, so that nothing is built for it.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import mmdet
import pytest
from mmengine.runner import Runner

from mmdet_gdino_lora.checks.run import check_run
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import lora_state
from mmdet_gdino_lora.lora.inject.presets import adaptable_modules
from mmdet_gdino_lora.lora.inject.size import num_weights
from tests.builders import build
from tests.mistakes.typed import Mistake, files, make, warnings_of_the_log
from tests.run_small import config, run
from tests.tool_run import Things

TRAIN = 'python tools/train.py CONFIG'
#: Ends a run at its last check.
NOWHERE = TRAIN + ' --work-dir my_things.py'
NO_VALIDATION = 'val_dataloader = None\nval_cfg = None\nval_evaluator = None'
LR = 'optim_wrapper = dict(optimizer=dict(lr={}))'


def lora(fields: str) -> str:
    return f'model = dict(lora=dict({fields}))'


RUN = [
    Mistake('a key is misspelt', NOWHERE,
            'optim_wraper at the top of the config is read by nobody; did you mean optim_wrapper',
            'optim_wraper = dict(optimizer=dict(lr=1e-3))', stops=False),
    Mistake('a key is misspelt on the command line', NOWHERE + ' --cfg-options load_form=a.pth',
            'load_form at the top .* did you mean load_from', stops=False),
    Mistake('a key of mmdet 2', NOWHERE,
            'lr_config at the top .* mmdet 3 has param_scheduler in its place',
            "lr_config = dict(policy='step')", stops=False),
    Mistake('an argument of the model stands at the top', NOWHERE,
            r'lora at the top .* write it inside of model=dict\(\.\.\.\), as model\.lora',
            'lora = dict(r=7)', stops=False),
    Mistake('no model', TRAIN, 'model=None: the config describes no model', 'model = None'),
    Mistake('validation is switched off', NOWHERE,
            'val_dataloader=None, val_cfg=None and val_evaluator=None: the run is not validated, '
            "so that no metric .*save_best='auto' keeps none",
            NO_VALIDATION, stops=False),
    Mistake('validation never comes', NOWHERE,
            'train_cfg.val_interval=5 lies behind train_cfg.max_epochs=1: .* never validated',
            'train_cfg = dict(val_interval=5)', stops=False),
    Mistake('the loader of the validation alone is None', TRAIN,
            'val_dataloader is None and val_cfg and val_evaluator are not, .* set val_dataloader, '
            'or val_dataloader=None, val_cfg=None and val_evaluator=None to leave val out',
            'val_dataloader = None'),
    Mistake('no optimizer', TRAIN, 'optim_wrapper is None and train_dataloader and train_cfg',
            'optim_wrapper = None\nparam_scheduler = None'),
    Mistake('nothing to train', TRAIN, 'optim_wrapper=None: there is nothing to train',
            'train_dataloader = None\ntrain_cfg = None\noptim_wrapper = None'),
    Mistake('no images in a batch', TRAIN + ' --cfg-options train_dataloader.batch_size=0',
            'train_dataloader.batch_size=0 is no whole number above 0'),
    Mistake('half an image', TRAIN + ' --cfg-options val_dataloader.batch_size=0.5',
            'val_dataloader.batch_size=0.5 is no whole number'),
    Mistake('fewer workers than none', TRAIN + ' --cfg-options train_dataloader.num_workers=-1',
            'train_dataloader.num_workers=-1 is no whole number from 0 on'),
    Mistake('persistent workers that are none', TRAIN,
            'train_dataloader.persistent_workers=True .*num_workers=0 has none; set persistent',
            'train_dataloader = dict(persistent_workers=True)'),
    Mistake('a learning rate in quotes', TRAIN,
            "optim_wrapper.optimizer.lr='2e-4' is a string; write a number", LR.format("'2e-4'")),
    Mistake('a learning rate of 0', TRAIN, 'optimizer.lr=0: nothing would be learned; set a number',
            LR.format(0)),
    Mistake('a learning rate below 0', TRAIN, 'optimizer.lr=-0.1: nothing', LR.format(-0.1)),
    Mistake('no learning rate', TRAIN, 'optimizer.lr=None is no number', LR.format(None)),
    Mistake('a rank of 0', TRAIN, 'model.lora.r=0 is no whole number above 0', lora('r=0')),
    Mistake('a rank below 0', TRAIN, 'model.lora.r=-4 is no whole number', lora('r=-4')),
    Mistake('half a rank', TRAIN, 'model.lora.r=8.5 is no whole number', lora('r=8.5')),
    Mistake('a rank in words', TRAIN, "model.lora.r='eight' is no whole number", lora("r='eight'")),
    Mistake('a rank of 0 for one layer', TRAIN, r"model.lora.rank_pattern\['self_attn'\]=0 is no",
            lora('rank_pattern=dict(self_attn=0)')),
    Mistake('adapters times 0', TRAIN,
            'model.lora.lora_alpha=0: .* would change nothing; set a number above 0, or leave',
            lora('lora_alpha=0')),
    Mistake('adapters times a word', TRAIN, "model.lora.lora_alpha='r' is no number above 0",
            lora("lora_alpha='r'")),
    Mistake('more dropout than all', TRAIN,
            'model.lora.lora_dropout=2 is no probability; set a number from 0 to below 1',
            lora('lora_dropout=2')),
    Mistake('adapters that are a number', TRAIN + ' --cfg-options model.lora=8',
            r'model.lora=8 is no dict; write lora=dict\(preset=..., r=8\)'),
    Mistake('a misspelt field of the adapter', TRAIN + ' --cfg-options model.lora.lora_alhpa=8',
            r"lora.lora_alhpa is neither .* \(did you mean 'lora_alpha'\?\)"),
    Mistake('names to retain without their key', TRAIN,
            r"model.retain=\['person', 'dog'\] is a list; write retain=dict\(names=\['person', ",
            "model = dict(retain=['person', 'dog'])"),
    Mistake('another key beside the names to retain', TRAIN,
            'model.retain=.* is no dict of the keys names, weight and every; write',
            'model = dict(retain=dict(weigth=2))'),
    Mistake('one name to retain, without brackets', TRAIN,
            "model.retain.names='person': give a list",
            "model = dict(retain=dict(names='person'))"),
    Mistake('a name is to be retained twice', NOWHERE,
            "model.retain.names holds 1 of 2 names more than once, .* first: 'person'; name each",
            "model = dict(retain=dict(names=['person', 'dog', 'Person ']))", stops=False),
    Mistake('retaining with weight 0', TRAIN, 'model.retain.weight=0 is not a number above 0',
            'model = dict(retain=dict(weight=0))'),
    Mistake('an argument that the model has not', TRAIN + ' --cfg-options model.num_query=10',
            r"model.num_query: LoRAGroundingDINO has no such argument .*'num_queries'\?"),
    Mistake('an argument that the head has not', TRAIN,
            r"model.bbox_head.num_class: GroundingDINOCriterionHead has no such .*'num_classes'\?",
            'model = dict(bbox_head=dict(num_class=2))'),
    Mistake('a detector that is not', TRAIN,
            "model.type='LoRAGroundingDino': no model of this name .*'LoRAGroundingDINO'",
            "model = dict(type='LoRAGroundingDino')"),
    Mistake('the folder to write to is a file', NOWHERE, "work_dir='my_things.py': .* is a file"),
    Mistake('the folder to write to lies in a file', TRAIN + ' --work-dir my_things.py/run',
            "work_dir='my_things.py/run': '.*/my_things.py' is a file, .* choose another"),
    Mistake('the folder to write to is not writable', TRAIN + ' --work-dir /proc/run',
            "work_dir='/proc/run': '/proc' cannot be written .* choose another"),
    Mistake('beginning from a checkpoint that would be written over',
            TRAIN + ' --work-dir work_dirs/my_things --cfg-options load_from=CHECKPOINT',
            "load_from='.*epoch_1.pth' lies in work_dir='work_dirs/my_things', where this run "
            'would write over it; choose another folder with --work-dir'),
    Mistake('nothing to resume from', NOWHERE + ' --resume',
            "--resume: there is no checkpoint in 'my_things.py' to go on from, and the run begins "
            'anew; if there should be one, name it', stops=False),
    Mistake('resuming with another learning rate',
            TRAIN + ' --work-dir work_dirs/my_things --resume --cfg-options '
            'optim_wrapper.optimizer.lr=0.01 train_cfg.max_epochs=2',
            'optim_wrapper.optimizer.lr=0.01, but .*epoch_1.pth was trained with 0.0002, '
            'and a resumed run keeps that one; set lr=0.0002'),
    Mistake('resuming from weights alone', TRAIN + ' --resume BASE',
            '--resume: .*base.pth holds weights alone'),
    Mistake('resuming from a file that is not there', TRAIN + ' --resume gone.pth',
            "--resume='gone.pth': no such file"),
]  # fmt: skip


@pytest.mark.parametrize('mistake', RUN, ids=lambda mistake: mistake.what)
def test_it_is_told_in_one_sentence_and_nothing_is_written(
    mistake: Mistake, things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = files(things.folder)
    status, error, warnings = make(mistake, things, tmp_path, capsys)
    assert status == 2
    assert error.startswith('error: ') and error.count('\n') == 1
    if mistake.stops:
        assert re.search(mistake.told, error), error
    else:
        assert "work_dir='my_things.py'" in error  # the end of all checks
        assert [w for w in warnings if re.search(mistake.told, w)], warnings
    assert files(things.folder) == before


@pytest.mark.parametrize(
    'config',
    [
        'my_rate = 0.1\ntrain_size = 3\nseeds = [1]',
        "optimizer = dict(type='AdamW', lr=2e-4)\noptim_wrapper = dict(optimizer=optimizer)",
        'lora = dict(r=4)\nmodel = dict(lora=lora)',
    ],
)
def test_variables_of_a_config_are_not_mistaken_for_keys(
    config: str, things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = Mistake('none', NOWHERE, '', config)
    assert not [w for w in make(row, things, tmp_path, capsys).warnings if 'at the top' in w]


def test_no_name_that_mmdets_own_configs_use_is_taken_for_a_misspelt_key() -> None:
    names = {
        target.id
        for path in (Path(mmdet.__file__).parent / '.mim/configs').rglob('*.py')
        for node in ast.parse(path.read_text(encoding='utf-8')).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {'test_pipeline', 'lang_model_name', 'max_epochs'} <= names
    cfg = dict.fromkeys(names, 0.5)
    assert [f.sentence for f in check_run(cfg, []) if 'at the top' in f.sentence] == []


@pytest.mark.parametrize(
    ('type_and_size', 'module'),
    [
        (dict(preset='decoder', r=10**8), 'a linear layer'),
        (dict(preset='decoder', rank_pattern={'linear|attn': 10**9}), 'some by a pattern'),
    ],
)
def test_a_rank_beyond_all_memory_is_refused_before_anything_of_it_is_built(
    text_dir: str, base: str, type_and_size: dict, module: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=r'model.lora.r=\d+: adapters of this rank on \d+ modules take [\d.e+]+ GiB, .* in '
        'training, and [\\d.]+ GiB of memory are free; choose a smaller rank or fewer modules',
    ):
        build(text_dir, base_checkpoint=base, lora=type_and_size)


def test_the_weights_of_an_adapter_are_counted_as_they_are_then_built(
    text_dir: str, base: str
) -> None:
    fields = dict(preset='all', r=3, rank_pattern={'self_attn.attn': 5})
    detector = build(text_dir, base_checkpoint=base, lora=fields)
    built = sum(p.numel() for n, p in detector.named_parameters() if '.lora_' in n)
    state = lora_state(detector)
    plain = adaptable_modules(build(text_dir, base_checkpoint=base, lora=None))
    counted = num_weights(state.config, {name: plain[name] for name in state.targets})
    assert counted == built


# ---------------------------------------------------------------------- with mmdet's own tools


@pytest.mark.parametrize(
    ('key', 'told'),
    [
        (dict(num_query=3), r"model.num_query: .* no such argument \(did you mean 'num_queries'"),
        (dict(lora=dict(r=8.5)), 'model.lora.r=8.5 is no whole number'),
        (dict(lora=dict(lora_dropout=2)), 'model.lora.lora_dropout=2 is no probability'),
        (dict(lora=8), 'model.lora=8 is no dict'),
        (dict(retain=['dog']), r"write retain=dict\(names=\['dog'\]\)"),
    ],
)
def test_the_detector_itself_tells_it_to_who_brings_two_lines(
    text_dir: str, base: str, key: dict, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        build(text_dir, base_checkpoint=base, **key)


@pytest.fixture(scope='module')
def ended(text_dir: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a run that has ended, of one iteration."""
    work_dir = tmp_path_factory.mktemp('ended')
    run(str(work_dir), text_dir, base, by_epoch=True, epochs=1, batch_size=4)
    return work_dir


class OfMmdet(NamedTuple):
    """A mistake of somebody who runs mmdet's own tools, with PreflightHook in the config."""

    what: str
    told: str
    settings: dict
    stops: bool = True


NEXT = {'train_cfg.max_epochs': 2, 'resume': True}
HOOK = [
    OfMmdet('resuming a finished run', '1 of train_cfg.max_epochs=1 behind it, and nothing is left',
            dict(resume=True), stops=False),
    OfMmdet('resuming with another rate', 'lr=0.01, but the latest checkpoint was trained with',
            {**NEXT, 'optim_wrapper.optimizer.lr': 0.01}),
]  # fmt: skip


@pytest.mark.parametrize('row', HOOK, ids=lambda row: row.what)
def test_the_hook_tells_it_where_mmdets_tools_train(
    row: OfMmdet, text_dir: str, base: str, ended: Path, tmp_path: Path
) -> None:
    work_dir = tmp_path / 'run'
    shutil.copytree(ended, work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    cfg = config(
        str(work_dir),
        text_dir,
        base,
        by_epoch=True,
        epochs=1,
        batch_size=4,
        hooks=[dict(type='PreflightHook')],
    )
    cfg.merge_from_dict(row.settings)
    before = files(work_dir)
    runner = Runner.from_cfg(cfg)
    with warnings_of_the_log() as warnings:
        if row.stops:
            with pytest.raises(ConfigError, match=row.told):
                runner.train()
        else:
            runner.train()
            assert [w for w in warnings if re.search(row.told, w)]
    assert files(work_dir)['epoch_1.pth'] == before['epoch_1.pth']


def test_training_twice_into_one_folder_loses_nothing_and_says_where_it_is(
    text_dir: str,
    base: str,
    ended: Path,
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    work_dir = tmp_path / 'run'
    shutil.copytree(ended, work_dir)
    path = tmp_path / 'again.py'
    config(str(work_dir), text_dir, base, by_epoch=True, epochs=1, batch_size=4).dump(path)
    row = Mistake('', f'python tools/train.py {path}', '')
    for number in (1, 2):
        before = files(work_dir)
        status, _, warnings = make(row, things, tmp_path, capsys)
        told = f"held 1 checkpoint of an earlier run, .* moved to '.*/run/earlier_{number}'"
        assert status == 0 and [w for w in warnings if re.search(told, w)], warnings
        after = files(work_dir)
        for name in ('epoch_1.pth', 'epoch_1_adapter/adapter_model.safetensors', 'last_checkpoint'):
            assert after[f'earlier_{number}/{name}'] == before[name]
            assert after[name] != before[name]


def test_a_run_that_has_ended_says_so_when_resumed_and_keeps_what_it_has(
    text_dir: str, base: str, ended: Path, things: Things, capsys: pytest.CaptureFixture
) -> None:
    path = str(ended / 'again.py')
    config(str(ended), text_dir, base, by_epoch=True, epochs=1, batch_size=4).dump(path)
    before = files(ended)
    row = Mistake('', f'python tools/train.py {path} --resume', '')
    status, _, warnings = make(row, things, ended, capsys)
    told = 'epoch_1.pth is the end of its run, with 1 of train_cfg.max_epochs=1 behind it'
    assert status == 0 and [w for w in warnings if told in w]
    assert files(ended)['epoch_1.pth'] == before['epoch_1.pth']
    assert not list(ended.glob('epoch_2*'))


@pytest.mark.parametrize(
    ('present', 'told'),
    [
        (('epoch_2.pth', 'epoch_10.pth'), 'last_checkpoint, which .* not there; .*/epoch_10.pth'),
        (('last_checkpoint', 'epoch_10.pth'), "names 'gone/epoch_10.pth', .*--resume .*/epoch_10"),
        (('last_checkpoint',), "names 'gone/epoch_10.pth', .* --resume CHECKPOINT"),
    ],
)
def test_a_folder_that_was_moved_or_copied_in_part_is_not_begun_anew(
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    present: tuple[str, ...],
    told: str,
) -> None:
    for name in present:
        (tmp_path / name).write_text('gone/epoch_10.pth')
    before = files(tmp_path)
    row = Mistake('', f'{TRAIN} --work-dir NEW --resume', '')
    status, error, _ = make(row, things, tmp_path, capsys)
    assert status == 2 and re.search(told, error)
    (tmp_path / 'mistake.py').unlink()
    assert files(tmp_path) == before
