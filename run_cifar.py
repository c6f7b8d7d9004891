"""CIFAR-100 in phases: baselines and learned exemplars (see README.md).

    python run_cifar.py --demo
    python run_cifar.py --baseline lucir --phases 10
"""
import copy
import dataclasses
import functools
import itertools
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Iterator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)              # the imports below take seconds: Ctrl-C is no traceback

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import mnemonics as mn

EXAMPLES = """examples, each after python run_cifar.py:
  --demo                                         no data, no GPU, half a minute
  --baseline lucir --phases 10                   Table 1, LUCIR with ours
  --baseline icarl --exemplars herding           Table 1, a plain row
  --recipe paper --no-adjust                     Table 2, mnemonics w/o adj.
  --classes 20 --phases 2 --epochs 20            reduced, for a CPU
  --report runs                                  tables and curves of all runs
"""


def load_data(config: mn.Config) -> tuple[mn.Images, mn.Images]:
    """CIFAR-100 through torchvision, downloaded if it is absent: (train, test), uint8 tensors."""
    from torchvision.datasets import CIFAR100

    folder = Path(config.data_dir)
    if folder.exists() and not folder.is_dir():
        raise mn.UserError(f"--data-dir {folder} is a file: a folder is needed")
    if folder.name == CIFAR100.base_folder:
        raise mn.UserError(f"--data-dir {folder}: give the folder that holds it, {folder.parent}")
    try:
        try:
            sets = [CIFAR100(folder, train=train) for train in (True, False)]
        except RuntimeError:                                 # torchvision: "not found or corrupted"
            damaged = folder / CIFAR100.base_folder
            if damaged.exists():
                raise mn.UserError(f"{damaged} is incomplete or damaged (md5 differs): delete it, or unpack "
                                   f"{CIFAR100.filename} there again") from None
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:     # each would write over the others' archive
                raise mn.UserError(f"no {damaged}/train: start once without torchrun, which downloads it") from None
            sets = [CIFAR100(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise mn.UserError(f"no {folder / CIFAR100.base_folder}/train, and the download failed "
                           f"({type(error).__name__}): unpack {CIFAR100.url} in {folder}") from None
    sources = [mn.Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
               for s in sets]
    sources[0].names = sets[0].classes
    return tuple(sources)


DEMO = dataclasses.replace(mn.CIFAR100, dataset="demo", dataset_classes=12, image_size=16, phases=2, epochs=16,
                           batch_size=64, per_class=8, base_networks=3, ahead_epochs=2, exemplar_epochs=20,
                           exemplar_augment=False, finetune_epochs=20)     # a crop of 4 pixels is much of 16


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


# ---- --benchmark ----

BENCHMARKED = ("baseline", "network", "batch_size", "exemplars", "per_class", "unrehearsed", "weight_transfer",
               "recipe", "base_level", "base_steps", "base_start", "meta_batch", "exemplar_augment", "bop_chunk",
               "device", "precision", "deterministic")                  # what changes the work that it measures


def _times(work, device: torch.device, repeats: int) -> list[float]:
    """Wall-clock seconds of each of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def _seconds(work, device: torch.device, repeats: int = 8, warm: int = 2) -> float:
    """Median wall-clock seconds of a call, after some to warm up."""
    return statistics.median(_times(work, device, repeats + warm)[warm:])


def _in_turn(works, device: torch.device, rounds: int = 5, each: int = 5) -> list[float]:
    """Median seconds of a call of each, some of each in turn, so that whatever else runs here slows all of them. The
    first round is to warm up (CUDA graphs need some steps), and so is the first call of a turn. A work may be a
    (function, row): so many calls before the device is waited for."""
    rows = [work if isinstance(work, tuple) else (work, 1) for work in works]

    def turn(work, row: int) -> list[float]:
        return [seconds / row for seconds in _times(lambda: [work() for _ in range(row)], device, each + 1)[1:]]

    turns = [[turn(*pair) for pair in rows] for _ in range(rounds)][1:]
    return [statistics.median(itertools.chain(*times)) for times in zip(*turns)]


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured matrix-multiply peak, FLOP/s."""
    size = 8192 if device.type == "cuda" else 2048                      # large enough for its launch not to count
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size ** 3 / _seconds(lambda: a @ a, device)


def _phase_one(config: mn.Config, device: torch.device):
    """A learner at the start of phase 1 on random images, with a teacher: (learner, pool of images)."""
    config = dataclasses.replace(config.resolved(), per_class=min(config.per_class, 20))
    data = mn.Images(torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8), torch.arange(2000) % 100)
    baseline = mn.BASELINES[config.baseline]()
    net = mn.NETWORKS[config.network](classes=50, cosine=baseline.cosine).to(device)
    learner = mn.Learner(net, baseline, mn.STRATEGIES[config.exemplars](), config)
    learner.index, phase = 1, mn.phases_of(data, data, list(range(100)), [50, 50])[1]
    learner._begin(phase.classes, phase.train.to(device))
    return learner, data.to(device)


def _transformed(transform, batch: list):
    """A batch whose images are transformed one by one, as toolkits' data sets do it in their workers."""
    return torch.utils.data.default_collate([(transform(image), label) for image, label in batch])


def _toolkit_step(learner: mn.Learner, pool: mn.Images, batch: int):
    """The same step the way existing toolkits take it: PIL images, transforms one by one in a DataLoader's workers,
    eager float32, the loss read after every step. Returns a function that takes one."""
    from torchvision import transforms

    config = learner.config
    steps = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
             transforms.ColorJitter(brightness=63 / 255), transforms.ToTensor(),
             transforms.Normalize(config.mean, config.std)]
    loader = torch.utils.data.DataLoader(list(zip(pool.images.cpu(), pool.labels.tolist())), batch, shuffle=True,
                                         num_workers=min(4, os.cpu_count() or 1), drop_last=True,
                                         collate_fn=functools.partial(_transformed, transforms.Compose(steps)),
                                         worker_init_fn=mn.leave_signals)
    net, old = (copy.deepcopy(n).to(memory_format=torch.contiguous_format) for n in (learner.net, learner.old))
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=5e-4)

    batches = itertools.chain.from_iterable(itertools.repeat(loader))               # a new pass each time

    def step() -> None:
        x, y = next(batches)
        loss = learner.baseline.loss(net, old, x.to(learner.device), y.to(learner.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def _our_step(learner: mn.Learner, pool: mn.Images, batch: int):
    """Our default path, augmentation included. Returns a function that takes one step."""
    net = copy.deepcopy(learner.net).to(memory_format=torch.channels_last).train()
    optimizer = mn.fused_sgd(net, learner.config.lr, learner.config)
    old = mn.fold_norms(learner.old)
    step = mn.TrainStep(net, lambda net, x, y: learner.baseline.loss(net, old, x, y), optimizer,
                        learner.normalise, learner.precision, batch)
    index = torch.randperm(len(pool))[:batch].to(learner.device)
    generator = torch.Generator(learner.device).manual_seed(0)
    return lambda: step(*next(pool.batches([index], mn.crop_and_flip, generator)))


def _student(learner: mn.Learner, pool: mn.Images, batch: int):
    """What of our step is the student's own: its forward and backward pass. Returns a function that takes one."""
    net = copy.deepcopy(learner.net).to(memory_format=torch.channels_last).train()
    x = learner.normalise(pool.images[:batch]).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with mn.autocast(x.device, learner.precision):
            loss = mn.classification_loss(net(x), pool.labels[:batch])
        loss.backward()

    return step


def _herding_seconds(learner: mn.Learner, classes: int, each: int = 100) -> float:
    """Features of some classes' images, and their herding."""
    images = torch.randint(0, 256, (classes * each, 3, 32, 32), dtype=torch.uint8)
    data = mn.Images(images, torch.arange(classes * each) % classes)
    phase = mn.phases_of(data, data, list(range(classes)), [classes])[0]
    learner.strategy = mn.Herding()
    return _seconds(lambda: learner._choose(phase, data.to(learner.device), 20), learner.device, 1, 0)


def _measure(learner: mn.Learner, pool: mn.Images, batch: int, device: torch.device) -> Iterator[tuple]:
    """(name, seconds, images) of each part of a run, when it is measured."""
    settings, steps = learner.config, {"training step, toolkit style": _toolkit_step, "training step, ours": _our_step}
    if device.type == "cpu":                                            # on CUDA they are one part of a graph
        steps["  of which the student's own passes"] = _student
    works = [make(learner, pool, batch) for make in steps.values()]
    if device.type == "cuda":                                           # an epoch waits once, theirs after every step
        works[1] = works[1], 40
    yield from ((name, seconds, batch) for name, seconds in zip(steps, _in_turn(works, device)))
    del works
    each = settings.unrehearsed or settings.per_class
    classes = min(settings.bop_chunk or 50, 50, max(1, 200 // each))
    images, labels = pool.images[:classes * settings.per_class], torch.arange(classes * settings.per_class) % classes
    labels, count = labels.to(device), classes * each
    data = pool.subset(torch.nonzero(pool.labels < classes).squeeze(1))
    net = mn._trainable(mn.merge_weights(copy.deepcopy(learner.net)), learner.frozen).eval()    # as a phase leaves it
    bop = mn.LocalBOP([net], labels[:count], data, settings, 0, mn.MicroBatch())
    pixels, epoch = bop.normalise(images[:count]), iter(range(10 ** 6))
    yield (f"exemplar-level update, {count} exemplars", _seconds(lambda: bop.gradient(pixels, next(epoch)), device, 5),
           count)
    ranks = torch.arange(len(labels), device=labels.device) // classes
    learner.memory = mn.Memory(images, labels, ranks, torch.zeros_like(labels, dtype=torch.bool))
    yield "feature extraction", _seconds(lambda: learner._rows(pool, learner.net.features), device, 3), len(pool)
    yield "evaluation, both classifiers", _seconds(lambda: learner.evaluate(pool), device, 3), len(pool)


def benchmark(config: mn.Config) -> int:
    """Print a table of rates as they are measured, beside the same work done the way existing toolkits do it, all in
    this run."""
    import resource                                                     # not on Windows

    device = mn.pick_device(config.device)
    mn.set_backends(config.deterministic)
    learner, pool = _phase_one(config, device)
    batch, say = config.batch_size, functools.partial(print, flush=True)
    say(f"{mn.hardware_name(device)}, torch {torch.__version__}, {config.baseline}, batch {batch}, {learner.precision}")
    single, half = (_matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    say(f"matrix multiply: float32 {single / 1e9:.0f}, bfloat16 {half / 1e9:.0f} GFLOP/s")
    with FlopCounterMode(display=False) as counter:
        learner.net(torch.zeros(1, 3, 32, 32, device=device))
    flops = 3 * counter.get_total_flops() * batch                       # forward and twice that backward
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()                            # the matrices above are no part of a run
    say(f"{'':42}{'ms':>10}{'images/s':>12}")
    times = []
    for name, seconds, count in _measure(learner, pool, batch, device):
        say(f"{name:42}{1e3 * seconds:10.1f}{count / seconds:12.0f}")
        times.append(seconds)
    theirs, ours, student = times[:3]
    peak = half if learner.precision == "bfloat16" else single
    own = f"{flops / student / peak:.0%} of the measured peak in its own passes, " if device.type == "cpu" else ""
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
    say(f"ours / toolkit style: {theirs / ours:.2f} times as fast")
    say(f"student's {flops / 1e9:.0f} GFLOP a step: {own}{flops / ours / peak:.0%} of the measured peak over the "
        f"whole step; peak memory {memory:.2f} GiB")
    grown = ", ".join(f"{count} classes {_herding_seconds(learner, count):.2f} s" for count in (10, 20, 40))
    say(f"herding of 100 images a class, features included: {grown}")
    return 0


def main(argv=None) -> int:
    """Command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    demo = "--demo" in words
    modes = {"demo": ("generated data, small schedule, the default recipe shortened: half a minute on two idle cores",
                      None, ()),
             "benchmark": ("no training: rates of the training step, the exemplar level and evaluation here",
                           benchmark, BENCHMARKED)}
    return mn.main(DEMO if demo else mn.CIFAR100, demo_data if demo else load_data, argv, prog="run_cifar.py",
                   description=__doc__, epilog=EXAMPLES, hidden=("imagenet",), modes=modes,
                   idle_flags=("workers", "data_dir") if demo else ("workers",))


if __name__ == "__main__":
    sys.exit(main())
