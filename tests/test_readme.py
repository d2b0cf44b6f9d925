"""Every command and every snippet of the README runs, in a short form; nothing new slips in."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Callable

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

import gdino_lora
from mmdet_gdino_lora import GroundingDINOCriterion, NonFiniteHook, ResumableSeedHook
from mmdet_gdino_lora.lora import lora_state
from mmdet_gdino_lora.text import token_labels
from tests.builders import build
from tests.detectors import train
from tests.tool_run import (
    README,
    ROOT,
    TOOLS,
    Things,
    block,
    blocks,
    dry_make,
    dry_pip,
    python_of_launcher,
    run_typed,
)

# ---------------------------------------------------------------------------------- commands


def dry(things: Things, command: str) -> None:
    """`make -n`, or pip without writing and without the network."""
    (dry_make if command.startswith('make') else dry_pip)(command)


def ours(things: Things, command: str) -> None:
    """As it stands, on the run of the README's own config."""
    things.run(command)


def its_help(things: Things, command: str) -> None:
    """Its arguments are parsed: it takes minutes and more, or the network, to run."""
    parsed = re.sub(r' --help$', '', command) + ' --help'
    with pytest.raises(SystemExit) as end:
        run_typed(parsed, things.folder)
        raise SystemExit(0)
    assert not end.value.code


def of_photos(things: Things, command: str) -> None:
    """On the photos of that run, into a config of their own."""
    photos = command.replace('PHOTOS', 'data/my_things --overwrite -o of_photos.py')
    run_typed(photos, things.folder)
    cfg = Config.fromfile(things.folder / 'of_photos.py')
    assert cfg.train_dataloader.dataset.metainfo.classes == ('wheel bolt', 'cracked tile')


def launcher(things: Things, command: str) -> None:
    """Its command line: tests/test_launchers.py runs it whole."""
    bash, script, *arguments = shlex.split(command)
    command_line = [bash, ROOT / script, *arguments]
    said = python_of_launcher(command_line, things.folder, things.folder / 'bin')
    assert f'--nproc_per_node={arguments[1]} {TOOLS}/train.py {arguments[0]}' in said


#: Each command of the README, as it stands there, and the way it is run here.
COMMANDS: dict[str, Callable[[Things, str], None]] = {
    'make demo': dry,
    'make test': dry,
    'make gpu': dry,
    'make test-faults': dry,
    'make env': dry,
    'make stack-lowest PYTHON=python3.10': dry,
    'make stack-highest PYTHON=python3.12': dry,
    'make test STACK=onedl': dry,
    'pip install .': dry,
    'python -m mmdet_gdino_lora': its_help,
    'gdino-lora --help': its_help,
    'gdino-lora train gdino_lora_coco': its_help,
    'gdino-lora new-config PHOTOS': of_photos,
    'gdino-lora check-dataset my_things.py': ours,
    'gdino-lora browse-dataset my_things.py': ours,
    'gdino-lora train my_things.py': ours,
    'bash tools/dist_train.sh my_things.py 2': launcher,
    'gdino-lora test my_things.py work_dirs/my_things/epoch_12.pth': ours,
    'gdino-lora image-demo my_things.py work_dirs/my_things/epoch_12.pth photo.jpg'
    ' --texts "wheel bolt . cracked tile"': ours,
    'gdino-lora playground my_things.py work_dirs/my_things/epoch_12.pth': its_help,
    'gdino-lora label my_things.py work_dirs/my_things/epoch_12.pth photos/ -o more.json': ours,
    'gdino-lora report work_dirs/my_things': ours,
    'gdino-lora export my_things.py CHECKPOINT adapter/': ours,
    'gdino-lora merge my_things.py CHECKPOINT out.pth --scale 0.5': ours,
    'gdino-lora export-onnx my_things.py CHECKPOINT out.onnx': its_help,
    'gdino-lora replay my_things.py work_dirs/my_things/nonfinite_iter_N.pth': its_help,
    'gdino-lora sweep --help': its_help,
    'python tools/benchmarks/forgetting.py': its_help,
    'python tools/benchmarks/criterion.py': its_help,
    'python tools/benchmarks/step.py': its_help,
}


def commands_of_the_readme() -> list[str]:
    lines = [line for code in blocks('shell') for line in code.splitlines()]
    prose = re.sub(r'^```.*?^```', '', README, flags=re.M | re.S)
    lines += re.findall(r'`((?:gdino-lora|python|make|pip|bash) [^`]+)`', prose)
    commands = [re.split(r'\s+# ', line)[0].strip() for line in lines]
    return sorted({command for command in commands if command and not command.startswith('#')})


def test_the_table_knows_every_command() -> None:
    assert commands_of_the_readme() == sorted(COMMANDS)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_runs(things: Things, command: str) -> None:
    COMMANDS[command](things, command)


# ---------------------------------------------------------------------------------- snippets


def as_written(code: str) -> dict:
    """What a snippet defines."""
    names: dict = {}
    exec(code, names)
    return names


def two_lines(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    defined = as_written(code)
    assert defined['custom_imports']['imports'] == ['mmdet_gdino_lora']
    detector = build(text_dir, base_checkpoint=base, **defined['model'])
    assert lora_state(detector).config.r == defined['model']['lora']['r'] == 16


def own_data(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'my_things.py').write_text(code)
    cfg = Config.fromfile(tmp_path / 'my_things.py')  # the fixture `things` trains it
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.metainfo.classes == ('wheel bolt', 'cracked tile')
    assert cfg.test_evaluator.ann_file == 'data/my_things/annotations/val.json'


def criterion_settings(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    (settings,) = as_written(f'settings = dict({code})')['settings'].values()
    criterion = MODELS.build(dict(settings, num_classes=2, num_decoder_layers=2))
    default = GroundingDINOCriterion(num_classes=2, num_decoder_layers=2)
    assert criterion.weight_dict == default.weight_dict  # the README shows the defaults


def retained_names(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    model = as_written(code)['model']
    weight, every = re.search(r'# weight=([\d.]+), every=(\d+)', code).groups()
    detector = build(text_dir, base_checkpoint=base, **model)
    assert (detector.retention.weight, detector.retention.every) == (float(weight), int(every))
    assert all(train(detector, steps=2).values())


def routed_names(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    for written in re.split(r'^(?=model = )', code, flags=re.M)[1:]:
        there = written.replace('work_dirs/cards/epoch_12.pth', base)
        detector = build(text_dir, base_checkpoint=base, **as_written(there)['model'])
        named = re.search(r'names=({.*?})', written)
        assert detector.route.names == (eval(named.group(1)) if named else {})


def without_mmdet(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    _, tokens = token_labels(['cat', 'hot dog'], [1, 0], text_dir)
    torch.manual_seed(0)

    def predictions() -> dict:
        logits = torch.randn(1, 5, tokens.shape[1], requires_grad=True)
        return dict(pred_logits=logits, pred_boxes=torch.rand(1, 5, 4) * 0.3 + 0.2)

    outputs = dict(
        predictions(),
        aux_outputs=[predictions() for _ in range(5)],
        enc_outputs=predictions(),
        text_token_mask=torch.ones(1, tokens.shape[1], dtype=torch.bool),
    )
    boxes = torch.rand(2, 4) * 0.3 + 0.2
    targets = [dict(labels=torch.tensor([1, 0]), boxes=boxes, token_labels=tokens)]
    names = dict(outputs=outputs, targets=targets)
    exec(code.replace('bert-base-uncased', text_dir), names)
    assert torch.equal(names['targets_of_tokens'], tokens) and names['caption'] == 'cat. hot dog.'
    assert len(names['losses']) == 21
    names['total'].backward()
    assert outputs['pred_logits'].grad.any()


def hooks(code: str, text_dir: str, base: str, tmp_path: Path) -> None:
    shipped = Config.fromfile(ROOT / 'configs/gdino_lora_coco.py').custom_hooks
    assert as_written(code)['custom_hooks'] == shipped
    defaults = dict(re.findall(r'(max_\w+)=(\d+)', code))
    for hook in (ResumableSeedHook, NonFiniteHook):
        for name, default in inspect.signature(hook).parameters.items():
            if name in defaults:
                assert int(defaults.pop(name)) == default.default
    assert not defaults


#: A text that stands in one snippet of the README alone, and the way it is run here.
SNIPPETS: dict[str, Callable[[str, str, str, Path], None]] = {
    "model = dict(type='LoRAGroundingDINO', lora=dict(": two_lines,
    '# my_things.py': own_data,
    "criterion=dict(type='GroundingDINOCriterion', ce_weight": criterion_settings,
    '# weight=1.5, every=1': retained_names,
    'test_cfg=dict(route=True)': routed_names,
    'from mmdet_gdino_lora import build_criterion': without_mmdet,
    "dict(type='PreemptHook')": hooks,
}


def test_the_table_knows_every_snippet() -> None:
    languages = re.findall(r'^```(\w*)\n.*?^```', README, flags=re.M | re.S)
    assert set(languages) <= {'shell', 'python', 'console'}
    assert sorted(blocks('python')) == sorted(block(part) for part in SNIPPETS)


def test_what_was_printed_was_asked_of_commands_that_there_are() -> None:
    (story,) = blocks('console')
    typed = re.findall(r'^\$ gdino-lora (\S+)', story, flags=re.M)
    assert typed and set(typed) <= set(gdino_lora.COMMANDS)


@pytest.mark.parametrize('part', SNIPPETS)
def test_a_snippet_runs(part: str, text_dir: str, base: str, tmp_path: Path) -> None:
    SNIPPETS[part](block(part), text_dir, base, tmp_path)
