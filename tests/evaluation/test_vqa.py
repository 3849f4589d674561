"""Asking a VQA model: phrases of captions, a tiny ViLT and a tiny BLIP written as transformers writes them, and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from unclip.errors import ConfigError
from unclip.evaluation.vqa import Questioner, phrases_of

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[ENC]",
    "[DEC]",
    "is",
    "there",
    "a",
    "red",
    "green",
    "cup",
    "plate",
    "?",
    "yes",
    "no",
]
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def tokenizer() -> transformers.BertTokenizer:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=16)


def vilt(folder: Path, answers: list[str]) -> Path:
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16, max_position_embeddings=16, id2label=dict(enumerate(answers)),
        label2id={answer: i for i, answer in enumerate(answers)},
    )  # fmt: skip
    model = transformers.ViltForQuestionAnswering(config)
    with torch.no_grad():  # whatever is asked, yes is e times as likely as no
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.arange(len(answers), 0, -1))
    model.save_pretrained(folder)
    images = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16)
    transformers.ViltProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def test_phrases():
    assert phrases_of("a red cup and a green plate") == ["a red cup", "a green plate"]
    assert phrases_of("a red cup on top of a green plate, a spoon") == ["a red cup", "a green plate", "a spoon"]


def test_vilts_yes_against_no_and_the_product_over_phrases(tmp_path: Path):
    judge = Questioner(vilt(tmp_path / "vilt", ["yes", "no", "maybe"]))
    one = float(torch.tensor([1.0, 0.0]).softmax(0)[0])
    assert judge.agrees(PICTURE, "a red cup") == pytest.approx(one, abs=1e-5)
    assert judge.agrees(PICTURE, "a red cup and a green plate") == pytest.approx(one**2, abs=1e-5)


def test_a_model_without_yes_and_no_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not have yes and no among its 2 answers"):
        Questioner(vilt(tmp_path / "vilt", ["cat", "dog"]))


def test_what_is_no_vqa_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json; give the local folder of a VQA model"):
        Questioner(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="transformers reads no VQA model with its processor from"):
        Questioner(tmp_path)


def test_blip_answers_with_a_share_that_depends_on_the_picture(tmp_path: Path):
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
        "pad_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "initializer_range": 0.5}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.BlipForQuestionAnswering(config).save_pretrained(tmp_path)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer()).save_pretrained(tmp_path)
    judge = Questioner(tmp_path)
    shares = [judge.agrees(picture, "a red cup") for picture in (PICTURE, 255 - PICTURE)]
    assert all(0 < share < 1 for share in shares)
    assert shares[0] != shares[1]
