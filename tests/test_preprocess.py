"""Preprocessing: sizes, picture crop, pose clips and speaker masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinora.runtime.errors import InputError
from kinora.runtime.preprocess import actor_masks, crop_image, image_pixels, pick_pose_frames, pose_pixels, select_size
from kinora.runtime.preprocess.image import crop_window, resized_shape
from kinora.runtime.preprocess.pose import pose_clip
from PIL import Image


@settings(deadline=None)
@given(st.integers(8, 4000), st.integers(8, 4000), st.sampled_from([384 * 256, 704 * 384, 720 * 400, 1280 * 720]))
def test_sizes_are_whole_patches_inside_the_area(height: int, width: int, max_area: int) -> None:
    try:
        h, w = select_size(height, width, max_area)
    except InputError:
        assert max(height, width) / min(height, width) > 8  # only extreme strips have no size
        return
    assert h > 0 and w > 0
    assert h % 64 == 0 and w % 64 == 0
    assert h * w <= max_area


def test_portrait_and_landscape_mirror_each_other() -> None:
    assert select_size(1280, 720, 704 * 384) == (704, 384)
    assert select_size(720, 1280, 704 * 384) == (384, 704)


@pytest.mark.parametrize("size", [(0, 10, 4096), (10, 10, 100)])
def test_impossible_sizes_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(InputError):
        select_size(*size)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_crop_window_gives_the_target(size: int, target: int) -> None:
    before, after, offset = crop_window(size, target)
    assert size + before + after == max(size, target)
    assert 0 <= offset <= max(size, target) - target
    assert after - before in (0, 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 90), st.integers(4, 90), st.integers(1, 4), st.integers(1, 4))
def test_cropped_image_has_the_size_asked_for(height: int, width: int, rows: int, columns: int) -> None:
    image = Image.new("RGB", (width, height), "white")
    assert crop_image(image, 16 * rows, 16 * columns).size == (16 * columns, 16 * rows)


def test_too_narrow_picture_is_padded_with_black_and_kept_centred() -> None:
    pixels = image_pixels(np.full((200, 100, 3), 255, np.uint8), 64, 128)
    assert resized_shape(200, 100, 64) == (128, 64)
    assert (pixels[:, :, :32] == -1).all() and (pixels[:, :, 96:] == -1).all()
    assert (pixels[:, :, 32:96] == 1).all()


def test_pose_pixels_pad_with_grey_and_do_not_round_to_bytes() -> None:
    frames = torch.randint(0, 256, (2, 30, 20, 3), dtype=torch.uint8)
    pixels = pose_pixels(frames, 32, 64)
    assert pixels.shape == (2, 3, 32, 64)
    assert (pixels[..., :16] == 0).all()
    levels = (pixels[..., 16:48] + 1) * 127.5
    assert (levels - levels.round()).abs().max() > 0.1


def test_pose_clip_doubles_the_first_frame_and_fills_the_end() -> None:
    frames = torch.full((60, 16, 16, 3), 255, dtype=torch.uint8)
    second = pose_clip(frames, 1, 48, 16, 16)
    assert second.shape == (1, 3, 49, 16, 16)
    assert (second[:, :, :13] == 1).all() and (second[:, :, 13:] == -1).all()
    assert (pose_clip(frames, 2, 48, 16, 16) == -1).all()


def test_pose_frames_are_picked_at_the_nearest_rate() -> None:
    assert pick_pose_frames(50.0, 10, 48).tolist() == [0, 2, 4, 6, 8]
    assert pick_pose_frames(24.0, 10, 4).tolist() == [0, 1, 2, 3]


def test_background_hears_everyone_and_a_face_only_its_own_voice() -> None:
    left, right = torch.zeros(64, 128), torch.zeros(64, 128)
    left[:32, :32], right[:32, 96:] = 1, 1
    masks = actor_masks([left, right], 64, 128)
    assert masks.routing.shape == (2, 12, 4, 8, 1)
    face_left, face_right, between = (
        masks.routing[:, 0, 0, 0, 0],
        masks.routing[:, 0, 0, 7, 0],
        masks.routing[:, 0, 3, 4],
    )
    assert face_left.tolist() == [1, 0]
    assert face_right.tolist() == [0, 1]
    assert between.flatten().tolist() == [1, 1]


def test_one_patch_never_belongs_to_two_faces() -> None:
    mask = torch.ones(32, 32)
    masks = actor_masks([mask, mask, mask], 64, 64)
    assert masks.assigned.sum(0).max() == 1
    assert masks.assigned[2].all()


def test_masks_of_a_wrong_rank_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[h, w\] or \[T, h, w\]"):
        actor_masks([torch.zeros(1, 2, 3, 4)], 64, 64)
    with pytest.raises(InputError, match="mask"):
        actor_masks([], 64, 64)
