"""Files that were cut, spliced or mixed up load whole or are refused; never half."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.lora.store.base import load_base
from mmdet_gdino_lora.lora.tensors import base_name, is_factor
from tests.builders import build
from tests.detectors import save

SEEDS = st.integers(0, 2**31)


class Files:
    """A detector, and what may be loaded into it.

    Attributes:
        detector: On its base, with an adapter.
        beside: The same, for adapters beside its own: it stays on a base that is known.
        contents: Checkpoints of it, of its base, and of another adapter.
    """

    def __init__(self, folder: Path, text_dir: str, base: str) -> None:
        self.path = str(folder / 'spliced.pth')
        self.detector = build(text_dir, base_checkpoint=base)
        self.beside = build(text_dir, base_checkpoint=base)
        other = build(text_dir, base_checkpoint=base, lora=dict(r=2, preset='encoder'))
        self.contents = [
            read_file(save(self.detector, folder / 'own.pth')),
            read_file(save(other, folder / 'other.pth')),
            read_file(base),
        ]


@pytest.fixture(scope='module')
def files(text_dir: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp('spliced'), text_dir, base)


def spliced(content: dict, contents: list[dict], chance: random.Random) -> dict:
    """A checkpoint with some of its keys gone, new, of other shapes, or from another one."""
    weights = dict(content['state_dict'])
    for _ in range(chance.randint(0, 3)):
        name = chance.choice(list(weights))
        way = chance.choice(('drop', 'add', 'shape', 'kind', 'splice', 'half'))
        if way == 'drop':
            del weights[name]
        elif way == 'add':
            weights[f'{name}.{chance.choice(("weight", "lora_A.default.weight"))}'] = weights[name]
        elif way == 'shape':
            weights[name] = torch.zeros(chance.choice(((), (1,), (3, 5), (0,))))
        elif way == 'kind':
            weights[name] = chance.choice((None, 'weight', 3, [1.0]))
        elif way == 'splice':
            taken = chance.choice(contents)['state_dict']
            weights.update((n, taken[n]) for n in chance.sample(list(taken), 3))
        else:
            weights = {n: weights[n] for n in chance.sample(list(weights), len(weights) // 2 + 1)}
    return with_metadata(weights, content, chance)


def with_metadata(weights: dict, content: dict, chance: random.Random) -> dict:
    state_dict = type(content['state_dict'])(weights)
    metadata = getattr(content['state_dict'], '_metadata', None)
    if metadata is not None and chance.random() < 0.9:
        state_dict._metadata = dict(metadata)
        own = dict(metadata.get('', {}))
        record = own.get('mmdet_gdino_lora')
        if record and chance.random() < 0.3:
            key = chance.choice(list(record))
            own['mmdet_gdino_lora'] = {
                **record,
                key: chance.choice((None, 'x', 3, [], {}, {'a': 1})),
            }
        state_dict._metadata[''] = own
    return {**content, 'state_dict': state_dict}


def loads_or_leaves_alone(detector: nn.Module, load: Callable[[], Any]) -> bool:
    """Whether it loaded; where it was refused, everything is as it was, bit for bit."""
    before = {name: tensor.clone() for name, tensor in tensors(detector).items()}
    try:
        load()
    except ConfigError as error:
        assert '\n' not in str(error)
        after = tensors(detector)
        assert after.keys() == before.keys()
        assert [n for n in before if not torch.equal(before[n], after[n])] == []
        return False
    return True


def tensors(detector: nn.Module) -> dict[str, Tensor]:
    # PEFT's layers stay where an adapter was taken out; their plain names don't show them.
    found = {**dict(detector.named_parameters()), **dict(detector.named_buffers())}
    return {base_name(name): tensor for name, tensor in found.items()}


@settings(max_examples=40)
@given(seed=SEEDS, which=st.integers(0, 2))
def test_a_checkpoint_loads_whole_or_not_at_all(files: Files, seed: int, which: int) -> None:
    chance = random.Random(seed)
    content = spliced(files.contents[which], files.contents, chance)
    torch.save(content, files.path)
    detector = files.detector
    with torch.no_grad():  # nothing that a checkpoint may bring is there yet
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    if loads_or_leaves_alone(detector, lambda: load_checkpoint(detector, files.path)):
        brought, here = content['state_dict'], tensors(detector)
        for name, tensor in brought.items():
            assert torch.equal(here[base_name(name)], tensor), name
        trained = [n for n, p in detector.named_parameters() if p.requires_grad and is_factor(n)]
        assert not any(map(is_factor, brought)) or set(trained) <= brought.keys()


@settings(max_examples=40)
@given(seed=SEEDS, which=st.integers(0, 2))
def test_an_adapter_beside_others_loads_whole_or_not_at_all(
    files: Files, seed: int, which: int
) -> None:
    content = spliced(files.contents[which], files.contents, random.Random(seed))
    torch.save(content, files.path)
    detector, name = files.beside, f'adapter{seed}'
    loads_or_leaves_alone(detector, lambda: detector.load_adapter(files.path, name))


@settings(max_examples=40)
@given(seed=SEEDS, which=st.integers(0, 2))
def test_a_base_loads_whole_or_not_at_all(
    files: Files, plain: nn.Module, seed: int, which: int
) -> None:
    content = spliced(files.contents[which], files.contents, random.Random(seed))
    torch.save(content, files.path)
    loads_or_leaves_alone(plain, lambda: load_base(plain, files.path))


@pytest.fixture(scope='module')
def plain(text_dir: str) -> nn.Module:
    return build(text_dir, lora=None)


@settings(max_examples=40)
@given(seed=SEEDS, which=st.integers(0, 2))
def test_a_file_that_was_cut_is_refused(files: Files, seed: int, which: int) -> None:
    chance = random.Random(seed)
    torch.save(files.contents[which], files.path)
    whole = Path(files.path).read_bytes()
    Path(files.path).write_bytes(whole[: chance.randrange(len(whole))])
    with pytest.raises(ConfigError):
        load_checkpoint(files.detector, files.path)


def test_a_trained_weight_that_is_gone_is_missed(files: Files) -> None:
    content = files.contents[0]
    name = next(n for n in content['state_dict'] if not is_factor(n) and 'label' not in n)
    rest = {n: w for n, w in content['state_dict'].items() if n != name}
    state_dict = type(content['state_dict'])(rest)
    state_dict._metadata = content['state_dict']._metadata
    torch.save({**content, 'state_dict': state_dict}, files.path)
    with pytest.raises(ConfigError, match='lacks'):
        load_checkpoint(files.detector, files.path)
