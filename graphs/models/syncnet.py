"""SyncNet v2: audio and lip towers whose embeddings lie close where mouth and sound agree (liveavatar.md, 4.4).

Keys are those of `syncnet_v2.model`: `netcnnaud.*`, `netfcaud.*`, `netcnnlip.*`, `netfclip.*`; every convolution is
followed by batch norm and ReLU, pools count as indices. Used in eval mode (batch statistics are stored ones).
"""

from torch import Tensor, nn

EMBEDDING = 1024
FRAMES = 5  # video frames a window
COEFFICIENTS, COLUMNS = 13, 20  # of an audio window


def _conv2d(inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU()]


def _conv3d(
    inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int]
) -> list[nn.Module]:
    return [nn.Conv3d(inputs, outputs, kernel, stride, padding), nn.BatchNorm3d(outputs), nn.ReLU()]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, EMBEDDING))


class SyncNet(nn.Module):
    """Embeds audio windows and lip windows into one 1024-dimensional space; the distance between them is the score."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv2d(1, 64, 3, 1),
            nn.MaxPool2d(1, 1),
            *_conv2d(64, 192, 3, 1),
            nn.MaxPool2d(3, (1, 2)),
            *_conv2d(192, 384, 3, 1),
            *_conv2d(384, 256, 3, 1),
            *_conv2d(256, 256, 3, 1),
            nn.MaxPool2d(3, 2),
            *_conv2d(256, 512, (5, 4), 0),
        )
        self.netfcaud = _head()
        halve, flat = (1, 2, 2), (0, 1, 1)
        self.netcnnlip = nn.Sequential(
            *_conv3d(3, 96, (5, 7, 7), halve, (0, 0, 0)),
            nn.MaxPool3d((1, 3, 3), halve),
            *_conv3d(96, 256, (1, 5, 5), halve, flat),
            nn.MaxPool3d((1, 3, 3), halve, flat),
            *_conv3d(256, 256, (1, 3, 3), (1, 1, 1), flat),
            *_conv3d(256, 256, (1, 3, 3), (1, 1, 1), flat),
            *_conv3d(256, 256, (1, 3, 3), (1, 1, 1), flat),
            nn.MaxPool3d((1, 3, 3), halve),
            *_conv3d(256, 512, (1, 6, 6), (1, 1, 1), (0, 0, 0)),
        )
        self.netfclip = _head()

    def embed_audio(self, mfcc: Tensor) -> Tensor:
        """MFCC windows [N, 1, 13, 20] -> embeddings [N, 1024]."""
        _expect(mfcc, (1, COEFFICIENTS, COLUMNS), "MFCC windows")
        return self.netfcaud(self.netcnnaud(mfcc).flatten(1))

    def embed_lips(self, frames: Tensor) -> Tensor:
        """Face crops [N, 3, 5, 224, 224], BGR in 0..255 -> embeddings [N, 1024]."""
        _expect(frames, (3, FRAMES, 224, 224), "face crops")
        return self.netfclip(self.lip_features(frames))

    def lip_features(self, frames: Tensor) -> Tensor:
        """Convolutional features [N, 512] of face crops, before the head."""
        return self.netcnnlip(frames).flatten(1)


def _expect(x: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"SyncNet: {what} must be [N, {', '.join(map(str, shape))}], got {list(x.shape)}")
