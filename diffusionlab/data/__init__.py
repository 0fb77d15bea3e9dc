"""Data: random-access sources, random changes, and the order in which they are read."""

REGISTRY = {
    "source": {
        "array_record": "diffusionlab.data.array_record:ArrayRecord",
        "digits": "diffusionlab.data.sources:Digits",
        "generated": "diffusionlab.data.generated:Generated",
        "image_folder": "diffusionlab.data.image_folder:ImageFolder",
        "mixture": "diffusionlab.data.generated:Mixture",
        "npz": "diffusionlab.data.sources:Npz",
        "photos": "diffusionlab.data.sources:Photos",
        "text": "diffusionlab.data.text:Text",
        "tfds": "diffusionlab.data.tfds:Tfds",
    },
    "augment": {
        "flip": "diffusionlab.data.augment:Flip",
        "translate": "diffusionlab.data.augment:Translate",
    },
}
