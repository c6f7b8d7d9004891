"""ImageNet in phases, 100 or 1,000 classes, on one GPU or many (see README.md).

    python run_imagenet.py --baseline lucir --phases 10 --data-dir DIR
    torchrun --nproc_per_node=8 run_imagenet.py --classes 1000 --data-dir DIR

The folder holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
"""
import itertools
import os
import signal
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)              # the imports below take seconds: Ctrl-C is no traceback

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

import mnemonics as mn

EXAMPLES = """examples:
  python run_imagenet.py --data-dir /data/imagenet
      ImageNet-Subset: 100 classes, N = 5
  python run_imagenet.py --classes 1000 --phases 10 --data-dir /data/imagenet
      all of ImageNet; on eight GPUs: torchrun --nproc_per_node=8 for python
  python run_imagenet.py --image-size 64 --data-dir data/tiny-imagenet-100
      small images
"""
SUBSET_SEED = 1993        # the draw of ImageNet-Subset, whatever --seed and --order-seed are
WORKERS_FROM = 256         # images of a pass: fewer are decoded here before workers would have started


class _Decoded(Dataset):
    """(index, seed) -> (uint8 image (3, S, S), label), decoded and cropped in a worker; seed None: as a test sees it.
    """

    def __init__(self, source: "Folder"):
        self.files, self.labels, self.extra = source.files, source.labels, source.extra
        size = source.size
        self.test = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])
        self.train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])

    def __getitem__(self, key: tuple):
        index, seed = key
        stored = index >= len(self.files)
        image = self.extra[index - len(self.files)] if stored else self.read(self.files[index])
        if seed is not None:
            # One seed a draw: the crop does not depend on which worker decodes it.
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(mn.seed_of(seed))
                image = self.train(image)
        elif not stored:
            image = self.test(image)
        return image, int(self.labels[index])

    @staticmethod
    def read(path: str) -> torch.Tensor:
        """One file as uint8 (3, H, W); UserError that names it if it cannot be decoded."""
        from PIL import Image                                # comes with torchvision

        try:
            with Image.open(path) as image:
                if not image.mode.startswith(("I", "F")):     # grey of more than 8 bits: convert would cut it off
                    return v2.functional.pil_to_tensor(image.convert("RGB"))
                why = f"mode {image.mode}, 8 bits a channel are needed"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            why = type(error).__name__
        raise mn.UserError(f"{path} cannot be decoded ({why}): replace it, or delete it (where --resume "
                           "then says that images are others: start again in another --out)")


class Folder:
    """Image files as a data source: decoded when asked for, by worker processes, to uint8 (n, 3, S, S).

    files: paths. labels: (N,). extra: uint8 exemplars (m, 3, S, S) behind the files, their labels last in `labels`.
    """

    def __init__(self, files, labels, size: int, workers: int, device="cpu", extra=None):
        self.files, self.labels = np.asarray(files, dtype=np.str_), torch.as_tensor(labels, dtype=torch.long)
        self.size, self.workers, self.device = size, workers, torch.device(device)
        self.extra = torch.empty(0, 3, size, size, dtype=torch.uint8) if extra is None else extra.cpu()
        self.loader = None

    def __len__(self) -> int:
        return len(self.labels)

    def _like(self, files, labels, extra=None) -> "Folder":
        return Folder(files, labels, self.size, self.workers, self.device, extra)

    def subset(self, index: torch.Tensor, labels=None) -> "Folder":
        """Some of the files, with new labels if given; nothing is decoded."""
        index = index.cpu()
        return self._like(self.files[index.numpy()], self.labels[index] if labels is None else labels.cpu())

    def join(self, images: torch.Tensor, labels: torch.Tensor) -> "Folder":
        """The files followed by exemplars, which stay 8-bit tensors on the host."""
        extra = torch.cat([self.extra, images.cpu()]) if len(self.extra) else images.cpu()        # one copy may be GBs
        return self._like(self.files, torch.cat([self.labels, labels.cpu()]), extra)

    def to(self, device) -> "Folder":
        """Where batches go; files and labels stay on the host."""
        return Folder(self.files, self.labels, self.size, self.workers, device, self.extra)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, S, S) on the host, as a test sees them."""
        if not len(index):
            return self.extra[:0]
        return torch.cat([images.cpu() for images, _ in self.batches(index.cpu().split(64))])

    def batches(self, plan, augment=None, generator=None):
        """uint8 images and labels on the device for each index tensor of `plan`, decoded ahead by the workers, who
        crop and flip as they decode where `augment` is given."""
        first = int(torch.randint(2 ** 62, (), generator=generator, device=generator.device)) if augment else 0
        seeds = itertools.count(first) if augment else itertools.repeat(None)
        plan = [list(zip(index.tolist(), seeds)) for index in plan]
        try:
            for images, labels in self._loader(plan):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except mn.UserError as error:                             # a worker's comes wrapped in its traceback
            error.with_traceback(None)                            # a circle: workers collected with it take 5 s to end
            raise mn.UserError(str(error).strip().split("UserError: ")[-1]) from None

    def _loader(self, plan: list) -> DataLoader:
        """Workers that stay for this source's life; a few images are decoded here, faster than workers start."""
        workers = self.workers if self.loader or sum(map(len, plan)) >= WORKERS_FROM else 0
        if not workers:
            return DataLoader(_Decoded(self), batch_sampler=plan)
        if self.loader is None:
            self.plan = []                        # set anew for every pass, so that one set of workers serves all
            warnings.filterwarnings("ignore", "This DataLoader will create")         # more than cores: as asked for
            self.loader = DataLoader(_Decoded(self), batch_sampler=self.plan, num_workers=workers, prefetch_factor=4,
                                     persistent_workers=True, pin_memory=self.device.type == "cuda",
                                     worker_init_fn=mn.leave_signals)
        self.plan[:] = plan
        return self.loader


def subset_wnids(wnids: list) -> list:
    """ImageNet-Subset's 100 classes, drawn as LUCIR's code does from the sorted wnids, in order of the draw."""
    return np.random.RandomState(SUBSET_SEED).choice(sorted(wnids), 100, replace=False).tolist()


def chosen_wnids(present: list, classes: int) -> list:
    """The sorted wnids that the class order permutes: the 100-class subset of 1,000, or just what is there."""
    count = len(present)
    if count < classes:
        raise mn.UserError(f"--classes {classes}: the training folder has {count} classes")
    if classes <= 100 and count == 1000:
        return sorted(subset_wnids(present))
    if count > 100 and count != classes:
        raise mn.UserError(f"--classes {classes} of the {count} in the training folder: use at most 100 of 1,000, or a "
                           "folder with just the classes needed")
    return sorted(present)


def list_files(root: Path, wnids: list) -> tuple[list, list]:
    """(paths, labels) of the images of some classes; UserError for a missing or an empty class."""
    files, labels = [], []
    for label, wnid in enumerate(wnids):
        folder = root / wnid
        if not folder.is_dir():
            raise mn.UserError(f"{folder} is missing: class {wnid} is in train but not in {root.name}")
        found = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise mn.UserError(f"{folder} holds no images")
        files += found
        labels += [label] * len(found)
    return files, labels


def load_data(config: mn.Config) -> tuple[Folder, Folder]:
    """(train, val) of an ImageFolder; nothing is decoded yet."""
    root = Path(config.data_dir)
    for part in (root, root / "train", root / "val"):
        if not part.is_dir():
            raise mn.UserError(f"{part} is not a folder: --data-dir must hold train/<wnid>/*.JPEG and "
                               "val/<wnid>/*.JPEG")
    present = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    wnids = chosen_wnids(present, config.classes)
    sources = [Folder(*list_files(root / part, wnids), config.image_size, config.workers) for part in ("train", "val")]
    sources[0].ids = wnids
    return tuple(sources)


def benchmark(config: mn.Config) -> int:
    """Print how many training images a second the files give, decoded and cropped, by number of workers."""
    device = mn.pick_device(config.device)
    source = load_data(config)[0]
    index = torch.randint(len(source), (max(256, 16 * config.batch_size),), generator=torch.Generator().manual_seed(0))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({0, config.workers} | {2 ** k for k in range(cores.bit_length())})
    print(f"{len(index)} draws from {len(source)} files of {config.data_dir}, {config.image_size} x "
          f"{config.image_size} pixels, batch {config.batch_size}, {cores} cores; second pass, files in the system's "
          "cache")
    for workers in counts:
        part = source.subset(index).to(device)
        part.workers = workers
        for _ in range(2):                                                # the first pass starts the workers
            start = time.perf_counter()
            plan = torch.arange(len(part)).split(config.batch_size)
            for _ in part.batches(plan, True, torch.Generator().manual_seed(0)):
                pass
            seconds = time.perf_counter() - start
        print(f"{workers:3d} workers {len(index) / seconds:8.0f} images/s", flush=True)
        del part
    return 0


def main(argv=None) -> int:
    """Command line; returns the exit status."""
    modes = {"benchmark": ("no training: images/s that the files give, by number of workers", benchmark,
                           ("data_dir", "image_size", "batch_size", "workers", "device", "classes", "phases"))}
    return mn.main(mn.IMAGENET_SUBSET, load_data, argv, prog="run_imagenet.py", description=__doc__, epilog=EXAMPLES,
                   modes=modes)


if __name__ == "__main__":
    sys.exit(main())
