"""Store the outputs of timm and torchvision as goldens for tests/test_goldens.py.

Made with Python 3.11, timm 1.0.31, torch 2.14.1, torchvision 0.29.1, numpy 2.4.6, pillow 12.2.0 and
safetensors 0.8.0, as the files' metadata also state. Neither this repository nor its tests depend
on timm. To make the files again, use a separate environment:

    python -m venv timmvenv
    timmvenv/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6 \
        pillow==12.2.0 safetensors==0.8.0
    timmvenv/bin/python tests/goldens/make_goldens.py

WHY Pillow 12: a resize is a horizontal and a vertical pass, each rounded to bytes. Up to version 12
the horizontal pass comes first, as in torch and as when the released encoders were trained. Version
13 starts with the vertical pass where that is faster (python-pillow/Pillow#9549), which changes a
tall image by up to 17 levels of 255 at hard edges.

dinov2.safetensors and siglip.safetensors have random weights, written by timm: the released
architectures and names, 32 wide and 3 blocks deep. expected.safetensors has:

    frame                       uint8 (3, 224, 224); the encoders read (frame - 128) / 64 and, as a
                                second frame, its mirror image
    {name}.float32              features of both frames before the last block        (2, h, w, 32)
    {name}.float64              the same in float64, first frame only                (1, h, w, 32)
    dinov2.positions            (1, 16*16, 32), resized from the file's 37x37 by timm's own loader
    image.{shape}               uint8 (3, H, W), images of odd sizes
    bicubic.{shape}             uint8 (3, 56, 224), every 4th row of the image squashed to 224x224
    bilinear.{shape}            uint8 (3, 28, 224), every 8th row
    {name}.pixels.{shape}       float32 (3, 4, 224), every 56th row of the whole transform's output
"""

import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent
MODELS = {
    "dinov2": "vit_large_patch14_reg4_dinov2.lvd142m",
    "siglip": "vit_base_patch16_siglip_224.webli",
}
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4}
SHAPES = [(37, 401), (331, 61), (57, 93)]  # (H, W): wide, tall, enlarged in both directions
PACKAGES = ("timm", "torch", "torchvision", "numpy", "pillow", "safetensors")


def metadata() -> dict[str, str]:
    """The versions used, in one entry: safetensors writes several entries in random order."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    return {"made_with": ", ".join([f"python {sys.version.split()[0]}", *versions])}


@torch.no_grad()
def unit_scale(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw weights with which every part matters: no norm, bias or LayerScale is neutral."""
    for name, parameter in model.named_parameters():
        noise = rng.standard_normal(parameter.shape)
        if name.endswith("bias"):
            noise = 0.2 * noise
        elif name.endswith("gamma") or (name.endswith("weight") and parameter.ndim == 1):
            noise = 1 + 0.2 * noise
        elif name.endswith("weight"):
            noise = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(torch.from_numpy(noise))


@torch.no_grad()
def features(model: torch.nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """Patch tokens (frames, h, w, d_e) after the last block but one, without the final norm."""
    where = [len(model.blocks) - 2]
    grid = model.forward_intermediates(
        frames, where, norm=False, output_fmt="NCHW", intermediates_only=True
    )[0]
    again = model.get_intermediate_layers(frames, n=where, reshape=True, norm=False)[0]
    assert torch.equal(grid, again), "timm's two ways to ask for a block agree"
    return grid.permute(0, 2, 3, 1).contiguous()


def transform(name: str, interpolation: str):
    """timm's evaluation transform of a model, squashed to 224x224: resize, to tensor, normalise."""
    released = timm.get_pretrained_cfg(MODELS[name]).to_dict()
    config = timm.data.resolve_data_config({}, pretrained_cfg=released)
    assert config["interpolation"] == "bicubic"
    return timm.data.create_transform(
        input_size=(3, 224, 224),
        interpolation=interpolation,
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0,
        crop_mode="squash",
    )


def picture(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3): a colour gradient, a hard-edged checkerboard and noise."""
    h, w = shape
    y, x = np.mgrid[:h, :w]
    gradient = np.stack([255 * y / h, 255 * x / w, 255 * (x + y) / (h + w)], axis=-1)
    board = 255 * ((y // 9 + x // 7) % 2)[..., None]
    noise = rng.integers(0, 256, (h, w, 3))
    third = (3 * x // w)[..., None]  # left, middle and right third of the picture
    return np.choose(third, [gradient, board + 0 * noise, noise]).astype(np.uint8)


def main() -> None:
    rng = np.random.default_rng(0)
    frame = torch.from_numpy(rng.integers(0, 256, (3, 224, 224), dtype=np.uint8))
    frames = (torch.stack([frame, frame.flip(-1)]).float() - 128) / 64  # exact in float32
    expected = {"frame": frame}
    for name, model_name in MODELS.items():
        path = FOLDER / f"{name}.safetensors"
        released = timm.create_model(model_name, **SMALL)  # DINOv2: 518 px, so 37x37 positions
        unit_scale(released, rng)
        save_file(released.state_dict(), path, metadata())
        model = timm.create_model(
            model_name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, img_size=224,
            **SMALL,
        ).eval()  # fmt: skip
        expected[f"{name}.float32"] = features(model, frames)
        if name == "dinov2":
            expected["dinov2.positions"] = model.pos_embed.detach().clone()
        expected[f"{name}.float64"] = features(model.double(), frames[:1].double())
        print(name, "features: standard deviation", expected[f"{name}.float64"].std().item())
    for h, w in SHAPES:
        array = picture((h, w), rng)
        image, shape = Image.fromarray(array), f"{h}x{w}"
        expected[f"image.{shape}"] = torch.from_numpy(array).permute(2, 0, 1).contiguous()
        for interpolation, step in (("bicubic", 4), ("bilinear", 8)):
            resize = transform("siglip", interpolation).transforms[0]
            squashed = torch.from_numpy(np.array(resize(image))).permute(2, 0, 1)
            assert squashed.shape == (3, 224, 224)
            expected[f"{interpolation}.{shape}"] = squashed[:, ::step].contiguous()
        for name in MODELS:
            pixels = transform(name, "bicubic")(image)
            expected[f"{name}.pixels.{shape}"] = pixels[:, ::56].contiguous()
    save_file(expected, FOLDER / "expected.safetensors", metadata())
    for path in sorted(FOLDER.glob("*.safetensors")):
        print(f"{path.name}  {path.stat().st_size / 1e3:.0f} kB")
    print(metadata())


if __name__ == "__main__":
    main()
