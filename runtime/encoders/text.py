"""Prompt -> text rows for the DiT: clean, tokenize with the `google/umt5-xxl` folder, encode, trim (wan.md 2.2.2)."""

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..errors import CheckpointError
from .umt5 import UMT5_XXL, Umt5Encoder, Umt5Size, trim

TEXT_LENGTH = 512
SPACES = regex.compile(r"\s+")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def _basic(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _whitespace(text: str) -> str:
    return SPACES.sub(" ", _basic(text)).strip()


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    words = _basic(text).replace("_", " ").translate(PUNCTUATION).lower()
    return SPACES.sub(" ", words).strip()


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,  # StableAvatar
    "basic": _basic,
    "whitespace": _whitespace,  # Wan and all others
    "lower": _lower,
    "canonicalize": _canonicalize,
}


def clean_text(text: str, mode: str = "whitespace") -> str:
    """Repair and normalise a prompt: broken encodings, HTML entities, white space. Modes: `CLEANERS`."""
    if mode not in CLEANERS:
        raise ValueError(f"unknown cleaning mode {mode!r}; choose one of {', '.join(CLEANERS)}")
    return CLEANERS[mode](text)


class TextTokenizer:
    """The UMT5 tokenizer of a local folder (`google/umt5-xxl`: tokenizer.json or spiece.model); never the network."""

    def __init__(self, folder: str | Path, length: int = TEXT_LENGTH, cleaning: str = "whitespace"):
        if not Path(folder).is_dir():
            raise CheckpointError(f"tokenizer folder {folder} is not there; it comes with the model as google/umt5-xxl")
        clean_text("", cleaning)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} holds no usable tokenizer ({str(error).splitlines()[0]}); it needs tokenizer.json and "
                "tokenizer_config.json of google/umt5-xxl"
            ) from error
        self.length = length
        self.cleaning = cleaning

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids [B, length] and mask [B, length] (1 = real token), int64; longer prompts are cut."""
        cleaned = [clean_text(text, self.cleaning) for text in texts]
        batch = self.tokenizer(
            cleaned,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"]


class TextEncoder:
    """Prompts -> one [n, D] tensor each, n = real tokens (the empty prompt has one, `</s>`)."""

    def __init__(self, tokenizer: TextTokenizer, encoder: Umt5Encoder):
        self.tokenizer = tokenizer
        self.encoder = encoder

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        tokenizer: str | Path,
        size: Umt5Size = UMT5_XXL,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "TextEncoder":
        """`checkpoint`: models_t5_umt5-xxl-enc-bf16.pth; `tokenizer`: the google/umt5-xxl folder beside it."""
        words = TextTokenizer(tokenizer)
        return cls(words, Umt5Encoder.load(checkpoint, size, dtype=dtype, device=device))

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """All `length` positions are encoded under the mask, then cut to the real tokens."""
        device = self.encoder.model.shared.weight.device
        ids, mask = (part.to(device) for part in self.tokenizer(texts))
        return trim(self.encoder(ids, mask), mask)
