"""Inputs of the systems: picture size, pixels of pictures and pose videos, speaker masks."""

from .image import crop_image, image_pixels
from .masks import actor_masks
from .pose import pick_pose_frames, pose_pixels
from .size import select_size

__all__ = ["actor_masks", "crop_image", "image_pixels", "pick_pose_frames", "pose_pixels", "select_size"]
