"""Golden cases of sync scoring: liveavatar `syncnet`, `s3fd`, `sync_mfcc`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ....graphs.models import s3fd as faces
from ....graphs.models.syncnet import SyncNet
from ...scoring.clip import window_count
from ...scoring.mfcc import mfcc, mfcc_windows
from ...scoring.sync import shift_distances, sync_score
from ..case import Case
from ..registry import handles


def seed_weights(model: nn.Module, seed: int) -> None:
    """The recipe of the .json: one normal draw a key, in sorted order, scaled by the kind of tensor."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in sorted(model.state_dict().items()):
        if not value.is_floating_point():
            state[key] = value
            continue
        r = torch.randn(value.shape, generator=generator)
        if key.startswith("L2Norm"):
            state[key] = 5 + r
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * r.abs()
        elif key.endswith(("running_mean", "bias")):
            state[key] = 0.05 * r
        elif value.ndim == 1:
            state[key] = 1 + 0.1 * r
        else:
            state[key] = r * math.sqrt(2 / math.prod(value.shape[1:]))
    model.load_state_dict(state, strict=True)


def _check_keys(model: nn.Module, keys: list[str]) -> None:
    if set(model.state_dict()) != set(keys):
        raise ValueError(f"keys differ from the golden's: {sorted(set(model.state_dict()) ^ set(keys))[:6]}")


@handles("liveavatar", "syncnet")
@torch.inference_mode()
def syncnet(case: Case) -> dict[str, Tensor]:
    j = case.json
    model = SyncNet().eval()
    _check_keys(model, j["keys"])
    seed_weights(model, j["weight_seed"])
    distances = shift_distances(case["in.video_feat"], case["in.audio_feat"], j["vshift"])
    score = sync_score(distances)
    named = {"offset": float(score.offset), "conf": score.confidence, "dist": score.distance}
    priors = j["priorbox"]
    dets = case["in.dets"]  # x0, y0, x1, y1, score
    return {
        "mid.mdist": distances,
        "out.offset_conf_dist": torch.tensor([named[key] for key in j["order_of_offset_conf_dist"]]),
        "out.audio_feat": model.embed_audio(case["in.mfcc"]),
        "out.lip_feat": model.embed_lips(case["in.lip_f16"].float()),
        "out.decoded": faces.decode_boxes(case["in.loc"], case["in.priors"], tuple(j["variances"])),
        "out.priorbox": faces.prior_boxes(
            priors["feature_maps"], priors["image_hw"], tuple(priors["steps"]), tuple(priors["sizes"])
        ),
        "out.nms_keep": faces.greedy_nms(dets[:, :4], dets[:, 4], j["nms"]["threshold"]),
    }


@handles("liveavatar", "s3fd")
@torch.inference_mode()
def s3fd(case: Case) -> dict[str, Any]:
    j = case.json
    model = faces.S3FD().eval()
    _check_keys(model, j["keys"])
    seed_weights(model, j["weight_seed"])
    image = (case["in.image_rgb"].float() - torch.tensor(j["mean_rgb"])[:, None, None]) * j["input_scale"]
    offsets, probabilities, priors = model(image)
    limits = faces.DetectionLimits(j["confidence"], j["nms_top_k"], j["nms_threshold"], j["top_k"])
    (detections,) = model.detect(image, limits)
    return {
        "mid.loc": offsets,
        "mid.conf": probabilities,
        "mid.priors": priors,
        "out.count": torch.tensor([len(detections)]),
        "out.detections": detections,
    }


@handles("liveavatar", "sync_mfcc")
def sync_mfcc(case: Case) -> dict[str, Any]:
    samples = case["in.wav_int16"]
    coefficients = mfcc(samples)
    count = window_count(case.json["video_frames"], len(samples))
    return {
        "out.mfcc": coefficients,
        "mid.windows": mfcc_windows(coefficients, count),
        "json.windows": count,
    }
