"""A dropped caption as the stored caption "" of CLIP."""

import pytest
import torch
from torch.testing import assert_close

from unclip.nets.conditioned import ConditioningConfig, DecoderText, NullText, TextProj
from unclip.nets.layers import ClipWidths, Cond, Keep
from unclip.nets.transformer import TextTransformerConfig

D, W, L, TIME = 6, 8, 7, 16
WIDTHS = ClipWidths(embed_dim=D, text_width=W, context_length=L, vocab_size=50)
TOKENS = torch.tensor([48, 49])  # the start and the end of a caption


def make(text: DecoderText, text_emb: bool = True) -> tuple[TextProj, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    transformer = TextTransformerConfig(width=16, depth=1, num_heads=2)
    cfg = ConditioningConfig(
        text=text, text_emb=text_emb, context_dim=12, null_text=NullText.empty, transformer=transformer
    )
    proj = TextProj(cfg, WIDTHS, TIME)
    emb, states = torch.randn(D), torch.randn(2, W)
    proj.set_empty_caption(TOKENS, emb, states)
    return proj, emb, states


@pytest.mark.parametrize("text", [text for text in DecoderText if text is not DecoderText.none])
def test_a_dropped_caption_is_the_caption_of_no_words(text: DecoderText):
    proj, emb, states = make(text)
    image = torch.randn(3, D)
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    tokens[:, :4] = torch.tensor([[48, 3, 4, 49], [48, 5, 49, 0], [48, 7, 8, 49]])
    cond = Cond(image_emb=image, text_emb=torch.randn(3, D), text_seq=torch.randn(3, 5, W), tokens=tokens)
    dropped = proj(cond, Keep(text=torch.tensor([True, False, True])))

    nothing = Cond(
        image_emb=image, text_emb=emb.expand(3, D), tokens=TOKENS.expand(3, 2), text_seq=states.expand(3, 2, W)
    )
    wanted, kept = proj(nothing, Keep()), proj(cond, Keep())
    assert_close(dropped[0][1], wanted[0][1], atol=1e-6, rtol=1e-6)
    assert_close(dropped[1][1, :6], wanted[1][1], atol=1e-6, rtol=1e-6)  # four of z_i, two of the caption
    assert dropped[2][1].tolist() == [True] * 6 + [False] * 3
    for got, own in zip(dropped, kept, strict=True):
        assert_close(got[[0, 2]], own[[0, 2]], atol=1e-6, rtol=1e-6)
    missing = proj(Cond(image_emb=image), Keep())
    for got, own in zip(missing, wanted, strict=True):
        assert_close(got, own, atol=1e-6, rtol=1e-6)


def test_states_without_tokens_carry_their_own_mask():
    proj, _, _ = make(DecoderText.clip_states)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    cond = Cond(image_emb=torch.randn(2, D), text_seq=torch.randn(2, 5, W), text_mask=mask)
    found = proj(cond, Keep(text=torch.tensor([True, False])))[2]
    assert found.tolist() == [[True] * 9, [True] * 6 + [False] * 3]


def test_it_is_stored_with_the_weights_and_not_trained():
    proj, emb, states = make(DecoderText.clip_states)
    state = proj.state_dict()
    assert {name for name in state if name.startswith("empty_")} == {"empty_tokens", "empty_text_emb", "empty_text_seq"}
    assert not any(name.startswith("empty_") for name, _ in proj.named_parameters())
    assert_close(state["empty_text_emb"], emb)
    assert_close(state["empty_text_seq"], states)
    assert "empty_text_seq" not in make(DecoderText.transformer)[0].state_dict()


def test_a_caption_that_is_not_empty_is_refused():
    proj, emb, states = make(DecoderText.clip_states)
    with pytest.raises(ValueError, match=r'reads the caption "" as 3 tokens; set conditioning\.null_text=zero'):
        proj.set_empty_caption(torch.tensor([48, 3, 49]), emb, states)


def test_a_null_caption_without_a_caption_path_is_refused():
    with pytest.raises(ValueError, match="null_text=empty without a caption path"):
        ConditioningConfig(null_text=NullText.empty)
    with pytest.raises(ValueError, match="num_image_tokens=0"):
        ConditioningConfig(num_image_tokens=0)
