"""open_clip's byte-pair vocabulary in the files of transformers' CLIPTokenizer, slow and fast."""

import gzip
import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2


def write_tokenizer(folder: Path, context_length: int) -> None:
    """Write vocab.json, merges.txt and two configurations.

    Captions are padded with ``<|endoftext|>``. Karlo's tokenizer pads with "!", which turns that sign in a caption into
    padding; the text tower is causal and later stages mask the padding, so nothing else depends on it.
    """
    folder.mkdir(parents=True)
    vocabulary, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Tokens with their ids, in open_clip's order, and the merges, a pair of tokens with a space between them each."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe()) as file:
        merges = file.read().decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(pair.replace(" ", "") for pair in merges),
        START,
        END,
    ]
    return {token: index for index, token in enumerate(tokens)}, merges
