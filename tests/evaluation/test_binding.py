"""Binding by the oracle: real renders are right, exchanged colours are told as such, and neighbours are told apart."""

import numpy as np
import pytest
import torch

from unclip.cli.probe_binding import told_apart
from unclip.data.shapes_exams import binding_scenes
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import is_held_out
from unclip.evaluation.binding import binding_shares, both, exchanged, pair_of
from unclip.evaluation.probes import Reading, read_scenes


def test_the_scenes_are_held_out_and_their_neighbours_differ_in_colours_only():
    pairs = binding_scenes()
    assert len(pairs) >= 100
    for own, other in pairs:
        a, b = (placed.solid for placed in own.objects)
        assert is_held_out(a, b)
        assert [p.solid.shape for p in other.objects] == [a.shape, b.shape]
        assert [p.solid.colour for p in other.objects] == [b.colour, a.colour]
        assert [(p.x, p.y, p.scale) for p in own.objects] == [(p.x, p.y, p.scale) for p in other.objects]
        assert sorted(own.caption.replace("an ", "a ")) == sorted(other.caption.replace("an ", "a "))
    first = pairs[0][0]
    told = [f"{p.solid.colour} {p.solid.shape}" for p in first.objects]
    assert first.caption.removeprefix("an ").removeprefix("a ").startswith(told[0])
    assert first.caption.endswith(told[1])
    assert f" {first.relation} " in first.caption


def test_real_renders_are_right_and_exchanged_ones_are_told_as_exchanged():
    scenes = [scene for pair in binding_scenes()[:8] for scene in pair]
    readings = read_scenes([render(scene, 64) for scene in scenes])
    truth = [scene.metadata() for scene in scenes]
    own = binding_shares(readings, truth)
    assert (own["right"].hits, own["exchanged"].hits, own["same colours"].hits) == (16, 0, 16)
    swapped = binding_shares(readings, [truth[i ^ 1] for i in range(16)])
    assert (swapped["right"].hits, swapped["exchanged"].hits) == (0, 16)
    assert (swapped["same colours"].hits, swapped["same shapes"].hits) == (16, 16)
    nothing = binding_shares([Reading((), None, 1.0)] * 16, truth)
    assert all(share.hits == 0 for share in nothing.values())
    assert nothing["right"].total == 16


def test_both_counts_neighbours_that_are_both_right():
    share = both([True, True, True, False, False, False, True, True])
    assert (share.hits, share.total) == (2, 4)


def test_scenes_without_anything_to_bind_are_refused():
    scene = {"objects": [{"colour": "red", "shape": "cube"}, {"colour": "red", "shape": "ring"}]}
    with pytest.raises(ValueError, match="binding is told from two colours on two shapes"):
        pair_of(scene)
    assert exchanged([("red", "cube"), ("blue", "ring")]) == [("blue", "cube"), ("red", "ring")]


def test_told_apart_holds_each_row_against_its_neighbours_target():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    found = told_apart(torch.tensor([[2.0, 1.0], [1.0, 0.5], [0.1, 0.0], [3.0, 1.0]]), targets)
    assert (found.hits, found.total) == (1, 4), "ties count as not told apart"
    assert told_apart(targets, targets).hits == 4
    assert told_apart(torch.from_numpy(np.asarray(targets)), targets[[1, 0, 3, 2]]).hits == 0
