"""Frechet Inception Distance (FID) and Kernel Inception Distance (KID) of two sets of images.

    python fid.py A B                        A, B: folders of images, or .npz files with mu and sigma
    python fid.py A B --kid                  the unbiased KID beside it, for small sets
    python fid.py --save-stats A a.npz       keep the statistics of a folder

Options, weights, statistics files and numbers are those of pytorch-fid. The network is the Inception-v3 of 2015 that
every published FID uses. Its weights (91 MB) are fetched once, or given by --weights. Images are read as RGB: alpha is
dropped, 16-bit values above 255 are white. A folder's subfolders are not searched.

FID is too large for small sets, and needs 2,048 images or more on each side; a warning says by how much at least. KID
has no such bias.

Beside pytorch-fid 0.3.0 on two CPU cores: FID equal within 3e-6 of its value, 2.6 times the images per second, and the
distance in a sixth of the time (results/fid.json).

Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Chong and Forsyth 2020 (the bias of FID).
"""

import argparse
import hashlib
import os
import re
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
IMAGE_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DIMS = (64, 192, 768, 2048)  # widths of the layers that features can be taken from
ENOUGH = 2048  # images, below which FID is not to be trusted
KEPT = 10_000  # images whose features are kept in memory; of larger sets, sums and a random choice

# ---------------------------------------------------------------------------------------------------
# The Inception network


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Images keep their size unless there is a stride or no padding."""

    def __init__(self, channels, out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """Put the batch norm into the convolution: one pass over the image less."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def mean_pool(x):
    """3x3 averages that do not count the padding, unlike Inception's own."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    return F.max_pool2d(x, 3, stride=2)


class Mixed5(nn.Module):
    def __init__(self, channels, pooled):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x):
        narrow = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), narrow, double, self.branch_pool(mean_pool(x))], dim=1)


class Mixed6a(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], dim=1)


class Mixed6(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2 = Conv(width, width, (1, 7))
        self.branch7x7_3 = Conv(width, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, (7, 1))
        self.branch7x7dbl_3 = Conv(width, width, (1, 7))
        self.branch7x7dbl_4 = Conv(width, width, (7, 1))
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], dim=1)


class Mixed7a(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        single = self.branch3x3_2(self.branch3x3_1(x))
        double = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([single, double, halve(x)], dim=1)


class Mixed7(nn.Module):
    """pool: mean_pool in Mixed_7b, max_pool in Mixed_7c, as in the network that was released."""

    def __init__(self, channels, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, dim=1)


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
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Mixed6a(288)
        self.Mixed_6b = Mixed6(768, 128)
        self.Mixed_6c = Mixed6(768, 160)
        self.Mixed_6d = Mixed6(768, 160)
        self.Mixed_6e = Mixed6(768, 192)
        self.Mixed_7a = Mixed7a(768)
        self.Mixed_7b = Mixed7(1280, mean_pool)
        self.Mixed_7c = Mixed7(2048, max_pool)
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
    """The network, ready for features: batch norms folded, channels last. weights: a file, or None for the release's.

    Raises ValueError if the file is missing, damaged or another network's, or cannot be fetched.
    """
    path = Path(weights) if weights else released_weights()
    require_hash(path)
    network = Inception(dims)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        raise ValueError(f"{path} does not hold the Inception weights: {str(error).splitlines()[0]}") from None
    network.eval()
    for module in network.modules():
        if isinstance(module, Conv):
            module.fold()
    return network.to(device, memory_format=torch.channels_last)


def release_path():
    """Where torch.hub keeps the release's file."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)


def released_weights():
    """The path of the release's file, which is downloaded unless it is there undamaged."""
    path = release_path()
    try:
        require_hash(path)
    except ValueError:
        path.unlink(missing_ok=True)
        try:
            torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the Inception weights could not be fetched ({error}); "
                f"put {WEIGHTS_URL} into {path.parent}, or name a copy with --weights"
            ) from None
    return path


def require_hash(path):
    """ValueError unless the file is there and has the SHA-256 that its name ends in, as in name-6726825d.pth."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    named = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if named:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
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
    """The arrays in float64; ValueError if they hold a number that is not finite."""
    arrays = [np.asarray(values, np.float64) for values in arrays]
    if not all(np.isfinite(values).all() for values in arrays):
        raise ValueError("means, covariances and features must be finite numbers")
    return arrays


def distance_by_roots(mu1, root1, mu2, root2):
    """The squared Frechet distance of Gaussians with covariances root1 root1^T and root2 root2^T.

    The trace of the square root of their product is the sum of the singular values of root1^T root2.
    """
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
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
    rng, estimates = np.random.default_rng(seed), []
    for _ in range(subsets):
        a, b = (f[rng.choice(len(f), size, replace=False)].astype(np.float64) for f in (x, y))
        aa, bb, ab = cubic_kernel(a, a), cubic_kernel(b, b), cubic_kernel(a, b)
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))
        estimates.append(within - 2 * ab.mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def cubic_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


# ---------------------------------------------------------------------------------------------------
# Statistics of a folder, and their files


class ImageFolder(torch.utils.data.Dataset):
    """The images of a folder, RGB uint8 (H, W, 3). In place of one that cannot be read, a line that says why."""

    def __init__(self, folder):
        self.folder = folder
        self.files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if len(self.files) < 2:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{folder} holds {len(self.files)} images; at least 2 are needed ({suffixes})")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return np.asarray(Image.open(self.files[i]).convert("RGB"))
        except Exception as error:  # Pillow raises many types
            return f"{self.files[i]} cannot be read: {error}"


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
    features, done, total, products = [], 0, 0.0, 0.0
    for batch in batches:
        if done == 0:
            origin = batch.mean(axis=0, dtype=np.float64)  # sums of squares around it lose no digits
        features.append(batch[kept[done : done + len(batch)]])
        centred = batch - origin
        total, products, done = total + centred.sum(axis=0), products + centred.T @ centred, done + len(batch)
    sigma = (products - np.outer(total, total) / count) / (count - 1)
    return Statistics(origin + total / count, sigma, count, np.concatenate(features))


@torch.inference_mode()
def folder_features(images, network, batch_size, num_workers):
    """Yield the features (B, D) of an ImageFolder's images, with a progress line."""
    device = next(network.parameters()).device
    if device.type == "cpu":
        batch_size = min(batch_size, 8)  # what the layers make of more images does not fit the caches
    loader = torch.utils.data.DataLoader(images, batch_size, num_workers=num_workers, collate_fn=list)
    started, done, shown = time.monotonic(), 0, 0.0
    for batch in loader:
        unreadable = [image for image in batch if isinstance(image, str)]
        if unreadable:
            raise ValueError("; ".join(unreadable))
        yield network(network_input(batch, device)).cpu().numpy()
        done, seconds = done + len(batch), time.monotonic() - started
        if seconds > shown + 0.5 or done == len(images):
            left = (len(images) - done) * seconds / done
            line = f"{images.folder}: {done}/{len(images)} images, {done / seconds:.1f}/s, {left:.0f} s left"
            print(f"\r{line:<79}", end="\n" if done == len(images) else "", file=sys.stderr, flush=True)
            shown = seconds


def network_input(images, device):
    """RGB images (H, W, 3) in uint8, of one size or several, as a tensor (B, 3, 299, 299) in [-1, 1]."""
    if len({image.shape for image in images}) > 1:
        return torch.cat([network_input([image], device) for image in images])
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W), channels last
    return 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1


def read_statistics(path):
    """The Statistics in an .npz file with mu and sigma."""
    try:
        with np.load(path) as saved:
            mu, sigma = (np.asarray(saved[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no statistics file with mu and sigma: {error}") from None
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not (D,) and (D, D)")
    return Statistics(mu, sigma)


def write_statistics(path, statistics):
    """Write mu and sigma to an .npz file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, mu=statistics.mu, sigma=statistics.sigma)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------
# FID and KID of two sets


def fid_of(a, b):
    """FID of two Statistics, from the features where all of them are at hand: more exact for small sets."""
    if all(images.features is not None and len(images.features) == images.count for images in (a, b)):
        return frechet_distance_from_features(a.features, b.features)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def bias_at_least(a, b):
    """A lower bound on the part of FID that is there because the sets are small.

    The bias falls with the number of images like 1 / N, and more slowly while N is below the number of dimensions. So
    halving the sets adds as much again, or less.
    """
    halves = [halves_of(images) if images.count and images.count < ENOUGH else (images, images) for images in (a, b)]
    return np.mean([fid_of(*pair) for pair in zip(*halves, strict=True)]) - fid_of(a, b)


def halves_of(images):
    """The Statistics of two random halves of a set, or of the set twice if it is too small to be halved."""
    half = images.count // 2
    if half < 2:
        return images, images
    shuffled = np.random.default_rng(0).permutation(images.features)
    return tuple(statistics_of([part], half) for part in (shuffled[:half], shuffled[half : 2 * half]))


# ---------------------------------------------------------------------------------------------------
# Command line


def open_set(path):
    """A folder's images, or the Statistics in an .npz file."""
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix == ".npz" and path.is_file():
        return read_statistics(path)
    raise ValueError(f"{path} is neither a folder nor an .npz file")


def settings_from_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    option = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    option("path", nargs=2, type=Path, help="two folders or .npz files; with --save-stats a folder and an .npz file")
    option(
        "--batch-size",
        type=at_least(1),
        default=50,
        help="images at once (default: 50; on a CPU at most 8, which is faster)",
    )
    option(
        "--num-workers",
        type=at_least(0),
        default=min(8, cores),
        help="processes that read images (default: %(default)s)",
    )
    option("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    option(
        "--dims", type=int, default=2048, choices=DIMS, help="width of the layer that gives features (default: 2048)"
    )
    option("--save-stats", action="store_true", help="write the statistics of the first path to the second")
    option("--kid", action="store_true", help="KID beside FID; needs two folders")
    option("--weights", help="the Inception weights, instead of fetching them")
    return parser.parse_args()


def at_least(low):
    """An argparse type: a whole number that is not below `low`."""

    def whole_number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)

    return whole_number


def pick_device(name):
    """The torch.device of that name; for None, CUDA where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def measured(paths, settings):
    """The Statistics at each path: a folder's images are put through the network, an .npz file is read."""
    sets = [open_set(path) for path in paths]
    widths = {len(images.mu) if isinstance(images, Statistics) else settings.dims for images in sets}
    if len(widths) > 1:
        raise ValueError(f"one set has {min(widths)} features per image, the other {max(widths)}; set --dims")
    if settings.kid and any(isinstance(images, Statistics) for images in sets):
        raise ValueError("--kid needs two folders: a statistics file holds no features")
    if any(isinstance(images, ImageFolder) for images in sets):
        network = load_inception(settings.dims, settings.weights, pick_device(settings.device))
    return [
        images
        if isinstance(images, Statistics)
        else statistics_of(folder_features(images, network, settings.batch_size, settings.num_workers), len(images))
        for images in sets
    ]


def save_statistics(folder, target, settings):
    """Write the statistics of a folder to a new .npz file."""
    target = target if target.suffix == ".npz" else target.with_name(f"{target.name}.npz")
    if target.exists():
        raise ValueError(f"{target} exists; remove it, or choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write {target.name} to")
    write_statistics(target, measured([folder], settings)[0])
    print(f"statistics of {folder}: {target}")


def compare(paths, settings):
    """Print FID, a warning where it is not to be trusted, and KID."""
    a, b = measured(paths, settings)
    print("FID: ", fid_of(a, b))
    if any(images.count and images.count < ENOUGH for images in (a, b)):
        counts = " and ".join(str(images.count or "unknown") for images in (a, b))
        print(
            f"warning: {counts} images; {ENOUGH} or more are needed. At least {bias_at_least(a, b):.2f} of this FID is "
            "there because the sets are small; --kid has no such bias",
            file=sys.stderr,
        )
    if settings.kid:
        print("KID:  {} +- {}".format(*kernel_distance(a.features, b.features)))


def main():
    settings = settings_from_command_line()
    if settings.save_stats:
        save_statistics(*settings.path, settings)
    else:
        compare(settings.path, settings)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
