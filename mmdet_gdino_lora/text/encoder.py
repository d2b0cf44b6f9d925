"""Grounding DINO's text encoder: a BERT that sees every class name by itself.

mmdet's ``BertModel`` with the same arguments, parameters and results, on transformers 4.40 and 5.
A caption's segments do not attend to each other and positions start anew in each, so their features
don't depend on the caption: each distinct segment of a batch is encoded once, in a row of its own,
and captions are put together from the rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.utils import logging

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.peft_layers.layers import is_adapted
from mmdet_gdino_lora.text.batch import CaptionBatch, Segment, chunks, collate
from mmdet_gdino_lora.text.cache import Memo
from mmdet_gdino_lora.text.files import load_tokenizer, text_model
from mmdet_gdino_lora.text.tokenizer import SPECIAL_TOKENS, CaptionTokenizer
from mmdet_gdino_lora.text.tokens import TokenizedCaption
from mmdet_gdino_lora.transfer import to_device


@MODELS.register_module()
class GroundingTextEncoder(BaseModel):
    """Text encoder with mmdet's arguments and parameter names (``BertModel`` there).

    The constructor reads the model's config and vocabulary only; :meth:`init_weights` loads its
    weights, which a base checkpoint would overwrite anyway. Checkpoints of mmdet's Grounding DINO
    load with no missing and no unexpected key.

    While no parameter of it is trainable it runs without graph and dropout, and the features of
    segments are remembered. They are forgotten when weights are loaded, moved, converted or changed
    in place. Nothing is remembered while there are PEFT adapters in it, for these can be switched
    without a trace. Call :meth:`clear_cache` after a change that torch can't see (``.data``).

    Args:
        name: Folder of a BERT, or its name on the Hugging Face hub.
        max_tokens: Longest caption in tokens, [CLS] and [SEP] included.
        pad_to_max: Whether captions are padded to ``max_tokens``, or to the longest in the batch.
        use_sub_sentence_represent: Must be True; taken for mmdet's sake.
        special_tokens_list: Tokens that end a segment.
        add_pooling_layer: Whether BERT's pooling layer is built; nothing reads it.
        num_layers_of_embedded: Number of last layers that features are the mean of, divided by
            their number once more, as mmdet does.
        use_checkpoint: Whether BERT's layers recompute their activations in the backward pass.
        cache_bytes: Most bytes of remembered features.
        **kwargs: Arguments of mmengine's ``BaseModel``. An ``init_cfg`` takes the place of the
            pretrained weights, for a text encoder to be trained from nothing.

    Raises:
        ConfigError: No text model there, not a BERT, or without sub-sentences.
    """

    def __init__(
        self,
        name: str = 'bert-base-uncased',
        max_tokens: int = 256,
        pad_to_max: bool = True,
        use_sub_sentence_represent: bool = True,
        special_tokens_list: Optional[Sequence[str]] = SPECIAL_TOKENS,
        add_pooling_layer: bool = False,
        num_layers_of_embedded: int = 1,
        use_checkpoint: bool = False,
        cache_bytes: int = 256 * 1024**2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not use_sub_sentence_represent or not special_tokens_list:
            raise ConfigError(
                'language_model.use_sub_sentence_represent='
                f'{use_sub_sentence_represent} with special_tokens_list={special_tokens_list}: '
                'Grounding DINO encodes every class name by itself; set it to True and '
                f'special_tokens_list={list(SPECIAL_TOKENS)}'
            )
        self.name = name
        self.max_tokens = max_tokens
        self.pad_to_max = pad_to_max
        self.tokenizer = load_tokenizer(name)
        self.caption_tokenizer = CaptionTokenizer(self.tokenizer, max_tokens, special_tokens_list)
        self.use_sub_sentence_represent = use_sub_sentence_represent
        self.special_tokens = list(self.caption_tokenizer.special_ids)
        body = _BertBody(
            _bert_config(name), add_pooling_layer, num_layers_of_embedded, use_checkpoint
        )
        self.language_backbone = nn.Sequential(OrderedDict(body=body))
        self._pad_id = self.tokenizer.pad_token_id or 0
        self._cache = Memo(cache_bytes, _nbytes)
        self._cached_version: Hashable = None
        self._register_load_state_dict_pre_hook(self._before_load)

    is_init: bool

    @property
    def _body(self) -> _BertBody:
        body = self.language_backbone.get_submodule('body')
        assert isinstance(body, _BertBody)
        return body

    # -------------------------------------------------------------------------------------- weights

    def init_weights(self) -> None:
        """Loads BERT's pretrained weights; with an ``init_cfg``, makes random ones as it says.

        Raises:
            ConfigError: There are none, or they are of another size.
        """
        if self.is_init:
            return
        if self.init_cfg:
            super().init_weights()
            return
        body = self._body
        verbosity = logging.get_verbosity()
        # of the heads that a text model also comes with it would say at length that they are unused
        logging.set_verbosity_error()
        try:
            pretrained, info = text_model(
                self.name,
                BertModel.from_pretrained,
                config=body.model.config,
                add_pooling_layer=body.model.pooler is not None,
                output_loading_info=True,
            )
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted(info['missing_keys'])
        if missing:
            raise ConfigError(
                f'language_model.name={self.name!r}: the weights there lack {len(missing)} of the '
                f"parameters that a BERT of its config.json has ({missing[0]!r}); give a BERT's "
                'own folder'
            )
        body.model.load_state_dict(pretrained.state_dict())
        self.clear_cache()
        self.is_init = True

    def _before_load(self, state_dict: dict, prefix: str, *_: Any) -> None:
        self.clear_cache()
        # a buffer of older versions of transformers, found in mmdet's published checkpoints
        state_dict.pop(f'{prefix}language_backbone.body.model.embeddings.position_ids', None)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> GroundingTextEncoder:
        self.clear_cache()
        return super()._apply(fn, *args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets all remembered features."""
        self._cache.clear()

    # ------------------------------------------------------------------------------------- encoding

    def forward(self, captions: Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """Encodes captions given as text; mmdet calls it so.

        Args:
            captions: Captions that end with a dot. One longer than ``max_tokens`` is cut.
            **kwargs: Not read; mmdet's interface has them.

        Returns:
            As :meth:`encode`.
        """
        return self.encode([self.caption_tokenizer.from_plain_text(text) for text in captions])

    def encode(self, captions: Sequence[TokenizedCaption]) -> dict[str, Tensor]:
        """Encodes tokenised captions.

        Args:
            captions: One per image; equal ones cost nothing.

        Returns:
            ``embedded`` [B, T, C] and ``hidden`` [B, T, C] (the last layer); ``masks`` [B, T, T]
            bool, True where one token attends to another; ``position_ids`` [B, T] int64, position
            within the segment; ``text_token_mask`` [B, T] bool, False at padding.

        Raises:
            ConfigError: A caption or a segment is longer than the model takes.
        """
        batch = collate(captions, self._pad_id, self.max_tokens if self.pad_to_max else 0)
        self._check_length(batch)
        device = next(self.language_backbone.parameters()).device
        rows, begins = self._segment_features(batch.segments, device)
        index, segment_ids, position_ids, valid = to_device(
            np.stack(
                [
                    begins[batch.segment] + batch.position_ids,
                    batch.segment_ids,
                    batch.position_ids,
                    batch.valid,
                ]
            ),
            device,
        )
        features = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
        return dict(
            embedded=features[..., 0, :],
            hidden=features[..., -1, :],
            masks=segment_ids[:, :, None] == segment_ids[:, None, :],
            position_ids=position_ids,
            text_token_mask=valid.bool(),
        )

    def _check_length(self, batch: CaptionBatch) -> None:
        longest = max(map(len, batch.segments))
        positions = self._body.model.config.max_position_embeddings
        if longest > positions:
            raise ConfigError(
                f'a phrase of {longest} tokens is longer than the {positions} positions of the '
                f'text model {self.name!r}; shorten it or part it with dots'
            )
        length = batch.segment.shape[1]
        if length > self.max_tokens:
            raise ConfigError(
                f'a caption of {length} tokens is longer than language_model.max_tokens='
                f'{self.max_tokens}; give TokenSpans the same max_tokens'
            )

    def _segment_features(
        self, segments: Sequence[Segment], device: torch.device
    ) -> tuple[Tensor, np.ndarray]:
        """Returns features of segments, [R, 1 or 2, C], and where each one begins in there."""
        state = _state(self.language_backbone)
        if state.trainable:
            self.clear_cache()
            return self._encode_segments(segments, device)
        if self.language_backbone.training:
            self.language_backbone.eval()
        with torch.no_grad():
            if state.adapted:
                self.clear_cache()
                return self._encode_segments(segments, device)
            return self._remembered_features(segments, device, state.version)

    def _remembered_features(
        self, segments: Sequence[Segment], device: torch.device, version: int
    ) -> tuple[Tensor, np.ndarray]:
        if version != self._cached_version:
            self.clear_cache()
            self._cached_version = version
        precision = _autocast_dtype(device)
        features: list[Any] = [self._cache.get((precision, segment)) for segment in segments]
        missing = [number for number, known in enumerate(features) if known is None]
        if missing:
            new = [segments[number] for number in missing]
            rows, begins = self._encode_segments(new, device)
            for number, segment, begin in zip(missing, new, begins.tolist()):
                # a copy: a view would keep the memory of its whole batch
                known = rows[begin : begin + len(segment)].clone()
                features[number] = self._cache.add((precision, segment), known)
        lengths = np.array([len(segment) for segment in segments])
        return torch.cat(features), np.cumsum(lengths) - lengths

    def _encode_segments(
        self, segments: Sequence[Segment], device: torch.device
    ) -> tuple[Tensor, np.ndarray]:
        body = self._body
        positions = body.model.config.max_position_embeddings
        parts = chunks(segments, self._pad_id, positions)
        numbers = to_device(
            np.concatenate([a.ravel() for part in parts for a in (part.input_ids, part.lengths)]),
            device,
        )
        features, begins, row, read = [], np.zeros(len(segments), dtype=np.int64), 0, 0
        for part in parts:
            count, length = part.input_ids.shape
            input_ids, lengths = numbers[read : read + count * (length + 1)].split(
                [count * length, count]
            )
            features.append(body(input_ids.view(count, length), lengths).flatten(0, 1))
            begins[list(part.members)] = row + length * np.arange(len(part.members))
            row += count * length
            read += count * (length + 1)
        return torch.cat(features), begins


class _BertBody(nn.Module):
    """BERT on rows of one segment each; mmdet's ``BertEncoder``, whose parameter names it keeps.

    BERT's parts are called one by one: its own ``forward`` takes other masks in every version of
    transformers, and asks the host whether a mask has padding at all.
    """

    def __init__(
        self,
        config: BertConfig,
        add_pooling_layer: bool,
        num_layers_of_embedded: int,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.model = BertModel(config, add_pooling_layer=add_pooling_layer)
        self.language_dim = config.hidden_size
        self.num_layers_of_embedded = num_layers_of_embedded
        self.use_checkpoint = use_checkpoint

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Encodes segments.

        Args:
            input_ids: Token ids [N, L].
            lengths: Tokens per row [N]; what follows is padding.

        Returns:
            [N, L, 1, C]: the last layer; or [N, L, 2, C]: the mean of the last
            ``num_layers_of_embedded`` layers, and the last layer.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        seen = positions < lengths[:, None]
        return self.encode(input_ids, positions[None].expand_as(input_ids), seen[:, None, None])

    def encode(self, input_ids: Tensor, position_ids: Tensor, seen: Tensor) -> Tensor:
        """Encodes rows of tokens.

        Args:
            input_ids: Token ids [N, L].
            position_ids: [N, L].
            seen: Which tokens (the last dimension) a token sees, bool, broadcast to [N, 1, L, L].

        Returns:
            As :meth:`forward`.
        """
        hidden = self.model.embeddings(
            input_ids=input_ids,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=position_ids,
        )
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)
        layers = []
        for layer in self.model.encoder.layer:
            if self.use_checkpoint and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, mask)
            # transformers 4 returns a tuple
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            layers.append(hidden)
        count = self.num_layers_of_embedded
        if count == 1:
            return hidden[:, :, None]
        return torch.stack([torch.stack(layers[-count:]).mean(0) / count, hidden], dim=2)


def _bert_config(name: str) -> BertConfig:
    values = text_model(name, BertConfig.get_config_dict)[0]
    if values.get('model_type', 'bert') != 'bert':
        raise ConfigError(
            f'language_model.name={name!r} is a text model of type {values["model_type"]!r}; '
            'Grounding DINO needs a BERT'
        )
    return BertConfig.from_dict(values)


def _nbytes(features: Tensor) -> int:
    return features.nbytes


class _State(NamedTuple):
    trainable: bool
    adapted: bool  # by PEFT
    version: int  # grows whenever a parameter is changed in place


def _state(module: nn.Module) -> _State:
    # one walk by hand: torch's iterators take milliseconds, and this is asked in every step
    trainable, adapted, version = False, False, 0
    modules = [module]
    while modules:
        module = modules.pop()
        adapted = adapted or is_adapted(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                trainable = trainable or parameter.requires_grad
                version += 0 if parameter.is_inference() else parameter._version
        modules.extend(child for child in module._modules.values() if child is not None)
    return _State(trainable, adapted, version)


def _autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None
