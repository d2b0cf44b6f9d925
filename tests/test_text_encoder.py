"""The text encoder, against mmdet's own with transformers' missing parts put back."""

from __future__ import annotations

import copy
import io
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.language_models import BertModel as MMDetBertModel
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import GroundingTextEncoder
from mmdet_gdino_lora.text.cache import Memo

SPECIAL = ['[CLS]', '[SEP]', '.', '?']
NAMES = [
    'cat',
    'hot dog',
    'red star',
    'small bird-cat',
    'what? person',
    'unknownword',
    'dog',
    'car',
]


@pytest.fixture(scope='module')
def bert_dir(text_dir, tmp_path_factory):
    """The tiny text model with weights, wide enough that nothing is lost in rounding."""
    folder = str(tmp_path_factory.mktemp('bert') / 'model')
    shutil.copytree(text_dir, folder)
    torch.manual_seed(0)
    model = BertModel(BertConfig.from_pretrained(folder))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def build(folder, frozen=True, **kwargs):
    encoder = MODELS.build(
        dict(
            type='GroundingTextEncoder',
            name=folder,
            use_sub_sentence_represent=True,
            special_tokens_list=SPECIAL,
            **kwargs,
        )
    )
    encoder.init_weights()
    return encoder.requires_grad_(not frozen).eval()


def stock(folder, **kwargs):
    """mmdet's ``BertModel``: ``batch_encode_plus`` and the [B, T, T] mask work again."""
    model = MMDetBertModel(
        folder, use_sub_sentence_represent=True, special_tokens_list=SPECIAL, **kwargs
    ).eval()
    if not hasattr(model.tokenizer, 'batch_encode_plus'):
        model.tokenizer.batch_encode_plus = model.tokenizer.__call__
    if transformers.__version__.startswith('4.'):
        return model  # takes its mask as it is

    def additive(module, args, kwargs):
        mask = torch.zeros(kwargs['attention_mask'].shape)
        mask.masked_fill_(~kwargs['attention_mask'], torch.finfo(torch.float32).min)
        return args, {**kwargs, 'attention_mask': mask[:, None]}

    bert = model.language_backbone.body.model
    bert.register_forward_pre_hook(additive, with_kwargs=True)
    return model


def caption(names):
    return ''.join(f'{name}. ' for name in names)


def assert_same(ours, theirs, atol=2e-6):
    assert set(ours) == set(theirs) == {
        'embedded', 'hidden', 'masks', 'position_ids', 'text_token_mask',
    }  # fmt: skip
    for key in ('masks', 'position_ids', 'text_token_mask'):
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key])
    for key in ('embedded', 'hidden'):
        torch.testing.assert_close(ours[key], theirs[key], atol=atol, rtol=1e-5)


@pytest.mark.parametrize('pad_to_max', [False, True])
@pytest.mark.parametrize('num_layers', [1, 2])
def test_features_equal_mmdets(bert_dir, pad_to_max, num_layers):
    kwargs = dict(max_tokens=64, pad_to_max=pad_to_max, num_layers_of_embedded=num_layers)
    ours, theirs = build(bert_dir, **kwargs), stock(bert_dir, **kwargs)
    captions = [caption(NAMES), caption(NAMES[:2]), caption(NAMES)]
    with torch.no_grad():
        for _ in range(2):  # encoded, then remembered
            assert_same(ours(captions), theirs(captions))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from(NAMES), max_size=8), min_size=1, max_size=4))
def test_features_of_any_batch_equal_mmdets(bert_dir, batch):
    kwargs = dict(max_tokens=64, pad_to_max=False)
    ours, theirs = _models(bert_dir, **kwargs)
    captions = [caption(names) for names in batch]
    with torch.no_grad():
        assert_same(ours(captions), theirs(captions))


_built: dict = {}


def _models(folder, **kwargs):
    if folder not in _built:
        _built[folder] = build(folder, **kwargs), stock(folder, **kwargs)
    return _built[folder]


def test_a_caption_too_long_is_cut_as_mmdet_does(bert_dir):
    captions = [caption(NAMES * 4)]
    with torch.no_grad():
        ours, theirs = (
            make(bert_dir, max_tokens=32, pad_to_max=False)(captions) for make in (build, stock)
        )
    assert ours['embedded'].shape[1] == 32
    assert_same(ours, theirs)


def test_parameters_have_mmdets_names_and_old_checkpoints_load(bert_dir):
    ours, theirs = build(bert_dir), stock(bert_dir)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    state['language_backbone.body.model.embeddings.position_ids'] = torch.arange(256)[None]
    assert not any(ours.load_state_dict(dict(state), strict=False))
    assert 'language_backbone.body.model.embeddings.position_ids' in state
    holder = torch.nn.ModuleDict(dict(language_model=ours))
    prefixed = {f'language_model.{key}': value for key, value in state.items()}
    assert not any(holder.load_state_dict(prefixed, strict=False))
    load_state_dict(holder, prefixed, strict=True)


def test_gradients_equal_mmdets_with_and_without_checkpointing(bert_dir):
    captions = [caption(NAMES), caption(NAMES[2:5])]
    gradients = []
    models = [
        stock(bert_dir, pad_to_max=False),
        build(bert_dir, frozen=False, pad_to_max=False),
        build(bert_dir, frozen=False, pad_to_max=False, use_checkpoint=True),
    ]
    for model in models:
        torch.manual_seed(1)
        features = model(captions)
        valid = features['text_token_mask'][..., None]
        weights = torch.randn(features['embedded'].shape)
        (features['embedded'] * weights * valid).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys()
    for name, expected in gradients[0].items():
        scale = expected.abs().max()
        # softmax takes no notice of a bias on all keys: their gradients are rounding errors
        atol = 1e-3 if name.endswith('key.bias') else float(1e-4 * scale)
        torch.testing.assert_close(gradients[1][name], expected, atol=atol, rtol=1e-4)
        torch.testing.assert_close(gradients[2][name], gradients[1][name], atol=atol, rtol=1e-6)


def count_rows(encoder):
    """Counts the rows that go through BERT."""
    rows = []
    encoder.language_backbone.body.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    return rows


def test_features_do_not_depend_on_what_was_encoded_before(bert_dir):
    first, second = build(bert_dir, pad_to_max=False), build(bert_dir, pad_to_max=False)
    first([caption(NAMES)])
    second([caption(NAMES[4:5])])
    second([caption(NAMES[::-2]), caption(['a b c d e f g h i'])])
    captions = [caption(NAMES[1:]), caption(NAMES[:3])]
    trainable = build(bert_dir, frozen=False, pad_to_max=False)
    results = [model(captions)['embedded'] for model in (first, second, trainable)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_frozen_encoder_runs_once_per_segment_without_graph_or_dropout(bert_dir):
    encoder = build(bert_dir).train()
    rows = count_rows(encoder)
    expected = build(bert_dir)([caption(NAMES)])['embedded']
    features = encoder([caption(NAMES)])['embedded']
    assert torch.equal(features, expected) and not features.requires_grad
    assert rows
    rows.clear()
    assert torch.equal(encoder([caption(NAMES)])['embedded'], expected)
    encoder([caption(NAMES[2:]), caption(NAMES[:4])])
    assert not rows


def test_remembered_features_are_nobody_elses_memory(bert_dir):
    encoder = build(bert_dir)
    expected = encoder([caption(NAMES)])['embedded'].clone()
    encoder([caption(NAMES)])['embedded'].zero_()
    assert torch.equal(encoder([caption(NAMES)])['embedded'], expected)
    assert encoder._cache.currsize == sum(
        features.untyped_storage().nbytes() for features in encoder._cache.values()
    )


def _load(encoder):
    encoder.load_state_dict({key: value * 1.1 for key, value in encoder.state_dict().items()})


def _change_in_place(encoder):
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.1)


def _train_and_freeze(encoder):
    encoder.requires_grad_(True)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder([caption(NAMES)])['embedded'].square().sum().backward()
    optimizer.step()
    encoder.requires_grad_(False)


@pytest.mark.parametrize(
    'change',
    [_load, _change_in_place, _train_and_freeze, lambda e: e.half().float(), lambda e: e.double()],
    ids=['load', 'in place', 'train', 'half and back', 'double'],
)
def test_changed_weights_are_never_answered_from_memory(bert_dir, change):
    encoder = build(bert_dir)
    before = encoder([caption(NAMES)])['embedded']
    change(encoder)
    after = encoder([caption(NAMES)])['embedded']
    fresh = build(bert_dir).to(after.dtype)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(after, fresh([caption(NAMES)])['embedded'])
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_weights_loaded_through_the_detector_are_never_answered_from_memory(bert_dir):
    encoder = build(bert_dir)
    holder = torch.nn.ModuleDict(dict(language_model=encoder))
    before = encoder([caption(NAMES)])['embedded']
    holder.load_state_dict({k: v * 1.1 for k, v in holder.state_dict().items()}, assign=True)
    assert not torch.equal(encoder([caption(NAMES)])['embedded'], before)


def test_precisions_are_remembered_apart(bert_dir):
    encoder = build(bert_dir)
    exact = encoder([caption(NAMES)])['embedded']
    with torch.autocast('cpu', torch.bfloat16):
        rounded = encoder([caption(NAMES)])['embedded']
        assert torch.equal(encoder([caption(NAMES)])['embedded'], rounded)
    assert not torch.equal(exact, rounded.float())
    assert torch.equal(encoder([caption(NAMES)])['embedded'], exact)


def test_features_of_inference_mode_serve_training(bert_dir):
    encoder = build(bert_dir)
    with torch.inference_mode():
        expected = encoder([caption(NAMES)])['embedded']
    weight = torch.ones(32, requires_grad=True)
    features = encoder([caption(NAMES)])['embedded']
    (features * weight).sum().backward()
    assert torch.equal(features, expected)


def test_adapters_get_gradients_and_nothing_is_remembered_under_them(bert_dir):
    encoder = build(bert_dir)
    expected = encoder([caption(NAMES)])['embedded']
    inject_adapter_in_model(LoraConfig(target_modules=['query', 'value']), encoder)
    assert torch.equal(encoder([caption(NAMES)])['embedded'], expected)
    adapters = {n: p for n, p in encoder.named_parameters() if 'lora_' in n}
    assert encoder([caption(NAMES)])['embedded'].requires_grad
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter.data, std=0.5)
        parameter.requires_grad_(False)
    adapted = encoder([caption(NAMES)])['embedded']
    assert not adapted.requires_grad and not torch.equal(adapted, expected)
    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(encoder([caption(NAMES)])['embedded'], expected)


def test_a_copied_or_pickled_encoder_remembers_nothing(bert_dir):
    encoder = build(bert_dir)
    expected = encoder([caption(NAMES)])['embedded']
    assert len(encoder._cache)
    stream = io.BytesIO()
    torch.save(encoder, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(encoder), torch.load(stream, weights_only=False)):
        assert len(twin._cache) == 0
        assert torch.equal(twin([caption(NAMES)])['embedded'], expected)
    assert not any('cache' in key for key in encoder.state_dict())


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    cache = Memo(3 * 40, nbytes)
    for key in 'abc':
        cache.add(key, torch.zeros(10))
    assert cache.get('a') is not None
    cache.add('d', torch.zeros(10))
    assert [key for key in 'abcd' if cache.get(key) is not None] == ['a', 'c', 'd']
    cache.add('d', torch.zeros(20))
    assert (cache.get('a'), cache.currsize, len(cache)) == (None, 120, 2)
    large = torch.zeros(99)
    assert cache.add('e', large) is large
    assert (cache.get('e'), cache.currsize, len(cache)) == (None, 120, 2)
    cache.add('d', large)  # nor is the old value answered in its place
    assert (cache.get('d'), cache.currsize, len(cache)) == (None, 40, 1)


def test_a_copied_or_pickled_memory_arrives_empty():
    cache = Memo(120, nbytes)
    cache.add('a', torch.zeros(10))
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(twin), twin.currsize, twin.maxsize) == (0, 0, 120)
        twin.add('a', torch.zeros(10))
        assert twin.currsize == 40
    assert len(cache) == 1


def nbytes(features):
    return features.nbytes


def test_an_encoder_without_room_to_remember_still_works(bert_dir):
    encoder = build(bert_dir, cache_bytes=0)
    assert torch.equal(
        encoder([caption(NAMES)])['embedded'], build(bert_dir)([caption(NAMES)])['embedded']
    )
    assert len(encoder._cache) == 0


def test_building_needs_no_weights_and_loading_them_does(text_dir, tmp_path):
    encoder = GroundingTextEncoder(text_dir)
    with pytest.raises(ConfigError, match='no text model there'):
        encoder.init_weights()
    with pytest.raises(ConfigError, match='does not exist'):
        GroundingTextEncoder(str(tmp_path / 'bert'))


def test_an_init_cfg_takes_the_place_of_pretrained_weights(text_dir):
    init_cfg = dict(type='Normal', layer=['Linear', 'Embedding'], std=0.5)
    encoder = GroundingTextEncoder(text_dir, init_cfg=init_cfg)
    encoder.init_weights()
    assert encoder.language_backbone.body.model.embeddings.word_embeddings.weight.std() > 0.4


def test_weights_of_another_model_are_refused(bert_dir, tmp_path):
    folder = str(tmp_path / 'model')
    shutil.copytree(bert_dir, folder)
    state = load_file(f'{folder}/model.safetensors')
    state = {key: value for key, value in state.items() if 'layer.1' not in key}
    save_file(state, f'{folder}/model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ConfigError, match='lack 16 of the parameters'):
        GroundingTextEncoder(folder).init_weights()
    state['embeddings.word_embeddings.weight'] = torch.zeros(3, 32)
    save_file(state, f'{folder}/model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ConfigError, match='size'):
        GroundingTextEncoder(folder).init_weights()


def test_another_kind_of_model_and_missing_sub_sentences_are_refused(text_dir, tmp_path):
    folder = tmp_path / 'roberta'
    shutil.copytree(text_dir, folder)
    config = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(config.replace('"bert"', '"roberta"'))
    with pytest.raises(ConfigError, match="'roberta'"):
        GroundingTextEncoder(str(folder))
    with pytest.raises(ConfigError, match='use_sub_sentence_represent'):
        GroundingTextEncoder(text_dir, use_sub_sentence_represent=False)


def test_captions_and_phrases_longer_than_the_model_are_told(text_dir):
    encoder = GroundingTextEncoder(text_dir, max_tokens=64, pad_to_max=False)
    encoder.max_tokens = 8
    with pytest.raises(ConfigError, match='longer than language_model.max_tokens=8'):
        encoder([caption(NAMES)])
    long = GroundingTextEncoder(text_dir, max_tokens=512)
    with pytest.raises(ConfigError, match='256 positions'):
        long(['cat ' * 300 + '.'])


def test_padding_attends_to_itself_only(text_dir):
    encoder = GroundingTextEncoder(text_dir, max_tokens=16)
    features = encoder([caption(['cat'])])
    size = int(features['text_token_mask'].sum())
    assert size == 4
    padding = features['masks'][0, size:].numpy()
    assert np.array_equal(padding, np.eye(16, dtype=bool)[size:])
    assert not features['position_ids'][0, size:].any()
