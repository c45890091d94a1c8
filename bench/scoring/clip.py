"""Sync score of a clip, from pixels and samples: detect, track, crop, embed, compare (liveavatar.md, 4.4)."""

import torch
from torch import Tensor

from ...graphs.models.s3fd import MEAN_RGB, S3FD, greedy_nms
from ...graphs.models.syncnet import FRAMES, SyncNet
from .mfcc import SAMPLE_RATE, mfcc, mfcc_windows
from .resize import resize
from .scenes import find_scenes
from .sync import SyncScore, shift_distances, sync_score
from .tracks import DEFAULT_LIMITS, Track, TrackLimits, crop_face, crop_geometry, find_tracks

FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
SECONDS = 5.0  # of a clip that are scored
DETECTION_SCALE = 0.25
FACE_CONFIDENCE = 0.9
FACE_IOU = 0.1
BATCH = 20  # windows embedded at once


def window_count(frames: int, samples: int) -> int:
    """Windows of five frames that have both picture and sound (25 fps, 16 kHz); 0 for clips that are too short."""
    return max(0, min(frames, samples // SAMPLES_PER_FRAME) - FRAMES)


@torch.inference_mode()
def find_faces(frame: Tensor, detector: S3FD, scale: float = DETECTION_SCALE) -> Tensor:
    """Face boxes [n, 4] (x0, y0, x1, y1) in pixels of an RGB uint8 frame [H, W, 3], best first."""
    height, width = frame.shape[:2]
    picture = resize(frame, (round(height * scale), round(width * scale)), scale).float() - torch.tensor(MEAN_RGB)
    device = next(detector.parameters()).device
    (found,) = detector.detect(picture.permute(2, 0, 1)[None].to(device))
    found = found[found[:, 0] > FACE_CONFIDENCE].cpu()
    boxes = found[:, 1:] * torch.tensor([width, height, width, height])
    return boxes[greedy_nms(boxes, found[:, 0], FACE_IOU)]


def face_tracks(frames: Tensor, detector: S3FD, limits: TrackLimits = DEFAULT_LIMITS) -> list[Track]:
    """Face tracks of RGB uint8 frames [T, H, W, 3], scene by scene; none in scenes below `limits.min_track`."""
    tracks = []
    for first, end in find_scenes(frames):
        if end - first >= limits.min_track:
            faces = [find_faces(frame, detector) for frame in frames[first:end]]
            tracks += find_tracks(faces, limits, first)
    return tracks


def crop_track(frames: Tensor, track: Track) -> Tensor:
    """Face crops [N, 224, 224, 3] uint8 of a track."""
    half, x, y = crop_geometry(track.boxes)
    values = torch.stack((half, x, y), 1).tolist()
    return torch.stack([crop_face(frames[track.first + i], *value) for i, value in enumerate(values)])


@torch.inference_mode()
def embed_crops(crops: Tensor, samples: Tensor, syncnet: SyncNet) -> tuple[Tensor, Tensor]:
    """Lip and audio embeddings [V, 1024] of RGB uint8 face crops [N, 224, 224, 3] and their sound [M] (int16 range)."""
    count = window_count(len(crops), len(samples))
    if not count:
        raise ValueError(f"sync: {len(crops)} frames with {len(samples)} samples are too short, 6 frames are needed")
    device = next(syncnet.parameters()).device
    sound = mfcc_windows(mfcc(samples), count).float()
    pictures = crops.flip(-1).permute(3, 0, 1, 2)  # BGR [3, N, 224, 224]
    windows = pictures.unfold(1, FRAMES, 1)[:, :count].permute(1, 0, 4, 2, 3)  # [V, 3, 5, 224, 224], a view
    lips = [syncnet.embed_lips(part.to(device).float()) for part in windows.split(BATCH)]
    voices = [syncnet.embed_audio(part.to(device)) for part in sound.split(BATCH)]
    return torch.cat(lips).cpu(), torch.cat(voices).cpu()


def score_clip(
    frames: Tensor, samples: Tensor, detector: S3FD, syncnet: SyncNet, seconds: float = SECONDS
) -> SyncScore:
    """Sync score of the first face track in the first `seconds` of a clip.

    frames: RGB uint8 [T, H, W, 3] at 25 fps; samples: mono [M] at 16 kHz in int16 range; both on the CPU. The
    networks are in eval mode, on any device.
    ValueError when no face can be followed long enough.
    """
    frames, samples = frames[: round(seconds * FPS)], samples[: round(seconds * SAMPLE_RATE)]
    tracks = face_tracks(frames, detector)
    if not tracks:
        raise ValueError("sync: no face is visible long and large enough; score a longer clip or a larger face")
    track = tracks[0]
    crops = crop_track(frames, track)
    start = track.first * SAMPLES_PER_FRAME
    lips, voices = embed_crops(crops, samples[start : start + len(crops) * SAMPLES_PER_FRAME], syncnet)
    return sync_score(shift_distances(lips, voices))
