"""A few scenes in the format of COCO's caption annotations: pictures of many sizes, five captions each, numbers out of order."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from unclip.data.shapes import draw_scene, render

WORDS = ("first", "second", "third", "fourth", "fifth")


def write_coco(folder: Path, count: int, split: str = "val2014") -> None:
    """``folder``/annotations/captions_SPLIT.json and ``folder``/SPLIT/COCO_SPLIT_NUMBER.jpg."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, notes = [], []
    for i in reversed(range(count)):
        number, side = 3 + 7 * i, (40 + i % 3, 36)
        name = f"COCO_{split}_{number:012d}.jpg"
        scene = render(draw_scene(np.random.default_rng([len(split), i]), (1, 2), 0.0, False), 48)
        Image.fromarray(scene).resize(side).save(folder / split / name, quality=95)
        images.append({"license": 1, "file_name": name, "height": side[1], "width": side[0], "id": number})
        notes += [
            {"image_id": number, "id": 1000 * number + k, "caption": f"scene {i}, {word} words\n"}
            for k, word in enumerate(WORDS)
        ]
    content = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": notes}
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
