"""Sources: random-access data sets of {"image": uint8 (H, W, 3), "caption": str} or {"image", "label": int}."""

import difflib
import functools
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.captions import caption, words_for
from diffusion_jax.data.colours import MainHue
from diffusion_jax.data.concepts import concept_lists
from diffusion_jax.data.emoji import PIXELS, STYLES, Emoji
from diffusion_jax.data.listings import listed
from diffusion_jax.data.order import Part
from diffusion_jax.data.scenes import Drawing, Scene, held_out_scene, is_trained_on, paint, scenes_alone, trained_scene
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import Record, picture, size_of


@dataclass(frozen=True)
class Source:
    """A random-access data set.

    name: identifies the content, used in cache keys.
    size: number of records.
    read: index -> record. Raises BadRecord for a record that cannot be used.
    read_batch: (indices (B,), draws (B,)) -> stacked records, for a source that reads many at once faster than one
      after the other. A draw, in [0, 1), chooses one of the versions of a record. None for other sources.
    num_classes: number of labels, 0 if there are none.
    classes: the name of each class; empty if classes are numbers.
    captions: the caption of each record, or a tuple of captions; empty if there are none.
    files: the file of each record, empty if records are not files.
    parts: in what order records are drawn, see `Part`; empty if all are alike and can be read one by one.
    measure: index -> height and width of the picture in its file, see `transforms.size_of`. None for other sources.
    """

    name: str
    size: int
    read: Callable[[int], Record]
    num_classes: int = 0
    captions: Sequence[str | tuple[str, ...]] = ()
    files: Sequence[str] = ()
    parts: tuple[Part, ...] = ()
    read_batch: Callable[[np.ndarray, np.ndarray], Record] | None = None
    measure: Callable[[int], np.ndarray] | None = None
    classes: Sequence[str] = ()

    def __post_init__(self):
        if self.size == 0:
            raise ValueError(f"{self.name} is empty: it has no records")
        if not self.parts:
            object.__setattr__(self, "parts", (Part(self.size),))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        return self.read(range(self.size)[index])

    def describe(self, index: int) -> str:
        """The name of a record in messages."""
        return self.files[index] if self.files else f"record {index} of {self.name}"


def choose_caption(captions: str | tuple[str, ...] | None, rng: np.random.Generator) -> str | None:
    """One of several captions."""
    return captions[rng.integers(len(captions))] if isinstance(captions, tuple) else captions


def first_caption(captions: str | tuple[str, ...]) -> str:
    """The caption of a record itself, where several are in the source's captions."""
    return captions[0] if isinstance(captions, tuple) else captions


def with_captions(source: Source) -> Source:
    """The source with "caption" in its records, if it has captions."""
    if not source.captions:
        return source

    def read(index: int) -> Record:
        return source.read(index) | {"caption": source.captions[index]}

    return replace(source, read=read, read_batch=None)


SCENES = {"train": 40_000, "validation": 1000, "mixed": 40_000}
ALONE = "drawings"  # the split of drawings alone
SPLITS = (*SCENES, ALONE)
CAPTIONS_PER_SCENE = 8  # captions of a scene


def emoji(
    size: int,
    split: str = "train",
    data_dir: str | PathLike | None = None,
    styles: Sequence[str] = (),
    concepts: Sequence[str] = (),
) -> Source:
    """Scenes of emoji: see `data.scenes`. The first use makes the drawings (a minute). Scenes are painted when read.

    size: height and width in pixels, a multiple of 8 up to 192.
    split: "train"; "validation", whose concepts are never trained on; "drawings", every drawing that is trained on
      in each of its colours, alone; or "mixed" for a first stage, without captions: training scenes, every other record
      four of them at half the size. "train[:100]" has only the first 100.
    data_dir: where TFDS keeps data sets, ~/tensorflow_datasets if None.
    styles, concepts: see `emoji_drawings`. "validation" has all concepts that are held out.
    Records also have "style", except in "mixed".
    Raises ValueError for another size or split and if nothing is left to train on, and what `emoji_drawings` raises.
    """
    if size % 8 or not 8 <= size <= PIXELS:
        raise ValueError(f"the size of emoji must be a multiple of 8 pixels, from 8 to {PIXELS}; got {size}")
    match = re.fullmatch(rf"({'|'.join(SPLITS)})(?:\[:(\d+)\])?", split)
    if not match:
        raise ValueError(f"emoji has the splits {', '.join(SPLITS)}, and parts such as train[:100]; got {split!r}")
    subset, held_out = match[1], match[1] == "validation"
    drawings = emoji_drawings(data_dir, styles, () if held_out else concepts)
    trained = [drawing for drawing in drawings if is_trained_on(Scene(drawing))]
    if not trained:
        raise ValueError(f"nothing to train on: {', '.join(concepts)} are held out in {', '.join(styles or STYLES)}")
    drawings_alone = trained if subset == ALONE else []
    alone = [scene for drawing in drawings_alone for scene in scenes_alone(drawing) if is_trained_on(scene)]
    total = SCENES.get(subset, len(alone))
    count = min(int(match[2] or total), total)
    draw_scene = held_out_scene if held_out else trained_scene

    def scene_and_rng(index: int) -> tuple[Scene, np.random.Generator]:
        rng = np.random.default_rng([int(held_out), index])
        return alone[index] if subset == ALONE else draw_scene(drawings, rng), rng

    def read(index: int) -> Record:
        scene, rng = scene_and_rng(index)
        return {"image": paint(scene, size), "caption": caption(scene, rng), "style": scene.drawing.style}

    def read_mixed(index: int) -> Record:
        if index % 2:
            return {"image": paint(scene_and_rng(index)[0], size)}
        parts = [paint(scene_and_rng(4 * index + part)[0], size // 2) for part in range(4)]
        return {"image": np.concatenate([np.concatenate(parts[row : row + 2], axis=1) for row in (0, 2)])}

    def captions(index: int) -> tuple[str, ...]:
        scene, rng = scene_and_rng(index)
        return tuple(caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE))

    description = f"{'+'.join(sorted(styles or STYLES))}/{len({drawing.name for drawing in drawings})} concepts"
    return Source(
        name=f"emoji/{PIXELS}px/{Emoji.VERSION}/scenes5/{description}/{split}",
        size=count,
        read=read_mixed if subset == "mixed" else read,
        captions=() if subset == "mixed" else Captions(count, captions),
    )


def emoji_drawings(
    data_dir: str | PathLike | None = None, styles: Sequence[str] = (), concepts: Sequence[str] = ()
) -> list[Drawing]:
    """The drawings of the emoji data set. The first use draws them, which takes a minute.

    data_dir: where TFDS keeps data sets, ~/tensorflow_datasets if None.
    styles: some of `emoji.STYLES`, empty for all.
    concepts: names of emoji, or of lists of them: the files in `data/concepts`. Empty for all.
    Raises ValueError for another style or name, ModuleNotFoundError for a package of drawings that is missing.
    """
    unknown = set(styles) - set(STYLES)
    if unknown:
        raise ValueError(f"emoji has the styles {', '.join(STYLES)}, got {', '.join(sorted(unknown))}")
    drawings = _all_drawings(data_dir)
    names = {drawing.name for drawing in drawings}
    selected = dict.fromkeys(name for concept in concepts for name in concept_lists().get(concept, (concept,))) or names
    for name in selected:
        if name not in names:
            close = " or ".join(difflib.get_close_matches(name, names)) or "another of Unicode's names"
            raise ValueError(f"there is no emoji named {name!r}; did you mean {close}?")
    return [drawing for drawing in drawings if drawing.style in (styles or STYLES) and drawing.name in selected]


@functools.cache
def _all_drawings(data_dir: str | PathLike | None) -> tuple[Drawing, ...]:
    builder = Emoji(config=f"{PIXELS}px", data_dir=data_dir, file_format="array_record")
    _prepare(builder)
    records = builder.as_data_source("drawings", decoders={"image": tfds.decode.SkipDecoding()})
    return tuple(_drawing(records[i]) for i in range(len(records)))


def _drawing(record: dict) -> Drawing:
    """A drawing of the data set, its picture still encoded."""
    png, hue = record["image"], MainHue(record["hue"].astype(np.float64), float(record["share"]))
    name = record["name"].decode()
    return Drawing(
        name=name,
        words=words_for(name, [alias.decode() for alias in record["aliases"]]),
        style=record["style"].decode(),
        hue=hue if hue.share else None,
        ink=record["ink"].astype(np.float64),
        read=lambda: np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")),
    )


def digits(split: str = "train") -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 grey as RGB, ten classes. Every tenth is for validation."""
    from sklearn.datasets import load_digits  # imported late: it takes seconds

    if split not in ("train", "validation"):
        raise ValueError(f'digits has the splits "train" and "validation", got "{split}"')
    data = load_digits()
    held_out = np.arange(len(data.target)) % 10 == 9
    in_split = held_out if split == "validation" else ~held_out
    images = np.round(data.images[in_split] * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    labels = data.target[in_split]
    return Source(
        name=f"digits-{split}",
        size=len(labels),
        read=lambda i: {"image": images[i], "label": int(labels[i])},
        num_classes=10,
    )


def folder(path: str | PathLike, kept: Path | None = None, side: int = 0) -> Source:
    """A folder of pictures, with captions in files or classes by subfolder. See `list_pictures`, also for errors.

    kept: the folder for lists of large folders, see `listed`; None to list the pictures anew.
    side: of the crops that are made of them, see `picture`.
    """
    root = Path(path)
    listing, digest = listed(root, kept)

    def read(index: int) -> Record:
        record = picture(root / listing.files[index], side)
        if listing.captions:
            record["caption"] = first_caption(listing.captions[index])
        if listing.labels:
            record["label"] = listing.labels[index]
        return record

    return Source(
        name=f"{root.resolve().name}-{digest[:16]}",
        size=len(listing.files),
        read=read,
        num_classes=len(listing.classes),
        classes=listing.classes,
        captions=listing.captions,
        files=Captions(len(listing.files), lambda index: str(root / listing.files[index])),
        measure=lambda index: size_of(root / listing.files[index]),
    )


def tfds_source(
    name: str,
    split: str = "train",
    data_dir: str | PathLike | None = None,
    side: int = 0,
    prepare: bool = True,
) -> Source:
    """A TFDS data set with captions or labels. It is downloaded and prepared on first use.

    name: as in `tfds.load`, e.g. "cifar10".
    split: a split of the data set, or a slice such as "train[:90%]".
    data_dir: where TFDS keeps data sets, ~/tensorflow_datasets if None.
    side: of the crops that are made of the pictures, see `picture`.
    prepare: False to raise ValueError for a data set that is not prepared yet.

    TensorFlow is needed only to prepare a data set whose builder uses it.
    Raises ValueError if there is no such data set or split, if it cannot be prepared, or if it has no pictures.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        if prepare:
            _prepare(builder)
    except tfds.core.DatasetNotFoundError as error:
        builders = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0].split(":")[0], builders)
        hint = f"did you mean {' or '.join(close)}?" if close else "see tensorflow.org/datasets/catalog"
        raise ValueError(
            f'TFDS has no data set "{name}" and {data_dir or "its data_dir"} holds none; {hint}'
        ) from error
    except ModuleNotFoundError as error:
        advice = f'install {error.name or "TensorFlow"}, or prepare it elsewhere with file_format="array_record"'
        raise ValueError(f'TFDS cannot prepare "{name}" here: {advice}') from error
    except Exception as error:  # a builder may raise anything: a failed download, a wrong config, a version
        raise ValueError(f'TFDS cannot prepare "{name}": {textwrap.shorten(str(error), 300)}') from error
    if not (Path(builder.data_path) / "dataset_info.json").exists():
        raise ValueError(f'TFDS has not prepared "{name}" in {builder.data_path} yet; a training begins with that')
    return _from_builder(builder, split, side)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Make the files of a data set if there are none. If another process finished first, use its files."""
    try:
        builder.download_and_prepare()
    except FileExistsError:
        builder.info.read_from_directory(builder.data_path)


def _from_builder(builder: tfds.core.DatasetBuilder, split: str, side: int = 0) -> Source:
    """The source of one split of a prepared TFDS builder: its first image, its "caption" or another text, its label."""
    try:
        builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise ValueError(f'{builder.name} has the splits {sorted(builder.info.splits)}, got "{split}"') from error
    features = builder.info.features
    image = _first(features, tfds.features.Image)
    if image is None:
        raise ValueError(f"{builder.name} has no images: its features are {sorted(features)}")
    caption, label = _caption(features), _first(features, tfds.features.ClassLabel)
    # Pictures stay encoded: all sources share one decoder, OpenCV is not needed, captions are read without pictures.
    records = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})

    def read(index: int) -> Record:
        raw = records[index]
        record = picture(raw[image], side)
        if caption:
            record["caption"] = first_caption(caption(raw))
        if label:
            record["label"] = int(raw[label])
        return record

    return Source(
        name=f"{builder.info.full_name}/{split}",
        size=len(records),
        read=read,
        num_classes=features[label].num_classes if label else 0,
        classes=_class_names(features[label]) if label else (),
        captions=Captions(len(records), lambda i: caption(records[i])) if caption else (),
        measure=lambda index: size_of(records[index][image]),
    )


def _class_names(label: tfds.features.ClassLabel) -> Sequence[str]:
    """The names of classes; empty if they are numbers, which TFDS writes as "0", "1" and so on."""
    numbers = [str(number) for number in range(label.num_classes)]
    return () if label.names == numbers else label.names


def _caption(features: tfds.features.FeaturesDict) -> Callable[[dict], str | tuple[str, ...]] | None:
    """A function from raw record to its caption, or to all of several, as in COCO. None without captions."""
    text = _first(features, tfds.features.Text)
    if text:
        return lambda raw: raw[text].decode()
    for name, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(inner, tfds.features.Text):
            return lambda raw: _texts(raw[name])
        text = _first(inner, tfds.features.Text) if isinstance(inner, tfds.features.FeaturesDict) else None
        if text:
            return lambda raw: _texts(raw[name][text])
    return None


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.decode() for value in values) or ("",)


def _first(features: tfds.features.FeaturesDict, kind: type) -> str | None:
    """The name of the feature of a given kind. If there are several, the one with the plainest name."""
    plain = ("image", "caption", "text", "label")
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    return min(names, key=lambda name: (name not in plain, names.index(name)), default=None)
