"""Class-incremental learning with learned exemplars, in one file.

"Mnemonics Training: Multi-Class Incremental Learning without Forgetting" (Liu et al., CVPR 2020): a network
learns classes in phases, keeps a few exemplar images of each, and the exemplars themselves are optimised through
the training they will be used for. Two levels (model, exemplar), two places to plug something in (a Baseline, a
Strategy), one Learner that alternates them. Needs torch, torchvision's Pillow for pictures, and numpy.

    import mnemonics as mn

    order = mn.class_order(100, seed=1993)
    groups = mn.split_phases(100, phases=10)
    phases = mn.make_phases(train_x, train_y, test_x, test_y, order, groups)   # uint8 (N, 3, H, W), labels (N,)
    learner = mn.Learner(mn.resnet32(classes=50, cosine=True), mn.LUCIR(), mn.Mnemonics(), mn.CIFAR100)
    for phase in phases:
        learner.learn_phase(phase)
    print(learner.accuracy)                                                    # one row a phase

Where the equations are:

    Eq. 1   distillation_loss                       Eq. 6   Learner._model
    Eq. 2   classification_loss                     Eq. 7   LocalBOP, optimise_exemplars
    Eq. 3   meta_gradient (a bilevel program)       Eq. 8   base_level; LocalBOP.means_loss
    Eq. 4   Learner.learn_phase (global BOP)        Eq. 9   optimise_exemplars, called by Learner._extract_job
    Eq. 5   combined_loss                           Eq. 10  optimise_exemplars, called by Learner._adjust_job

Symbols: Theta_i `net`, Theta_{i-1} `old`, Theta' `theta`, E `exemplars`, D_i `data`, lambda `distill_weight`, tau
`temperature`, alpha_1 `lr`, alpha_2 `base_lr`, beta_1 and beta_2 `exemplar_lr`. Shapes: B batch, N images, D
features, K classes so far, M exemplars a class; images are (N, 3, H, W), uint8 when stored, normalised floats when
a network sees them. Labels are positions in the class order, so old classes are always the first rows.

Sections: 1 Config  2 Classes, phases, data  3 Networks  4 Losses  5 Baselines  6 Bilevel optimisation  7 Exemplars
8 Learner  9 Metrics  10 Run  11 Report and pictures  12 Command line  13 Kernels
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

__version__ = "0.2.0"                                         # goes up when training changes by more than rounding


class UserError(Exception):
    """A bad argument, bad data or an unusable folder: one line on stderr, exit status 2."""


class RunError(Exception):
    """A failure while running (loss not finite, disk full): one line on stderr, exit status 1."""


# ------------------------------------------------------------------------------------------------------------------
# 1. Config: every hyper-parameter, its default and where the default comes from
# ------------------------------------------------------------------------------------------------------------------

GROUPS = {"protocol": "protocol", "exemplars": "exemplars", "model": "model level", "exemplar": "exemplar level",
          "run": "run", "imagenet": "ImageNet"}


def _set(default, group: Optional[str], help: str, source: str = "", **extra):
    """A dataclass field that also describes its own command-line flag (group None: preset only, no flag)."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "source": source, **extra})


def _check_choice(field: dataclasses.Field, value) -> None:
    """UserError where a word is none of its field's choices."""
    named = field.metadata.get("choices")
    choices = _choices(named)
    if choices and value is not None and value not in choices:
        own = f", or put your own into mnemonics.{named} first" if isinstance(named, str) else ""
        raise UserError(f"--{field.name.replace('_', '-')} {value}: choose from {', '.join(choices)}{own}")


def _choices(choices) -> tuple:
    """The allowed values: given, or the keys of a registry named by a string."""
    return tuple(globals()[choices]) if isinstance(choices, str) else tuple(choices or ())


KINDS = {"bool": (bool, "True or False is"), "int": (int, "a whole number is"), "float": ((int, float), "a number is"),
         "str": (str, "text is"), "tuple": (tuple, "several numbers are")}


def _plain(value):
    """A setting as Python's own kinds have it: a path as text, NumPy's and PyTorch's numbers as Python's, a list as a
    tuple."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = value.tolist() if isinstance(value, (np.generic, np.ndarray, Tensor)) else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple, range)) else value


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_range(field: dataclasses.Field, value) -> None:
    """A value against its field's kind, choices and bounds, a word against being empty."""
    flag, meta, kind = "--" + field.name.replace("_", "-"), field.metadata, re.sub(r"Optional|\W", "", field.type)
    if isinstance(value, str) and not value:
        raise UserError(f"{flag} is empty: give it a value, or leave it out")
    if not isinstance(meta.get("choices"), str):              # of a registry: as it stands when the word is used
        _check_choice(field, value)
    if value is None and kind != field.type:
        return
    if (not isinstance(value, KINDS[kind][0]) or isinstance(value, bool) != (kind == "bool")
            or kind == "tuple" and not all(map(_finite, value))):
        raise UserError(f"{flag} {value!r}: {KINDS[kind][1]} needed")
    if kind not in ("int", "float"):
        return
    if not _finite(value):
        raise UserError(f"{flag} {value}: a finite number is needed")
    for key, bad, text in (("low", lambda b: value < b, "at least"), ("high", lambda b: value > b, "at most"),
                           ("above", lambda b: value <= b, "above"), ("below", lambda b: value >= b, "below")):
        if key in meta and bad(meta[key]):
            raise UserError(f"{flag} {value}: must be {text} {meta[key]}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. None means "as the recipe, the preset or the strategy says": see `resolved`.

    Immutable; make a variant with `dataclasses.replace(mn.CIFAR100, epochs=20)`. UserError where a number is out of its
    range. The fields, with CIFAR-100's defaults:

"""
    dataset: str = _set("cifar100", None, "name of the data set")
    network: str = _set("resnet32", None, "a key of NETWORKS")
    dataset_classes: int = _set(100, None, "classes of the whole data set, which the class order permutes")
    mean: tuple = _set((0.5071, 0.4866, 0.4409), None, "channel means on a 0..1 scale")
    # The field's constants: the true CIFAR-100 deviations are (0.2673, 0.2564, 0.2762); kept for comparable numbers.
    std: tuple = _set((0.2009, 0.1984, 0.2023), None, "channel deviations on a 0..1 scale")
    milestones: tuple = _set((0.5, 0.75), None, "fractions of the epochs after which the rate falls tenfold")
    augmentation: str = _set("crop", None, "a key of AUGMENTATIONS", choices="AUGMENTATIONS")
    lucir_lambda: float = _set(5.0, None, "LUCIR's base weight of the less-forget loss")
    lucir_margin: float = _set(0.5, None, "LUCIR's margin")
    lucir_negatives: int = _set(2, None, "LUCIR's number of hardest new classes")

    baseline: str = _set("lucir", "protocol", "method at the model level", "paper, Table 1", choices="BASELINES")
    phases: int = _set(5, "protocol", "incremental phases N after phase 0", "paper, sec. 5", low=1)
    classes: Optional[int] = _set(None, "protocol", "use the first C classes of the class order", auto="all", low=2)
    per_class: int = _set(20, "protocol", "exemplars kept for each class", "paper, sec. 5", low=1)
    budget: Optional[int] = _set(None, "protocol", "exemplars in total, shared evenly by the classes so far, instead "
                                 "of --per-class", auto="off", low=1)
    seed: int = _set(1993, "protocol", "every random choice but the class order", "field's habit", low=0)
    order_seed: int = _set(1993, "protocol", "the class order", "LUCIR's code", low=0, high=2 ** 32 - 1)
    class_order: Optional[str] = _set(None, "protocol", "file with one label a line, instead of --order-seed",
                                      auto="off", metavar="FILE")

    exemplars: Optional[str] = _set(None, "exemplars", "how exemplars are made", "paper", choices="STRATEGIES",
                                    auto="mnemonics; joint: herding")
    adjust: Optional[bool] = _set(None, "exemplars", "adjust old exemplars each phase (Eq. 10); without mnemonics off",
                                  "results/; paper, Table 2")
    weight_transfer: Optional[bool] = _set(None, "exemplars", "learn scalings of frozen convolutions from phase 1 on; "
                                           "without mnemonics off", "results/; paper, sec. 4.2")
    finetune: Optional[bool] = _set(None, "exemplars", "fine-tune on exemplars alone after each phase but phase 0: on "
                                    "those never rehearsed (--unrehearsed), or else on all", "paper, sec. 4.3; BiC: "
                                    "results/", auto="on with mnemonics, but for BiC only with --recipe paper")
    init: Optional[str] = _set(None, "exemplars", "real images that learned exemplars start from",
                               "results/; paper, sec. 4.2", choices=("random", "herding"))

    epochs: int = _set(160, "model", "epochs of a phase", "paper, sec. 5", low=1)
    lr: float = _set(0.1, "model", "learning rate alpha_1, tenfold lower after each milestone", "paper, sec. 5",
                     above=0)
    batch_size: int = _set(128, "model", "images a step, over all processes", "LUCIR's code", low=2)
    momentum: float = _set(0.9, "model", "SGD momentum, fine-tuning too", "paper, sec. 5", low=0, below=1)
    weight_decay: float = _set(5e-4, "model", "SGD weight decay, fine-tuning too", "paper, sec. 5", low=0)
    rehearsal: int = _set(1, "model", "times that an epoch shows each old exemplar, cropped and flipped anew each "
                          "time", "LUCIR's code; 10 tried: results/", low=1)
    unrehearsed: Optional[int] = _set(None, "model", "exemplars of a class, the best, that later phases' model levels "
                                      "do not train on: fine-tuning uses them alone, and theirs are the pixels that "
                                      "are learned; 0, as without mnemonics: all serve for everything",
                                      "results/", low=0)
    distill_weight: float = _set(0.5, "model", "lambda of Eq. 5 (LwF, iCaRL)", "paper, sec. 5", low=0, high=1)
    temperature: float = _set(2.0, "model", "tau of Eq. 1", "paper, sec. 5", above=0)

    recipe: str = _set("default", "exemplar", "sets the flags whose default depends on it, where they are not given",
                       "results/", choices="RECIPES")
    exemplar_epochs: Optional[int] = _set(None, "exemplar", "updates of an exemplar's pixels", low=1)
    exemplar_lr: Optional[float] = _set(None, "exemplar", "rate beta, in normalised pixel units; halved every fifth "
                                        "of the epochs", above=0)
    exemplar_optimizer: Optional[str] = _set(None, "exemplar", "optimiser of the pixels", choices=("sgd", "adam"))
    base_steps: Optional[int] = _set(None, "exemplar", "SGD steps S of the temporary model (Eq. 8)", low=1)
    base_lr: Optional[float] = _set(None, "exemplar", "rate alpha_2 of the temporary model (Eq. 8)", above=0)
    base_level: Optional[str] = _set(None, "exemplar", "what the temporary model trains; means: nothing, it is "
                                     "the nearest mean of exemplars, as iCaRL classifies (the default with it)",
                                     choices=("network", "classifier", "means"))
    base_start: Optional[str] = _set(None, "exemplar", "where the temporary model starts: the current network, or "
                                     "new random classifier rows for the exemplars' classes",
                                     choices=("current", "fresh"))
    base_networks: Optional[int] = _set(None, "exemplar", "networks it starts from in turn: the current one and "
                                        "others from a pretended next phase", low=1)
    ahead_epochs: int = _set(6, "exemplar", "epochs of the pretended next phase, if --base-networks is above 1",
                             "results/0.1.0/README.md", low=1)
    ahead_turns: int = _set(1, "exemplar", "quarter turns by which a new class makes a class of the pretended phase",
                            "results/", low=1, high=3)
    exemplar_augment: Optional[bool] = _set(None, "exemplar", "random crop and flip of the exemplars inside the "
                                            "objective")
    meta_batch: Optional[int] = _set(None, "exemplar", "images of a class-balanced meta-level batch", low=1)
    subsets: int = _set(2, "exemplar", "parts of the old exemplars, each adjusted against the others (Eq. 10)",
                        "paper, sec. 4.2", low=2)
    bop_chunk: Optional[int] = _set(None, "exemplar", "classes whose exemplars share a temporary model",
                                    "paper, Eq. 7; 10: results/", auto="all of a phase's; 10 where one "
                                    "exemplar of a class is learned", low=1, metavar="CLASSES")
    finetune_epochs: int = _set(50, "exemplar", "epochs of fine-tuning", "paper, sec. 5", low=0)
    finetune_lr: Optional[float] = _set(None, "exemplar", "rate of fine-tuning, halved every fifth of its epochs",
                                        "paper, sec. 5, and for the classifier results/",
                                        auto="0.01; 0.1 where the classifier alone is trained", above=0)
    finetune_level: Optional[str] = _set(None, "exemplar", "what fine-tuning trains; without mnemonics the network",
                                         "paper, sec. 4.3, and results/", choices=("network", "classifier"))
    finetune_scale: float = _set(8.0, "exemplar", "where a cosine classifier alone is fine-tuned: the cosines' scale "
                                 "meanwhile, of rows of length 1, and the rate is that for 100 classes, in proportion "
                                 "to their number, and shared by an epoch's steps; 0: scale, lengths and rate as they "
                                 "are", "results/", low=0)
    finetune_carries: Optional[bool] = _set(None, "exemplar", "the next phase goes on from what fine-tuning made, and "
                                            "not from what the model level left", "paper, sec. 4.3, and "
                                            "results/", auto="on; off where LUCIR's classifier alone is "
                                            "trained and other exemplars are rehearsed (with a budget: of `classes`)")

    data_dir: str = _set("data", "run", "folder of the data set", metavar="DIR")
    out: Optional[str] = _set(None, "run", "folder of the run", auto="runs/NAME made from the settings", metavar="DIR")
    resume: bool = _set(False, "run", "continue the run in --out")
    start_from: Optional[str] = _set(None, "run", "take a phase's model level (phase 0 unless :PHASE is given) from "
                                     "another run", auto="off", metavar="DIR[:PHASE]")
    checkpoint_minutes: float = _set(10.0, "run", "minutes between checkpoints inside a phase; 0: after every epoch "
                                     "and exemplar chunk", low=0, metavar="MINUTES")
    keep_phases: bool = _set(True, "run", "keep every phase's model and exemplars, not only the last")
    device: str = _set("auto", "run", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = _set("auto", "run", "training of the network, and features of data at the exemplar level; auto: "
                          "bfloat16 where the hardware multiplies it faster", "measured on a CPU",
                          choices=("auto", "float32", "bfloat16"))
    deterministic: bool = _set(False, "run", "ask PyTorch for deterministic algorithms (CUDA; the CPU always is)")
    workers: int = _set(4, "run", "processes that decode images (ImageNet; CIFAR needs none)", low=0)
    train_per_class: Optional[int] = _set(None, "run", "use only K training images a class", auto="all",
                                          low=1, metavar="K")
    validate: bool = _set(False, "run", "score on the training images that --train-per-class leaves out, not on the "
                          "test set")
    image_size: int = _set(32, "imagenet", "side of the images the network sees", low=8, metavar="PIXELS")
    sync_bn: Optional[bool] = _set(None, "imagenet", "synchronise BatchNorm over processes (CUDA only)",
                                   auto="on with several CUDA processes")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _plain(getattr(self, field.name))
            _check_range(field, value)
            whole = type(value) is int and "float" in field.type            # 1 and 1.0 are one setting, in one folder
            object.__setattr__(self, field.name, float(value) if whole else value)
        if not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise UserError(f"mean {self.mean}, std {self.std}: one for each of three channels, deviations above 0")

    def resolved(self, baseline=None, strategy=None) -> "Config":
        """The same settings with every None that has a meaning filled in.

        baseline, strategy: those that are run (classes or instances), if not those that the settings name.
        """
        baseline = baseline or _registered("BASELINES", self.baseline)
        exemplars = self.exemplars or ("herding" if baseline.cumulative else "mnemonics")
        learned, default = (strategy or _registered("STRATEGIES", exemplars)).learned, self.recipe == "default"
        level = _registered("RECIPES", self.recipe) | ({} if learned else UNLEARNED)
        if default and baseline.nearest_mean:
            level = level | {"base_level": "means"}           # its kind of classifier, of the learned images alone
        alone = (self.finetune_level or level["finetune_level"]) == "classifier"
        plain = baseline.cosine and not baseline.finishes()
        count = level["unrehearsed"] if self.unrehearsed is None else self.unrehearsed
        each = self.per_class if self.budget is None else self.budget // (self.classes or self.dataset_classes)
        # Several images of a class show where it ends, and beside ten classes that is not where it ends among all.
        values = {"exemplars": exemplars, "classes": self.dataset_classes, "bop_chunk": 10 if count == 1 else None,
                  "finetune": learned and not (default and baseline.corrects), "finetune_lr": 0.1 if alone else 0.01,
                  # A teacher of logits needs a balanced classifier, and so do rows of which nothing is rehearsed.
                  "finetune_carries": not (alone and plain and each > count), **level}
        return dataclasses.replace(self, **{k: v for k, v in values.items() if getattr(self, k) is None})


# The recipes differ in these fields alone. "default", the best here (results/): the pixels of one exemplar of
# a class are learned and it is kept apart, to fine-tune the classifier on; with a baseline that classifies by nearest
# mean its base level is "means". "paper": the paper's section 5.
RECIPES = {
    "default": dict(init="herding", exemplar_epochs=200, exemplar_lr=0.02, exemplar_optimizer="adam", base_steps=50,
                    base_lr=1.0, base_level="classifier", base_start="fresh", base_networks=5, exemplar_augment=True,
                    meta_batch=2000, unrehearsed=1, finetune_level="classifier", adjust=False, weight_transfer=False),
    "paper": dict(init="random", exemplar_epochs=50, exemplar_lr=0.01, exemplar_optimizer="sgd", base_steps=50,
                  base_lr=0.01, base_level="network", base_start="current", base_networks=1, exemplar_augment=False,
                  meta_batch=256, unrehearsed=0, finetune_level="network", adjust=True, weight_transfer=True),
}
# Where no exemplar is learned: nothing is kept apart, and no switch is on, unless asked for.
UNLEARNED = dict(unrehearsed=0, finetune_level="network", adjust=False, weight_transfer=False)

CIFAR100 = Config()


def _field_line(field: dataclasses.Field) -> str:
    """name: what it is (default), for Config's documentation."""
    auto = field.metadata.get("auto", "as the recipe says")
    return f"    {field.name}: {field.metadata['help']} ({auto if field.default is None else field.default})\n"


Config.__doc__ += "".join(map(_field_line, dataclasses.fields(Config)))
IMAGENET_SUBSET = dataclasses.replace(
    CIFAR100, dataset="imagenet", network="resnet18", image_size=224, mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225), epochs=90, milestones=(1 / 3, 2 / 3), augmentation="resized", lucir_lambda=10.0,
    data_dir="data/imagenet", dataset_classes=1000, classes=100)
IMAGENET = dataclasses.replace(IMAGENET_SUBSET, classes=1000)


def validate(config: Config) -> None:
    """Raise UserError with one line for a setting, or a combination of settings, that makes no sense."""
    for field in dataclasses.fields(config):
        _check_choice(field, getattr(config, field.name))
    full = config.resolved()
    if full.classes > full.dataset_classes:
        raise UserError(f"--classes {full.classes}: the data set has {full.dataset_classes}")
    groups = split_phases(full.classes, full.phases)
    if full.batch_size < 2 * int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(f"--batch-size {full.batch_size}: at least 2 images for each process are needed")
    of_exemplars = {"exemplars mnemonics": STRATEGIES[full.exemplars].learned, "adjust": full.adjust,
                    "weight-transfer": full.weight_transfer, "finetune": full.finetune,
                    "rehearsal": full.rehearsal > 1, "unrehearsed": config.unrehearsed}
    for flag in (flag for flag, on in of_exemplars.items() if on and BASELINES[full.baseline].cumulative):
        raise UserError(f"--baseline {full.baseline} is the upper bound: it trains on all data, and --exemplars "
                        f"(herding or random) serve its nearest mean alone: leave --{flag} out")
    _check_networks(full, STRATEGIES[full.exemplars].learned)
    if full.sync_bn and (int(os.environ.get("WORLD_SIZE", 1)) == 1 or pick_device(full.device).type == "cpu"):
        raise UserError("--sync-bn synchronises CUDA processes: start several with torchrun, or leave it out")
    if full.validate and full.train_per_class is None:
        raise UserError("--validate scores on what --train-per-class leaves out: give --train-per-class K too")
    _check_memory(full, groups)


def _check_networks(config: Config, learned: bool) -> None:
    """UserError where the exemplar level wants more networks than its look-ahead has epochs."""
    if config.base_networks > config.ahead_epochs + 1 and (learned or config.adjust):
        raise UserError(f"--ahead-epochs {config.ahead_epochs} gives {config.ahead_epochs + 1} networks, the current "
                        f"one included, and {config.base_networks} are wanted: raise it, or lower --base-networks")


def _check_memory(config: Config, groups: Sequence[int]) -> None:
    """Exemplar counts at the end of the last phase, when a fixed budget leaves least, and at phase 0."""
    least = quota(config, config.classes)[0]
    if least < 1:
        raise UserError(f"--budget {config.budget} leaves none of the {config.classes} classes an exemplar; "
                        f"{config.classes} or more are needed")
    held = BASELINES[config.baseline].held_out
    if held and quota(config, config.classes)[1] < 1:
        raise UserError(f"--baseline {config.baseline} holds out {held:.0%} of a class's exemplars for validation: "
                        f"{sum(quota(config, config.classes))} a class is too few, 5 is the least")
    if config.unrehearsed > least:
        raise UserError(f"--unrehearsed {config.unrehearsed}: a class has {least} exemplars to train on")
    most = quota(config, groups[0])[0]
    if config.rehearsal > 1 and config.unrehearsed >= most:
        raise UserError(f"--unrehearsed {config.unrehearsed} leaves no exemplar to rehearse: leave --rehearsal out")
    least = config.unrehearsed or least
    if config.adjust and config.subsets > least:
        more = "raise --unrehearsed, or " if config.unrehearsed else ""
        raise UserError(f"--adjust splits a class's exemplars into {config.subsets} parts (--subsets), and those to "
                        f"adjust are {least}: {more}give --no-adjust")
    if config.train_per_class is not None and sum(quota(config, groups[0])) > config.train_per_class:
        raise UserError(f"{sum(quota(config, groups[0]))} exemplars a class: more than the {config.train_per_class} "
                        "training images a class of --train-per-class")


def quota(config: Config, classes: int, held_out: Optional[float] = None) -> tuple[int, int]:
    """Exemplars a class when `classes` classes are stored: (to train on, held out for validation).

    held_out: the baseline's share; None: that of the baseline the config names.
    """
    each = config.per_class if config.budget is None else config.budget // classes
    held = int(each * (BASELINES[config.baseline].held_out if held_out is None else held_out) + 0.5)
    return each - held, held


# ------------------------------------------------------------------------------------------------------------------
# 2. Classes, phases, data
# ------------------------------------------------------------------------------------------------------------------

def class_order(classes: int, seed: int = 1993) -> list[int]:
    """LUCIR's class order: numpy's legacy shuffle of 0..classes-1. Position k is row k of the classifier."""
    order = np.arange(classes)
    np.random.RandomState(seed).shuffle(order)
    return order.tolist()


def split_phases(classes: int, phases: int) -> list[int]:
    """Class counts of phase 0 (half of the classes) and of N = `phases` equal phases after it.

    Raises UserError, naming the legal N, if N does not divide the classes that are left.
    """
    rest = classes // 2
    if phases < 1 or rest % phases:
        legal = ", ".join(str(n) for n in range(1, rest + 1) if rest % n == 0)
        raise UserError(f"--phases {phases} does not divide the {rest} classes left after phase 0: use {legal}")
    return [classes - rest] + [rest // phases] * phases


class Images:
    """A data source in memory: uint8 images (N, 3, H, W) and their labels (N,), on any device.

    Any object with `labels`, `len()`, `[index]`, `subset`, `join`, `to` and `batches` can stand in its place (the
    ImageNet script has one that decodes files).
    """

    def __init__(self, images: Tensor, labels: Tensor):
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(labels):
            raise ValueError("images must be uint8 (N, 3, H, W) with one label each, not "
                             f"{images.dtype} {tuple(images.shape)} with {len(labels)} labels"
                             + "; permute(0, 3, 1, 2) makes (N, H, W, 3) that" * (images.shape[-1:] == (3,)))
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(f"labels must be whole numbers (N,), not {labels.dtype} {tuple(labels.shape)}")
        self.images, self.labels = images, labels.long().to(images.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W) at a long index (n,), as a test would see them."""
        return self.images[index.to(self.images.device)]

    def subset(self, index: Tensor, labels: Optional[Tensor] = None) -> "Images":
        """A copy of some images, with new labels if given."""
        index = index.to(self.images.device)
        return Images(self.images[index], self.labels[index] if labels is None else labels)

    def join(self, images: Tensor, labels: Tensor) -> "Images":
        """These images followed by others."""
        device = self.images.device
        return Images(torch.cat([self.images, images.to(device)]), torch.cat([self.labels, labels.to(device)]))

    def to(self, device) -> "Images":
        """The same on another device."""
        return Images(self.images.to(device), self.labels.to(device))

    def batches(self, plan: Sequence[Tensor], augment: Optional[Callable] = None,
                generator: Optional[torch.Generator] = None) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and labels for each index tensor of `plan`; augment(images, generator), on the device, if
        given."""
        for index in plan:
            index = index.to(self.images.device)
            images = self.images[index]
            yield images if augment is None else augment(images, generator), self.labels[index]


@dataclasses.dataclass
class Phase:
    """One phase: the training data of its new classes alone (of all so far for Joint), and test data of all so far.

    classes: how many are new. seen: how many before it. The data of other phases cannot be reached from it.
    """
    index: int
    classes: int
    seen: int
    train: Images
    make_test: Callable[[], Images]

    @property
    def test(self) -> Images:
        """Test data of all classes seen so far, labels remapped."""
        return self.make_test()


def make_phases(train_x, train_y, test_x, test_y, order: Sequence[int], groups: Sequence[int],
                cumulative: bool = False) -> list[Phase]:
    """Phases from arrays or tensors: uint8 images (N, 3, H, W), labels (N,) in the data set's own numbering.

    order: a permutation of the labels (its first sum(groups) are used). groups: classes of each phase. cumulative: a
    phase trains on all classes so far (Joint).
    """
    return phases_of(Images(train_x, train_y), Images(test_x, test_y), order, groups, cumulative)


def phases_of(train_set, test_set, order: Sequence[int], groups: Sequence[int],
              cumulative: bool = False) -> list[Phase]:
    """Phases from two data sources; with `cumulative` (joint) a phase trains on all classes so far."""
    groups = list(map(int, groups))
    if len(set(order)) != len(order) or sum(groups) > len(order):
        raise ValueError(f"the class order needs {sum(groups)} different labels")
    if not groups or min(groups) < 1 or not len(train_set) or not len(test_set):
        raise ValueError(f"every phase needs a class, and both sets images: groups {list(groups)}, {len(train_set)} "
                         f"training and {len(test_set)} test images")
    if min(*order, int(train_set.labels.min()), int(test_set.labels.min())) < 0:
        raise ValueError("labels are counted from 0 on, and a negative one is among them or in the class order")
    position = torch.full((max(max(order), int(train_set.labels.max()), int(test_set.labels.max())) + 1,), -1)
    position[torch.tensor(list(order[:sum(groups)]))] = torch.arange(sum(groups))

    def part(source, low: int, high: int):
        """The images of a source whose row is in low .. high - 1."""
        rows = position[source.labels.cpu()]
        index = torch.nonzero((rows >= low) & (rows < high)).squeeze(1)
        return source.subset(index, rows[index])

    phases, seen = [], 0
    for index, classes in enumerate(groups):
        total = seen + classes
        phases.append(Phase(index, classes, seen, part(train_set, 0 if cumulative else seen, total),
                            lambda total=total: part(test_set, 0, total)))
        seen = total
    return phases


def check_counts(phase: Phase, needed: int) -> None:
    """UserError where a new class of a phase has fewer training images than the exemplars it is to give."""
    counts = torch.bincount(phase.train.labels.cpu(), minlength=phase.seen + phase.classes)[phase.seen:]
    if int(counts.min()) == 0:
        raise UserError(f"class {phase.seen + int(counts.argmin())} of the order has no training images")
    if int(counts.min()) < needed:
        raise UserError(f"{needed} exemplars a class: class {phase.seen + int(counts.argmin())} of the order has only "
                        f"{int(counts.min())} training images; lower --per-class or --budget (per_class, budget)")


def crop_and_flip(images: Tensor, generator: Optional[torch.Generator] = None, pad: int = 4) -> Tensor:
    """Pad with black (0), crop at random, flip at random: (B, C, H, W) -> same, any dtype, differentiable.

    One gather for the whole batch; its result lies in memory as channels_last, which convolutions like.
    """
    B, _, H, W = images.shape
    padded = F.pad(images, [pad] * 4)
    down, right = torch.randint(2 * pad + 1, (2, B, 1), generator=generator, device=images.device)
    flip = torch.randint(2, (B, 1), generator=generator, device=images.device).bool()
    columns = torch.arange(W, device=images.device).expand(B, W)
    columns = torch.where(flip, W - 1 - columns, columns) + right                              # (B, W)
    rows = torch.arange(H, device=images.device) + down                                        # (B, H)
    each = torch.arange(B, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)          # (B, C, H, W)


def resized_crop_and_flip(images: Tensor, generator: Optional[torch.Generator] = None,
                          scale: tuple = (0.08, 1.0), ratio: float = 4 / 3) -> Tensor:
    """RandomResizedCrop and flip for a whole batch: (B, C, H, W) -> same, differentiable, bilinear.

    uint8 in gives uint8 out (rounded); floats stay floats.
    """
    B, _, H, W = images.shape
    area, aspect, top, left = torch.rand((4, B), generator=generator, device=images.device)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = torch.exp((2 * aspect - 1) * math.log(ratio))
    wide, high = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)      # fractions of the sides
    flip = torch.randint(2, (B,), generator=generator, device=images.device).bool()
    pixels = images if images.is_floating_point() else images.float()
    rows = _interpolation(H, high, top).to(pixels.dtype)
    columns = _interpolation(W, wide, left)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns).to(pixels.dtype)
    out = rows[:, None] @ pixels @ columns[:, None].transpose(2, 3)                            # (B, C, H, W)
    return out if images.is_floating_point() else out.round_().to(images.dtype)


def _interpolation(size: int, fraction: Tensor, offset: Tensor) -> Tensor:
    """Bilinear weights (B, size, size) that stretch a part of an axis, `fraction` (B,) long at relative `offset`
    (B,), to the whole axis. A matrix product, because grid_sample's gradient is not deterministic on CUDA."""
    place = torch.arange(size, device=fraction.device)
    source = (place + 0.5) * fraction[:, None] + size * ((1 - fraction) * offset)[:, None] - 0.5
    return (1 - (source.clamp(0, size - 1)[:, :, None] - place).abs()).clamp(min=0)


AUGMENTATIONS = {"crop": crop_and_flip, "resized": resized_crop_and_flip}


class Normalise(nn.Module):
    """uint8 images -> normalised floats (x / 255 - mean) / std, and back."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = (torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (mean, std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("black", -mean / std)                       # what a pixel of 0 becomes

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> normalised float32."""
        return torch.addcmul(self.black, images.float(), self.scale)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Normalised floats -> the nearest 8-bit image: rounded and clipped to 0..255."""
        return ((images - self.black) / self.scale).round().clamp(0, 255).to(torch.uint8)

    def clip_(self, images: Tensor) -> Tensor:
        """Keep normalised images inside the valid pixel range, in place."""
        return images.clamp_(self.black, self.black + 255 * self.scale)


def seed_of(*keys) -> int:
    """A 63-bit seed from any keys. Every random draw names its own, so resuming needs no generator's state."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "big") >> 1


def _silent(*_) -> None:
    pass


def _generator(device, *keys) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(*keys))


# Several processes (torchrun): these three do nothing when there is only one.

def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes (no gradient)."""
    if world() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world()


# ------------------------------------------------------------------------------------------------------------------
# 3. Networks that grow, and weight transfer
# ------------------------------------------------------------------------------------------------------------------

class _OneDNNConvolution(torch.autograd.Function):
    """A convolution of tensors in oneDNN's layout by a dense weight, in the precision of x; F.conv2d takes that pair in
    float32 alone. Changes of type are its own: autograd's would cost 1 to 3 % of a step."""

    @staticmethod
    def forward(ctx, x, weight, bias, *how):
        """How: stride, padding, dilation, groups."""
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.how, ctx.dtype = how, weight.dtype
        stride, padding, dilation, groups = how
        bias = None if bias is None else bias.to(x.dtype)
        return torch.ops.aten.mkldnn_convolution(x, cast, bias, padding, stride, dilation, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of x, weight (type and strides as its own, which DistributedDataParallel likes) and bias."""
        (x, cast), (stride, padding, dilation, groups), needed = ctx.saved_tensors, ctx.how, ctx.needs_input_grad
        by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(
            grad, x, cast, [len(cast)], stride, padding, dilation, False, [0, 0], groups, list(needed[:3]))
        by_weight = None if by_weight is None else torch.empty_like(cast, dtype=ctx.dtype).copy_(by_weight)
        return by_x, by_weight, by_bias, None, None, None, None


class Conv2d(nn.Conv2d):
    """torch's, with padding in numbers and by zeros, and it takes tensors in oneDNN's layout too."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch's. A single pixel, padded to the kernel's size, meets its middle alone; with a stride oneDNN leaves
        the rest of the weight's gradient in bfloat16 unwritten, so whatever that memory held (PyTorch 2.14)."""
        weight, padding = self.weight, self.padding
        if x.shape[2:] == self.dilation == (1, 1) and self.kernel_size == tuple(2 * p + 1 for p in padding):
            rows, columns = padding
            weight, padding = weight[:, :, rows:rows + 1, columns:columns + 1], (0, 0)
        how = self.stride, padding, self.dilation, self.groups
        if x.is_mkldnn:
            return _OneDNNConvolution.apply(x, weight, self.bias, *how)
        return F.conv2d(x, weight, self.bias, *how)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; `last_relu` False leaves the output signed, as LUCIR needs."""

    def __init__(self, inside: int, outside: int, stride: int, last_relu: bool = True):
        super().__init__()
        self.conv1 = Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity() if stride == 1 and inside == outside else nn.Sequential(
            Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) -> (B, outside, H / stride, W / stride)."""
        fused = _fused(self, x) if x.is_cuda else None
        return self.plain(x) if fused is None else fused

    def plain(self, x: Tensor) -> Tensor:
        """As PyTorch computes it."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)                # in place: up to a tenth of a step on a CPU
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True) if self.last_relu else out


class ResNet(nn.Module):
    """A residual backbone (He et al., 2016): normalised images (B, 3, H, W) -> features (B, D).

    blocks: how many in each stage. widths: channels of each stage; D is the last. big_stem: the 7 x 7 stem with
    pooling of ImageNet instead of CIFAR's 3 x 3.
    """

    def __init__(self, blocks: Sequence[int], widths: Sequence[int], big_stem: bool, last_relu: bool):
        super().__init__()
        stem = Conv2d(3, widths[0], *((7, 2, 3) if big_stem else (3, 1, 1)), bias=False)
        pool = [nn.MaxPool2d(3, 2, 1)] if big_stem else []
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), *pool)
        stages, inside = [], widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths)):
            for k in range(count):
                last = stage == len(blocks) - 1 and k == count - 1
                stages.append(BasicBlock(inside, width, 2 if stage and k == 0 else 1, last_relu or not last))
                inside = width
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), averaged over the last feature map."""
        if _for_onednn(self, x):
            x = x.to(torch.bfloat16).to_mkldnn()
        fused = _fused(self.stem, x) if x.is_cuda else None
        x = self.stages(self.stem(x) if fused is None else fused)
        return (x.to_dense() if x.is_mkldnn else x).mean((2, 3))


class Classifier(nn.Module):
    """Rows in two parts, `old` (K, D) and `new` (M, D), so that old rows can be frozen to the bit.

    Linear: logits = W f + b. Cosine (LUCIR): logits = sigma * cos(W, f), sigma learnable, starting at 1.
    """

    def __init__(self, dim: int, classes: int, cosine: bool):
        super().__init__()
        self.dim, self.cosine = dim, cosine
        self._set_rows(torch.empty(0, dim), self._fresh_rows(classes), torch.empty(0), torch.zeros(classes))
        if cosine:
            self.sigma = nn.Parameter(torch.ones(()))

    def _set_rows(self, old: Tensor, new: Tensor, old_bias: Optional[Tensor], new_bias: Tensor) -> None:
        parts = {"old": old, "new": new} | ({} if self.cosine else {"old_bias": old_bias, "new_bias": new_bias})
        for name, value in parts.items():
            setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=value.numel() > 0))

    def _fresh_rows(self, count: int, generator: Optional[torch.Generator] = None) -> Tensor:
        bound = self.dim ** -0.5
        return torch.empty(count, self.dim).uniform_(-bound, bound, generator=generator)

    @property
    def weight(self) -> Tensor:
        """All rows, (K, D)."""
        return torch.cat([self.old, self.new])

    @torch.no_grad()
    def set_lengths(self, lengths: Tensor) -> None:
        """Give the rows these lengths (K, 1), as they point; cosines stay as they are."""
        for rows, part in zip((self.old, self.new), lengths.split([len(self.old), len(self.new)])):
            rows.copy_(F.normalize(rows, dim=1) * part)

    @property
    def bias(self) -> Tensor:
        """All biases (K,), linear only."""
        return torch.cat([self.old_bias, self.new_bias])

    @property
    def classes(self) -> int:
        """Rows so far."""
        return len(self.old) + len(self.new)

    def add_classes(self, count: int) -> None:
        """All rows so far become old; `count` new random rows follow. Old logits stay what they were."""
        fresh = self._fresh_rows(count).to(self.new)
        self._set_rows(self.weight, fresh, None if self.cosine else self.bias, fresh.new_zeros(count))

    @torch.no_grad()
    def redraw(self, rows: Tensor, generator: torch.Generator) -> None:
        """New random rows, and biases of 0, for some classes (n,), in place and without waiting for the device."""
        fresh = self._fresh_rows(self.classes, generator).to(self.new, non_blocking=True)
        values = [("", self.weight.index_copy(0, rows, fresh[rows]))]
        values += [] if self.cosine else [("_bias", self.bias.index_fill(0, rows, 0))]
        for kind, value in values:
            getattr(self, "old" + kind).copy_(value[:len(self.old)])
            getattr(self, "new" + kind).copy_(value[len(self.old):])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """As torch's, with as many rows as are loaded."""
        for name in ("old", "new", "old_bias", "new_bias"):
            value = state_dict.get(prefix + name)
            if value is not None and hasattr(self, name):
                setattr(self, name, nn.Parameter(torch.empty_like(value, device=self.new.device),
                                                 requires_grad=value.numel() > 0 and self.new.requires_grad))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def cosines(self, features: Tensor) -> Tensor:
        """cos(W, f): (B, D) -> (B, K), before sigma; in full precision, which cosines near 1 need."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features.to(self.new.dtype), dim=1), F.normalize(self.weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> logits (B, K), in full precision: a student's differ little from its teacher's."""
        if self.cosine:
            return self.sigma * self.cosines(features)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(self.new.dtype), self.weight, self.bias)


class IncrementalNet(nn.Module):
    """Any backbone that gives (B, dim) features, with a classifier that grows.

    net(x) -> logits (B, K); net.features(x) -> (B, dim); net.add_classes(n) adds n rows. x: normalised floats.
    """

    def __init__(self, backbone: nn.Module, dim: int, classes: int, cosine: bool = False):
        super().__init__()
        self.backbone, self.classifier = backbone, Classifier(dim, classes, cosine)

    def features(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> features (B, dim)."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.features(x))

    def add_classes(self, count: int) -> None:
        """Grow the classifier by `count` rows; the logits of the classes so far do not change."""
        self.classifier.add_classes(count)


def resnet32(classes: int, cosine: bool = False) -> IncrementalNet:
    """CIFAR's ResNet-32: 64 features, about 0.46 M parameters; no last ReLU with a cosine classifier."""
    return IncrementalNet(ResNet((5, 5, 5), (16, 32, 64), False, not cosine), 64, classes, cosine)


def resnet18(classes: int, cosine: bool = False) -> IncrementalNet:
    """ImageNet's ResNet-18: 512 features, about 11.2 M parameters; no last ReLU with a cosine classifier."""
    return IncrementalNet(ResNet((2, 2, 2, 2), (64, 128, 256, 512), True, not cosine), 512, classes, cosine)


NETWORKS = {"resnet32": resnet32, "resnet18": resnet18}


class _Transfer(nn.Module):
    """W * T, T of shape (out, in, 1, 1): one number for each kernel; of a bias b + S, S of its shape."""

    def __init__(self, value: Tensor):
        super().__init__()
        if value.ndim > 1:
            self.scale = nn.Parameter(value.new_ones(*value.shape[:2], *[1] * (value.ndim - 2)))
        else:
            self.shift = nn.Parameter(torch.zeros_like(value))

    def forward(self, value: Tensor) -> Tensor:
        """The transferred weight or bias."""
        return value * self.scale if value.ndim > 1 else value + self.shift


def _convolutions(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)]


def _transferred(conv: nn.Module, name: str) -> bool:
    """Whether a parameter is under weight transfer; a reader's own parametrization is something else."""
    return parametrize.is_parametrized(conv, name) and isinstance(conv.parametrizations[name][0], _Transfer)


def transfer_weights(net: nn.Module) -> nn.Module:
    """Weight transfer (paper, sec. 4.2): freeze every convolution, train a scaling T of its kernels (and a shift of
    its bias) instead; one that is frozen already stays as it is. Works on any nn.Module, in place; raises ValueError if
    it is on already, or if a convolution has another parametrization. Returns net."""
    for conv in filter(parametrize.is_parametrized, _convolutions(net)):
        raise ValueError("the network's weights are transferred already: merge_weights(net) first"
                         if _transferred(conv, "weight") else "weight transfer needs plain convolutions, and one "
                         "has a parametrization of its own: remove it, or turn weight transfer off")
    for conv in _convolutions(net):
        for name in ("weight", "bias") if conv.weight.requires_grad else ():
            value = getattr(conv, name)
            if value is not None and value.requires_grad:
                parametrize.register_parametrization(conv, name, _Transfer(value.detach()))
                conv.parametrizations[name].original.requires_grad_(False)
    return net


def merge_weights(net: nn.Module) -> nn.Module:
    """End of weight transfer: Theta_i = T_i * Theta_{i-1}, in place. Outputs do not change, and the convolutions
    train again. Does nothing where nothing is transferred. Returns net."""
    for conv in _convolutions(net):
        if _transferred(conv, "weight"):
            # A deep copy shares this class with its original, and removal deletes the property from the class.
            own = {k: v for k, v in vars(type(conv)).items() if k not in ("__dict__", "__weakref__")}
            conv.__class__ = type(type(conv).__name__, type(conv).__bases__, own)
        for name in ("weight", "bias"):
            if _transferred(conv, name):
                parametrize.remove_parametrizations(conv, name, leave_parametrized=True)
                getattr(conv, name).requires_grad_(True)      # removal keeps the frozen original's False
    return net


def fold_norms(net: nn.Module) -> nn.Module:
    """A copy for inference, each BatchNorm of a `ResNet` folded into the convolution before it; of other backbones
    nothing says what else is done between the two, so they stay as they are. Outputs are those of evaluation mode to
    rounding; a teacher saves a tenth of its time on a CPU."""
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        block, whole = type(module) is BasicBlock, None       # a subclass may do another thing
        if block or isinstance(module, ResNet) and type(module).forward is ResNet.forward:
            whole = module.shortcut if block else module.stem
        pairs = [(module, "conv1", "bn1"), (module, "conv2", "bn2")] if block else []
        if type(whole) is nn.Sequential:
            pairs += [(whole, *pair) for pair in itertools.pairwise(whole._modules)]
        for owner, first, second in pairs:
            conv, norm = getattr(owner, first), getattr(owner, second)
            if (type(conv) in (nn.Conv2d, Conv2d) and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
                    and norm.running_mean is not None
                    and not any(m._forward_hooks or m._forward_pre_hooks for m in (conv, norm))):
                setattr(owner, first, fuse_conv_bn_eval(conv, norm))
                setattr(owner, second, nn.Identity())
    return net.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------------
# 4. Losses, Eq. 1, 2 and 5
# ------------------------------------------------------------------------------------------------------------------

def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2: softmax cross-entropy over all classes so far, batch mean. (B, K), (B,) -> ()."""
    return F.cross_entropy(logits, labels)


def distillation_loss(logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """Eq. 1: - sum_k pihat_k log pi_k over the old classes, both softened by tau, batch mean.

    logits: (B, K) of the student; old_logits: (B, K_old) of the teacher; the student's first K_old columns count.
    At least float32: autocast on a CPU would compute both softmaxes in bfloat16, which hides what they differ in.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    student = F.log_softmax(logits[:, :old_logits.shape[1]].to(exact) / temperature, 1)
    teacher = F.softmax(old_logits.to(exact) / temperature, 1)
    return -(teacher * student).sum(1).mean()


def combined_loss(logits: Tensor, labels: Tensor, old_logits: Tensor, weight: float, temperature: float) -> Tensor:
    """Eq. 5: weight * L_c + (1 - weight) * L_d."""
    return (weight * classification_loss(logits, labels)
            + (1 - weight) * distillation_loss(logits, old_logits, temperature))


# ------------------------------------------------------------------------------------------------------------------
# 5. Baselines: small classes over one learner, Eq. 5 and its relatives
# ------------------------------------------------------------------------------------------------------------------

class Baseline(nn.Module):
    """A method at the model level. Plain replay as it stands; a subclass overrides what differs.

    The learner sets `config`. In phase 0 `old` is None; `loss` is given its `fold_norms`. Buffers registered by a
    subclass are checkpointed. cosine: the classifier it needs. nearest_mean: predicts by the nearest mean of
    exemplars. corrects: mends the classifier in `finish`, so that fine-tuning is off by default. cumulative: is given
    all data of all classes (joint). held_out: share of the exemplars kept as a validation set. unused: the settings
    that others' losses use and its own does not.
    """
    cosine = False
    nearest_mean = False
    corrects = False
    cumulative = False
    held_out = 0.0
    unused: tuple = ()
    config: Config = CIFAR100

    def prepare(self, net: IncrementalNet, old: Optional[nn.Module], features: Callable[[], tuple]) -> None:
        """Before the model level. features() -> ((N, D), (N,)): features and labels of the phase's new data."""

    def loss(self, net: IncrementalNet, old: Optional[nn.Module], x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch: normalised images (B, 3, H, W), labels (B,) -> (). One CUDA device replays the whole
        step as a graph: what changes from step to step must be a buffer, changed in place. A teacher may work `beside`
        the student."""
        return classification_loss(net(x), y)

    def finish(self, net: IncrementalNet, old: Optional[nn.Module], held: Callable[[], tuple]) -> None:
        """Last of all in a phase, after fine-tuning, which is why the next phase then goes on from that
        (`finetune_carries`). held() -> ((n, K), (n,)): logits and labels of the held-out exemplars. In a phase taken
        over by --start-from, `old` is a copy of net: its teacher was not kept."""

    @classmethod
    def finishes(cls) -> bool:
        """Whether it has a last step of its own."""
        return cls.finish is not Baseline.finish

    def correct(self, logits: Tensor) -> Tensor:
        """Logits (B, K) as predictions use them."""
        return logits

    def teacher(self, net: IncrementalNet) -> nn.Module:
        """A frozen copy of the finished phase's model, `old` of the next phase."""
        return copy.deepcopy(net).eval().requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """As torch's, with buffers of the shapes that are loaded: one may grow with the classes."""
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if value is not None and (buffer is None or buffer.shape != value.shape):
                self._buffers[name] = torch.empty_like(value, device=None if buffer is None else buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LwF(Baseline):
    """Learning without Forgetting (Li and Hoiem, 2016) with stored exemplars: Eq. 5."""

    def loss(self, net, old, x, y):
        """Eq. 5; in phase 0 Eq. 2 alone."""
        if old is None:
            return classification_loss(net(x), y)
        # Not inference_mode: the loss keeps the teacher's probabilities for backward.
        with beside(x.device) as aside:
            with torch.no_grad(), aside():
                before = old(x)
            logits = net(x)
        return combined_loss(logits, y, before, self.weight(net), self.config.temperature)

    def weight(self, net: IncrementalNet) -> float:
        """lambda of Eq. 5."""
        return self.config.distill_weight


class ICaRL(LwF):
    """iCaRL (Rebuffi et al., 2017), softmax form: trained by Eq. 5, predicts by nearest mean of exemplars."""
    nearest_mean = True


class BiC(LwF):
    """Bias correction (Wu et al., 2019): the newest classes' logits become alpha * logit + beta, fitted last of all
    in a phase on a held-out balanced tenth of the exemplars. Older phases' pairs are not kept."""
    corrects = True
    held_out = 0.1
    unused = ("distill_weight",)
    STEPS, RATE, DROPS, BETA_PENALTY = 200, 0.1, (60, 120, 160, 180), 0.05

    def __init__(self):
        super().__init__()
        self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("beta", torch.zeros(()))
        self.register_buffer("newest", torch.zeros(2, dtype=torch.long))           # first row, row after the last

    def prepare(self, net, old, features):
        """What was corrected are no longer the newest classes; the teacher has its copy of the correction."""
        self.newest.zero_()

    def weight(self, net):
        """1 - K/(K+M), so that the loss is (1 - K/(K+M)) L_c + K/(K+M) L_d, the teacher corrected."""
        return len(net.classifier.new) / net.classifier.classes

    def correct(self, logits, alpha=None, beta=None):
        """alpha * logit + beta for the newest classes, other logits as they are."""
        alpha, beta = (self.alpha, self.beta) if alpha is None else (alpha, beta)
        row = torch.arange(logits.shape[1], device=logits.device)
        new = (row >= self.newest[0]) & (row < self.newest[1])
        return torch.where(new, alpha * logits + beta, logits)

    def finish(self, net, old, held):
        """Fit alpha and beta on the held-out exemplars; nothing else changes."""
        if old is None:
            return
        head, (logits, labels) = net.classifier, held()
        self.newest.copy_(torch.tensor([len(head.old), head.classes]))
        alpha, beta = (torch.full_like(self.alpha, v, requires_grad=True) for v in (1.0, 0.0))
        optimizer = torch.optim.SGD([alpha, beta], self.RATE, momentum=0.9)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.DROPS, 0.1)
        for _ in range(self.STEPS):                                                 # full batch, everything else frozen
            optimizer.zero_grad()
            loss = classification_loss(self.correct(logits, alpha, beta), labels)
            (loss + self.BETA_PENALTY * beta ** 2).backward()
            optimizer.step()
            schedule.step()
        self.alpha.copy_(alpha.detach())
        self.beta.copy_(beta.detach())

    def teacher(self, net):
        """A frozen copy with this phase's correction in its newest rows."""
        net = super().teacher(net)
        if int(self.newest[1]):
            net.classifier.new.mul_(self.alpha)
            net.classifier.new_bias.mul_(self.alpha).add_(self.beta)
        return net


class LUCIR(Baseline):
    """LUCIR (Hou et al., 2019): cosine classifier, less-forget and margin-ranking losses, imprinted new rows, old
    rows frozen while the model level trains."""
    cosine = True
    unused = ("distill_weight", "temperature")

    def prepare(self, net, old, features):
        """Imprint the new rows: normalised mean of normalised features, of the old rows' mean norm."""
        if old is None:
            return
        head, (found, labels) = net.classifier, features()
        found = F.normalize(found, dim=1)
        sums = torch.zeros_like(head.new).index_add_(0, labels - len(head.old), found)
        head.new.data.copy_(F.normalize(sums, dim=1) * head.old.norm(dim=1).mean())
        head.old.requires_grad_(False)          # not in the optimiser: weight decay must not move them either

    def loss(self, net, old, x, y):
        """L_c + lambda_i (1 - cos(f, f_old)) + L_mr."""
        with beside(x.device) as aside:
            if old is not None:
                with torch.no_grad(), aside():
                    before = old.features(x)
            features = net.features(x)
        cosines = net.classifier.cosines(features)                                  # (B, K + M)
        loss = classification_loss(net.classifier.sigma * cosines, y)
        if old is None:
            return loss
        K, M = len(net.classifier.old), len(net.classifier.new)
        forget = 1 - F.cosine_similarity(features.to(cosines.dtype), before.to(cosines.dtype)).mean()
        return loss + self.config.lucir_lambda * math.sqrt(K / M) * forget + self._margin_ranking(cosines, y, K, M)

    def _margin_ranking(self, cosines: Tensor, y: Tensor, K: int, M: int) -> Tensor:
        """Old-class samples only: the true cosine against the hardest new-class cosines, averaged over the pairs."""
        hardest = cosines[:, K:].topk(min(self.config.lucir_negatives, M), dim=1).values            # (B, 2)
        short = F.relu(self.config.lucir_margin - cosines.gather(1, y[:, None]) + hardest).mean(1)  # (B,)
        is_old = (y < K).to(short.dtype)
        if world() == 1:                                      # the same by fewer kernels
            return (short * is_old).sum() / is_old.sum().clamp(min=1)
        # Counts over all processes, so that several see the gradient that one would see, whatever their shares.
        count, images = mean_over_processes(torch.stack([is_old.sum(), torch.ones_like(is_old).sum()]))
        return (short * is_old).sum() / count.clamp(min=1 / world()) * images / len(y)


class Joint(Baseline):
    """The upper bound: every phase trains on all data of all classes so far; exemplars serve nearest mean only."""
    cumulative = True
    unused = ("distill_weight", "temperature")


BASELINES = {"lwf": LwF, "icarl": ICaRL, "bic": BiC, "lucir": LUCIR, "joint": Joint}


# ------------------------------------------------------------------------------------------------------------------
# 6. Bilevel optimisation: the local BOP, Eq. 7 to 9
# ------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def evaluating(*nets: nn.Module):
    """Evaluation mode inside, every module's own mode restored after. BatchNorm then uses running statistics, which
    makes a network a plain function of its parameters and its images independent of each other."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Replayed:
    """Calls a function of device tensors; on CUDA captures it in a CUDA graph after a few ordinary calls and from then
    on replays it: thousands of small kernels for the price of one.

    The function must not wait for the device, its tensors keep their shapes, and whatever else it reads must stay
    where it lies in memory and may only change there. What it returns is overwritten by the next call. Ordinary calls,
    always: on a CPU, under deterministic algorithms, whose kernels do not all capture, and where a capture failed,
    which is said.

    name: what it is, in a warning. ordinary: calls before the capture. shared: graph memory and the stream to capture
    on, for several that are dropped together: with one graph goes cuBLAS's workspace of all captured on its stream.
    """
    refused: set = set()                                      # names that failed in this process: not tried again

    def __init__(self, name: str, device: torch.device, ordinary: int = 4, shared=(None, None)):
        self.name, self.device, self.ordinary, self.shared = name, device, ordinary, shared
        self.graph = self.key = self.inputs = self.result = None
        self.wanted = device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()

    def __call__(self, work: Callable, *inputs: Tensor, key=None):
        """work(*inputs). key: names what is baked into the graph, as a learning rate is; a new key captures anew."""
        if not self.wanted or self.name in self.refused:
            return work(*inputs)
        if self.ordinary > 0:
            self.ordinary -= 1
            return work(*inputs) if self.ordinary else self._watched(work, inputs)
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
        for static, given in zip(self.inputs, inputs):
            static.copy_(given)
        if (self.graph is None or self.key != key) and not self._capture(work, key):
            return work(*inputs)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.result

    def drop(self) -> bool:
        """Give the graph's memory back and make ordinary calls from now on. Whether there was a graph."""
        had, self.wanted = self.graph is not None, False
        self.graph = self.inputs = self.result = None
        return had

    def _watched(self, work: Callable, inputs: Sequence[Tensor]):
        """The last ordinary call. Work that waits for the device is refused now: its capture would fail, and in older
        releases of PyTorch (2.12) leave the allocator, in 2.11 also the random generator, in a bad state."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [w for w in said if "called a synchronizing CUDA operation" in str(w.message)]
        if waits:
            self._refuse("it waits for the device")
        for w in said:
            if w not in waits and "Synchronization debug mode" not in str(w.message):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return result

    def _capture(self, work: Callable, key) -> bool:
        """Record the work on the static inputs without doing it; where that fails, say so and give up on it."""
        self.graph = self.result = None                       # an old graph's memory is free for the new one
        pool, own = self.shared
        with torch.cuda.device(self.device):
            stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            try:
                torch.cuda.synchronize()
                # PyTorch's own stream is the first device's. thread_local: a data loader may pin memory meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=own or _new_stream(self.device),
                                      capture_error_mode="thread_local"):
                    result = work(*self.inputs)
            except RuntimeError as error:
                self._refuse(str(error.__context__ or error).partition("\n")[0])     # ending a failed one fails too
                torch.cuda.set_stream(stream)                 # a failed capture may leave its own behind
                torch.cuda.synchronize()
                return False
        self.graph, self.key, self.result = graph, key, result
        return True

    def _refuse(self, cause: str) -> None:
        print(f"warning: no CUDA graph for {self.name} ({cause}): running it step by step, slower", file=sys.stderr)
        self.refused.add(self.name)
        self.drop()


def _less(start: Tensor, by: Tensor, rate) -> Tensor:
    """start - rate * by, in one kernel. As `alpha` a tensor would wait for the device."""
    return torch.addcmul(start, by, rate, value=-1) if isinstance(rate, Tensor) else torch.add(start, by, alpha=-rate)


class _Flat:
    """A network as a function of one vector theta (P,), all of its parameters that require a gradient, and its loss on
    images (N, ...) with labels (N,), `micro_batch` at once."""

    def __init__(self, net: nn.Module, images: Optional[Tensor] = None, labels: Optional[Tensor] = None,
                 micro_batch: Optional[int] = None):
        self.net, self.images, self.labels, self.micro_batch = net, images, labels, micro_batch
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("no parameter of the network requires a gradient: the base level has nothing to train")
        # Where each lies, once: a parameter may belong to two modules, and one module may have two names.
        names = {p: name for name, p in self.parameters.items()}
        self.places = {f"{prefix}.{key}" if prefix else key: names[p] for prefix, module in net.named_modules()
                       for key, p in module._parameters.items() if p in names}

    @property
    def theta(self) -> Tensor:
        """The network's own."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])

    @functools.cached_property
    def total(self) -> Tensor:
        """What `by_images` takes from the steps walked back."""
        return torch.zeros_like(self.images)

    def loss_sum(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """L_c of Theta' = theta, summed over the images."""
        pieces = theta.split([p.numel() for p in self.parameters.values()])
        parameters = {n: piece.view(p.shape) for (n, p), piece in zip(self.parameters.items(), pieces)}
        parameters = {place: parameters[name] for place, name in self.places.items()}
        logits = functional_call(self.net, parameters, (images,), tie_weights=False)
        return F.cross_entropy(logits, labels, reduction="sum")

    def loss_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, its gradient by theta), accumulated over micro-batches."""
        theta = theta.detach().to(self.images.device).requires_grad_()
        loss, total = torch.zeros((), dtype=theta.dtype, device=theta.device), torch.zeros_like(theta)
        for x, y in zip(self._parts(self.images), self._parts(self.labels)):
            piece = self.loss_sum(theta, x, y) / len(self.images)
            total += torch.autograd.grad(piece, theta)[0]
            loss += piece.detach()
        return loss, total

    def gradient(self, theta: Tensor) -> Tensor:
        """The latter alone."""
        return self.loss_and_gradient(theta)[1]

    def step_back(self, theta: Tensor, v: Tensor, lr) -> Tensor:
        """One base-level step walked backwards: v of the step before; `total` adds up what `by_images` gives.

        With g the step's gradient and h = -lr <g, v>: dE = dh/dE and v <- v + dh/dtheta. Images are independent of
        each other in h, so micro-batches that share v add up to the exact result.
        """
        theta = theta.detach().to(self.images.device).requires_grad_()
        before = v.clone()
        for part, y, total in zip(*map(self._parts, (self.images, self.labels, self.total))):
            x = part.detach().requires_grad_()
            piece = self.loss_sum(theta, x, y) / len(self.images)
            g, = torch.autograd.grad(piece, theta, create_graph=True)
            by_x, by_theta = torch.autograd.grad(-lr * (g @ v), (x, theta), materialize_grads=True)
            total += by_x
            before += by_theta
        return before

    def by_images(self, lr) -> Tensor:
        """The gradient by the images of all steps walked back, which had this rate."""
        return self.total

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        return values.split(self.micro_batch or len(values))


class _FlatHead(_Flat):
    """A `Classifier` as such a function, of features (N, D), with its derivatives written out: on tensors this small a
    step costs what its calls cost, and autograd takes many times as many. All images at once.

    <g, v> is the loss's derivative along v, the sum of dL/dz times dz, where d is along v and z are logits, and so is
    differentiated once only. On the way back 1 / N and the rate come last.
    """

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor, micro_batch: Optional[int] = None):
        super().__init__(net, images, labels)
        truth = images.new_zeros(len(images), net.classes).scatter_(1, labels[:, None], 1)     # F.one_hot would wait
        self.truth, self.minus = truth, truth / -len(images)

    @staticmethod
    def suits(net: nn.Module) -> bool:
        """Whether a network is one: all of it trains, and nothing is computed in lower precision."""
        return (type(net) is Classifier and not torch.is_autocast_enabled(net.new.device.type)
                and all(p.requires_grad or not p.numel() for p in net.parameters()))

    def errors(self, p: Tensor) -> Tensor:
        """The mean loss's derivative by the logits, (N, K), from their softmax."""
        return torch.add(self.minus, p, alpha=1 / len(p))

    @staticmethod
    def moved(p: Tensor, dz: Tensor) -> Tensor:
        """dp, where p (N, K) is the softmax of z."""
        q = p * dz
        return torch.addcmul(q, p, q.sum(1, keepdim=True), value=-1)

    def parts(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (K, D), and sigma (1,) or biases (K,)."""
        theta, count = theta.to(self.images.device), self.net.classes * self.net.dim
        return theta[:count].view(self.net.classes, self.net.dim), theta[count:]


class _FlatLinear(_FlatHead):
    """z = x w' + b."""

    @torch.no_grad()
    def gradient(self, theta):
        """As `_Flat`'s."""
        w, b = self.parts(theta)
        by_z = self.errors(torch.addmm(b, self.images, w.T).softmax(1))
        return torch.cat([(by_z.T @ self.images).flatten(), by_z.sum(0)])

    @torch.no_grad()
    def step_back(self, theta, v, lr):
        """As `_Flat`'s."""
        (w, b), (dw, db) = self.parts(theta), self.parts(v)
        p = torch.addmm(b, self.images, w.T).softmax(1)
        by_z = self.moved(p, torch.addmm(db, self.images, dw.T))
        self.total.addmm_(by_z, w).addmm_(p - self.truth, dw)
        return _less(v, torch.cat([(by_z.T @ self.images).flatten(), by_z.sum(0)]), lr / len(p))

    def by_images(self, lr):
        """As `_Flat`'s."""
        return -lr / len(self.total) * self.total


class _FlatCosine(_FlatHead):
    """z = x W' of unit features x, where W = sigma u and u = w / n are unit rows."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lengths = self.images.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.x = self.images / self.lengths

    @staticmethod
    def dots(first: Tensor, second: Tensor) -> Tensor:
        """Of rows: (., 1)."""
        return (first * second).sum(1, keepdim=True)

    @staticmethod
    def across(vectors: Tensor, units: Tensor, along: Tensor, lengths: Tensor) -> Tensor:
        """(vectors - along * units) / lengths: with along = dots(units, vectors) how units turn as what they are the
        directions of, `lengths` long, moves by `vectors`; its own transpose."""
        return torch.addcmul(vectors, units, along, value=-1) / lengths

    @torch.no_grad()
    def gradient(self, theta):
        """As `_Flat`'s."""
        w, sigma = self.parts(theta)
        n = w.norm(dim=1, keepdim=True)
        u = w / n
        by_rows = self.errors((self.x @ (sigma * u).T).softmax(1)).T @ self.x
        along = self.dots(u, by_rows)
        return torch.cat([(sigma * self.across(by_rows, u, along, n)).flatten(), along.sum().view(1)])

    @torch.no_grad()
    def step_back(self, theta, v, lr):
        """As `_Flat`'s."""
        (w, sigma), (dw, dsigma) = self.parts(theta), self.parts(v)
        n = w.norm(dim=1, keepdim=True)
        u = w / n
        longer = self.dots(u, dw)                                                          # dn
        du = self.across(dw, u, longer, n)
        rows, drows = sigma * u, torch.addcmul(dsigma * u, sigma, du)
        p = (self.x @ rows.T).softmax(1)
        by_z, by_dz = self.moved(p, self.x @ drows.T), p - self.truth
        self.total.addmm_(by_z, rows).addmm_(by_dz, drows)
        by_rows, by_drows = by_z.T @ self.x, by_dz.T @ self.x
        by_u, by_du = torch.addcmul(sigma * by_rows, dsigma, by_drows), sigma * by_drows
        by_u = torch.addcdiv(by_u, torch.addcmul(by_du * longer, dw, self.dots(u, by_du)), n, value=-1)
        along = torch.addcmul(u * by_u, by_du, du).sum(1, keepdim=True)                    # by_du . du: du has 1 / n
        by_sigma = torch.addcmul(by_rows * u, by_drows, du).sum().view(1)
        return _less(v, torch.cat([self.across(by_u, u, along, n).flatten(), by_sigma]), lr / len(p))

    def by_images(self, lr):
        """As `_Flat`'s."""
        return -lr / len(self.x) * self.across(self.total, self.x, self.dots(self.x, self.total), self.lengths)


def _flat(net: nn.Module, images: Tensor, labels: Tensor, micro_batch: Optional[int]) -> _Flat:
    kind = _Flat if not _FlatHead.suits(net) else _FlatCosine if net.cosine else _FlatLinear
    return kind(net, images.detach(), labels.long(), micro_batch)


def base_level(net: nn.Module, exemplars: Tensor, labels: Tensor, *, steps: int, lr,
               micro_batch: Optional[int] = None) -> list[Tensor]:
    """Base level, Eq. 8: Theta' <- Theta' - lr * grad L_c(Theta'; E), `steps` times, all exemplars in each step.

    Returns the trajectory Theta'_0 .. Theta'_steps, each one vector (P,) of the parameters that require a gradient,
    in the order of net.named_parameters(). Plain SGD, no momentum. The network itself does not change.
    """
    with evaluating(net), sdpa_kernel(SDPBackend.MATH):
        return _trajectory(_flat(net, exemplars, labels, micro_batch), steps, lr)


def _trajectory(flat: _Flat, steps: int, lr) -> list[Tensor]:
    """Eq. 8's thetas, from the network's own on."""
    theta, trajectory = flat.theta, []
    # Where all copies would fill the GPU they wait on the host.
    large = (theta.is_cuda and not torch.cuda.is_current_stream_capturing()              # copies would end a capture
             and (steps + 1) * theta.nbytes > 0.2 * free_memory(theta.device))
    keep = "cpu" if large else theta.device
    for _ in range(steps):
        trajectory.append(theta.to(keep))
        theta = _less(theta, flat.gradient(theta), lr)
    return [*trajectory, theta.to(keep)]


def meta_gradient(net: nn.Module, exemplars: Tensor, labels: Tensor, val_images: Tensor, val_labels: Tensor, *,
                  steps: int, lr, micro_batch: Optional[int] = None) -> tuple[Tensor, Tensor]:
    """The gradient of Eq. 9, exact: of the meta-level loss of a bilevel program, Eq. 3, by the exemplars, through every
    base-level step.

    net: any nn.Module, images -> logits; it is left unchanged. exemplars (N, ...), val_images (V, ...): normalised
    floats of the network's dtype; labels (N,), val_labels (V,): whole. steps, lr: base-level SGD from the network's
    parameters on all of `exemplars`. micro_batch: images at once; changes memory and rounding, nothing else.

    Returns (meta-level loss (), gradient shaped like `exemplars`). Only the parameter trajectory is kept and walked
    backwards, one step's graph at a time: memory is flat in `steps` but for one copy of the parameters a step.
    Raises ValueError for no step or no image, and if no parameter requires a gradient. As exact as second derivatives
    are: that of PyTorch's weight_norm is not (2.14: gradgradcheck of torch._weight_norm fails).
    """
    if steps < 1 or not len(exemplars) or not len(val_images):
        raise ValueError(f"a gradient through {steps} steps of {len(exemplars)} exemplars, from {len(val_images)} "
                         "images: each must be 1 or more")
    with evaluating(net), sdpa_kernel(SDPBackend.MATH):       # other kernels of attention have no second derivative
        flat = _flat(net, exemplars, labels, micro_batch)
        trajectory = _trajectory(flat, steps, lr)
        loss, v = _flat(net, val_images, val_labels, micro_batch).loss_and_gradient(trajectory.pop())
        while trajectory:
            v = flat.step_back(trajectory.pop(), v, lr)
        return loss, flat.by_images(lr)


@dataclasses.dataclass
class MicroBatch:
    """How many images the exemplar level takes at once: chosen when first needed, halved after CUDA runs out of
    memory, shared by all chunks of a run and kept in its checkpoint."""
    size: Optional[int] = None


def fitting_micro_batch(net: nn.Module, image: Tensor, label: Tensor, share: float = 0.4) -> int:
    """How many images' base-level steps fit in `share` of the free memory, a power of two; on a CPU 256 at most, so
    that a resumed run rounds as before where the machine holds more or less of other things.

    image (1, 3, H, W), label (1,): what one image more costs is measured.
    """
    each = max(1, _saved_bytes(net, torch.cat([image] * 2), torch.cat([label] * 2)) - _saved_bytes(net, image, label))
    most, neighbours = (8, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if image.device.type == "cpu" else (12, 1)
    fits = max(1, int(share * free_memory(image.device) / each / neighbours))
    return 2 ** min(most, fits.bit_length() - 1)


def _saved_bytes(net: nn.Module, images: Tensor, labels: Tensor) -> int:
    """What autograd keeps for one differentiable base-level step."""
    sizes = []
    kept = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
    with evaluating(net), sdpa_kernel(SDPBackend.MATH), kept:
        flat = _Flat(net)
        theta = flat.theta.detach().requires_grad_()
        torch.autograd.grad(flat.loss_sum(theta, images, labels), theta, create_graph=True)
    return sum(sizes)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)     # PyTorch's to reuse
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 ** 31                                                   # not Linux: assume 2 GB


MEANS_SCALE = 10.0                                            # of cosines; chosen on validation images


class LocalBOP:
    """The objective of Eq. 7 for one set of exemplars: meta-level loss and gradient as functions of their pixels.

    networks: where the temporary model starts from, in turn. With `base_level` "classifier" the base level trains
    the classifier on the features of a frozen backbone: the same exact gradient of a smaller bilevel program. With
    "means" its solution has a closed form, `means_loss`.
    """

    def __init__(self, networks: Sequence[nn.Module], labels: Tensor, data, config: Config, seed,
                 limit: MicroBatch):
        self.labels, self.data, self.config = labels, data, config
        self.seed, self.limit, self.codes = seed, limit, {}
        self.device = labels.device
        shared = (None, None)
        if self.device.type == "cuda":                                              # networks take turns
            shared = torch.cuda.graph_pool_handle(), _new_stream(self.device)
        self.replayed = [Replayed("the exemplar level", self.device, 1, shared) for _ in networks]
        self.normalise = Normalise(config.mean, config.std).to(self.device)
        self.head_only = config.base_level != "network"
        self.encoders = [fold_norms(net).features if self.head_only else lambda x: x for net in networks]
        self.heads = [copy.deepcopy(net.classifier if self.head_only else net) for net in networks]
        self.rows = labels.unique()
        self.data_labels, kinds = data.labels.to(self.device), data.labels.cpu()
        self.by_class = kinds.argsort(stable=True)                                  # data, class after class
        self.counts = kinds.unique(return_counts=True)[1]                           # images of each class present
        self.starts = self.counts.cumsum(0) - self.counts

    def start(self, k: int, *keys) -> nn.Module:
        """The temporary model over network k's frozen part, as it starts, in the same memory at every call."""
        head = self.heads[k]
        if self.config.base_start == "fresh":
            classifier = head if self.head_only else head.classifier
            classifier.redraw(self.rows, _generator("cpu", self.seed, k, *keys))
        return head

    def rate(self, k: int):
        """alpha_2; relative to the mean squared norm of the data's features where a linear classifier alone is
        trained, so that one number suits cosine and linear classifiers. Fixed for a network, whatever the exemplars."""
        if not self.head_only or self.heads[k].cosine:
            return self.config.base_lr
        return self.config.base_lr / self.data_codes(k).square().sum(1).mean()

    @torch.no_grad()
    def data_codes(self, k: int) -> Tensor:
        """Features (V, D) of all data under network k, computed once: nothing of it changes with the exemplars. In
        the model level's precision, as a Learner gives it ("auto" is float32 here)."""
        if k not in self.codes:
            with autocast(self.device, self.config.precision):
                self.codes[k] = torch.cat([codes.float() for codes, _ in self.data_batches(k)])
        return self.codes[k]

    def data_batches(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All data in order, normalised and encoded, with labels."""
        for images, labels in self.data.batches(torch.arange(len(self.data)).split(256)):
            yield self.encoded(k, self.normalise(images.to(self.device))), labels.to(self.device)

    def meta_batch(self, k: int, epoch: int) -> tuple[Tensor, Tensor]:
        """A fresh class-balanced batch of the data as network k's head sees it, not augmented, and its labels."""
        each = max(1, self.config.meta_batch // len(self.counts))
        generator = _generator("cpu", self.seed, "meta", epoch)
        draws = (torch.rand(each, len(self.counts), generator=generator) * self.counts).long()
        index = self.by_class[(draws + self.starts).flatten()]
        here = index.to(self.device, non_blocking=True)
        x = self.data_codes(k)[here] if self.head_only else self.normalise(self.data[index].to(self.device))
        return x, self.data_labels[here]

    def view(self, pixels: Tensor, epoch: int) -> Tensor:
        """The exemplars as a base level sees them: cropped and flipped at random, black where nothing is."""
        if not self.config.exemplar_augment:
            return pixels
        black, generator = self.normalise.black, _generator(self.device, self.seed, "view", epoch)
        return _registered("AUGMENTATIONS", self.config.augmentation)(pixels - black, generator) + black

    def gradient(self, pixels: Tensor, epoch: int) -> Tensor:
        """Of the meta-level loss by the pixels (N, 3, H, W), of one exemplar epoch."""
        k, leaf = epoch % len(self.heads), pixels.detach().requires_grad_()
        self.start(k, "epoch", epoch)
        seen = self.view(leaf, epoch)
        work, inputs = functools.partial(self._by_view, k), (seen.detach(), *self.meta_batch(k, epoch))
        whole = (self.limit.size or len(seen)) >= len(seen)         # else it is large, and its launches do not matter
        by_view = (self.replayed[k](work, *inputs) if whole else work(*inputs)).clone()
        return torch.autograd.grad(seen, leaf, by_view)[0]

    def drop_graphs(self) -> bool:
        """Give up all CUDA graphs, which share their memory. Whether there was one."""
        return any([replayed.drop() for replayed in self.replayed])

    def _by_view(self, k: int, seen: Tensor, meta: Tensor, meta_labels: Tensor) -> Tensor:
        """The gradient by the exemplars as the base level sees them; all work is on the device."""
        seen = seen.detach().requires_grad_()
        parts = seen.split(self.limit.size or len(seen))        # several: their graphs are made again on the way back
        encoded = torch.cat([self.encoders[k](part) if len(parts) == 1 else checkpoint(
            self.encoders[k], part, use_reentrant=False, preserve_rng_state=False) for part in parts])
        return torch.autograd.grad(encoded, seen, self._by_code(k, encoded, meta, meta_labels))[0]

    def _by_code(self, k: int, encoded: Tensor, meta: Tensor, meta_labels: Tensor) -> Tensor:
        """The gradient by the encoded exemplars."""
        if self.config.base_level != "means":
            return meta_gradient(self.heads[k], encoded, self.labels, meta, meta_labels, steps=self.config.base_steps,
                                 lr=self.rate(k), micro_batch=self.limit.size)[1]
        codes = encoded.detach().requires_grad_()
        return torch.autograd.grad(self.means_loss(codes, meta, meta_labels), codes)[0]

    def means_loss(self, codes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """L_c of features x (V, D) classified by the nearest mean of the exemplars' features, codes (N, D), in place of
        Eq. 8's temporary model: logits are MEANS_SCALE times the cosine to the mean of unit vectors."""
        own, y = (torch.searchsorted(self.rows, labels.contiguous()) for labels in (self.labels, y))
        sums = codes.new_zeros(len(self.rows), codes.shape[1]).index_add(0, own, F.normalize(codes, dim=1))
        return F.cross_entropy(MEANS_SCALE * F.normalize(x, dim=1) @ F.normalize(sums, dim=1).T, y)

    def encoded(self, k: int, images: Tensor) -> Tensor:
        """The frozen part applied in micro-batches, no gradient."""
        return torch.cat([self.encoders[k](part) for part in images.split(4 * (self.limit.size or len(images)))])

    @torch.no_grad()
    def loss(self, images: Tensor) -> float:
        """Meta-level loss of stored uint8 exemplars on all of the data, no augmentation, mean over the networks.
        The base level starts from the same parameters at every call."""
        total = 0.0
        for k in range(len(self.heads)):
            head, encoded = self.start(k, "measure"), self.encoded(k, self.normalise(images))
            if self.config.base_level == "means":
                total += self.means_loss(encoded, self.data_codes(k), self.data_labels) * len(self.data)
                continue
            with torch.enable_grad():
                theta = base_level(head, encoded, self.labels, steps=self.config.base_steps, lr=self.rate(k),
                                   micro_batch=self.limit.size)[-1].to(self.device)
            flat = _Flat(head)
            for x, y in [(self.data_codes(k), self.data_labels)] if self.head_only else self.data_batches(k):
                total += flat.loss_sum(theta, x, y)
        return float(total) / len(self.data) / len(self.heads)


def optimise_exemplars(net: nn.Module, images: Tensor, labels: Tensor, data_images, data_labels: Tensor,
                       config: Config, *, seed=0, networks: Optional[Sequence[nn.Module]] = None,
                       micro_batch: Optional[MicroBatch] = None, tick: Optional[Callable] = None
                       ) -> tuple[Tensor, float, float]:
    """The local BOP, Eq. 7: E <- E - beta * grad_E L_c(Theta'(E); D), Eq. 9. Eq. 10 is the same call with one part
    of the old exemplars as `images` and the other parts as the data.

    images: uint8 (N, 3, H, W), labels (N,): the exemplars, on the network's device. data_images: uint8
    (V, 3, H, W), with data_labels (V,), or a source like `Images`, whose own labels count. config: its exemplar level;
    the rate is halved every fifth of the epochs. networks: the base level's starts, if not `net` alone. micro_batch:
    images at once (None: what fits). tick(epoch, epochs, gradient): called after every update.

    Returns (images: uint8, rounded and clipped; meta-level loss before; after), both losses of the 8-bit images on
    all of the data. Raises ValueError for images that are not uint8, for a network or data without what the recipe
    needs, and RunError if a loss or a pixel is not finite.
    """
    config = config.resolved()
    if images.dtype != torch.uint8:
        raise ValueError(f"exemplars are stored as uint8 images, not {images.dtype}")
    plain = (config.base_level, config.base_start) == ("network", "current")
    if not plain and not isinstance(getattr(net, "classifier", None), Classifier):
        raise ValueError("this recipe needs a network with .features and .classifier (IncrementalNet); any other "
                         "needs base_level='network', base_start='current'")
    data = data_images if hasattr(data_images, "batches") else Images(data_images, data_labels)
    labels = labels.long()
    if config.base_level == "means" and not torch.isin(data.labels.cpu(), labels.cpu()).all():
        raise ValueError("base_level='means' needs an exemplar of every class in the data")
    if not len(data) or not len(images):
        raise ValueError(f"{len(images)} exemplars and {len(data)} images of data: both are needed")
    if config.base_level == "means" and len(labels.unique()) == 1:             # one mean: nothing to tell apart
        config = dataclasses.replace(config, base_level="classifier")
    starts = [net] if networks is None else list(networks)
    with evaluating(*starts):
        limit = micro_batch or MicroBatch()
        bop = LocalBOP(starts, labels, data, config, seed, limit)
        if limit.size is None:
            limit.size = fitting_micro_batch(net, bop.normalise(images[:1]), labels[:1])
        before = _with_memory(limit, lambda: bop.loss(images))
        pixels = bop.normalise(images)
        kind = torch.optim.Adam if config.exemplar_optimizer == "adam" else torch.optim.SGD
        optimizer = kind([pixels], lr=config.exemplar_lr)
        for epoch in range(config.exemplar_epochs):
            optimizer.param_groups[0]["lr"] = config.exemplar_lr * halving(epoch, config.exemplar_epochs)
            pixels.grad = _with_memory(limit, lambda: bop.gradient(pixels, epoch), bop.drop_graphs)       # Eq. 9
            optimizer.step()
            bop.normalise.clip_(pixels)
            (tick or _silent)(epoch, config.exemplar_epochs, pixels.grad)
        bop.drop_graphs()
        learned = bop.normalise.to_uint8(pixels)
        after = _with_memory(limit, lambda: bop.loss(learned))
    if not math.isfinite(before + after + float(pixels.sum())):          # a pixel of NaN would be stored as black
        raise RunError(f"the exemplar level is not finite (meta-level loss {before:.3g}, then {after:.3g}): lower "
                       "--exemplar-lr or --base-lr in another --out; --start-from this run's last phase keeps its "
                       "networks")
    return learned, before, after


def _with_memory(limit: MicroBatch, work: Callable, spare: Callable[[], bool] = lambda: False):
    """Do the work; where CUDA runs out of memory `spare` some, or else halve the micro-batch and say so; again."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if spare():
                continue
            if limit.size == 1:
                raise RunError("CUDA is out of memory with one image at a time: close other programs, or use a "
                               "smaller network or --image-size") from None
        limit.size = max(1, limit.size // 2)
        torch.cuda.empty_cache()
        print(f"warning: CUDA out of memory: micro-batch of the exemplar level halved to {limit.size}",
              file=sys.stderr)


def _out_of_memory(error: Exception) -> bool:
    """Whether CUDA has run out of memory, which its driver, cuBLAS and cuDNN say in words of their own."""
    words = r"CUDA error: out of memory|CU(BLAS|DNN)_STATUS_\w*ALLOC\w*|unable to find an engine to execute"
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(re.search(words, str(error)))


def halving(epoch: int, epochs: int) -> float:
    """The paper's schedule of the exemplar level and of fine-tuning: halved every fifth of the epochs."""
    return 0.5 ** (epoch // max(1, math.ceil(epochs / 5)))


# ------------------------------------------------------------------------------------------------------------------
# 7. Exemplars: the memory and how it is filled
# ------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Memory:
    """Stored exemplars: images uint8 (N, 3, H, W), labels (N,), ranks (N,) within the class (0 first), and held (N,)
    bool: kept for validation, never trained on or optimised."""
    images: Tensor
    labels: Tensor
    ranks: Tensor
    held: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, mask: Tensor) -> "Memory":
        """The exemplars where the mask (N,) is true; this very memory, not a copy, where it is true for all."""
        if bool(mask.all()):
            return self
        return Memory(*(value[mask] for value in vars(self).values()))

    def trim(self, keep: int, held: int) -> "Memory":
        """At most `keep` exemplars a class to train on and `held` for validation, best ranks first."""
        return self.select(torch.where(self.held, self.ranks < held, self.ranks < keep))

    def plus(self, other: "Memory") -> "Memory":
        """Both memories, this one first; no copy where one is empty."""
        if not len(self) or not len(other):
            return self if len(self) else other
        return Memory(*(torch.cat([a, b]) for a, b in zip(vars(self).values(), vars(other).values())))

    def to(self, device) -> "Memory":
        """The same on another device."""
        return Memory(**{name: value.to(device) for name, value in vars(self).items()})


def herding(features: Tensor, m: int, draws: int = 1000) -> Tensor:
    """iCaRL's herding: (N, D) float -> (m,) long, indices in order of rank.

    Features are L2-normalised, mu is their mean, w starts as mu; each draw takes argmax w . f and adds mu - f to w,
    until m different ones are drawn. After `draws` draws (duplicates; m near N) the rest is filled by w . f.
    Raises ValueError if m exceeds N.
    """
    if m > len(features):
        raise ValueError(f"{m} exemplars wanted from {len(features)} images")
    features = F.normalize(features.detach().float().cpu(), dim=1)          # a small loop: no GPU round trips
    mu = features.mean(0)
    w, picked = mu.clone(), {}
    for _ in range(draws):
        if len(picked) == m:
            break
        best = int((features @ w).argmax())
        picked.setdefault(best)
        w += mu - features[best]
    rest = (i for i in (features @ w).argsort(descending=True, stable=True).tolist() if i not in picked)
    ranked = list(picked) + [next(rest) for _ in range(m - len(picked))]
    return torch.tensor(ranked, dtype=torch.long)


class Strategy:
    """How exemplars of a new class are made: chosen real images, optimised afterwards if `learned`.

    The learner sets `config`. A new strategy overrides `select`.
    """
    learned = False
    config: Config = CIFAR100

    def select(self, features: Callable[[], Tensor], count: int, m: int, generator: torch.Generator) -> Tensor:
        """(m,) indices among the class's `count` images, best first. features() -> (count, D)."""
        raise TypeError("a Strategy defines select")


class Random(Strategy):
    """A seeded random sample."""

    def select(self, features, count, m, generator):
        """A random order's first m."""
        return torch.randperm(count, generator=generator)[:m]


class Herding(Strategy):
    """Nearest to the class mean, greedily: `herding`."""

    def select(self, features, count, m, generator):
        """Herding's first m."""
        return herding(features(), m)


class Mnemonics(Strategy):
    """Exemplars learned by the local BOP (Eq. 9), from real images chosen as `config.init` says."""
    learned = True

    def select(self, features, count, m, generator):
        """As `config.init` selects."""
        return STRATEGIES[self.config.resolved().init]().select(features, count, m, generator)


STRATEGIES = {"mnemonics": Mnemonics, "herding": Herding, "random": Random}


# ------------------------------------------------------------------------------------------------------------------
# 8. Learner: one phase in the paper's order, Eq. 4 and 6
# ------------------------------------------------------------------------------------------------------------------

AHEAD_IMAGES = 5000                                           # of a pretended next phase, which is held in memory
EVALUATION_BATCH = defaultdict(lambda: 500, cpu=125)          # fewer on a CPU: large ones may be paged in each time
EVALUATION_PIXELS = 2 ** 23                                   # of a batch at most: 167 images of 224 x 224


class TrainStep:
    """One SGD step of Eq. 6, and the only place that builds one.

    loss: (net, x, y) -> (). batch: the usual batch size. Adds up the loss on the device, so that no step waits for
    it. On CUDA, in one process, the whole step is `Replayed`, with a graph for each of the two or three batch sizes.
    """

    def __init__(self, net: nn.Module, loss: Callable, optimizer, normalise: Normalise, precision: str, batch: int):
        self.module = _LossModule(net, loss, normalise, precision)
        if world() > 1:
            device = next(net.parameters()).device
            ids = [device.index] if device.type == "cuda" else None
            with warnings.catch_warnings():                   # newer releases rename that flag, 2.11 has this one alone
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers: `Learner._epoch` shares rank 0's once an epoch.
                self.module = nn.parallel.DistributedDataParallel(self.module, device_ids=ids, broadcast_buffers=False)
        self.optimizer, self.batch = optimizer, batch
        self.total = torch.zeros((), device=normalise.scale.device)
        self.replayed = {batch: Replayed("the training step", self.total.device)}

    def __call__(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        """uint8 images (B, 3, H, W), labels (B,). share: this process's part of the batch times the processes."""
        while True:
            try:
                return self._replayed(images, labels) if world() == 1 else self._step(images, labels, share)
            except RuntimeError as error:                     # no room for an odd batch beside the graphs
                if not (_out_of_memory(error) and self._spare()):
                    raise

    def _spare(self) -> bool:
        """Drop the graphs of odd batches, or else the usual one's. Whether there was one."""
        odd = [replayed.drop() for size, replayed in self.replayed.items() if size != self.batch]
        return any(odd) or self.replayed[self.batch].drop()

    def _replayed(self, images: Tensor, labels: Tensor) -> None:
        size = len(images)
        if size not in self.replayed and self.replayed[self.batch].graph is None:
            return self._step(images, labels)                 # a small pool's only batch, or graphs are not to be had
        if size not in self.replayed:                         # the last one or two of an epoch
            self.replayed[size] = Replayed(f"a training step of {size} images", self.total.device, 1)
        self.replayed[size](self._step, images, labels, key=self.optimizer.param_groups[0]["lr"])

    def _step(self, images: Tensor, labels: Tensor, share: float = 1.0) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.module(images, labels)
        (loss * share).backward()
        self.optimizer.step()
        if len(images):                                       # fewer images than processes: this one's mean is 0 / 0
            self.total += loss.detach() * (len(images) * world())


def fused_sgd(net: nn.Module, rate: float, config: Config) -> torch.optim.SGD:
    """SGD over what trains, one kernel for all parameters: a fourth of the time of PyTorch's default on a CPU."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, config.momentum, weight_decay=config.weight_decay, fused=True)
    for p in parameters:           # it needs all from the start, also of one that gets its first gradient later
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class _LossModule(nn.Module):
    """uint8 batch -> loss, as one module: DistributedDataParallel needs a forward to hook into."""

    def __init__(self, net: nn.Module, loss: Callable, normalise: Normalise, precision: str):
        super().__init__()
        self.net, self.loss, self.normalise, self.precision = net, loss, normalise, precision

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W), (B,) -> ()."""
        with autocast(images.device, self.precision):
            x = self.normalise(images).contiguous(memory_format=torch.channels_last)
            return self.loss(self.net, x, labels)


def autocast(device: torch.device, precision: str):
    """bfloat16 where the model level runs in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@functools.cache
def pick_precision(device: torch.device) -> str:
    """bfloat16 where a CUDA device has it in hardware, or where a CPU is measured (once a process, a quarter of a
    second) to multiply matrices at least 1.3 times faster in it; else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    kinds = torch.float32, torch.bfloat16
    matrices = [torch.ones(768, 768, dtype=dtype) for dtype in kinds]
    fastest = [math.inf] * len(kinds)
    # This process's time: whatever else runs here made a quick CPU look slow. Windows counts it in steps of 16 ms.
    clock = time.perf_counter if sys.platform == "win32" else time.process_time
    for _ in range(16):
        for k, a in enumerate(matrices):
            start = clock()
            a @ a
            fastest[k] = min(fastest[k], clock() - start)
    return "bfloat16" if fastest[1] * 1.3 < fastest[0] else "float32"


class Learner:
    """Alternates the model level and the exemplar level: the global BOP, Eq. 4.

    net: an IncrementalNet with phase 0's classes, on the device to compute on. baseline, strategy, config: see
    there; a None in the config follows the strategy. report(event: dict): called at every point the run could
    resume from (epoch, exemplars, model, phase). tick(...): called often, for progress. `set_backends(False)` before
    makes CUDA compute as in `run`. Every epoch seeds PyTorch's own random stream.

    accuracy: one row (dict) a phase, as in results.json. memory: the exemplars.
    """

    def __init__(self, net: IncrementalNet, baseline: Baseline, strategy: Strategy, config: Config, *,
                 report: Optional[Callable] = None, tick: Optional[Callable] = None):
        for given, kind in ((net, IncrementalNet), (baseline, Baseline), (strategy, Strategy)):
            if not isinstance(given, kind):
                found = given if isinstance(given, (type, str)) else type(given)
                raise TypeError(f"a {kind.__name__} is needed, not {found}")
        if net.classifier.cosine != baseline.cosine:
            raise ValueError(f"{type(baseline).__name__} needs a network with cosine={baseline.cosine}")
        self.config = config.resolved(baseline, strategy)
        if self.config.finetune and not self.config.finetune_carries and baseline.finishes():
            raise UserError(f"--no-finetune-carries: what {type(baseline).__name__} does after fine-tuning would be "
                            "undone with it: leave it out")
        _check_networks(self.config, strategy.learned)
        self.device = next(net.parameters()).device
        self.net, self.baseline, self.strategy = net, baseline.to(self.device), strategy
        baseline.config = strategy.config = self.config
        self.report, self.tick = report or _silent, tick or _silent
        self.precision = self.config.precision
        if self.precision == "auto":
            fast = torch.tensor(float(pick_precision(self.device) == "bfloat16"), device=self.device)
            self.precision = "bfloat16" if float(mean_over_processes(fast)) == 1 else "float32"
        self.normalise = Normalise(self.config.mean, self.config.std).to(self.device)
        self.net.to(memory_format=torch.channels_last)
        self.frozen = _frozen(net)                            # by whoever made the network: they stay as they are
        self.old: Optional[nn.Module] = None
        self.memory: Optional[Memory] = None
        self.accuracy: list[dict] = []
        self.starts: list[nn.Module] = [net]
        self.micro_batch = MicroBatch()
        self.untuned: dict[str, Tensor] = {}                  # parameters before fine-tuning, for the next phase
        self.index, self.stage, self.progress, self.row, self.sample, self._doing = 0, "begin", {}, {}, {}, ""

    # ---- one phase ----

    def learn_phase(self, phase: Phase) -> dict:
        """Learn one phase from its own data and the exemplars alone; returns its row of `accuracy`.

        Model level (Eq. 5, 6), merge of weight transfer, exemplar level (Eq. 9, then 10), fine-tuning, the
        baseline's last correction, test. Continues in the middle after load_state_dict.
        """
        if phase.index != self.index:
            raise ValueError(f"phase {self.index} is next, not {phase.index}")
        if self.stage == "begin":
            rows, known = len(self.net.classifier.weight), phase.seen or phase.classes
            if rows != known:
                raise ValueError(f"before phase {phase.index} the network must have {known} classes, and it has {rows}")
            self._check_quota(*self._quota(phase))
            check_counts(phase, sum(self._quota(phase)))
            if phase.seen and (int(phase.train.labels.min()) < phase.seen) != self.baseline.cumulative:
                raise ValueError("a phase holds its new classes alone, and for Joint all so far: make_phases(..., "
                                 f"cumulative={self.baseline.cumulative})")
        data, held = self._hold_out(phase)
        if self.memory is not None:
            self.memory = self.memory.to(data.labels.device)  # with the data: on the host where that is decoded
        stages = {"begin": lambda: self._begin(phase.classes, data), "model": lambda: self._model(data),
                  "exemplars": lambda: self._exemplars(phase, data, held), "finetune": self._finetune,
                  "finish": lambda: self._finish(phase)}
        names = [*stages, "begin"]
        for k in range(names.index(self.stage), len(stages)):
            event = stages[names[k]]()
            self.stage, self.progress = names[k + 1], {}
            if event:
                self.report(event)
        self.index += 1
        self.accuracy.append(self.row)
        self.row = {}
        self.report({"event": "phase", **self.accuracy[-1]})
        return self.accuracy[-1]

    def _random(self, *keys, device="cpu") -> torch.Generator:
        return _generator(device, self.config.seed, self.index, *keys)

    def _quota(self, phase: Phase) -> tuple[int, int]:
        return quota(self.config, phase.seen + phase.classes, self.baseline.held_out)

    def _check_quota(self, keep: int, held: int) -> None:
        """UserError where a class's exemplars, to train on and held out, are too few for the settings."""
        config, standing = self.config, self.config.unrehearsed or keep
        if (keep < max(1, config.unrehearsed) or held < (self.baseline.held_out > 0)
                or config.adjust and config.subsets > standing):
            raise UserError(f"{keep + held} exemplars a class are too few for these settings: raise per_class or "
                            "budget")

    def _hold_out(self, phase: Phase) -> tuple[Images, Memory]:
        """Split a class-balanced validation set (BiC) off the new data, before anything trains on it."""
        data = phase.train.to(self.device)
        count = self._quota(phase)[1]
        labels = data.labels.cpu()
        index = torch.cat([_shuffled(labels, label, self._random("held", label))[:count]
                           for label in range(phase.seen, phase.seen + phase.classes)])
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[index] = False
        held = self._stored(data, index, count, True)
        return data.subset(torch.nonzero(rest).squeeze(1)) if count else data, held

    @staticmethod
    def _stored(data: Images, index: Tensor, each: int, held: bool) -> Memory:
        """Images at `index`, `each` of a class, class after class, best first, as exemplars where the data lies."""
        ranks = torch.arange(len(index)) % max(1, each)
        return Memory(data[index], data.labels.cpu()[index], ranks, torch.full_like(ranks, held, dtype=torch.bool)
                      ).to(data.labels.device)

    def _begin(self, classes: int, data: Images) -> None:
        """Keep the old model, grow the classifier, freeze and imprint what the baseline wants."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.seed, self.index, "rows"))
            if self.index:
                self.net.load_state_dict(self.untuned, strict=False)
                self.untuned = {}
                self.old = self.baseline.teacher(self.net)
                self.net.add_classes(classes)
        self.baseline.prepare(self.net, self.old, lambda: (self._rows(data, self.net.features),
                                                           data.labels.to(self.device)))
        if self.index and self.config.weight_transfer:
            transfer_weights(self.net)

    def _model(self, data: Images) -> dict:
        """Model level, Eq. 6: Theta <- Theta - alpha_1 grad L on D_i and the old exemplars. Returns its event."""
        config = self.config
        pool, index = data, torch.arange(len(data))
        if self.memory is not None and not self.baseline.cumulative:
            stored = self.memory.select(~self.memory.held & (self.memory.ranks >= config.unrehearsed))
            pool = data.join(stored.images, stored.labels)
            index = torch.cat([index, torch.arange(len(data), len(pool)).repeat(config.rehearsal)])
        drops = [math.ceil(fraction * config.epochs) for fraction in config.milestones]
        old = None if self.old is None else fold_norms(self.old)
        self._fit(lambda net, x, y: self.baseline.loss(net, old, x, y), pool, index, config.epochs,
                  lambda epoch: config.lr * 0.1 ** sum(epoch >= drop for drop in drops), training=True)
        merge_weights(self.net)
        _trainable(self.net, self.frozen)
        return {"event": "model", "phase": self.index}

    def _finetune(self) -> None:
        """Balanced fine-tuning on exemplars alone, L_c, BatchNorm statistics frozen. Phases after 0."""
        config = self.config
        if not (self.index and config.finetune):
            return
        stored = self.memory.select(self._standing(self.memory) & ~self.memory.held)
        pool = Images(stored.images, stored.labels).to(self.device)
        alone = config.finetune_level == "classifier"
        if alone:
            self.net.backbone.requires_grad_(False)
        if not config.finetune_carries and "epoch" not in self.progress:
            self.untuned = _copied({name: p for name, p in self.net.named_parameters() if p.requires_grad})
        if alone and self.net.classifier.cosine and config.finetune_scale:
            self._turn_rows(pool)
        else:
            self._tune(lambda net, x, y: classification_loss(net(x), y), pool)
        _trainable(self.net, self.frozen)

    def _turn_rows(self, pool: Images) -> None:
        """Fine-tune the directions of a cosine classifier's rows: from length 1 and at a fixed scale, so that an epoch
        turns all as far, whatever lengths, scale and number of rows the training before has left, and in however many
        steps."""
        head, scale = self.net.classifier, self.config.finetune_scale
        steps = len(_batches(torch.arange(len(pool)), self.config.batch_size))
        lengths = self.progress.setdefault("lengths", head.weight.detach().norm(dim=1, keepdim=True)).to(self.device)
        if "epoch" not in self.progress:
            head.set_lengths(torch.ones_like(lengths))
        head.sigma.requires_grad_(False)
        self._tune(lambda net, x, y: classification_loss(scale * net.classifier.cosines(net.features(x)), y), pool,
                   head.classes / 100 / steps)
        head.set_lengths(lengths)

    def _tune(self, loss: Callable, pool: Images, rate: float = 1.0) -> None:
        epochs = self.config.finetune_epochs
        self._fit(loss, pool, torch.arange(len(pool)), epochs,
                  lambda epoch: rate * self.config.finetune_lr * halving(epoch, epochs), training=False)

    def _standing(self, memory: Memory) -> Tensor:
        """Which exemplars (N,) are fine-tuned on, and learned: all, or those not rehearsed. What later model levels
        have learned by heart no longer tells the classifier where its class lies."""
        count = self.config.unrehearsed
        return (memory.ranks < count) | memory.held if count else torch.ones_like(memory.held)

    def _fit(self, loss: Callable, pool: Images, index: Tensor, epochs: int, rate: Callable[[int], float],
             training: bool) -> None:
        """Epochs of SGD over a pool's images at `index` (n,), where one may stand repeatedly; continues from
        `progress`."""
        config = self.config
        optimizer = fused_sgd(self.net, rate(0), config)
        if "optimizer" in self.progress:
            optimizer.load_state_dict(self.progress["optimizer"])
        step = TrainStep(self.net, loss, optimizer, self.normalise, self.precision, config.batch_size)
        for epoch in range(self.progress.get("epoch", 0), epochs):
            optimizer.param_groups[0]["lr"] = rate(epoch)
            started = time.perf_counter()
            self.net.train(training)
            mean = self._epoch(step, pool, index, epoch, epochs)
            bad = f"the loss is {mean}" if not math.isfinite(mean) else "weights are no longer finite"
            # Weights too: oneDNN's ReLU makes 0 of NaN, and a network of nothing but NaN can have a fair loss.
            if not math.isfinite(mean) or not math.isfinite(nn.utils.get_total_norm(self.net.parameters())):
                tuning, phase = self.stage == "finetune", self.index - (self.stage == "look-ahead")
                start = f"--start-from this run's phase {phase}, which keeps its networks," if tuning else "start again"
                raise RunError(f"{bad} in phase {phase}, epoch {epoch} ({self.stage}): most likely "
                               f"the learning rate ({rate(epoch):g}) is too high: {start} with a lower "
                               f"{'--finetune-lr' if tuning else '--lr'} in another --out (what was saved before is "
                               "intact)")
            self.progress |= {"epoch": epoch + 1, "optimizer": optimizer.state_dict()}
            self.report({"event": "epoch", "phase": self.index, "stage": self.stage, "epoch": epoch, "loss": mean,
                         "lr": rate(epoch), "images_per_second": len(index) / (time.perf_counter() - started)})
        optimizer.zero_grad(set_to_none=True)                 # gradients lie in the memory of a CUDA graph
        self.net.eval()

    def _epoch(self, step: TrainStep, pool: Images, index: Tensor, epoch: int, epochs: int) -> float:
        """One pass over `index` in a seeded order, each process taking its share of every batch. Mean loss."""
        keys = (self.stage, epoch)
        torch.manual_seed(seed_of(self.config.seed, self.index, *keys, rank()))     # dropout in somebody's backbone
        order = index[torch.randperm(len(index), generator=self._random(*keys))].to(pool.labels.device)
        batches = _batches(order, self.config.batch_size)
        plan = [batch[rank()::world()] for batch in batches]
        generator = self._random(*keys, rank(), device=self.device)
        step.total.zero_()
        augment = _registered("AUGMENTATIONS", self.config.augmentation)
        for k, (images, labels) in enumerate(pool.batches(plan, augment, generator)):
            step(images.to(self.device), labels.to(self.device), len(plan[k]) * world() / len(batches[k]))
            self.tick(self.stage, epoch, epochs, k + 1, len(plan), len(batches[k]), step)
        if world() > 1:
            for buffer in self.net.buffers():
                dist.broadcast(buffer, 0)                                           # BatchNorm's: rank 0's are kept
        return float(mean_over_processes(step.total)) / len(index)

    # ---- exemplar level ----

    def _exemplars(self, phase: Phase, data: Images, held: Memory) -> dict:
        """Exemplar level: choose, then optimise new (Eq. 9) and adjust old exemplars (Eq. 10), chunk by chunk.
        Nothing is written back before all chunks are done. Returns its event."""
        started = time.perf_counter()
        keep, hold = self._quota(phase)
        new = self._choose(phase, data, keep)
        old = None if self.memory is None else self.memory.trim(keep, hold)
        jobs, done = self._plan(phase, new, old), self.progress.setdefault("done", {})
        left = [k for k in range(len(jobs)) if k not in done]         # another process count may have done some
        if left and self.config.base_networks > 1:
            self.starts = [self.net, *self._look_ahead(phase, data, new if old is None else old.plus(new))]
        for first in range(0, len(left), world()):
            self._round(jobs, left[first:first + world()], data, done)
        shown = new.labels < phase.seen + 10                  # as many classes as a picture shows
        shown &= self._standing(new) if self.strategy.learned else True
        self.sample = {"labels": new.labels[shown], "initial": new.images[shown]}
        self._write_back(jobs, done)
        if self.strategy.learned:
            self.sample["learned"] = new.images[shown]
        self.memory = new.plus(held) if old is None else old.plus(new).plus(held)
        self.starts = [self.net]
        return {"event": "exemplars", "phase": self.index, **self.row, "exemplars": len(self.memory),
                "exemplar_seconds": time.perf_counter() - started}

    def _plan(self, phase: Phase, new: Memory, old: Optional[Memory]) -> list[tuple[str, Memory, Tensor]]:
        """What is optimised: Eq. 9's chunks of new classes, then Eq. 10's of old ones, with the memory they lie in."""
        jobs = []
        if self.strategy.learned:
            jobs += [("extract", new, chunk) for chunk in self._chunks(phase.seen, phase.classes)]
        if self.config.adjust and self.index > 0:
            jobs += [("adjust", old, chunk) for chunk in self._chunks(0, phase.seen)]
        return jobs

    def _look_ahead(self, phase: Phase, data: Images, memory: Memory) -> list[nn.Module]:
        """Networks as the next phase may make them, taken evenly from the model level of a pretended one: exemplars
        must be good for those to come, and what only suits the current one does not last. The pretended classes are
        this phase's, turned. Not part of a checkpoint: the same again if it is interrupted.
        """
        count, epochs, networks = self.config.base_networks - 1, self.config.ahead_epochs, []
        wanted = {math.ceil(epochs * (k + 1) / count) for k in range(count)}
        turned = self._turned(phase, data)
        config = dataclasses.replace(self.config, epochs=epochs, precision=self.precision)
        ahead = Learner(copy.deepcopy(self.net), copy.deepcopy(self.baseline), copy.copy(self.strategy), config)

        def keep(event: dict) -> None:
            """Copy the network after the epochs wanted."""
            if event["event"] == "epoch" and event["epoch"] + 1 in wanted:
                networks.append(_trainable(merge_weights(copy.deepcopy(ahead.net)), self.frozen).eval())

        ahead.report, ahead.tick = keep, self.tick
        ahead.index, ahead.stage, ahead.memory = self.index + 1, "look-ahead", memory
        ahead._begin(len(turned.labels.unique()), turned)
        ahead._model(turned)
        ahead.report = _silent                                # no circle: else all of it may outlive the phase
        return networks

    def _turned(self, phase: Phase, data: Images) -> Images:
        """Every new class turned by a quarter (a half where images are not square), with more --ahead-turns by two and
        three as well, each a class of its own, numbered as the next ones. As many images of each class; none is there
        twice. All new classes: it need not know how many the next phase has."""
        labels, each = data.labels.cpu(), max(1, AHEAD_IMAGES // phase.classes)
        picks = [_shuffled(labels, label, self._random("look-ahead", label))[:each]
                 for label in range(phase.seen, phase.seen + phase.classes)]
        index = torch.cat(picks)
        images = data[index]
        square = images.shape[2] == images.shape[3]
        turns = ((1, 2, 3) if square else (2,))[:min(self.config.ahead_turns, *map(len, picks))]
        turn = torch.cat([torch.arange(len(pick)) % len(turns) for pick in picks])
        for k, quarters in enumerate(turns):
            images[turn == k] = torch.rot90(images[turn == k], quarters, (2, 3))
        labels = (labels[index] + phase.classes * (1 + turn)).to(data.labels.device)
        return Images(images, labels).to(self.device)             # files decode to the host

    def _choose(self, phase: Phase, data: Images, keep: int) -> Memory:
        """Real images of the new classes, as the strategy selects them: `keep` a class, class after class, best
        first."""
        index, picks = torch.nonzero(data.labels.cpu() >= phase.seen).squeeze(1), []     # joint's data holds old ones
        labels = data.labels.cpu()[index]
        features = functools.cache(lambda: self._rows(data.subset(index), self.net.features))   # if a strategy asks
        for label in range(phase.seen, phase.seen + phase.classes):
            mine = torch.nonzero(labels == label).squeeze(1)
            chosen = torch.as_tensor(self.strategy.select(lambda: features()[mine.to(self.device)], len(mine), keep,
                                                          self._random("select", label))).cpu()
            valid = (0 <= chosen) & (chosen < len(mine))
            if chosen.shape != (keep,) or len(chosen[valid].unique()) != keep:
                raise ValueError(f"{type(self.strategy).__name__}.select gave {chosen.tolist()}, not {keep} different "
                                 f"indices of {len(mine)} images")
            picks.append(index[mine[chosen]])
        return self._stored(data, torch.cat(picks), keep, False)

    def _chunks(self, first: int, count: int) -> Sequence[Tensor]:
        return torch.arange(first, first + count).split(self.config.bop_chunk or count)

    def _round(self, jobs: list, batch: list[int], data: Images, done: dict) -> None:
        """One job for each process, then every process has all results; a point to resume from."""
        result = None
        if rank() < len(batch):
            self._doing = f"{jobs[batch[rank()]][0]} {batch[rank()] + 1}/{len(jobs)}"
            result = self._job(*jobs[batch[rank()]], data)
        results = [result] * world()
        if world() > 1:
            dist.all_gather_object(results, result)
        for k, result in zip(batch, results):
            done[k] = result                                  # one by one: what a checkpoint calls done is in the log
            self.report({"event": "exemplars", "phase": self.index, "chunk": k, "chunks": len(jobs),
                         "kind": jobs[k][0], "meta_loss_before": done[k]["before"],
                         "meta_loss_after": done[k]["after"], "gradient": done[k]["gradient"]})

    def _learned(self, memory: Memory, chunk: Tensor) -> Tensor:
        """Which exemplars (N,) of a chunk of classes are optimised."""
        return torch.isin(memory.labels, chunk.to(memory.labels.device)) & ~memory.held & self._standing(memory)

    def _job(self, kind: str, memory: Memory, chunk: Tensor, data: Images) -> dict:
        chosen = memory.select(self._learned(memory, chunk))
        images, labels = chosen.images.to(self.device), chosen.labels.to(self.device)
        seed = (self.config.seed, self.index, kind, int(chunk[0]))
        work = self._extract_job if kind == "extract" else self._adjust_job
        self._gradients = []
        learned, before, after, weight = work(images, labels, data, seed)
        size = float(torch.stack(self._gradients).mean()) if self._gradients else 0.0
        return {"images": learned.cpu(), "before": before, "after": after, "weight": float(weight),
                "gradient": size}

    def _optimise(self, images: Tensor, labels: Tensor, data: Images, seed) -> tuple[Tensor, float, float]:
        def tick(epoch: int, epochs: int, gradient: Tensor) -> None:
            """Progress, and the mean size of the pixels' gradient for the log."""
            self._gradients.append(gradient.abs().mean())
            self.tick(self._doing, epoch, epochs, 1, 1, len(images) * world())     # every process does a chunk

        config = dataclasses.replace(self.config, precision=self.precision)
        return optimise_exemplars(self.net, images, labels, data, data.labels, config, seed=seed, networks=self.starts,
                                  micro_batch=self.micro_batch, tick=tick)

    def _extract_job(self, images: Tensor, labels: Tensor, data: Images, seed) -> tuple:
        """Eq. 9: exemplars of a chunk of new classes against those classes' data D_i."""
        index = torch.nonzero(torch.isin(data.labels.cpu(), labels.cpu())).squeeze(1)
        source = data.subset(index)
        return *self._optimise(images, labels, source, seed), len(source)

    def _adjust_job(self, images: Tensor, labels: Tensor, data: Images, seed) -> tuple:
        """Eq. 10: each part of a chunk's old exemplars against the others, all epochs, one after the other.
        `data` (new classes) is not used: old data is gone."""
        part, generator = torch.empty_like(labels), _generator("cpu", seed, "parts")
        for label in labels.unique():
            mine = _shuffled(labels, label, generator)
            part[mine] = torch.arange(len(mine), device=labels.device) % self.config.subsets
        images, before, after = images.clone(), 0.0, 0.0
        for k in range(self.config.subsets):
            inside, outside = part == k, part != k
            rest = Images(images[outside], labels[outside])
            images[inside], first, last = self._optimise(images[inside], labels[inside], rest, (*seed, k))
            before, after = before + first / self.config.subsets, after + last / self.config.subsets
        return images, before, after, len(labels)

    def _write_back(self, jobs: list, done: dict) -> None:
        """Put all learned images in place and record what it did to losses and grey levels."""
        for memory in {id(job[1]): job[1] for job in jobs}.values():
            memory.images = memory.images.clone()             # a checkpoint may hold the tensor as it was
        for kind, target in (("extract", self.row), ("adjust", self.row.setdefault("adjust", {}))):
            mine = [k for k, job in enumerate(jobs) if job[0] == kind]
            weight = sum(done[k]["weight"] for k in mine)
            shift = count = 0.0
            for k in mine:
                _, memory, chunk = jobs[k]
                mask = self._learned(memory, chunk)
                before = memory.images[mask]
                after = done[k]["images"].to(before.device)
                shift += (after.short() - before.short()).abs().double().mean().item() * len(after)
                count += len(after)
                memory.images[mask] = after
            for when in ("before", "after"):
                total = sum(done[k][when] * done[k]["weight"] for k in mine)
                target[f"meta_loss_{when}"] = total / weight if mine else None
            target["exemplar_shift"] = shift / count if mine else None

    # ---- evaluation ----

    @torch.no_grad()
    def _rows(self, source: Images, function: Callable) -> Tensor:
        """function(normalised images) for every image of a source, in order, float32, shared over the processes."""
        with evaluating(self.net):
            mine = torch.arange(len(source)).tensor_split(world())[rank()]
            pixels = source[torch.zeros(1, dtype=torch.long)].shape[-2:].numel()
            most = min(EVALUATION_BATCH[self.device.type], max(1, EVALUATION_PIXELS // pixels))
            batches = source.batches(mine.split(most))
            rows = [function(self.normalise(images.to(self.device)).contiguous(memory_format=torch.channels_last))
                    for images, _ in batches]
        found = torch.cat(rows)
        if world() == 1:
            return found
        whole = found.new_zeros(len(source), *found.shape[1:])
        whole[mine.to(found.device)] = found                  # zeros elsewhere: the sum is every process's own rows
        dist.all_reduce(whole)
        return whole

    def class_means(self) -> Tensor:
        """Means of the exemplars' and their left-right flips' normalised features, normalised: (K, D)."""
        stored = Images(self.memory.images, self.memory.labels)
        both = self._rows(stored, lambda x: F.normalize(self.net.features(x), dim=1)
                          + F.normalize(self.net.features(x.flip(-1)), dim=1))
        labels = stored.labels.to(self.device)
        means = both.new_zeros(self.net.classifier.classes, both.shape[1]).index_add_(0, labels, both)
        return F.normalize(means, dim=1)

    @torch.no_grad()
    def evaluate(self, source: Images) -> tuple[Tensor, ...]:
        """Per class (K,): images, hits of the classifier, hits of the nearest mean of exemplars; with a cosine
        classifier also hits of both together, the sum of the cosines to its rows and to the means.

        Nearest in Euclidean distance between unit vectors is largest in cosine.
        """
        means, head = self.class_means(), self.net.classifier
        features, labels = self._rows(source, self.net.features), source.labels.to(self.device)
        scores = [self.baseline.correct(head(features)), F.normalize(features, dim=1) @ means.T]
        scores += [head.cosines(features) + scores[1]] if head.cosine else []
        hits = torch.stack([torch.ones_like(labels), *(score.argmax(1) == labels for score in scores)]).float()
        return tuple(hits.new_zeros(len(hits), head.classes).index_add_(1, labels, hits))

    def _finish(self, phase: Phase) -> None:
        """The baseline's last correction, then the test on all classes seen so far (A_i)."""
        kept = self.memory.select(self.memory.held)
        self.baseline.finish(self.net, self.old, lambda: (
            self._rows(Images(kept.images, kept.labels), self.net), kept.labels.to(self.device)))
        count, hits, nearest, *both = self.evaluate(phase.test.to(self.device))
        groups = [row["classes"] for row in self.accuracy] + [phase.seen + phase.classes]
        own = nearest if self.baseline.nearest_mean else hits

        def percent(what: Tensor, low: int = 0, high: Optional[int] = None) -> float:
            """Hits among the test images of some classes."""
            return round(100 * float(what[low:high].sum() / count[low:high].sum().clamp(min=1)), 4)

        self.row = {"phase": self.index, "classes": phase.seen + phase.classes, "accuracy": percent(own),
                    "accuracy_nme": percent(nearest), "accuracy_classifier": percent(hits),
                    **{"accuracy_both": percent(found) for found in both},
                    "initial_accuracy": percent(own, 0, groups[0]),
                    "phase_accuracies": [percent(own, a, b) for a, b in zip([0] + groups, groups)],
                    **self.row, "exemplars": len(self.memory), "exemplar_bytes": self.memory.images.numel()}

    # ---- state ----

    def state_dict(self) -> dict:
        """All that load_state_dict needs to continue from here: tensors, copied where they lie, which waits for
        nothing, and plain containers."""
        return {"index": self.index, "stage": self.stage, "accuracy": copy.deepcopy(self.accuracy),
                "row": copy.deepcopy(self.row), "progress": _copied(self.progress), "net": _pack(self.net),
                "old": None if self.old is None else _copied(self.old.state_dict()),
                "baseline": _copied(self.baseline.state_dict()), "precision": self.precision,
                "untuned": _copied(self.untuned), "micro_batch": self.micro_batch.size, "sample": _copied(self.sample),
                "memory": None if self.memory is None else _copied(vars(self.memory))}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict of a learner with the same network, baseline, strategy and config."""
        _trainable(merge_weights(self.net), self.frozen)      # fine-tuning may have been cut short
        self.old = None
        if state["old"] is not None:
            self.old = self.baseline.teacher(self.net)
            self.old.load_state_dict(state["old"])
        _unpack(self.net, state["net"])
        self.net.eval()                                       # as `_fit` leaves it: a baseline's hooks may call it
        self.baseline.load_state_dict(state["baseline"])
        self.memory = None if state["memory"] is None else Memory(**state["memory"])    # learn_phase knows its place
        self.micro_batch = MicroBatch(state["micro_batch"])
        self.untuned = _copied(state.get("untuned", {}))      # a state older than --finetune-carries has none
        for name in ("index", "stage", "accuracy", "row", "progress", "precision", "sample"):
            setattr(self, name, copy.deepcopy(state[name]))


def _pack(net: IncrementalNet) -> dict:
    """A growing network as tensors and plain numbers."""
    return {"weights": _copied(net.state_dict()),
            "transferred": any(_transferred(m, "weight") for m in _convolutions(net)),
            "frozen": _frozen(net)}


def _unpack(net: IncrementalNet, packed: dict) -> None:
    """Give a network the shape and the weights of a packed one."""
    if packed["transferred"]:
        transfer_weights(net)
    net.load_state_dict(packed["weights"])
    _trainable(net, packed["frozen"])


def _trainable(net: nn.Module, frozen: Sequence[str] = ()) -> nn.Module:
    """All parameters train but these, by name."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter.numel() > 0 and name not in frozen)
    return net


def _frozen(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.numel() and not parameter.requires_grad]


def _copied(value, device=None):
    """A copy of nested containers with their tensors, or the same on another device."""
    if isinstance(value, Tensor):                             # 8-bit images are replaced, never changed in place
        return value.detach().to(device or value.device, copy=device is None and value.dtype != torch.uint8)
    if isinstance(value, dict):
        return {k: _copied(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(v, device) for v in value]
    return value


def _shuffled(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    """Where the labels (N,) are one class's, in a random order."""
    mine = torch.nonzero(labels == label).squeeze(1)
    return mine[torch.randperm(len(mine), generator=generator)]


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """An epoch's order cut into batches. A last one of less than half the size shares evenly with the one before it:
    a step on a few images, at the full rate and into BatchNorm's statistics, costs points (results/)."""
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) < max(size / 2, 2 * world()):
        both = torch.cat(batches[-2:])
        batches[-2:] = both.tensor_split(2 if len(both) >= 4 * world() else 1)      # two images for each process
    return batches


# ------------------------------------------------------------------------------------------------------------------
# 9. Metrics
# ------------------------------------------------------------------------------------------------------------------

def average_incremental_accuracy(accuracies: Sequence[float]) -> float:
    """Mean of A_0 .. A_N, percent."""
    return sum(accuracies) / len(accuracies)


def forgetting_rate(initial_accuracies: Sequence[float]) -> float:
    """F = A_0^Z - A_N^Z, percent; initial_accuracies: A_i^Z, model i on phase 0's test images. Lower is better."""
    return initial_accuracies[0] - initial_accuracies[-1]


# ------------------------------------------------------------------------------------------------------------------
# 10. Run: phases, log, checkpoints, results
# ------------------------------------------------------------------------------------------------------------------

FORMAT = 1
OLDER_RUNS_HAD = {"ahead_epochs": 6, "ahead_turns": 0, "finetune_level": "network", "finetune_scale": 0.0,
                  "finetune_carries": True, "rehearsal": 1, "unrehearsed": 0}
MAPPED_BYTES = 2 ** 28                                        # larger exemplar sets and files stay on disk, mapped
WHERE = ("command", "commit", "hardware", "processes", "versions")       # what config.json says of each part of a run
# What may differ between a run and its resumption.
MAY_DIFFER = ("workers", "device", "data_dir", "out", "resume", "checkpoint_minutes", "keep_phases", "sync_bn")
EXEMPLAR_FIELDS = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["group"] in ("exemplars", "exemplar"))
FREE = (*MAY_DIFFER, "class_order", "dataset_classes")        # the order itself is compared
# What does not determine the network after a phase's model level, given the exemplars before it.
AFTER_MODEL_LEVEL = {*EXEMPLAR_FIELDS, "start_from"} - {"weight_transfer"}
# Beyond those, what does not determine phase 0's network.
NOT_PHASE_0 = ("phases", "weight_transfer", "rehearsal", "unrehearsed", "distill_weight", "temperature", "lucir_lambda",
               "lucir_margin", "lucir_negatives", "validate", "baseline", "per_class", "budget")


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, its only argument, arrived. No Exception: nobody's broad handler takes it for a failure."""


def run(config: Config, train_set, test_set) -> dict:
    """Learn all phases; write log, checkpoints and results to config.out. What both scripts call.

    train_set, test_set: `Images` or another source, labels 0..C-1 as the data set numbers them. Optional attributes
    of train_set: `names` (of the classes, for pictures) and `ids` (what results.json calls them).
    Returns the contents of results.json. Raises UserError, RunError, Interrupted.
    """
    validate(config)
    with _processes(config) as device, _signals():
        config = config.resolved()
        config = dataclasses.replace(config, out=str(_folder_name(config)))
        order = _order(config, train_set)
        train_set, test_set = _reduced(config, train_set, test_set, order)
        phases = phases_of(train_set, test_set, order, split_phases(config.classes, config.phases),
                           BASELINES[config.baseline].cumulative)
        _check_data(config, phases)
        this = _Run(config, phases, order, train_set, device)
        with this.locked:
            return this.go()


@contextlib.contextmanager
def _processes(config: Config):
    """Join the other processes of torchrun, if there are any; gives this process's device."""
    count, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(config.device, local)
    started = count > 1 and not dist.is_initialized()
    set_backends(config.deterministic)
    if started:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12),
                                device_id=device if device.type == "cuda" else None)
    try:
        yield device
    except BaseException:
        started = started and dist.get_backend() != "nccl"    # its farewell waits for the others, who wait for this one
        raise
    finally:
        if started:
            dist.destroy_process_group()


def set_backends(deterministic: bool) -> None:
    """How this process computes. On CUDA float32 means float32, and the fastest algorithms are taken unless repeatable
    ones are asked for. On a CPU memory that a step frees is kept for the next one."""
    _keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _keep_freed_memory() -> None:
    """Tell glibc's malloc not to hand freed memory back to the system: as the heap happens to lie, it did so with all
    of a step's, and paging it in again took a fourth of a step. From 32 MB on tensors are mapped one by one as ever."""
    with contextlib.suppress(OSError, AttributeError, TypeError):             # other systems, other libraries
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 2 ** 25)
        mallopt(trim_threshold, 2 ** 31 - 1)


def pick_device(name: str, local: int = 0) -> torch.device:
    """auto, cpu or cuda -> a device; UserError where CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine has no GPU: {torch.cuda.device_count()} are visible; "
                        "start torchrun with --nproc_per_node of at most that")
    return torch.device("cuda", local)


def _ignore_signals() -> None:
    """From now on: a second one must not cut the last checkpoint short."""
    with contextlib.suppress(ValueError):                     # not the main thread: the caller handles signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)


def leave_signals(_) -> None:
    """In a DataLoader's worker, as its `worker_init_fn`: Ctrl-C is the main process's business, and being terminated
    is no failure, which PyTorch would raise in the main process wherever that is, its own end included."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _as_interrupt(error: BaseException) -> Optional[BaseException]:
    """The interruption that an exception is; None for another failure. A scheduler ends all processes of a job at once,
    and a data loader may miss its workers (as `leave_signals` ends them) before this process sees a signal."""
    if not isinstance(error, RuntimeError):
        return error
    if not ("DataLoader worker" in str(error) and isinstance(error.__cause__, queue.Empty)):
        return None
    return Interrupted(signal.SIGTERM)


@contextlib.contextmanager
def _signals():
    """SIGINT and SIGTERM raise Interrupted inside (main thread only)."""
    def handler(number, _):
        """Ends the run, once it is saved; from then on signals are ignored, and not here: a destructor may run this."""
        raise Interrupted(number)

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:                                        # not the main thread: the caller handles signals
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _folder_name(config: Config) -> Path:
    """--out, or a name made from the settings, so that different settings never share a folder."""
    if config.out:
        return Path(config.out)
    words = [config.dataset, config.baseline, config.exemplars, f"n{config.phases}", f"s{config.seed}"]
    digest = hashlib.blake2b(json.dumps(_settings(config), sort_keys=True).encode(), digest_size=3).hexdigest()
    return Path("runs") / "-".join([*map(str, words), digest])


def _settings(config: Config) -> dict:
    """All that a resumed run must share, as JSON would hold it."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in MAY_DIFFER}


def _order(config: Config, train_set) -> list[int]:
    """The class order as the data set's labels: shuffled by --order-seed, or read from --class-order."""
    named = getattr(train_set, "ids", None)
    ids = named or [str(k) for k in range(config.dataset_classes)]
    last = int(train_set.labels.max()) if len(train_set.labels) else len(ids) - 1
    if last >= len(ids) or last < len(ids) - 1 and not named:      # a class that has a name may be empty, and not used
        raise UserError(f"the data's last class is {last}, and dataset_classes is {len(ids)}: it must be the number of "
                        "all classes, which are numbered from 0")
    if not config.class_order:
        return class_order(len(ids), config.order_seed)
    try:
        words = Path(config.class_order).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        run = _folder_name(config) / "config.json"
        before = load_settings(run.parent) if config.resume and run.exists() else {}
        if before.get("class_order") != config.class_order:
            raise UserError(f"--class-order {config.class_order}: "
                            f"{getattr(error, 'strerror', None) or 'not a text file'}") from None
        words = map(str, before["class_order_used"])          # the file is gone, or named as another directory saw it
    known = {name: k for k, name in enumerate(ids)}
    words = [word.strip() for word in words if word.strip()]
    for number, word in enumerate(words):
        if word not in known:
            raise UserError(f"--class-order {config.class_order}: '{word}' is not a label of the data set "
                            f"({ids[0]} .. {ids[-1]})")
        if words.index(word) < number:
            raise UserError(f"--class-order {config.class_order}: label {word} appears twice")
    if len(words) < config.classes:
        raise UserError(f"--class-order {config.class_order}: {len(words)} labels, {config.classes} are needed")
    return [known[word] for word in words]


def _reduced(config: Config, train_set, test_set, order: Sequence[int]) -> tuple:
    """Keep --train-per-class training images a class; with --validate the others take the test set's place."""
    if config.train_per_class is None:
        return train_set, test_set
    labels, keep, left = train_set.labels.cpu(), [], []
    for label in order[:config.classes]:
        index = _shuffled(labels, label, _generator("cpu", config.seed, "train", label))
        if len(index) < config.train_per_class + config.validate:
            raise UserError(f"--train-per-class {config.train_per_class}: class {label} has {len(index)} training "
                            "images" + (", none would be left to validate on" if config.validate else ""))
        keep.append(index[:config.train_per_class])
        left.append(index[config.train_per_class:])
    reduced = train_set.subset(torch.cat(keep).sort().values)
    for name in ("names", "ids"):
        setattr(reduced, name, getattr(train_set, name, None))
    return reduced, train_set.subset(torch.cat(left).sort().values) if config.validate else test_set


def _fingerprint(source) -> str:
    """Of training data: labels and, where they are in memory (decoders of files differ), every so many-th image."""
    some = source.images[::max(1, len(source) // 16)] if hasattr(source, "images") else source.labels
    content = b"".join(part.cpu().numpy().tobytes() for part in (source.labels, some))
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _check_data(config: Config, phases: Sequence[Phase]) -> None:
    """Every class needs training images for its exemplars, and test images; said before hours are spent."""
    for phase in phases:
        check_counts(phase, sum(quota(config, phase.seen + phase.classes)))
    tests = torch.bincount(phases[-1].test.labels.cpu(), minlength=config.classes)
    if int(tests.min()) == 0:
        raise UserError(f"class {int(tests.argmin())} of the order has no test images")


def atomic_write(path: Path, content) -> None:
    """Write to a temporary name, flush to disk, rename: the old file stays until the new one is whole.

    content: bytes, or a function that writes to an open file. RunError with one line where the disk says no.
    """
    temporary, handled = path.with_name(path.name + ".tmp"), sys.exc_info()[1]
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        hidden = error.__context__                            # by torch.save, unless it was there before
        if isinstance(hidden, KeyboardInterrupt) and hidden is not handled:
            raise hidden from None
        if not isinstance(error, (OSError, RuntimeError)):    # torch.save turns a full disk into a RuntimeError
            raise
        why = getattr(error, "strerror", None) or f"most likely no space is left ({str(error).splitlines()[0]})"
        raise RunError(f"cannot write {path}: {why}; make room or mend the folder and do it again (a run: --resume; "
                       "what was saved before is intact)") from None


def save_tensors(path: Path, value) -> None:
    """torch.save, atomically; the file loads with weights_only=True."""
    atomic_write(path, lambda file: torch.save(value, file))


def _mend(path: Path) -> str:
    """What to do about a file of a run that cannot be read."""
    if path.name == "results.json" and (path.parent / "checkpoint.pt").exists():
        return "delete it, and --resume the run, which writes it anew"
    if path.name == "checkpoint.pt":
        return f"go on from the last phase that is whole, --start-from {path.parent}:PHASE, in another --out"
    return "restore it, or do without this run: start again in another --out"


def load_tensors(path: Path):
    """A file of save_tensors; never runs code from it. The tensors of a large one (MAPPED_BYTES) stay in the file until
    they are touched. UserError if it is missing, not readable or not ours."""
    try:
        mapped = path.stat().st_size >= MAPPED_BYTES
        if not mapped and zipfile.ZipFile(path).testzip():    # PyTorch writes checksums and does not read them
            raise ValueError("wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this the whole folder of a run, not only its results, and not of "
                        "one with --no-keep-phases, which has its last phase alone?") from None
    except Exception as error:                                # truncated, another format, or something that runs code
        raise UserError(f"{path} cannot be read ({type(error).__name__}), it is damaged or not ours: {_mend(path)}"
                        ) from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of this version (format {FORMAT}): {_mend(path)}")
    return saved


def load_memory(folder, phase: int) -> Memory:
    """The exemplars a run had after a phase, from its exemplars_PPP.pt; large ones, UserError: as `load_tensors`."""
    saved = load_tensors(Path(folder) / f"exemplars_{phase:03d}.pt")
    return Memory(**{field.name: saved[field.name] for field in dataclasses.fields(Memory)})


def load_json(path: Path, keys: Sequence[str]) -> dict:
    """A JSON file that holds at least these keys; UserError if it is missing, damaged or somebody else's."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this the folder of a run?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_mend(path)}") from None
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise UserError(f"{path} is not a {path.name} of this program")
    return found


def load_settings(folder) -> dict:
    """The config.json of a run; UserError: as `load_json`."""
    return load_json(Path(folder) / "config.json", ("dataset", "baseline", "versions", "hardware", "precision_used",
                                                    "class_order_used"))


def _to_json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


class _Run:
    """One run and its folder."""

    def __init__(self, config: Config, phases: list[Phase], order: list[int], train_set, device: torch.device):
        self.config, self.phases, self.folder = config, phases, Path(config.out)
        ids = getattr(train_set, "ids", None)
        self.order = [ids[k] if ids else k for k in order[:config.classes]]
        names = getattr(train_set, "names", None) or ids
        self.names = [names[k] if names else str(k) for k in order[:config.classes]]
        self.display = Display(config, phases, live=rank() == 0)
        torch.manual_seed(seed_of(config.seed, "network"))
        baseline = BASELINES[config.baseline]()
        net = _registered("NETWORKS", config.network)(classes=phases[0].classes, cosine=baseline.cosine).to(device)
        if world() > 1 and device.type == "cuda" and config.sync_bn is not False:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.learner = Learner(net, baseline, STRATEGIES[config.exemplars](), config, report=self.on_event,
                               tick=self.display.tick)
        self.about = {**_about(device), "precision_used": self.learner.precision}
        self.settings = json.loads(json.dumps({**dataclasses.asdict(config), **self.about, "class_order_used":
                                               self.order, "data": _fingerprint(phases[0].train)}))
        self.logged: set[tuple] = set()
        self.state: Optional[dict] = None
        self.before, self.started, self.saved = 0.0, time.monotonic(), time.monotonic()
        self.locked = contextlib.ExitStack()

    # ---- the run ----

    def go(self) -> dict:
        """All phases that are left; results.json's contents."""
        self._open()
        self.display.head(self.learner.accuracy, self._place() if self.config.resume else "")
        try:
            for phase in self.phases[self.learner.index:]:
                self.display.begin(phase)
                self.learner.learn_phase(phase)
        except (KeyboardInterrupt, RuntimeError) as error:
            stop = _as_interrupt(error)
            if stop is None:
                raise
            _ignore_signals()
            self.display.clear()
            if self.state is not None:
                self._save()
            stop.folder = self.folder                         # there is something to resume
            raise stop from None
        except OSError as error:
            raise RunError(f"{error.filename or 'the system'}: {error.strerror or error}; mend that, then --resume"
                           ) from None
        finally:
            self.display.clear()
        results = self._results()
        self.display.end(results)
        for line in accuracy_picture(self.folder) if rank() == 0 else ():
            print(line, file=sys.stderr)
        return results

    def _place(self) -> str:
        """Where a resumed run goes on, in words."""
        learner = self.learner
        if self.state is None:
            return "no checkpoint was saved yet: starting over"
        if learner.index == len(self.phases):
            return "finished already"
        stage = f", {learner.stage}" if learner.stage != "begin" else ""
        epoch = f", after epoch {learner.progress['epoch']}" if "epoch" in learner.progress else ""
        return f"going on with phase {learner.index}{stage}{epoch}"

    def seconds(self) -> float:
        """Since the start, resumed parts added up."""
        return self.before + time.monotonic() - self.started

    def on_event(self, event: dict) -> None:
        """The learner reached a point to resume from: log it, and save where it is due."""
        if event["event"] == "phase":
            row = self.learner.accuracy[-1]
            row["seconds"] = event["seconds"] = round(self.seconds() - sum(r["seconds"] for r in
                                                                           self.learner.accuracy[:-1]), 1)
        self._log(event)
        state = self.learner.state_dict() if rank() == 0 else None
        if state and world() > 1:         # now: after an interrupt the device may wait for a process that is gone
            state = _copied(state, "cpu")
        if event["event"] == "model" and rank() == 0:
            self._save_phase("model", state["index"], {"net": state["net"], "baseline": state["baseline"]})
        if event["event"] == "phase":
            self._end_of_phase(state)
        self.state = state                # not before its files are whole: an interrupt saves it as where to go on
        if event["event"] == "phase" or time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes:
            self._save()
        self.display.event(event, self.learner.accuracy)

    def _end_of_phase(self, state: Optional[dict]) -> None:
        if rank() == 0:
            self._save_phase("exemplars", state["index"] - 1, {**state["memory"], "sample": state["sample"]})
            atomic_write(self.folder / "results.json", _to_json(self._results()))
            if state["sample"]:
                atomic_write(self.folder / "exemplars.png", exemplar_picture(state["sample"], self.names))
        images = self.learner.memory.images
        if images.device.type == "cpu" and images.numel() >= MAPPED_BYTES:
            if world() > 1:
                dist.barrier()                                # the file is there; all processes share its pages
            self.learner.memory = load_memory(self.folder, self.learner.index - 1)

    def _save_phase(self, kind: str, phase: int, value: dict) -> None:
        """model_PPP.pt or exemplars_PPP.pt; with --no-keep-phases what no --start-from of this phase needs goes."""
        saved = {"format": FORMAT, "phase": phase, **_copied(value, "cpu")}
        save_tensors(self.folder / f"{kind}_{phase:03d}.pt", saved)
        if not self.config.keep_phases:
            last = phase == len(self.phases) - 1
            old = [f"model_{phase - 1:03d}.pt", f"exemplars_{phase - 2:03d}.pt"] if kind == "model" else []
            for name in old or [f"exemplars_{phase - 1:03d}.pt"] * last:
                (self.folder / name).unlink(missing_ok=True)

    def _save(self) -> None:
        """checkpoint.pt: all that --resume needs."""
        self.saved = time.monotonic()
        if rank() == 0:
            save_tensors(self.folder / "checkpoint.pt", {
                "format": FORMAT, "config": _settings(self.config), "versions": self.about["versions"],
                "seconds": self.seconds(), "learner": _copied(self.state, "cpu")})

    def _results(self) -> dict:
        rows = self.learner.accuracy
        done = len(rows) == len(self.phases)
        return {"config": self.settings, "class_order": self.order, "phases": rows,
                "average_accuracy": average_incremental_accuracy([row["accuracy"] for row in rows]) if rows else None,
                "last_accuracy": rows[-1]["accuracy"] if rows else None,
                "forgetting_rate": forgetting_rate([row["initial_accuracy"] for row in rows]) if rows else None,
                "seconds": round(self.seconds(), 1), "complete": done}

    # ---- opening the folder ----

    def _open(self) -> None:
        """A new folder, a resumed one, or one that starts from another run's phase."""
        config, folder = self.config, self.folder
        exists = any((folder / name).exists() for name in ("config.json", "checkpoint.pt", "results.json"))
        if world() > 1:
            dist.barrier()                                    # all have looked before one of them writes
        if exists and not config.resume:
            raise UserError(f"{folder} holds a run already: add --resume to continue it, or choose another --out")
        if config.resume and not exists:
            raise UserError(f"--resume: there is no run in {folder}: give the --out of its first start, or, where that "
                            "had none, the same settings")
        if exists:
            before = load_settings(folder)
            self._refuse_differences(before, f"--resume: {folder}", FREE)
            if before["class_order_used"] != self.order:
                raise UserError(f"{folder} has another class order: is --class-order or the data folder another?")
            self._refuse_other_data(before, f"--resume: {folder}")
            if rank() == 0:
                self._lock()
            self.learner.precision = before["precision_used"]
            self._resume()
            self._continue_from(before)
        nothing = self.state is None                          # a resumed run may have ended before its first checkpoint
        files = self._borrow(*_dir_and_phase(config.start_from)) if config.start_from and nothing else []
        if not exists and rank() == 0:
            self._create(files)
        if world() > 1:
            dist.barrier()

    def _lock(self) -> None:
        """UserError where another process writes to this folder. A lock ends with its process, however that ends."""
        try:
            import fcntl                                      # not on Windows
        except ImportError:
            return
        path = self.folder / ".lock"
        file = self.locked.enter_context(open(path, "w"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another process is writing to {self.folder}: wait for it or stop it, or choose another "
                            "--out") from None
        except OSError as error:
            print(f"warning: {self.folder} cannot be locked ({error.strerror}): see that no other process writes to it",
                  file=sys.stderr)
        self.locked.callback(path.unlink, missing_ok=True)

    def _create(self, files: Sequence[Path]) -> None:
        """The folder, with copies of another run's files if it starts from one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            (self.folder / "log.jsonl").touch()
        except OSError as error:
            raise UserError(f"--out {self.folder}: {error.strerror}; give a folder that can be made and written to"
                            ) from None
        for path in files:
            atomic_write(self.folder / path.name, path.read_bytes())
        atomic_write(self.folder / "config.json", _to_json(self.settings))

    def _continue_from(self, before: dict) -> None:
        """Keep in the record where the run began, and add where it goes on; a finished run stays as it is."""
        here = {k: self.settings[k] for k in WHERE}
        if self.learner.index == len(self.phases):
            self.settings, results = before, self.folder / "results.json"
            if results.exists():
                load_results(results)                         # a damaged one is said
            elif rank() == 0:
                atomic_write(results, _to_json(self._results()))
            return
        self._compare_places("this run", before)
        kept = {k: before[k] for k in (*here, "precision_used", "started") if k in before}
        self.settings = {**self.settings, **kept, "resumed": [*before.get("resumed", []), here]}
        if rank() == 0:
            atomic_write(self.folder / "config.json", _to_json(self.settings))

    def _compare_places(self, what: str, began: dict) -> None:
        """Say so if a run began on other hardware, or with another PyTorch, than it goes on with."""
        places = [f"{place['hardware']}, torch {place['versions'].get('torch')}" for place in (began, self.about)]
        if places[0] != places[1] and rank() == 0:
            print(f"warning: {what} began on {places[0]} and goes on with {places[1]}: rounding, and so results, can "
                  "differ from a run on one of them", file=sys.stderr)

    def _refuse_differences(self, other: dict, what: str, free: Sequence[str], instead: str = "--out") -> None:
        """UserError naming the first setting in which another run differs, or another version of this module."""
        mine, theirs = ({**settings, "version of mnemonics": place["versions"].get("mnemonics")} for settings, place in
                        ((_settings(self.config), self.about), (_completed(other), other)))
        idle = _idle(mine)
        for name, value in mine.items():
            if name not in free and name not in idle and theirs.get(name) != value:
                raise UserError(f"{what} has {name} = {theirs.get(name)}, this run {value}: give the same, or "
                                f"another {instead}")

    def _refuse_other_data(self, other: dict, what: str) -> None:
        if other.get("data", self.settings["data"]) != self.settings["data"]:                      # older runs: unknown
            raise UserError(f"{what} was trained on other images than these: give the same, or start a new run")

    def _resume(self) -> None:
        """Load checkpoint.pt, if the run got as far as one, and what the log holds already."""
        path = self.folder / "checkpoint.pt"
        log = self.folder / "log.jsonl"
        if log.exists():
            whole = log.read_bytes()
            if rank() == 0 and not whole.endswith(b"\n") and whole:
                os.truncate(log, whole.rfind(b"\n") + 1)                            # a line cut short by a kill
            for number, line in enumerate(whole[:whole.rfind(b"\n") + 1].splitlines(), 1):
                try:
                    self.logged.add(_event_key(json.loads(line)))
                except (ValueError, AttributeError):
                    raise UserError(f"{log}: line {number} is not ours: delete it, and --resume again") from None
        if not path.exists():
            # One was saved at the end of each phase: past the first, files are of use that starting over would lose.
            first = _dir_and_phase(self.config.start_from)[1] if self.config.start_from else 0
            results = self.folder / "results.json"
            if any(phase > first for _, phase, *_ in self.logged) or (
                    results.exists() and len(load_results(results)["phases"]) > first + 1):
                raise UserError(f"--resume: {path} is gone, and starting over would lose what is in {self.folder}: go "
                                f"on from a phase, --start-from {self.folder}:PHASE, in another --out")
            return
        saved = load_tensors(path)
        self._refuse_differences({**saved["config"], "versions": saved["versions"]}, str(path), FREE)
        self.learner.load_state_dict(saved["learner"])
        self.state, self.before = saved["learner"], saved["seconds"]

    def _borrow(self, source: Path, phase: int) -> list[Path]:
        """Take the model level of one phase of another run, to redo all after it. Returns its files to copy."""
        if phase >= len(self.phases):
            raise UserError(f"--start-from {source}:{phase}: this run's phases are 0 to {len(self.phases) - 1}")
        other = load_settings(source)
        free = (*FREE, *AFTER_MODEL_LEVEL, "precision", *(NOT_PHASE_0 if phase == 0 else ()))
        self._refuse_differences(other, f"--start-from {source}", free, "run to start from")
        used = self.learner.precision = self.settings["precision_used"] = other["precision_used"]
        if self.config.precision not in ("auto", used):
            raise UserError(f"--start-from {source}: it was trained in {used}: leave --precision out, or give that")
        mine, theirs = (_registered("BASELINES", name) for name in (self.config.baseline, other["baseline"]))
        held = [quota(dataclasses.replace(self.config, **{k: c.get(k) for k in ("baseline", "per_class", "budget")}),
                      self.phases[0].classes)[1] for c in (other, self.settings)]
        for name, a, b in (("cosine", theirs.cosine, mine.cosine), ("held-out exemplars a class", *held)):
            if a != b:
                raise UserError(f"--start-from {source}: its {other['baseline']} has {name} = {a}, "
                                f"{self.config.baseline} {b}")
        seen = self.phases[phase].seen + self.phases[phase].classes
        if other["class_order_used"][:seen] != self.order[:seen]:
            raise UserError(f"--start-from {source}: its class order is another")
        self._refuse_other_data(other, f"--start-from {source}")
        model = load_tensors(source / f"model_{phase:03d}.pt")
        self._compare_places(f"the run in {source}", other)
        self.settings["started"] = {k: other[k] for k in (*WHERE, "resumed") if k in other}
        learner = self.learner
        state = {**learner.state_dict(), "index": phase, "stage": "exemplars", "net": model["net"]}
        if phase:
            state["memory"] = vars(load_memory(source, phase - 1))
            state["accuracy"] = load_results(source / "results.json")["phases"][:phase]
            state["baseline"] = model["baseline"]
            self.before = sum(row["seconds"] for row in state["accuracy"])
        learner.load_state_dict(state)
        if phase:                                             # after the model level only its presence matters
            learner.old = learner.baseline.teacher(learner.net)
        taken = [f"model_{k:03d}.pt" for k in range(phase + 1)] + [f"exemplars_{k:03d}.pt" for k in range(phase)]
        paths = [source / name for name in (taken if self.config.keep_phases else {taken[phase], taken[-1]})]
        return [path for path in paths if path.exists()]

    def _log(self, event: dict) -> None:
        """Append a line, unless a run before the resumption wrote it."""
        key = _event_key(event)
        if rank() or event["event"] == "model" or key in self.logged:
            return
        self.logged.add(key)
        try:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.folder / 'log.jsonl'}: {error.strerror}; make room, then --resume"
                           ) from None


def _event_key(event: dict) -> tuple:
    return tuple(event.get(k) for k in ("event", "phase", "stage", "epoch", "kind", "chunk"))


def _dir_and_phase(text: str) -> tuple[Path, int]:
    """DIR[:PHASE] -> (folder, phase)."""
    head, _, tail = text.rpartition(":")
    number = tail.isascii() and tail.isdigit()
    if head and not number and Path(head).is_dir() and not Path(text).exists():
        raise UserError(f"--start-from {text}: after the colon comes a phase's number, as in {head}:1")
    return (Path(head), int(tail)) if head and number else (Path(text), 0)


def _about(device: torch.device) -> dict:
    """Versions, hardware and commit, for config.json."""
    try:
        here = Path(__file__).resolve().parent
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True,
                                timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    versions = {"mnemonics": __version__, "torch": torch.__version__.split("+")[0]}
    return {"versions": versions, "hardware": hardware_name(device), "processes": world(), "commit": commit,
            "command": " ".join(sys.argv)}


def hardware_name(device: torch.device) -> str:
    """What a measurement ran on, in words."""
    if device.type == "cuda":
        return f"{world()} x {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def _completed(settings: dict) -> dict:
    """A run's settings, those it is older than as they were then, and its recipe by its name of today."""
    renamed = {"recipe": "default"} if settings.get("recipe") == "pixels" else {}
    return {**OLDER_RUNS_HAD, **settings, **renamed}


def _idle(settings: dict) -> set[str]:
    """Names of the settings that change nothing, given the others."""
    baseline = BASELINES.get(settings["baseline"], Baseline)
    alone = settings["finetune_level"] == "classifier" and baseline.cosine
    idle = set(baseline.unused)
    for used, names in ((settings["finetune"], ("finetune_epochs", "finetune_lr", "finetune_level", "finetune_scale",
                                                "finetune_carries")),
                        (alone, ("finetune_scale",)), (settings["adjust"], ("subsets",)),
                        (settings["base_networks"] > 1, ("ahead_epochs", "ahead_turns")),
                        (settings["base_level"] != "means", ("base_steps", "base_lr", "base_start"))):
        idle |= set() if used else set(names)
    learned = STRATEGIES[settings["exemplars"]].learned
    idle |= set() if learned else {"init"}
    if learned or settings["adjust"]:
        return idle
    level = {name for name in EXEMPLAR_FIELDS if not name.startswith("finetune")}
    return idle | level - {"exemplars", "adjust", "weight_transfer"}


def load_results(path: Path) -> dict:
    """A results.json; UserError if it is missing, damaged or somebody else's."""
    results = load_json(path, ("config", "phases", "complete", "class_order"))
    wanted = {f.name for f in dataclasses.fields(Config)} - OLDER_RUNS_HAD.keys()
    rows = results["phases"] if isinstance(results["phases"], list) else [None]
    if not isinstance(results["config"], dict) or not wanted <= results["config"].keys() or not all(
            isinstance(row, dict) and "accuracy" in row for row in rows):
        raise UserError(f"{path} is not a results.json of this program")
    return {**results, "config": _completed(results["config"])}


def _registered(registry: str, name: str):
    """What a run names in BASELINES, STRATEGIES, NETWORKS, ..., which may be the reader's own; else UserError."""
    known = globals()[registry]
    if name not in known:
        raise UserError(f"'{name}' is not one of {', '.join(known)}: put it into mnemonics.{registry} first")
    return known[name]


def load(folder) -> tuple[nn.Module, Memory]:
    """A finished run's network (evaluation mode, on the CPU) and exemplars, for use elsewhere.

    The network takes normalised floats; `Normalise(config.mean, config.std)` makes them. BiC's correction is part of
    it. Raises UserError where there is no run, or one interrupted inside a phase.
    """
    saved = load_tensors(Path(folder) / "checkpoint.pt")
    config, state = saved["config"], saved["learner"]
    if state["stage"] != "begin" or state["memory"] is None:
        raise UserError(f"{folder}: the run has not finished phase {state['index']}; --resume it first")
    baseline = _registered("BASELINES", config["baseline"])()
    net = _registered("NETWORKS", config["network"])(classes=1, cosine=baseline.cosine)
    _unpack(net, state["net"])
    baseline.load_state_dict(state["baseline"])
    return _trainable(baseline.teacher(net)).eval(), Memory(**state["memory"])


def say(text: str, end: str = "\n") -> bool:
    """Print; a closed stdout is no reason to lose a run. Whether it was open."""
    try:
        print(text, end=end, flush=True)
        return True
    except UnicodeEncodeError:                                # a stdout without that sign
        return say(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), end)
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout = open(os.devnull, "w")                # so that the interpreter's last flush finds nothing
        return False


class Display:
    """Progress on stdout: one live line on a terminal, plain lines in a file, a table row a phase.

    Columns: accuracy on all classes so far, by the baseline's own classifier and by nearest mean of exemplars (nme),
    and on phase 0's classes; meta-level loss of the new exemplars before and after; how far they moved, grey levels.
    """

    HEAD = "phase classes   acc%   nme%  phase0%    meta-loss      shift exemplars  seconds"

    def __init__(self, config: Config, phases: Sequence[Phase], live: bool):
        self.config, self.phases, self.on = config, phases, live
        self.tests = {phase.index: len(phase.test) for phase in phases}      # making a test set copies its images
        self.terminal = bool(live and sys.stdout and sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
        self.phase, self.shown, self.width, self.warned = None, 0.0, 0, False
        self.stage, self.since, self.passes = "", 0.0, 0
        self.rates: dict[str, float] = {}                     # seconds for one image once, by level, as measured here
        self.done: dict[str, float] = {}                      # image passes of this phase, by level

    def say(self, text: str, end: str = "\n") -> None:
        """Print, while somebody reads."""
        self.on = self.on and say(text, end)

    def head(self, rows: list[dict], place: str) -> None:
        """Where the run writes, the table so far, and where a resumed run goes on."""
        config = self.config
        self.say(f"{config.dataset}: {config.classes} classes, {config.baseline}, {config.exemplars} exemplars, "
                 f"{config.phases} phases after phase 0, seed {config.seed}")
        self.say(f"writing to {config.out}")
        if rows:
            self.say("\n".join([self.HEAD, *map(table_row, rows)]))
        if place:
            self.say(place)

    def begin(self, phase: Phase) -> None:
        """A phase starts."""
        self.phase, self.stage, self.done, self.shown = phase, "", {}, time.monotonic()

    def clear(self) -> None:
        """Remove the live line."""
        if self.width:
            self.say("\r" + " " * self.width + "\r", end="")
            self.width = 0

    def tick(self, stage: str, epoch: int, epochs: int, step: int, steps: int, images: int,
             train: Optional[TrainStep] = None) -> None:
        """Called every step of `images` images; draws at most five times a second, and in a file only the exemplar
        level's, which can be long, every half minute."""
        now, level = time.monotonic(), stage if train else "exemplars"
        if stage != self.stage or epoch * steps + step == 1:
            self.stage, self.since, self.passes = stage, now, -images      # timing starts after the first step
        self.passes += images
        if self.passes >= 3 * images:
            self.rates[level] = (now - self.since) / self.passes
        part = (epoch * steps + step) / (epochs * steps)
        self.done[level] = self._passes(self.phase)[level] * part if train else self.done.get(level, 0) + images
        if train and not self.warned and self.passes >= 8 * images:
            self._warn_if_slow()
        if now - self.shown < (0.2 if self.terminal else 30) or (train and not self.terminal):
            return
        loss = f" loss {float(train.total) / max(1, step) / self.config.batch_size:.3f}" if train else ""
        rate = f" {1 / self.rates[level]:.0f} images/s" if train and level in self.rates else ""
        text = f"phase {self.phase.index} {stage} {epoch + 1}/{epochs}{loss}{rate}{self._time_left()}"[:79]
        self.say("\r" + text.ljust(self.width) if self.terminal else text, end="" if self.terminal else "\n")
        self.shown, self.width = now, len(text) if self.terminal else 0

    def _passes(self, phase: Phase) -> dict[str, float]:
        """How often each level of a phase looks at an image; a test, forward only, counts a third."""
        config, learned = self.config, STRATEGIES[self.config.exemplars].learned
        seen = phase.seen + phase.classes
        before, after = (count and sum(quota(config, count)) * count for count in (phase.seen, seen))
        new = after * phase.classes // seen
        shown = lambda classes, count: max(0, count - config.unrehearsed * classes)          # to the model level
        stored, kept = ((0, 0) if BASELINES[config.baseline].cumulative
                        else (shown(phase.seen, before), shown(seen, after)))
        if config.unrehearsed:
            new, after = config.unrehearsed * phase.classes, config.unrehearsed * seen
        optimised = new * learned + (after - new) * config.adjust
        ahead = bool(optimised and config.base_networks > 1) * (config.rehearsal * kept
                                                                + min(AHEAD_IMAGES, len(phase.train)))
        return {"model": config.epochs * (len(phase.train) + config.rehearsal * stored),
                "look-ahead": config.ahead_epochs * ahead,
                "exemplars": config.exemplar_epochs * optimised,
                "finetune": config.finetune_epochs * after if config.finetune and phase.index else 0,
                "test": (self.tests[phase.index] + len(phase.train) + 2 * after) / 3}

    def _seconds_left(self) -> tuple[float, float]:
        """Of this phase, of the run. A level not measured yet is taken to cost what training does, a temporary
        network's steps and their way back four times that each."""
        known = self.rates.get("model", 0.0)
        steps = 1 if self.config.base_level != "network" else 4 * self.config.base_steps
        rate = dict.fromkeys(self._passes(self.phase), known) | {"exemplars": steps * known} | self.rates
        left = {level: max(0.0, count - self.done.get(level, 0)) * rate[level]
                for level, count in self._passes(self.phase).items()}
        later = sum(count * rate[level] for phase in self.phases[self.phase.index + 1:]
                    for level, count in self._passes(phase).items())
        order = list(left)
        here = order[max((order.index(level) for level in self.done), default=0):]             # earlier levels are over
        phase = sum(left[level] for level in here)
        return phase, phase + later

    def _time_left(self) -> str:
        """For the phase, and for the run once a training rate is known."""
        phase, run = map(short_time, self._seconds_left())
        return f", {phase} left{f', run {run}' if 'model' in self.rates else ''}" if self.rates else ""

    def _warn_if_slow(self) -> None:
        """A full schedule on a CPU takes days: say so while nothing is lost yet."""
        self.warned = True
        seconds = self._seconds_left()[1]
        if self.on and pick_device(self.config.device).type == "cpu" and seconds > 6 * 3600:
            self.clear()
            print(f"warning: this run will take about {short_time(seconds)} here; use a GPU, or a reduced schedule "
                  "such as --classes 20 --phases 2 --epochs 20", file=sys.stderr)

    def event(self, event: dict, rows: list[dict]) -> None:
        """A point to resume from was reached."""
        if event["event"] == "epoch" and not self.terminal:
            self.say(f"phase {event['phase']} {event['stage']} epoch {event['epoch'] + 1} loss {event['loss']:.4f} "
                     f"{event['images_per_second']:.0f} images/s{self._time_left()}")
        elif event["event"] == "exemplars" and "chunk" in event and not self.terminal:
            self.say(f"phase {event['phase']} {event['kind']} chunk {event['chunk'] + 1} of {event['chunks']} "
                     f"meta-loss {event['meta_loss_before']:.4f} -> {event['meta_loss_after']:.4f}")
        elif event["event"] == "phase":
            self.clear()
            if len(rows) == 1 or not self.terminal:
                self.say(self.HEAD)
            self.say(table_row(rows[-1]))

    def end(self, results: dict) -> None:
        """What the run came to."""
        self.say(f"average {results['average_accuracy']:.2f}, last {results['last_accuracy']:.2f}, forgetting rate "
                 f"{results['forgetting_rate']:.2f}")
        others = {"nearest mean": _average(results, "accuracy_nme"),
                  "rows and means together": _average(results, "accuracy_both")}
        known = [f"by {how} {value:.2f}" for how, value in others.items() if value is not None]
        self.say(f"average {', '.join(known)}")
        self.say(f"results.json, pictures and networks are in {self.config.out}")


def short_time(seconds: float) -> str:
    """42 s, 3.5 min, 2.1 h."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def table_row(row: dict) -> str:
    """A phase as one line of at most 80 columns, under Display.HEAD."""
    if row.get("meta_loss_before") is None:
        meta, shift = "-", "-"
    else:
        meta, shift = f"{row['meta_loss_before']:.3f} -> {row['meta_loss_after']:.3f}", f"{row['exemplar_shift']:.2f}"
    return (f"{row['phase']:5d} {row['classes']:7d} {row['accuracy']:6.2f} {row['accuracy_nme']:6.2f} "
            f"{row['initial_accuracy']:8.2f} {meta:>16} {shift:>6} {row['exemplars']:9d} {row['seconds']:8.1f}")


# ------------------------------------------------------------------------------------------------------------------
# 11. Report and pictures
# ------------------------------------------------------------------------------------------------------------------

# The paper's numbers: average incremental accuracy for N = 5, 10, 25, then forgetting rate. Key: (baseline, with ours).
TABLE_1 = {
    "cifar100-100": {
        ("lwf", False): (49.59, 46.98, 45.51, 43.36, 43.58, 41.66),
        ("lwf", True): (54.43, 52.67, 51.75, 38.38, 36.66, 33.50),
        ("icarl", False): (57.12, 52.66, 48.22, 31.88, 34.10, 36.48),
        ("icarl", True): (59.88, 57.53, 54.30, 25.28, 27.02, 28.22),
        ("bic", False): (59.36, 54.20, 50.00, 31.42, 32.50, 34.60),
        ("bic", True): (60.67, 58.11, 55.51, 22.42, 24.50, 25.52),
        ("lucir", False): (63.17, 60.14, 57.54, 18.70, 21.34, 26.46),
        ("lucir", True): (64.95, 63.25, 63.70, 11.64, 10.90, 9.96)},
    "imagenet-100": {
        ("lwf", False): (53.62, 47.64, 44.32, 55.32, 57.00, 55.12),
        ("lwf", True): (61.23, 59.24, 59.71, 39.56, 40.44, 39.99),
        ("icarl", False): (65.44, 59.88, 52.97, 43.40, 45.84, 47.60),
        ("icarl", True): (72.55, 70.29, 67.12, 20.00, 24.36, 29.32),
        ("bic", False): (70.07, 64.96, 57.73, 27.04, 31.04, 37.88),
        ("bic", True): (73.16, 71.37, 68.41, 14.52, 17.40, 23.96),
        ("lucir", False): (70.84, 68.32, 61.44, 31.88, 33.48, 35.40),
        ("lucir", True): (73.30, 72.17, 71.50, 10.20, 9.88, 11.76)},
    "imagenet-1000": {
        ("lwf", False): (44.35, 38.90, 36.87, 48.70, 47.94, 49.84),
        ("lwf", True): (52.70, 50.37, 50.79, 37.46, 38.42, 37.95),
        ("icarl", False): (51.50, 46.89, 43.14, 26.03, 33.76, 38.80),
        ("icarl", True): (60.61, 58.62, 53.46, 20.26, 24.04, 17.49),
        ("bic", False): (62.65, 58.72, 53.47, 25.06, 28.34, 33.17),
        ("bic", True): (64.63, 62.71, 60.20, 18.32, 19.72, 20.50),
        ("lucir", False): (64.45, 61.57, 56.56, 24.08, 27.29, 30.30),
        ("lucir", True): (66.15, 63.12, 63.08, 13.63, 13.45, 14.40)}}
# LUCIR with weight transfer. Key: (exemplars, adjusted).
TABLE_2 = {
    "cifar100-100": {
        ("random", False): (63.06, 62.30, 62.06, 19.38, 15.90, 13.91),
        ("random", True): (63.51, 62.47, 61.59, 17.24, 16.01, 13.23),
        ("herding", False): (63.39, 61.50, 60.95, 21.02, 21.18, 20.76),
        ("herding", True): (63.56, 61.79, 61.05, 17.02, 19.76, 16.87),
        ("mnemonics", False): (63.97, 62.34, 62.31, 13.78, 12.35, 10.65),
        ("mnemonics", True): (64.95, 63.26, 63.70, 11.64, 10.90, 9.96)},
    "imagenet-100": {
        ("random", False): (71.34, 70.02, 68.24, 21.67, 17.89, 16.38),
        ("random", True): (71.67, 70.31, 68.02, 17.05, 15.76, 13.27),
        ("herding", False): (71.22, 69.67, 67.45, 21.53, 18.15, 17.96),
        ("herding", True): (72.01, 70.02, 68.00, 21.93, 16.32, 15.91),
        ("mnemonics", False): (72.45, 70.57, 70.78, 20.76, 16.47, 12.68),
        ("mnemonics", True): (73.30, 72.17, 71.50, 10.20, 9.88, 11.76)}}
PAPER_PHASES = (5, 10, 25)
TITLES = {"lwf": "LwF", "icarl": "iCaRL", "bic": "BiC", "lucir": "LUCIR", "joint": "joint"}
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; 1.96 beyond.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
           2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
MEASURES = {"average_accuracy": "average accuracy", "last_accuracy": "last accuracy", "forgetting_rate": "forgetting",
            "average_nme": "average by nearest mean", "average_both": "average by rows and means together"}
OURS = (*EXEMPLAR_FIELDS, "rehearsal", "unrehearsed")
ASIDE = ("start_from", "dataset_classes")      # where a phase came from, of how many classes some were drawn
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")     # Okabe and Ito


def interval(values: Sequence[float]) -> tuple[float, Optional[float]]:
    """(mean, half width of the 95 % interval by Student's t; None for a single value)."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96) * spread / math.sqrt(n)


def _pm(values: Sequence[Optional[float]], sign: str = "") -> str:
    """Mean and interval of the values that are not None; how many those are, if not all."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, half = interval(known)
    return (f"{mean:{sign}.2f}" + (f" ± {half:.2f}" if half is not None else "")
            + (f" ({len(known)})" if len(known) < len(values) else ""))


def _cell(config: dict, which: str) -> Optional[tuple]:
    """The (table key, row, N) of the paper that a run belongs to, or None."""
    key = f"{config['dataset']}-{config['classes']}"
    preset = {"cifar100-100": CIFAR100, "imagenet-100": IMAGENET_SUBSET, "imagenet-1000": IMAGENET}.get(key)
    if preset is None or config["phases"] not in PAPER_PHASES:
        return None
    preset = _settings(preset.resolved())
    free = (*OURS, *ASIDE, "baseline", "phases", "seed", "precision", "deterministic")
    if any(config.get(k) != v for k, v in preset.items() if k not in free or k == "rehearsal"):
        return None
    switches = {k: config[k] for k in UNLEARNED}
    plain = config["exemplars"] == "herding" and not config["finetune"] and switches == UNLEARNED
    own, papers = ({k: RECIPES[recipe][k] for k in UNLEARNED} for recipe in (config["recipe"], "paper"))
    tuned = config["recipe"] == "paper" or not BASELINES.get(config["baseline"], Baseline).corrects
    ours = config["exemplars"] == "mnemonics" and config["finetune"] == tuned and switches == own
    if which == "1" and (plain or ours):
        row = (config["baseline"], ours)
    elif (which, config["baseline"], config["finetune"]) == ("2", "lucir", True) and {
            **switches, "adjust": True} == papers:
        row = (config["exemplars"], config["adjust"])
    else:
        return None
    return (key, row, config["phases"]) if row in (TABLE_1 if which == "1" else TABLE_2).get(key, ()) else None


def find_runs(folders: Sequence[str]) -> list[dict]:
    """Every results.json below the folders, each with its `folder`; a line on stderr for one that cannot be used.
    UserError where there is none."""
    runs, damaged = [], []
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--report {folder}: no such folder")
        for path in sorted(Path(folder).rglob("results.json")):
            try:
                run = load_results(path)
                _registered("STRATEGIES", run["config"]["exemplars"])
                _registered("RECIPES", run["config"]["recipe"])
            except UserError as error:
                damaged.append(error if str(path) in str(error) else UserError(f"{path}: {error}"))
                continue
            config = run["config"]
            config = {**config, "precision": config.get("precision_used", config["precision"]),    # what auto came to
                      "version": config.get("versions", {}).get("mnemonics", "unknown")}
            runs.append({**run, "config": config, "folder": str(path.parent),
                         **{f"average_{how}": _average(run, f"accuracy_{how}") for how in ("nme", "both")}})
    if damaged and not runs:
        raise damaged[0]
    for error in damaged:
        print(f"warning: left out: {error}", file=sys.stderr)
    if not runs:
        unfinished = any(path for folder in folders for path in Path(folder).rglob("config.json"))
        raise UserError(f"--report {' '.join(folders)}: no results.json below" + (
            "; the run there has not finished its first phase" if unfinished else ""))
    return sorted(runs, key=lambda run: run["config"]["version"] != __version__)            # older ones last


def _average(run: dict, name: str) -> Optional[float]:
    """Of a phase's number over all phases; None where one lacks it, as older runs and linear classifiers do."""
    values = [row.get(name) for row in run["phases"]]
    return average_incremental_accuracy(values) if values and None not in values else None


def _one_each(runs: Sequence[dict]) -> list[dict]:
    """One run for each seed of each row: its repeats are no evidence. A finished run goes before an unfinished one."""
    kept = {}
    for run in sorted(runs, key=lambda run: not run["complete"]):
        config = run["config"]
        kept.setdefault((_name(config), _name(config, OURS), config["seed"]), id(run))
    return [run for run in runs if id(run) in kept.values()]


def report(folders: Sequence[str]) -> int:
    """Tables 1 and 2 with our numbers beside the paper's, and all runs by protocol, from results.json files.

    Markdown on stdout, then in table.md of the first folder, curves.png beside it (with matplotlib). Returns 0;
    RunError where that folder cannot be written to.
    """
    found = find_runs(folders)
    runs = _one_each(found)
    lines = []
    for which, paper in (("1", TABLE_1), ("2", TABLE_2)):
        cells = defaultdict(list)
        for run in runs:
            cell = _cell(run["config"], which) if run["complete"] else None
            if cell:
                cells[(*cell, _name(run["config"], (*OURS, "precision", "version")))].append(run)
        for key in paper:
            mine = {cell[1:]: found for cell, found in cells.items() if cell[0] == key}
            lines += _paper_table(f"Table {which}, {key}", paper[key], mine) if mine else []
    lines += _protocols(runs)
    text = "\n".join(lines) + "\n"
    say(text, end="")
    if len(runs) < len(found):
        print(f"{len(found) - len(runs)} repeats of the same settings and seed are left out", file=sys.stderr)
    atomic_write(Path(folders[0]) / "table.md", text.encode())           # after stdout, which may be all there is
    for line in curves_picture(runs, Path(folders[0]) / "curves.png"):
        print(line, file=sys.stderr)
    return 0


def _paper_table(title: str, paper: dict, mine: dict) -> list[str]:
    """One of the paper's tables: each cell is ours, the paper's, and the difference."""
    heads = [f"{name}, N = {n}" for name in ("accuracy", "forgetting") for n in PAPER_PHASES]
    lines = [f"## {title}: ours / paper (difference)", "", "| | " + " | ".join(heads) + " |", "|---" * 7 + "|"]
    for row, values in paper.items():
        title = f"{TITLES[row[0]]}{' w/ mnemonics' if row[1] else ''}" if row[0] in TITLES else (
            f"{row[0]}{'' if row[1] else ' w/o adj.'}")
        for how in sorted({key[2] for key in mine if key[0] == row}):       # recipes, say, are never averaged
            cells = []
            for k, value in enumerate(values):
                found = mine.get((row, PAPER_PHASES[k % 3], how), ())
                ours = [run["average_accuracy" if k < 3 else "forgetting_rate"] for run in found]
                cells.append(f"{_pm(ours)} / {value:.2f} ({interval(ours)[0] - value:+.2f})" if ours else
                             f"- / {value:.2f}")
            lines.append(f"| {title} ({how}) | " + " | ".join(cells) + " |")
    return lines + [""]


def _protocols(runs: Sequence[dict]) -> list[str]:
    """A table for each protocol, and one of the differences between its runs and herding's of the same seeds."""
    blocks = defaultdict(lambda: defaultdict(list))
    for run in runs:
        blocks[_name(run["config"])][_name(run["config"], OURS)].append(run)
    lines, titles = [], " | ".join(["seeds", *MEASURES.values()])
    for protocol, groups in blocks.items():
        done = {name: [run for run in found if run["complete"]] for name, found in sorted(groups.items())}
        lines += [f"## {protocol}", "", f"| exemplars | {titles} |", "|---" * (2 + len(MEASURES)) + "|"]
        for name, mine in done.items():
            left_out = len(groups[name]) - len(mine)
            cells = [name + f" ({left_out} unfinished left out)" * bool(left_out), str(len(mine)),
                     *(_pm([run[m] for run in mine]) for m in MEASURES)]
            lines.append("| " + " | ".join(cells) + " |")
        paired = [line for name, mine in done.items() if mine for line in _paired(done, name)]
        if paired:
            lines += ["", f"| difference, paired by seed | to | {titles} |", "|---" * (3 + len(MEASURES)) + "|"]
            lines += paired
        lines.append("")
    return lines


def _paired(groups: dict, name: str) -> list[str]:
    """Rows of mean and 95 % interval of the differences between runs of the same seed: `name`'s minus each of
    herding's, or herding's own minus the plain ones."""
    own = groups[name][0]["config"]["exemplars"] == "herding"
    bases = ["herding"] if own else [base for base, runs in groups.items() if runs
                                     and runs[0]["config"]["exemplars"] == "herding"]
    rows = []
    for base in bases:
        other = {run["config"]["seed"]: run for run in groups.get(base, ()) if base != name}
        pairs = [(run, other[run["config"]["seed"]]) for run in groups[name] if run["config"]["seed"] in other]
        if pairs:
            gains = [_pm([None if None in (a[m], b[m]) else a[m] - b[m] for a, b in pairs], "+") for m in MEASURES]
            rows.append("| " + " | ".join([name, base, str(len(pairs)), *gains]) + " |")
    return rows


def _name(config: dict, only: Sequence[str] = ()) -> str:
    """What a run differs in from its preset, as flags in short: in `only`, or in its protocol."""
    preset = {"imagenet": IMAGENET_SUBSET}.get(config["dataset"], CIFAR100)
    baseline = BASELINES.get(config["baseline"], Baseline)
    like = dataclasses.replace(preset, exemplars=config["exemplars"], recipe=config["recipe"])
    given = {name: config[name] for name in ("finetune_level", "unrehearsed", "per_class", "budget", "classes")}
    follow = dataclasses.replace(like, **given).resolved(baseline)                  # three defaults follow those
    plain = {**_settings(like.resolved(baseline)), "recipe": "default", "finetune_lr": follow.finetune_lr,
             "bop_chunk": follow.bop_chunk, "finetune_carries": follow.finetune_carries}
    words = [config["exemplars"]] if only else [config["dataset"], config["baseline"]]
    said = {"exemplars", "baseline", "dataset", *ASIDE, *_idle(config)}
    for name, value in plain.items():
        if name in said or (name not in only if only else name in (*OURS, "seed")):
            continue
        mine = config.get(name)
        if mine != value or (not only and name in ("classes", "phases")):
            words.append(name.replace("_", "-") if mine is True else f"no-{name}".replace("_", "-") if mine is False
                         else f"{name.replace('_', '-')} {mine}")
    if config.get("version", __version__) != __version__ and (not only or "version" in only):
        words.append(f"version {config['version']}")                        # it trained in another way: not mixed
    return ", ".join(words)


def _panels(rows: int, columns: int, size: tuple[float, float], heights: Optional[Sequence[float]] = None):
    """A figure and its axes (rows, columns), or None where matplotlib is not installed. heights: of the rows, relative.
    Not by pyplot: what the caller draws elsewhere is left alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(size)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save_figure(figure, path: Path) -> None:
    buffer = io.BytesIO()                                     # what savefig raises has nothing to do with the disk
    figure.savefig(buffer, dpi=110, bbox_inches="tight")
    atomic_write(path, buffer.getvalue())


def curves_picture(runs: Sequence[dict], path: Path) -> list[str]:
    """Figure 4: accuracy after each phase, mean over seeds, one panel for each protocol; a 95 % band from three on.
    Returns lines to warn with."""
    panels = defaultdict(lambda: defaultdict(list))
    for run in (run for run in runs if run["complete"]):
        baseline = run["config"]["baseline"]
        label = f"{TITLES.get(baseline, baseline)}: {_name(run['config'], OURS)}"
        title = _name(run["config"]).replace(f", {run['config']['baseline']}", "")
        panels[title][label].append(run)
    if not panels:
        return [f"{path} is not written: no finished run"]
    heights = [max(3.4, 1 + 0.32 * len(groups)) for groups in panels.values()]          # inches, the legend's at least
    drawn = _panels(len(panels), 1, (7, sum(heights)), heights)
    if drawn is None:
        return [f"{path} is not written: matplotlib is not installed (pip install matplotlib)"]
    figure, axes = drawn
    for axis, (title, groups) in zip(axes[:, 0], panels.items()):
        for k, (label, found) in enumerate(sorted(groups.items())):
            _draw_curve(axis, label, found, COLOURS[k % len(COLOURS)], "-" if k < len(COLOURS) else "--")
        axis.set(xlabel="classes seen", ylabel="accuracy, %", xticks=sorted({row["classes"] for found in groups.values()
                                                                             for row in found[0]["phases"]}))
        axis.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=10)
    figure.tight_layout()                                     # before the legends, which stand outside of the panels
    for axis in axes[:, 0]:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False)
    _save_figure(figure, path)
    return []


def _draw_curve(axis, label: str, runs: Sequence[dict], colour: str, style: str) -> None:
    x = [row["classes"] for row in runs[0]["phases"]]
    points = [interval([run["phases"][k]["accuracy"] for run in runs]) for k in range(len(x))]
    mean = np.array([p[0] for p in points])
    half = np.array([p[1] or 0 for p in points])
    words = f"{label}, {len(runs)} seed{'s' * (len(runs) > 1)}"
    axis.plot(x, mean, style, color=colour, marker="o", markersize=4, label="\n".join(textwrap.wrap(words, 60)))
    if len(runs) > 2:                                         # two seeds' band, 12.7 standard errors, hides all else
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def accuracy_picture(folder: Path) -> list[str]:
    """accuracy.png of one run: its curve, and the paper's average for the same setting where there is one.
    Returns lines to warn with."""
    drawn = _panels(1, 1, (7, 4))
    if drawn is None:
        return [f"{folder / 'accuracy.png'} is not written: matplotlib is not installed (pip install matplotlib)"]
    results = load_results(folder / "results.json")
    (figure, ((axis,),)), rows, config = drawn, results["phases"], results["config"]
    x = [row["classes"] for row in rows]
    for k, (name, label) in enumerate((("accuracy", "all classes seen so far"),
                                       ("accuracy_nme", "the same, nearest mean of exemplars"),
                                       ("initial_accuracy", "phase 0's classes"))):
        axis.plot(x, [row[name] for row in rows], color=COLOURS[k], marker="os^"[k], markersize=5, label=label)
    axis.axhline(results["average_accuracy"], color="0.6", linewidth=1, zorder=0,
                 label=f"average {results['average_accuracy']:.2f}")
    for which, paper in (("1", TABLE_1), ("2", TABLE_2)):
        cell = _cell(config, which)
        if cell:
            value = paper[cell[0]][cell[1]][PAPER_PHASES.index(cell[2])]
            axis.axhline(value, color=COLOURS[3], linestyle="--", label=f"paper's average, Table {which}: {value:.2f}")
            break
    axis.set(xlabel="classes seen", ylabel="accuracy, %", xticks=x, title=f"{config['dataset']}, {config['baseline']}, "
             f"{config['exemplars']}: forgetting rate {results['forgetting_rate']:.2f}")
    axis.legend(fontsize=9, frameon=False)
    _save_figure(figure, folder / "accuracy.png")
    return []


def exemplar_picture(sample: dict, names: Sequence[str], classes: int = 4, wide: int = 10) -> bytes:
    """PNG: for a few classes the initial exemplars, the learned ones under them, and the difference, amplified; `wide`
    images side by side, of several classes where each has few.

    sample: "labels" (N,), "initial" and, where exemplars were optimised, "learned" uint8 (N, 3, H, W). names: of the
    classes, by label.
    """
    from PIL import Image, ImageDraw, ImageFont          # Pillow comes with torchvision

    labels = sample["labels"]
    initial, *learned = (v.permute(0, 2, 3, 1).cpu().numpy().astype(np.int16)
                         for k, v in sample.items() if k != "labels")
    strips = {"kept" if not learned else "initial": initial}
    if learned:
        change = learned[0] - initial
        gain = max(1, min(64, int(127 / max(1.0, float(np.quantile(np.abs(change), 0.999))))))
        strips |= {"learned": learned[0], f"difference x{gain}\n(grey: none)": 128 + gain * change}
    each = min(wide, int(torch.bincount(labels).max()))
    beside = wide // each                                                           # classes in a row
    shown = labels.unique()[:max(classes, beside)].tolist()
    H, W = initial.shape[1:3]
    zoom = max(1, (96 if each == 1 else 64) // H)                                   # wide enough for a name
    cell, left, head, gap = max(H, W) * zoom, 110, 22, 4
    block = head + len(strips) * (cell + gap) + 10
    canvas = Image.new("RGB", (left + min(len(shown), beside) * each * (cell + gap), block * -(-len(shown) // beside)),
                       "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for place, label in enumerate(shown):
        row, right = place // beside * block, left + place % beside * each * (cell + gap)
        index = torch.nonzero(labels == label).squeeze(1)[:each].tolist()
        draw.text((right, row + 3), str(names[label]), fill="black", font=font)
        for k, (title, strip) in enumerate(strips.items()):
            top = row + head + k * (cell + gap)
            if place % beside == 0:
                draw.text((4, top + cell // 2 - 8), title, fill="black", font=font)
            for column, i in enumerate(index):
                tile = Image.fromarray(strip[i].clip(0, 255).astype(np.uint8)).resize((W * zoom, H * zoom), 0)
                canvas.paste(tile, (right + column * (cell + gap), top))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def embedding(folder: str, load_data: Callable, preset: Config, given: dict, classes: int = 5) -> int:
    """Figure 5 from a finished run: embedding.png with real images (light) and exemplars (dark) of phase 0's first
    classes, other classes grey, as the first and the last phase's network see them. Returns 0.

    preset, given: the script's preset and the flags of this call (--data-dir, --workers). t-SNE where scikit-learn is
    installed, else PCA, and the picture says which. UserError without matplotlib.
    """
    folder = Path(folder)
    results = load_results(folder / "results.json")
    config = dataclasses.replace(config_of(f"--embedding {folder}", results["config"], preset), **given)
    last = results["phases"][-1]["phase"]
    for phase in (0, last):
        if not (folder / f"model_{phase:03d}.pt").exists():
            raise UserError(f"--embedding {folder}: it lacks model_{phase:03d}.pt, as a run with --no-keep-phases "
                            "does, and results that were published without networks: give a whole run's folder")
    train_set, test_set = load_data(config)
    ids = getattr(train_set, "ids", None)
    if ids and not set(results["class_order"]) <= set(ids):
        raise UserError(f"--embedding {folder}: --data-dir {config.data_dir} lacks classes of that run")
    order = [ids.index(name) for name in results["class_order"]] if ids else results["class_order"]
    test = phases_of(train_set.subset(torch.arange(1)), test_set, order, [len(order)])[0].test
    drawn = _panels(1, 2 if last else 1, (11 if last else 6, 5))
    if drawn is None:
        raise UserError("--embedding needs matplotlib: pip install matplotlib")
    figure, axes = drawn
    for axis, phase in zip(axes[0], (0, last)):
        kind = _embed_phase(axis, folder, config, phase, results["phases"][phase]["classes"], test, classes)
        axis.set_title(f"after phase {phase}, {kind}", fontsize=11)
    names = getattr(train_set, "names", None) or ids or [str(k) for k in range(config.dataset_classes)]
    marks = [axes[0, 0].plot([], [], "o", color=COLOURS[c], label=str(names[order[c]]))[0]
             for c in range(min(classes, results["phases"][0]["classes"]))]
    figure.legend(handles=marks, loc="lower center", ncols=len(marks), frameon=False)
    figure.subplots_adjust(bottom=0.13)
    _save_figure(figure, folder / "embedding.png")
    print(f"{folder / 'embedding.png'} written")
    return 0


@torch.no_grad()
def _embed_phase(axis, folder: Path, config: Config, phase: int, seen: int, test, classes: int) -> str:
    """Draw one network's view; returns the name of the projection."""
    packed = load_tensors(folder / f"model_{phase:03d}.pt")["net"]
    memory = load_memory(folder, phase)
    net = _registered("NETWORKS", config.network)(classes=1, cosine=_registered("BASELINES", config.baseline).cosine)
    _unpack(net, packed)
    net.eval()
    normalise = Normalise(config.mean, config.std)
    index = torch.nonzero(test.labels.cpu() < seen).squeeze(1)
    index = index[torch.randperm(len(index), generator=_generator("cpu", config.seed, "embed"))[:60 * seen]][:1500]
    shown = memory.labels < classes
    images = torch.cat([test[index].cpu(), memory.images[shown]])
    labels = torch.cat([test.labels.cpu()[index], memory.labels[shown]])
    found = torch.cat([net.features(normalise(part)) for part in images.split(250)])
    points, kind = project(F.normalize(found, dim=1), config.seed)
    real = torch.arange(len(labels)) < len(index)
    others = real & (labels >= classes)
    axis.scatter(*points[others].T, s=6, color="0.85", linewidths=0)
    for label in range(min(classes, seen)):
        mine = labels == label
        axis.scatter(*points[mine & real].T, s=14, color=COLOURS[label], alpha=0.3, linewidths=0)
        axis.scatter(*points[mine & ~real].T, s=34, color=COLOURS[label], edgecolors="black", linewidths=0.7)
    axis.set(xticks=[], yticks=[])
    return kind


def project(features: Tensor, seed: int) -> tuple[np.ndarray, str]:
    """(N, D) -> (N, 2) and the method's name: t-SNE with scikit-learn, PCA without."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        centred = features - features.mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        return (centred @ directions.T).numpy(), "PCA (scikit-learn is not installed)"
    tsne = TSNE(2, perplexity=min(30.0, (len(features) - 1) / 3), init="pca", random_state=seed % 2 ** 32)
    return tsne.fit_transform(features.numpy()), "t-SNE"


# ------------------------------------------------------------------------------------------------------------------
# 12. Command line
# ------------------------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        """UserError instead of usage and exit."""
        raise UserError(f"{message} (see --help)")


def build_parser(preset: Config, description: str, epilog: str, hidden: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line, made from Config's fields; defaults are the preset's."""
    parser = _Parser(description=description, epilog=epilog, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items() if key not in hidden}
    either = {"per_class": groups["protocol"].add_mutually_exclusive_group(),
              "order_seed": groups["protocol"].add_mutually_exclusive_group()}
    either |= {"budget": either["per_class"], "class_order": either["order_seed"]}
    for field in dataclasses.fields(preset):
        meta = field.metadata
        if meta["group"] in groups:
            _add_flag(either.get(field.name, groups[meta["group"]]), field, getattr(preset, field.name))
    looking = parser.add_argument_group("looking")
    looking.add_argument("--report", nargs="+", metavar="DIR", help="no training: tables of finished runs below "
                         "these folders on stdout; table.md and curves.png in the first")
    looking.add_argument("--embedding", metavar="DIR", help="no training: the paper's Figure 5 from a finished run")
    return parser


def _add_flag(group, field: dataclasses.Field, default) -> None:
    """One flag from a field's metadata: type, choices, help with the default and its source."""
    meta = field.metadata
    kind = {"int": int, "float": float, "str": str, "bool": bool}[re.sub(r"Optional\[(.*)\]", r"\1", field.type)]
    if field.name in RECIPES["paper"]:
        ours, papers = (_shown(RECIPES[recipe][field.name]) for recipe in ("default", "paper"))
        shown, source = ours + f"; with --recipe paper: {papers}" * (ours != papers), "results/; paper, sec. 5"
    else:
        shown, source = meta["auto"] if default is None else _shown(default), ""
    source = meta["source"] or source
    text = f"{meta['help']} (default: {shown}{'; ' * bool(source)}{source})".replace("%", "%%")
    flag = "--" + field.name.replace("_", "-")
    if kind is bool and field.default is False:
        group.add_argument(flag, action="store_true", default=None, help=text)
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        choices = _choices(meta.get("choices")) or None
        group.add_argument(flag, type=kind, choices=choices, default=None, help=text,
                           metavar=meta.get("metavar") or (None if choices else kind.__name__.upper()[:1]))


def _shown(value) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def parse_config(preset: Config, args: argparse.Namespace) -> Config:
    """The preset, or with --resume and --out that run's settings, and the flags that were given."""
    names = {field.name for field in dataclasses.fields(preset)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    folder = Path(given.get("out", ""))
    if given.get("resume") and "out" in given:
        preset = config_of(f"--resume {folder}", load_settings(folder), preset)
    return dataclasses.replace(preset, **given)


def config_of(what: str, settings: dict, preset: Config) -> Config:
    """The Config of a run, from its config.json; UserError where it is one of another data set than the preset's."""
    if settings["dataset"] != preset.dataset:
        advice = ("add --demo" if settings["dataset"] == "demo" else "leave --demo out" if preset.dataset == "demo" else
                  "use that data set's script")
        raise UserError(f"{what} is a run on {settings['dataset']}, not {preset.dataset}: {advice}")
    names, had = {field.name for field in dataclasses.fields(Config)}, _completed(settings)
    if not had["ahead_turns"]:                                # a way that is gone; whoever compares will say so
        del had["ahead_turns"]
    return dataclasses.replace(preset, **{k: v for k, v in had.items() if k in names})


def _say_idle(names: set[str]) -> None:
    """A warning that these flags change nothing; no error, so that one command line serves to compare strategies."""
    flags = ", ".join("--" + name.replace("_", "-") for name in sorted(names))
    if flags and os.environ.get("RANK", "0") == "0":
        print(f"warning: without effect here: {flags}", file=sys.stderr)


def command(work: Callable[[], int], prog: str, argv: Sequence[str]) -> int:
    """Do the work of a script; every failure is one line on stderr and an exit status, never a traceback."""
    try:
        with _signals():
            return work()
    except SystemExit as stop:                                # --help
        return int(stop.code or 0)
    except UserError as error:
        return _fail(2, str(error))
    except RunError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt as stop:
        resume = f"; continue with: {_resumption(prog, argv)}" if hasattr(stop, "folder") else ""
        return _fail(128 + (*stop.args, signal.SIGINT)[0], "interrupted" + resume)
    except OSError as error:
        return _fail(2, f"{error.filename or 'input or output'}: {error.strerror or error}")
    except Exception as error:
        if os.environ.get("MNEMONICS_TRACEBACK"):
            raise
        if isinstance(_as_interrupt(error), Interrupted):
            return _fail(128 + signal.SIGTERM, "interrupted")
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):                # PyTorch's, on a CPU
            return _fail(1, "out of memory: close other programs and --resume, or start again in another --out with a "
                         "lower --batch-size or --meta-batch")
        if _out_of_memory(error):
            return _fail(1, "CUDA is out of memory at the model level: start again in another --out with a lower "
                         "--batch-size, or close other programs and --resume")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and re.search("gloo|NCCL|onnection|peer|Timeout", str(error)):
            return _fail(1, f"process {os.environ.get('RANK')} lost another process: see that one's line, then "
                         "--resume")
        return _fail(1, f"{type(error).__name__}: {str(error)[:300]} (MNEMONICS_TRACEBACK=1 shows where; what was "
                     "saved is intact)")


def _resumption(prog: str, argv: Sequence[str]) -> str:
    """The command that goes on with an interrupted run."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if several else "python"
    script = sys.argv[0] if argv == sys.argv[1:] else prog           # which may be another that registers its own
    return f"{start} {shlex.join([script, *(word for word in argv if word != '--resume'), '--resume'])}"


def _fail(status: int, message: str) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def main(preset: Config, load_data: Callable, argv: Optional[Sequence[str]], *, prog: str, description: str,
         epilog: str, hidden: Sequence[str] = (), modes: Optional[dict] = None, idle_flags: Sequence[str] = ()) -> int:
    """What both scripts do: parse, look or train. load_data(config) -> (train_set, test_set).

    modes: further flags {name: (help, function(config) -> int, the flags it has a use for)} that do something other
    than train; None where it trains. idle_flags: those that load_data has no use for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        """All that can fail, inside `command`."""
        parser = build_parser(preset, description, epilog, hidden)
        for name, (text, *_) in (modes or {}).items():
            parser.add_argument("--" + name, action="store_true", default=None, help=text)
        args = parser.parse_args(argv)
        given = {name for name, value in vars(args).items() if value is not None}
        idle = {"report": given, "embedding": given - {"demo", "data_dir", "workers"},
                "benchmark": {"demo", "out", "resume", "start_from"}}
        for mode in (mode for mode in idle if mode in given):
            for other in sorted(given & idle[mode] - {mode}):
                raise UserError(f"--{mode} has no use for --{other.replace('_', '-')}: leave it out")
        for mode in ("report", "embedding"):
            if mode in given and "" in (getattr(args, mode), *(args.report or ())):
                raise UserError(f"--{mode} is empty: give a run's folder")
        if args.report:
            return report(args.report)
        if args.embedding:
            return embedding(args.embedding, load_data, preset, {k: getattr(args, k) for k in ("data_dir", "workers")
                                                                 if getattr(args, k) is not None})
        config = parse_config(preset, args)
        validate(config)
        for name, (_, function, used) in (modes or {}).items():
            if getattr(args, name) and function is not None:
                _say_idle(given - {name, *used})
                return function(config)
        _say_idle(given & (_idle(vars(config.resolved())) | set(idle_flags)))
        run(config, *load_data(config))
        return 0

    return command(work, prog, argv)


# ------------------------------------------------------------------------------------------------------------------
# 13. Kernels: when oneDNN's layout, CUDA streams, and residual blocks in Triton
# ------------------------------------------------------------------------------------------------------------------

ONEDNN_FROM = 2 ** 17                                        # numbers in a batch of images


def _for_onednn(net: nn.Module, x: Tensor) -> bool:
    """Whether a backbone of `Conv2d` had better see x in oneDNN's layout: in a bfloat16 training step on a CPU, where
    BatchNorm and ReLU take two to five times as long in PyTorch's own. Small batches do not earn what each layer's
    change of layout costs. Forward hooks inside the backbone see that layout: tensor.to_dense() turns it back."""
    return (x.device.type == "cpu" and x.numel() >= ONEDNN_FROM and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.backends.mkldnn.enabled
            and not torch.compiler.is_compiling() and not torch.is_anomaly_enabled()
            and _onednn_works() and all(map(_knows_onednn, net.modules())))


def _knows_onednn(module: nn.Module) -> bool:
    """Whether a module of a backbone computes in that layout, backward too where gradients are on."""
    if isinstance(module, nn.BatchNorm2d):                    # unchecked there: other types of weight crash the process
        return (module.affine and module.weight.dtype == torch.float32
                and (module.training or not torch.is_grad_enabled()))
    known = (Conv2d, nn.ReLU, nn.MaxPool2d, nn.Identity, _Transfer)
    return isinstance(module, known) or next(module.children(), None) is not None


@functools.cache
def _onednn_works() -> bool:
    """Whether this CPU and this PyTorch take a step of a network in that layout, and fast: measured with AVX-512
    alone. Tried once, on a small one."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        net, x = ResNet((1,), (16,), True, True).float(), torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)
        try:
            net.stages(net.stem(x.to_mkldnn())).to_dense().sum().backward()
        except RuntimeError:
            return False
    return True


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def _new_stream(device: torch.device) -> "torch.cuda.Stream":
    """Another than `_side_stream`'s: PyTorch hands out 32 in turn."""
    stream = torch.cuda.Stream(device)
    return torch.cuda.Stream(device) if stream == _side_stream(device) else stream


@contextlib.contextmanager
def beside(device: torch.device):
    """Yields a context whose work has a CUDA stream of its own, beside all other work inside this one; afterwards its
    results may be read. On a CPU work is done in order."""
    if device.type != "cuda":
        yield contextlib.nullcontext
        return
    main, side, used = torch.cuda.current_stream(device), _side_stream(device), []

    @contextlib.contextmanager
    def aside():
        """After what was begun so far."""
        side.wait_stream(main)
        used.append(True)
        with torch.cuda.stream(side):
            yield

    try:
        yield aside
    finally:                                                  # after an error too: what is freed may be in use
        if used:                                              # a capture may not wait for what it did not begin
            main.wait_stream(side)


_KERNELS: list = []                                           # Triton compiles them where a GPU first needs them


def _kernel(function: Callable) -> Callable:
    """A Triton kernel, or a part of one. `tl` is triton.language, which `_compile_kernels` imports."""
    _KERNELS.append(function)
    return function


@_kernel
def _moments(sums, c, count, C: tl.constexpr, COPIES: tl.constexpr):
    """The two sums of each channel c over count numbers, divided by it."""
    rows = tl.arange(0, COPIES)[:, None] * (2 * C) + c[None, :]
    return tl.sum(tl.load(sums + rows), 0) / count, tl.sum(tl.load(sums + rows + C), 0) / count


@_kernel
def _scaling(sums, gamma, beta, c, count, eps, C: tl.constexpr, COPIES: tl.constexpr):
    """Of a BatchNorm over a batch: its mean, 1 / its deviation, and what it multiplies by and adds."""
    mean, square = _moments(sums, c, count, C, COPIES)
    inverse = 1 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    scale = tl.load(gamma + c) * inverse
    return mean, inverse, scale, tl.load(beta + c) - mean * scale


@_kernel
def _add_sums(sums, c, first, second, C: tl.constexpr, COPIES: tl.constexpr):
    """Two more sums over rows."""
    own = sums + (tl.program_id(0) % COPIES) * (2 * C) + c
    tl.atomic_add(own, tl.sum(first, 0), sem="relaxed")
    tl.atomic_add(own + C, tl.sum(second, 0), sem="relaxed")


@_kernel
def _track(sums, c, mean, var, batches, count, momentum, C: tl.constexpr, COPIES: tl.constexpr):
    """A BatchNorm's running statistics, as nn.BatchNorm2d keeps them."""
    now, square = _moments(sums, c, count, C, COPIES)
    spread = tl.maximum(square - now * now, 0.0) * count / (count - 1)
    tl.store(mean + c, (1 - momentum) * tl.load(mean + c) + momentum * now)
    tl.store(var + c, (1 - momentum) * tl.load(var + c) + momentum * spread)
    tl.store(batches, tl.load(batches) + 1)


@_kernel
def _patches(x, m, pixels, kh, tap, c, HIGH: tl.constexpr, WIDE: tl.constexpr, IN: tl.constexpr, K: tl.constexpr,
             STRIDE: tl.constexpr, BACK: tl.constexpr, SIDE: tl.constexpr):
    """What entries (kh, tap) of a K x K kernel see of channels c of x at groups m of SIDE output pixels: (BM, len(c)),
    zeros outside. BACK: of the transposed convolution. HIGH, WIDE: of the output."""
    step: tl.constexpr = 1 if BACK else STRIDE
    wide: tl.constexpr = WIDE // SIDE
    h = m // wide % HIGH * step + kh - K // 2
    w = (m % wide * (SIDE * step) - K // 2)[:, None] + tap[None, :]
    rows, columns = HIGH * step, WIDE * step                  # of x, before a transposed one's zeros are left out
    inside = ((m < pixels // SIDE) & (h >= 0) & (h < rows))[:, None] & (w >= 0) & (w < columns)
    inside = inside & ((tap < K + SIDE - 1) & (c < IN))[None, :]
    if BACK and STRIDE > 1:
        inside = inside & (h % STRIDE == 0)[:, None] & (w % STRIDE == 0)
        h, w, rows, columns = h // STRIDE, w // STRIDE, rows // STRIDE, columns // STRIDE
    start = (m // (wide * HIGH) * rows + h) * columns
    return tl.load(x + (start[:, None] + w) * IN + c[None, :], inside, 0.0)


@_kernel
def _product(x, weight, m, pixels, s_out, s_in, s_h, s_w, HIGH: tl.constexpr, WIDE: tl.constexpr, IN: tl.constexpr,
             OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, BACK: tl.constexpr, SIDE: tl.constexpr,
             TAPS: tl.constexpr, BM: tl.constexpr):
    """Groups m of output pixels of a convolution, or of a transposed one: float32 (BM, SIDE * OUT)."""
    DEEP: tl.constexpr = 16 if IN < 16 else IN                # the least that tensor cores multiply
    j, out = tl.arange(0, TAPS * DEEP), tl.arange(0, SIDE * OUT)
    c = j % DEEP
    result = tl.zeros([BM, SIDE * OUT], tl.float32)
    for kh in tl.static_range(K):
        for first in tl.static_range(0, K, TAPS):
            value = _patches(x, m, pixels, kh, first + j // DEEP, c, HIGH, WIDE, IN, K, STRIDE, BACK, SIDE)
            tap = (first + j // DEEP)[:, None] - (out // OUT)[None, :]
            at_h, at_w = (K - 1 - kh, K - 1 - tap) if BACK else (kh, tap)
            where = at_h * s_h + at_w * s_w + c[:, None] * s_in + (out % OUT)[None, :] * s_out
            kernel = tl.load(weight + where, (tap >= 0) & (tap < K) & (c < IN)[:, None], 0.0).to(x.dtype.element_ty)
            result = tl.dot(value, kernel, result, input_precision="ieee")
    return result


@_kernel
def _forward_kernel(x, weight, y, sums, pixels, s_out, s_in, s_h, s_w, HIGH: tl.constexpr, WIDE: tl.constexpr,
                    IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, SIDE: tl.constexpr,
                    TAPS: tl.constexpr, BM: tl.constexpr, COPIES: tl.constexpr):
    """A convolution, with the sums that the norm after it needs."""
    m, out = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, SIDE * OUT)
    value = _product(x, weight, m, pixels, s_out, s_in, s_h, s_w, HIGH, WIDE, IN, OUT, K, STRIDE, False, SIDE, TAPS, BM)
    value = value.to(y.dtype.element_ty)
    tl.store(y + m[:, None] * (SIDE * OUT) + out[None, :], value, (m < pixels // SIDE)[:, None])
    value = value.to(tl.float32)
    _add_sums(sums, out % OUT, value, value * value, OUT, COPIES)


@_kernel
def _plain_kernel(x, weight, bias, other, y, pixels, s_out, s_in, s_h, s_w, HIGH: tl.constexpr, WIDE: tl.constexpr,
                  IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, BACK: tl.constexpr,
                  ADD: tl.constexpr, RELU: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr, BM: tl.constexpr):
    """relu(convolution + bias + other), the last two where wanted; or, without a bias, back through a convolution."""
    m, out = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, SIDE * OUT)
    value = _product(x, weight, m, pixels, s_out, s_in, s_h, s_w, HIGH, WIDE, IN, OUT, K, STRIDE, BACK, SIDE, TAPS, BM)
    at, valid = m[:, None] * (SIDE * OUT) + out[None, :], (m < pixels // SIDE)[:, None]
    if not BACK:
        value += tl.load(bias + out % OUT)[None, :]
    if ADD:
        value += tl.load(other + at, valid, 0.0)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), valid)


@_kernel
def _norm_kernel(x, sums, gamma, beta, mean, var, batches, other, o_sums, o_gamma, o_beta, o_mean, o_var, o_batches, y,
                 momentum, eps, pixels, C: tl.constexpr, ADD: tl.constexpr, PROJECT: tl.constexpr,
                 RELU: tl.constexpr, BM: tl.constexpr, COPIES: tl.constexpr):
    """relu(norm(x) + other), the last two where wanted, other normed too where it is projected; running statistics."""
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    at, valid = m[:, None] * C + c[None, :], (m < pixels)[:, None]
    _, _, scale, shift = _scaling(sums, gamma, beta, c, pixels, eps, C, COPIES)
    value = tl.load(x + at, valid, 0.0) * scale[None, :] + shift[None, :]
    if ADD:
        added = tl.load(other + at, valid, 0.0).to(tl.float32)
        if PROJECT:
            _, _, scale, shift = _scaling(o_sums, o_gamma, o_beta, c, pixels, eps, C, COPIES)
            added = added * scale[None, :] + shift[None, :]
        value += added
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), valid)
    if tl.program_id(0) == 0:
        _track(sums, c, mean, var, batches, pixels, momentum, C, COPIES)
        if PROJECT:
            _track(o_sums, c, o_mean, o_var, o_batches, pixels, momentum, C, COPIES)


@_kernel
def _gate_kernel(grad, y, gated, x, sums, gamma, beta, back, other, o_sums, o_gamma, o_beta, o_back, eps, pixels,
                 C: tl.constexpr, PROJECT: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr,
                 COPIES: tl.constexpr):
    """Back through the last relu, and the sums that the norms before it need."""
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    at, valid = m[:, None] * C + c[None, :], (m < pixels)[:, None]
    g = tl.load(grad + at, valid, 0.0)
    if RELU:
        g = tl.where(tl.load(y + at, valid, 0.0) > 0, g, 0.0).to(gated.dtype.element_ty)
        tl.store(gated + at, g, valid)
    g = g.to(tl.float32)
    mean, inverse, _, _ = _scaling(sums, gamma, beta, c, pixels, eps, C, COPIES)
    _add_sums(back, c, g, g * (tl.load(x + at, valid, 0.0) - mean[None, :]) * inverse[None, :], C, COPIES)
    if PROJECT:
        mean, inverse, _, _ = _scaling(o_sums, o_gamma, o_beta, c, pixels, eps, C, COPIES)
        _add_sums(o_back, c, g, g * (tl.load(other + at, valid, 0.0) - mean[None, :]) * inverse[None, :], C, COPIES)


@_kernel
def _norm_back_kernel(grad, x, sums, gamma, beta, back, by_gamma, by_beta, y, eps, pixels, C: tl.constexpr,
                      BM: tl.constexpr, COPIES: tl.constexpr):
    """Back through a norm: by its input, and by its parameters."""
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    at, valid = m[:, None] * C + c[None, :], (m < pixels)[:, None]
    mean, inverse, scale, _ = _scaling(sums, gamma, beta, c, pixels, eps, C, COPIES)
    average, along = _moments(back, c, pixels, C, COPIES)
    normed = (tl.load(x + at, valid, 0.0) - mean[None, :]) * inverse[None, :]
    value = scale[None, :] * (tl.load(grad + at, valid, 0.0) - average[None, :] - normed * along[None, :])
    tl.store(y + at, value.to(y.dtype.element_ty), valid)
    if tl.program_id(0) == 0:
        tl.store(by_gamma + c, along * pixels)
        tl.store(by_beta + c, average * pixels)


@_kernel
def _back_gate_kernel(grad, weight, y, x, sums, gamma, beta, back, eps, pixels, s_out, s_in, s_h, s_w,
                      HIGH: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr,
                      BM: tl.constexpr, COPIES: tl.constexpr):
    """Back through the second convolution and the relu before it, with the sums that the first norm needs."""
    m, out = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, SIDE * C)
    at, valid, c = m[:, None] * (SIDE * C) + out[None, :], (m < pixels // SIDE)[:, None], out % C
    value = _product(grad, weight, m, pixels, s_out, s_in, s_h, s_w, HIGH, WIDE, C, C, 3, 1, True, SIDE, TAPS, BM)
    mean, inverse, scale, shift = _scaling(sums, gamma, beta, c, pixels, eps, C, COPIES)
    before = tl.load(x + at, valid, 0.0).to(tl.float32)
    value = tl.where(before * scale[None, :] + shift[None, :] > 0, value, 0.0).to(y.dtype.element_ty)
    tl.store(y + at, value, valid)
    value = value.to(tl.float32)
    _add_sums(back, c, value, value * (before - mean[None, :]) * inverse[None, :], C, COPIES)


@_kernel
def _weight_kernel(x, grad, by_weight, pixels, s_out, s_in, s_h, s_w, EACH: tl.constexpr, HIGH: tl.constexpr,
                   WIDE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
                   SIDE: tl.constexpr, TAPS: tl.constexpr, BM: tl.constexpr):
    """By TAPS entries of a convolution's weight: of EACH groups of pixels, added to what other programs find."""
    DEEP: tl.constexpr = 16 if IN < 16 else IN
    j, out, parts = tl.arange(0, TAPS * DEEP), tl.arange(0, SIDE * OUT), (K + TAPS - 1) // TAPS
    kh, first, c = tl.program_id(1) // parts, tl.program_id(1) % parts * TAPS + j // DEEP, j % DEEP
    result = tl.zeros([TAPS * DEEP, SIDE * OUT], tl.float32)
    for start in range(0, EACH, BM):
        m = tl.program_id(0) * EACH + start + tl.arange(0, BM)
        value = _patches(x, m, pixels, kh, first, c, HIGH, WIDE, IN, K, STRIDE, False, SIDE)
        g = tl.load(grad + m[:, None] * (SIDE * OUT) + out[None, :], (m < pixels // SIDE)[:, None], 0.0)
        result = tl.dot(tl.trans(value), g, result, input_precision="ieee")
    tap = first[:, None] - (out // OUT)[None, :]
    where = kh * s_h + tap * s_w + c[:, None] * s_in + (out % OUT)[None, :] * s_out
    tl.atomic_add(by_weight + where, result, (tap >= 0) & (tap < K) & (c < IN)[:, None], sem="relaxed")


# By channels: pixels of a program of convolutions, of element-wise kernels, of gradients by weights (times of 128).
CONV_TILE, FLAT_TILE = {16: 256, 32: 128, 64: 64}, {16: 256, 32: 128, 64: 64}
WEIGHT_TILE = {16: 2048, 32: 1024, 64: 512}
SUM_COPIES = 8                                                # programs that add to one number wait for each other
FUSED_FROM = 2 ** 18                                          # numbers in x: compiling takes half a minute, once
FUSED_PIXELS = 32 * 32                                        # of an image, at most: cuDNN is good at larger ones


class _Layers(NamedTuple):
    """A residual block, or a stem of one convolution. norms: the one after each convolution; the third pair is the
    shortcut's. relu: whether one is last."""
    convs: Sequence[nn.Module]
    norms: Sequence[nn.Module]
    relu: bool

    @classmethod
    def of(cls, module: nn.Module) -> Optional["_Layers"]:
        """None where it is something else."""
        children = list(module.children())
        if type(module) is nn.Sequential and len(children) == 3 and type(children[2]) is nn.ReLU:
            return cls(children[:1], children[1:2], True)
        if not isinstance(module, BasicBlock) or type(module).plain is not BasicBlock.plain:
            return None
        pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
        if type(module.shortcut) is nn.Sequential:
            pairs.append(tuple(module.shortcut))
        known = type(module.shortcut) is nn.Identity or len(pairs[-1]) == 2 < len(pairs)
        return cls(*zip(*pairs), module.last_relu) if known else None

    def parameters(self) -> list[Tensor]:
        """Weight, gamma and beta of each convolution and its norm."""
        return [p for conv, norm in zip(self.convs, self.norms) for p in (conv.weight, norm.weight, norm.bias)]

    def fit(self, x: Tensor, training: bool) -> bool:
        """Whether the kernels compute what the layers do, of x."""
        convs, first, stride = self.convs, self.norms[0], self.convs[0].stride
        width, inside = convs[0].out_channels, (x.shape[1], convs[0].out_channels, x.shape[1])
        for conv, size, step, channels in zip(convs, (3, 3, 1), (stride, (1, 1), stride), inside):
            if (not isinstance(conv, Conv2d) or type(conv).forward is not Conv2d.forward
                    or (conv.in_channels, conv.out_channels, conv.groups) != (channels, width, 1)
                    or (conv.kernel_size, conv.padding, conv.stride) != ((size,) * 2, (size // 2,) * 2, step)
                    or (conv.dilation, conv.padding_mode, conv.bias is None) != ((1, 1), "zeros", training)):
                return False
        if (width not in CONV_TILE or x.shape[1] not in CONV_TILE and (len(convs) > 1 or x.shape[1] != 3)
                or stride not in ((1, 1), (2, 2)) or x.shape[2] % stride[0] or x.shape[3] % stride[0]):
            return False
        if not training:
            read = [x, *(p for conv in convs for p in conv.parameters())]
            return (all(type(n) is nn.Identity for n in self.norms)
                    and not (torch.is_grad_enabled() and any(t.requires_grad for t in read)))
        return (not (len(convs) == 1 and x.requires_grad)
                and all(type(n) is nn.BatchNorm2d and n.training and n.affine and n.track_running_stats
                        and n.momentum is not None and (n.momentum, n.eps) == (first.momentum, first.eps)
                        for n in self.norms))


def _fused(module: nn.Module, x: Tensor) -> Optional[Tensor]:
    """A residual block or stem by the kernels above: in bfloat16 on a CUDA device, where channels are few and cuDNN
    needs five times what memory traffic would; in training, or for inference with folded norms. None where they do not
    do: hooks of layers inside, say, would not be called."""
    layers = _Layers.of(module)
    if (layers is None or not FUSED_FROM < x.numel() < 2 ** 31 or x.shape[2] * x.shape[3] > FUSED_PIXELS
            or not x.is_contiguous(memory_format=torch.channels_last) or not layers.fit(x, module.training)
            or torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling()
            or torch.is_anomaly_enabled() or nn.modules.module._has_any_global_hook()
            or any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                   for m in module.modules() if m is not module)):
        return None
    if len(layers.convs) == 1 and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    if x.dtype != torch.bfloat16 or not _triton_works(x.device):
        return None
    with torch.cuda.device_of(x):                             # Triton takes the current one
        return _FusedLayers.apply(layers, x, *layers.parameters()) if module.training else _infer(layers, x)


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton is there and computes a block as PyTorch does, tried once on a small one; a warning where not."""
    try:
        _compile_kernels()
        with torch.inference_mode(False), torch.random.fork_rng([device]), torch.cuda.device(device):
            cause = "its results are not PyTorch's" if _apart(device) > 0.1 else None
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:                                # whatever a compiler may raise
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
    if cause:
        print(f"warning: no Triton kernels ({cause}): training steps take more than twice as long", file=sys.stderr)
    return not cause


@torch.no_grad()
def _apart(device: torch.device) -> float:
    """How far outputs and gradients of a small block by the kernels are from PyTorch's, at most, in parts of their
    norm."""
    block = BasicBlock(16, 16, 1).to(device, memory_format=torch.channels_last)
    x = torch.randn(8, 16, 16, 16, device=device).to(torch.bfloat16, memory_format=torch.channels_last)
    x.requires_grad_()
    weights, layers = torch.randn_like(x), _Layers.of(block)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.enable_grad():
            outputs = _FusedLayers.apply(layers, x, *layers.parameters()), block.plain(x)
        gradients = [torch.autograd.grad(y, [x, *block.parameters()], weights.to(y.dtype)) for y in outputs]
        folded = fold_norms(block)
        inferred = _infer(_Layers.of(folded), x), folded.plain(x)
    pairs = [[t.detach().float() for t in pair] for pair in (outputs, inferred, *zip(*gradients))]
    return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)


def _compile_kernels() -> None:
    """Make the kernels above Triton's: they are plain functions until a GPU needs them."""
    global triton, tl
    import triton
    import triton.language as tl

    while _KERNELS:
        function = _KERNELS.pop()
        globals()[function.__name__] = triton.jit(function)


def _like(x: Tensor, channels: int, stride: int, count: int) -> list[Tensor]:
    """Room for some outputs of convolutions of x."""
    shape = len(x), channels, x.shape[2] // stride, x.shape[3] // stride
    how = dict(dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return [torch.empty(shape, **how) for _ in range(count)]


def _geometry(y: Tensor) -> tuple[int, int, int]:
    """Pixels of a batch, rows, columns."""
    return len(y) * y.shape[2] * y.shape[3], y.shape[2], y.shape[3]


def _blocking(inside: int, size: int, stride: int, wide: int, tile: int) -> tuple[int, int, int]:
    """How a convolution becomes a product of matrices: output pixels side by side in a row, entries of a row of a
    kernel at once, rows. Two pixels of a 3 x 3 kernel see four columns together, which loads half as much."""
    if size == 1 or inside >= 64:                             # four columns of 64 channels take too many registers
        return 1, 1, tile
    side = 2 if stride == 1 and wide % 2 == 0 else 1
    return side, 4, tile // side


def _launch(kernel, pixels: int, tile: int, *arguments, second: int = 1, warps: int = 4) -> None:
    """A program for every `tile` pixels."""
    kernel[(-(-pixels // tile), second)](*arguments, num_warps=warps)


def _infer(layers: _Layers, x: Tensor) -> Tensor:
    """With folded norms: a kernel a convolution."""
    def convolve(conv: nn.Conv2d, x: Tensor, relu: bool, other: Optional[Tensor] = None) -> Tensor:
        """relu(conv(x) + other), the last two where wanted."""
        (out, inside, size, _), stride = conv.weight.shape, conv.stride[0]
        y, = _like(x, out, stride, 1)
        (pixels, *geometry), tile = _geometry(y), CONV_TILE[out]
        _launch(_plain_kernel, pixels, tile, x, conv.weight, conv.bias, x if other is None else other, y, pixels,
                *conv.weight.stride(), *geometry, inside, out, size, stride, False, other is not None, relu,
                *_blocking(inside, size, stride, geometry[1], tile))
        return y

    first, *second = layers.convs
    inner = convolve(first, x, True)
    if not second:
        return inner
    return convolve(second[0], inner, layers.relu, x if len(second) < 2 else convolve(second[1], x, False))


class _FusedLayers(torch.autograd.Function):
    """A residual block or stem in training. The kernels take norms and relus along: 4 forward and 7 back. It has no
    second derivatives."""

    @staticmethod
    def forward(ctx, layers: _Layers, x: Tensor, *parameters: Tensor) -> Tensor:
        """parameters: of `layers.parameters()`."""
        norms, weights, affine = layers.norms, parameters[::3], [parameters[1::3], parameters[2::3]]
        width, stride, count = len(weights[0]), layers.convs[0].stride[0], len(weights)
        sums = torch.zeros(count, SUM_COPIES, 2, width, device=x.device)
        *before, inner, y = _like(x, width, stride, count + 2)
        (pixels, *geometry), tile, flat = _geometry(y), CONV_TILE[width], FLAT_TILE[width]
        states = [(s, *a, n.running_mean, n.running_var, n.num_batches_tracked)
                  for s, *a, n in zip(sums, *affine, norms)]

        def convolve(k: int, source: Tensor, size: int, stride: int) -> None:
            """before[k], and the sums for its norm."""
            inside = source.shape[1]
            _launch(_forward_kernel, pixels, tile, source, weights[k], before[k], sums[k], pixels, *weights[k].stride(),
                    *geometry, inside, width, size, stride, *_blocking(inside, size, stride, geometry[1], tile),
                    SUM_COPIES, warps=8 if inside >= 64 else 4)

        def norm(k: int, y: Tensor, relu: bool, other: Sequence = (None,) * 7) -> None:
            """y from before[k]. other: what is added, with the state of its norm where it has one."""
            _launch(_norm_kernel, pixels, flat, before[k], *states[k], *other, y, norms[0].momentum, norms[0].eps,
                    pixels, width, other[0] is not None, other[1] is not None, relu, flat, SUM_COPIES)

        convolve(0, x, 3, stride)
        if count == 1:
            norm(0, y, True)
        else:
            norm(0, inner, True)
            convolve(1, inner, 3, 1)
            if count > 2:
                convolve(2, x, 1, stride)
            norm(1, y, layers.relu, (before[2], *states[2]) if count > 2 else (x, *(None,) * 6))
        ctx.save_for_backward(x, y, inner, sums, *before, *parameters)
        ctx.how = count, stride, norms[0].eps, layers.relu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        """Gradients of x and the parameters."""
        (count, stride, eps, relu), (x, y, inner, sums, *rest) = ctx.how, ctx.saved_tensors
        with beside(x.device) as aside:
            back = _Backward(x, y, sums, rest[:count], rest[count:], eps, ctx.needs_input_grad[2:], aside)
            by_x, grad = None, back.gate(grad.contiguous(memory_format=torch.channels_last), relu)
            if count == 1:
                back.weigh(0, x, back.norm(0, grad), 3, stride)
            else:
                outer = back.norm(1, grad)
                back.weigh(1, inner, outer, 3, 1)
                first = back.norm(0, back.gated_input(outer))
                back.weigh(0, x, first, 3, stride)
                if count > 2:
                    projected = back.norm(2, grad)
                    back.weigh(2, x, projected, 1, stride)
                if ctx.needs_input_grad[1]:
                    other = grad if count == 2 else back.input(2, projected, 1, stride, None)
                    by_x = back.input(0, first, 3, stride, other)
        return None, by_x, *back.by_parameters()


class _Backward:
    """The backward pass of `_FusedLayers`, kernel by kernel."""

    def __init__(self, x: Tensor, y: Tensor, sums: Tensor, before: Sequence[Tensor], parameters: Sequence[Tensor],
                 eps: float, wanted: Sequence[bool], aside: Callable):
        self.x, self.y, self.before, self.eps, self.wanted, self.aside = x, y, before, eps, wanted, aside
        self.weights, self.width, (self.pixels, *self.geometry) = parameters[::3], y.shape[1], _geometry(y)
        self.norms = list(zip(sums, parameters[1::3], parameters[2::3]))
        sizes = [sums.numel(), *(w.numel() for w in self.weights)]
        zeros = torch.zeros(sum(sizes), device=x.device).split(sizes)         # one kernel for all that is added up
        self.sums = zeros[0].view_as(sums)
        self.by_weights = [z.as_strided(w.shape, torch.empty_like(w).stride()) for z, w in zip(zeros[1:], self.weights)]
        self.by_norms = torch.empty(len(before), 2, self.width, device=x.device)

    def _flat(self, kernel, *arguments) -> None:
        tile = FLAT_TILE[self.width]
        _launch(kernel, self.pixels, tile, *arguments, tile, SUM_COPIES)

    def gate(self, grad: Tensor, relu: bool) -> Tensor:
        """Through the last relu."""
        result, last = torch.empty_like(grad) if relu else grad, min(1, len(self.before) - 1)
        project = len(self.before) > 2
        other = (self.before[2], *self.norms[2], self.sums[2]) if project else (None,) * 5
        self._flat(_gate_kernel, grad, self.y, result, self.before[last], *self.norms[last], self.sums[last], *other,
                   self.eps, self.pixels, self.width, project, relu)
        return result

    def norm(self, k: int, grad: Tensor) -> Tensor:
        """Through a norm."""
        result = torch.empty_like(grad)
        self._flat(_norm_back_kernel, grad, self.before[k], *self.norms[k], self.sums[k], *self.by_norms[k], result,
                   self.eps, self.pixels, self.width)
        return result

    def gated_input(self, grad: Tensor) -> Tensor:
        """Through the second convolution and the relu before it."""
        result, weight, tile = torch.empty_like(grad), self.weights[1], CONV_TILE[self.width]
        _launch(_back_gate_kernel, self.pixels, tile, grad, weight, result, self.before[0], *self.norms[0],
                self.sums[0], self.eps, self.pixels, *_turned(weight), *self.geometry, self.width,
                *_blocking(self.width, 3, 1, self.geometry[1], tile), SUM_COPIES)
        return result

    def input(self, k: int, grad: Tensor, size: int, stride: int, other: Optional[Tensor]) -> Tensor:
        """Through a convolution of x; `other` is added."""
        result, tile = torch.empty_like(self.x), CONV_TILE[self.x.shape[1]]
        pixels, *geometry = _geometry(self.x)
        _launch(_plain_kernel, pixels, tile, grad, self.weights[k], None, other, result, pixels,
                *_turned(self.weights[k]), *geometry, self.width, self.x.shape[1], size, stride, True,
                other is not None, False,
                *_blocking(self.width, size, stride, geometry[1], tile))
        return result

    def weigh(self, k: int, source: Tensor, grad: Tensor, size: int, stride: int) -> None:
        """By a convolution's weight."""
        if not self.wanted[3 * k]:                            # frozen
            return
        inside, tile, result = source.shape[1], WEIGHT_TILE[self.width], self.by_weights[k]
        side, taps, each = _blocking(inside, size, stride, self.geometry[1], tile)
        with self.aside():                                    # nothing else here waits for it
            _launch(_weight_kernel, self.pixels, tile, source, grad, result, self.pixels, *result.stride(), each,
                    *self.geometry, inside, self.width, size, stride, side, taps, 64, second=size * -(-size // taps))

    def by_parameters(self) -> list[Tensor]:
        """In the order of `_Layers.parameters`; autograd leaves out what is frozen."""
        return [g for w, n in zip(self.by_weights, self.by_norms) for g in (w, *n)]


def _turned(weight: Tensor) -> tuple[int, ...]:
    """Strides of a weight whose inputs and outputs are exchanged."""
    out, inside, high, wide = weight.stride()
    return inside, out, high, wide
