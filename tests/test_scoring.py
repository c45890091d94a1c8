"""Sync scoring: MFCC against its definition, planted offsets, NMS, tracks, crops, and the whole pipeline on a clip."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.bench.scoring import clip, score_clip, shift_distances, sync_score
from kinora.bench.scoring.mfcc import mfcc, mfcc_windows
from kinora.bench.scoring.resize import resize
from kinora.bench.scoring.scenes import find_scenes, hsv
from kinora.bench.scoring.sync import SyncScore
from kinora.bench.scoring.tracks import TrackLimits, crop_face, crop_geometry, find_tracks, median_filter
from kinora.graphs.models.s3fd import S3FD, DetectionLimits, decode_boxes, greedy_nms, iou, prior_boxes, select_faces
from kinora.graphs.models.syncnet import SyncNet


def test_networks_have_the_published_size() -> None:
    with torch.device("meta"):
        syncnet, detector = SyncNet(), S3FD()
    assert [k for k, m in syncnet.netcnnlip.named_children() if isinstance(m, torch.nn.Conv3d)] == [
        *("0", "4", "8", "11", "14", "18")
    ]
    assert detector.vgg[31].weight.shape == (1024, 512, 3, 3) and detector.vgg[31].dilation == (6, 6)
    assert [layer.weight.shape[0] for layer in detector.conf] == [4, 2, 2, 2, 2, 2]


def test_syncnet_rejects_wrong_windows() -> None:
    with torch.device("meta"):
        model = SyncNet()
        with pytest.raises(ValueError, match="MFCC windows must be"):
            model.embed_audio(torch.zeros(1, 13, 20))
        with pytest.raises(ValueError, match="face crops must be"):
            model.embed_lips(torch.zeros(1, 3, 5, 112, 112))


def test_mfcc_against_a_direct_transcription() -> None:
    """One frame by loops and an explicit Fourier sum, from the formulas."""
    x = np.random.default_rng(3).integers(-3000, 3000, 400).astype(np.float64)
    y = np.append(x[0], x[1:] - 0.97 * x[:-1])
    n = np.arange(400)
    power = np.array([abs(np.sum(y * np.exp(-2j * np.pi * k * n / 512))) ** 2 / 512 for k in range(257)])
    mel_top = 2595 * math.log10(1 + 8000 / 700)
    corners = [math.floor(513 * 700 * (10 ** (mel_top * i / 27 / 2595) - 1) / 16000) for i in range(28)]
    energies = []
    for j in range(26):
        low, peak, high = corners[j : j + 3]
        total = sum(power[i] * (i - low) / (peak - low) for i in range(low, peak))
        energies.append(total + sum(power[i] * (high - i) / (high - peak) for i in range(peak, high)))
    logs = np.log(energies)
    want = []
    for k in range(13):
        total = sum(logs[m] * math.cos(math.pi * k * (2 * m + 1) / 52) for m in range(26))
        total *= math.sqrt((1 if k == 0 else 2) / 26)
        want.append(total * (1 + 11 * math.sin(math.pi * k / 22)))
    want[0] = math.log(power.sum())
    got = mfcc(torch.from_numpy(x))
    assert got.shape == (13, 1) and got.dtype == torch.float64
    np.testing.assert_allclose(got[:, 0].numpy(), want, rtol=1e-9)


@given(samples=st.integers(1, 4000))
@settings(max_examples=30, deadline=None)
def test_mfcc_frame_count_and_silence(samples: int) -> None:
    coefficients = mfcc(torch.zeros(samples, dtype=torch.int16))
    assert coefficients.shape == (13, 1 + max(0, math.ceil((samples - 400) / 160)))
    assert coefficients.isfinite().all()
    torch.testing.assert_close(coefficients[0, 0].item(), math.log(np.finfo(np.float64).eps))


def test_mfcc_errors_and_windows() -> None:
    with pytest.raises(ValueError, match="mono samples"):
        mfcc(torch.zeros(0))
    with pytest.raises(ValueError, match="mono samples"):
        mfcc(torch.zeros(2, 100))
    table = torch.arange(13 * 40.0).view(13, 40)
    windows = mfcc_windows(table, 6)
    assert torch.equal(windows[5, 0], table[:, 20:40])
    with pytest.raises(ValueError, match="44 columns"):
        mfcc_windows(table, 7)


@given(late=st.integers(-15, 15), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_planted_offset_is_found(late: int, seed: int) -> None:
    source = torch.randn(90, 32, generator=torch.Generator().manual_seed(seed))
    video, audio = source[20:70], source[20 - late : 70 - late]
    score = sync_score(shift_distances(video, audio))
    assert score.offset == -late
    assert score.confidence > 1 and score.distance < 5


def test_silence_beyond_the_ends_counts() -> None:
    video = torch.ones(3, 4)
    distances = shift_distances(video, torch.ones(3, 4), 2)
    length = 2.0  # of an all-ones vector, the distance to the zeros outside
    torch.testing.assert_close(distances, torch.tensor([2, 1, 0, 1, 2]) * length / 3, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="as many video as audio"):
        shift_distances(video, torch.ones(4, 4))


def _random_boxes(count: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g)
    return torch.cat((corner, corner + 0.05 + torch.rand(count, 2, generator=g) / 2), 1)


@given(count=st.integers(0, 40), seed=st.integers(0, 99), threshold=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_nms_keeps_exactly_the_undominated(count: int, seed: int, threshold: float) -> None:
    boxes = _random_boxes(count, seed)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    keep = greedy_nms(boxes, scores, threshold).tolist()
    assert scores[keep].tolist() == sorted(scores[keep].tolist(), reverse=True)
    for i in range(count):
        better = [k for k in keep if scores[k] > scores[i]]
        dropped = any(float(iou(boxes[i], boxes[k])) > threshold for k in better)
        assert (i in keep) != dropped


def test_iou_counts_no_extra_pixel() -> None:
    a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    assert float(iou(a, b)) == pytest.approx(1 / 3)
    assert float(iou(torch.zeros(4), torch.zeros(4))) == 0


def test_priors_and_decode() -> None:
    priors = prior_boxes([(2, 3)], (8, 12), (4,), (16,))
    assert priors.shape == (6, 4)
    torch.testing.assert_close(priors[4], torch.tensor([6 / 12, 6 / 8, 16 / 12, 16 / 8]))
    box = decode_boxes(torch.tensor([[1.0, 0.0, math.log(2) / 0.2, 0.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    torch.testing.assert_close(box, torch.tensor([[0.52 - 0.2, 0.3, 0.52 + 0.2, 0.7]]))


def test_face_selection_limits() -> None:
    priors = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.21, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])
    scores = torch.tensor([0.8, 0.9, 0.7, 0.04])
    rows = select_faces(torch.zeros(4, 4), scores, priors, DetectionLimits())
    torch.testing.assert_close(rows[:, 0], torch.tensor([0.9, 0.7]))
    assert len(select_faces(torch.zeros(4, 4), scores, priors, DetectionLimits(keep=1))) == 1
    assert len(select_faces(torch.zeros(4, 4), scores, priors, DetectionLimits(candidates=2))) == 1
    assert select_faces(torch.zeros(4, 4), scores * 0, priors, DetectionLimits()).shape == (0, 5)


def _box(x: float, side: float = 60.0) -> torch.Tensor:
    return torch.tensor([[x, 10.0, x + side, 10.0 + side]])


def test_tracks_fill_gaps_and_drop_what_is_short_or_small() -> None:
    none = torch.zeros(0, 4)
    moving = [_box(float(i)) for i in range(40)]
    for gap in range(10, 20):
        moving[gap] = none
    (track,) = find_tracks(moving, first=7)
    assert track.first == 7 and track.boxes.shape == (40, 4)
    torch.testing.assert_close(track.boxes[:, 0], torch.arange(40, dtype=torch.float64))
    assert find_tracks([_box(0.0)] * 25) == []
    assert find_tracks([_box(0.0, 48.0)] * 40) == []
    assert find_tracks([_box(0.0)] * 30 + [none] * 26 + [_box(0.0)] * 20, TrackLimits())[0].boxes.shape == (30, 4)
    two = find_tracks([torch.cat((_box(0.0), _box(200.0)))] * 30)
    assert [float(t.boxes[0, 0]) for t in two] == [0.0, 200.0]


def test_median_filter_is_zero_padded() -> None:
    assert median_filter(torch.tensor([5.0, 1.0, 9.0, 2.0]), 3).tolist() == [1.0, 5.0, 2.0, 2.0]


def test_crop_geometry_and_pixels() -> None:
    boxes = torch.tensor([[40.0, 30.0, 60.0, 60.0]]).double().expand(20, 4)
    half, x, y = crop_geometry(boxes)
    assert (half[10], x[10], y[10]) == (15, 50, 45)
    frame = torch.zeros(100, 120, 3, dtype=torch.uint8)
    frame[:, :50] = 200
    crop = crop_face(frame, 15.0, 50.0, 45.0)
    assert crop.shape == (224, 224, 3) and crop.dtype == torch.uint8
    assert (crop[:, :106] == 200).all() and (crop[:, 118:] == 0).all()
    corner = crop_face(frame, 15.0, 0.0, 0.0)
    assert (corner[:100, :100] == 110).all() and corner[-1, -1, 0] == 200
    with pytest.raises(ValueError, match="outside the picture"):
        crop_face(frame, 15.0, 500.0, 45.0)


@given(height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 40), columns=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_resize_is_bilinear_within_one_level(height: int, width: int, rows: int, columns: int) -> None:
    picture = torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(height), dtype=torch.uint8
    )
    ours = resize(picture, (rows, columns))
    exact = torch.nn.functional.interpolate(
        picture.permute(2, 0, 1)[None].double(), (rows, columns), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    assert (ours.double() - exact).abs().max() <= 1.0
    assert torch.equal(resize(picture, (height, width)), picture)


def test_resize_by_a_factor_keeps_the_pitch() -> None:
    ramp = torch.arange(0, 180, 2, dtype=torch.uint8)[None, :, None].expand(4, 90, 3)
    assert resize(ramp, (1, 22), 0.25)[0, :, 0].tolist() == [3 + 8 * i for i in range(22)]
    with pytest.raises(ValueError, match="uint8"):
        resize(ramp.float(), (1, 22))


def test_scene_cuts() -> None:
    dark, bright = torch.full((8, 8, 3), 20, dtype=torch.uint8), torch.full((8, 8, 3), 220, dtype=torch.uint8)
    frames = torch.stack([dark] * 20 + [bright] * 20)
    assert find_scenes(frames) == [(0, 20), (20, 40)]
    assert find_scenes(torch.stack([dark] * 10 + [bright] * 30)) == [(0, 40)]
    primary = torch.tensor([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 7, 7]]], dtype=torch.uint8)
    assert hsv(primary)[0].tolist() == [[0, 255, 255], [60, 255, 255], [120, 255, 255], [0, 0, 7]]


class _FixedDetector(torch.nn.Module):
    """Finds one face at a fixed place, and one that is not sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.device_mark = torch.nn.Parameter(torch.zeros(1))

    def detect(self, images: torch.Tensor) -> list[torch.Tensor]:
        face, doubt = [0.99, 0.25, 0.25, 0.75, 0.75], [0.89, 0.0, 0.0, 0.2, 0.2]
        return [torch.tensor([face, doubt])] * len(images)


class _BrightnessNet(torch.nn.Module):
    """Embeds loudness and brightness of the first frame of a window alike, so that the right shift can be known."""

    def __init__(self) -> None:
        super().__init__()
        self.device_mark = torch.nn.Parameter(torch.zeros(1))

    def embed_lips(self, frames: torch.Tensor) -> torch.Tensor:
        return frames[:, :, 0].mean((1, 2, 3))[:, None] * torch.ones(8)

    def embed_audio(self, windows: torch.Tensor) -> torch.Tensor:
        return 200 * (windows[:, 0, 0, 0] > 10)[:, None] * torch.ones(8)


@pytest.mark.parametrize("late", [-4, 0, 6])
def test_score_of_a_clip_with_planted_offset(late: int) -> None:
    g = torch.Generator().manual_seed(5)
    loud = torch.rand(140, generator=g) > 0.5
    frames = torch.zeros(125, 100, 100, 3, dtype=torch.uint8)
    frames[:] = (loud[10:135] * 40 + 100)[:, None, None, None].to(torch.uint8)
    noise = (torch.rand(140 * 640, generator=g) * 2000 - 1000) * loud.repeat_interleave(640)
    start = (10 - late) * 640
    score = score_clip(frames, noise[start : start + 125 * 640].round(), _FixedDetector(), _BrightnessNet())
    assert isinstance(score, SyncScore) and score.offset == -late


def test_clip_errors() -> None:
    frames = torch.zeros(60, 100, 100, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no face"):
        score_clip(frames[:20], torch.zeros(20 * 640), _FixedDetector(), _BrightnessNet())
    with pytest.raises(ValueError, match="too short"):
        score_clip(frames, torch.zeros(5 * 640), _FixedDetector(), _BrightnessNet())


def test_window_count() -> None:
    assert clip.window_count(25, 16000) == 20
    assert clip.window_count(25, 6 * 640) == 1
    assert clip.window_count(3, 16000) == 0
