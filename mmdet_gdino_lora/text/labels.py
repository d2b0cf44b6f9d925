"""Token labels without mmdet: for training loops of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmdet_gdino_lora.text.tokenizer import CaptionTokenizer


def token_labels(
    names: Sequence[str],
    labels: Union[Sequence[int], Tensor],
    tokenizer: Union[str, PreTrainedTokenizerBase, CaptionTokenizer],
    max_tokens: int = 256,
) -> tuple[str, Tensor]:
    """Writes a caption of class names, and marks each object's tokens in it.

    Args:
        names: Class names.
        labels: Class of every object, [N], an index into ``names``; -1 marks a padded row.
        tokenizer: Folder or name of a text model, its fast tokenizer, or a ``CaptionTokenizer``
            (which remembers captions, and has limits of its own).
        max_tokens: Longest caption in tokens, [CLS] and [SEP] included.

    Returns:
        The caption, and the criterion's ``token_labels`` [N, T] float32: 1 at the tokens of the
        object's class, 0 elsewhere; T is the number of tokens in the caption.

    Raises:
        ConfigError: Classes don't fit into ``max_tokens``, a name has nothing to tokenise, or a
            label has no class.

    Example:
        >>> caption, target = token_labels(['cat', 'hot dog'], [1], 'bert-base-uncased')
        >>> caption  # [CLS] cat . hot dog . [SEP]
        'cat. hot dog.'
        >>> target
        tensor([[0., 0., 0., 1., 1., 0., 0.]])
    """
    if not isinstance(tokenizer, CaptionTokenizer):
        tokenizer = CaptionTokenizer(tokenizer, max_tokens)
    caption = tokenizer.from_names(names)
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    return caption.text, torch.from_numpy(caption.positive_map(labels))
