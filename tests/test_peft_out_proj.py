"""PEFT's count of an attention's output adapter: the text for PEFT, and that it is heeded here."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mmdet_gdino_lora.layers.attention import LeanMultiheadAttention
from mmdet_gdino_lora.peft_layers.attention import read_attention
from mmdet_gdino_lora.peft_layers.insertion import insert
from mmdet_gdino_lora.peft_layers.out_proj import in_todays_count, peft_out_proj_factor

TEXT = Path(__file__).parents[1] / 'docs' / 'peft_out_proj.md'


def test_the_text_shows_what_the_installed_peft_does(capsys: pytest.CaptureFixture) -> None:
    text = TEXT.read_text(encoding='utf-8')
    script, told = (
        re.search(rf'```{kind}\n(.*?)```', text, re.DOTALL) for kind in ('python', 'text')
    )
    exec(compile(script.group(1), str(TEXT), 'exec'), {})
    printed = capsys.readouterr().out
    counts = re.findall(r'adds (?:the adapter|it) ([\d.]+) times', printed)
    assert [float(count) for count in counts] == [peft_out_proj_factor()] * 3
    if peft.__version__ in told.group(1):
        assert printed == told.group(1)


class Attention(nn.Module):
    """An attention with adapters, PEFT's own or ours; the same weights for the same seed."""

    def __init__(self, ours: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = LeanMultiheadAttention if ours == 'fused' else MultiheadAttention
        self.block = kind(16, 2, batch_first=True)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=['attn'])
        (insert if ours else lambda c, m, a: inject_adapter_in_model(c, m, adapter_name=a))(
            config, self, 'default'
        )
        for name, parameter in sorted(self.named_parameters()):
            if '.lora_' in name:
                nn.init.normal_(parameter)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize('ours', ['frozen', 'fused'])
def test_both_views_of_an_attention_count_its_output_adapter_as_peft_does(ours: str) -> None:
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected, found = Attention('')(x), Attention(ours)(x)
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
        weights = read_attention(Attention(ours).block.attn)
        (adapter,) = weights.out_adapters
        assert adapter.scaling == weights.in_adapters[0].scaling * peft_out_proj_factor()


def test_only_output_adapters_are_counted_anew() -> None:
    names = ['attn.base_layer.out_proj.lora_B.default.weight', 'attn.lora_B.default.weight']
    names += ['attn.base_layer.out_proj.lora_A.default.weight', 'other.out_proj.weight']
    weights = {name: torch.ones(2) for name in names}
    found = in_todays_count(weights, 3 * peft_out_proj_factor())
    assert [float(found[name][0]) for name in names] == [3, 1, 1, 1]
    for known in (None, peft_out_proj_factor()):
        assert all(torch.equal(w, weights[n]) for n, w in in_todays_count(weights, known).items())
