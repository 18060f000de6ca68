"""Frechet Inception Distance (FID) and Kernel Inception Distance (KID) of two sets of images.

    python fid.py A B                        A, B: folders of images, or .npz files with mu and sigma
    python fid.py A B --kid                  the unbiased KID beside it, for small sets
    python fid.py --save-stats A a.npz       keep the statistics of a folder

Options, weights, statistics files and numbers are those of pytorch-fid. The network is the Inception-v3 of 2015 that
every published FID uses. Its weights (91 MB) are fetched once, or given by --weights. Images are read as RGB: alpha is
dropped; grey levels of 16 bits or floats keep their brightness, where pytorch-fid shows white or black. A folder's
subfolders are not searched.

FID is too large for small independent sets, and needs 2,048 images or more on each side (Chong and Forsyth 2020). KID
has no such bias.

Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID).
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
IMAGE_SUFFIXES = ".bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
DIMS = (64, 192, 768, 2048)  # widths of the layers that features can be taken from
ENOUGH = 2048  # images, below which FID is not to be trusted
KEPT = 10_000  # images whose features are kept in memory; of larger sets, sums and a random choice

# ---------------------------------------------------------------------------------------------------
# The Inception network


class Conv(nn.Sequential):
    """Convolution, batch norm, ReLU. Images keep their size unless there is a stride or no padding."""

    def __init__(self, channels, width, kernel, stride=1, padded=True):
        padding = "same" if padded and stride == 1 else "valid"
        conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, eps=0.001), relu=nn.ReLU(inplace=True)))


halve = nn.MaxPool2d(3, stride=2)
mean_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)  # Inception's own counts the padding


class Mixed(nn.Module):
    """Branches that read the same image, their results concatenated: chains of convolutions, and a pool.

    branches: name -> (width, kernel, stride) of each convolution, one after another, numbered if there are several. A
    dict of kernels ends a chain in several convolutions, each with its letter. pooled: the width of one after the pool.
    """

    def __init__(self, channels, branches, pool, pooled=None):
        super().__init__()
        self.chains = []  # each a list of steps, a step a list of names
        self.pool = pool
        for branch, steps in branches.items():
            chain = []
            before = channels
            for number, (width, kernel, *stride) in enumerate(steps, start=1):
                name = f"{branch}_{number}" if len(steps) > 1 else branch
                kernels = kernel if isinstance(kernel, dict) else {"": kernel}
                for letter, size in kernels.items():
                    self.add_module(name + letter, Conv(before, width, size, *stride))
                chain.append([name + letter for letter in kernels])
                before = width
            self.chains.append(chain)
        self.branch_pool = Conv(channels, pooled, 1) if pooled else nn.Identity()

    def forward(self, x):
        results = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [getattr(self, name)(end) for end in ends for name in names]
            results += ends
        return torch.cat([*results, self.branch_pool(self.pool(x))], dim=1)


MIXED_5 = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
MIXED_6A = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
MIXED_7A = {"branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}
FORK = (384, {"a": (1, 3), "b": (3, 1)})
MIXED_7 = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), FORK], "branch3x3dbl": [(448, 1), (384, 3), FORK]}


def mixed_6(width):
    single = [(width, 1), (width, (1, 7)), (192, (7, 1))]
    double = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    return {"branch1x1": [(192, 1)], "branch7x7": single, "branch7x7dbl": double}


class Inception(nn.Module):
    """Images (B, 3, 299, 299), float32 in [-1, 1] -> features (B, dims).

    dims: the width of the layer whose average over the image is returned: 64 and 192 after the first and second max
    pool, 768 before Mixed_7a, 2048 at the end. The state dict has the names and shapes of pytorch-fid's release.
    """

    def __init__(self, dims=2048):
        super().__init__()
        if dims not in DIMS:
            raise ValueError(f"no layer is {dims} wide; choose from {', '.join(map(str, DIMS))}")
        self.dims = dims
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b = Mixed(192, MIXED_5, mean_pool, 32)
        self.Mixed_5c = Mixed(256, MIXED_5, mean_pool, 64)
        self.Mixed_5d = Mixed(288, MIXED_5, mean_pool, 64)
        self.Mixed_6a = Mixed(288, MIXED_6A, halve)
        self.Mixed_6b = Mixed(768, mixed_6(128), mean_pool, 192)
        self.Mixed_6c = Mixed(768, mixed_6(160), mean_pool, 192)
        self.Mixed_6d = Mixed(768, mixed_6(160), mean_pool, 192)
        self.Mixed_6e = Mixed(768, mixed_6(192), mean_pool, 192)
        self.Mixed_7a = Mixed(768, MIXED_7A, halve)
        self.Mixed_7b = Mixed(1280, MIXED_7, mean_pool, 192)
        self.Mixed_7c = Mixed(2048, MIXED_7, nn.MaxPool2d(3, stride=1, padding=1), 192)  # a max pool, as released
        self.fc = nn.Linear(2048, 1008)  # the classifier: not used here, but in the release

    def forward(self, x):
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # (B, 64, 73, 73)
        if self.dims > 64:
            x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        if self.dims > 192:
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))  # (B, 768, 17, 17)
        if self.dims > 768:
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def load_inception(dims=2048, weights=None, device="cpu"):
    """The network, ready for features: batch norms folded, channels last. weights: a file; None: the release's."""
    path = Path(weights or release_path())
    try:
        require_hash(path)
    except ValueError:
        if weights:
            raise
        fetch_release()
    network = Inception(dims).eval()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise ValueError(f"{path} does not hold the Inception weights: {str(error).splitlines()[0]}") from None
    for module in network.modules():
        if isinstance(module, Conv):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network.to(device, memory_format=torch.channels_last)


def release_path():
    """Where torch.hub keeps the release's file."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)


def fetch_release():
    release_path().unlink(missing_ok=True)
    try:
        torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        remedy = f"put {WEIGHTS_URL} into {release_path().parent}, or name a copy with --weights"
        raise ValueError(f"the Inception weights could not be fetched ({error}); {remedy}") from None


def require_hash(path):
    """ValueError unless the file is there and has the SHA-256 that its name ends in, as in name-6726825d.pth."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if named := re.search(r"-([0-9a-f]{8,})\.pth$", path.name):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(named[1]):
            raise ValueError(f"{path} is damaged: its SHA-256 begins with {found[: len(named[1])]}; fetch it again")


# ---------------------------------------------------------------------------------------------------
# Distances


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians with means (D,) and covariances (D, D).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)). Real by construction, and as exact for
    covariances of low rank, where the matrix square root of the product fails.
    """
    mu1, sigma1, mu2, sigma2 = finite_arrays(mu1, sigma1, mu2, sigma2)
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (mu1.size, mu1.size):
        raise ValueError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit")
    return distance_by_roots(mu1, covariance_root(sigma1), mu2, covariance_root(sigma2))


def frechet_distance_from_features(x, y):
    """The same for the Gaussians fitted to features (N, D) and (M, D), without forming a covariance matrix."""
    x, y = finite_arrays(x, y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features {x.shape} and {y.shape}: two (N, D) and (M, D) are needed, N and M at least 2")
    return distance_by_roots(x.mean(axis=0), feature_root(x), y.mean(axis=0), feature_root(y))


def finite_arrays(*arrays):
    arrays = [np.asarray(values, np.float64) for values in arrays]
    if not all(np.isfinite(values).all() for values in arrays):
        raise ValueError("means, covariances and features must be finite numbers")
    return arrays


def distance_by_roots(mu1, root1, mu2, root2):
    """The same for covariances root1 root1^T and root2 root2^T."""
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()  # tr((sigma1 sigma2)^(1/2))
    distance = np.square(mu1 - mu2).sum() + np.square(root1).sum() + np.square(root2).sum() - 2 * cross
    return max(0.0, float(distance))


def covariance_root(sigma):
    """A matrix (D, rank) whose product with its own transpose is sigma (D, D)."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:  # not positive definite: there were fewer samples than dimensions
        values, vectors = np.linalg.eigh(sigma)
        kept = values > len(values) * np.finfo(values.dtype).eps * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])


def feature_root(features):
    """A matrix (D, min(N, D)) whose product with its own transpose is the covariance of features (N, D)."""
    root = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return root.T if len(root) <= root.shape[1] else np.linalg.qr(root, mode="r").T


def kernel_distance(x, y, subsets=100, subset_size=1000, seed=0):
    """KID of features (N, D) and (M, D): mean and standard deviation over random subsets.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3, which may fall
    below 0. A subset holds subset_size of each side, but never more than half, so that subsets differ.
    """
    size = min(subset_size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise ValueError("KID needs at least four images on each side")
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        a, b = (f[rng.choice(len(f), size, replace=False)].astype(np.float64) for f in (x, y))
        aa, bb, ab = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        estimates.append(within - 2 * ab.mean())
    return float(np.mean(estimates)), float(np.std(estimates))


# ---------------------------------------------------------------------------------------------------
# Statistics of a folder, and their files

# What may be white in a file of more than 8 bits, by its mode: the first that is not too dark for its values.
WHITE = {"F": (1, 255, 65535), "I": (255, 65535)} | dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (65535,))


def read_image(path):
    """The image in a file, RGB uint8 (H, W, 3)."""
    image = Image.open(path)
    if image.mode in WHITE:
        image = eight_bits(np.asarray(image).astype(np.float32), WHITE[image.mode])
    return np.asarray(image.convert("RGB"))


def eight_bits(values, scales):
    """An image of grey levels (H, W) whose white is one of the scales."""
    low, high = values.min(), values.max()
    white = next((white for white in scales if high <= 1.01 * white and (high > white / 100 or white == scales[0])), 0)
    if not low >= -0.01 * white or not white:
        raise ValueError(f"its values, {low:g} to {high:g}, are no brightness; save it with 8 bits")
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


class ImageFolder(torch.utils.data.Dataset):
    """The images of a folder: RGB uint8 (H, W, 3), or where that takes less memory what the network is given of it. In
    place of one that cannot be read, a line that says why."""

    def __init__(self, folder):
        self.folder = folder
        shown = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES.split()]
        self.files = sorted(path for path in shown if path.parent == folder)
        if below := len(shown) - len(self.files):
            print(f"{folder}: {below} images in its subfolders are not counted", file=sys.stderr)
        if len(self.files) < 2:
            raise ValueError(f"{folder} holds {len(self.files)} images; at least 2 are needed ({IMAGE_SUFFIXES})")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = read_image(self.files[i])
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types
            return f"{self.files[i]} cannot be read: {error}"
        return image if image.nbytes < 4 * 3 * 299 * 299 else shrink(image)


class Statistics(NamedTuple):
    """What is known of a set of images: its Gaussian, and features while they are at hand."""

    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    count: int | None = None  # images; None where only a statistics file is at hand
    features: np.ndarray | None = None  # (min(count, KEPT), D), chosen at random


def statistics_of(batches, count):
    """Statistics of `count` features that come in batches (B, D), in memory that does not depend on their number."""
    kept = np.zeros(count, bool)
    kept[np.random.default_rng(0).permutation(count)[:KEPT]] = True
    features = []
    done = 0
    total = 0.0
    products = 0.0
    for batch in batches:
        if done == 0:
            origin = batch.mean(axis=0, dtype=np.float64)  # sums of squares around it lose no digits
        features.append(batch[kept[done : done + len(batch)]])
        centred = batch - origin
        total += centred.sum(axis=0)
        products += centred.T @ centred
        done += len(batch)
    sigma = (products - np.outer(total, total) / count) / (count - 1)
    return Statistics(origin + total / count, sigma, count, np.concatenate(features))


@torch.inference_mode()
def folder_features(images, network, batch_size, num_workers):
    """Yield the features (B, D) of an ImageFolder's images, with a progress line."""
    device = next(network.parameters()).device
    if device.type == "cpu":
        batch_size = min(batch_size, 8)  # what the layers make of more images does not fit the caches
    started = time.monotonic()
    done = 0
    shown = 0.0
    for batch in torch.utils.data.DataLoader(images, batch_size, num_workers=num_workers, collate_fn=list):
        if unreadable := [image for image in batch if isinstance(image, str)]:
            raise ValueError("; ".join(unreadable))
        yield network(network_input(batch, device)).cpu().numpy()
        done += len(batch)
        seconds = time.monotonic() - started
        if seconds > shown + 0.5 or done == len(images):
            left = (len(images) - done) * seconds / done
            line = f"{images.folder}: {done}/{len(images)} images, {done / seconds:.1f}/s, {left:.0f} s left"
            print(f"\r{line:<79}", end="\n" if done == len(images) else "", file=sys.stderr, flush=True)
            shown = seconds


def shrink(image):
    """What the network is given of a large RGB image (H, W, 3) in uint8: float32 (3, 299, 299). One channel after
    another, since as floats they are four times as large."""
    return torch.cat([network_input([image[..., channel, None]], "cpu")[0] for channel in range(3)]).numpy()


def network_input(images, device):
    """RGB images (H, W, 3) in uint8, of one size or several, as a tensor (B, 3, 299, 299) in [-1, 1]; those that have
    been brought to that before stay as they are."""
    if len({image.shape for image in images}) > 1:
        return torch.cat([network_input([image], device) for image in images])
    if images[0].dtype == np.float32:
        return torch.from_numpy(np.stack(images)).to(device)
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W), channels last
    return 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1


def read_statistics(path):
    """The Statistics in an .npz file with mu and sigma."""
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path} is neither a folder nor an .npz file")
    try:
        with np.load(path) as saved:
            mu, sigma = (np.asarray(saved[name], np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # numpy raises half a dozen types on damaged files
        raise ValueError(f"{path} is no statistics file with mu and sigma: {error}") from None
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not (D,) and (D, D)")
    return Statistics(mu, sigma)


def fid_of(a, b):
    """FID of two Statistics, from the features where all of them are at hand: more exact for small sets."""
    if all(images.features is not None and len(images.features) == images.count for images in (a, b)):
        return frechet_distance_from_features(a.features, b.features)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


# ---------------------------------------------------------------------------------------------------
# Command line


def settings_from_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    add("path", nargs=2, type=named, help="two folders or .npz files; with --save-stats a folder and an .npz file")
    add("--batch-size", type=at_least(1), default=50, help="images at once (default: 50; at most 8 on a CPU: faster)")
    add("--num-workers", type=at_least(0), default=cores, help="processes that read images (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dims", type=int, default=2048, choices=DIMS, help="width of the layer that gives features (default: 2048)")
    add("--save-stats", action="store_true", help="write the statistics of the first path to the second")
    add("--kid", action="store_true", help="KID beside FID; needs two folders")
    add("--weights", help="the Inception weights, instead of fetching them")
    return parser.parse_args()


def named(text):
    if not text:
        raise argparse.ArgumentTypeError("a name is empty")
    return Path(text)


def at_least(low):
    def whole_number(text):
        if int(text) >= low:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is below {low}")

    return whole_number


def pick_device(name):
    """The torch.device of that name; for None, CUDA where there is one."""
    try:
        return torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None


def measured(paths, settings):
    """The Statistics at each path: a folder's images are put through the network, an .npz file is read."""
    sets = [ImageFolder(path) if path.is_dir() else read_statistics(path) for path in paths]
    folders = [images for images in sets if isinstance(images, ImageFolder)]
    widths = {settings.dims if images in folders else len(images.mu) for images in sets}
    if len(widths) > 1:
        raise ValueError(f"one set has {min(widths)} features per image, the other {max(widths)}; set --dims")
    if settings.kid and len(folders) < len(sets):
        raise ValueError("--kid needs two folders: a statistics file holds no features")
    network = load_inception(settings.dims, settings.weights, pick_device(settings.device)) if folders else None
    how = (network, settings.batch_size, settings.num_workers)
    return [
        statistics_of(folder_features(images, *how), len(images)) if images in folders else images for images in sets
    ]


def save_statistics(folder, target, settings):
    """Write the statistics of a folder to a new .npz file, whole or not at all."""
    target = target if target.suffix == ".npz" else target.with_name(f"{target.name}.npz")
    partial = target.with_name(f"{target.name}.partial")
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to")
    partial.touch(exist_ok=False)  # before the work, since it may be impossible
    try:
        (statistics,) = measured([folder], settings)
        with open(partial, "wb") as file:
            np.savez_compressed(file, mu=statistics.mu, sigma=statistics.sigma)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"statistics of {folder}: {target}")


def explained(error):
    """A line for the user, where he can do something about the error; or else it is raised again."""
    shortage = r"out of memory|allocate memory|DataLoader worker \(pid"
    if isinstance(error, RuntimeError) and not re.search(shortage, str(error)):
        raise error
    lacking = "not enough memory: lower --batch-size or --num-workers"
    return lacking if isinstance(error, (MemoryError, RuntimeError)) else error


def main():
    settings = settings_from_command_line()
    if settings.save_stats:
        return save_statistics(*settings.path, settings)
    a, b = measured(settings.path, settings)
    print("FID: ", fid_of(a, b))
    if any(images.count and images.count < ENOUGH for images in (a, b)):
        counts = f"{a.count or 'unknown'} and {b.count or 'unknown'} images"
        print(f"warning: {counts}. FID of less than {ENOUGH} is too large, but --kid is not", file=sys.stderr)
    if settings.kid:
        print("KID:  {} +- {}".format(*kernel_distance(a.features, b.features)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"error: {explained(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
