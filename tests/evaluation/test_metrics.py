import math

import pytest
import torch
from torch.testing import assert_close

from unclip.evaluation.metrics import effective_rank, kid, num_components, retrieval, spectrum


def test_perfect_and_shifted_pairs() -> None:
    vectors = torch.eye(6)
    names = list("abcdef")
    assert set(retrieval(vectors * 3, vectors, names).values()) == {1.0}
    shifted = retrieval(vectors, vectors.roll(1, 0) + 0.5 * vectors, names)
    assert shifted["text_to_image_recall_1"] == 0.0
    assert shifted["text_to_image_recall_5"] == 1.0


def test_constant_embeddings_find_nothing() -> None:
    found = retrieval(torch.ones(12, 4), torch.ones(12, 4), list(range(12)))
    assert set(found.values()) == {0.0}


def test_what_is_not_a_number_finds_nothing() -> None:
    images, texts = torch.eye(6), torch.eye(6)
    images[2] = torch.nan
    found = retrieval(images, texts, list(range(6)))
    assert found["image_to_text_recall_1"] == pytest.approx(5 / 6)
    assert found["image_to_text_recall_5"] == pytest.approx(5 / 6)
    assert found["text_to_image_recall_1"] == 0, "it may be nearer than the right one"


def test_identical_captions_are_hits_and_take_one_place() -> None:
    texts = torch.eye(4)[[0, 0, 1, 2, 3]]
    images = torch.eye(4)[[0, 1, 1, 2, 3]] + 0.1 * torch.eye(4)[[0, 0, 1, 2, 3]]
    found = retrieval(images, texts, ["a", "a", "b", "c", "d"], ks=(1, 2))
    # Picture 1 looks like caption b: wrong at 1, right at 2, though caption a stands there twice.
    assert found["image_to_text_recall_1"] == pytest.approx(4 / 5)
    assert found["image_to_text_recall_2"] == 1.0
    # Both captions a find picture 0, which has the same caption; caption b finds picture 2 just before picture 1.
    assert found["text_to_image_recall_1"] == 1.0


def test_chunks_change_nothing_and_chance_level_is_right() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(400, 8), torch.randn(400, 8)
    whole = retrieval(images, texts, list(range(400)))
    assert whole == retrieval(images, texts, list(range(400)), chunk=37)
    assert whole["text_to_image_recall_5"] == pytest.approx(5 / 400, abs=0.02)


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="not pairs"):
        retrieval(torch.ones(3, 2), torch.ones(2, 2), ["a", "b"])


def test_kid_of_two_points_is_known():
    """One dimension, all x = 0 and all y = 1: k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1, so the distance is 1 + 8 - 2."""
    mean, error = kid(torch.zeros(6, 1), torch.ones(6, 1), subset_size=4)
    assert mean == pytest.approx(7000)
    assert error == pytest.approx(0)


def test_kid_is_unbiased_and_grows_with_the_shift():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(600, 16, generator=generator) for _ in range(3)]
    same, error = kid(draw[0], draw[1])
    assert abs(same) < 4 * error + 2
    near, far = (kid(draw[0], draw[2] + shift)[0] for shift in (0.2, 0.4))
    assert far > 2 * near > 10 * error


def test_kid_refuses_subsets_that_are_too_large():
    with pytest.raises(ValueError, match="subsets of 9 rows"):
        kid(torch.zeros(8, 2), torch.zeros(20, 2), subset_size=9)


def test_rank_of_embeddings_with_known_variances():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    rows = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64))[0]
    rows = torch.linalg.qr(rows - rows.mean(0))[0]  # centred columns of length 1
    rows = rows - rows.mean(0)
    wanted = torch.tensor([16.0, 4.0, 4.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = spectrum(rows * (40 * wanted).sqrt() @ basis.T + 3)
    assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert [num_components(found, share) for share in (0.6, 0.7, 0.9, 0.97, 0.99)] == [1, 2, 3, 4, 4]
    shares = [4 / 9, 2 / 9, 2 / 9, 1 / 9]
    assert effective_rank(found) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-3)
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
