"""A bundle -> the system that it was made of: weights go to their device as they lie, nothing is converted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...checkpoints_tools.assign import KeyMismatch
from ...checkpoints_tools.bundle.device import read_to_device
from ...checkpoints_tools.bundle.format import MANIFEST_FILE, BundleError
from ...checkpoints_tools.bundle.read import Bundle
from ...graphs.models.liveavatar import LiveAvatar, LiveAvatarConfig
from ...graphs.models.speech import SpeechConfig, SpeechFrontEnd
from ...graphs.models.wan_vae import VaeConfig, WanVae
from ...graphs.quantize import Fp8Linear
from ..errors import CheckpointError, InputError
from .bundle_parts import TOKENIZER, VAE_PRECISIONS, weights_of
from .config_values import from_json, to_json
from .front_ends import FixedPrompt, SmallSpeech
from .liveavatar import LiveAvatarSystem
from .liveavatar_mode import GenerationMode

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
LARGEST = 1 << 20  # no side of a module is larger


def load_bundle(folder: Path, precision: str, device: torch.device) -> LiveAvatarSystem:
    """The system of a bundle, on `device`.

    `precision`: "auto", or that of the bundle. Errors: InputError for another precision, CheckpointError for files
    that are damaged, missing or not of this model; checksums are not compared (`kinora bundle verify` does).
    """
    with _explained(folder):
        bundle = Bundle.open(folder)
        manifest = bundle.manifest
        held = str(manifest["precision"])
    if precision not in ("auto", held):
        raise InputError(f"{folder} holds {held} weights; export another bundle for precision {precision!r}")
    with _explained(folder):
        if manifest["architecture"] != "liveavatar":
            raise CheckpointError(f"{folder} holds {manifest['architecture']!r}, which this version cannot run")
        sections = manifest["parts"]
        mode = from_json(GenerationMode, manifest["mode"])
        size = None if manifest["size"] is None else (int(manifest["size"][0]), int(manifest["size"][1]))
        return LiveAvatarSystem(
            _dit(bundle, sections["dit"], device),
            _vae(bundle, sections["vae"], device),
            mode,
            _text(bundle, sections["text"], device),
            _speech(bundle, sections["speech"], device),
            size=size,
            max_area=int(manifest["max_area"]),
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Trouble with a bundle becomes a CheckpointError that names it."""
    try:
        yield
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE} describes no model ({error!r}); copy it again") from error


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules made inside have no memory. Raises ValueError for sizes that no module can have."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"no model has such sizes: {error}") from error


def _config(kind: type[T], section: Mapping[str, Any], bundle: Bundle, part: str) -> T:
    """The sizes of a part. Raises ValueError for those that its tensors cannot have, before anything is built."""
    config, tensors = from_json(kind, section["config"]), len(bundle.records(part))
    for name, value in to_json(config).items():
        most = tensors if "layers" in name or "blocks" in name else LARGEST
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number > most for number in numbers):
            raise ValueError(f"{part} with {name} = {value} has not {tensors} tensors")
    return config


def _dit(bundle: Bundle, section: Mapping[str, Any], device: torch.device) -> LiveAvatar:
    with _on_meta():
        dit = LiveAvatar(_config(LiveAvatarConfig, section, bundle, "dit")).to(_dtype(section))
        for name in section["fp8"]["layers"] if section["fp8"] else ():
            parent, _, leaf = name.rpartition(".")
            layer = Fp8Linear(dit.get_submodule(name), section["fp8"]["granularity"])  # type: ignore[arg-type]
            setattr(dit.get_submodule(parent), leaf, layer)
    return _filled(dit, bundle, "dit", device)


def _vae(bundle: Bundle, section: Mapping[str, Any], device: torch.device) -> WanVae:
    with _on_meta():
        vae = WanVae(_config(VaeConfig, section, bundle, "vae"), VAE_PRECISIONS[section["precision"]])
    return _filled(vae, bundle, "vae", device)


def _speech(bundle: Bundle, section: Mapping[str, Any], device: torch.device) -> Any:
    if section["kind"] == "small":
        with _on_meta():
            front_end = SpeechFrontEnd(_config(SpeechConfig, section, bundle, "speech")).to(_dtype(section))
        return SmallSpeech(_filled(front_end, bundle, "speech", device), device)
    if section["kind"] != "wav2vec2":
        raise ValueError(f"speech encoder {section['kind']!r} is not known")
    from ..encoders.wav2vec import Wav2Vec2Encoder, Wav2Vec2Size
    from .encoder_front_ends import Wav2Vec2Speech

    with _on_meta():
        encoder = Wav2Vec2Encoder(_config(Wav2Vec2Size, section, bundle, "speech")).to(_dtype(section))
    _filled(encoder.model, bundle, "speech", device)
    return Wav2Vec2Speech(encoder)


def _text(bundle: Bundle, section: Mapping[str, Any], device: torch.device) -> Any:
    if section["kind"] == "fixed":
        return FixedPrompt(read_to_device(bundle, "text", device)["rows"], section["prompt"])
    if section["kind"] != "umt5":
        raise ValueError(f"text encoder {section['kind']!r} is not known")
    from ..encoders.text import TextEncoder, TextTokenizer
    from ..encoders.umt5 import Umt5Encoder, Umt5Size
    from .encoder_front_ends import EncodedPrompt

    words = TextTokenizer(bundle.folder / TOKENIZER)
    with _on_meta():
        encoder = Umt5Encoder(_config(Umt5Size, section, bundle, "text")).to(_dtype(section))
    _filled(encoder.model, bundle, "text", device)
    return EncodedPrompt(TextEncoder(words, encoder))


def _dtype(section: Mapping[str, Any]) -> torch.dtype:
    dtype = getattr(torch, section["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{section['dtype']!r} is no dtype")
    return dtype


def _filled(module: M, bundle: Bundle, part: str, device: torch.device) -> M:
    """`module` (on the meta device) with the tensors of a part, which must have its names, shapes and dtypes."""
    wanted, held = weights_of(module), bundle.records(part)
    missing = [key for key in wanted if key not in held]
    unexpected = [key for key in held if key not in wanted]
    differing = [
        f"{key} {held[key].dtype.name} {list(held[key].shape)}, expected {_described(value)}"
        for key, value in wanted.items()
        if key in held and (held[key].dtype.torch, held[key].shape) != (value.dtype, tuple(value.shape))
    ]
    if missing or unexpected or differing:
        raise CheckpointError(f"{bundle.folder}: {KeyMismatch(f'{part} network', missing, unexpected, differing)}")
    module.load_state_dict(read_to_device(bundle, part, device), strict=False, assign=True)
    return module.requires_grad_(False).eval()


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
