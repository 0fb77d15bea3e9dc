"""Small networks with seeded weights under published names, and inputs for them.

The references in tests/peers compute from the same arrays what the tests of features
and metrics hold as golden numbers.
"""

import numpy as np

WIDTH, DEPTH, HIDDEN = 128, 2, 96
ENDS = ("weight", "bias")


def _fill(generator, shapes):
    """Returns arrays: norms near 1, variances in [0.5, 1.5], else He's deviation."""
    arrays = {}
    for name, shape in shapes.items():
        normal = generator.normal(size=shape)
        if name.endswith("running_var"):
            array = 0.5 + generator.uniform(size=shape)
        elif len(shape) < 2 and name.endswith(("weight", "lambda1")):
            array = 1.0 + 0.3 * normal
        elif len(shape) < 2 or "embedd" in name and "patch" not in name:
            array = 0.3 * normal
        else:
            array = normal * np.sqrt(2 / np.prod(shape[1:]))
        arrays[name] = array.astype(np.float32)
    return arrays


def _with_bias(shapes):
    whole = {}
    for name, shape in shapes.items():
        whole[f"{name}.weight"] = shape
        whole[f"{name}.bias"] = shape[:1]
    return whole


def clip():
    """Returns a tower of 12 x 12 pixels in patches of 4, with Hugging Face's names."""
    shapes = {
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (10, WIDTH),
        "visual_projection.weight": (16, WIDTH),
    }
    linear = {"pre_layrnorm": (WIDTH,), "post_layernorm": (WIDTH,)}
    for i in range(DEPTH):
        layer = f"encoder.layers.{i}."
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear[f"{layer}self_attn.{x}"] = (WIDTH, WIDTH)
        linear[f"{layer}layer_norm1"] = linear[f"{layer}layer_norm2"] = (WIDTH,)
        linear[f"{layer}mlp.fc1"] = (HIDDEN, WIDTH)
        linear[f"{layer}mlp.fc2"] = (WIDTH, HIDDEN)
    shapes |= _with_bias({f"vision_model.{k}": v for k, v in linear.items()})
    return _fill(np.random.default_rng(1), shapes)


def dinov2():
    """Returns a tower with positions of 5 x 5 patches of 14, Hugging Face's names."""
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 26, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
    }
    linear = {
        "embeddings.patch_embeddings.projection": (WIDTH, 3, 14, 14),
        "layernorm": (WIDTH,),
    }
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}."
        for x in ("query", "key", "value"):
            linear[f"{layer}attention.attention.{x}"] = (WIDTH, WIDTH)
        linear[f"{layer}attention.output.dense"] = (WIDTH, WIDTH)
        linear[f"{layer}norm1"] = linear[f"{layer}norm2"] = (WIDTH,)
        linear[f"{layer}mlp.fc1"] = (2 * WIDTH, WIDTH)
        linear[f"{layer}mlp.fc2"] = (WIDTH, 2 * WIDTH)
        shapes[f"{layer}layer_scale1.lambda1"] = (WIDTH,)
        shapes[f"{layer}layer_scale2.lambda1"] = (WIDTH,)
    return _fill(np.random.default_rng(2), shapes | _with_bias(linear))


def i3d(thin=8):
    """Returns I3D with every channel count but the input's divided by `thin`."""
    blocks = {
        "3b": (64, 96, 128, 16, 32, 32),
        "3c": (128, 128, 192, 32, 96, 64),
        "4b": (192, 96, 208, 16, 48, 64),
        "4c": (160, 112, 224, 24, 64, 64),
        "4d": (128, 128, 256, 24, 64, 64),
        "4e": (112, 144, 288, 32, 64, 64),
        "4f": (256, 160, 320, 32, 128, 128),
        "5b": (256, 160, 320, 32, 128, 128),
        "5c": (384, 192, 384, 48, 128, 128),
    }
    units = {
        "Conv3d_1a_7x7": (64 // thin, 3, 7),
        "Conv3d_2b_1x1": (64 // thin, 64 // thin, 1),
        "Conv3d_2c_3x3": (192 // thin, 64 // thin, 3),
    }
    width = 192 // thin
    for name, channels in blocks.items():
        c = [x // thin for x in channels]
        units |= {
            f"Mixed_{name}.b0": (c[0], width, 1),
            f"Mixed_{name}.b1a": (c[1], width, 1),
            f"Mixed_{name}.b1b": (c[2], c[1], 3),
            f"Mixed_{name}.b2a": (c[3], width, 1),
            f"Mixed_{name}.b2b": (c[4], c[3], 3),
            f"Mixed_{name}.b3b": (c[5], width, 1),
        }
        width = c[0] + c[2] + c[4] + c[5]
    shapes = {}
    for name, (out, width_in, side) in units.items():
        shapes[f"{name}.conv3d.weight"] = (out, width_in, side, side, side)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{kind}"] = (out,)
    shapes |= _with_bias({"logits.conv3d": (400 // thin, width, 1, 1, 1)})
    return _fill(np.random.default_rng(3), shapes)


def trunk(net, thin=8):
    """Returns torchvision's AlexNet or VGG16 without its classifier, thinned."""
    if net == "alex":
        index, side, channels = (
            (0, 3, 6, 8, 10),
            (11, 5, 3, 3, 3),
            (64, 192, 384, 256, 256),
        )
    else:
        index = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
        side = (3,) * 13
        channels = (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6
    width, linear = 3, {}
    for i, s, c in zip(index, side, channels, strict=True):
        linear[f"features.{i}"] = (c // thin, width, s, s)
        width = c // thin
    return _fill(np.random.default_rng(4), _with_bias(linear))


def linear(net, thin=8):
    """Returns weights per channel of LPIPS, not negative, as the lpips package has."""
    generator = np.random.default_rng(5)
    channels = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
    return {
        f"lin{i}.model.1.weight": generator.uniform(size=(1, c // thin, 1, 1)).astype(
            "f4"
        )
        for i, c in enumerate(channels[net])
    }


def normal(*shape):
    """Returns float32 noise of deviation 1."""
    return np.random.default_rng(6).normal(size=shape).astype(np.float32)


def pictures(*shape):
    """Returns float32 noise in [-1, 1]."""
    return np.random.default_rng(7).uniform(-1, 1, size=shape).astype(np.float32)


def gpt2(vocabulary=23, context=12):
    """Returns GPT-2 of two layers with two heads of 64, with Hugging Face's names."""
    generator = np.random.default_rng(8)
    shapes = {"wte.weight": (vocabulary, WIDTH), "wpe.weight": (context, WIDTH)}
    linear = {}
    for i in range(DEPTH):
        layer = f"h.{i}."
        linear[f"{layer}attn.c_attn"] = (WIDTH, 3 * WIDTH)
        linear[f"{layer}attn.c_proj"] = (WIDTH, WIDTH)
        linear[f"{layer}mlp.c_fc"] = (WIDTH, 4 * WIDTH)
        linear[f"{layer}mlp.c_proj"] = (4 * WIDTH, WIDTH)
        shapes |= {f"{layer}ln_{j}.{k}": (WIDTH,) for j in (1, 2) for k in ENDS}
    shapes |= {f"ln_f.{k}": (WIDTH,) for k in ENDS}
    # Linear maps are [in, out] in this file.
    for name, (into, out) in linear.items():
        shapes |= {f"{name}.weight": (into, out), f"{name}.bias": (out,)}
    arrays = {}
    for name, shape in shapes.items():
        normal = generator.normal(size=shape)
        is_norm = "ln_" in name and name.endswith("weight")
        scale = 0.3 if len(shape) == 1 or shape[0] <= 64 else shape[0] ** -0.5
        arrays[name] = (is_norm + scale * normal).astype(np.float32)
    return arrays
