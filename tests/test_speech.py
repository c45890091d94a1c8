"""The synthetic speech corpus: splits, determinism, resampling, errors."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from kinora.train import speech, speech_texts

needs_espeak = pytest.mark.skipif(
    not (os.environ.get("ESPEAK_BINARY") or shutil.which("espeak-ng")), reason="needs espeak-ng: train/fetch_espeak.sh"
)


def test_voices_of_the_splits_are_disjoint():
    train, test = (set(speech.VARIANTS[split]) for split in speech.SPLITS)
    assert not train & test and len(train) > 40 and len(test) > 15


@pytest.mark.parametrize("language", speech_texts.LANGUAGES)
def test_texts_of_the_splits_are_disjoint(language):
    drawn = {
        split: {draw() for _ in range(300)}
        for split in speech.SPLITS
        for draw in [speech_texts.sentences(language, split, random.Random(1))]
    }
    assert not drawn["train"] & drawn["test"]
    assert len(drawn["train"]) > 80 and len(drawn["test"]) > 20
    assert all(speech_texts.text_split(text) == split for split, texts in drawn.items() for text in texts)


@pytest.mark.parametrize(("rate_in", "rate_out"), [(22050, 16000), (16000, 22050), (48000, 16000)])
def test_resampling_keeps_tones_in_place(rate_in, rate_out):
    time_in, time_out = torch.arange(rate_in) / rate_in, torch.arange(rate_out) / rate_out
    tones = torch.tensor([220.0, 3000.0, 6500.0])[:, None]
    out = speech.resample(torch.sin(2 * torch.pi * tones * time_in), rate_in, rate_out)
    assert out.shape == (3, rate_out)
    inner = slice(200, -200)
    expected = torch.sin(2 * torch.pi * tones * time_out)
    torch.testing.assert_close(out[:, inner], expected[:, inner], rtol=0, atol=5e-3)


def test_resampling_removes_what_would_alias():
    time = torch.arange(22050) / 22050
    out = speech.resample(torch.sin(2 * torch.pi * 9500.0 * time)[None], 22050, 16000)
    assert out[:, 200:-200].abs().max() < 0.01


@needs_espeak
def test_the_same_seed_speaks_the_same():
    first = speech.synthesise(3, 2.0, seed=4, workers=2)
    assert first.shape == (3, 32000) and first.dtype == torch.int16
    assert torch.equal(speech.synthesise(2, 2.0, seed=4, workers=1), first[:2])
    assert not torch.equal(speech.synthesise(3, 2.0, seed=5), first)
    assert not torch.equal(speech.synthesise(3, 2.0, seed=4, split="test"), first)
    assert (first.float().abs().amax(1) > 1000).all()


@needs_espeak
def test_every_voice_speaks():
    for variant in speech.VARIANTS["train"] + speech.VARIANTS["test"]:
        assert np.abs(speech.speak("one two", speech.Voice(f"en-us+{variant}"))).max() > 300, variant
    for language in speech_texts.LANGUAGES.values():
        for name in language.voices:
            assert np.abs(speech.speak(language.subjects[0], speech.Voice(name))).max() > 300, name


def test_a_missing_program_says_what_to_do(monkeypatch):
    monkeypatch.setenv("ESPEAK_BINARY", "/nowhere/espeak-ng")
    with pytest.raises(FileNotFoundError, match=r"fetch_espeak\.sh"):
        speech.synthesise(1, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 1.0, 0, "dev"), "split must be one of"), ((0, 1.0), "at least one clip"), ((1, 0.0), "positive length")],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        speech.synthesise(*arguments)
