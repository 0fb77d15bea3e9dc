"""Fixtures of the data tests."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image


def make_tfds(root: pathlib.Path) -> dict:
    """Writes a data set in the layout of tensorflow-datasets, without TensorFlow.

    Returns:
      The keywords that read it.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import dataset_info, splits
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "tiny_images" / "1.0.0"
    folder.mkdir(parents=True)
    infos = []
    for split, num in (("train", 6), ("test", 3)):
        template = tfds.core.ShardedFileTemplate(
            dataset_name="tiny_images",
            data_dir=folder,
            split=split,
            filetype_suffix="array_record",
        )
        writer = array_record_module.ArrayRecordWriter(
            str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1"
        )
        num_bytes = 0
        for i in range(num):
            png = io.BytesIO()
            pixels = np.full((10, 12, 3), 10 * i, np.uint8)
            Image.fromarray(pixels).save(png, "PNG")
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(png.getvalue())
            feature["label"].int64_list.value.append(i % 2)
            record = example.SerializeToString()
            writer.write(record)
            num_bytes += len(record)
        writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[num],
                num_bytes=num_bytes,
                filename_template=template,
            )
        )
    identity = dataset_info.DatasetIdentity(
        name="tiny_images",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name="",
    )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    info.set_splits(splits.SplitDict(infos))
    info.write_to_directory(folder)
    return {"dataset": "tiny_images", "data_dir": str(root), "size": 8}


@pytest.fixture(scope="session", name="make_tfds")
def make_tfds_fixture():
    """The function that writes a tiny data set; a fixture, as tests import no tests."""
    return make_tfds
