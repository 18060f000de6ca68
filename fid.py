"""Frechet Inception Distance (FID) and Kernel Inception Distance (KID) of two sets of images.

    python fid.py A B                        A, B: folders of images, or .npz files with mu and sigma
    python fid.py A B --kid                  the unbiased KID beside it, for small sets
    python fid.py --save-stats A a.npz       keep the statistics of a folder

Options, weights, statistics files and numbers are those of pytorch-fid. The network is the Inception-v3 of 2015 that
every published FID uses. Its weights (91 MB) are fetched once, or given by --weights.

Images are what Pillow reads in 8 bits, and grey of 16 bits (its mode I;16), where 65535 is white. Refused are others
(32 bits, floats, LAB, HSV), and grey of 16 bits whose brightest value is below a tenth of white: save them as RGB with
8 bits. As in pytorch-fid, alpha and EXIF are dropped, the first of several frames counts, and subfolders are not
searched. Bad input ends in exit code 2, Ctrl-C in 130, SIGTERM in 143. A line that cannot be written is dropped.

FID (Heusel et al. 2017) is too large for small independent sets, and needs 2,048 images or more on each side (Chong
and Forsyth 2020). KID (Binkowski et al. 2018) has no such bias.
"""

import argparse
import hashlib
import io
import os
import re
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
WEIGHTS_URL = f"{RELEASE}/pt_inception-2015-12-05-6726825d.pth"
IMAGE_SUFFIXES = ".bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
READ = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N")  # modes
DIMS = (64, 192, 768, 2048)  # widths of the layers that features can be taken from
ENOUGH = 2048  # images, below which FID is not to be trusted
KEPT = 10_000  # images whose features are kept in memory; of larger sets, sums and a random choice


class InputError(ValueError):
    """Bad input, in words that tell the user what to mend."""


# ---------------------------------------------------------------------------------------------------
# The Inception network


class Conv(nn.Sequential):
    """Convolution, batch norm, ReLU. Images keep their size unless there is a stride or no padding."""

    def __init__(self, channels, width, kernel, stride=1, padded=True):
        padding = "same" if padded and stride == 1 else "valid"
        conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, eps=0.001), relu=nn.ReLU(inplace=True)))


halve = nn.MaxPool2d(3, stride=2)
mean_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)  # torchvision's Inception counts the padding


class Mixed(nn.Module):
    """Branches that read the same image, their results concatenated: chains of convolutions, and a pool.

    branches: name -> (width, kernel, stride) of each convolution, one after another, numbered if there are several: in
        MIXED_5 x -> branch5x5_1 (48 channels, 1x1) -> branch5x5_2 (64, 5x5). A dict of kernels ends a chain in several
        convolutions side by side, each with its letter: in MIXED_7 FORK stands for branch3x3_2a (384, 1x3) and
        branch3x3_2b (384, 3x1), which both read branch3x3_1.
    pooled: the width of one after the pool, branch_pool.
    """

    def __init__(self, channels, branches, pool, pooled=None):
        super().__init__()
        self.chains = []  # each a list of steps, a step a list of names
        self.pool = pool
        for branch, steps in branches.items():
            chain, before = [], channels
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
    """Images (B, 3, 299, 299), float32 in [-1, 1] -> features (B, dims): a layer's average over the image. It is the
    layer of that width: 64 and 192 after the first and second max pool, 768 before Mixed_7a, 2048 at the end. The state
    dict has the names and shapes of pytorch-fid's release."""

    def __init__(self, dims=2048):
        super().__init__()
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
    if wrong := damage(path):
        if weights:
            raise InputError(wrong)
        fetch_release()
    network = Inception(dims).eval()
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise InputError("a wrong checksum, which torch.load does not see")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen types on damaged files
        if isinstance(error, OSError) or lacks_memory(error):
            raise
        raise InputError(f"{path} is not the Inception weights") from None
    for module in network.modules():
        if isinstance(module, Conv):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network.to(device, memory_format=torch.channels_last)


def release_path():
    return Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)


def fetch_release():
    release_path().unlink(missing_ok=True)
    try:
        torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        remedy = f"put {WEIGHTS_URL} into {release_path().parent}, or name a copy with --weights"
        raise InputError(f"the Inception weights could not be fetched ({error}); {remedy}") from None


def damage(path):
    """What is wrong with a file of weights, by the SHA-256 that its name may end in, as in name-6726825d.pth; or ""."""
    if not path.is_file():
        return f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
    named = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if named and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(named[1]):
        return f"{path} is damaged: its name gives another SHA-256; fetch it again"
    return ""


# ---------------------------------------------------------------------------------------------------
# Distances


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of two Gaussians with means (D,) and covariances (D, D):
    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))."""
    mu1, sigma1, mu2, sigma2 = finite_arrays(mu1, sigma1, mu2, sigma2)
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (mu1.size, mu1.size):
        raise InputError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit")
    return distance_by_roots(mu1, covariance_root(sigma1), mu2, covariance_root(sigma2))


def frechet_distance_from_features(x, y):
    """The same for the Gaussians fitted to features (N, D) and (M, D), without forming a covariance matrix."""
    x, y = finite_arrays(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError("a covariance needs features of at least 2 images")
    return distance_by_roots(x.mean(axis=0), feature_root(x), y.mean(axis=0), feature_root(y))


def finite_arrays(*arrays):
    arrays = [np.asarray(values, np.float64) for values in arrays]
    if not all(np.isfinite(values).all() for values in arrays):
        raise InputError("means, covariances and features must be finite numbers")
    return arrays


def distance_by_roots(mu1, root1, mu2, root2):
    """The same for covariances A A^T and B B^T, given A and B. The eigenvalues of their product, but for zeros, are the
    squared singular values of A^T B, whose sum is the trace of its root: real, and exact for low ranks, too."""
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()  # tr((sigma1 sigma2)^(1/2))
    distance = np.square(mu1 - mu2).sum() + np.square(root1).sum() + np.square(root2).sum() - 2 * cross
    return max(0.0, float(distance))


def covariance_root(sigma):
    """A matrix (D, rank) whose product with its own transpose is sigma (D, D)."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:  # not positive definite: there were fewer samples than dimensions
        values, vectors = np.linalg.eigh(sigma)
        positive = values > len(values) * np.finfo(values.dtype).eps * values[-1]  # the others are 0, but for rounding
        return vectors[:, positive] * np.sqrt(values[positive])


def feature_root(features):
    """A matrix (D, min(N, D)) whose product with its own transpose is the covariance of features (N, D)."""
    root = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    if len(root) > root.shape[1]:
        root = np.linalg.qr(root, mode="r")  # (D, D), and root.T @ root stays what it is
    return root.T


def kernel_distance(x, y, subsets=100, subset_size=1000, seed=0):
    """KID of features (N, D) and (M, D): the unbiased estimate of the squared maximum mean discrepancy under the kernel
    (x . y / D + 1)^3, which may fall below 0. Mean and standard deviation over random subsets: subset_size of each
    side, but never more than half, so that subsets differ."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    size = min(subset_size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise InputError("KID needs at least four images on each side")
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        a = x[rng.choice(len(x), size, replace=False)].astype(np.float64)
        b = y[rng.choice(len(y), size, replace=False)].astype(np.float64)
        aa, bb = kernel(a, a), kernel(b, b)
        within = (aa.sum() - np.trace(aa) + bb.sum() - np.trace(bb)) / (size * (size - 1))  # pairs of different images
        estimates.append(within - 2 * kernel(a, b).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


# ---------------------------------------------------------------------------------------------------
# Statistics of a folder, and their files


def read_image(path):
    """The image in a file, RGB uint8 (H, W, 3)."""
    image = Image.open(path)
    if image.mode not in READ:
        raise InputError(f"its mode is {image.mode}; save it as RGB with 8 bits")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if levels.max() < 65535 / 10:
            raise InputError(f"it has 16 bits, but its brightest value is {levels.max()}; save it with 8 bits")
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    return np.asarray(image.convert("RGB"))


class ImageFolder(torch.utils.data.Dataset):
    """The images of a folder, RGB uint8 (H, W, 3); of large ones what the network is given, which takes less memory. In
    place of one that cannot be read a line that says why: an error in a worker would come out as a traceback."""

    def __init__(self, folder):
        self.folder = folder
        shown = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES.split()]
        self.files = sorted(path for path in shown if path.parent == folder)
        if below := len(shown) - len(self.files):
            print(f"{folder}: {below} images in its subfolders are not counted", file=sys.stderr)
        if len(self.files) < 2:
            raise InputError(f"{folder} holds {len(self.files)} images; at least 2 are needed ({IMAGE_SUFFIXES})")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = read_image(self.files[i])
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types
            return f"{self.files[i]} cannot be read: {error}"
        if image.nbytes < 4 * 3 * 299 * 299:
            return image
        channels = [network_input([image[..., i, None]], "cpu") for i in range(3)]  # by turns: floats take much memory
        return torch.cat(channels, dim=1)[0].numpy()


class Statistics(NamedTuple):
    """What is known of a set of images: its Gaussian, and features while they are at hand."""

    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    count: int | None = None  # images; None where only a statistics file is at hand
    features: np.ndarray | None = None  # (min(count, KEPT), D), chosen at random


def statistics_of(batches, count):
    """Statistics of `count` features that come in batches (B, D), in memory that does not depend on their number."""
    kept = np.isin(range(count), np.random.default_rng(0).permutation(count)[:KEPT])  # whether a row is kept, at random
    features = []
    done = total = products = 0
    for batch in batches:
        if done == 0:
            origin = batch.mean(axis=0, dtype=np.float64)  # near the mean of all: squares around it lose no digits
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
    batch_size = min(batch_size, 8) if device.type == "cpu" else batch_size  # more do not fit its caches
    started = time.monotonic()
    done = 0
    for batch in torch.utils.data.DataLoader(images, batch_size, num_workers=num_workers, collate_fn=list):
        if unreadable := [image for image in batch if isinstance(image, str)]:
            raise InputError("; ".join(unreadable))
        yield network(network_input(batch, device)).cpu().numpy()
        done += len(batch)
        seconds = time.monotonic() - started
        left = (len(images) - done) * seconds / done
        line = f"{images.folder}: {done}/{len(images)} images, {done / seconds:.1f}/s, {left:.0f} s left"
        print(f"\r{line:<79}", end="\n" if done == len(images) else "", file=sys.stderr, flush=True)


def network_input(images, device):
    """The images of an ImageFolder as a tensor (B, 3, 299, 299) in [-1, 1], which large ones are already."""
    if len({image.shape for image in images}) > 1:
        return torch.cat([network_input([image], device) for image in images])
    if images[0].dtype == np.float32:
        return torch.from_numpy(np.stack(images)).to(device)
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W), channels last
    return 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1


def read_statistics(path):
    """The Statistics in an .npz file with mu and sigma."""
    try:
        with np.load(path) as saved:
            return Statistics(np.asarray(saved["mu"], np.float64), np.asarray(saved["sigma"], np.float64))
    except Exception:  # numpy raises half a dozen types on damaged files, some with advice to read them unsafely
        raise InputError(f"{path} is neither a folder nor an .npz file with mu and sigma") from None


def fid_of(a, b):
    """FID of two Statistics, from the features where all of them are at hand: more exact for small sets."""
    if all(images.features is not None and len(images.features) == images.count for images in (a, b)):
        return frechet_distance_from_features(a.features, b.features)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


# ---------------------------------------------------------------------------------------------------
# Command line


def settings_from_command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # without the usage
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("path", nargs=2, type=Path, help="two folders or .npz files; with --save-stats a folder and an .npz file")
    add("--batch-size", type=int, default=50, help="images at once (default: 50; at most 8 on a CPU: faster)")
    add("--num-workers", type=int, default=min(8, cores), help="processes that read images (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dims", type=int, default=2048, choices=DIMS, help="width of the layer that gives features (default: 2048)")
    add("--save-stats", action="store_true", help="write the statistics of the first path to the second, a new file")
    add("--kid", action="store_true", help="KID beside FID; needs two folders")
    add("--weights", help="a whole file of the Inception weights, instead of fetching them")
    return parser.parse_args()


def pick_device(name):
    try:
        return torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # torch raises both
        raise InputError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None


def measured(paths, settings):
    """The Statistics at each path: a folder's images are put through the network, an .npz file is read."""
    sets = [ImageFolder(path) if path.is_dir() else read_statistics(path) for path in paths]
    folders = [images for images in sets if isinstance(images, ImageFolder)]
    widths = {settings.dims if isinstance(images, ImageFolder) else len(images.mu) for images in sets}
    if len(widths) > 1:
        raise InputError(f"one set has {min(widths)} features per image, the other {max(widths)}; set --dims")
    if settings.kid and len(folders) < len(sets):
        raise InputError("--kid needs two folders: a statistics file holds no features")
    if folders:
        network = load_inception(settings.dims, settings.weights, pick_device(settings.device))
    for i, images in enumerate(sets):
        if isinstance(images, ImageFolder):
            features = folder_features(images, network, settings.batch_size, settings.num_workers)
            sets[i] = statistics_of(features, len(images))
    return sets


def save_statistics(folder, target, settings):
    """Write the statistics of a folder to a new .npz file, whole or not at all."""
    target = target if target.suffix == ".npz" else target.with_name(f"{target.name}.npz")
    if target.exists():
        raise InputError(f"{target} exists; remove it, or choose another name")
    temporary = target.with_name(f".{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:  # before the work, since it may be impossible
            (statistics,) = measured([folder], settings)
            np.savez_compressed(file, mu=statistics.mu, sigma=statistics.sigma)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"statistics of {folder}: {target}", file=sys.stderr)  # which has every name, in any encoding


def lacks_memory(error):
    """Whether that is the cause: torch raises RuntimeErrors, its DataLoader one if the system ends a worker."""
    return isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory|worker \(pid", str(error))


class Output(io.TextIOBase):
    """Standard output or error, where a line that cannot be written is dropped, and all that follow."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  (None under >&-)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def print_distances(a, b, kid):
    print("FID: ", fid_of(a, b))
    if any(images.count and images.count < ENOUGH for images in (a, b)):
        counts = f"{a.count or 'unknown'} and {b.count or 'unknown'} images"
        print(f"warning: {counts}. FID of fewer than {ENOUGH} is too large, but --kid is not", file=sys.stderr)
    if kid:
        print("KID:  {} +- {}".format(*kernel_distance(a.features, b.features)))


def main():
    def stop(number, frame):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises an error for each worker that ends, too
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        settings = settings_from_command_line()
        if settings.save_stats:
            save_statistics(*settings.path, settings)
        else:
            print_distances(*measured(settings.path, settings), settings.kid)
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    except Exception as error:
        if lacks_memory(error):
            error = "not enough memory: lower --batch-size or --num-workers"
        elif not isinstance(error, (InputError, OSError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
