"""unclip-embed against a bare encode and a bare decode, each alone on all cores, added up.

Ratio ``embed_vs_bare``: (seconds to encode ready tensors + seconds to decode the same JPEGs from memory) / seconds of
``unclip.data.embed.embed``, which reads, decodes, tokenises, encodes, checks and writes, and loads the CLIP from its
artifact. 1 means that nothing but the necessary work is done and no core ever waits.

The sides: decode shares the pictures out to one thread a core; encode takes batches of ready pictures and tokens, either
64 with torch's own threads or 32 on each core (both are measured, the faster one counts; both are bf16 autocast). The
start of Python and its imports is in no side.
"""

import io
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from turns import ROUNDS, ratio, report, seconds, size_from_command_line, take_turns

from unclip.artifact import Manifest, save
from unclip.config import Precision, to_plain
from unclip.data.embed import EmbedConfig, embed
from unclip.data.parallel import in_order
from unclip.data.shards import Shards, ShardWriter
from unclip.data.transforms import load_image
from unclip.models.clip import CLIP, CLIPConfig

VIT_S = {"embed_dim": 384, "vision_width": 384, "vision_layers": 12, "vision_heads": 6, "text_width": 384}
VIT_S |= {"text_layers": 6, "text_heads": 6, "context_length": 77, "patch_size": 32, "image_size": 224}
TINY = {"embed_dim": 32, "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "text_width": 32}
TINY |= {"text_layers": 1, "text_heads": 2, "context_length": 32, "patch_size": 16, "image_size": 32}
BATCH, HALF = 64, 32
WORDS = ["a", "photo", "of", "the", "small", "red", "old", "wooden", "glass", "cube", "bottle", "under", "big", "table"]


def write_data(folder: Path, num: int, side: int) -> None:
    """JPEGs with smooth colours and some noise: about as many bytes a pixel as photographs have. 250 different ones."""
    files = []
    for i in range(min(num, 250)):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train", shard_size=1000) as writer:
        for i in range(num):
            writer.write(f"{i:06d}", files[i % len(files)], " ".join(rng.choice(WORDS, 10)), {}, kind="jpg")


def main() -> None:
    size = size_from_command_line(__doc__)
    num, side = {"smoke": (96, 64), "quick": (3000, 384), "full": (3000, 384)}[size]
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(**(TINY if size == "smoke" else VIT_S))).eval().requires_grad_(False)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root / "data", num, side)
        save(root / "clip", clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
        shards = Shards(root / "data" / "train")
        files = [shards.image(i) for i in range(num)]
        captions = [shards.caption(i) for i in range(num)]
        starts = range(0, num, BATCH)
        images = [torch.stack([load_image(f, clip.image_size) for f in files[i : i + BATCH]]) for i in starts]
        texts = [clip.tokenize(captions[i : i + BATCH]) for i in starts]
        texts = [tokens[:, : int(tokens.argmax(1).max()) + 1] for tokens in texts]
        cores = torch.get_num_threads()
        cfg = EmbedConfig(str(root / "run"), str(root / "clip"), str(root / "data"))
        cfg.precision = Precision.bf16

        @torch.inference_mode()
        def encode(start: int, size: int) -> None:
            step, first = divmod(start, BATCH)
            with torch.autocast("cpu", torch.bfloat16):
                clip.encode_image(images[step][first : first + size])
                clip.encode_text(texts[step][first : first + size])

        def decode(part: int) -> None:
            for file in files[part::cores]:
                load_image(file, clip.image_size)

        def decode_all() -> None:
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(decode, range(cores)))

        def encode_by_torch() -> None:
            for start in range(0, num, BATCH):
                encode(start, BATCH)

        def encode_by_batch() -> None:
            for _ in in_order(lambda start: encode(start, HALF), range(0, num, HALF), cores):
                pass

        def embed_all() -> float:
            shutil.rmtree(cfg.run, ignore_errors=True)
            return seconds(lambda: embed(cfg))

        encode(0, BATCH)  # warm-up
        sides = {
            "decode": lambda: seconds(decode_all),
            "encode_by_torch": lambda: seconds(encode_by_torch),
            "encode_by_batch": lambda: seconds(encode_by_batch),
            "embed": embed_all,
        }
        found = take_turns(sides, ROUNDS[size])
    encode_names = ("encode_by_torch", "encode_by_batch")
    faster = min(encode_names, key=lambda name: sum(found[name]))
    bare = {n: [d + e for d, e in zip(found["decode"], found[n], strict=True)] for n in encode_names}
    ratios = {"embed_vs_bare": ratio(bare[faster], found["embed"])}
    ratios["embed_vs_bare_torch_threads"] = ratio(bare["encode_by_torch"], found["embed"])
    pictures = [num / wall for wall in found["embed"]]
    print(f"{np.median(pictures):.1f} pictures/s", file=sys.stderr)
    spent = {f"{name}_s": round(float(np.median(values)), 3) for name, values in found.items()}
    kilobytes = round(sum(map(len, files)) / num / 1000, 1)
    settings = {"size": size, "pictures": num, "jpeg": f"{side * 4 // 3}x{side}", "jpeg_kB": kilobytes}
    model = f"ViT width {clip.cfg.vision_width}, patch {clip.cfg.patch_size}, {clip.image_size} px"
    settings |= {"model": model, "precision": "bf16", "bare_encode": faster, **spent}
    report("embed", ratios, settings)


if __name__ == "__main__":
    main()
