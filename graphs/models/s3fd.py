"""S3FD face detector: a VGG-16 body with six detection levels (liveavatar.md, 4.4).

Keys are those of `sfd_face.pth`: `vgg.N`, `L2Norm{3_3,4_3,5_3}.weight`, `extras.N`, `loc.N`, `conf.N`. Boxes are
relative to the image: (x0, y0, x1, y1) in 0..1. IoU counts no extra pixel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "C", 512, 512, 512, "M", 512, 512, 512, "M")
TAPS = {15: "L2Norm3_3", 22: "L2Norm4_3", 29: "L2Norm5_3"}  # index in `vgg` -> norm of the detection level
SOURCES = (256, 512, 512, 1024, 512, 256)  # channels of the six levels
STEPS = (4, 8, 16, 32, 64, 128)
SIZES = (16, 32, 64, 128, 256, 512)
VARIANCES = (0.1, 0.2)
MEAN_RGB = (123.0, 117.0, 104.0)


@dataclass(frozen=True)
class DetectionLimits:
    """What counts as a detection: faces above `confidence`, the best `candidates`, NMS, the best `keep` of the rest."""

    confidence: float = 0.05
    candidates: int = 5000
    iou: float = 0.3
    keep: int = 750


class L2Norm(nn.Module):
    """x / (|x|_2 + 1e-10) * weight over the channels of [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        length = x.square().sum(1, keepdim=True).sqrt() + 1e-10
        return x / length * self.weight[:, None, None]


def _vgg() -> nn.ModuleList:
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG:
        if isinstance(item, int):
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
            channels = item
        else:
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=item == "C"))
    layers += [nn.Conv2d(channels, 1024, 3, padding=6, dilation=6), nn.ReLU(), nn.Conv2d(1024, 1024, 1), nn.ReLU()]
    return nn.ModuleList(layers)


class S3FD(nn.Module):
    """Face detector; `forward` gives raw predictions, `detect` the faces of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = _vgg()
        self.L2Norm3_3, self.L2Norm4_3, self.L2Norm5_3 = L2Norm(256), L2Norm(512), L2Norm(512)
        self.extras = nn.ModuleList(
            [
                nn.Conv2d(1024, 256, 1),
                nn.Conv2d(256, 512, 3, stride=2, padding=1),
                nn.Conv2d(512, 128, 1),
                nn.Conv2d(128, 256, 3, stride=2, padding=1),
            ]
        )
        self.loc = nn.ModuleList(nn.Conv2d(channels, 4, 3, padding=1) for channels in SOURCES)
        outputs = (4, 2, 2, 2, 2, 2)  # the first level tells three kinds of background apart
        self.conf = nn.ModuleList(nn.Conv2d(c, n, 3, padding=1) for c, n in zip(SOURCES, outputs, strict=True))

    def _levels(self, x: Tensor) -> list[Tensor]:
        levels = []
        for index, layer in enumerate(self.vgg):
            x = layer(x)
            if index in TAPS:
                levels.append(self.get_submodule(TAPS[index])(x))
        levels.append(x)
        for index, layer in enumerate(self.extras):
            x = F.relu(layer(x))
            if index % 2:
                levels.append(x)
        return levels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """RGB minus mean [B, 3, H, W] -> offsets [B, P, 4], probabilities [B, P, 2] (1 = face), priors [P, 4]."""
        levels = self._levels(images)
        offsets, logits = [], []
        for number, (level, loc, conf) in enumerate(zip(levels, self.loc, self.conf, strict=True)):
            scores = conf(level)  # [B, 2 or 4, h, w]
            if number == 0:
                scores = torch.cat((scores[:, :3].amax(1, keepdim=True), scores[:, 3:]), 1)
            offsets.append(loc(level).permute(0, 2, 3, 1).flatten(1, 2))  # [B, h*w, 4]
            logits.append(scores.permute(0, 2, 3, 1).flatten(1, 2))
        grids = [(level.shape[2], level.shape[3]) for level in levels]
        priors = prior_boxes(grids, (images.shape[2], images.shape[3])).to(images.device)
        return torch.cat(offsets, 1), torch.cat(logits, 1).softmax(-1), priors

    def detect(self, images: Tensor, limits: DetectionLimits | None = None) -> list[Tensor]:
        """Faces of RGB minus mean [B, 3, H, W]: for each picture rows (score, x0, y0, x1, y1), best first."""
        offsets, probabilities, priors = self(images)
        return [
            select_faces(o, p, priors, limits or DetectionLimits())
            for o, p in zip(offsets, probabilities[..., 1], strict=True)
        ]


def prior_boxes(
    grids: list[tuple[int, int]],
    image_size: tuple[int, int],
    steps: tuple[int, ...] = STEPS,
    sizes: tuple[int, ...] = SIZES,
) -> Tensor:
    """Priors [P, 4] as (cx, cy, w, h) relative to `image_size` (rows, columns), level-major, then row-major.

    Not clipped; computed in float64 and rounded once.
    """
    rows, columns = image_size
    priors = []
    for (h, w), step, size in zip(grids, steps, sizes, strict=True):
        y = (torch.arange(h, dtype=torch.float64) + 0.5) * step / rows
        x = (torch.arange(w, dtype=torch.float64) + 0.5) * step / columns
        cy, cx = torch.meshgrid(y, x, indexing="ij")
        extent = torch.full_like(cx, size)
        priors.append(torch.stack((cx, cy, extent / columns, extent / rows), -1).flatten(0, 1))  # [h*w, 4]
    return torch.cat(priors).float()


def decode_boxes(offsets: Tensor, priors: Tensor, variances: tuple[float, float] = VARIANCES) -> Tensor:
    """Offsets and priors [P, 4] -> corner boxes [P, 4] as (x0, y0, x1, y1)."""
    centre = priors[:, :2] + offsets[:, :2] * variances[0] * priors[:, 2:]
    size = priors[:, 2:] * torch.exp(offsets[:, 2:] * variances[1])
    return torch.cat((centre - size / 2, centre + size / 2), 1)


def iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of corner boxes [..., 4], broadcast; 0 where both are empty."""
    low = torch.maximum(box[..., :2], others[..., :2])
    high = torch.minimum(box[..., 2:], others[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = (box[..., 2:] - box[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1) - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def greedy_nms(boxes: Tensor, scores: Tensor, threshold: float, candidates: int | None = None) -> Tensor:
    """int64 indices of kept boxes, best first: each box drops the later ones with an IoU above `threshold`.

    boxes [N, 4] corners, scores [N]; `candidates` limits how many of the best are looked at.
    """
    order = scores.argsort(descending=True, stable=True)[:candidates]
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        order = rest[iou(boxes[best], boxes[rest]) <= threshold]
    return torch.stack(kept) if kept else order


def select_faces(offsets: Tensor, scores: Tensor, priors: Tensor, limits: DetectionLimits) -> Tensor:
    """Offsets [P, 4], face probabilities [P] and priors [P, 4] -> rows (score, x0, y0, x1, y1) [N, 5], best first."""
    chosen = scores > limits.confidence
    scores = scores[chosen]
    boxes = decode_boxes(offsets[chosen], priors[chosen])
    keep = greedy_nms(boxes, scores, limits.iou, limits.candidates)[: limits.keep]
    return torch.cat((scores[keep, None], boxes[keep]), 1)
