"""The measures of a prior against priors whose answers are known."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import ConfigError
from unclip.evaluation.metrics import retrieval
from unclip.evaluation.prior import Diversity, PriorEvaluation, unrelated, with_changes
from unclip.models.sampling import PriorSampling
from unclip.nets.layers import Cond

D = 16


@dataclass
class Known:
    """Samples N(z_t, spread²) and puts the result at unit norm, as `pairs` makes the true z_i."""

    spread: float = 0.5

    def default_sampling(self) -> PriorSampling:
        return PriorSampling()

    def cond(self, batch: Batch) -> Cond:
        return Cond(text_emb=batch.text_emb)

    def losses(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        return {"mse": batch.column("image_emb")[:, 0].mean()}

    def sample(self, cond: Cond, how: PriorSampling, noise: Noise) -> Tensor:
        assert cond.text_emb is not None
        return 3 * F.normalize(cond.text_emb + self.spread * noise.normal((D,), "known"), dim=1)


class Measuring(Known):
    def measures(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        return {"each": batch.column("image_emb")[:, 1], "mean": batch.column("image_emb")[:, 2].mean()}


def pairs(count: int, spread: float = 0.5) -> Batch:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(count, D), dim=1) * 2
    image = F.normalize(text + spread * torch.randn(count, D), dim=1) * 7  # raw, not of unit norm
    captions = [f"caption {i}" for i in range(count)]
    return Batch(captions, list(range(count)), captions, text_emb=text, image_emb=image)


def evaluated(model: Known, batch: Batch, sizes: list[int], diversity: Diversity | None = None) -> dict[str, float]:
    evaluation = PriorEvaluation(model, lambda part: Noise.at(0, part.position), diversity=diversity)
    start = 0
    for size in sizes:
        evaluation.add(batch.rows(slice(start, start + size)))
        start += size
    return evaluation.summary()


def test_an_exact_prior_is_as_far_from_the_truth_as_its_samples_are_from_each_other():
    found = evaluated(Known(), pairs(1500), [1500], Diversity(every=1, num_samples=8))
    assert found["diversity_ratio"] == pytest.approx(1, abs=0.02)
    assert found["diversity"] == pytest.approx(1 - found["cosine_to_true"], abs=0.02)
    assert found["cosine_difference"] == pytest.approx(0, abs=0.01)
    assert found["cosine_to_unrelated"] == pytest.approx(found["cosine_true_to_unrelated"], abs=0.02)
    assert abs(found["cosine_to_unrelated_text"]) < 0.05 < found["cosine_to_text"]


def test_the_best_single_guess_comes_nearer_and_has_no_diversity():
    guess, exact = (evaluated(Known(spread), pairs(300), [300]) for spread in (0.0, 0.5))
    assert guess["diversity"] == pytest.approx(0, abs=1e-5)
    assert guess["diversity_ratio"] == pytest.approx(0, abs=1e-4)
    assert guess["cosine_to_true"] == pytest.approx(guess["cosine_text_to_true"], abs=1e-5)
    assert guess["cosine_to_true"] > exact["cosine_to_true"] + 0.1
    assert guess["cosine_to_text"] == pytest.approx(1, abs=1e-5)
    assert [guess[f"recall_{k}"] for k in (1, 5, 10)] == [guess[f"recall_by_text_{k}"] for k in (1, 5, 10)]


def test_a_prior_that_varies_too_much_has_a_ratio_above_one():
    assert evaluated(Known(1.5), pairs(300), [300], Diversity(1, 4))["diversity_ratio"] > 1.1


def test_means_are_weighted_by_counts_and_do_not_depend_on_the_batches():
    batch = pairs(70)
    whole, parts = (evaluated(Measuring(), batch, sizes) for sizes in ([70], [33, 32, 5]))
    assert whole == pytest.approx(parts, abs=1e-5)
    column = batch.column("image_emb")
    assert parts["mse"] == pytest.approx(column[:, 0].mean().item(), abs=1e-5)
    assert parts["each"] == pytest.approx(column[:, 1].mean().item(), abs=1e-5)
    assert parts["mean"] == pytest.approx(column[:, 2].mean().item(), abs=1e-5)


def test_a_model_without_measures_of_its_own_has_none():
    assert {"each", "mean"} <= set(evaluated(Measuring(), pairs(8), [8])) - set(evaluated(Known(), pairs(8), [8]))


def test_autocast_rounds_nothing_but_the_model():
    evaluation = PriorEvaluation(Known(0.01), lambda part: Noise.at(0, part.position))
    with torch.autocast("cpu", torch.bfloat16):
        evaluation.add(pairs(40))
    assert evaluation.summary() == pytest.approx(evaluated(Known(0.01), pairs(40), [40]), abs=1e-5)


def test_recall_is_that_of_the_sampled_embeddings_among_the_true_ones():
    batch = pairs(200)
    sampled = Known().sample(Known().cond(batch), PriorSampling(), Noise.at(0, batch.position))
    found = evaluated(Known(), batch, [200])
    wanted = retrieval(batch.column("image_emb"), sampled, batch.caption)
    assert found["recall_5"] == wanted["text_to_image_recall_5"]
    assert 5 / 200 < found["recall_5"] < 1


def test_the_shares_of_two_ranks_stand_by_position_again():
    batch = pairs(48)
    whole, apart = (PriorEvaluation(Known(), lambda part: Noise.at(0, part.position)) for _ in range(2))
    whole.add(batch)
    for rows in (slice(33, 48), slice(0, 33)):
        apart.add(batch.rows(rows))
    assert apart.summary() == pytest.approx(whole.summary(), abs=1e-6)


def test_unrelated_captions_are_other_ones():
    captions = ["a", "b", "a", "a", "b", "c"]
    other = unrelated(captions)
    assert other is not None
    assert all(captions[i] != captions[j] for i, j in enumerate(other.tolist()))
    assert unrelated(["a", "a"]) is None
    batch = pairs(4)
    batch.caption = ["same"] * 4
    assert not any("unrelated" in name for name in evaluated(Known(), batch, [4]))


def test_sampling_can_be_changed_in_part_and_misspelt_names_are_refused():
    changed = with_changes(
        PriorSampling(), {"num_candidates": 1, "guidance": {"scale": 2.0}, "sampler": {"num_steps": 5}}
    )
    assert (changed.num_candidates, changed.guidance.scale, changed.guidance.rescale) == (1, 2.0, 0.0)
    assert (changed.sampler.num_steps, changed.sampler.name) == (5, PriorSampling().sampler.name)
    with pytest.raises(ConfigError, match=r"sampling: unknown option 'guidance\.scal'; did you mean 'scale'"):
        with_changes(PriorSampling(), {"guidance": {"scal": 2.0}})


def test_useless_diversity_is_refused():
    for options in ({"num_samples": 1}, {"every": 0}):
        with pytest.raises(ConfigError, match=r"must be at least 1 and diversity\.num_samples"):
            Diversity(**options)
    assert math.isfinite(evaluated(Known(), pairs(3), [3])["diversity"]), "the first sample is always among them"
