"""LiveAvatar's preprocessing: size, reference picture, speaker masks (liveavatar.md, 3.1 and 3.10)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....runtime.preprocess import actor_masks, image_pixels, select_size
from ..case import Case
from ..registry import handles


@handles("liveavatar", "size_select*")
def size_select(case: Case) -> dict[str, Any]:
    rows = case.json["rows"]
    sizes = [select_size(row["h"], row["w"], row["max_area"]) for row in rows]
    table = [[row["h"], row["w"], row["max_area"], *size] for row, size in zip(rows, sizes, strict=True)]
    listed: dict[str, Any] = {f"json.rows.{i}.out": list(size) for i, size in enumerate(sizes)}
    return {**listed, "out.table": torch.tensor(table)}


@handles("liveavatar", "image_preproc*")
def image_preproc(case: Case) -> dict[str, Tensor]:
    return {
        f"out.{row['case']}.pixels": image_pixels(np.array(case[f"in.{row['case']}.rgb"]), *row["target_hw"])
        for row in case.json["cases"]
    }


@handles("liveavatar", "actor_masks*")
def masks(case: Case) -> dict[str, Tensor]:
    p = case.json
    result = actor_masks(
        [case[f"in.actor{i + 1}"] for i in range(p["actors"])],
        p["H"],
        p["W"],
        p["frames"],
        patch_pixels=p["patch_pixels"],
        dilation_ratio=p["ratio"],
        dilation_offset=p["radius_offset"],
    )
    return {"mid.assigned": result.assigned, "mid.dilated": result.dilated, "out.mask": result.routing}
