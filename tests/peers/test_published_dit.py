"""Published DiT weights: our network against the architecture run in PyTorch.

Once written apart in PyTorch, with the names that the published checkpoints have, and
once as diffusers has it, under other names.
"""

import math
import pathlib
import sys

import jax
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
import published_dit

torch = pytest.importorskip("torch")

SQUARE = (8, 8, 4)  # diffusers has square images only
STEPS, LABELS = (0, 371, 999), (2, 0, published_dit.CLASSES)


def stack(*layers):
    return torch.nn.Sequential(*layers)


def linear(size, out):
    return torch.nn.Linear(size, out)


class Attention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv = heads, linear(width, 3 * width)
        self.proj = linear(width, width)

    def forward(self, h):
        split = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(*split)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(torch.nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = linear(width, hidden), linear(hidden, width)

    def forward(self, h):
        return self.fc2(torch.nn.functional.gelu(self.fc1(h), approximate="tanh"))


def norm(h, shift, scale):
    h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)
    return h * (1 + scale[:, None]) + shift[:, None]


class Block(torch.nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width, ratio * width)
        self.adaLN_modulation = stack(torch.nn.SiLU(), linear(width, 6 * width))

    def forward(self, h, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(
            6, dim=1
        )
        h = h + gate1[:, None] * self.attn(norm(h, shift1, scale1))
        return h + gate2[:, None] * self.mlp(norm(h, shift2, scale2))


class Final(torch.nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = linear(width, out)
        self.adaLN_modulation = stack(torch.nn.SiLU(), linear(width, 2 * width))

    def forward(self, h, c):
        return self.linear(norm(h, *self.adaLN_modulation(c).chunk(2, dim=1)))


class Dit(torch.nn.Module):
    """Images `[B, C, H, W]` to eps and variance, `[B, 2 C, H, W]`."""

    def __init__(self, shape, classes, *, patch_size, width, num_layers, **sizes):
        super().__init__()
        heads, ratio = sizes["num_heads"], sizes["mlp_ratio"]
        rows, columns = (side // patch_size for side in shape[:2])
        module = torch.nn.Module
        self.patch, self.rows, self.columns = patch_size, rows, columns
        self.x_embedder, self.t_embedder, self.y_embedder = module(), module(), module()
        self.x_embedder.proj = torch.nn.Conv2d(
            shape[2], width, patch_size, stride=patch_size
        )
        self.t_embedder.mlp = stack(
            linear(256, width), torch.nn.SiLU(), linear(width, width)
        )
        self.y_embedder.embedding_table = torch.nn.Embedding(classes + 1, width)
        position = torch.zeros(1, rows * columns, width)
        self.pos_embed = torch.nn.Parameter(position, requires_grad=False)
        self.blocks = torch.nn.ModuleList(
            [Block(width, heads, ratio) for _ in range(num_layers)]
        )
        self.final_layer = Final(width, patch_size**2 * 2 * shape[2])

    def forward(self, image, step, label):
        h = self.x_embedder.proj(image).flatten(2).transpose(1, 2) + self.pos_embed
        omega = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angle = step[:, None].to(image.dtype) * omega.to(image.dtype)
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))
        c = c + self.y_embedder.embedding_table(label)
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c)
        h = h.unflatten(1, (self.rows, self.columns))
        h = h.unflatten(3, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def ours(arrays, z, shape):
    net, params = published_dit.loaded(arrays, shape)
    cond = {"t": np.float32(np.array(STEPS) / 999), "logsnr": np.zeros(3, np.float32)}
    cond["label"] = np.array(LABELS)
    return np.asarray(jax.jit(net.apply)(params, np.float32(z), cond))


def theirs(call, z):
    """Returns the eps of `call(image, steps, labels)`, `[B, H, W, C]`."""
    image = torch.from_numpy(z.transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        found = call(image, torch.tensor(STEPS), torch.tensor(LABELS))
    return found.numpy()[:, : z.shape[-1]].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("shape", [published_dit.SHAPE, SQUARE])
def test_the_architecture_in_pytorch_answers_alike(shape):
    arrays = published_dit.state(shape=shape)
    z = np.random.default_rng(2).normal(size=(3, *shape))
    model = Dit(shape, published_dit.CLASSES, **published_dit.SIZES)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model.load_state_dict(state, strict=True)
    found = theirs(model.eval(), z)
    np.testing.assert_allclose(ours(arrays, z, shape), found, atol=3e-4, rtol=1e-4)


def renamed(arrays):
    """The same weights by the names of diffusers, which has some of them often."""
    block = {
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm1.linear",
    }
    table = arrays["y_embedder.embedding_table.weight"]
    found = {"pos_embed.pos_embed": arrays["pos_embed"]}
    for end in ("weight", "bias"):
        found[f"pos_embed.proj.{end}"] = arrays[f"x_embedder.proj.{end}"]
        found[f"proj_out_1.{end}"] = arrays[f"final_layer.adaLN_modulation.1.{end}"]
        found[f"proj_out_2.{end}"] = arrays[f"final_layer.linear.{end}"]
        for i in range(published_dit.SIZES["num_layers"]):
            here, there = f"blocks.{i}", f"transformer_blocks.{i}"
            for name, other in block.items():
                found[f"{there}.{other}.{end}"] = arrays[f"{here}.{name}.{end}"]
            parts = np.split(arrays[f"{here}.attn.qkv.{end}"], 3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{there}.attn1.to_{name}.{end}"] = part
            emb = f"{there}.norm1.emb"
            for k, name in ((0, "linear_1"), (2, "linear_2")):
                found[f"{emb}.timestep_embedder.{name}.{end}"] = arrays[
                    f"t_embedder.mlp.{k}.{end}"
                ]
            found[f"{emb}.class_embedder.embedding_table.weight"] = table
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def test_diffusers_answers_alike():
    diffusers = pytest.importorskip("diffusers")
    size = published_dit.SIZES
    arrays = published_dit.state(shape=SQUARE)
    z = np.random.default_rng(2).normal(size=(3, *SQUARE))
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=size["num_heads"],
        attention_head_dim=size["width"] // size["num_heads"],
        in_channels=SQUARE[2],
        out_channels=2 * SQUARE[2],
        num_layers=size["num_layers"],
        sample_size=SQUARE[0],
        patch_size=size["patch_size"],
        num_embeds_ada_norm=published_dit.CLASSES,
    )
    missing, unknown = model.load_state_dict(renamed(arrays), strict=False)
    # Its positions may be no part of the state: they are ours, then.
    assert not unknown or unknown == ["pos_embed.pos_embed"]
    assert not missing
    np.testing.assert_allclose(
        model.pos_embed.pos_embed.numpy(), arrays["pos_embed"], atol=1e-5
    )
    model.eval()
    # It spaces the 128 frequencies of the step over 127 intervals, where the published
    # program has 128; its answers at step 0, which all frequencies tell alike, agree.
    for block in model.transformer_blocks:
        assert block.norm1.emb.time_proj.downscale_freq_shift == 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    found = theirs(
        lambda z, t, y: model(z, timestep=t, class_labels=y, return_dict=False)[0], z
    )
    np.testing.assert_allclose(ours(arrays, z, SQUARE), found, atol=3e-4, rtol=1e-4)
