"""Data sets that tensorflow-datasets prepared, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from diffusionlab import types
from diffusionlab.data import base, images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """Images and labels of a data set by its name in tensorflow-datasets.

    Only preparing it needs TensorFlow, once; the error of a missing data set says how.

    Attributes:
      dataset: for example 'cifar10', 'name/config' or 'name:1.0.0'.
      split: 'train' or 'test'; which parts these are, say the next two.
      data_dir: where it was prepared; None is the default of tensorflow-datasets.
      train_split: for example 'train' or 'train[:90%]'.
      test_split: for example 'test' or 'train[90%:]'.
      image_key: of the feature that becomes 'x'; uint8 images.
      label_key: of the feature that becomes 'label'; None reads no labels.
      size: images are cropped to the central square and scaled to this many pixels;
        None leaves them as they are, all of one shape.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_key: str = "image"
    label_key: str | None = "label"
    size: int | None = None

    def __post_init__(self):
        base.check_split(self.split)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: must be at least 1, got {self.size}.")
        builder = self._builder()
        part = self.train_split if self.split == "train" else self.test_split
        try:
            records = builder.as_data_source(part)
        except ValueError as error:
            raise ValueError(f"{self.split}_split: {error}") from error
        object.__setattr__(self, "_spec", self._make_spec(builder.info.features))
        object.__setattr__(self, "_folder", pathlib.Path(builder.data_dir))
        object.__setattr__(self, "_records", records)

    def _builder(self):
        """Returns the builder of a data set that is there as array_record.

        Raises:
          FileNotFoundError: it is not prepared, or in another format.
          ValueError: tensorflow-datasets does not know the name.
        """
        import tensorflow_datasets

        try:
            builder = tensorflow_datasets.builder(self.dataset, data_dir=self.data_dir)
        except tensorflow_datasets.core.DatasetNotFoundError:
            where = self.data_dir or "the default data_dir of tensorflow-datasets"
            raise ValueError(
                f"dataset: tensorflow-datasets knows no '{self.dataset}', and there is "
                f"none in {where}."
            ) from None
        formats = {item.value for item in builder.info.available_file_formats()}
        prepared = builder.is_prepared()
        if not prepared or "array_record" not in formats:
            arguments = repr(self.dataset)
            if self.data_dir is not None:
                arguments += f", data_dir={self.data_dir!r}"
            # tensorflow-datasets would reuse what is there in the other format.
            other = f", only as {', '.join(formats)}; choose another data_dir"
            raise FileNotFoundError(
                f"{builder.data_dir}: '{self.dataset}' is not prepared there as "
                f"array_record{other if prepared else ''}; prepare it once with: pip "
                "install 'diffusionlab[tf]' && "
                'python -c "import tensorflow_datasets as tfds; '
                f"tfds.builder({arguments}, file_format='array_record')"
                '.download_and_prepare()"'
            )
        return builder

    def _make_spec(self, features) -> types.DataSpec:
        for field in ("image_key", "label_key"):
            key = getattr(self, field)
            if key is not None and key not in features:
                raise ValueError(
                    f"{field}: '{self.dataset}' has no feature '{key}'; it has "
                    f"{', '.join(sorted(features))}."
                )
        image = features[self.image_key]
        if np.dtype(image.np_dtype) != np.uint8 or len(image.shape) != 3:
            raise ValueError(
                f"image_key: '{self.image_key}' of '{self.dataset}' is not a uint8 "
                f"image [H, W, C], but {image}."
            )
        shape = tuple(image.shape)
        if self.size is not None:
            shape = (self.size, self.size, shape[-1])
        if None in shape:
            raise ValueError(
                f"size: images of '{self.dataset}' have shape {image.shape}; state a "
                "size."
            )
        if self.label_key is None:
            return types.DataSpec(shape)
        label = features[self.label_key]
        if not hasattr(label, "num_classes"):
            raise ValueError(
                f"label_key: '{self.label_key}' of '{self.dataset}' is not a class "
                f"label, but {label}."
            )
        return types.DataSpec(shape, label.num_classes, tuple(label.names))

    @property
    def spec(self) -> types.DataSpec:
        return self._spec

    @property
    def version(self) -> str:
        """Changes with the prepared files; '' where they are not on a file system."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        return base.files_version(self._folder, files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> base.Example:
        return self._example(self._records[int(index)])

    def __getitems__(self, indices) -> base.Example:
        records = self._records.__getitems__([int(index) for index in indices])
        return base.stack(self._example(record) for record in records)

    def _example(self, record) -> base.Example:
        x = record[self.image_key]
        if self.size is not None:
            x = images.resize_array(x, self.size)
        example = {"x": base.unit(x)}
        if self.label_key is not None:
            example["label"] = np.int32(record[self.label_key])
        return example
