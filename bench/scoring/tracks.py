"""From face boxes in frames to tracks, and from a track to the square that SyncNet sees (liveavatar.md, 4.4)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...graphs.models.s3fd import iou
from .resize import resize

SMOOTHING = 13  # frames of the median filter
CROP_SCALE = 0.40
CROP_SIZE = 224
BORDER = 110  # grey beyond the picture


@dataclass(frozen=True)
class TrackLimits:
    """`max_gap` frames may miss between detections that overlap by `iou`; a track has more than `min_track` detections
    and a mean side, the larger of width and height, above `min_size` pixels."""

    max_gap: int = 25
    iou: float = 0.5
    min_track: int = 25
    min_size: float = 48.0


DEFAULT_LIMITS = TrackLimits()


@dataclass(frozen=True, eq=False)
class Track:
    """One face through consecutive frames: boxes [N, 4] (x0, y0, x1, y1) in pixels, float64, from `first` on."""

    first: int
    boxes: Tensor


def find_tracks(faces: list[Tensor], limits: TrackLimits = DEFAULT_LIMITS, first: int = 0) -> list[Track]:
    """Tracks in the boxes [n, 4] of consecutive frames, gaps filled linearly; `first` is the number of the first frame.

    Boxes are taken greedily, frame by frame. A box that follows one just taken in the same frame waits for the next
    pass, as in the original.
    """
    left = [[box.double() for box in frame] for frame in faces]
    tracks = []
    while any(left):
        numbers, boxes = _take_track(left, limits)
        if len(boxes) > limits.min_track:
            filled = _fill(numbers, torch.stack(boxes))
            size = (filled[:, 2:] - filled[:, :2]).mean(0).max()
            if float(size) > limits.min_size:
                tracks.append(Track(first + numbers[0], filled))
    return tracks


def _take_track(left: list[list[Tensor]], limits: TrackLimits) -> tuple[list[int], list[Tensor]]:
    numbers: list[int] = []
    boxes: list[Tensor] = []
    for number, frame in enumerate(left):
        position = 0
        while position < len(frame):
            if boxes:
                if number - numbers[-1] > limits.max_gap:
                    break
                if float(iou(frame[position], boxes[-1])) <= limits.iou:
                    position += 1
                    continue
            numbers.append(number)
            boxes.append(frame.pop(position))
            position += 1  # the next box has moved into this position and is passed over
    return numbers, boxes


def _fill(numbers: list[int], boxes: Tensor) -> Tensor:
    """Boxes of every frame from the first to the last number, by linear interpolation."""
    frames = np.arange(numbers[0], numbers[-1] + 1)
    return torch.from_numpy(np.stack([np.interp(frames, numbers, column) for column in boxes.T.numpy()], 1))


def median_filter(values: Tensor, size: int = SMOOTHING) -> Tensor:
    """Running median of [N] over `size` (odd) neighbours, zeros beyond the ends."""
    return F.pad(values, (size // 2, size // 2)).unfold(0, size, 1).median(-1).values


def crop_geometry(boxes: Tensor, smoothing: int = SMOOTHING) -> tuple[Tensor, Tensor, Tensor]:
    """Half side, centre x and centre y, each [N] and smoothed, of boxes [N, 4]."""
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    x, y = centre.unbind(1)
    return median_filter(half, smoothing), median_filter(x, smoothing), median_filter(y, smoothing)


def crop_face(frame: Tensor, half: float, x: float, y: float, scale: float = CROP_SCALE) -> Tensor:
    """Square around a face: RGB uint8 [H, W, 3] -> [224, 224, 3] uint8.

    Rows y - s .. y + s (1 + 2 scale), columns x -+ s (1 + scale) of the picture inside a grey border; more chin than
    forehead. ValueError when the box is empty.
    """
    border = int(half * (1 + 2 * scale))
    rows = int(y + border - half), int(y + border + half * (1 + 2 * scale))
    columns = int(x + border - half * (1 + scale)), int(x + border + half * (1 + scale))
    picture = F.pad(frame, (0, 0, *(border,) * 4), value=BORDER)  # [H + 2b, W + 2b, 3]
    cut = picture[max(rows[0], 0) : max(rows[1], 0), max(columns[0], 0) : max(columns[1], 0)]
    if 0 in cut.shape:
        raise ValueError(f"crop_face: the box at ({x:.0f}, {y:.0f}) with half side {half:.1f} lies outside the picture")
    return resize(cut, (CROP_SIZE, CROP_SIZE))
