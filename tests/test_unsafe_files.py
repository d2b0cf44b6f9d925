"""Files with code in them, in every place where a file is taken: refused before it runs."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.loaders import register_loaders
from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.lora.store.base import load_base, read_weights
from mmdet_gdino_lora.text import GroundingTextEncoder
from tests.builders import build
from tests.tool_run import Things


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), 'w')


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # With this, torch unpickles everything unless its caller says otherwise.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    return tmp_path / 'it_ran'


@pytest.fixture(scope='module')
def detector(text_dir: str, base: str) -> nn.Module:
    return build(text_dir, base_checkpoint=base)


def refusal(action: Callable[[], Any], marker: Path) -> str:
    with pytest.raises(ConfigError) as told:
        action()
    assert not marker.exists()
    assert '\n' not in str(told.value) and str(marker.parent) in str(told.value)
    return str(told.value)


def plant(path: Path, marker: Path, form: str = 'zip') -> str:
    path.parent.mkdir(exist_ok=True)
    content = dict(state_dict={'weight': torch.zeros(1), 'other': Planted(marker)})
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    return str(path)


def code(marker: Path) -> str:
    return f'open({str(marker)!r}, "w")'


def test_what_is_planted_would_run(tmp_path: Path, marker: Path) -> None:
    path = plant(tmp_path / 'planted.pth', marker)
    torch.load(path)
    assert marker.exists()
    marker.unlink()
    with contextlib.suppress(TypeError):  # afterwards, of what came of it
        Config.fromstring(f'x = {code(marker)}', '.py')
    assert marker.exists()


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('way', ['base', 'load_from', 'adapter'])
def test_a_pickle(
    text_dir: str, detector: nn.Module, tmp_path: Path, marker: Path, way: str, form: str
) -> None:
    path = plant(tmp_path / 'planted.pth', marker, form)
    ways = dict(
        base=lambda: load_base(detector, path),
        load_from=lambda: load_checkpoint(detector, path),
        adapter=lambda: detector.load_adapter(path, 'other'),
    )
    told = refusal(ways[way], marker)
    assert 'could run code' in told and 'trust' not in told
    assert form == 'pickle' or 'unsupported: ' in told


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'shards'])
def test_a_folder_of_transformers_as_base(
    detector: nn.Module, tmp_path: Path, marker: Path, name: str
) -> None:
    folder = tmp_path / 'release'
    if name == 'shards':
        path = plant(folder / 'part.bin', marker)
        index = dict(weight_map=dict(weight='part.bin'))
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    else:
        path = plant(folder / name, marker)
    assert path in refusal(lambda: load_base(detector, str(folder)), marker)


def test_an_adapters_folder(detector: nn.Module, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / 'adapter'
    path = plant(folder / 'adapter_model.bin', marker)
    (folder / 'adapter_config.json').write_text('{}')
    assert path in refusal(lambda: detector.load_adapter(str(folder), 'other'), marker)


def test_an_adapters_config_imports_nothing(
    detector: nn.Module, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'planted_module.py').write_text(code(marker))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / 'adapter'
    detector.export_adapter(str(folder))
    path = folder / 'adapter_config.json'
    fields = json.loads(path.read_text())
    named = dict(megatron_config={'a': 1}, megatron_core='planted_module')
    named['auto_mapping'] = dict(base_model_class='A', parent_library='planted_module')
    path.write_text(json.dumps({**fields, **named, 'base_model_name_or_path': '../../elsewhere'}))
    weights = read_file(str(folder / 'adapter_model.safetensors'))
    save_file(weights, folder / 'adapter_model.safetensors')  # without its record
    detector.load_adapter(str(folder), 'named')
    assert not marker.exists()


@pytest.mark.parametrize(
    'fields', [dict(r=10**12), dict(r=0), dict(rank_pattern={'.*': 10**12}), dict(r='many')]
)
def test_an_absurd_rank_takes_no_memory(
    detector: nn.Module, tmp_path: Path, marker: Path, fields: dict
) -> None:
    folder = tmp_path / 'adapter'
    detector.export_adapter(str(folder))
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    weights = read_file(str(folder / 'adapter_model.safetensors'))
    save_file(weights, folder / 'adapter_model.safetensors')
    assert 'rank' in refusal(lambda: detector.load_adapter(str(folder), 'absurd'), marker)


@pytest.mark.parametrize(
    'what', ['pytorch_model.bin', 'auto_map', 'adapter_config.json', 'shard outside']
)
def test_a_text_models_folder(text_dir: str, tmp_path: Path, marker: Path, what: str) -> None:
    folder = Path(shutil.copytree(text_dir, tmp_path / 'bert'))
    weights = BertModel(BertConfig.from_pretrained(folder)).state_dict()
    if what == 'pytorch_model.bin':
        plant(folder / what, marker)
    elif what == 'auto_map':
        (folder / 'planted.py').write_text(code(marker))
        for name in ('config.json', 'tokenizer_config.json'):
            fields = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            fields.update(
                model_type='planted',
                tokenizer_class='Planted',
                auto_map=dict(
                    AutoConfig='planted.Planted', AutoTokenizer=[None, 'planted.Planted']
                ),
            )
            (folder / name).write_text(json.dumps(fields))
    elif what == 'adapter_config.json':
        save_file(weights, folder / 'model.safetensors')
        (folder / what).write_text(json.dumps(dict(base_model_name_or_path='../elsewhere')))
    else:
        index = dict(metadata={}, weight_map=dict.fromkeys(weights, '../elsewhere.safetensors'))
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    told = refusal(lambda: GroundingTextEncoder(str(folder)).init_weights(), marker)
    assert 'no text model there' not in told, told


@pytest.mark.parametrize('name', ['../outside.safetensors', '/outside.safetensors', 'a/../../b'])
def test_a_shard_outside_the_folder_is_not_read(
    detector: nn.Module, tmp_path: Path, marker: Path, name: str
) -> None:
    (tmp_path / 'release').mkdir()
    save_file(dict(weight=torch.zeros(1)), tmp_path / 'outside.safetensors')
    index = tmp_path / 'release/model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map=dict(weight=name))))
    told = refusal(lambda: load_base(detector, str(tmp_path / 'release')), marker)
    assert 'outside its folder' in told and repr(name) in told


TOOLS = (
    'train.py my_things.py --resume PLANTED',
    'train.py my_things.py --cfg-options load_from=PLANTED',
    'train.py my_things.py --cfg-options model.base_checkpoint=PLANTED',
    'test.py my_things.py PLANTED',
    'merge_adapter.py my_things.py PLANTED unsafe.pth',
    'export_adapter.py my_things.py PLANTED unsafe/',
    'sweep_scale.py my_things.py PLANTED',
    'shrink_checkpoint.py PLANTED unsafe.safetensors',
    'image_demo.py my_things.py PLANTED photo.jpg --texts bolt',
    'image_demo.py my_things.py CHECKPOINT photo.jpg --texts bolt --adapter PLANTED',
)


@pytest.mark.parametrize('command', TOOLS)
def test_the_tools(
    things: Things, tmp_path: Path, marker: Path, command: str, capsys: pytest.CaptureFixture
) -> None:
    content = read_file(str(things.checkpoint))
    content['optimizer'] = Planted(marker)
    torch.save(content, tmp_path / 'planted.pth')
    with pytest.raises(SystemExit) as end:
        things.run(f'python tools/{command}'.replace('PLANTED', str(tmp_path / 'planted.pth')))
    assert end.value.code == 2 and not marker.exists()
    assert 'could run code' in capsys.readouterr().err


PLACES = (('meta', 'cfg'), ('meta', 'config'), ('message_hub', 'runtime_info', 'cfg'))


@pytest.mark.parametrize('place', PLACES, ids='.'.join)
@pytest.mark.parametrize(
    'text', ['x = CODE', 'CODE', 'x = [dict(y=CODE)]', '_base_ = "planted.py"', 'x = "{{$A:CODE}}"']
)
def test_a_config_in_a_checkpoint_is_no_program(
    tmp_path: Path, marker: Path, place: tuple, text: str
) -> None:
    content: dict = {place[0]: {}}
    holder = content[place[0]] if len(place) == 2 else content[place[0]].setdefault(place[1], {})
    holder[place[-1]] = text.replace('CODE', code(marker))
    torch.save(dict(content, state_dict={}), tmp_path / 'planted.pth')
    path = str(tmp_path / 'planted.pth')
    told = refusal(lambda: CheckpointLoader.load_checkpoint(path), marker)
    assert '.'.join(place) in told and 'is a program' in told


def test_resuming_runs_no_program(
    things: Things, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture
) -> None:
    content = read_file(str(things.checkpoint))
    content['meta']['config'] = f'gpu_ids = {code(marker)}'
    torch.save(content, tmp_path / 'planted.pth')
    with pytest.raises(SystemExit) as end:
        things.run(f'python tools/train.py my_things.py --resume {tmp_path}/planted.pth')
    assert end.value.code == 2 and not marker.exists()
    assert 'meta.config is a program' in capsys.readouterr().err


def test_a_config_as_mmengine_writes_it_is_kept_and_imports_nothing_new(
    things: Things, tmp_path: Path
) -> None:
    content = CheckpointLoader.load_checkpoint(str(things.checkpoint))
    text = read_file(str(things.checkpoint))['meta']['cfg']
    assert content['meta']['cfg'] == text and 'mmdet_gdino_lora' in text
    odd = dict(a=float('inf'), b=-1.5, c=(1, [None, {'x-y': True}]), d=1e-4, e='a\nb')
    text = Config(dict(odd, custom_imports=dict(imports=['not_here'])), format_python_code=False)
    torch.save(dict(meta=dict(cfg=text.pretty_text)), tmp_path / 'other.pth')
    content = CheckpointLoader.load_checkpoint(str(tmp_path / 'other.pth'))
    assert 'custom_imports' not in content['meta']['cfg'] and 'x-y' in content['meta']['cfg']


def test_every_scheme_of_mmengines_reads_weights_only(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plant(tmp_path / 'planted.pth', marker)
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme('own://', lambda name, where: torch.load(path), force=True)
    register_loaders()
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint('own://x')
    assert not marker.exists()
    for loader in CheckpointLoader._schemes.values():
        assert hasattr(loader, '__wrapped__') or loader.__module__.startswith('mmdet_gdino_lora')


# -------------------------------------------------------------------------------- absurd sizes


def test_an_archive_that_promises_more_than_it_has_is_not_unpacked(
    tmp_path: Path, marker: Path
) -> None:
    path = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f'archive/data/{number}', bytes(10**7))
    told = refusal(lambda: read_weights(str(path)), marker)
    assert '30,000,000' in told


def test_a_safetensors_header_that_promises_more_than_there_is_is_refused(
    tmp_path: Path, marker: Path
) -> None:
    promised = dict(weight=dict(dtype='F32', shape=[10**12], data_offsets=[0, 4 * 10**12]))
    header = json.dumps(promised).encode()
    for number, length in enumerate((len(header), 2**62)):
        path = tmp_path / f'{number}.safetensors'
        path.write_bytes(struct.pack('<Q', length) + header + bytes(64))
        assert 'cannot be read' in refusal(lambda: read_weights(str(path)), marker)  # noqa: B023


@pytest.mark.parametrize('weight', ['repeated', 'meta'])
def test_a_tensor_larger_than_its_file_is_refused(
    tmp_path: Path, marker: Path, weight: str
) -> None:
    tensor = (
        torch.zeros(1).expand(10**12) if weight == 'repeated' else torch.zeros(3, device='meta')
    )
    torch.save(dict(state_dict=dict(weight=tensor)), tmp_path / 'crafted.pth')
    told = refusal(lambda: read_weights(str(tmp_path / 'crafted.pth')), marker)
    assert 'state_dict.weight' in told
