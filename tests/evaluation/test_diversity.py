import math

import numpy as np
import pytest
import torch

from unclip.evaluation.diversity import cosines, pairs_of, r_precise, vendi_figure
from unclip.evaluation.intervals import resamples


def test_vendi_counts_groups_and_agrees_with_the_whole_kernel():
    """Three groups of equal rows at right angles score 3; any rows what the N x N kernel's eigenvalues say."""
    groups = torch.eye(5)[[0, 0, 1, 1, 2, 2]] * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    assert vendi_figure(groups, resamples(6, 0, 0)).value == pytest.approx(3.0)
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    shares = np.linalg.eigvalsh(unit @ unit.T / 40).clip(1e-300)
    wanted = math.exp(-(shares * np.log(shares)).sum())
    found = vendi_figure(rows, resamples(40, 20, 0))
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.low < found.value < found.high


def test_clip_score_is_the_cosine():
    found = cosines(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]]))
    assert found.tolist() == pytest.approx([1.0, 0.0])


def test_r_precision_of_perfect_random_and_tied_embeddings():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(400, 32, generator=generator)
    names = list(range(400))
    assert r_precise(texts * 2, texts, names, 0).mean() == 1.0
    assert r_precise(torch.ones(400, 3), torch.ones(400, 3), names, 0).mean() == 0.0, "a tie is no hit"
    chance = r_precise(torch.randn(400, 32, generator=generator), texts, names, 0).mean()
    assert float(chance) == pytest.approx(0.01, abs=0.02)


def test_r_precision_never_takes_the_own_caption_for_a_wrong_one():
    """100 captions, each of three pictures: all 99 others are asked, and rows of one caption hit alike."""
    texts = torch.eye(100).repeat(3, 1)
    found = r_precise(texts, texts, [f"caption {i % 100}" for i in range(300)], 0)
    assert found.tolist() == [1.0] * 300
    wrong = r_precise(texts.roll(1, 0), texts, [f"caption {i % 100}" for i in range(300)], 0)
    assert wrong.tolist() == [0.0] * 300


def test_pairs_are_of_one_caption_where_there_are_several_pictures_of_it():
    pairs, alike = pairs_of(["a", "b", "a", "c", "b", "a"], 10, 0)
    assert alike
    assert pairs.tolist() == [[0, 2], [1, 4], [2, 5]]
    assert pairs_of(["a", "b", "a", "c", "b", "a"], 2, 0)[0].shape == (2, 2)


def test_pairs_are_of_any_pictures_where_captions_repeat_by_accident():
    pairs, alike = pairs_of([*range(99), 5], 1000, 0)
    assert not alike
    assert pairs.shape == (50, 2), "not the one pair of a caption"
    assert not pairs_of(["a", "a", "b", "c"], 10, 0)[1]
    pairs, alike = pairs_of(list("abcdefg"), 10, 0)
    assert not alike
    assert pairs.shape == (3, 2)
    assert len(set(pairs.flatten().tolist())) == 6, "no picture twice"
