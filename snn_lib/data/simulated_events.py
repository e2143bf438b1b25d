"""Simulated recordings of MNIST by an event camera, in the files and folders of N-MNIST.

An image stands still while the camera looks around in three saccades, along the sides of a
triangle. A pixel sees the logarithm of its light and sends an event where that has changed by the
pixel's threshold.

The camera resembles that of N-MNIST: its path and the default settings were fitted to real
recordings, so that the recordings of the same images have the same frames. With it you can try
everything behind the camera without N-MNIST. docs/event_vision.md says how a network that has seen
nothing else reads real recordings.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from snn_lib.data.batches import default_dtype
from snn_lib.data.events import NMNIST_SIDE, Events, nmnist_bytes
from snn_lib.data.mnist import load_mnist
from snn_lib.errors import require
from snn_lib.files import write_atomically
from snn_lib.seeds import batch_generator
from snn_lib.settings import Settings, setting

DURATION = 300  # milliseconds
STEP = 1.0  # milliseconds between two looks at the light
BLOCK = 100  # recordings that are simulated together, with random numbers of their own
# The image on the sensor of N-MNIST: at these milliseconds its middle is so many pixels right of
# the sensor's middle, and below it. This is a reach of 6 pixels.
RIGHT = (0, -2.4), (46, -2.75), (74, -1.05), (100, -0.8), (195, 2.4), (218, 2.9), (300, -2.6)
BELOW = (0, -2.2), (83, 3.65), (128, 3.2), (185, -1.7), (300, -1.8)


@dataclass
class CameraSettings(Settings):
    """The simulated event camera."""

    threshold: float = setting(0.2, "change of log(light) that is an event", at_least=0.01)
    spread: float = setting(0.1, "relative deviation of the pixels' thresholds", at_least=0)
    refractory: float = setting(0.5, "milliseconds that a pixel rests after an event", at_least=0)
    noise: float = setting(0.3, "random events of each pixel in a second", at_least=0, at_most=1000)
    black: float = setting(0.2, "light of a black digit; white has 1", at_least=0.001)
    blur: float = setting(0.5, "deviation of the lens's Gaussian blur, in pixels", above=0)
    reach: float = setting(
        6.0, "height of the saccades' triangle, in pixels", at_least=0, at_most=34
    )
    seed: int = setting(0, "seed of thresholds and noise", at_least=0)

    def folder(self, root: Path) -> Path:
        """The folder of this camera's recordings. Another camera has another folder."""
        settings = json.dumps(asdict(self), sort_keys=True).encode()
        return root / f"simulated_nmnist_{hashlib.sha256(settings).hexdigest()[:8]}"


def simulated_recordings(camera: CameraSettings, root: Path, train: bool, count: int) -> list[Path]:
    """Lists the recordings of MNIST's first images, and makes those that are missing.

    Recordings are made in blocks. After a block's files, a list of them with their checksums is
    written. A block without its list, or with a file that differs from its checksum, is made again.
    A recording depends only on the camera and the number of its image, so several processes may
    make the same block.

    Args:
        camera: the camera.
        root: the folder of all data sets, with MNIST in it.
        train: whether to record the training images or the test images.
        count: number of recordings, at most as many as there are images.

    Raises:
        InputError: there is no MNIST, or the camera records no event of an image.
        RunError, OSError: the recordings cannot be written.
    """
    images, labels = load_mnist(root, train)
    folder, part = camera.folder(root), "Train" if train else "Test"
    names = [f"{part}/{label}/{number:05d}.bin" for number, label in enumerate(labels.tolist(), 1)]
    starts = range(0, min(count, len(names)), BLOCK)
    for start in tqdm(starts, "simulating recordings", disable=None, leave=False):
        own = slice(start, start + BLOCK)
        list_path = folder / f"{part}_{start + 1:05d}.sha256"
        if not is_intact(list_path, names[own]):
            with default_dtype(torch.float32):  # the files are the same whatever a user has set
                noise = batch_generator(camera.seed, int(train), start)
                events = record(images[own], camera, noise)
            write_block(list_path, dict(zip(names[own], events, strict=True)))
    return [folder / name for name in names[:count]]


def is_intact(list_path: Path, names: Sequence[str]) -> bool:
    """Whether the files of a block are there, and have the checksums that its list says."""
    try:
        contents = {name: (list_path.parent / name).read_bytes() for name in names}
        return list_path.read_bytes() == checksums(contents)
    except OSError:  # one of them is missing
        return False


def write_block(list_path: Path, block: Mapping[str, Events]) -> None:
    """Writes recordings into files of these names, and then their list."""
    for name, events in block.items():
        require(
            len(events.t) > 0,
            f"the camera records no event of an image ({name}): lower camera.threshold, or raise "
            "camera.reach or camera.noise",
        )
    contents = {name: nmnist_bytes(events) for name, events in block.items()}
    for name, content in contents.items():
        path = list_path.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, sync=False)
    write_atomically(list_path, checksums(contents), sync=False)


def checksums(contents: Mapping[str, bytes]) -> bytes:
    """The list of files with these contents, in the form of ``sha256sum``."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return "".join(f"{total}  {name}\n" for name, total in sums.items()).encode()


def record(images: Tensor, camera: CameraSettings, generator: torch.Generator) -> list[Events]:
    """Records each of the images, uint8 ``(B, 28, 28)``; the generator draws the noise."""
    changes = watch(pan_images(images, camera), STEP, draw_thresholds(camera), camera.refractory)
    together = torch.cat([changes, draw_noise(len(images), camera, generator)], 1)
    recording, t, *_ = together
    together = together[:, (recording << 32 | t).argsort(stable=True)].numpy()
    begins = np.searchsorted(together[0], np.arange(1, len(images)))
    return [Events(x=x, y=y, t=t, p=p) for _, t, y, x, p in np.split(together, begins, axis=1)]


def draw_thresholds(camera: CameraSettings) -> Tensor:
    """Draws the thresholds of the camera's pixels for darker and brighter, ``(2, 34, 34)``."""
    generator = batch_generator(camera.seed, -1, 0)
    spread = camera.spread * torch.randn(2, NMNIST_SIDE, NMNIST_SIDE, generator=generator)
    return camera.threshold * (1.0 + spread).clamp(min=0.1)


def pan_images(images: Tensor, camera: CameraSettings) -> Iterator[Tensor]:
    """Yields the light ``(B, 34, 34)`` on the sensor at every millisecond from 0 to 300.

    The digits are black on white: in N-MNIST a pixel that a digit reaches sends darker events.
    Light is interpolated between pixels.
    """
    scale = camera.reach / 6.0
    margin = math.ceil(4 * scale)  # no place of the path is further away than 4 pixels
    around = (NMNIST_SIDE - images.shape[-1]) // 2 + margin
    light = 1.0 - F.pad(images / 255.0, [around, around + 1] * 2) * (1.0 - camera.black)
    place = torch.arange(light.shape[-1])
    blur = torch.exp(-0.5 * ((place[:, None] - place) / camera.blur) ** 2)
    blur = blur / blur.sum(1, keepdim=True)
    light = blur @ light @ blur.T
    times = np.arange(0.0, DURATION + STEP, STEP)
    places = (margin - scale * follow(path, times) for path in (RIGHT, BELOW))
    for x, y in zip(*places, strict=True):
        left, top = math.floor(x), math.floor(y)
        rows = light[:, top : top + NMNIST_SIDE + 1]
        rows = torch.lerp(rows[:, :-1], rows[:, 1:], y - top)
        columns = rows[:, :, left : left + NMNIST_SIDE + 1]
        yield torch.lerp(columns[:, :, :-1], columns[:, :, 1:], x - left)


def follow(path: Sequence[tuple[float, float]], times: np.ndarray) -> np.ndarray:
    """The places on a path of times and places; between two, half a period of a cosine."""
    moments, places = np.array(path).T
    numbers = np.arange(len(path))
    passed, along = np.divmod(np.interp(times, moments, numbers), 1)
    return np.interp(passed + 0.5 - 0.5 * np.cos(np.pi * along), numbers, places)


def watch(light: Iterable[Tensor], step: float, thresholds: Tensor, refractory: float) -> Tensor:
    """Finds the events of pixels that see a changing light.

    A pixel remembers the logarithm of the light at its last event. The logarithm is taken to change
    linearly between two looks. When it differs from the remembered one by the threshold, the pixel
    sends an event. Then the pixel is blind for a while, and remembers what it sees at its first
    look after that.

    Source: Lichtsteiner, Posch, Delbruck, IEEE Journal of Solid-State Circuits 2008, doi
    10.1109/JSSC.2007.914337.

    Args:
        light: positive light ``(B, H, W)`` at every look.
        step: milliseconds between two looks.
        thresholds: changes of the logarithm for darker and for brighter, ``(2, H, W)``.
        refractory: milliseconds for which a pixel is blind.

    Returns:
        int64 ``(5, events)``: number of the recording, microseconds, y, x and polarity.
    """
    looks = iter(light)
    before = next(looks).log()
    darker, brighter = (limit.expand_as(before) for limit in thresholds)
    remembered, awake_from = before.clone(), torch.zeros_like(before)
    found = []
    for number, look in enumerate(looks):
        begin, level = number * step, look.log()
        change, awake = level - remembered, awake_from <= begin
        fired = ((change >= brighter) | (change <= -darker)) & awake
        place = fired.view(-1).nonzero()[:, 0]
        polarity = change.take(place) > 0
        crossing = torch.where(polarity, brighter.take(place), -darker.take(place))
        to_go, rise = crossing + remembered.take(place) - before.take(place), level - before
        share = to_go / rise.take(place)
        time = begin + step * share
        awake_from.view(-1)[place] = time + refractory
        remembered = torch.where(fired | ~awake, level, remembered)
        before = level
        found.append(torch.stack([place, (1000.0 * time).round().long(), polarity]))
    place, microseconds, polarity = torch.cat(found, 1)
    recording, y, x = torch.unravel_index(place, before.shape)
    return torch.stack([recording, microseconds, y, x, polarity])


def draw_noise(count: int, camera: CameraSettings, generator: torch.Generator) -> Tensor:
    """Draws random events of ``count`` recordings, in the form that :func:`watch` returns."""
    seconds = DURATION / 1000.0
    expected = torch.full((count,), camera.noise * seconds * NMNIST_SIDE**2)
    events = torch.poisson(expected, generator=generator).long()
    recording = torch.arange(count).repeat_interleave(events)
    highest = (round(1e6 * seconds), NMNIST_SIDE, NMNIST_SIDE, 2)  # of t, y, x and polarity
    drawn = [torch.randint(n, recording.shape, generator=generator) for n in highest]
    return torch.stack([recording, *drawn])
