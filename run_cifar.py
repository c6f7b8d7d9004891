"""CIFAR-100 in phases: baselines and learned exemplars (see README.md).

    python run_cifar.py --demo
    python run_cifar.py --baseline lucir --phases 10
"""
import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

import mnemonics as mn

EXAMPLES = """examples:
  python run_cifar.py --demo                                    no data, no GPU, under two minutes
  python run_cifar.py --baseline lucir --phases 10              Table 1, LUCIR with mnemonics
  python run_cifar.py --baseline icarl --exemplars herding      Table 1, a plain row
  python run_cifar.py --exemplars random --adjust --weight-transfer --finetune      a row of Table 2
  python run_cifar.py --classes 20 --phases 2 --epochs 20       reduced, for a CPU
  python run_cifar.py --report runs                             tables and curves of what is there
"""


def load_data(config: mn.Config) -> tuple[mn.Images, mn.Images]:
    """CIFAR-100 through torchvision, downloaded if it is absent: (train, test), uint8 tensors."""
    from torchvision.datasets import CIFAR100

    folder = Path(config.data_dir)
    if folder.exists() and not folder.is_dir():
        raise mn.UserError(f"--data-dir {folder} is a file: a folder is needed")
    try:
        try:
            sets = [CIFAR100(folder, train=train) for train in (True, False)]
        except RuntimeError:                                 # torchvision: "not found or corrupted"
            damaged = folder / CIFAR100.base_folder
            if damaged.exists():
                raise mn.UserError(f"{damaged} is incomplete or damaged (md5 differs): delete it, or unpack "
                                   f"{CIFAR100.filename} there again") from None
            sets = [CIFAR100(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise mn.UserError(f"CIFAR-100 is not in {folder} and cannot be downloaded ({type(error).__name__}): put "
                           f"{CIFAR100.filename} (torchvision's {CIFAR100.url}) there, unpacked") from None
    sources = [mn.Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
               for s in sets]
    sources[0].names = sets[0].classes
    return tuple(sources)


DEMO = dataclasses.replace(mn.CIFAR100, dataset="demo", dataset_classes=12, image_size=16, phases=2, epochs=8,
                           batch_size=64, per_class=8, exemplar_epochs=60, base_steps=10, finetune_epochs=10)


def demo_data(config: mn.Config) -> tuple[mn.Images, mn.Images]:
    """Learnable images, generated: a class is a colour and a grating; place, phase, contrast and noise vary."""
    rng, size = np.random.default_rng(config.seed), config.image_size
    y, x = np.mgrid[0:size, 0:size] / size

    def draw(each: int) -> mn.Images:
        labels = np.repeat(np.arange(config.dataset_classes), each)
        n = len(labels)
        angle = np.pi * labels / config.dataset_classes + rng.normal(0, 0.08, n)
        phase, contrast = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.4, 1, n)
        waves = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
        waves = np.sin(2 * np.pi * (2 + labels % 3)[:, None, None] * waves + phase[:, None, None])
        hue = 2 * np.pi * (labels % 5)[:, None] / 5 + np.array([0, 2, 4]) * np.pi / 3 + rng.normal(0, 0.5, (n, 1))
        images = 128 + 60 * contrast[:, None, None, None] * waves[:, None] * (1 + 0.5 * np.cos(hue))[:, :, None, None]
        images = images + 25 * np.cos(hue)[:, :, None, None] + rng.normal(0, 30, (n, 3, size, size))
        return mn.Images(torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels))

    train, test = draw(100), draw(40)
    train.names = [f"grating {k}" for k in range(config.dataset_classes)]
    return train, test


def main(argv=None) -> int:
    """Command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    demo = "--demo" in words
    modes = {"demo": ("generated data, small schedule, the whole method: under two minutes on two cores", None)}
    return mn.main(DEMO if demo else mn.CIFAR100, demo_data if demo else load_data, argv, prog="run_cifar.py",
                   description=__doc__, epilog=EXAMPLES, hidden=("imagenet",), modes=modes)


if __name__ == "__main__":
    sys.exit(main())
