"""Whether a picture shows what is said of it, asked of a visual question answering model from a local folder."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unclip.errors import ConfigError


def phrases_of(caption: str) -> list[str]:
    """What a caption speaks of, by the words that join it: "a red cup and a green plate" has two phrases."""
    parts = re.split(
        r",| and | on top of | on | under | above | below | beside | next to | left of | right of ", caption
    )
    return [part.strip() for part in parts if part.strip()]


class Questioner:
    """A ViLT or BLIP model for questions about pictures, as transformers' ``save_pretrained`` wrote it, with its processor.

    Raises ConfigError where transformers is missing, the folder holds no such model, or it knows no yes and no.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor
        except ImportError:
            raise ConfigError("asking a VQA model needs transformers: pip install 'unclip[diffusers]'") from None
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} has no config.json; give the local folder of a VQA model such as ViLT or BLIP")
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModelForVisualQuestionAnswering.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"transformers reads no VQA model with its processor from {folder}: {said}") from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.eval().requires_grad_(False).to(self.device)
        self.answers = {str(name).lower(): int(i) for i, name in self.model.config.id2label.items()}
        self.generates = self.model.config.model_type == "blip"
        if not self.generates and not {"yes", "no"} <= self.answers.keys():
            raise ConfigError(
                f"{folder} does not have yes and no among its {len(self.answers)} answers; it cannot judge"
            )

    def agrees(self, picture: np.ndarray, caption: str) -> float:
        """The product over the caption's phrases of P(yes) against P(no) (as B-VQA: Huang et al. 2023, T2I-CompBench)."""
        shares = [self._yes(picture, f"is there {phrase}?") for phrase in phrases_of(caption)]
        return float(np.prod(shares))

    @torch.no_grad()
    def _yes(self, picture: np.ndarray, question: str) -> float:
        given = self.processor(images=Image.fromarray(picture), text=question, return_tensors="pt").to(self.device)
        if self.generates:
            how = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
            first = self.model.generate(**given, **how).scores[0][0].float()
            answers = self.processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
            return float(first[answers].softmax(0)[0])
        logits = self.model(**given).logits[0].float()
        return float(logits[[self.answers["yes"], self.answers["no"]]].softmax(0)[0])
