"""Bundles of models: export one from a model that `load` knows, verify it, look at it. `docs/bundles.md`."""

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints_tools.bundle.format import MANIFEST_FILE, BundleError
from ..checkpoints_tools.bundle.read import Bundle, is_bundle
from ..checkpoints_tools.bundle.verify import Verification, verify
from ..checkpoints_tools.bundle.write import check_goal, file_hashes, write_bundle
from ..graphs.models.liveavatar import LiveAvatar
from ..graphs.quantize import LIVEAVATAR_IGNORE, quantizable
from .errors import CheckpointError, InputError, OutputError
from .load import TINY_FOLDER, load
from .systems.bundle_parts import parts_of
from .systems.config_values import differences
from .systems.front_ends import FixedPrompt
from .systems.liveavatar import LiveAvatarSystem
from .systems.liveavatar_mode import GenerationMode

PRECISIONS = ("float32", "bfloat16", "fp8")
PUBLISHED = "liveavatar-14b"
TABLES = "tables"  # the part that `schedule_tables` fills
FP8_RECIPE = {
    "weights": "e4m3, one float32 scale an output channel: 1 / (448 / max |w|)",
    "activations": "e4m3, one float32 scale a token, taken as they come",
    "kept": list(LIVEAVATAR_IGNORE),
}
COMPARED = ("architecture", "precision", "recipe", "parts", "mode", "size", "max_area", "sources")  # of a manifest
LICENCES = {
    "tiny": ({"what": "weights", "licence": "Apache-2.0", "from": "Kinora"},),
    PUBLISHED: (
        {"what": "transformer, VAE, text encoder", "licence": "Apache-2.0", "from": "Wan-AI/Wan2.2-S2V-14B"},
        {"what": "distilled LoRA", "licence": "see the model card", "from": "Quark-Vision/Live-Avatar"},
        {"what": "speech encoder", "licence": "Apache-2.0", "from": "jonatasgrosman/wav2vec2-large-xlsr-53-english"},
    ),
}


def export_bundle(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: str = "bfloat16",
    prompt: str | None = None,
    tables: bool = False,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write `model`, as `load` takes it, to the bundle `output`; whole or not at all.

    - `precision`: "float32", "bfloat16", or "fp8": bfloat16 with the transformer's linear layers in e4m3.
    - `prompt`: keep the rows of this one prompt instead of the text encoder.
    - `tables`: add the folded tables of the mode's noise levels (`schedule_tables`).

    Errors: as `load`, and OutputError when the bundle cannot be written.
    """
    if is_bundle(Path(model)):
        raise InputError(f"{model} is a bundle already; copy its folder")
    _check_precision(precision)
    try:
        check_goal(Path(output), overwrite)
    except BundleError as error:
        raise OutputError(str(error)) from error
    # in FP8 quantised on the way, so that all of bfloat16 is never held
    system = load(model, checkpoint=checkpoint, precision=precision, placement="single", device=device).system
    if prompt is not None:
        if isinstance(system.encode_prompt, FixedPrompt):
            raise InputError(f"{model} takes no words; leave out the prompt")
        with torch.inference_mode():
            system = replace(system, encode_prompt=FixedPrompt(system.encode_prompt(prompt), prompt))
    parts = parts_of(system)
    if tables:
        parts.tensors[TABLES] = schedule_tables(system.dit, system.mode)
    manifest = {"model": Path(model).name, "kinora": version("kinora"), **parts.manifest}
    if precision == "fp8":
        manifest["recipe"] = FP8_RECIPE
    manifest["sources"] = _hashed_sources(model, checkpoint)
    manifest["licences"] = list(LICENCES.get(os.fspath(model), ()))  # a folder of one's own is not ours
    try:
        return write_bundle(Path(output), parts.tensors, manifest, copies=parts.copies, overwrite=overwrite)
    except BundleError as error:
        raise OutputError(str(error)) from error


def source_system(
    model: str | os.PathLike[str], *, checkpoint: str | os.PathLike[str] | None, precision: str, device: str
) -> LiveAvatarSystem:
    """The system that a bundle of `precision` is compared with: its linear layers are not quantised."""
    _check_precision(precision)
    kept = "float32" if precision == "float32" else "bfloat16"
    return load(model, checkpoint=checkpoint, precision=kept, placement="single", device=device).system


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")


def source_files(model: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """The files that a model is loaded from, by their names below its folder. CheckpointError when one is missing."""
    if os.fspath(model) != PUBLISHED:
        folder = TINY_FOLDER if os.fspath(model) == "tiny" else Path(model)
        return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")}
    from .systems.liveavatar_checkpoint import DIT_INDEX, SPEECH, TEXT_WEIGHTS, TOKENIZER, VAE_WEIGHTS, locate_files

    assert checkpoint is not None  # `load` has refused that
    files = locate_files(checkpoint)
    shards = json.loads((files.base / DIT_INDEX).read_text())["weight_map"].values()
    names = ["config.json", DIT_INDEX, *sorted(set(shards)), TEXT_WEIGHTS, VAE_WEIGHTS]
    found = {name: files.base / name for name in names}
    for below in (SPEECH, TOKENIZER):
        found |= {f"{below}/{path.name}": path for path in sorted((files.base / below).iterdir()) if path.is_file()}
    if files.lora is not None:
        found[files.lora.name] = files.lora
    return found


def _hashed_sources(
    model: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None
) -> list[dict[str, str | int]]:
    """`sources` of a manifest: name, size and SHA-256 of every file that a model is loaded from."""
    files = source_files(model, checkpoint)
    return [
        {"path": name, "size": path.stat().st_size, "sha256": sha256}
        for (name, path), sha256 in zip(files.items(), file_hashes(files.values()), strict=True)
    ]


@torch.inference_mode()
def schedule_tables(dit: LiveAvatar, mode: GenerationMode) -> dict[str, Tensor]:
    """What a program needs instead of the time embedding: the modulations of every noise level of `mode`.

    `timesteps` [S], `sigmas` [S + 1] float32; `step.<s>.blocks` [layers, 6, D]: shift, scale, gate of the attention and
    of the feed-forward; `step.<s>.head` [2, D]: shift, scale; `condition.blocks` [layers, 6, D] at time 0, for the
    prefill. Dtype of the model's own sums.
    """
    schedule = mode.schedule()
    times = schedule.timesteps[: mode.steps].float().cpu()
    found = {"timesteps": times, "sigmas": schedule.sigmas[: mode.steps + 1].float().cpu()}
    for name, time in [("condition", torch.zeros(())), *((f"step.{i}", t) for i, t in enumerate(times))]:
        state = dit.embed_time(time.reshape(1, 1).to(dit.device))
        rows = [torch.cat(block.modulate(state.e0), 1)[0] for block in dit.layers]  # [6, D] each
        found[f"{name}.blocks"] = torch.stack(rows)
        if name != "condition":
            found[f"{name}.head"] = (dit.head.modulation + state.e)[0]
    return found


def verify_bundle(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> Verification:
    """Check every byte of a bundle; with `source`, the model that it was made of, also that its weights are that
    model's, what quantisation cost, that the rows of a fixed prompt and the folded tables are what it computes, and
    that the manifest says of it what an export would (COMPARED).

    Errors: CheckpointError when it cannot be read at all; what is wrong inside is in the result.
    """
    bundle = open_bundle(folder)
    if source is None:
        return verify(bundle)
    precision, sections = bundle.manifest.get("precision"), bundle.manifest.get("parts")
    if precision not in PRECISIONS or not isinstance(sections, dict):
        raise CheckpointError(f"{folder}: its manifest does not say how it was made")
    system = source_system(source, checkpoint=checkpoint, precision=str(precision), device=device)
    parts, results = parts_of(system), {}
    expected = {**parts.manifest, "sources": _hashed_sources(source, checkpoint)}
    if precision == "fp8":  # which the source is not
        expected |= {"precision": precision, "recipe": FP8_RECIPE}
        expected["parts"]["dit"]["fp8"] = {"granularity": "row", "layers": quantizable(system.dit)}
    if (prompt := _prompt_of(sections)) is not None and not isinstance(system.encode_prompt, FixedPrompt):
        del parts.tensors["text"]  # the bundle holds what the encoder made, which is no weight
        expected["parts"]["text"] = {"kind": "fixed", "prompt": prompt}
        with torch.inference_mode():
            results["text"] = {"rows": system.encode_prompt(prompt)}
    if TABLES in bundle.parts:
        results[TABLES] = schedule_tables(system.dit, system.mode)
    found = verify(bundle, parts.tensors, results)
    said = {key: bundle.manifest[key] for key in COMPARED if key in bundle.manifest}
    for told in differences(said, json.loads(json.dumps(expected))):
        found.problems.append(f"{MANIFEST_FILE} and the source differ: {told}")
    return found


def _prompt_of(sections: dict[str, Any]) -> str | None:
    """The words that a bundle was exported with instead of its text encoder."""
    text = sections.get("text")
    if not isinstance(text, dict) or text.get("kind") != "fixed":
        return None
    prompt = text.get("prompt")
    return prompt if isinstance(prompt, str) else None


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """A bundle whose index was checked. Raises CheckpointError."""
    try:
        return Bundle.open(Path(folder))
    except BundleError as error:
        raise CheckpointError(str(error)) from error
