"""Rows of embeddings: whole shuffled batches as training gets them, beside a bare np.take of the same bytes.

rows_vs_take   seconds of np.take from arrays in memory, at indices known before / seconds of the training loader
rows_per_s     rows that the training loader hands over: z_i, z_t and tokens, with keys, captions and positions
reader_per_s   rows of embedding-reader, one after another (it has neither order nor tokens), of the same z_i and z_t

Every side reads what the page cache holds: each is run once before the clock starts.
"""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from turns import ROUNDS, ratio, report, seconds, size_from_command_line, take_turns

from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.embeddings import Embeddings
from unclip.data.embeddings_writer import EmbeddingsWriter, Written
from unclip.data.order import Order
from unclip.data.texts import write_captions
from unclip.interop.public_embeddings import ExportConfig, export_embeddings
from unclip.models.interface import Interface

BATCH, WIDTH, CONTEXT, END = 4096, 768, 77, 49407
NUM_ROWS = {"smoke": 10_000, "quick": 200_000, "full": 200_000}
SHARD_ROWS = {"smoke": 1_000, "quick": 10_000, "full": 10_000}
COLUMNS = ("image_emb", "text_emb", "tokens")


def write(folder: Path, num_rows: int, shard_rows: int) -> None:
    """Unit-norm float16 rows, captions of 5 to 40 words."""
    interface = Interface(WIDTH, WIDTH, CONTEXT, END + 1, "c" * 64)
    writer, rng = EmbeddingsWriter(folder, "train", interface, COLUMNS, "float16"), np.random.default_rng(0)
    written = Written(folder / "train", [], [], "data", "texts")
    for number in range(num_rows // shard_rows):
        rows = {}
        for column in ("image_emb", "text_emb"):
            values = rng.standard_normal((shard_rows, WIDTH), dtype=np.float32)
            rows[column] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
        words = rng.integers(5, 41, shard_rows)
        tokens = rng.integers(1, END, (shard_rows, CONTEXT), dtype=np.int32)
        tokens[np.arange(CONTEXT) > words[:, None]] = 0
        tokens[np.arange(shard_rows), words] = END
        name = f"{number:05d}"
        keys = [f"{number * shard_rows + i:09d}" for i in range(shard_rows)]
        writer.write(name, name, keys, {**rows, "tokens": tokens})
        write_captions(folder / "train" / name, [f"picture number {key}" for key in keys])
        written.names.append(name)
        written.shard_sizes.append(shard_rows)
    writer.finish(written, {"normalised": True})


def main() -> None:
    size = size_from_command_line(__doc__ or "")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "emb"
        write(folder, NUM_ROWS[size], SHARD_ROWS[size])
        compare(size, folder, Path(place) / "public")


def compare(size: str, folder: Path, public: Path) -> None:
    from embedding_reader import EmbeddingReader

    export_embeddings(ExportConfig(folder, public))
    stored = Embeddings(folder, "train")
    num_batches = NUM_ROWS[size] // BATCH
    data = UnclipData(DataConfig(embeddings=str(folder), val_split=None), 0, BATCH, COLUMNS)
    order = Order(stored.shard_sizes, 0)
    indices = [order.indices(step * BATCH, BATCH) for step in range(num_batches)]
    columns = {name: stored.column(name) for name in COLUMNS}
    readers = [EmbeddingReader(str(public / name), file_format="npy") for name in ("img_emb", "text_emb")]

    def take() -> None:
        for chosen in indices:
            for values in columns.values():
                torch.from_numpy(np.take(values, chosen, axis=0))

    def rows() -> None:
        for batch in itertools.islice(data.train_dataloader(), num_batches):
            assert len(batch) == BATCH

    def reader() -> None:
        streams = [read(batch_size=BATCH, end=num_batches * BATCH, show_progress=False) for read in readers]
        for (image, _), (text, _) in zip(*streams, strict=True):
            torch.from_numpy(image), torch.from_numpy(text)

    batch = next(iter(data.train_dataloader()))
    for name in COLUMNS:  # the same rows on both sides
        ours = batch.column(name).numpy()
        assert np.array_equal(ours, columns[name][indices[0]][:, : ours.shape[1]])
    sides = {"take": take, "rows": rows, "embedding_reader": reader}
    for work in sides.values():
        work()
    found = take_turns({name: lambda work=work: seconds(work) for name, work in sides.items()}, ROUNDS[size])
    handed = [float(num_batches * BATCH)] * ROUNDS[size]
    ratios = {"rows_vs_take": ratio(found["take"], found["rows"]), "rows_per_s": ratio(handed, found["rows"])}
    ratios |= {"take_per_s": ratio(handed, found["take"]), "reader_per_s": ratio(handed, found["embedding_reader"])}
    settings = {"batch": BATCH, "width": WIDTH, "dtype": "float16", "rows": NUM_ROWS[size], "num_workers": 0}
    report("loader", ratios, {**settings, "rounds": ROUNDS[size], "size": size})


if __name__ == "__main__":
    main()
