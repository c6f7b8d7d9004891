"""Tests: `python -m unittest`. No data, no GPU. MNEMONICS_SLOW=1 adds the long ones; MNEMONICS_DATA=DIR those that
need the real CIFAR-100. Mathematics is checked against independent references, written here."""
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

if not torch.cuda.is_available():     # before Triton is imported, which run_cifar does
    os.environ["TRITON_INTERPRET"] = "1"

import mnemonics as mn
import run_cifar
import run_imagenet

torch.set_num_threads(1)              # these networks are too small to share
HERE = Path(__file__).resolve().parent
SLOW = unittest.skipUnless(os.environ.get("MNEMONICS_SLOW"), "long: set MNEMONICS_SLOW=1")


class Tiny(nn.Module):
    """A backbone small enough for a hundred runs: (B, 3, H, W) -> (B, 12)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, 2, 1),
                                  nn.BatchNorm2d(12))

    def forward(self, x):
        return self.body(x).mean((2, 3))


mn.NETWORKS["tiny"] = lambda classes, cosine=False: mn.IncrementalNet(Tiny(), 12, classes, cosine)

SMALL = dataclasses.replace(
    mn.CIFAR100, network="tiny", dataset="blobs", dataset_classes=6, image_size=8, phases=1, per_class=4, epochs=2,
    batch_size=16, recipe="paper", init="herding", exemplar_epochs=3, exemplar_lr=0.05, exemplar_optimizer="adam",
    exemplar_augment=True, base_steps=3, base_lr=1.0, base_level="classifier", base_start="fresh", base_networks=1,
    ahead_epochs=1, finetune_epochs=2, meta_batch=24,
    checkpoint_minutes=0.0, device="cpu", precision="float32")


def blobs(classes=6, each=20, seed=0, size=8):
    """uint8 images whose classes are colours with noise: easy to learn in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(classes, 3, 1, 1, generator=torch.Generator().manual_seed(5)) * 160 + 40
    labels = torch.arange(classes).repeat_interleave(each)
    images = colours[labels] + 30 * torch.randn(len(labels), 3, size, size, generator=generator)
    return mn.Images(images.clamp(0, 255).to(torch.uint8), labels)


def learn(config=SMALL, baseline=None, strategy=None, **kwargs):
    """A learner taken through all phases of blobs; returns it."""
    baseline = baseline or mn.BASELINES[config.baseline]()
    strategy = strategy or mn.STRATEGIES[config.resolved().exemplars]()
    torch.manual_seed(0)
    groups = mn.split_phases(6, config.phases)
    net = mn.NETWORKS["tiny"](groups[0], baseline.cosine)
    learner = mn.Learner(net, baseline, strategy, config, **kwargs)
    for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), groups, baseline.cumulative):
        learner.learn_phase(phase)
    return learner


def quiet(function, *args):
    """(result, stdout, stderr) of a call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = function(*args)
    return result, out.getvalue(), err.getvalue()


class Case(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        # matplotlib's start costs more than these runs
        self.no_picture = unittest.mock.patch.object(mn, "accuracy_picture", lambda folder: [])
        self.no_picture.start()
        self.addCleanup(self.no_picture.stop)

    def small_run(self, name, **changes):
        """mn.run on blobs, in the folder; returns results.json."""
        config = dataclasses.replace(SMALL, out=str(self.folder / name), **changes)
        return quiet(mn.run, config, blobs(), blobs(seed=1))[0]


# ---- protocol ----

class Protocol(unittest.TestCase):

    def test_class_order_is_lucirs(self):
        order = mn.class_order(100, seed=1993)
        self.assertEqual(order[:10], [68, 56, 78, 8, 23, 84, 90, 65, 74, 76])
        self.assertEqual(order[-6:], [39, 67, 29, 49, 57, 33])
        self.assertEqual(sorted(order), list(range(100)))

    def test_class_order_leaves_numpys_state_alone(self):
        np.random.seed(7)
        expected = np.random.rand()
        np.random.seed(7)
        mn.class_order(100)
        self.assertEqual(np.random.rand(), expected)

    def test_split_phases(self):
        self.assertEqual(mn.split_phases(100, 10), [50] + [5] * 10)
        self.assertEqual(mn.split_phases(100, 25), [50] + [2] * 25)
        self.assertEqual(mn.split_phases(20, 2), [10, 5, 5])
        with self.assertRaisesRegex(mn.UserError, "1, 2, 5, 10, 25, 50"):
            mn.split_phases(100, 7)

    def test_phases_partition_the_classes_and_keep_labels_with_images(self):
        # Every image carries its own label in its pixels.
        labels = torch.arange(10).repeat(7)
        images = labels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8)
        order = mn.class_order(10)
        phases = mn.make_phases(images, labels, images, labels, order, np.array([6, 2, 2]))
        seen = []
        for phase in phases:
            rows = phase.train.labels
            self.assertEqual(sorted(set(rows.tolist())), list(range(phase.seen, phase.seen + phase.classes)))
            original = phase.train.images[:, 0, 0, 0].long()
            self.assertEqual([order[r] for r in rows.tolist()], original.tolist())
            seen += original.unique().tolist()
            self.assertEqual(sorted(set(phase.test.labels.tolist())), list(range(phase.seen + phase.classes)))
            self.assertEqual([order[r] for r in phase.test.labels.tolist()], phase.test.images[:, 0, 0, 0].tolist())
        self.assertEqual(sorted(seen), list(range(10)))

    def test_metrics_on_a_written_matrix(self):
        self.assertAlmostEqual(mn.average_incremental_accuracy([80, 70, 60]), 70)
        self.assertAlmostEqual(mn.forgetting_rate([80, 71, 64]), 16)

    def test_rate_falls_at_epoch_80_counting_from_0(self):
        rates = {}
        learn(dataclasses.replace(SMALL, epochs=8, exemplars="random"), report=lambda e: rates.setdefault(
            (e["phase"], e["epoch"]), e["lr"]) if e["event"] == "epoch" else None)
        found = [round(rates[0, k], 6) for k in range(8)]
        self.assertEqual(found, [0.1] * 4 + [0.01] * 2 + [0.001] * 2)       # 160 epochs: 80 and 120

    def test_sgd_by_one_kernel_is_torchs_own_and_bears_a_late_first_gradient(self):
        nets, config = [torch.nn.Linear(3, 2).double() for _ in range(2)], dataclasses.replace(SMALL, weight_decay=0.1)
        nets[1].load_state_dict(nets[0].state_dict())
        plain = torch.optim.SGD(nets[0].parameters(), 0.1, config.momentum, weight_decay=0.1)
        for optimizer, net in zip((plain, mn.fused_sgd(nets[1], 0.1, config)), nets):
            generator = torch.Generator().manual_seed(0)
            for step in range(5):
                net.weight.grad = torch.randn(2, 3, generator=generator, dtype=torch.double)
                net.bias.grad = net.weight.grad.sum(1) if step > 1 else None
                optimizer.step()
        torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=1e-14, atol=1e-14)

    def test_no_batch_is_small_but_a_lone_one(self):
        for processes, sizes in ((1, (2, 3, 10, 128)), (4, (8, 10, 128))):
            with unittest.mock.patch.object(mn, "world", lambda: processes):
                for size, n in itertools.product(sizes, (1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 191, 192, 5000)):
                    order = torch.randperm(n)
                    batches = mn._batches(order, size)
                    self.assertTrue(torch.equal(torch.cat(batches), order))              # every image, once
                    lengths = [len(batch) for batch in batches]
                    self.assertEqual(lengths[:-2], [size] * len(lengths[:-2]))
                    if n >= size:
                        self.assertGreaterEqual(min(lengths), max(size // 2, 2 * processes), (size, n))
                        self.assertLessEqual(max(lengths), max(size, 4 * processes), (size, n))
                    if size >= 4 * processes:
                        self.assertEqual(len(lengths), math.ceil(n / size))
        self.assertEqual([len(batch) for batch in mn._batches(torch.arange(5000), 128)][-3:], [128, 68, 68])

    def test_new_images_and_exemplars_are_augmented_in_the_same_way(self):
        seen = []
        kind = {"crop": lambda images, generator, pad=4: seen.append(len(images)) or images}
        phase, = mn.make_phases(*[blobs().images, blobs().labels] * 2, range(6), [6])
        config = dataclasses.replace(SMALL, augmentation="ours", exemplar_augment=False)
        with unittest.mock.patch.dict(mn.AUGMENTATIONS, ours=kind["crop"], crop=None):
            learner = mn.Learner(mn.NETWORKS["tiny"](6, True), mn.LUCIR(), mn.Herding(), config)
            learner.learn_phase(phase)
        self.assertEqual(sum(seen), config.epochs * len(phase.train))

    def test_bad_input_of_the_library_is_refused_before_anything_trains(self):
        data = blobs()
        with self.assertRaisesRegex(ValueError, r"not torch.uint8 \(120, 8, 8, 3\).*permute\(0, 3, 1, 2\)"):
            mn.Images(data.images.permute(0, 2, 3, 1), data.labels)
        for name, value in (("epochs", -1), ("lr", 0.0), ("momentum", 1.0), ("temperature", math.inf)):
            with self.assertRaisesRegex(mn.UserError, f"--{name} {value}: "):
                mn.Config(**{name: value})
        for text, change in (("uint8", {0: data.images.float()}), ("labels must be whole", {1: data.labels + 0.5}),
                             ("labels must be whole", {1: data.labels[:, None]}), ("negative", {1: data.labels - 1}),
                             ("every phase needs", {5: [4, 0, 2]}), ("0 test images", {2: data.images[:0], 3: data.labels[:0]}),
                             ("6 different labels", {4: [0, 1, 1, 2, 3, 4]})):
            given = {**dict(enumerate([data.images, data.labels] * 2 + [range(6), [4, 2]])), **change}
            with self.assertRaisesRegex(ValueError, text):
                mn.make_phases(*given.values())
        for changes, text in (({"epochs": 2.5}, "whole number"), ({"batch_size": "8"}, "whole number"),
                              ({"lr": "0.1"}, "a number"), ({"mean": (0.5,)}, "three channels"),
                              ({"std": (0.0, 1.0, 1.0)}, "above 0"), ({"adjust": "no"}, "--adjust 'no': True or False"),
                              ({"adjust": 1}, "True or False"), ({"validate": None}, "True or False"),
                              ({"epochs": True}, "whole number"), ({"lr": None}, "a number"), ({"out": 5}, "--out 5: text"),
                              ({"mean": 0.5}, "--mean 0.5: several numbers"), ({"std": ("a", "b", "c")}, "several numbers"),
                              ({"mean": (0.5, True, 0.5)}, "several numbers"), ({"lr": 10 ** 400}, "a finite number"),
                              ({"std": (0.1, float("nan"), 0.1)}, "several numbers"), ({"lr": math.inf}, "a finite number")):
            with self.subTest(changes), self.assertRaisesRegex(mn.UserError, text):
                mn.Config(**changes)
        given = mn.Config(out=Path("a/b"), epochs=np.int64(3), lr=np.float32(0.5), mean=[np.float32(0.5)] * 3, adjust=np.True_,
                          std=torch.full((3,), 0.25), milestones=np.array([0.5, 0.75]), momentum=torch.tensor(0.5))
        self.assertEqual(given, mn.Config(out=os.path.join("a", "b"), epochs=3, lr=0.5, mean=(0.5, 0.5, 0.5), adjust=True,
                                          std=(0.25, 0.25, 0.25), momentum=0.5))
        json.dumps(dataclasses.asdict(given))
        self.assertEqual([type(x) for x in (given.epochs, given.lr, given.adjust)], [int, float, bool])
        one = mn.Config(lr=1, checkpoint_minutes=0)                                     # which name one folder
        self.assertEqual(*(str(mn._folder_name(c)) for c in (one, mn.Config(lr=1.0, checkpoint_minutes=0.0))))
        parts = [mn.NETWORKS["tiny"](4, True), mn.LUCIR(), mn.Herding()]
        for place, wrong in enumerate((torch.nn.Linear(2, 2), mn.LwF, "herding")):
            with self.assertRaisesRegex(TypeError, "is needed, not"):
                mn.Learner(*parts[:place], wrong, *parts[place + 1:], SMALL)
        with self.assertRaisesRegex(ValueError, "through 0 steps"):
            mn.meta_gradient(torch.nn.Linear(2, 2), *[torch.ones(1, 2), torch.zeros(1).long()] * 2, steps=0, lr=0.1)
        phases = mn.phases_of(data, data, range(6), [4, 2])
        for chosen in (torch.zeros(4).long(), torch.tensor([-1, 0, 1, 19]), torch.tensor([0, 1, 2, 20]),
                       torch.arange(4)[:, None], torch.arange(3)):
            wrong = type("Wrong", (mn.Herding,), {"select": lambda self, features, count, m, g: chosen})
            learner = mn.Learner(mn.NETWORKS["tiny"](4, True), mn.LUCIR(), wrong(), SMALL)
            with self.assertRaisesRegex(ValueError, "Wrong.select gave .* not 4 different indices of 20 images"):
                learner._choose(phases[0], phases[0].train, 4)
        for classes, each, error, text in ((6, 4, ValueError, "must have 4 classes, and it has 6"),
                                           (4, 21, mn.UserError, "21 exemplars a class: class 0 .* only 20")):
            config = dataclasses.replace(SMALL, per_class=each)
            learner = mn.Learner(mn.NETWORKS["tiny"](classes, True), mn.LUCIR(), mn.Herding(), config)
            with unittest.mock.patch.object(learner, "_model", side_effect=AssertionError("trained")):
                with self.assertRaisesRegex(error, text):
                    learner.learn_phase(phases[0])

    def test_a_process_without_an_image_adds_nothing(self):
        net, data = mn.NETWORKS["tiny"](6, True), blobs()
        net.eval()                                                          # as in fine-tuning
        step = mn.TrainStep(net, lambda net, x, y: F.cross_entropy(net(x), y), torch.optim.SGD(net.parameters(), 0.1),
                            mn.Normalise(SMALL.mean, SMALL.std), "float32", 16)
        before = copy.deepcopy(net.state_dict())
        step._step(data.images[:0], data.labels[:0], 0.0)                   # one process alone has no share to heed
        self.assertEqual(float(step.total), 0)
        torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)

    def test_rehearsal_shows_old_exemplars_as_often_as_asked(self):
        shown = []

        class Counting(mn.LwF):
            def loss(self, net, old, x, y):
                shown.append(y)
                return super().loss(net, old, x, y)

        config = dataclasses.replace(SMALL, exemplars="random", per_class=3, phases=1, epochs=1, rehearsal=4)
        learner = mn.Learner(mn.NETWORKS["tiny"](2, False), Counting(), mn.Random(), config)
        for phase in mn.phases_of(blobs(), blobs(), list(range(4)), [2, 2]):
            shown.clear()
            learner.learn_phase(phase)
        each = torch.bincount(phase.train.labels).tolist()[2:]
        self.assertEqual(torch.bincount(torch.cat(shown)).tolist(), [12, 12, *each])

    def test_unrehearsed_exemplars_serve_fine_tuning_alone(self):
        config = dataclasses.replace(SMALL, per_class=3, unrehearsed=1, finetune=True, weight_transfer=False,
                                     adjust=False, exemplar_lr=0.3)
        phases = mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3])

        def painted(part=None, when=("phase", 0)):
            """(network after the model level, fine-tuned rows, class means) of phase 1; part: what is painted over."""
            found = []

            def on(event):
                if event["event"] == "model":
                    found.append(torch.cat([value.flatten().float() for value in learner.net.state_dict().values()]))
                if (event["event"], event["phase"]) == when and part:
                    images = learner.memory.images = learner.memory.images.clone()
                    images[(learner.memory.ranks < 1) == (part == "apart")] = 0

            with torch.random.fork_rng():
                torch.manual_seed(0)
                learner = mn.Learner(mn.NETWORKS["tiny"](3), mn.LwF(), mn.Herding(), config, report=on)
                for phase in phases:
                    learner.learn_phase(phase)
            return found[1], learner.net.classifier.weight.detach(), learner.class_means()

        network, rows, means = painted()
        changed = [not torch.equal(network, painted(part)[0]) for part in ("apart", "rest")]
        self.assertEqual(changed, [False, True])                                     # the model level: the rest alone
        for part, used in ("apart", True), ("rest", False):                          # after it: those apart alone
            _, others, other_means = painted(part, ("exemplars", 1))
            self.assertEqual((torch.equal(rows, others), torch.equal(means, other_means)), (not used, False))

        learner = mn.Learner(mn.NETWORKS["tiny"](3), mn.LwF(), mn.Mnemonics(), config)
        learner.learn_phase(phases[0])
        memory, real = learner.memory, {bytes(image.flatten().numpy()) for image in blobs().images}
        moved = torch.tensor([bytes(image.flatten().numpy()) not in real for image in memory.images])
        self.assertTrue(torch.equal(moved, memory.ranks < 1))                        # they are the ones that are learned


class Guarded(mn.Images):
    """A data source that raises once its phase is over."""
    over = False

    def _check(self):
        if self.over:
            raise AssertionError("data of a finished phase was asked for")

    def __getitem__(self, index):
        self._check()
        return super().__getitem__(index)

    def subset(self, *args):
        self._check()
        return super().subset(*args)

    def join(self, *args):
        self._check()
        return super().join(*args)

    def batches(self, *args, **kwargs):
        self._check()
        return super().batches(*args, **kwargs)

    def to(self, device):
        self._check()
        return self


class OldDataIsGone(unittest.TestCase):

    def test_no_phase_touches_earlier_data(self):
        for name in mn.BASELINES:
            with self.subTest(name):
                config = dataclasses.replace(SMALL, baseline=name, per_class=10, phases=2, base_steps=2, exemplar_epochs=2,
                                             finetune_epochs=1)
                baseline = mn.BASELINES[name]()
                strategy = mn.Herding() if baseline.cumulative else mn.Mnemonics()
                learner = mn.Learner(mn.NETWORKS["tiny"](2, baseline.cosine), baseline, strategy, config)
                sources = []
                for phase in mn.phases_of(blobs(), blobs(), list(range(6)), [2, 2, 2], baseline.cumulative):
                    phase.train = Guarded(phase.train.images, phase.train.labels)
                    if not baseline.cumulative:
                        self.assertTrue(bool((phase.train.labels >= phase.seen).all()))
                    learner.learn_phase(phase)
                    phase.train.over = True
                    sources.append(phase.train)
                with self.assertRaises(AssertionError):                     # the guard itself works
                    sources[0][torch.tensor([0])]


# ---- networks ----

class Networks(unittest.TestCase):

    def test_sizes(self):
        for make, dim, millions in ((mn.resnet32, 64, 0.46), (mn.resnet18, 512, 11.2)):
            net = make(classes=10, cosine=True).eval()
            count = sum(p.numel() for p in net.backbone.parameters()) / 1e6
            self.assertAlmostEqual(count, millions, delta=0.03 * millions)
            self.assertEqual(net.features(torch.zeros(2, 3, 32, 32)).shape, (2, dim))

    def test_last_block_is_signed_for_cosine_only(self):
        for cosine in (True, False):
            net = mn.resnet32(5, cosine).eval()
            with torch.no_grad():
                net.backbone.stages[-1].bn2.bias.fill_(-100)
                lowest = float(net.features(torch.randn(4, 3, 32, 32)).min())
            self.assertLess(lowest, 0) if cosine else self.assertEqual(lowest, 0)

    def test_growing_keeps_old_logits(self):
        for cosine in (False, True):
            net = mn.resnet32(5, cosine).eval()
            x = torch.randn(3, 3, 32, 32)
            before = net(x)
            net.add_classes(2)
            net.add_classes(3)
            self.assertEqual(net(x).shape, (3, 10))
            torch.testing.assert_close(net(x)[:, :5], before, rtol=1e-6, atol=1e-6)
            net.double().add_classes(1)                                     # new rows are like the others
            self.assertEqual((net(x.double()).shape, net(x.double()).dtype), ((3, 11), torch.float64))

    def test_weight_transfer_trains_scalings_only_and_merges_exactly(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, bias=False), nn.Flatten(),
                            nn.Linear(180, 3))
        x = torch.randn(6, 3, 8, 8)
        frozen = [net[0].weight.clone(), net[2].weight.clone(), net[0].bias.clone()]
        before = net(x)
        mn.transfer_weights(net)
        torch.testing.assert_close(net(x), before)
        trainable = {n: tuple(p.shape) for n, p in net.named_parameters() if p.requires_grad}
        self.assertEqual(trainable["0.parametrizations.weight.0.scale"], (4, 3, 1, 1))
        self.assertEqual(trainable["0.parametrizations.bias.0.shift"], (4,))
        self.assertFalse(any("original" in n for n in trainable))
        with self.assertRaises(ValueError):
            mn.transfer_weights(net)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
        F.cross_entropy(net(x), torch.arange(6) % 3).backward()
        optimizer.step()
        self.assertTrue(torch.equal(net[0].parametrizations.weight.original, frozen[0]))
        self.assertTrue(torch.equal(net[2].parametrizations.weight.original, frozen[1]))
        self.assertTrue(torch.equal(net[0].parametrizations.bias.original, frozen[2]))
        net.eval()
        outside, twin = net(x), copy.deepcopy(net)
        mn.merge_weights(twin)                                             # a merged copy must not break the original
        torch.testing.assert_close(net(x), outside)
        mn.merge_weights(net)
        torch.testing.assert_close(net(x), outside)
        torch.testing.assert_close(twin(x), outside)
        self.assertFalse(torch.equal(net[0].weight, frozen[0]))
        self.assertTrue(all(p.requires_grad for p in net.parameters()))

    def test_a_parametrization_of_ones_own_outlives_a_phase(self):
        net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4),
                            nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, track_running_stats=False)).eval()
        x = torch.randn(6, 3, 8, 8)
        torch.testing.assert_close(mn.fold_norms(net)(x), net(x))
        self.assertTrue(nn.utils.parametrize.is_parametrized(mn.merge_weights(net)[0], "weight"))
        plain_first = nn.Sequential(nn.Conv2d(3, 3, 1), net)
        with self.assertRaisesRegex(ValueError, "of its own"):
            mn.transfer_weights(plain_first)
        self.assertFalse(nn.utils.parametrize.is_parametrized(plain_first[0]))          # refused as a whole
        self.assertFalse(mn._pack(mn.IncrementalNet(net, 5, 2))["transferred"])
        net = mn.IncrementalNet(Tiny(), 12, 3)
        nn.utils.parametrizations.spectral_norm(net.backbone.body[0])
        learner = mn.Learner(net, mn.LwF(), mn.Mnemonics(), dataclasses.replace(SMALL, weight_transfer=False))
        for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3]):
            learner.learn_phase(phase)
        self.assertTrue(nn.utils.parametrize.is_parametrized(net.backbone.body[0], "weight"))

    def test_folded_norms_compute_the_same(self):
        torch.manual_seed(0)
        for net in (mn.resnet32(4, True), mn.resnet18(4)):
            net, x = net.double(), torch.randn(4, 3, 32, 32, dtype=torch.double)
            for module in net.modules():                                   # statistics and weights of a trained one
                if isinstance(module, nn.BatchNorm2d):
                    for value in (module.running_mean, module.weight.data, module.bias.data):
                        value += torch.randn_like(value) / 2
                    module.running_var.uniform_(0.5, 2)
            before, wanted = copy.deepcopy(net.state_dict()), net.eval()(x)
            folded = mn.fold_norms(net)
            torch.testing.assert_close(folded(x), wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(folded.features(x), net.features(x), rtol=1e-10, atol=1e-10)
            left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
            self.assertEqual(len(left), 0)
            self.assertFalse(any(p.requires_grad for p in folded.parameters()))
            self.assertTrue(all(torch.equal(v, before[k]) for k, v in net.state_dict().items()))

    def test_what_is_not_plainly_a_convolution_and_its_norm_is_not_folded(self):
        class Standardised(mn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), None, self.stride, self.padding)

        class Bent(nn.BatchNorm2d):
            def forward(self, x):
                return F.relu(super().forward(x))

        class Indexed(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

            def forward(self, x):
                h = self.body[0](x)
                return h + self.body[1](h)

        def changed(change):
            net = mn.ResNet((1, 1), (4, 6), False, True)
            change(net.stages[1])
            return net

        nets = [Indexed(), changed(lambda block: setattr(block, "conv2", Standardised(6, 6, 3, 1, 1))),
                changed(lambda block: setattr(block, "bn1", Bent(6))),
                changed(lambda block: block.shortcut.__setitem__(1, Bent(6))),
                changed(lambda block: block.conv1.register_forward_hook(lambda module, x, y: 2 * y)),
                changed(lambda block: nn.utils.spectral_norm(block.conv2)),
                changed(lambda block: block.bn2.register_forward_pre_hook(lambda module, x: (x[0] + 1,)))]
        for net in nets:
            x, net = torch.randn(3, 3, 8, 8), net.train()
            with torch.no_grad():
                net(x)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
            with torch.no_grad():
                torch.testing.assert_close(mn.fold_norms(net)(x), net.eval()(x), rtol=1e-4, atol=1e-4)

    def test_a_loss_is_given_the_folded_teacher_and_the_checkpoint_the_whole_one(self):
        seen = []

        class Watching(mn.LwF):
            def loss(self, net, old, x, y):
                if old is not None:
                    seen.append((sum(isinstance(m, nn.BatchNorm2d) for m in old.modules()), x, old(x)))
                return super().loss(net, old, x, y)

        residual = lambda classes, cosine=False: mn.IncrementalNet(mn.ResNet((1,), (8,), False, True), 8, classes, cosine)
        with unittest.mock.patch.dict(mn.NETWORKS, tiny=residual):
            learner = learn(dataclasses.replace(SMALL, precision="float32"), Watching(), mn.Herding())
        norms, x, logits = seen[-1]                                        # the last phase's teacher is still there
        self.assertEqual(norms, 0)
        with torch.no_grad():
            torch.testing.assert_close(logits, learner.old(x), rtol=1e-4, atol=1e-5)
        self.assertTrue(any("running_mean" in name for name in learner.state_dict()["old"]))

    def test_augmentation_crops_flips_and_pads_with_black(self):
        images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
        out = mn.crop_and_flip(images, torch.Generator().manual_seed(0))
        padded = F.pad(images, [4] * 4)
        flips = 0
        for k in range(len(images)):
            windows = padded[k].unfold(1, 8, 1).unfold(2, 8, 1)            # (3, 9, 9, 8, 8)
            plain = (windows == out[k][:, None, None]).all(-1).all(-1).all(0).any()
            mirror = (windows == out[k].flip(-1)[:, None, None]).all(-1).all(-1).all(0).any()
            self.assertTrue(bool(plain | mirror))
            flips += int(mirror & ~plain)
        self.assertTrue(16 < flips < 48)

    def test_resized_crop_keeps_type_range_and_gradient(self):
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        out = mn.resized_crop_and_flip(images, torch.Generator().manual_seed(0))
        self.assertEqual((out.dtype, out.shape), (images.dtype, images.shape))
        whole = mn.resized_crop_and_flip(images.float(), torch.Generator().manual_seed(0), scale=(1, 1), ratio=1)
        same = [min(float((whole[k] - v).abs().max()) for v in (images[k], images[k].flip(-1))) for k in range(8)]
        self.assertLess(max(same), 1e-2)                                   # the full frame is the image or its mirror
        x = images.double().requires_grad_()
        mn.resized_crop_and_flip(x, torch.Generator().manual_seed(1)).sum().backward()
        self.assertGreater(float(x.grad.abs().sum()), 0)

    def test_eight_bits_round_and_clip(self):
        normalise = mn.Normalise(mn.CIFAR100.mean, mn.CIFAR100.std)
        images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        x = normalise(images)
        self.assertTrue(torch.equal(normalise.to_uint8(x), images))
        self.assertTrue(torch.equal(normalise.to_uint8(x + 0.4 * normalise.scale), images))
        self.assertTrue(torch.equal(normalise.to_uint8(x + 0.6 * normalise.scale)[:255], images[1:]))
        self.assertEqual(int(normalise.to_uint8(x - 9).max()), 0)
        clipped = normalise.clip_((9 * torch.randn(5, 3, 2, 2)))
        self.assertLessEqual(float((clipped - normalise.black).min()), 1e-6)
        self.assertTrue(torch.equal(normalise.to_uint8(clipped), normalise.to_uint8(clipped.clone())))
        expected = (images[200].double() / 255 - torch.tensor(mn.CIFAR100.mean).view(3, 1, 1)) / torch.tensor(
            mn.CIFAR100.std).view(3, 1, 1)
        torch.testing.assert_close(x[200].double(), expected, rtol=1e-5, atol=1e-5)


# ---- losses and baselines ----

class Losses(unittest.TestCase):

    def test_eq_1_by_hand(self):
        # One old image, two old classes, tau 2: teacher (0, 2 ln 3) -> (1/4, 3/4); student (0, 0) -> (1/2, 1/2).
        old, new = torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[0.0, 0.0, 5.0]])
        self.assertAlmostEqual(float(mn.distillation_loss(new, old, 2.0)), math.log(2), places=6)
        # Student equal to teacher: the entropy of (1/4, 3/4).
        same = float(mn.distillation_loss(torch.cat([old, new[:, 2:]], 1), old, 2.0))
        self.assertAlmostEqual(same, -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), places=6)

    def test_eq_2_and_5_by_hand(self):
        logits, y = torch.tensor([[0.0, math.log(3), 0.0]]), torch.tensor([1])
        self.assertAlmostEqual(float(mn.classification_loss(logits, y)), math.log(5 / 3), places=6)
        old = torch.zeros(1, 2)
        student = [1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))]
        expected = 0.3 * math.log(5 / 3) - 0.7 * 0.5 * (math.log(student[0]) + math.log(student[1]))
        self.assertAlmostEqual(float(mn.combined_loss(logits, y, old, 0.3, 2.0)), expected, places=6)

    def test_margin_ranking_against_loops(self):
        baseline, K, M = mn.LUCIR(), 4, 3
        cosines, y = torch.rand(9, K + M) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1])
        pairs = [max(0.0, 0.5 - float(cosines[b, y[b]]) + float(c)) for b in range(9) if y[b] < K
                 for c in sorted(cosines[b, K:].tolist())[-2:]]
        self.assertAlmostEqual(float(baseline._margin_ranking(cosines, y, K, M)), sum(pairs) / len(pairs), places=6)
        self.assertEqual(float(baseline._margin_ranking(cosines, torch.full((9,), 5), K, M)), 0.0)

    def test_lucir_loss_against_its_parts(self):
        baseline = mn.LUCIR()
        baseline.config = dataclasses.replace(mn.CIFAR100, lucir_lambda=7.0)
        old = mn.NETWORKS["tiny"](4, True).eval()
        net = copy.deepcopy(old)
        net.add_classes(2)
        with torch.no_grad():
            net.classifier.sigma.fill_(3.0)
        x, y = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 4, 5, 3])
        f, g = net.features(x), old.features(x)
        cos = torch.stack([torch.stack([F.cosine_similarity(a, w, 0) for w in net.classifier.weight]) for a in f])
        forget = torch.stack([1 - F.cosine_similarity(a, b, 0) for a, b in zip(f, g)]).mean()
        expected = (F.cross_entropy(3 * cos, y) + 7 * math.sqrt(2) * forget + baseline._margin_ranking(cos, y, 4, 2))
        torch.testing.assert_close(baseline.loss(net, old, x, y), expected)

    def test_autocast_leaves_losses_in_full_precision(self):
        # Features are the images here, so nothing but classifier and losses could be rounded: on a CPU autocast takes
        # both softmaxes and the cosine similarity in bfloat16 if it may, and 1 - cos of near features is then 0.
        x, y = torch.randn(16, 12, 1, 1), torch.arange(16) % 5
        for name in ("lwf", "bic", "lucir"):
            baseline = mn.BASELINES[name]()
            old = mn.IncrementalNet(nn.Flatten(), 12, 3, baseline.cosine)
            net = copy.deepcopy(old)
            net.add_classes(2)
            near = 1 + 0.02 * torch.randn(12)
            net.backbone.forward = lambda x: x.flatten(1) * near
            exact = baseline.loss(net, old, x, y).item()
            with torch.autocast("cpu", torch.bfloat16):
                self.assertAlmostEqual(baseline.loss(net, old, x, y).item(), exact, places=6, msg=name)

    def test_settings_that_a_loss_does_not_use(self):
        for name, make in mn.BASELINES.items():
            baseline = make()
            old = mn.NETWORKS["tiny"](3, baseline.cosine)
            net = copy.deepcopy(old)
            net.add_classes(2)
            x, y, losses = torch.randn(8, 3, 8, 8), torch.arange(8) % 5, {}
            for setting in ({}, {"distill_weight": 0.9}, {"temperature": 3.0}):
                baseline.config = dataclasses.replace(mn.CIFAR100, **setting)
                losses[tuple(setting)] = baseline.loss(net.eval(), old.eval(), x, y).item()
            same = [setting for (setting, *_) in list(losses)[1:] if losses[setting,] == losses[()]]
            self.assertEqual(same, list(make.unused), name)

    def test_imprinting(self):
        net = mn.NETWORKS["tiny"](3, True)
        net.add_classes(2)
        features, labels = torch.randn(8, 12), torch.tensor([3, 4] * 4)
        mn.LUCIR().prepare(net, net, lambda: (features, labels))
        length = net.classifier.old.norm(dim=1).mean()
        for k, label in enumerate((3, 4)):
            mean = sum(f / f.norm() for f in features[labels == label]) / 4
            torch.testing.assert_close(net.classifier.new[k], mean / mean.norm() * length)
        self.assertFalse(net.classifier.old.requires_grad)

    def test_old_rows_stay_frozen_to_the_bit(self):
        rows = {"old": [], "new": []}

        def watch(event):
            if event["event"] == "epoch" and event["stage"] == "model" and event["phase"]:
                for name, kept in rows.items():
                    kept.append(getattr(learner.net.classifier, name).detach().clone())

        learner = mn.Learner(mn.NETWORKS["tiny"](3, True), mn.LUCIR(), mn.Herding(),
                             dataclasses.replace(SMALL, exemplars="herding"), report=watch)
        for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3]):
            learner.learn_phase(phase)
        self.assertEqual(len(rows["old"]), SMALL.epochs)
        self.assertTrue(all(torch.equal(rows["old"][0], r) for r in rows["old"]))
        self.assertFalse(torch.equal(rows["new"][0], rows["new"][-1]))
        self.assertTrue(torch.equal(learner.net.classifier.old, rows["old"][0]))
        self.assertTrue(all(p.requires_grad for p in learner.net.parameters()))


class BiCTest(unittest.TestCase):

    def test_split_is_balanced_disjoint_and_inside_the_budget(self):
        config = dataclasses.replace(SMALL, baseline="bic", per_class=10, exemplars="mnemonics")
        trained, learner = [], mn.Learner(mn.NETWORKS["tiny"](3, False), mn.BiC(), mn.Mnemonics(), config)
        fit = learner._fit
        learner._fit = lambda loss, pool, *rest, **more: (trained.append(pool.images.clone()), fit(loss, pool, *rest, **more))
        for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3]):
            learner.learn_phase(phase)
        memory = learner.memory
        self.assertEqual(torch.bincount(memory.labels).tolist(), [10] * 6)
        held = memory.select(memory.held)
        self.assertEqual(torch.bincount(held.labels).tolist(), [1] * 6)
        originals = blobs().images.flatten(1)
        for image in held.images.flatten(1):                               # real for ever
            self.assertTrue(bool((originals == image).all(1).any()))
            for pool in trained:                                           # and never trained on
                self.assertFalse(bool((pool.flatten(1) == image).all(1).any()))

    def test_correction_does_not_depend_on_what_the_config_names(self):
        learner = learn(dataclasses.replace(SMALL, baseline="lucir", per_class=10), baseline=mn.BiC())
        self.assertEqual(int(learner.memory.held.sum()), 6)
        self.assertNotEqual(float(learner.baseline.alpha), 1.0)

    def test_fit_changes_two_numbers_and_undoes_a_known_bias(self):
        torch.manual_seed(0)
        baseline, net = mn.BiC(), mn.NETWORKS["tiny"](4, False)
        net.add_classes(2)
        before = copy.deepcopy(net.state_dict())
        y = torch.randint(0, 6, (600,))
        truth = 3 * F.one_hot(y, 6).float() + torch.randn(600, 6)
        biased = truth.clone()
        biased[:, 4:] = (truth[:, 4:] + 2) / 0.5                            # undone by alpha 0.5, beta -2
        baseline.finish(net, net, lambda: (biased, y))
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in net.state_dict().items()))
        corrected = baseline.correct(biased)
        self.assertTrue(torch.equal(corrected[:, :4], biased[:, :4]))
        loss = lambda a, b: float(F.cross_entropy(torch.cat([biased[:, :4], a * biased[:, 4:] + b], 1), y)) + 0.05 * b * b
        best = min(loss(a, b) for a in np.linspace(0.2, 1.2, 41) for b in np.linspace(-3, 1, 41))
        self.assertLess(loss(float(baseline.alpha), float(baseline.beta)), best + 0.01)
        self.assertLess(float(F.cross_entropy(corrected, y)), float(F.cross_entropy(biased, y)))

    def test_a_pretended_phase_has_a_teacher_without_the_last_correction(self):
        teachers = []

        class Watching(mn.BiC):
            def teacher(self, net):
                """Which rows it corrects."""
                teachers.append((net.classifier.classes, self.newest.tolist()))
                return super().teacher(net)

        learn(dataclasses.replace(SMALL, phases=3, per_class=10, base_networks=2), Watching())
        # Real phases begin from the corrected network of the one before; pretended ones from one not yet corrected.
        self.assertEqual(teachers, [(3, [0, 0]), (3, [0, 0]), (4, [0, 0]), (4, [3, 4]), (5, [0, 0]), (5, [4, 5]),
                                    (6, [0, 0])])

    def test_teacher_is_corrected(self):
        baseline, net = mn.BiC(), mn.NETWORKS["tiny"](2, False).eval()
        net.add_classes(2)
        net.classifier.new_bias.data.copy_(torch.tensor([3.0, -1.0]))
        x = torch.randn(3, 3, 8, 8)
        before = net(x)
        baseline.alpha.fill_(0.5)
        baseline.beta.fill_(0.25)                                          # of the phase before: nothing is newest yet
        torch.testing.assert_close(baseline.teacher(net)(x), before, rtol=0, atol=0)
        baseline.newest.copy_(torch.tensor([2, 4]))
        teacher = baseline.teacher(net)
        baseline.alpha.fill_(9.0)                                          # later corrections leave it alone
        torch.testing.assert_close(teacher(x), torch.cat([before[:, :2], 0.5 * before[:, 2:] + 0.25], 1))
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)                         # and it leaves the network

    def test_too_small_a_memory_is_refused(self):
        with self.assertRaisesRegex(mn.UserError, "5 is the least"):
            mn.validate(dataclasses.replace(mn.CIFAR100, baseline="bic", per_class=4))


class WeightAligning(mn.LwF):
    """A fifth baseline (Zhao et al., 2020): after the model level, new rows get the old rows' mean norm."""

    def finish(self, net, old, held):
        if old is not None:
            head = net.classifier
            head.new.data *= head.old.norm(dim=1).mean() / head.new.norm(dim=1).mean()


class EveryBaseline(unittest.TestCase):

    def test_every_baseline_with_every_strategy_learns_and_repeats(self):
        for name in mn.BASELINES:
            for exemplars in ("herding", "random") if name == "joint" else mn.STRATEGIES:
                with self.subTest(baseline=name, exemplars=exemplars):
                    config = dataclasses.replace(SMALL, baseline=name, exemplars=exemplars, per_class=8, epochs=4,
                                                 base_steps=2, exemplar_epochs=2)
                    first = learn(config)
                    self.assertGreater(first.accuracy[-1]["accuracy"], 100 / 6 * 1.5)
                    if exemplars == "mnemonics" or name == "joint":
                        second = learn(config)
                        self.assertEqual(first.accuracy, second.accuracy)
                        self.assertTrue(torch.equal(first.memory.images, second.memory.images))
                    self.assertEqual(first.accuracy[-1]["exemplars"], 48)

    def test_a_fifth_baseline_needs_no_change_to_the_module(self):
        learner = learn(baseline=WeightAligning())
        head = learner.net.classifier
        torch.testing.assert_close(head.new.norm(dim=1).mean(), head.old.norm(dim=1).mean())
        self.assertGreater(learner.accuracy[-1]["accuracy"], 30)

    def test_an_unknown_recipe_or_augmentation_is_named(self):
        for name, registry in ("recipe", "RECIPES"), ("augmentation", "AUGMENTATIONS"):
            with self.assertRaisesRegex(mn.UserError, f"'own' is not one of .*mnemonics.{registry}"):
                learn(dataclasses.replace(SMALL, **{name: "own"}))

    def test_large_images_are_evaluated_a_few_at_a_time(self):
        learner, sizes = learn(dataclasses.replace(SMALL, exemplars="herding")), []
        whole = learner._rows(blobs(), learner.net.features)
        watched = lambda x: (sizes.append(len(x)), learner.net.features(x))[1]
        with unittest.mock.patch.object(mn, "EVALUATION_PIXELS", 7 * blobs().images.shape[-1] ** 2):
            few = learner._rows(blobs(), watched)
        torch.testing.assert_close(few, whole)
        self.assertEqual((max(sizes), sum(sizes)), (7, len(blobs())))

    def test_joint_trains_on_everything(self):
        sizes, learner = [], mn.Learner(mn.NETWORKS["tiny"](3, False), mn.Joint(), mn.Herding(),
                                        dataclasses.replace(SMALL, baseline="joint"))
        fit = learner._fit
        learner._fit = lambda loss, pool, *rest, **more: (sizes.append(len(pool)), fit(loss, pool, *rest, **more))
        for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3], cumulative=True):
            learner.learn_phase(phase)
        self.assertEqual(sizes, [60, 120])

    def test_nearest_mean_and_both_together_against_brute_force(self):
        unit = lambda v: v / v.norm()
        for name in ("icarl", "lucir"):
            learner = learn(dataclasses.replace(SMALL, baseline=name, exemplars="herding"))
            net, memory, test, row = learner.net.eval(), learner.memory, blobs(seed=1), learner.accuracy[-1]
            see = lambda image: unit(net.features(learner.normalise(image[None]))[0])
            means, hits, both = [], 0, 0
            with torch.no_grad():
                for label in range(6):
                    mine = memory.images[memory.labels == label]
                    views = [see(image) for image in [*mine, *(image.flip(-1) for image in mine)]]
                    means.append(unit(sum(views) / len(views)))
                for image, label in zip(test.images, test.labels):
                    f = see(image)
                    hits += min(range(6), key=lambda k: float((f - means[k]).norm())) == int(label)
                    together = [float(f @ (means[k] + unit(net.classifier.weight[k]))) for k in range(6)]
                    both += together.index(max(together)) == int(label)
            self.assertAlmostEqual(row["accuracy_nme"], 100 * hits / len(test), places=3)
            if name == "lucir":
                self.assertAlmostEqual(row["accuracy_both"], 100 * both / len(test), places=3)
                self.assertEqual(row["accuracy"], row["accuracy_classifier"])
            else:
                self.assertNotIn("accuracy_both", row)
                self.assertEqual(row["accuracy"], row["accuracy_nme"])


# ---- bilevel optimisation ----

class Foreign(nn.Module):
    """A smooth network that is not from this project, with BatchNorm."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def bilevel_problem(seed=0):
    """(net, exemplars, labels, validation images, labels) in float64."""
    torch.manual_seed(seed)
    net = Foreign().double()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return (net, torch.randn(6, 3, 4, 4, dtype=torch.double), torch.arange(6) % 3,
            torch.randn(10, 3, 4, 4, dtype=torch.double), torch.arange(10) % 3)


def kept_graph(net, exemplars, labels, val_images, val_labels, steps, lr):
    """The reference: the graph of all steps kept, one call of autograd."""
    net = copy.deepcopy(net).eval()
    exemplars = exemplars.clone().requires_grad_()
    theta = {n: p for n, p in net.named_parameters() if p.requires_grad}
    for _ in range(steps):
        loss = F.cross_entropy(torch.func.functional_call(net, theta, (exemplars,)), labels)
        grads = torch.autograd.grad(loss, tuple(theta.values()), create_graph=True)
        theta = {n: p - lr * g for (n, p), g in zip(theta.items(), grads)}
    loss = F.cross_entropy(torch.func.functional_call(net, theta, (val_images,)), val_labels)
    return loss.detach(), torch.autograd.grad(loss, exemplars)[0]


def after_training(net, labels, val_images, val_labels, steps, lr, exemplars):
    """The validation loss after torch's own SGD on exemplars, a number."""
    net = copy.deepcopy(net).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(exemplars), labels).backward()
        optimizer.step()
    return float(F.cross_entropy(net(val_images), val_labels).detach())


class Bilevel(unittest.TestCase):

    def test_eq_8_is_torch_sgd(self):
        net, x, y, *_ = bilevel_problem()
        thetas = mn.base_level(net, x, y, steps=5, lr=0.3)
        twin = copy.deepcopy(net).eval()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
        for theta in thetas:
            torch.testing.assert_close(theta, torch.cat([p.detach().flatten() for p in twin.parameters()]))
            optimizer.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()

    def test_meta_gradient_against_finite_differences(self):
        net, x, y, v, w = bilevel_problem()
        loss, gradient = mn.meta_gradient(net, x, y.int(), v, w.int(), steps=4, lr=0.5)

        value = functools.partial(after_training, net, y, v, w, 4, 0.5)
        self.assertAlmostEqual(float(loss), value(x), places=12)
        generator = torch.Generator().manual_seed(3)
        for _ in range(8):
            direction = torch.randn(x.shape, generator=generator, dtype=torch.double)
            eps = 1e-5
            slope = (value(x + eps * direction) - value(x - eps * direction)) / (2 * eps)
            inner = float((gradient * direction).sum())
            self.assertLess(abs(slope - inner), 1e-5 * abs(inner) + 1e-10)
        self.assertGreater(float(gradient.abs().max()), 1e-4)

    def test_a_module_or_a_parameter_used_twice_and_attention(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.twin = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 6)
                self.again, self.twin.weight = self.second, self.second.weight
                self.mix = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
                self.head = nn.Linear(6, 3)

            def forward(self, x):
                h = torch.tanh(self.first(x.flatten(1)))
                h = self.twin(torch.tanh(self.again(torch.tanh(self.second(h)))))
                return self.head(self.mix(torch.stack([h, h ** 2], 1)).mean(1))

        _, x, y, v, w = bilevel_problem()
        torch.manual_seed(1)
        net = Twice().double().eval()
        before = dict(net.named_parameters(remove_duplicate=False))
        kept = {name: p.detach().clone() for name, p in before.items()}
        loss, gradient = mn.meta_gradient(net, x, y, v, w, steps=3, lr=0.3)
        for name, p in net.named_parameters(remove_duplicate=False):
            self.assertIs(p, before[name])
            self.assertTrue(torch.equal(p, kept[name]))

        value = functools.partial(after_training, net, y, v, w, 3, 0.3)
        self.assertAlmostEqual(float(loss), value(x), places=12)
        for seed in range(3):
            direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
            slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
            self.assertAlmostEqual(slope, float((gradient * direction).sum()), delta=1e-5 * abs(slope) + 1e-9)

    def test_memory_is_measured_with_the_attention_that_runs(self):
        class Attends(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x):
                tokens = self.tokens(x.flatten(2).mT)[:, None]
                return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))

        weights = 256 * 256 * 4                                             # of 256 tokens for each other, float32
        self.assertGreater(mn._saved_bytes(Attends(), torch.randn(1, 3, 16, 16), torch.tensor([0])), weights)

    def test_trajectory_form_equals_kept_graph_whatever_the_micro_batch(self):
        net, x, y, v, w = bilevel_problem(1)
        for steps in (1, 7):
            loss, expected = kept_graph(net, x, y, v, w, steps, 0.4)
            for micro_batch in (None, 1, 4):
                found = mn.meta_gradient(net, x, y, v, w, steps=steps, lr=0.4, micro_batch=micro_batch)
                torch.testing.assert_close(found[0], loss, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(found[1], expected, rtol=1e-8, atol=1e-12)

    def test_resnet_with_weights_just_merged(self):
        torch.manual_seed(0)
        net = mn.merge_weights(mn.transfer_weights(mn.IncrementalNet(Tiny(), 12, 3, True).double()))
        _, x, y, v, w = bilevel_problem()
        found = mn.meta_gradient(net, x, y, v, w, steps=3, lr=0.2)
        torch.testing.assert_close(found[1], kept_graph(net, x, y, v, w, 3, 0.2)[1], rtol=1e-8, atol=1e-12)

    def test_a_classifier_s_own_derivatives_equal_autograd_s(self):
        torch.manual_seed(0)
        x, v = (torch.randn(count, 5, dtype=torch.double) for count in (6, 20))
        y, w = torch.arange(6) % 4, torch.arange(20) % 4
        x[2] = 0                                                              # a unit vector's direction is 0 then
        for before, own, cosine in itertools.product((0, 3), (True, False), (True, False)):
            head = mn.Classifier(5, before or 4, cosine)
            if before:
                head.add_classes(1)
            for p in head.double().parameters():
                p.data += 0.5                                                 # biases are 0, and sigma 1, at first
            head.new.requires_grad_(own)
            kind = mn._Flat if not own else mn._FlatCosine if cosine else mn._FlatLinear
            self.assertIs(type(mn._flat(head, x, y, None)), kind)
            with self.subTest(before=before, own=own, cosine=cosine):
                for steps, lr in ((1, 0.7), (6, 0.7), (6, torch.tensor(0.7, dtype=torch.double))):
                    loss, expected = kept_graph(head, x, y, v, w, steps, float(lr))
                    with Tape(TapedGraph()) if own and steps > 1 else contextlib.nullcontext():     # nothing waits
                        found = mn.meta_gradient(head, x.requires_grad_(), y, v, w, steps=steps, lr=lr)
                    torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=0)
                    torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-14)
                self.assertFalse(mn.base_level(head, x, y, steps=2, lr=0.7)[-1].requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertIs(type(mn._flat(mn.Classifier(5, 4, True), x, y, None)), mn._Flat)
        self.assertIs(type(mn._flat(*bilevel_problem()[:3], None)), mn._Flat)

    def test_the_network_is_left_as_it_was(self):
        net, x, y, v, w = bilevel_problem()
        net.train()
        net.norm.eval()
        before = copy.deepcopy(net.state_dict())
        mn.meta_gradient(net, x, y, v, w, steps=2, lr=0.5)
        self.assertTrue(all(torch.equal(a, before[k]) for k, a in net.state_dict().items()))
        self.assertTrue(net.training and net.conv.training and not net.norm.training)
        self.assertTrue(all(p.grad is None for p in net.parameters()))
        with self.assertRaises(ValueError):
            mn.meta_gradient(net.requires_grad_(False), x, y, v, w, steps=1, lr=0.1)

    def test_memory_is_flat_in_steps(self):
        net, x, y, v, w = bilevel_problem()

        def peak(steps):
            """Most bytes that autograd holds at a time."""
            live, most = [0], [0]

            class Held:
                def __init__(self, tensor):
                    self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                    live[0] += self.size
                    most[0] = max(most[0], live[0])

                def __del__(self):
                    live[0] -= self.size

            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                mn.meta_gradient(net, x, y, v, w, steps=steps, lr=0.1)
            return most[0]

        self.assertLess(peak(30), 1.3 * peak(1))

    def test_two_gaussians_have_a_known_best_exemplar(self):
        # One exemplar a class, one base step from zero weights: the temporary model is a linear classifier along
        # e1 - e0, so the best exemplars give the direction and length of logistic regression on the data.
        torch.manual_seed(0)
        mix = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 0.4]])
        data = torch.cat([torch.randn(2000, 3) @ mix + s * torch.tensor([0.5, 0.2, 0.4]) for s in (-1, 1)])
        labels = torch.arange(2).repeat_interleave(2000)
        config = dataclasses.replace(mn.CIFAR100, mean=(0.5,) * 3, std=(0.1,) * 3, exemplar_epochs=300, exemplar_lr=0.1,
                                     exemplar_optimizer="adam", base_steps=1, base_lr=4.0, base_level="network",
                                     base_start="current", exemplar_augment=False, meta_batch=4000)
        normalise = mn.Normalise(config.mean, config.std)
        data = normalise.to_uint8(data.view(-1, 3, 1, 1))
        net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
        nn.init.zeros_(net[1].weight)
        start = normalise.to_uint8(torch.tensor([[-1.0, 1, 0], [1, -1, 0]]).view(2, 3, 1, 1))
        found, before, after = mn.optimise_exemplars(net, start, torch.tensor([0, 1]), data, labels, config)
        X, sign = normalise(data).flatten(1).double(), 2.0 * labels.double() - 1
        d = torch.zeros(3, dtype=torch.double)
        for _ in range(30):                                                 # Newton for logistic regression
            p = torch.sigmoid(-sign * (X @ d))
            d += torch.linalg.solve((X * (p * (1 - p))[:, None]).T @ X, ((sign * p)[:, None] * X).sum(0))
        best = float(F.softplus(-sign * (X @ d)).mean())
        e = normalise(found).flatten(1).double()
        self.assertGreater(float(F.cosine_similarity(e[1] - e[0], d, 0)), 0.99)
        self.assertGreater(before, 1.2 * best)
        self.assertLess(after, 1.02 * best)


class Exemplars(unittest.TestCase):

    def recipe(self, **changes):
        return dataclasses.replace(SMALL, **{"exemplar_epochs": 10, "exemplar_lr": 0.1, "base_steps": 6,
                                             "exemplar_augment": False} | changes)

    def test_learned_exemplars_differ_in_8_bits_and_lower_the_loss_of_what_is_stored(self):
        learner = learn(self.recipe())
        for row in (learner.accuracy[0], learner.accuracy[1], learner.accuracy[1]["adjust"]):
            self.assertLess(row["meta_loss_after"], row["meta_loss_before"])
            self.assertGreater(row["exemplar_shift"], 0.5)
        self.assertEqual(learner.memory.images.dtype, torch.uint8)

    def test_recorded_losses_are_of_the_rounded_images(self):
        torch.manual_seed(0)
        net, data = mn.NETWORKS["tiny"](6, True).eval(), blobs()
        config = self.recipe().resolved()
        images, labels = data.images[::5].clone(), data.labels[::5].clone()
        learned, before, after = mn.optimise_exemplars(net, images, labels.int(), data, None, config, seed=3)
        bop = mn.LocalBOP([net], labels, data, config, 3, mn.MicroBatch())
        self.assertAlmostEqual(bop.loss(images), before, places=6)
        self.assertAlmostEqual(bop.loss(learned), after, places=6)
        # The same by hand: fresh rows, S steps of SGD on the stored features, loss on all data.
        head = bop.start(0, "measure")
        with torch.no_grad():
            e, d = (net.features(bop.normalise(i)) for i in (learned, data.images))
        optimizer = torch.optim.SGD(head.parameters(), config.base_lr)
        for _ in range(config.base_steps):
            optimizer.zero_grad()
            F.cross_entropy(head(e), labels).backward()
            optimizer.step()
        self.assertAlmostEqual(float(F.cross_entropy(head(d), data.labels).detach()), after, places=4)

    def test_every_base_level_and_start_lowers_its_loss(self):
        for level, rate in (("classifier", 1.0), ("network", 0.2), ("means", 1.0)):
            for start, cosine in (("current", True), ("current", False), ("fresh", level == "network")):
                with self.subTest(level=level, start=start, cosine=cosine):
                    torch.manual_seed(0)
                    net, data = mn.NETWORKS["tiny"](6, cosine).eval(), blobs()
                    config = dataclasses.replace(SMALL, base_level=level, base_start=start, base_lr=rate, meta_batch=120,
                                                 exemplar_augment=False, exemplar_epochs=8, exemplar_lr=0.03)
                    images, labels = data.images[::5].clone(), data.labels[::5].clone()
                    learned, before, after = mn.optimise_exemplars(net, images, labels, data, data.labels, config)
                    self.assertLess(after, before)

    def test_a_pixel_that_is_not_finite_is_never_stored(self):
        torch.manual_seed(0)
        net, data = mn.NETWORKS["tiny"](6, True).eval(), blobs()
        images, labels, original = data.images[::5].clone(), data.labels[::5].clone(), mn.LocalBOP.gradient

        def spoiled(self, pixels, epoch):
            gradient = original(self, pixels, epoch)
            return gradient.index_fill(0, torch.tensor([2]), math.nan)

        with unittest.mock.patch.object(mn.LocalBOP, "gradient", spoiled), self.assertRaisesRegex(
                mn.RunError, "not finite.*lower --exemplar-lr"):
            mn.optimise_exemplars(net, images, labels, data, data.labels, self.recipe())

    def test_a_classifier_of_another_kind_is_refused(self):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
        net.classifier, data = net[1], blobs()
        with self.assertRaisesRegex(ValueError, "IncrementalNet"):
            mn.optimise_exemplars(net, data.images[:6], data.labels[:6], data, data.labels, self.recipe())

    def test_fresh_rows_come_without_the_trained_biases(self):
        net = mn.NETWORKS["tiny"](3)
        net.add_classes(3)
        net.classifier.old_bias.data.fill_(2.0)
        net.classifier.new_bias.data.fill_(3.0)
        data = blobs().subset(torch.arange(40, 100))                        # classes 2, 3, 4: old and new ones
        bop = mn.LocalBOP([net], data.labels, data, self.recipe().resolved(), 0, mn.MicroBatch())
        head = bop.start(0, "epoch", 0)
        self.assertEqual(head.bias.tolist(), [2, 2, 0, 0, 0, 3])
        same = [torch.equal(a, b) for a, b in zip(head.weight, net.classifier.weight)]
        self.assertEqual(same, [True, True, False, False, False, True])

    def test_means_as_the_temporary_model(self):
        """Its loss is that of the nearest mean, written out, and its gradient has the slopes of finite differences."""
        data = blobs()
        config = dataclasses.replace(SMALL, base_level="means").resolved()
        labels = torch.tensor([4, 2, 5, 2, 4, 5])                              # a chunk of classes, in no order
        bop = mn.LocalBOP([mn.NETWORKS["tiny"](6, False).eval()], labels, data, config, 0, mn.MicroBatch())
        generator = torch.Generator().manual_seed(0)
        codes, x = (torch.randn(n, 5, generator=generator, dtype=torch.double) for n in (6, 9))
        y = torch.tensor([2, 4, 5] * 3)

        def value(codes):
            """Mean cross-entropy of ten times the cosines to the means of unit vectors."""
            units = [c / np.linalg.norm(c) for c in codes.numpy()]
            means = [sum(u for u, l in zip(units, labels) if l == k) for k in (2, 4, 5)]
            total = 0.0
            for image, label in zip(x.numpy(), y.tolist()):
                scores = [10 * image @ m / np.linalg.norm(image) / np.linalg.norm(m) for m in means]
                total += np.log(np.sum(np.exp(scores))) - scores[(2, 4, 5).index(label)]
            return total / len(y)

        loss, gradient = bop.means_loss(codes, x, y), bop._by_code(0, codes, x, y)
        self.assertAlmostEqual(float(loss), value(codes), places=12)
        for _ in range(5):
            direction = torch.randn(codes.shape, generator=generator, dtype=torch.double)
            slope = (value(codes + 1e-6 * direction) - value(codes - 1e-6 * direction)) / 2e-6
            self.assertAlmostEqual(slope, float((gradient * direction).sum()), places=7)
        self.assertGreater(float(gradient.abs().max()), 1e-3)

    def test_means_need_an_exemplar_of_every_class_of_the_data(self):
        data, net = blobs(), mn.NETWORKS["tiny"](6, False).eval()
        config, own = dataclasses.replace(SMALL, base_level="means"), torch.tensor([0, 40])          # classes 0 and 2
        for kept, refused in ([0, 2], False), ([0, 1, 2], True), ([0, 2, 5], True):
            some = data.subset(torch.nonzero(torch.isin(data.labels, torch.tensor(kept))).squeeze(1))
            call = lambda: mn.optimise_exemplars(net, data.images[own], data.labels[own], some.images, some.labels, config)
            if refused:
                self.assertRaisesRegex(ValueError, "every class in the data", call)
            else:
                call()

    def test_the_rate_of_fine_tuning_goes_with_what_is_trained(self):
        """As measured; and the rate reaches the optimiser: at a tenth of it rows move less."""
        config, moved = dataclasses.replace(SMALL, finetune=True, phases=1), []
        for level, rate, given in (("network", 0.01, None), ("classifier", 0.1, None), ("classifier", 0.01, 0.01)):
            some = dataclasses.replace(config, finetune_level=level, finetune_lr=given)
            torch.manual_seed(0)
            learner = mn.Learner(mn.NETWORKS["tiny"](6, cosine=True), mn.LUCIR(), mn.Herding(), some)
            self.assertEqual(learner.config.finetune_lr, rate)
            learner.index, labels = 1, torch.arange(6)
            learner.memory = mn.Memory(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), labels, labels * 0,
                                       labels > 9)
            before = learner.net.classifier.weight.detach().clone()
            learner._finetune()
            moved.append(float((learner.net.classifier.weight.detach() - before).norm()))
        self.assertGreater(moved[1], 3 * moved[2])

    def test_networks_that_differ_from_ours_are_used_as_they_are(self):
        class PreActivation(mn.BasicBlock):
            def forward(self, x):
                return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

        class Neck(mn.IncrementalNet):
            def features(self, x):
                return 2 + super().features(x)

        net = nn.Sequential(PreActivation(4, 4, 1, True)).eval()
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(mn.fold_norms(copy.deepcopy(net))(x), net(x))
        net = Neck(nn.Flatten(), 12, 3)
        x = torch.randn(2, 3, 2, 2)
        torch.testing.assert_close(net(x), net.classifier(x.flatten(1) + 2))

    def test_a_sample_holds_no_more_classes_than_a_picture_shows(self):
        learner = mn.Learner(mn.NETWORKS["tiny"](12, True), mn.LUCIR(), mn.Mnemonics(), dataclasses.replace(
            SMALL, exemplar_epochs=1, bop_chunk=None, epochs=1, per_class=2))
        data = blobs(12, 4)
        learner.learn_phase(mn.phases_of(data, data, list(range(12)), [12])[0])
        self.assertEqual({len(rows) for rows in learner.sample.values()}, {20})
        self.assertEqual(learner.sample["labels"].unique().tolist(), list(range(10)))

    def test_a_learner_goes_back_to_an_earlier_state(self):
        """From phase 1, cut short in fine-tuning the classifier, to its middle, where weights were transferred, and to
        that of phase 0, which has no teacher, and on again."""
        states, net, rows, cuts = {}, mn.NETWORKS["tiny"](3, True), [], [(1, "finetune", 0)]

        def report(event):
            key = event["phase"], event.get("stage"), event.get("epoch")
            states.setdefault(key, learner.state_dict())
            if key in cuts:
                raise Stop

        learner = mn.Learner(net, mn.LUCIR(), mn.Herding(), dataclasses.replace(
            SMALL, exemplars="herding", weight_transfer=True, finetune=True, finetune_level="classifier"), report=report)
        phases = mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3])
        rows.append(learner.learn_phase(phases[0]))
        with self.assertRaises(Stop):
            learner.learn_phase(phases[1])
        cut = learner.state_dict()
        learner.load_state_dict(states[1, "model", 0])
        del cuts[:]
        rows.append(learner.learn_phase(phases[1]))
        learner.load_state_dict(cut)
        self.assertEqual(learner.learn_phase(phases[1])["accuracy"], rows[1]["accuracy"])
        for phase, stage in ((1, "model"), (0, "model")):
            learner.load_state_dict(states[phase, stage, 0])
            learner.load_state_dict(states[phase, stage, 0])                # and from where it is already
            self.assertEqual(learner.old is None, phase == 0)
            if phase:
                self.assertEqual(learner.learn_phase(phases[1])["accuracy"], rows[1]["accuracy"])

    def test_model_levels_are_those_without_fine_tuning_unless_it_carries(self):
        config = dataclasses.replace(SMALL, recipe="default", weight_transfer=False, adjust=False, unrehearsed=1)
        phases, nets, states = mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [2, 2, 2]), {}, {}

        def learned(name, start=None, **changes):
            def report(event):
                if event["event"] == "model":
                    nets[name, event["phase"]] = [p.clone() for p in learner.net.state_dict().values()]
                if event.get("stage") == "finetune" and event["phase"] == 1:
                    states.setdefault(name, learner.state_dict())           # in the middle of it

            torch.manual_seed(0)
            learner = mn.Learner(mn.NETWORKS["tiny"](2, True), mn.LUCIR(), mn.Mnemonics(), dataclasses.replace(
                config, **{"finetune": True, "finetune_level": "classifier", "finetune_lr": 1.0, **changes}), report=report)
            if start:
                learner.load_state_dict(start)
            for phase in phases[learner.index:]:
                learner.learn_phase(phase)
            nets[name, 3] = [p.clone() for p in learner.net.state_dict().values()]

        learned("none", finetune=False)
        learned("off", finetune_carries=False)
        learned("by default")
        learned("whole", finetune_carries=False, finetune_level="network")
        learned("on", finetune_carries=True)
        learned("resumed", states["off"], finetune_carries=False)
        same = lambda a, b: all(map(torch.equal, nets[a], nets[b]))
        self.assertTrue(same(("resumed", 3), ("off", 3)))
        for name in ("off", "by default", "whole", "resumed"):
            self.assertTrue(same((name, 2), ("none", 2)), name)
            self.assertFalse(same((name, 3), ("none", 3)), name)            # the last one stays fine-tuned
        self.assertTrue(same(("on", 1), ("none", 1)))                       # phase 0 has no fine-tuning
        self.assertFalse(same(("on", 2), ("none", 2)))
        self.assertEqual([mn.Config(**c).resolved().finetune_carries for c in (
            {}, {"recipe": "paper"}, {"baseline": "lwf"}, {"exemplars": "herding"}, {"finetune_level": "network"},
            {"per_class": 1}, {"budget": 199}, {"budget": 200}, {"budget": 20, "classes": 10})],
            [False, True, True, True, True, True, True, False, False])
        own = type("Own", (mn.LUCIR,), {"finish": lambda self, net, old, held: net.classifier.new.data.mul_(3)})()
        parts = mn.NETWORKS["tiny"](2, True), own, mn.Mnemonics()
        config = dataclasses.replace(config, finetune=True, finetune_level="classifier")
        self.assertTrue(mn.Learner(*parts, config).config.finetune_carries)             # what `finish` made stays too
        with self.assertRaisesRegex(mn.UserError, "after fine-tuning would be undone"):
            mn.Learner(*parts, dataclasses.replace(config, finetune_carries=False))

    def test_one_class_alone_is_learned_by_a_classifier_where_means_have_nothing_to_tell_apart(self):
        learner = learn(dataclasses.replace(SMALL, baseline="icarl", recipe="default", base_level=None, bop_chunk=1))
        self.assertTrue(all(row["exemplar_shift"] > 0 for row in learner.accuracy), learner.accuracy)

    def test_what_a_phase_cannot_do_is_refused_before_it_trains(self):
        def phases(baseline, cumulative, **changes):
            config = dataclasses.replace(SMALL, exemplars="herding", weight_transfer=False, finetune=False, adjust=False,
                                         unrehearsed=0)
            learner = mn.Learner(mn.NETWORKS["tiny"](3, baseline.cosine), baseline, mn.Herding(), dataclasses.replace(
                config, **changes), report=lambda event: events.append(event["event"]))
            data, test = blobs(), blobs(seed=1)
            for phase in mn.make_phases(data.images, data.labels, test.images, test.labels, range(6), [3, 3], cumulative):
                learner.learn_phase(phase)
            return learner

        events = []
        self.assertEqual(len(phases(mn.Joint(), True).accuracy), 2)
        for baseline, cumulative in ((mn.Joint(), False), (mn.LwF(), True), (mn.LUCIR(), True)):
            with self.assertRaisesRegex(ValueError, f"cumulative={not cumulative}"):
                phases(baseline, cumulative)
        for baseline, changes in ((mn.BiC(), {"per_class": 4}), (mn.LwF(), {"budget": 2}), (mn.LwF(), {"unrehearsed": 5}),
                                  (mn.LwF(), {"per_class": 1, "adjust": True})):
            events.clear()
            with self.assertRaisesRegex(mn.UserError, "too few for these settings"):
                phases(baseline, False, **changes)
            self.assertEqual(events, [], changes)

    def test_fine_tuning_turns_the_rows_of_a_cosine_classifier(self):
        """SGD on unit rows at a fixed scale, whatever their lengths and sigma, which come back; resumed in the middle."""
        config = dataclasses.replace(SMALL, finetune=True, finetune_level="classifier", finetune_epochs=7)
        labels, seen = torch.arange(6), []
        memory = mn.Memory(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), labels, labels * 0, labels > 9)
        torch.manual_seed(3)
        net = mn.NETWORKS["tiny"](4, cosine=True)
        net.add_classes(2)

        def learner_of(net, report=None):
            learner = mn.Learner(copy.deepcopy(net), mn.LUCIR(), mn.Herding(), config, report=report)
            learner.index, learner.stage, learner.memory = 1, "finetune", memory
            return learner

        def keep(event):
            if event["epoch"] == 3:
                seen.append(learner.state_dict())

        with unittest.mock.patch.dict(mn.AUGMENTATIONS, crop=lambda images, generator: images):
            rows = []
            for length, sigma in ((1.0, 1.0), (torch.tensor([[0.1], [2.0], [1.0], [3.0], [0.5], [9.0]]), 25.0)):
                with torch.no_grad():
                    net.classifier.set_lengths(torch.ones(6, 1) * length)
                    net.classifier.sigma.fill_(sigma)
                learner = learner_of(net, keep)
                learner._finetune()
                head = learner.net.classifier
                rows.append(F.normalize(head.weight.detach(), dim=1))
                torch.testing.assert_close(head.weight.detach().norm(dim=1, keepdim=True), torch.ones(6, 1) * length)
                self.assertEqual((float(head.sigma.detach()), head.sigma.requires_grad), (sigma, True))
            again = learner_of(net)
            again.load_state_dict(seen[1])
            again._finetune()
        self.assertTrue(torch.equal(again.net.classifier.weight, learner.net.classifier.weight))
        with torch.no_grad():
            f = F.normalize(net.eval().features(learner.normalise(memory.images)), dim=1).double()
        w = F.normalize(net.classifier.weight.detach().double(), dim=1).requires_grad_()
        velocity = 0
        for epoch in range(7):                                              # 6 classes: 6 / 100 of the rate
            loss = F.cross_entropy(8 * f @ F.normalize(w, dim=1).T, labels)
            velocity = 0.9 * velocity + torch.autograd.grad(loss, w)[0] + 5e-4 * w.detach()
            w = (w.detach() - 0.1 * 0.06 * 0.5 ** (epoch // 2) * velocity).requires_grad_()
        for found in rows:
            torch.testing.assert_close(found.double(), F.normalize(w.detach(), dim=1), rtol=0, atol=1e-6)
        self.assertGreater(float((rows[0] - F.normalize(net.classifier.weight.detach(), dim=1)).abs().max()), 1e-3)
        # Five of each class, 30 images in batches of 12, 9 and 9: three steps of a third of the rate.
        memory = mn.Memory(*(torch.cat([value] * 5) for value in vars(memory).values()))
        config, events = dataclasses.replace(config, batch_size=12), []
        learner_of(net, events.append)._finetune()
        self.assertAlmostEqual(events[0]["lr"], 0.1 * 0.06 / 3)

    def test_where_several_images_of_a_class_are_learned_all_classes_of_a_phase_share_a_temporary_model(self):
        def chunks(**changes):
            config = dataclasses.replace(mn.CIFAR100, **changes).resolved()
            learner = mn.Learner(mn.NETWORKS["tiny"](1, True), mn.LUCIR(), mn.Mnemonics(), config)
            learner.index = 1
            source = mn.Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1).long())
            jobs = learner._plan(mn.Phase(1, 12, 13, source, None), None, None)
            return [(kind, len(chunk)) for kind, _, chunk in jobs]

        self.assertEqual(chunks(), [("extract", 10), ("extract", 2)])
        self.assertEqual(chunks(unrehearsed=2), [("extract", 12)])
        self.assertEqual(chunks(recipe="paper"), [("extract", 12), ("adjust", 13)])
        self.assertEqual(chunks(recipe="paper", unrehearsed=1, adjust=False), [("extract", 10), ("extract", 2)])
        self.assertEqual(chunks(unrehearsed=2, bop_chunk=7), [("extract", 7), ("extract", 5)])

    def test_the_default_keeps_one_apart_where_exemplars_are_learned(self):
        def settings(**changes):
            full = dataclasses.replace(mn.CIFAR100, **changes).resolved()
            return full.unrehearsed, full.finetune_level, full.finetune_lr, full.weight_transfer, full.finetune, full.adjust

        self.assertEqual(settings(), (1, "classifier", 0.1, False, True, False))
        self.assertEqual(settings(recipe="paper"), (0, "network", 0.01, True, True, True))
        for recipe in mn.RECIPES:
            self.assertEqual(settings(recipe=recipe, exemplars="herding"), (0, "network", 0.01, False, False, False))
        self.assertEqual(settings(unrehearsed=0, finetune_level="network", weight_transfer=True),
                         (0, "network", 0.01, True, True, False))
        self.assertEqual(settings(baseline="bic")[4:], (False, False))      # its own correction does what that does
        self.assertEqual(settings(baseline="bic", finetune=True)[1:5], ("classifier", 0.1, False, True))
        self.assertEqual(settings(baseline="bic", recipe="paper")[4:], (True, True))
        named = dataclasses.replace(SMALL, recipe="default", unrehearsed=None, finetune=None)          # LUCIR
        for baseline, on in ((mn.BiC(), False), (mn.LwF(), True)):
            learner = mn.Learner(mn.NETWORKS["tiny"](4), baseline, mn.Mnemonics(), named)
            self.assertEqual(learner.config.finetune, on)
        for changes in ({}, {"exemplars": "herding"}, {"baseline": "joint"}, {"baseline": "bic"}, {"per_class": 1}):
            for preset in (mn.CIFAR100, dataclasses.replace(run_cifar.DEMO, per_class=10)):
                mn.validate(dataclasses.replace(preset, **changes))

    def test_means_are_what_icarl_learns_pixels_for(self):
        for baseline, level in (("icarl", "means"), ("lwf", "classifier"), ("lucir", "classifier")):
            config = dataclasses.replace(mn.CIFAR100, baseline=baseline)
            self.assertEqual(config.resolved().base_level, level)
            for given in ({"base_level": "network"}, {"recipe": "paper"}):
                self.assertEqual(dataclasses.replace(config, **given).resolved().base_level, "network")
        plain = dataclasses.replace(SMALL, recipe="default", base_level=None)          # names another baseline
        learner = mn.Learner(mn.NETWORKS["tiny"](4), mn.ICaRL(), mn.Mnemonics(), plain)
        self.assertEqual(learner.config.base_level, "means")

    def test_a_trajectory_that_waits_on_the_host_comes_back_to_the_device(self):
        net, data, base = mn.NETWORKS["tiny"](6, True).eval(), blobs(), mn.base_level
        images, labels, asked = data.images[::5], data.labels[::5], []

        def far(*args, **settings):
            """Parameters that can do nothing but be moved."""
            return [SimpleNamespace(to=lambda device, theta=theta: asked.append(device) or theta)
                    for theta in base(*args, **settings)]

        for level in ("classifier", "network"):
            config = dataclasses.replace(self.recipe(), base_level=level).resolved()
            bop = mn.LocalBOP([net], labels, data, config, 3, mn.MicroBatch())
            near = bop.loss(images)
            with unittest.mock.patch.object(mn, "base_level", far):
                self.assertEqual(bop.loss(images), near)
        self.assertEqual(asked, [labels.device] * 2)

    def test_meta_batches_hold_as_many_of_every_class_and_of_every_image_of_it(self):
        labels = torch.tensor([3] * 30 + [1] * 10)[torch.randperm(40)]                   # no 0 and no 2
        images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 8, 8)
        config = dataclasses.replace(self.recipe(), meta_batch=4001, base_level="network").resolved()
        bop = mn.LocalBOP([mn.NETWORKS["tiny"](6, True).eval()], labels, mn.Images(images, labels), config, 0,
                          mn.MicroBatch())
        x, y = bop.meta_batch(0, 0)
        self.assertEqual(y.bincount().tolist(), [0, 2000, 0, 2000])
        found = bop.normalise.to_uint8(x)[:, 0, 0, 0].long()
        self.assertTrue(torch.equal(labels[found], y))
        drawn = found.bincount(minlength=40) / torch.where(labels == 1, 200, 2000 / 30)
        self.assertTrue(0.5 < float(drawn.min()) < float(drawn.max()) < 1.6, drawn)
        self.assertFalse(torch.equal(x, bop.meta_batch(0, 1)[0]))

    def test_micro_batches_of_a_cpu_do_not_follow_its_free_memory(self):
        net, images, labels = mn.NETWORKS["tiny"](6, True).eval(), torch.randn(1, 3, 8, 8), torch.tensor([0])
        sizes = []
        for free in (2 ** 20, 2 ** 33, 2 ** 39):
            with unittest.mock.patch.object(mn, "free_memory", lambda _: free):
                sizes.append(mn.fitting_micro_batch(net, images, labels))
        self.assertTrue(1 <= sizes[0] < 256, sizes)
        self.assertEqual(sizes[1:], [256, 256])

    def test_micro_batches_do_not_change_the_result(self):
        net, data = mn.NETWORKS["tiny"](6, True).eval(), blobs()
        results = [mn.optimise_exemplars(net, data.images[::5], data.labels[::5], data, data.labels,
                                         self.recipe(), micro_batch=mn.MicroBatch(size)) for size in (None, 7)]
        self.assertLessEqual(int((results[0][0].int() - results[1][0].int()).abs().max()), 1)
        self.assertAlmostEqual(results[0][2], results[1][2], places=3)

    def test_the_data_is_encoded_as_the_model_level_computes(self):
        """In bfloat16 where that is, close to float32's; the exemplars themselves stay in full precision."""
        torch.manual_seed(0)
        net, data, given = mn.NETWORKS["tiny"](6, True).eval(), blobs(), []
        images, labels, optimise = data.images[::5], data.labels[::5], mn.optimise_exemplars

        def bop(precision):
            """The same but for the precision."""
            config = dataclasses.replace(self.recipe().resolved(), precision=precision)
            return mn.LocalBOP([net], labels, data, config, 3, mn.MicroBatch())

        with torch.no_grad():
            exact = net.features(bop("auto").normalise(data.images))
        for precision, least, most in (("auto", 0, 1e-6), ("float32", 0, 1e-6), ("bfloat16", 1e-4, 0.02)):
            codes = bop(precision).data_codes(0)
            error = float((codes - exact).norm() / exact.norm())
            self.assertEqual(codes.dtype, torch.float32)
            self.assertTrue(least <= error <= most, error)
        half = bop("bfloat16")
        pixels = half.normalise(images)
        by_exact, by_half = bop("float32").gradient(pixels, 0), half.gradient(pixels, 0)
        self.assertLess(float((by_half - by_exact).norm() / by_exact.norm()), 0.1)

        def seen(*args, **settings):
            given.append(args[5].precision)
            return optimise(*args, **settings)

        with unittest.mock.patch.object(mn, "optimise_exemplars", seen), \
                unittest.mock.patch.object(mn, "pick_precision", lambda device: "bfloat16"):
            learn(self.recipe(precision="auto", exemplar_epochs=1))
        self.assertEqual(set(given), {"bfloat16"})

    def test_several_networks_take_turns(self):
        learner = learn(dataclasses.replace(SMALL, base_networks=3, ahead_epochs=2, exemplar_lr=0.3))
        single = learn(dataclasses.replace(SMALL, exemplar_lr=0.3))
        self.assertFalse(torch.equal(learner.memory.images, single.memory.images))

    def test_a_look_ahead_is_gone_once_it_is_over(self):
        gc.collect()
        alive = lambda: {id(each) for each in gc.get_objects() if type(each) is mn.Learner}
        before = alive()
        gc.disable()                                          # which rarely frees a circle while a network trains
        try:
            learner = learn(dataclasses.replace(SMALL, base_networks=2))
            self.assertEqual(alive() - before, {id(learner)})
        finally:
            gc.enable()

    def test_a_learner_refuses_more_networks_than_epochs_ahead(self):
        config = dataclasses.replace(SMALL, base_networks=4, ahead_epochs=2)
        with self.assertRaisesRegex(mn.UserError, "gives 3 networks.* and 4 are wanted"):
            learn(config)
        learn(dataclasses.replace(config, adjust=False), strategy=mn.Herding())                # which asks for none

    def test_looking_ahead_trains_copies_on_turned_images_and_nothing_else(self):
        config = dataclasses.replace(SMALL, base_networks=4, ahead_epochs=5, ahead_turns=3, weight_transfer=True)
        torch.manual_seed(0)
        learner = mn.Learner(mn.NETWORKS["tiny"](3, True), mn.LUCIR(), mn.Mnemonics(), config)
        phase, _ = mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3])
        learner.learn_phase(phase)
        before = mn._pack(learner.net), dict(vars(learner.memory)), learner.baseline.state_dict()
        learner.index = 0                                                  # as at the end of phase 0's model level
        turned = learner._turned(phase, phase.train)
        learner.device = torch.device("meta")                               # stands for a GPU beside data on the host
        self.assertEqual(learner._turned(phase, phase.train).images.device.type, "meta")
        learner.device = torch.device("cpu")
        networks = learner._look_ahead(phase, phase.train, learner.memory)
        self.assertEqual(len(networks), 3)
        after = mn._pack(learner.net), dict(vars(learner.memory)), learner.baseline.state_dict()
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        self.assertEqual(turned.labels.unique().tolist(), list(range(3, 12)))
        quarter = lambda x: x.flip(3).transpose(2, 3)
        for label in (0, 1, 2):                             # a third each by a quarter, a half and three quarters
            back = []
            for k in (2, 1, 0):
                part = turned.images[turned.labels == label + 3 * (3 - k)]
                self.assertIn(len(part) - int(sum(phase.train.labels == label)) // 3, (0, 1))
                for _ in range(k + 1):
                    part = quarter(part)
                back += map(bytes, part.flatten(1).numpy())
            was = phase.train.images[phase.train.labels == label]
            self.assertEqual(sorted(map(bytes, was.flatten(1).numpy())), sorted(back))
        wide = learner._turned(phase, mn.Images(phase.train.images[..., :4], phase.train.labels))
        self.assertEqual(wide.images.shape[2:], phase.train.images[..., :4].shape[2:])          # not square: half turns
        self.assertEqual(wide.labels.unique().tolist(), [3, 4, 5])
        some = torch.ones(len(phase.train), dtype=torch.bool)
        some[torch.nonzero(phase.train.labels == 1)[1:]] = False                 # one image of a class: no class is empty
        few = learner._turned(phase, phase.train.subset(torch.nonzero(some).squeeze(1)))
        self.assertEqual(few.labels.unique().tolist(), [3, 4, 5])
        convolution = [mn._convolutions(net)[-1].weight for net in (learner.net, *networks)]
        self.assertEqual([net.classifier.classes for net in networks], [12, 12, 12])
        self.assertTrue(all(w.requires_grad for w in convolution))
        for a, b in itertools.combinations(convolution, 2):
            self.assertFalse(torch.equal(a, b))

    def test_eq_10_optimises_one_part_at_a_time_against_the_others(self):
        learner = learn(dataclasses.replace(SMALL, subsets=2))
        memory = learner.memory
        calls = []

        def spy(images, labels, data, seed):
            calls.append((images.clone(), labels, data.images.clone(), data.labels))
            return images + 1, 1.0, 0.5

        learner._optimise = spy
        start = memory.images[memory.labels < 3]
        out, before, after, _ = learner._adjust_job(start.clone(), memory.labels[memory.labels < 3], None, ("s",))
        self.assertEqual(len(calls), 2)
        (a, la, rest_a, lb), (b, _, rest_b, _) = calls
        for part in (la, lb):
            self.assertEqual(torch.bincount(part).tolist(), [2, 2, 2])
        self.assertTrue(torch.equal(b, rest_a))                             # 10b optimises what 10a validated on,
        self.assertTrue(torch.equal(rest_b, a + 1))                         # against the adjusted first part
        self.assertTrue(torch.equal(out, start + 1))
        self.assertEqual((before, after), (1.0, 0.5))

    def test_labels_stay_with_images_through_write_back(self):
        # With nothing to learn but the identity, every stored image must still be a training image of its class.
        learner = learn(dataclasses.replace(SMALL, exemplar_lr=1e-9, exemplar_optimizer="sgd", adjust=True))
        data = blobs()
        for image, label in zip(learner.memory.images, learner.memory.labels):
            match = (data.images.flatten(1) == image.flatten()).all(1)
            self.assertEqual(data.labels[match].tolist(), [int(label)])
        self.assertEqual(learner.accuracy[1]["adjust"]["exemplar_shift"], 0)

    def test_switches_work_one_by_one(self):
        for exemplars in mn.STRATEGIES:
            for adjust in (False, True):
                row = learn(dataclasses.replace(SMALL, exemplars=exemplars, adjust=adjust, weight_transfer=False,
                                                finetune=False, exemplar_lr=0.3)).accuracy[1]
                self.assertEqual(row["meta_loss_before"] is not None, exemplars == "mnemonics")
                self.assertEqual(row["adjust"]["meta_loss_before"] is not None, adjust)

    def test_finetuning_is_balanced_and_leaves_statistics_alone(self):
        learner = learn(dataclasses.replace(SMALL, exemplars="herding", finetune=False))
        stats = learner.net.backbone.body[1].running_mean.clone()
        weight = learner.net.backbone.body[0].weight.clone()
        for level in ("classifier", "network"):
            rows = learner.net.classifier.new.clone()
            learner.config = dataclasses.replace(learner.config, finetune=True, finetune_level=level)
            learner.index, learner.stage, learner.progress = 1, "finetune", {}
            learner._finetune()
            self.assertTrue(torch.equal(stats, learner.net.backbone.body[1].running_mean))
            self.assertEqual(torch.equal(weight, learner.net.backbone.body[0].weight), level == "classifier")
            self.assertFalse(torch.equal(rows, learner.net.classifier.new))
            self.assertTrue(all(p.requires_grad for p in learner.net.parameters() if p.numel()))

    def test_herding_against_brute_force(self):
        rng = np.random.default_rng(0)
        features = rng.normal(size=(40, 5)).astype(np.float32)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        mu, w, picked = unit.mean(0), unit.mean(0), []
        while len(picked) < 12:
            best = max(range(40), key=lambda i: sum(w[d] * unit[i][d] for d in range(5)))
            if best not in picked:
                picked.append(best)
            w = w + mu - unit[best]
        self.assertEqual(mn.herding(torch.from_numpy(features), 12).tolist(), picked)

    def test_herding_of_duplicates_and_of_everything(self):
        same = mn.herding(torch.ones(6, 3), 6)
        self.assertEqual(sorted(same.tolist()), list(range(6)))
        self.assertEqual(sorted(mn.herding(torch.randn(9, 3), 9).tolist()), list(range(9)))
        with self.assertRaises(ValueError):
            mn.herding(torch.randn(3, 3), 4)

    def test_budget_is_shared_and_dropped_by_rank(self):
        config = dataclasses.replace(SMALL, budget=36, phases=3, exemplars="herding")
        learner = mn.Learner(mn.NETWORKS["tiny"](3, True), mn.LUCIR(), mn.Herding(), config)
        before = {}
        for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 1, 1, 1]):
            row = learner.learn_phase(phase)
            each = 36 // (phase.seen + phase.classes)
            memory = learner.memory
            self.assertEqual(torch.bincount(memory.labels).tolist(), [each] * (phase.seen + phase.classes))
            self.assertEqual(row["exemplars"], len(memory))
            for label in range(phase.seen):                                # the best ranks survive
                mine = memory.labels == label
                self.assertEqual(memory.ranks[mine].tolist(), list(range(each)))
                self.assertTrue(torch.equal(memory.images[mine], before[label][:each]))
            before = {k: memory.images[memory.labels == k] for k in range(phase.seen + phase.classes)}


# ---- runs ----

class Stop(Exception):
    """Stands for a kill."""


class Runs(Case):

    def test_time_left_is_of_the_whole_phase_and_of_the_run(self):
        config = dataclasses.replace(SMALL, exemplars="mnemonics", base_networks=1, unrehearsed=1).resolved()
        display = mn.Display(config, mn.phases_of(blobs(), blobs(), list(range(6)), [4, 2]), False)
        display.begin(display.phases[0])
        self.assertEqual(display._time_left(), "")
        passes = [display._passes(phase) for phase in display.phases]
        display.rates = dict.fromkeys(passes[0], 1.0)
        display.done = {"model": passes[0]["model"] / 2}
        left = sum(passes[0].values()) - passes[0]["model"] / 2
        self.assertEqual(display._seconds_left(), (left, left + sum(passes[1].values())))
        display.done["exemplars"] = 0.0                                     # the level before is over
        left -= passes[0]["model"] / 2 + passes[0]["look-ahead"]
        self.assertEqual(display._time_left(), f", {mn.short_time(left)} left, run "
                                               f"{mn.short_time(left + sum(passes[1].values()))}")

    def test_progress_makes_no_test_sets(self):
        made = []

        class Counted(mn.Phase):
            @property
            def test(self):
                made.append(self.index)
                return self.make_test()

        counts = []
        for epochs in (1, 4):
            made.clear()
            with unittest.mock.patch.object(mn, "Phase", Counted):
                self.small_run(f"run{epochs}", epochs=epochs, exemplars="random")
            counts.append(sorted(made))
        self.assertIn(1, counts[0])
        self.assertEqual(*counts)                                           # as many for four times the steps

    def test_files_of_a_run(self):
        results = self.small_run("run", phases=3)
        folder = self.folder / "run"
        names = {path.name for path in folder.iterdir()} - {"accuracy.png"}
        self.assertEqual(names, {"config.json", "log.jsonl", "checkpoint.pt", "results.json", "exemplars.png"} | {
            f"{kind}_{k:03d}.pt" for kind in ("model", "exemplars") for k in range(4)})
        self.assertEqual(results, json.loads((folder / "results.json").read_text()) | {"seconds": results["seconds"]})
        self.assertTrue(results["complete"])
        self.assertEqual([row["classes"] for row in results["phases"]], [3, 4, 5, 6])
        self.assertAlmostEqual(results["average_accuracy"], np.mean([r["accuracy"] for r in results["phases"]]))
        self.assertAlmostEqual(results["forgetting_rate"],
                               results["phases"][0]["initial_accuracy"] - results["phases"][-1]["initial_accuracy"])
        for row in results["phases"]:
            self.assertEqual(row["exemplars"], 4 * row["classes"])
            self.assertEqual(row["exemplar_bytes"], row["exemplars"] * 3 * 8 * 8)
            sizes = np.array([3, 1, 1, 1][:row["phase"] + 1])
            self.assertAlmostEqual(row["accuracy"], float(np.dot(sizes, row["phase_accuracies"]) / sizes.sum()), places=2)
        for path in folder.glob("*.pt"):
            torch.load(path, weights_only=True)
        net, memory = mn.load(folder)
        self.assertEqual((net.classifier.classes, len(memory)), (6, 24))
        from PIL import Image
        self.small_run("plain", exemplars="random")
        self.small_run("one", per_class=1, recipe="default", bop_chunk=6, phases=1)
        for run, across, down, cell, strips in (                            # initial, learned, difference; or kept alone
                ("run", 4, 1, 64, 3), ("plain", 2 * 4, 2, 64, 1), ("one", 3, 1, 96, 3)):
            picture = Image.open(self.folder / run / "exemplars.png")
            self.assertEqual(picture.size, (110 + across * (cell + 4), down * (32 + strips * (cell + 4))), run)
            for column in range(across):                                    # a picture in every place
                left = 110 + column * (cell + 4)
                self.assertGreater(len(picture.crop((left, 22, left + cell, 22 + cell)).getcolors(cell * cell)), 10)

    def test_loaded_network_predicts_as_the_run_did(self):
        for baseline in ("lucir", "bic"):
            results = self.small_run(baseline, baseline=baseline, per_class=8)
            net, _ = mn.load(self.folder / baseline)
            test = blobs(seed=1)
            order = torch.tensor(results["class_order"])
            with torch.no_grad():
                guess = order[net(mn.Normalise(SMALL.mean, SMALL.std)(test.images)).argmax(1)]
            self.assertAlmostEqual(100 * float((guess == test.labels).float().mean()),
                                   results["phases"][-1]["accuracy"], places=2)

    def test_killed_at_every_point_and_resumed_is_identical(self):
        settings = dict(baseline="bic", per_class=8, phases=1, epochs=2, base_networks=2)
        whole = self.small_run("whole", **settings)
        config = dataclasses.replace(SMALL, out=str(self.folder / "cut"), **settings)
        original, points = mn._Run.on_event, 0
        for stop_after in range(1, 40):
            count = [0]

            def cut(self, event):
                original(self, event)
                count[0] += 1
                if count[0] == 2:                                           # two steps forward in every life
                    raise Stop

            mn._Run.on_event = cut
            try:
                quiet(mn.run, dataclasses.replace(config, resume=stop_after > 1), blobs(), blobs(seed=1))
                break
            except Stop:
                points += 1
            finally:
                mn._Run.on_event = original
        self.assertGreater(points, 5)
        self.same_runs(self.folder / "whole", self.folder / "cut")
        self.assertEqual(whole["average_accuracy"],
                         json.loads((self.folder / "cut/results.json").read_text())["average_accuracy"])

    def test_interrupted_inside_torch_save(self):
        path = self.folder / "x.pt"
        mn.save_tensors(path, {"a": torch.zeros(1000)})
        before = path.read_bytes()

        class Cut:
            def __init__(self, file):
                self.file, self.left = file, 3

            def write(self, content):
                self.left -= 1
                if not self.left:
                    raise mn.Interrupted(15)
                return self.file.write(content)

            def flush(self):
                self.file.flush()

        def cut(file):
            file.write(b"half")
            raise mn.Interrupted(2)

        for write in (cut, lambda file: torch.save({"a": torch.ones(1000)}, Cut(file))):
            with self.assertRaises(mn.Interrupted):
                mn.atomic_write(path, write)
        try:
            raise mn.Interrupted(2)
        except mn.Interrupted:                                              # saving because of one, on a full disk
            with self.assertRaisesRegex(mn.RunError, "make room"):
                mn.atomic_write(path, lambda file: os.write(-1, b"x"))
        self.assertEqual((path.read_bytes(), list(self.folder.iterdir())), (before, [path]))

    def test_interrupted_while_it_writes_a_phase_s_files(self):
        self.small_run("whole")
        names, write = sorted(path.name for path in (self.folder / "whole").iterdir()), mn.atomic_write
        for name in ("model_001.pt", "exemplars_001.pt", "results.json", "exemplars.png"):
            folder = self.folder / f"cut-{name}"
            left = [1 if "001" in name else 2]                             # the last time that it is written

            def interrupted(path, content):
                left[0] -= path.name == name
                if path.name == name and not left[0]:
                    raise mn.Interrupted(2)
                write(path, content)

            with unittest.mock.patch.object(mn, "atomic_write", interrupted), self.assertRaises(mn.Interrupted):
                self.small_run(folder.name)
            self.small_run(folder.name, resume=True)
            self.assertEqual(sorted(path.name for path in folder.iterdir()), names)
            self.assertTrue(json.loads((folder / "results.json").read_text())["complete"])
            self.same_runs(self.folder / "whole", folder)

    def same_runs(self, one, two):
        a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
        strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        self.assertEqual(strip(a["phases"]), strip(b["phases"]))
        a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["learner"] for folder in (one, two))
        self.assertTrue(all(torch.equal(v, b["net"]["weights"][k]) for k, v in a["net"]["weights"].items()))
        self.assertTrue(torch.equal(a["memory"]["images"], b["memory"]["images"]))
        logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
        times = ("seconds", "images_per_second", "exemplar_seconds")
        logs = [[{k: v for k, v in e.items() if k not in times} for e in log] for log in logs]
        self.assertEqual(*logs)

    def test_same_seed_same_results(self):
        self.small_run("a")
        self.small_run("b")
        self.same_runs(self.folder / "a", self.folder / "b")
        other = self.small_run("c", seed=1)
        self.assertNotEqual(other["phases"], json.loads((self.folder / "a/results.json").read_text())["phases"])

    def test_start_from_equals_a_run_of_its_own(self):
        self.small_run("base", exemplars="herding", phases=3)
        self.small_run("own", exemplars="random", phases=3)
        self.small_run("from", exemplars="random", phases=3, start_from=str(self.folder / "base"))
        own, other = (torch.load(self.folder / n / "checkpoint.pt", weights_only=True)["learner"] for n in ("own", "from"))
        self.assertTrue(torch.equal(own["memory"]["images"], other["memory"]["images"]))
        self.assertTrue(all(torch.equal(v, other["net"]["weights"][k]) for k, v in own["net"]["weights"].items()))
        # A later phase of the same settings gives the same end.
        settings = dict(baseline="bic", exemplars="herding", phases=3, per_class=6)
        base = self.small_run("whole", **settings)
        again = self.small_run("late", **settings, start_from=f"{self.folder}/whole:2")
        self.assertEqual([r["accuracy"] for r in again["phases"]], [r["accuracy"] for r in base["phases"]])
        self.assertTrue(all(r["seconds"] >= 0 for r in again["phases"]))
        self.assertTrue((self.folder / "late/model_002.pt").exists())

    def test_a_hook_sees_the_network_in_evaluation_mode_after_start_from_too(self):
        class Calling(mn.LwF):
            def finish(self, net, old, held):
                """In training mode this would change BatchNorm's statistics."""
                net(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))

        with unittest.mock.patch.dict(mn.BASELINES, own=Calling):
            self.small_run("a", baseline="own", exemplars="herding")
            self.small_run("b", baseline="own", exemplars="herding", start_from=str(self.folder / "a"))
            nets = [mn.load(self.folder / name)[0].state_dict() for name in "ab"]
        torch.testing.assert_close(*nets, rtol=0, atol=0)

    def test_start_from_refuses_what_differs(self):
        self.small_run("base")
        before = {path: path.read_bytes() for path in (self.folder / "base").iterdir()}
        self.small_run("base", resume=True)                                 # a finished run stays as it is
        self.assertEqual(before, {path: path.read_bytes() for path in (self.folder / "base").iterdir()})
        for changes, word in (({"lr": 0.05}, "lr"), ({"seed": 5}, "seed"), ({"baseline": "lwf"}, "cosine"),
                              ({"epochs": 4}, "epochs")):
            with self.assertRaisesRegex(mn.UserError, word):
                self.small_run("no" + word[:4], start_from=str(self.folder / "base"), **changes)
            self.assertFalse((self.folder / ("no" + word[:4])).exists())    # nothing in the way of another try
        for source, text in (("base:x", "a phase's number, as in .*base:1"), ("none", "none/config.json does not exist"),
                             ("none:1", "none/config.json does not exist")):
            with self.assertRaisesRegex(mn.UserError, text):
                self.small_run("no", start_from=str(self.folder / source))
        with self.assertRaisesRegex(mn.UserError, "dataset = blobs, this run other: .* another run to start from$"):
            self.small_run("no", start_from=str(self.folder / "base"), dataset="other")

    def test_start_from_goes_on_in_the_same_precision(self):
        self.small_run("base", exemplars="herding", precision="bfloat16")
        source = str(self.folder / "base")
        with unittest.mock.patch.object(mn, "pick_precision", lambda device: "float32"):
            config = self.small_run("auto", exemplars="herding", precision="auto", start_from=source)["config"]
        self.assertEqual(config["precision_used"], "bfloat16")
        saved = torch.load(self.folder / "auto/checkpoint.pt", weights_only=True)["learner"]
        self.assertEqual(saved["precision"], "bfloat16")
        with self.assertRaisesRegex(mn.UserError, "trained in bfloat16"):
            self.small_run("other", exemplars="herding", precision="float32", start_from=source)

    def test_resume_refuses_what_differs_and_what_is_damaged(self):
        self.small_run("run")
        with self.assertRaisesRegex(mn.UserError, "holds a run already"):
            self.small_run("run")
        with self.assertRaisesRegex(mn.UserError, "lr = 0.1, this run 0.2"):
            self.small_run("run", resume=True, lr=0.2)
        with self.assertRaisesRegex(mn.UserError, "no run in"):
            self.small_run("nothing", resume=True)
        path = self.folder / "run/checkpoint.pt"
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            tensors = [part for part in archive.infolist() if "/data/" in part.filename]
            at = whole.index(archive.read(max(tensors, key=lambda part: part.file_size)))
        path.write_bytes(whole[:at + 5] + bytes([whole[at + 5] ^ 1]) + whole[at + 6:])
        with self.assertRaisesRegex(mn.UserError, "damaged or not ours"):
            self.small_run("run", resume=True)
        path.write_bytes(whole[:1000])
        with self.assertRaisesRegex(mn.UserError, "damaged or not ours: go on from .* --start-from .*run:PHASE"):
            self.small_run("run", resume=True)

    def test_a_finished_run_gets_its_results_back(self):
        first = self.small_run("run")
        path = self.folder / "run/results.json"
        path.unlink()
        self.small_run("run", resume=True)
        again = json.loads(path.read_text())
        self.assertEqual(first | {"seconds": 0}, again | {"seconds": 0})
        for damage, text in (("{", "delete it, and --resume"), ('{"epochs": 3}', "is not a results.json of this program")):
            path.write_text(damage)
            with self.assertRaisesRegex(mn.UserError, text):
                self.small_run("run", resume=True)
            self.assertEqual(path.read_text(), damage)

    def test_resumed_elsewhere_the_record_names_the_precision_used(self):
        with unittest.mock.patch.object(mn._Run, "on_event", side_effect=Stop), self.assertRaises(Stop):
            self.small_run("run")
        path = self.folder / "run/config.json"
        path.write_text(path.read_text().replace('"precision_used": "float32"', '"precision_used": "bfloat16"'))
        config = self.small_run("run", resume=True)["config"]
        self.assertEqual(config["precision_used"], "bfloat16")

    def test_another_pytorch_or_machine_is_said_and_kept_in_the_record(self):
        def elsewhere(torch_version, module_version=mn.__version__):
            about = mn._about(torch.device("cpu"))
            versions = {"torch": torch_version, "mnemonics": module_version}
            return unittest.mock.patch.object(mn, "_about", lambda device: {**about, "versions": versions})

        with elsewhere("2.11.0"), unittest.mock.patch.object(mn._Run, "on_event", side_effect=Stop), \
                self.assertRaises(Stop):
            self.small_run("begun")
        with elsewhere("2.11.0"):
            self.small_run("base")
        for name, settings, key in (("begun", {"resume": True}, "resumed"),
                                    ("from", {"start_from": str(self.folder / "base")}, "started")):
            settings = dataclasses.replace(SMALL, out=str(self.folder / name), **settings)
            with elsewhere("2.14.1"):
                results, _, err = quiet(mn.run, settings, blobs(), blobs(seed=1))
            config = results["config"]
            self.assertRegex(err, "^warning: .* began on .*, torch 2.11.0 and goes on with .*, torch 2.14.1: .*\n$")
            parts = [config, *config["resumed"]] if key == "resumed" else [config["started"], config]
            self.assertEqual([part["versions"]["torch"] for part in parts], ["2.11.0", "2.14.1"])
        config = self.small_run("again", start_from=str(self.folder / "begun"))["config"]
        self.assertEqual([part["versions"]["torch"] for part in config["started"]["resumed"]], ["2.14.1"])
        with elsewhere("2.11.0", "0.0.1"), self.assertRaisesRegex(mn.UserError, "version of mnemonics = "):
            self.small_run("other", start_from=str(self.folder / "base"))

    def test_a_run_inside_a_phase_is_not_loaded(self):
        def stop(self, event, original=mn._Run.on_event):
            original(self, event)
            if (event["event"], event["phase"], event.get("stage")) == ("epoch", 1, "model"):
                raise Stop

        with unittest.mock.patch.object(mn._Run, "on_event", stop), self.assertRaises(Stop):
            self.small_run("run")
        with self.assertRaisesRegex(mn.UserError, "has not finished phase 1; --resume it first"):
            mn.load(self.folder / "run")
        self.small_run("run", resume=True)
        mn.load(self.folder / "run")

    def test_a_teacher_of_ones_own_is_resumed(self):
        class Wrapped(torch.nn.Module):
            """The network under another name than any of ours."""

            def __init__(self, net):
                super().__init__()
                self.inner = net
                self.forward = net.forward

        class Own(mn.LwF):
            def teacher(self, net):
                return Wrapped(copy.deepcopy(net)).eval().requires_grad_(False)

        config = dataclasses.replace(SMALL, baseline="lwf", exemplars="herding")
        learner = learn(config, Own())
        again = mn.Learner(mn.NETWORKS["tiny"](1, False), Own(), mn.Herding(), config)
        again.load_state_dict(learner.state_dict())
        self.assertFalse(any(p.requires_grad for p in again.old.parameters()))
        torch.testing.assert_close(again.old.state_dict(), learner.old.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(again.net.state_dict(), learner.net.state_dict(), rtol=0, atol=0)

    def test_a_baseline_s_buffer_may_grow_with_the_classes(self):
        class Counts(mn.LwF):
            def __init__(self):
                super().__init__()
                self.register_buffer("seen", torch.zeros(0))
                self.register_buffer("later", None)

            def prepare(self, net, old, features):
                self.seen = torch.bincount(features()[1]).float()
                self.later = self.seen.double() / 3

        config = dataclasses.replace(SMALL, baseline="lwf", exemplars="herding")
        learner, again = learn(config, Counts()), Counts()
        mn.Learner(mn.NETWORKS["tiny"](1, False), again, mn.Herding(), config).load_state_dict(learner.state_dict())
        for name in ("seen", "later"):
            self.assertTrue(torch.equal(getattr(again, name), getattr(learner.baseline, name)))
            self.assertEqual(getattr(again, name).dtype, getattr(learner.baseline, name).dtype)

    def test_other_images_than_a_run_began_with_are_refused(self):
        self.small_run("run", exemplars="random")
        config = dataclasses.replace(SMALL, exemplars="random", out=str(self.folder / "run"), resume=True)
        following = dataclasses.replace(config, out=str(self.folder / "from"), resume=False,
                                        start_from=str(self.folder / "run"))
        other, again = blobs(), blobs()
        other.images = 255 - other.images
        again.labels = again.labels[torch.arange(len(again)).roll(1)]
        for data in (other, again):
            for settings in (config, following):
                with self.assertRaisesRegex(mn.UserError, "was trained on other images"):
                    quiet(mn.run, settings, data, blobs(seed=1))
        self.small_run("from", exemplars="random", start_from=following.start_from)
        path = self.folder / "run/config.json"
        settings = json.loads(path.read_text())
        del settings["data"]                                                            # as older runs have it
        path.write_text(json.dumps(settings))
        self.small_run("run", exemplars="random", resume=True)

    def test_a_run_with_a_baseline_of_ones_own(self):
        with unittest.mock.patch.dict(mn.BASELINES, own=type("Own", (mn.LUCIR,), {})):
            self.small_run("run", baseline="own", exemplars="random")
            mn.load(self.folder / "run")
            with unittest.mock.patch.dict(mn.STRATEGIES, mine=type("Mine", (mn.Herding,), {})):
                self.small_run("strategy", baseline="own", exemplars="mine")
        for call in (lambda: mn.load(self.folder / "run"), lambda: self.small_run(
                "from", exemplars="random", start_from=str(self.folder / "run"))):
            with self.assertRaisesRegex(mn.UserError, "'own' is not one of .*BASELINES"):
                call()
        with unittest.mock.patch.object(mn, "curves_picture", lambda *_: []):
            status, out, err = quiet(mn.report, [str(self.folder)])          # the other run is reported all the same
        self.assertEqual((status, out.count("| random |"), out.count("mine"), err.count("\n")), (0, 1, 0, 1), out + err)
        self.assertRegex(err, "warning: left out: .*strategy.results.json: 'mine' is not one of .*STRATEGIES")
        for changes, registry in (({"network": "x"}, "NETWORKS"), ({"baseline": "x"}, "BASELINES"), ({"exemplars": "x"},
                                                                                                    "STRATEGIES")):
            with self.subTest(changes), self.assertRaisesRegex(mn.UserError, f"x.* into mnemonics.{registry} first"):
                self.small_run("no", **changes)

    def test_what_its_maker_froze_is_not_trained(self):
        networks, original = [], mn.LocalBOP.__init__

        def watched(self, starts, *args):
            networks.extend(starts)
            original(self, starts, *args)

        for changes in ({}, {"weight_transfer": True}, {"finetune_level": "classifier"},
                        {"base_level": "network", "base_lr": 0.1, "base_networks": 2}):
            with self.subTest(**changes), unittest.mock.patch.object(mn.LocalBOP, "__init__", watched):
                torch.manual_seed(0)
                net = mn.NETWORKS["tiny"](3, True)
                net.backbone.requires_grad_(False)
                frozen = {name: p.detach().clone() for name, p in net.backbone.named_parameters()}
                rows = net.classifier.weight.detach().clone()
                learner = mn.Learner(net, mn.LUCIR(), mn.Mnemonics(), dataclasses.replace(SMALL, **changes))
                for phase in mn.phases_of(blobs(), blobs(seed=1), list(range(6)), [3, 3]):
                    learner.learn_phase(phase)
                after = dict(net.backbone.named_parameters())
                self.assertEqual([p.requires_grad for p in after.values()], [False] * len(frozen))
                torch.testing.assert_close({k: v.detach() for k, v in after.items()}, frozen, rtol=0, atol=0)
                self.assertFalse(torch.equal(net.classifier.weight[:3], rows))
        # At the exemplar level neither: not in temporary models, nor in those of a pretended next phase.
        self.assertEqual({p.requires_grad for net in networks for p in net.backbone.parameters()}, {False})
        bop = mn.LocalBOP([net], blobs().labels, blobs(), dataclasses.replace(SMALL, base_level="network").resolved(), 0,
                          mn.MicroBatch())
        self.assertEqual({p.requires_grad for p in bop.start(0).backbone.parameters()}, {False})
        lone = mn.transfer_weights(torch.nn.Conv2d(1, 1, 1).requires_grad_(False))      # a bias alone is not transferred
        lone.bias.requires_grad_(True)
        self.assertEqual(len(list(mn.transfer_weights(lone).parameters())), 2)

    def test_chunks_done_by_another_number_of_processes_are_not_lost(self):
        config = dataclasses.replace(SMALL, bop_chunk=1)
        whole, done = learn(config), {}

        def keep(event):
            if event["event"] == "exemplars" and event.get("chunk") == 4 and event["phase"]:
                done.update(copy.deepcopy(box[0].progress["done"]))

        box, original = [], mn.Learner._exemplars

        def remember(self, *args):
            box[:] = [self]
            if done:                                                        # as if some had been done, with gaps
                self.progress = {"done": {k: done[k] for k in (0, 1, 3)}} if self.index else {}
            original(self, *args)

        with unittest.mock.patch.object(mn.Learner, "_exemplars", remember):
            learn(config, report=keep)
            self.assertEqual(sorted(done), [0, 1, 2, 3, 4])                 # 3 new chunks, 2 of the old ones
            again = learn(config)
        self.assertTrue(torch.equal(whole.memory.images, again.memory.images))

    def test_what_a_checkpoint_calls_done_has_been_logged(self):
        """With two processes, of which the second one's result arrives together with the first's."""
        learner = mn.Learner(mn.NETWORKS["tiny"](3, True), mn.LUCIR(), mn.Mnemonics(), SMALL)
        jobs, done, seen = [("extract", None, torch.tensor([k])) for k in range(2)], {}, []
        result = {"before": 1.0, "after": 0.5, "gradient": 0.0}
        learner.report = lambda event: seen.append((event["chunk"], sorted(done)))
        with unittest.mock.patch.multiple(mn, world=lambda: 2), unittest.mock.patch.object(
                learner, "_job", lambda *args: result), unittest.mock.patch.object(
                mn.dist, "all_gather_object", lambda results, own: None):
            learner._round(jobs, [0, 1], blobs(), done)
        self.assertEqual(seen, [(0, [0]), (1, [0, 1])])

    def test_exemplar_level_that_diverges_stops(self):
        with self.assertRaisesRegex(mn.RunError, "lower --exemplar-lr"):
            self.small_run("run", base_lr=1e38, base_level="network", baseline="lwf")

    def test_fine_tuning_that_diverges_goes_on_from_its_model_level(self):
        self.small_run("whole", exemplars="herding", finetune=True)
        with self.assertRaisesRegex(mn.RunError, r"phase 1, epoch 0 \(finetune\).*--start-from this run's phase 1.*"
                                    "lower --finetune-lr"):
            self.small_run("run", exemplars="herding", finetune=True, finetune_lr=1e30)
        self.small_run("again", exemplars="herding", finetune=True, start_from=f"{self.folder / 'run'}:1")
        self.assertEqual(*(torch.load(self.folder / name / "checkpoint.pt", weights_only=True)["learner"]["accuracy"][1]
                           ["accuracy"] for name in ("whole", "again")))

    def test_a_checkpoint_cannot_run_code(self):
        self.small_run("run")

        class Bomb:
            def __reduce__(self):
                return os.mkdir, ("boom",)

        torch.save({"format": mn.FORMAT, "learner": Bomb()}, self.folder / "run/checkpoint.pt")
        with self.assertRaises(mn.UserError):
            self.small_run("run", resume=True)
        self.assertFalse(Path("boom").exists())

    def test_full_disk_keeps_the_last_checkpoint(self):
        config = dataclasses.replace(SMALL, out=str(self.folder / "run"))
        original, count = mn._Run.on_event, [0]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def fill(self, event):
            count[0] += 1
            if count[0] == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
            original(self, event)

        mn._Run.on_event = fill
        try:
            with self.assertRaisesRegex(mn.RunError, "cannot write .*--resume"):
                quiet(mn.run, config, blobs(), blobs(seed=1))
        finally:
            mn._Run.on_event = original
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        torch.load(self.folder / "run/checkpoint.pt", weights_only=True)
        self.assertFalse(list((self.folder / "run").glob("*.tmp")))
        self.small_run("run", resume=True)
        self.small_run("whole")
        self.same_runs(self.folder / "whole", self.folder / "run")

    def test_loss_not_finite_stops_at_once(self):
        with self.assertRaisesRegex(mn.RunError, "phase 0, epoch 0.*learning rate"):
            self.small_run("run", lr=1e30, baseline="lwf", per_class=4)

    def test_no_keep_phases(self):
        self.small_run("run", phases=3, keep_phases=False)
        self.assertEqual(sorted(p.name for p in (self.folder / "run").glob("*_0*.pt")),
                         ["exemplars_003.pt", "model_003.pt"])

    def test_no_keep_phases_keeps_what_starting_from_its_last_phase_needs(self):
        run, original = functools.partial(self.small_run, phases=3, exemplars="herding"), mn._Run.on_event

        def stop(self, event):
            original(self, event)
            if (event["event"], event["phase"]) == cut:
                raise mn.Interrupted(2)

        whole = run("whole")["phases"]
        for name, last, cut in ("model", 1, ("epoch", 2)), ("exemplars", 2, ("model", 2)):
            with unittest.mock.patch.object(mn._Run, "on_event", stop), self.assertRaises(mn.Interrupted):
                run(name, keep_phases=False)
            start, cut = f"{self.folder / name}:{last}", ("epoch", last + 1)
            with unittest.mock.patch.object(mn._Run, "on_event", stop), self.assertRaises(mn.Interrupted):
                run(f"again-{name}", keep_phases=False, start_from=start)                    # takes as much along
            self.assertEqual(sorted(path.name for path in (self.folder / f"again-{name}").glob("*_0*.pt")),
                             [*(f"exemplars_{k:03d}.pt" for k in (last - 1, last)), f"model_{last:03d}.pt"])
            found = run(f"from-{name}", start_from=start)["phases"]
            self.assertEqual(*([row["accuracy"] for row in rows] for rows in (whole, found)))

    def test_validate_never_looks_at_the_test_set(self):
        config = dataclasses.replace(SMALL, out=str(self.folder / "run"), train_per_class=12, validate=True,
                                     exemplars="random")
        poison = blobs(seed=1)
        poison.labels = poison.labels.clone()
        poison.images = torch.zeros_like(poison.images)
        results = quiet(mn.run, config, blobs(), poison)[0]
        self.assertGreater(results["phases"][0]["accuracy"], 40)            # black test images would give a third

    def test_class_order_from_a_file(self):
        path = self.folder / "order.txt"
        path.write_text("5\n4\n3\n2\n1\n0\n")
        results = self.small_run("run", class_order=str(path), exemplars="random")
        self.assertEqual(results["class_order"], [5, 4, 3, 2, 1, 0])
        elsewhere = self.folder / "elsewhere.txt"
        elsewhere.write_text("\ufeff" + path.read_text(), encoding="utf-8")            # as editors of Windows save it
        self.small_run("run", class_order=str(elsewhere), exemplars="random", resume=True)
        self.small_run("from", class_order=str(elsewhere), exemplars="random", start_from=str(self.folder / "run"))
        path.unlink()
        self.small_run("run", class_order=str(path), exemplars="random", resume=True)
        named, config = blobs(), dataclasses.replace(SMALL, out=str(self.folder / "run"), resume=True, class_order=str(path),
                                            classes=6)
        named.ids = list("543210")                                          # a data set whose labels have names
        self.assertEqual(mn._order(config, named), [0, 1, 2, 3, 4, 5])
        named.ids.append("empty")
        self.assertEqual(sorted(mn._order(dataclasses.replace(config, class_order=None), named)), list(range(7)))
        with self.assertRaisesRegex(mn.UserError, "No such file"):
            self.small_run("no", class_order=str(path))
        elsewhere.write_text("0\n1\n2\n3\n4\n5\n")
        with self.assertRaisesRegex(mn.UserError, "another class order"):
            self.small_run("run", class_order=str(elsewhere), exemplars="random", resume=True)
        for classes, of in ((4, {}), (8, {}), (8, {"classes": 4})):          # 8: the preset of a larger data set, say
            with self.assertRaisesRegex(mn.UserError, f"last class is 5, and dataset_classes is {classes}"):
                self.small_run("no", dataset_classes=classes, **of, order_seed=0)
        for text, word in (("0\n0\n1\n2\n3\n4\n", "twice"), ("0\n1\n", "are needed"), ("0\ncat\n", "not a label")):
            path.write_text(text)
            with self.assertRaisesRegex(mn.UserError, word):
                self.small_run("no", class_order=str(path))


TOGETHER = dict(phases=1, base_networks=2, bop_chunk=2)


def two_processes(rank, port, folder):
    """One of two gloo processes: prints nothing, writes what it found."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.save(same_everywhere(), Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port + 1)                               # the first one's may still be closing
    quiet(mn.run, dataclasses.replace(SMALL, out=str(Path(folder) / "run"), **TOGETHER), blobs(), blobs(seed=1))


def same_everywhere():
    """What one process and several must agree on, from identical weights."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, bop_chunk=2, exemplars="mnemonics", init="herding")
    learner = mn.Learner(mn.NETWORKS["tiny"](3, True), mn.LUCIR(), mn.Mnemonics(), config)
    phase, later = mn.phases_of(blobs(each=21), blobs(seed=1), list(range(6)), [3, 3])
    learner.net.eval()
    learner._exemplars(phase, phase.train, learner._hold_out(phase)[1])
    counts = learner.evaluate(phase.test)
    # Gradients of a later phase's loss, BatchNorm in evaluation mode, on a batch that two do not share evenly.
    learner.index = 1
    learner._begin(later.classes, later.train)
    mn.merge_weights(learner.net)
    optimizer = torch.optim.SGD(learner.net.parameters(), lr=0.0)
    step = mn.TrainStep(learner.net, lambda net, x, y: learner.baseline.loss(net, learner.old, x, y), optimizer,
                        learner.normalise, "float32", 25)
    pool = later.train.join(learner.memory.images, learner.memory.labels)
    index = torch.arange(0, len(pool), 3)[:25]                              # new and old ones
    mine = index[mn.rank()::mn.world()]
    images, labels = next(pool.batches([mine]))
    step(images, labels, len(mine) * mn.world() / len(index))
    return {"herding": learner.memory.images, "labels": learner.memory.labels, "counts": torch.stack(counts),
            "gradients": [p.grad for p in learner.net.parameters() if p.grad is not None and p.numel()]}


class TwoProcesses(Case):

    def test_two_processes_agree_with_one_and_resume_as_one(self):
        import torch.multiprocessing as mp
        mp.spawn(two_processes, (29500 + os.getpid() % 2000, str(self.folder)), nprocs=2)
        one = same_everywhere()
        for rank in (0, 1):
            two = torch.load(self.folder / f"rank{rank}.pt", weights_only=True)
            for name in ("herding", "labels", "counts"):
                self.assertTrue(torch.equal(one[name], two[name]), name)
            self.assertEqual(len(one["gradients"]), len(two["gradients"]))
            for a, b in zip(one["gradients"], two["gradients"]):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        results = json.loads((self.folder / "run/results.json").read_text())
        self.assertEqual([row["exemplars"] for row in results["phases"]], [12, 24])
        self.assertTrue(all(math.isfinite(row["accuracy"]) for row in results["phases"]))
        again = self.small_run("run", **TOGETHER, resume=True)              # one process opens the run of two
        self.assertEqual(again["phases"], results["phases"])


    def test_a_failing_process_does_not_wait_for_those_that_wait_for_it(self):
        for backend, failing, farewells in (("nccl", False, 1), ("nccl", True, 0), ("gloo", True, 1)):
            with self.subTest(backend=backend, failing=failing), unittest.mock.patch.multiple(
                    mn.dist, init_process_group=unittest.mock.DEFAULT, destroy_process_group=unittest.mock.DEFAULT,
                    get_backend=lambda: backend) as mocks, unittest.mock.patch.dict(os.environ, WORLD_SIZE="2"):
                with contextlib.suppress(mn.RunError), mn._processes(SMALL):
                    if failing:
                        raise mn.RunError("the loss is nan")
                self.assertEqual(mocks["destroy_process_group"].call_count, farewells)

    @SLOW
    def test_a_dead_process_ends_all_and_the_run_goes_on_with_one(self):
        out = self.folder / "run"
        words = [str(HERE / "run_cifar.py"), *DEMO, "--epochs", "30", "--checkpoint-minutes", "0", "--device", "cpu", "--out", str(out)]
        torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port",
                                     str(29500 + os.getpid() % 2000), *words], stdout=subprocess.DEVNULL,
                                    stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for _ in range(600):
            if (out / "checkpoint.pt").exists() or torchrun.poll() is not None:
                break
            time.sleep(0.2)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        err = torchrun.communicate(timeout=120)[1]
        self.assertNotEqual(torchrun.returncode, 0)
        ours = [line for line in err.splitlines() if re.search("error: (interrupted|process 0 lost)", line)]
        self.assertEqual(len(ours), 1, err)
        self.assertIn("--resume", ours[0])
        done = subprocess.run([sys.executable, *words, "--resume"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(json.loads((out / "results.json").read_text())["complete"])


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: records the operations of a with block, takes back what they did, and does
    them again, with the same numbers from Python and on the same memory, at every replay."""
    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")
    replays, modes = 0, []

    def __init__(self, graph, **_):
        super().__init__()
        self.operations, self.before, self.own = graph.operations, [], set()

    @staticmethod
    def tensors(values):
        return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]

    def written(self, function, args, kwargs):
        """Tensors that an operation changes; those of batch norm are not in its schema."""
        names = [a.name for a in function._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        marked = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        hidden = ["running_mean", "running_var"] if "batch_norm" in function.__name__ else []
        return self.tensors([given.get(name) for name in marked + hidden])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__.split(".")[0]
        masks = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in self.tensors(args[1]))
        if name in self.WAITING or masks or kwargs.get("generator") is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for x in self.written(function, args, kwargs):
            if x.untyped_storage().data_ptr() not in self.own:
                self.before.append((x, x.clone()))
        out = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in self.tensors((args, kwargs))}
        self.own |= {x.untyped_storage().data_ptr() for x in self.tensors(out)} - given
        self.operations.append((function, args, kwargs, out))
        return out

    def __exit__(self, *failed):
        super().__exit__(*failed)
        with torch.no_grad():
            for x, value in reversed(self.before):
                x.copy_(value)

    @staticmethod
    @torch.no_grad()
    def replay(operations):
        Tape.replays += 1
        for function, args, kwargs, out in operations:
            for old, new in zip(Tape.tensors(out), Tape.tensors(function(*args, **kwargs))):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class TapedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations = []

    def replay(self):
        Tape.replay(self.operations)


@contextlib.contextmanager
def graphs_on_cpu():
    """`mn.Replayed` believes that a CPU can do what CUDA does. Yields the class that counts replays."""
    ordinary, nothing = mn.Replayed.__init__, lambda *_: contextlib.nullcontext()

    def wanted(self, *args, **kwargs):
        ordinary(self, *args, **kwargs)
        self.wanted = True

    Tape.replays, Tape.modes = 0, []
    with contextlib.ExitStack() as stack:
        for target, value in (("CUDAGraph", TapedGraph), ("graph", Tape), ("device", nothing), ("synchronize", nothing),
                              ("current_stream", nothing), ("set_stream", nothing), ("Stream", nothing),
                              ("get_sync_debug_mode", lambda: "as it was"), ("set_sync_debug_mode", Tape.modes.append)):
            stack.enter_context(unittest.mock.patch.object(torch.cuda, target, value))
        stack.enter_context(unittest.mock.patch.object(mn.Replayed, "__init__", wanted))
        stack.enter_context(unittest.mock.patch.object(mn.Replayed, "refused", set()))
        yield Tape


def twenty_losses(device, baseline="lucir", precision="float32", network="tiny"):
    """Losses of 20 steps with a teacher, at two rates, and the step."""
    data = blobs(4, 60, size=16)
    torch.manual_seed(0)
    method = mn.BASELINES[baseline]()
    net = mn.NETWORKS[network](2, cosine=method.cosine).to(device)
    config = dataclasses.replace(SMALL, exemplars="herding", baseline=baseline, per_class=10)
    learner = mn.Learner(net, method, mn.Herding(), config)
    learner.index, phase = 1, mn.phases_of(data, data, list(range(4)), [2, 2])[1]
    learner._begin(phase.classes, phase.train.to(device))
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=5e-4)
    old = mn.fold_norms(learner.old)
    net.to(memory_format=torch.channels_last)
    step = mn.TrainStep(net, lambda net, x, y: method.loss(net, old, x, y), optimizer, learner.normalise, precision, 16)
    totals, pool = [0.0], data.to(device)
    plan = list(torch.arange(320, device=device).mul(7).remainder(240).split(16))
    for k in (9, 14, 17):                                     # an odd batch between replays, as at the end of an epoch
        plan.insert(k, plan[3][:11])
    for k, (images, labels) in enumerate(pool.batches(plan)):
        optimizer.param_groups[0]["lr"] = 0.1 if k < 12 else 0.01
        step(images, labels)
        totals.append(float(step.total))
    return torch.tensor(totals).diff() / torch.tensor([len(index) for index in plan]), step


def learned_in_turn(device, limit=None, cosine=True, **settings):
    """Exemplars learned on three networks in turn, and the gradient of every update."""
    data, gradients = blobs(2, 12, size=8).to(device), []
    torch.manual_seed(0)
    nets = [mn.NETWORKS["tiny"](2, cosine=cosine).to(device) for _ in range(3)]
    config = dataclasses.replace(SMALL, exemplar_epochs=12, dataset_classes=2, exemplar_augment=True, **settings)
    images, labels = data.images[::4].clone(), data.labels[::4]
    learned, before, after = mn.optimise_exemplars(nets[0], images, labels, data, data.labels, config, networks=nets,
                                                   micro_batch=limit, tick=lambda a, b, g: gradients.append(g))
    return torch.stack(gradients), learned.float(), torch.tensor([before, after])


AVX512 = unittest.skipUnless(torch.backends.cpu.get_cpu_capability().startswith("AVX512"), "needs AVX-512")


@unittest.mock.patch.object(mn, "ONEDNN_FROM", 0)
class OneDNN(unittest.TestCase):
    """The layout that the model level computes in on a CPU with bfloat16."""

    @staticmethod
    def step(net, x, y, double=False):
        """One step's (whether its last feature map was in oneDNN's layout, loss, gradients, BatchNorm's statistics)."""
        net, seen = copy.deepcopy(net), []
        net.backbone.stages.register_forward_hook(lambda module, inputs, output: seen.append(output.is_mkldnn))
        if double:
            net, x = net.double(), x.double()
        with mn.autocast(x.device, "float32" if double else "bfloat16"):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        gradients = torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None])
        return seen[0], loss.item(), gradients, torch.cat([b.flatten().double() for b in net.buffers()])

    @AVX512
    def test_it_is_as_exact_as_pytorchs_own(self):
        """Against the same step in float64, with odd sizes and widths, scalings, and the stem of ImageNet."""
        torch.manual_seed(0)
        nets = [mn.IncrementalNet(mn.ResNet((1, 1), (12, 20), stem, last), 20, 5, not last).train()
                for stem, last in ((False, True), (True, False), (False, False))]
        mn.transfer_weights(nets[2])
        for net in nets:
            x, y = torch.randn(23, 3, 20, 28), torch.arange(23) % 5
            exact, ours = self.step(net, x, y, double=True), self.step(net, x, y)
            with unittest.mock.patch.object(mn, "_onednn_works", lambda: False):
                plain = self.step(net, x, y)
            self.assertEqual((exact[0], ours[0], plain[0]), (False, True, False))
            self.assertAlmostEqual(ours[1], exact[1], delta=0.01)
            for k in (2, 3):
                error, usual = (float((found[k] - exact[k]).norm() / exact[k].norm()) for found in (ours, plain))
                self.assertLess(error, 1.25 * usual)
                self.assertLess(error, 0.2)

    @AVX512
    def test_a_convolution_against_float64(self):
        torch.manual_seed(0)
        for how in (dict(bias=False), dict(stride=2, padding=1), dict(padding=(0, 2), dilation=2, groups=2)):
            conv = mn.Conv2d(8, 12, 3, **how).to(memory_format=torch.channels_last)
            exact, x = copy.deepcopy(conv).double(), torch.randn(3, 8, 10, 11)
            conv.weight.data = conv.weight.data.bfloat16().float()            # so that only what is computed rounds
            exact.weight.data, x = conv.weight.data.double(), x.bfloat16()
            found = [x.clone().requires_grad_(), *conv.parameters()]
            wanted = [x.double().requires_grad_(), *exact.parameters()]
            out, reference = conv(found[0].to_mkldnn()).to_dense(), exact(wanted[0])
            torch.testing.assert_close(out.double(), reference, rtol=0.02, atol=0.02)
            up = torch.randn_like(out)
            grads = torch.autograd.grad(out, found, up), torch.autograd.grad(reference, wanted, up.double())
            for ours, theirs in zip(*grads):
                torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * float(theirs.std()))
            self.assertEqual(grads[0][1].stride(), conv.weight.stride())

    def test_a_single_pixel(self):
        """As torch's in double precision, whatever the padding; and in bfloat16, where oneDNN leaves what only padding
        meets of a weight's gradient unwritten. Memory holds large numbers before, so that it shows."""
        torch.manual_seed(0)
        for how in ({}, dict(stride=2), dict(stride=2, groups=2), dict(padding=(2, 1)), dict(padding=2, dilation=2),
                    dict(padding=2)):
            conv = mn.Conv2d(4, 6, 3, **{"padding": 1, **how}).double()
            plain, x = nn.Conv2d(4, 6, 3, **{"padding": 1, **how}).double(), torch.randn(5, 4, 1, 1).double()
            plain.load_state_dict(conv.state_dict())
            outs = conv(x), plain(x)
            torch.testing.assert_close(*outs)
            for ours, theirs in zip(*(torch.autograd.grad(o.pow(2).sum(), [*c.parameters()])
                                      for o, c in zip(outs, (conv, plain)))):
                torch.testing.assert_close(ours, theirs)
        with self.assertRaises(RuntimeError):
            mn.Conv2d(4, 6, 3, padding=1, dilation=2)(torch.randn(5, 4, 1, 1))
        conv, x = mn.Conv2d(64, 128, 3, 2, 1, bias=False), torch.randn(32, 64, 1, 1)
        wanted = torch.zeros(128, 64, 3, 3)
        wanted[:, :, 1, 1] = x.sum((0, 2, 3))
        for layout in (torch.contiguous_format, torch.channels_last, torch._mkldnn):
            if layout is torch._mkldnn and not mn._onednn_works():
                continue
            held = [torch.full((count,), 1e30) for count in (2 ** 14, 2 ** 16, 128 * 64 * 9, 2 ** 18, 2 ** 20)]
            del held
            with self.subTest(layout=layout), mn.autocast(x.device, "bfloat16"):
                given = x.bfloat16().to_mkldnn() if layout is torch._mkldnn else x.to(memory_format=layout)
                out = conv(given)
                found, = torch.autograd.grad((out.to_dense() if out.is_mkldnn else out).float().sum(), [conv.weight])
                torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.1)

    @AVX512
    def test_what_oneDNN_cannot_do_is_left_to_pytorch(self):
        """Small batches, frozen norms, other types, somebody's module, anomaly detection; each ran before."""
        torch.manual_seed(0)
        x, y = torch.randn(8, 3, 12, 12), torch.arange(8) % 4

        def changed(change):
            """A network in training, changed."""
            net = mn.IncrementalNet(mn.ResNet((1, 1), (8, 16), False, True), 16, 4).train()
            change(net.backbone)
            return net

        def replace_stem(backbone):
            backbone.stem[1] = nn.GroupNorm(2, 8)

        self.assertTrue(self.step(changed(lambda backbone: None), x, y)[0])
        for change in (lambda backbone: backbone.stem[1].eval(), lambda backbone: backbone.eval(), replace_stem,
                       lambda backbone: backbone.bfloat16()):
            self.assertFalse(self.step(changed(change), x, y)[0])
        net = changed(lambda backbone: None)
        with unittest.mock.patch.object(mn, "ONEDNN_FROM", x.numel() + 1):
            self.assertFalse(self.step(net, x, y)[0])
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            self.assertFalse(self.step(net, x, y)[0])
        torch.backends.mkldnn.enabled = False
        try:
            self.assertFalse(self.step(net, x, y)[0])
        finally:
            torch.backends.mkldnn.enabled = True
        with torch.no_grad(), mn.autocast(x.device, "bfloat16"):
            compiled = torch.compile(net.backbone, backend="eager")(x)
            torch.testing.assert_close(compiled, net.backbone(x), rtol=0.05, atol=0.05)

    @AVX512
    def test_the_teacher(self):
        """A teacher's logits are those of float32."""
        torch.manual_seed(0)
        net, x, seen = mn.resnet32(4).eval(), torch.randn(8, 3, 32, 32), []
        teacher = mn.fold_norms(net)
        teacher.backbone.stages.register_forward_hook(lambda module, inputs, output: seen.append(output.is_mkldnn))
        with torch.no_grad(), mn.autocast(x.device, "bfloat16"):
            logits = teacher(x)
        self.assertEqual(seen, [True])
        torch.testing.assert_close(logits.float(), net(x), rtol=0.05, atol=0.05 * float(net(x).detach().std()))

    def test_whether_it_works_is_found_out_without_a_trace(self):
        state, found = torch.get_rng_state(), []
        for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
            mn._onednn_works.cache_clear()
            torch.set_default_dtype(torch.bfloat16)                           # of somebody's own program
            try:
                with mode():
                    found.append(mn._onednn_works())
            finally:
                torch.set_default_dtype(torch.float32)
        self.assertEqual(found, [torch.backends.cpu.get_cpu_capability().startswith("AVX512")] * 3)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))

    def test_a_dead_network_is_noticed(self):
        """oneDNN's ReLU makes 0 of NaN, so that the loss alone does not tell."""
        data, config = blobs(), dataclasses.replace(SMALL, network="resnet32", precision="bfloat16")
        net = mn.resnet32(3)
        net.backbone.stem[0].weight.data.fill_(math.nan)
        learner = mn.Learner(net, mn.LwF(), mn.Herding(), config)
        with self.assertRaisesRegex(mn.RunError, "phase 0, epoch 0.*learning rate"):
            learner.learn_phase(mn.phases_of(data, data, list(range(6)), [3, 3])[0])


@unittest.skipUnless(importlib.util.find_spec("triton"), "needs Triton, which PyTorch brings along on Linux")
class Kernels(unittest.TestCase):
    """Residual blocks by kernels of our own: in float32 on a CPU, where Triton interprets them; on CUDA in bfloat16."""
    CUDA = torch.cuda.is_available()
    DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)

    @classmethod
    def setUpClass(cls):
        mn._compile_kernels()

    @staticmethod
    def block(inside, outside=16, stride=1, last_relu=True):
        """With norms that have learned something; a stem where inside is 3."""
        block = (mn.ResNet((1,), (outside,), False, True).stem if inside == 3 else
                 mn.BasicBlock(inside, outside, stride, last_relu))
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
        return block.to(Kernels.DEVICE, memory_format=torch.channels_last)

    @staticmethod
    def images(inside, side, count=2, dtype=None):
        x = torch.randn(count, inside, side, side).to(dtype or Kernels.DTYPE).float()           # what rounding leaves
        return x.to(Kernels.DEVICE, memory_format=torch.channels_last)

    @staticmethod
    def fused(block, x):
        layers = mn._Layers.of(block)
        return mn._FusedLayers.apply(layers, x, *layers.parameters())

    @staticmethod
    def plain(block, x):
        return block(x) if isinstance(block, nn.Sequential) else block.plain(x)

    @staticmethod
    def passes(work, block, x, up):
        """Output, statistics, then gradients by x, unless it is an image, and by the parameters that train."""
        block, x = copy.deepcopy(block), x.clone().requires_grad_(x.shape[1] > 3)
        wanted = [p for p in (x, *block.parameters()) if p.requires_grad]
        y = work(block, x)
        grads = torch.autograd.grad(y, wanted, up.to(y.dtype))
        return [t.double() for t in (y.detach(), *block.buffers(), *grads)]

    def near(self, ours, exact, usual, limit):
        for mine, true, theirs in zip(ours, exact, usual, strict=True):
            error, theirs = (float((t - true).norm() / true.norm()) for t in (mine, theirs))
            self.assertLess(error, max(limit, 1.25 * theirs if self.CUDA else 0))

    @unittest.mock.patch.multiple(mn, CONV_TILE={16: 64, 32: 32, 64: 32}, FLAT_TILE={16: 64, 32: 16, 64: 32},
                                  WEIGHT_TILE={16: 128, 32: 128, 64: 64})                  # so, several programs each
    def test_against_pytorch_in_double_precision(self):
        torch.manual_seed(0)
        for inside, outside, stride, last_relu, side, dtype, limit in (
                (16, 16, 1, True, 6, None, 1e-5), (16, 16, 1, True, 5, None, 1e-5), (32, 64, 2, True, 4, None, 1e-5),
                (64, 64, 1, False, 3, None, 1e-5), (3, 16, 1, True, 6, None, 1e-5),
                (32, 32, 1, True, 4, torch.float16, 5e-3)):
            dtype = self.DTYPE if dtype is None or self.CUDA else dtype
            with self.subTest(inside=inside, outside=outside, side=side, dtype=dtype):
                count = 4 if (inside, side) == (16, 6) else 2
                count *= 16 if self.CUDA else 1                               # of few images bfloat16's error is noise
                block, x = self.block(inside, outside, stride, last_relu), self.images(inside, side, count, dtype)
                up = self.images(outside, side // stride, count, dtype)
                with torch.autocast(self.DEVICE, self.DTYPE, enabled=self.CUDA):
                    ours = self.passes(self.fused, block, x.to(dtype), up)
                    usual = self.passes(self.plain, block, x, up)
                exact = self.passes(self.plain, block.double(), x.double(), up.double())
                self.near(ours, exact, usual, limit)
                block, whole = block.float(), mn.ResNet((1,), (16,), False, True)
                whole.stem = block                                            # a stem is folded as part of its network
                folded = mn.fold_norms(whole).stem if inside == 3 else mn.fold_norms(block)
                with torch.no_grad(), torch.autocast(self.DEVICE, self.DTYPE, enabled=self.CUDA):
                    found = mn._infer(mn._Layers.of(folded), x.to(dtype)), self.plain(folded, x)
                self.near([found[0].double()], [self.plain(block.double().eval(), x.double()).detach()],
                          [found[1].double()], limit)

    def test_what_is_frozen_gets_no_gradient(self):
        torch.manual_seed(0)
        block, x = self.block(16, 32, 2), self.images(16, 4).to(self.DTYPE)
        frozen = [block.conv1.weight, block.bn2.bias]
        for p in frozen:
            p.requires_grad_(False)
        y = self.fused(block, x).square().sum()                               # nor does x
        y.backward(retain_graph=True)
        grads = [p.grad for p in block.parameters()]
        self.assertEqual([g is None for g in grads], [any(p is f for f in frozen) for p in block.parameters()])
        block.zero_grad()
        y.backward()                                                          # what is added up starts from 0 again
        for first, p in zip(grads, block.parameters()):
            if first is not None:
                torch.testing.assert_close(p.grad, first, rtol=1e-4, atol=1e-4)

    def test_where_they_are_used(self):
        """Only for what they compute: everything else goes PyTorch's way."""
        def change(block, **values):
            for path, value in values.items():
                *parts, name = path.split("__")
                setattr(block.get_submodule(".".join(parts)), name, value)
            return block

        x = self.images(16, 8).bfloat16()
        grouped, pool = mn.Conv2d(16, 16, 3, 1, 1, groups=2, bias=False), nn.MaxPool2d(2)
        hooked, stem = [self.block(16) for _ in range(5)], self.block(3)
        for block, kind in zip(hooked, ("forward", "forward_pre", "full_backward", "full_backward_pre")):
            getattr(block.conv1, f"register_{kind}_hook")(lambda *_: None)
        hooked[4].register_forward_hook(lambda *_: None)                      # the block's own is called
        other, circular = type("Other", (mn.Conv2d,), {"forward": lambda self, x: x}), self.block(16)
        circular.conv2.padding_mode, mine = "circular", self.block(16)
        mine.__class__ = type("Mine", (mn.BasicBlock,), {"plain": None})
        wide, folded = mn.BasicBlock(16, 128, 1), mn.fold_norms(self.block(16))
        cases = [(True, self.block(16), x), (True, self.block(16, 32, 2), x), (True, folded, x),
                 (True, stem, self.images(3, 8).bfloat16()),
                 (True, hooked[4], x), (True, mn.transfer_weights(self.block(16)), x),
                 *((False, block, x) for block in hooked[:4]), (False, circular, x),
                 (False, self.block(16), x.float()), (False, self.block(16), x.contiguous()),
                 (False, self.block(16), self.images(32, 8).bfloat16()),
                 (False, copy.deepcopy(folded).requires_grad_(True), x),
                 (False, change(self.block(16), conv2=other(16, 16, 3, 1, 1, bias=False)), x),
                 (False, mine, x), (False, wide.to(x.device), x), (False, self.block(16).eval(), x),
                 (False, folded, x.clone().requires_grad_()), (False, self.block(16, 32, 2), x[:, :, 1:, 1:].clone(
                     memory_format=torch.channels_last)), (False, stem, self.images(3, 8).bfloat16().requires_grad_()),
                 (False, nn.Sequential(*stem, pool), self.images(3, 8).bfloat16()),
                 (False, change(self.block(16), conv1=grouped.to(x.device)), x),
                 (False, change(self.block(16), bn1__momentum=None), x),
                 (False, change(self.block(16), bn1__eps=1e-3), x), (False, change(self.block(16), bn2__momentum=0.2), x),
                 (False, change(self.block(16), bn2__training=False), x),
                 (False, change(self.block(16), shortcut=nn.Sequential(nn.Identity())), x)]
        with unittest.mock.patch.multiple(mn, FUSED_FROM=0, _triton_works=lambda device: True,
                                          _FusedLayers=SimpleNamespace(apply=lambda *_: True), _infer=lambda *_: True):
            for k, (wanted, block, x) in enumerate(cases):
                self.assertEqual(mn._fused(block, x), wanted or None, k)
            for name, value in (("FUSED_FROM", 10 ** 6), ("FUSED_PIXELS", 63)):
                with unittest.mock.patch.object(mn, name, value):
                    self.assertIsNone(mn._fused(*cases[0][1:]))
            for place, name in ((torch, "are_deterministic_algorithms_enabled"), (torch, "is_anomaly_enabled"),
                                (torch.compiler, "is_compiling"), (nn.modules.module, "_has_any_global_hook"),
                                (mn, "_triton_works")):
                with unittest.mock.patch.object(place, name, lambda *_: name != "_triton_works"):
                    self.assertIsNone(mn._fused(*cases[0][1:]))

    def test_without_a_working_triton_it_is_said_once(self):
        err, error = io.StringIO(), RuntimeError("Failed to find C compiler.\nSet CC")
        for broken in (dict(_compile_kernels=unittest.mock.Mock(side_effect=error)), dict(_apart=lambda device: 0.2)):
            mn._triton_works.cache_clear()
            with contextlib.redirect_stderr(err), unittest.mock.patch.multiple(mn, **broken), \
                    unittest.mock.patch.object(torch.random, "fork_rng", contextlib.nullcontext), \
                    unittest.mock.patch.object(torch.cuda, "device", contextlib.nullcontext):
                self.assertEqual([mn._triton_works(torch.device("cuda")) for _ in range(2)], [False, False])
        mn._triton_works.cache_clear()
        self.assertEqual(err.getvalue(), "".join(
            f"warning: no Triton kernels ({cause}): training steps take more than twice as long\n"
            for cause in ("RuntimeError: Failed to find C compiler.", "its results are not PyTorch's")))

    def test_an_interruption_while_it_compiles_is_one(self):
        mn._triton_works.cache_clear()
        for error in (mn.Interrupted(15), torch.cuda.OutOfMemoryError()):
            with unittest.mock.patch.object(mn, "_compile_kernels", side_effect=error), self.assertRaises(type(error)):
                mn._triton_works(torch.device("cuda"))
        self.assertEqual(mn._triton_works.cache_info().currsize, 0)

    @unittest.skipUnless(CUDA, "needs a CUDA device")
    def test_on_cuda_a_step_is_as_exact_as_pytorchs(self):
        torch.manual_seed(0)
        net = mn.resnet32(50, cosine=True).to("cuda", memory_format=torch.channels_last)
        x, y = self.images(3, 32, 128), torch.arange(128, device="cuda") % 50

        def gradients(precision):
            with mn.autocast(x.device, precision):
                loss = F.cross_entropy(10 * net(x), y)
            wanted = [p for p in net.parameters() if p.requires_grad and p.numel()]
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])

        with unittest.mock.patch.object(mn, "_fused", wraps=mn._fused) as fused:
            ours = gradients("bfloat16")
            self.assertTrue(fused.called and mn._triton_works(x.device))
        with unittest.mock.patch.object(mn, "_fused", lambda *_: None):
            usual, exact = gradients("bfloat16"), gradients("float32")
        self.assertLess(float((ours - exact).norm()), 1.25 * float((usual - exact).norm()))


class Beside(unittest.TestCase):
    """Work on a stream of its own."""

    def order(self, work):
        """What waits for what, on pretended streams."""
        said, streams = [], {}
        for name, other in (("main", "side"), ("side", "main")):
            wait = lambda _, text=f"{name} waits for {other}": said.append(text)
            streams[name] = SimpleNamespace(wait_stream=wait)

        @contextlib.contextmanager
        def on(stream):
            said.append("on side" if stream is streams["side"] else "?")
            yield
            said.append("back")

        with unittest.mock.patch.multiple(torch.cuda, current_stream=lambda _: streams["main"], stream=on), \
                unittest.mock.patch.object(mn, "_side_stream", lambda _: streams["side"]):
            with contextlib.suppress(KeyError), mn.beside(torch.device("cuda")) as aside:
                work(said, aside)
        return said

    def test_the_order(self):
        def twice(said, aside):
            for k in range(2):
                with aside():
                    said.append(k)
            said.append("main works")

        def failing(said, aside):
            with aside():
                said.append(0)
            raise KeyError

        one = lambda k: ["side waits for main", "on side", k, "back"]
        self.assertEqual(self.order(twice), [*one(0), *one(1), "main works", "main waits for side"])
        self.assertEqual(self.order(failing), [*one(0), "main waits for side"])
        self.assertEqual(self.order(lambda said, aside: said.append("main works")), ["main works"])

    def test_teachers_and_gradients_by_weights_are_waited_for(self):
        said = []

        @contextlib.contextmanager
        def recorded(device):
            @contextlib.contextmanager
            def aside():
                said.append("aside")
                yield
                said.append("back")
            yield aside
            said.append("joined")

        x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
        with unittest.mock.patch.object(mn, "beside", recorded):
            for baseline in (mn.LwF(), mn.LUCIR()):
                net = mn.NETWORKS["tiny"](2, cosine=baseline.cosine)
                old = baseline.teacher(net)
                net.add_classes(2)
                for name, model in (("old", old), ("new", net)):
                    model.backbone.register_forward_hook(lambda *_, name=name: said.append(name))
                said.clear()
                loss = baseline.loss(net, old, x, y)
                self.assertEqual(said, ["aside", "old", "back", "new", "joined"])
                self.assertTrue(torch.isfinite(loss))
            if importlib.util.find_spec("triton") and not torch.cuda.is_available():
                mn._compile_kernels()
                block, x = Kernels.block(16), Kernels.images(16, 4)
                y = Kernels.fused(block, x)
                said.clear()
                y.sum().backward()
                self.assertEqual(said, ["aside", "back"] * 2 + ["joined"])


class Graphs(unittest.TestCase):

    @unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
    def test_on_cuda_captured_steps_equal_ordinary_ones(self):
        # A ResNet-32 makes 0.1 of the 1e-7 that two orders of adding up differ by, whatever the rate: its losses, which
        # fall from 5 to 2, can only be the same curve.
        cuda, capture = torch.device("cuda"), mn.Replayed._capture
        for work, near in ((lambda: twenty_losses(cuda)[0], 2e-3),
                           (lambda: twenty_losses(cuda, network="resnet32")[0], 0.3),
                           (lambda: twenty_losses(cuda, network="resnet32", precision="bfloat16")[0], 0.3),
                           (lambda: learned_in_turn(cuda, base_level="classifier", base_start="fresh",
                                                    exemplar_optimizer="sgd")[0], 2e-3)):
            with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False), \
                    unittest.mock.patch.object(mn, "FUSED_FROM", 0), \
                    unittest.mock.patch.object(mn.Replayed, "refused", set()), \
                    unittest.mock.patch.object(mn.Replayed, "_capture", autospec=True, side_effect=capture) as captures:
                captured, count = work(), captures.call_count
                self.assertFalse(mn.Replayed.refused)
                mn.Replayed.refused |= {"the training step", "the exemplar level"}
                eager = work()
            self.assertGreater(count, 0)
            self.assertEqual(captures.call_count, count)                      # the second time there was no graph
            torch.testing.assert_close(captured, eager, rtol=2e-3, atol=near)

    def test_replayed_training_steps_equal_ordinary_ones(self):
        for baseline in ("lucir", "icarl", "bic"):
            with self.subTest(baseline):
                eager, _ = twenty_losses(torch.device("cpu"), baseline)
                with graphs_on_cpu() as tape:
                    replayed, step = twenty_losses(torch.device("cpu"), baseline)
                self.assertEqual(tape.replays, 18)                            # all but the first four and an odd one
                torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-5)
                self.assertLess(float(eager[-4:].mean()), float(eager[:4].mean()))       # and they did train

    def test_replayed_exemplar_updates_equal_ordinary_ones(self):
        for settings in (dict(base_level="classifier", base_start="fresh"), dict(base_level="network"),
                         dict(base_level="classifier", cosine=False), dict(base_level="means"),
                         dict(base_level="network", base_start="fresh", exemplar_optimizer="adam")):
            with self.subTest(settings):
                eager, drop = learned_in_turn(torch.device("cpu"), **settings), mn.LocalBOP.drop_graphs
                with graphs_on_cpu() as tape, unittest.mock.patch.object(
                        mn.LocalBOP, "drop_graphs", autospec=True, side_effect=drop) as dropped:
                    replayed = learned_in_turn(torch.device("cpu"), **settings)
                self.assertEqual(tape.replays, 9)                             # of 12, the first of each network not
                self.assertEqual(dropped.call_count, 1)                       # before all data is gone through again
                for a, b in zip(replayed, eager):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_with_bfloat16_too(self):
        eager, _ = twenty_losses(torch.device("cpu"), precision="bfloat16")
        with graphs_on_cpu() as tape:
            replayed, step = twenty_losses(torch.device("cpu"), precision="bfloat16")
        self.assertEqual(tape.replays, 18)
        torch.testing.assert_close(replayed, eager, rtol=1e-2, atol=1e-2)

    def test_what_cannot_be_captured_is_said_once_and_run_ordinarily(self):
        x, err = torch.arange(3.0), io.StringIO()
        with graphs_on_cpu(), contextlib.redirect_stderr(err):
            replayed = mn.Replayed("counting", torch.device("cpu"), ordinary=1)
            found = [float(replayed(lambda x: x * x.sum().item(), x + k).sum()) for k in range(4)]
        self.assertEqual(found, [9.0, 36.0, 81.0, 144.0])
        self.assertEqual(err.getvalue().count("warning: no CUDA graph for counting"), 1)

    def test_work_that_waits_is_refused_before_its_capture_could_fail(self):
        def waits(x):
            for words in ("called a synchronizing CUDA operation (function memcpy_and_sync)", "something else"):
                warnings.warn(words)
            return x + 1

        x, err, capture = torch.zeros(()), io.StringIO(), mn.Replayed._capture
        with graphs_on_cpu() as tape, contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as said, \
                unittest.mock.patch.object(mn.Replayed, "_capture", autospec=True, side_effect=capture) as captures:
            warnings.simplefilter("always")
            replayed = mn.Replayed("waiting", x.device, ordinary=2)
            self.assertEqual([float(replayed(waits, x + k)) for k in range(4)], [1.0, 2.0, 3.0, 4.0])
            self.assertEqual(captures.call_count, 0)
        self.assertEqual(tape.modes, ["warn", "as it was"])                              # in one of the calls
        self.assertEqual(err.getvalue().count("warning: no CUDA graph for waiting (it waits for the device)"), 1)
        self.assertEqual(sum("something else" in str(w.message) for w in said), 4)       # others' warnings still arrive
        self.assertEqual(len(said), 7)                                                   # and PyTorch's, unless watched

    def test_an_interrupted_capture_leaves_no_graph_behind(self):
        def interrupted(x):
            if len(calls) == 1:
                raise KeyboardInterrupt
            return x + 1

        x, calls = torch.zeros(()), []
        with graphs_on_cpu():
            replayed = mn.Replayed("adding", x.device, ordinary=1)
            for k in range(4):
                with contextlib.suppress(KeyboardInterrupt):
                    calls.append(float(replayed(interrupted, x + k)))
                    continue
                self.assertIsNone(replayed.graph)
                calls.append(None)
        self.assertEqual(calls, [1.0, None, 3.0, 4.0])

    def test_graphs_go_when_memory_runs_out_before_anything_else_does(self):
        failures = [torch.cuda.OutOfMemoryError("out of memory"),
                    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError("CUDA error: out of memory"),
                    RuntimeError("FIND was unable to find an engine to execute this computation")]
        gradient, limit = mn.LocalBOP.gradient, mn.MicroBatch(16)

        def scarce(bop, pixels, epoch):
            if epoch == 5 and failures:
                raise failures.pop(0)
            return gradient(bop, pixels, epoch)

        err, settings = io.StringIO(), dict(base_level="classifier", base_start="fresh")
        eager = learned_in_turn(torch.device("cpu"), **settings)
        with graphs_on_cpu() as tape, contextlib.redirect_stderr(err), \
                unittest.mock.patch.object(mn.LocalBOP, "gradient", scarce):
            found = learned_in_turn(torch.device("cpu"), limit, **settings)
        self.assertEqual((tape.replays, limit.size), (2, 1))                 # first the graphs, then four halvings
        self.assertEqual(err.getvalue().count("micro-batch of the exemplar level halved"), 4)
        for a, b in zip(found, eager):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        failures += [RuntimeError("something else")]
        with unittest.mock.patch.object(mn.LocalBOP, "gradient", scarce), self.assertRaisesRegex(RuntimeError, "else"):
            learned_in_turn(torch.device("cpu"), **settings)

    def test_without_room_for_an_odd_batch_the_graphs_go(self):
        failures, original = [torch.cuda.OutOfMemoryError("out of memory")], mn.TrainStep._step

        def scarce(self, images, *args):
            if len(images) == 11 and failures:
                raise failures.pop()
            return original(self, images, *args)

        eager, _ = twenty_losses(torch.device("cpu"))
        with graphs_on_cpu() as tape, unittest.mock.patch.object(mn.TrainStep, "_step", scarce):
            found, _ = twenty_losses(torch.device("cpu"))
        self.assertEqual(tape.replays, 5)                                     # up to the first odd batch
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)
        with graphs_on_cpu():
            _, step = twenty_losses(torch.device("cpu"))
        there = lambda: [step.replayed[size].graph is not None for size in (16, 11)]
        self.assertEqual([there(), step._spare(), there()], [[True, True], True, [True, False]])       # odd ones first
        self.assertEqual([step._spare(), there(), step._spare()], [True, [False, False], False])

    @unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
    def test_on_cuda_a_failed_capture_leaves_the_device_usable(self):
        x, err = torch.arange(3.0, device="cuda"), io.StringIO()
        with contextlib.redirect_stderr(err), unittest.mock.patch.object(mn.Replayed, "refused", set()):
            waiting, fine = (mn.Replayed(name, x.device, ordinary=1) for name in ("waiting", "fine"))
            self.assertEqual([float(waiting(lambda x: x * x.sum().item(), x).sum()) for _ in range(3)], [9.0] * 3)
            torch.cuda.empty_cache()
            torch.rand(3, device="cuda")
            self.assertEqual([float(fine(lambda x: x.sum(), x + k)) for k in range(4)], [3.0, 6.0, 9.0, 12.0])
            self.assertIsNotNone(fine.graph)
        self.assertEqual(err.getvalue().count("warning: no CUDA graph for waiting"), 1)


# ---- command line ----

DEMO = ["--demo", "--classes", "4", "--phases", "1", "--epochs", "1", "--train-per-class", "12", "--per-class", "2",
        "--init", "herding", "--base-networks", "1", "--exemplar-epochs", "2", "--base-steps", "2",
        "--finetune-epochs", "1"]


class Backends(unittest.TestCase):

    def test_each_run_of_a_process_is_repeatable_or_fast_as_it_asks(self):
        self.addCleanup(mn.set_backends, False)
        for wanted in (True, False):
            mn.set_backends(wanted)
            self.assertEqual((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
                             (wanted, not wanted))

    def test_freed_memory_is_kept_where_malloc_can_be_told(self):
        with unittest.mock.patch.object(mn.ctypes, "CDLL") as library:
            mn.set_backends(False)
        calls = [call.args for call in library.return_value.mallopt.call_args_list]
        self.assertEqual(calls, [(-3, 32 * 1024 * 1024), (-1, 2147483647)])    # <malloc.h>: M_MMAP_, M_TRIM_THRESHOLD
        for missing in (OSError, TypeError):
            with unittest.mock.patch.object(mn.ctypes, "CDLL", side_effect=missing):
                mn.set_backends(False)
        with unittest.mock.patch.object(mn.ctypes, "CDLL", lambda _: SimpleNamespace()):
            mn.set_backends(False)


class CommandLine(Case):

    def cli(self, *words):
        return quiet(run_cifar.main, [str(w) for w in words])

    def test_demo_end_to_end(self):
        self.no_picture.stop()
        status, out, err = self.cli(*DEMO, "--out", self.folder / "run")
        self.assertEqual(status, 0, err)
        self.assertIn("phase classes", out)
        self.assertTrue(all(len(line) <= 100 for line in out.splitlines()))
        rows = json.loads((self.folder / "run" / "results.json").read_text())["phases"]
        nearest, both = (sum(row[name] for row in rows) / 2 for name in ("accuracy_nme", "accuracy_both"))
        self.assertIn(f"average by nearest mean {nearest:.2f}, by rows and means together {both:.2f}\n", out)
        self.assertNotIn("\033", out)
        status, out, err = self.cli("--report", self.folder)
        self.assertEqual(status, 0, err)
        self.assertIn("demo", out)
        self.assertEqual((self.folder / "table.md").read_text(), out)
        for more in ((), ("--data-dir", "data")):
            status, _, err = self.cli("--embedding", self.folder / "run", "--demo", *more)
            self.assertEqual((status, err), (2, "error: --embedding needs matplotlib: pip install matplotlib\n") if err else
                             (0, ""))
        self.assertNotIn("matplotlib.pyplot", sys.modules)                  # its settings are the caller's
        self.assertEqual(self.cli("--embedding", self.folder / "run")[0], 2)     # not CIFAR-100's

    def test_benchmark(self):
        def once(work, device, repeats):
            started = time.perf_counter()
            work()
            return [time.perf_counter() - started] * repeats

        with unittest.mock.patch.object(run_cifar, "_times", once), unittest.mock.patch.dict(
                mn.NETWORKS, resnet32=mn.NETWORKS["tiny"]):
            status, _, err = self.cli("--benchmark", "--batch-size", "8", "--device", "cpu", "--baseline", "icarl",
                                      "--epochs", "3")
            self.assertEqual((status, err.partition("\n")[0]), (0, "warning: without effect here: --epochs"))
            made, original = [], mn.LocalBOP.__init__
            with unittest.mock.patch.object(mn.LocalBOP, "__init__", lambda self, *args: made.append(args[0]) or original(
                    self, *args)):
                status, out, err = self.cli("--benchmark", "--batch-size", "8", "--device", "cpu")
        self.assertEqual(status, 0, err)
        self.assertNotIn("without effect", err)
        self.assertEqual({p.requires_grad for (net,) in made for p in net.parameters()}, {True})      # as in a run
        rows = {line[:42].strip(): line[42:].split() for line in out.splitlines() if len(line[42:].split()) == 2}
        for name in ("training step, toolkit style", "training step, ours", "exemplar-level update, 10 exemplars",
                     "feature extraction", "evaluation, both classifiers"):
            milliseconds, rate = map(float, rows[name])
            self.assertGreater(min(milliseconds, rate), 0, name)
        self.assertRegex(out, r"ours / toolkit style: \d+\.\d\d times")

    def finished(self, name, average, forgetting, both=None, version=mn.__version__, **changes):
        """A results.json as a whole run with these settings would leave it."""
        config = dataclasses.asdict(dataclasses.replace(mn.CIFAR100, **changes).resolved())
        config["versions"] = {"mnemonics": version}
        if name == "a":
            del config["ahead_epochs"]                                      # as before there was such a setting
        if name == "q":
            config["recipe"] = "pixels"                                     # the default's name before it was that
        (self.folder / name).mkdir()
        rows = [{"classes": 50, "accuracy": average, "accuracy_nme": average - 4,
                 **({} if both is None else {"accuracy_both": both})}]
        (self.folder / name / "results.json").write_text(json.dumps({
            "config": config, "class_order": list(range(100)), "phases": rows, "complete": True, "seconds": 1.0,
            "average_accuracy": average, "last_accuracy": 50.0, "forgetting_rate": forgetting}))

    def test_an_older_run_has_what_it_had(self):
        found = mn._completed({"exemplars": "mnemonics", "recipe": "pixels"})
        self.assertEqual([found[k] for k in ("ahead_turns", "ahead_epochs", "recipe")], [0, 6, "default"])
        config = mn.config_of("a run", {"dataset": "cifar100", "recipe": "pixels", "lr": 0.3}, mn.CIFAR100)
        self.assertEqual((config.recipe, config.finetune_scale, config.lr), ("default", 0.0, 0.3))

    def test_a_resumed_run_says_where_it_goes_on(self):
        words = ["--demo", "--classes", "4", "--phases", "1", "--epochs", "4", "--train-per-class", "12", "--per-class",
                 "2", "--exemplars", "herding", "--out", self.folder / "run"]
        original, events = mn._Run.on_event, []

        def cut(run, event):
            original(run, event)
            events.append(event)
            if len(events) == 3:
                raise mn.Interrupted(signal.SIGTERM)

        with unittest.mock.patch.object(mn._Run, "on_event", cut):
            status, _, err = self.cli(*words)
        self.assertEqual((status, events[-1]["epoch"]), (143, 2), err)
        self.assertIn("\ngoing on with phase 0, model, after epoch 3\n", self.cli(*words, "--resume")[1])
        self.assertIn("\nfinished already\n", self.cli(*words, "--resume")[1])
        (self.folder / "run/checkpoint.pt").unlink()
        kept = {path: path.read_bytes() for path in (self.folder / "run").iterdir()}
        self.refused([([*words, "--resume"], "checkpoint.pt is gone, and starting over would lose what is in")])
        self.assertEqual(kept, {path: path.read_bytes() for path in (self.folder / "run").iterdir()})
        (self.folder / "run/results.json").write_text("{")
        self.refused([([*words, "--resume"], "checkpoint.pt is gone, and starting over would lose what is in")])
        (self.folder / "run/results.json").unlink()
        self.refused([([*words, "--resume"], "checkpoint.pt is gone, and starting over would lose what is in")])
        (self.folder / "run/log.jsonl").unlink()
        (self.folder / "run/results.json").write_bytes(kept[self.folder / "run/results.json"])         # alone, as kept in git
        self.refused([([*words, "--resume"], "checkpoint.pt is gone, and starting over would lose what is in")])
        (self.folder / "run/results.json").unlink()
        self.assertIn("\nno checkpoint was saved yet: starting over\nphase 0", self.cli(*words, "--resume")[1])

    @unittest.skipIf(sys.platform == "win32", "no locks there")
    def test_one_process_at_a_time_writes_to_a_folder(self):
        words = [*DEMO, "--out", self.folder / "run"]
        with unittest.mock.patch.object(mn._Run, "on_event", side_effect=mn.Interrupted(signal.SIGTERM)):
            self.assertEqual(self.cli(*words)[0], 143)
        self.assertFalse((self.folder / "run/.lock").exists())
        hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); "
                "sys.stdin.read()")
        with subprocess.Popen([sys.executable, "-c", hold, self.folder / "run/.lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            self.refused([([*words, "--resume"], "another process is writing to")])
        self.assertEqual(self.cli(*words, "--resume")[::2], (0, ""))
        with unittest.mock.patch("fcntl.lockf", side_effect=OSError(errno.ENOLCK, "No locks available")):
            status, _, err = self.cli(*words, "--resume")
        self.assertEqual((status, err.count("\n")), (0, 1), err)
        self.assertIn("cannot be locked (No locks available)", err)

    def test_a_resumed_run_takes_the_settings_not_given_from_its_folder(self):
        run = self.folder / "run"
        with unittest.mock.patch.object(mn._Run, "on_event", side_effect=mn.Interrupted(signal.SIGTERM)):
            self.assertEqual(self.cli(*DEMO, "--lr", "0.05", "--out", run)[0], 143)
        status, out, err = self.cli("--demo", "--resume", "--out", run)
        self.assertEqual((status, err), (0, ""))
        config = json.loads((run / "results.json").read_text())["config"]
        self.assertEqual([config[k] for k in ("lr", "classes", "epochs", "per_class")], [0.05, 4, 1, 2])
        self.refused([(["--demo", "--resume", "--out", run, "--lr", "0.1"], "has lr = 0.05, this run 0.1"),
                      (["--resume", "--out", run], "a run on demo, not cifar100: add --demo"),
                      (["--embedding", run], "a run on demo, not cifar100: add --demo"),
                      (["--resume", "--out", self.folder / "typo"], "is this the folder of a run?"),
                      (["--embedding", self.folder / "typo"], "results.json does not exist")])
        (run / "model_000.pt").unlink()
        self.refused([(["--demo", "--embedding", run], "lacks model_000.pt")])
        log = (run / "log.jsonl").read_text()
        (run / "log.jsonl").write_text(log + "3\n")
        self.refused([(["--demo", "--resume", "--out", run], f"line {log.count(chr(10)) + 1} is not ours")])

    def test_report_leaves_out_what_is_damaged(self):
        self.finished("a", 62.0, 18.0, exemplars="herding")
        (self.folder / "b").mkdir()
        (self.folder / "b/results.json").write_text("{")
        (self.folder / "b/checkpoint.pt").touch()                           # from which it could be written anew
        (self.folder / "c").mkdir()
        row = json.loads((self.folder / "a/results.json").read_text())
        (self.folder / "c/results.json").write_text(json.dumps({**row, "phases": [{"phase": 0}]}))
        with unittest.mock.patch.object(mn, "curves_picture", lambda *_: []):      # says so where there is no matplotlib
            status, out, err = self.cli("--report", self.folder)
        self.assertEqual((status, err.count("\n")), (0, 2), err)
        self.assertIn("62.00", out)
        self.assertRegex(err, "left out: .*c/results.json is not a results.json")
        self.assertRegex(err, "left out: .*b/results.json cannot be read .*: delete it, and --resume")

    def test_report_where_it_cannot_write_and_where_stdout_is_ascii(self):
        for name, seed, accuracy in (("a", 1, 62.0), ("b", 2, 64.0)):
            self.finished(name, accuracy, 18.0, exemplars="herding", seed=seed)
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        refused = mn.RunError("cannot write")
        with unittest.mock.patch.object(mn, "atomic_write", side_effect=refused), contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual(run_cifar.main(["--report", str(self.folder)]), 1)
        out.seek(0)
        self.assertIn("63.00 ? 12.71", out.read())                          # +- in a terminal that has the sign
        self.assertEqual(err.getvalue(), "error: cannot write\n")

    def test_settings_that_do_nothing_may_differ(self):
        """In a run that is resumed: it may be older than another default of theirs."""
        words = [*DEMO, "--exemplars", "herding", "--out", self.folder / "herding"]
        again = [*words, "--resume", "--exemplar-lr", "0.5", "--recipe", "paper", "--temperature", "3"]
        self.assertEqual(self.cli(*words)[0], 0)
        self.assertEqual(self.cli(*again)[::2], (
            0, "warning: without effect here: --base-networks, --base-steps, --exemplar-epochs, "
            "--exemplar-lr, --finetune-epochs, --init, --recipe, --temperature\n"))
        self.assertIn("has adjust = False", self.cli(*again, "--adjust", "--subsets", "2")[2])
        self.assertIn("has lr = 0.1", self.cli(*again, "--lr", "0.2")[2])
        self.assertIn("init", mn._idle(vars(mn.Config(exemplars="herding", adjust=True).resolved())))
        self.assertEqual(mn._idle(vars(mn.Config(exemplars="herding", baseline="bic").resolved()))
                         & {"exemplars", "adjust", "finetune", "weight_transfer", "unrehearsed"}, set())
        for changes, idle in (({"base_level": "means"}, {"base_lr", "base_steps", "base_start"}),
                              ({"base_networks": 1}, {"ahead_epochs", "ahead_turns"}), ({"baseline": "lwf"}, {"finetune_scale"}),
                              ({"finetune": False}, {"finetune_scale", "finetune_lr", "finetune_level", "finetune_carries"})):
            found = mn._idle(vars(mn.Config(**changes).resolved()))
            self.assertTrue(idle <= found and "subsets" in found, found)
            self.assertFalse(idle & mn._idle(vars(mn.Config().resolved())))
        words = [*DEMO, "--out", self.folder / "learned"]
        self.assertEqual(self.cli(*words)[0], 0)
        self.assertIn("has exemplar_lr = 0.02", self.cli(*words, "--resume", "--exemplar-lr", "0.5")[2])

    def many_runs(self):
        """Runs in and beside the paper's cells, by older versions, with repeats."""
        self.finished("a", 62.0, 18.0, exemplars="herding")
        self.finished("b", 64.0, 20.0, exemplars="herding", seed=1, start_from="a", device="cuda")
        self.finished("c", 66.0, 10.0, phases=10)
        self.finished("d", 99.0, 1.0, exemplars="herding", epochs=80)       # not the paper's schedule
        self.finished("e", 98.0, 2.0, exemplars="herding", seed=2, finetune=True, both=98.5)
        self.finished("n", 98.0, 2.0, exemplars="herding", seed=4, finetune=True)          # older: without that number
        self.finished("f", 97.0, 3.0, seed=2, recipe="paper", adjust=False, weight_transfer=False, both=98.0)
        self.finished("q", 97.5, 3.0, seed=2, epochs=80)
        self.finished("r", 98.0, 2.0, exemplars="herding", seed=2, finetune=True, epochs=80)
        self.finished("h", 96.0, 2.0, exemplars="herding", rehearsal=10)
        self.finished("g", 11.0, 2.0, exemplars="herding", seed=2, finetune=True, exemplar_lr=0.5)  # no further seed
        self.finished("j", 70.0, 9.0, phases=10, adjust=False, recipe="paper")
        self.finished("s", 71.0, 9.0, phases=10, recipe="paper")             # another method in the default's row
        self.finished("t", 72.0, 9.0, phases=10, unrehearsed=2)                            # neither's
        self.finished("u", 73.0, 9.0, phases=10, exemplars="herding", unrehearsed=2)
        self.finished("k", 13.0, 2.0, recipe="paper", epochs=80)
        self.finished("l", 14.0, 2.0, epochs=80)
        self.finished("m", 15.0, 2.0, phases=10, finetune_level="network")
        self.finished("o", 22.0, 2.0, exemplars="herding", version="0.1.0")                 # trained in another way
        self.finished("p", 23.0, 2.0, exemplars="herding", seed=2, finetune=True, version="0.1.0")
        self.finished("i", 12.0, 2.0, exemplars="herding", seed=3, finetune=True, precision="float32")
        self.finished("v", 61.0, 21.0, baseline="bic")
        self.finished("w", 59.0, 21.0, baseline="bic", finetune=True)        # was the default once
        self.finished("x", 30.0, 9.0, rehearsal=2)
        self.finished("y", 25.0, 9.0, exemplars="herding", finetune=True, rehearsal=2)

    def test_report_puts_runs_in_the_papers_cells(self):
        self.many_runs()
        with unittest.mock.patch.object(mn, "curves_picture", lambda *a: []):
            status, out, err = self.cli("--report", self.folder)
        self.assertEqual(status, 0, err)
        rows = {line.split(" | ")[0].strip("| "): line for line in out.splitlines() if line.startswith("| ")}
        # Two values a distance 2 apart: half width 12.706 * sqrt(2) / sqrt(2).
        self.assertIn("63.00 ± 12.71 / 63.17 (-0.17)", rows["LUCIR (herding)"])
        self.assertIn("19.00 ± 12.71 / 18.70 (+0.30)", rows["LUCIR (herding)"])
        self.assertIn("66.00 / 63.25 (+2.75)", rows["LUCIR w/ mnemonics (mnemonics)"])
        self.assertIn("61.00 / 60.67 (+0.33)", rows["BiC w/ mnemonics (mnemonics)"])
        self.assertIn("| mnemonics, finetune | 1 | 59.00 |", out)
        self.assertIn("71.00 / 63.25 (+7.75)", rows["LUCIR w/ mnemonics (mnemonics, recipe paper)"])
        self.assertIn("70.00 / 62.34 (+7.66)", rows["mnemonics w/o adj. (mnemonics, no-adjust, recipe paper)"])
        self.assertIn("71.00 / 63.26 (+7.74)", rows["mnemonics (mnemonics, recipe paper)"])
        self.assertIn("| mnemonics, recipe paper | 1 | 13.00 |", out)
        self.assertIn("| mnemonics | 2 | 55.75 ±", out)                     # an older run's recipe pixels is the default
        self.assertIn("| mnemonics, finetune-level network | 1 | 15.00 |", out)
        self.assertIn("| mnemonics, unrehearsed 2 | 1 | 72.00 |", out)
        self.assertIn("| herding, unrehearsed 2 | 1 | 73.00 |", out)
        self.assertIn("| herding | 1 | 99.00 |", out)
        zero = " ± 0.00 | "
        self.assertIn(f"| herding, finetune | 2 | 98.00{zero}50.00{zero}2.00{zero}94.00{zero}98.50 (1) |\n", out)
        self.assertIn("| herding, rehearsal 10 | 1 | 96.00 |", out)                 # not one of the paper's rows
        self.assertIn("| herding | 2 | 63.00 ± 12.71 |", out)               # one, and beside others of its protocol
        bare = "mnemonics, no-adjust, no-weight-transfer, recipe paper"
        self.assertIn(f"| {bare} | 1 | 97.00 |", out)
        self.assertIn(f"| {bare} | herding, finetune | 1 | -1.00 | +0.00 | +1.00 | -1.00 | -0.50 |\n", out)
        self.assertIn("| mnemonics | herding, finetune | 1 | -0.50 | +0.00 | +1.00 |", out)
        self.assertIn("| mnemonics | herding | 1 | -85.00 |", out)           # both of those that it can be compared with
        self.assertIn("| mnemonics, rehearsal 2 | herding, finetune, rehearsal 2 | 1 | +5.00 |", out)
        self.assertIn("| herding, rehearsal 10 | herding | 1 | +34.00 |", out)
        self.assertIn("1 repeats", err)
        apart = out[out.index("precision float32\n"):]                      # other arithmetic is not mixed with it
        self.assertIn("| herding, finetune | 1 | 12.00 |", apart)
        self.assertIn("22.00 / 63.17 (-41.17)", rows["LUCIR (herding, version 0.1.0)"])
        self.assertIn("| herding, finetune | 1 | 23.00 |", out[out.index(", version 0.1.0\n"):])

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "needs matplotlib")
    def test_curves_and_legends_stand_apart(self):
        """Many runs of one protocol and a single one of another: a long legend takes no room from either panel."""
        for k in range(14):
            self.finished(f"r{k}", 60.0 + k, 9.0, rehearsal=k + 1, base_lr=0.123456, finetune_lr=0.0123456)
        self.finished("z", 50.0, 9.0, phases=10)
        kept = []
        with unittest.mock.patch.object(mn, "_save_figure", lambda figure, path: kept.append(figure)):
            self.assertEqual(self.cli("--report", self.folder)[::2], (0, ""))
        figure, = kept
        figure.draw_without_rendering()
        many, one = figure.axes
        self.assertGreater(min(axis.bbox.height for axis in figure.axes), 0.6 * 3.4 * figure.dpi)
        self.assertEqual([len(axis.get_lines()) for axis in (many, one)], [14, 1])
        legends = [axis.get_legend().get_window_extent() for axis in figure.axes]
        for axis in figure.axes:
            axis.get_legend().set_visible(False)
        boxes = [*legends, *(axis.get_tightbbox() for axis in figure.axes)]
        for a, b in itertools.combinations(boxes, 2):
            self.assertFalse(a.overlaps(b), f"{a} {b}")

    def refused(self, cases):
        """Each of these (words, expected) is one line on stderr that says what is expected, and status 2."""
        for words, expected in cases:
            with self.subTest(" ".join(map(str, words))):
                status, _, err = self.cli(*words)
                self.assertEqual(status, 2)
                self.assertEqual(err.count("\n"), 1, err)
                self.assertIn(expected, err)
                self.assertNotIn("Traceback", err)

    def test_a_host_out_of_memory_is_named(self):
        for error in (MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate "
                                                  "memory: you tried to allocate 9 bytes. Error code 12")):
            with unittest.mock.patch.object(mn, "run", side_effect=error):
                status, _, err = self.cli(*DEMO, "--out", self.folder / "run")
            self.assertEqual((status, err.count("\n")), (1, 1))
            self.assertIn("error: out of memory: close other programs", err)

    def test_an_interrupted_script_of_ones_own_is_what_goes_on(self):
        words = [*DEMO, "--out", str(self.folder / "run")]
        for argv, given, script in ((["mine.py", *words], None, "mine.py"),
                                    (["mine.py"], [*words, "--resume"], "run_cifar.py")):
            with unittest.mock.patch.object(sys, "argv", argv), unittest.mock.patch.object(
                    mn._Run, "on_event", side_effect=mn.Interrupted(signal.SIGTERM)):
                status, _, err = quiet(run_cifar.main, given)
            self.assertEqual(status, 143, err)
            self.assertIn(f"continue with: python {script} --demo", err)

    def test_a_misspelt_word_is_refused_by_the_config_itself(self):
        for changes in ({"exemplar_optimizer": "Adam"}, {"precision": "bf16"}, {"base_level": "x"}, {"init": "x"},
                        {"device": "gpu"}):
            with self.subTest(changes), self.assertRaisesRegex(mn.UserError, "choose from"):
                mn.Config(**changes)

    def test_few_points_are_projected_too(self):
        asked = []

        class TSNE:
            def __init__(self, *args, perplexity, **settings):
                asked.append(perplexity)

            def fit_transform(self, values):
                return values[:, :2]

        with unittest.mock.patch.dict(sys.modules, {"sklearn": SimpleNamespace(), "sklearn.manifold":
                                                    SimpleNamespace(TSNE=TSNE)}):
            for count in (4, 15, 1000):
                self.assertEqual(mn.project(torch.randn(count, 5), 1)[0].shape, (count, 2))
        self.assertEqual(asked, [1, 14 / 3, 30])

    @unittest.mock.patch.object(mn, "run", side_effect=AssertionError("nothing of this is run"))
    def test_impossible_settings(self, _):
        self.refused([
            (["--phases", "7"], "1, 2, 5, 10, 25, 50"), (["--phases", "0"], "at least 1"),
            (["--phases", "-1"], "at least 1"), (["--phases", "two"], "invalid int"), (["--classes", "1"], "at least 2"),
            (["--classes", "101"], "has 100"), (["--lr", "nan"], "finite"), (["--lr", "inf"], "finite"),
            (["--lr", "0"], "above 0"), (["--lr", "-1"], "above 0"), (["--momentum", "1"], "below 1"),
            (["--distill-weight", "1.5"], "at most 1"), (["--temperature", "0"], "above 0"),
            (["--baseline", "ewc"], "invalid choice"), (["--exemplars", "gan"], "invalid choice"),
            (["--per-class", "0"], "at least 1"), (["--budget", "99"], "100 or more"),
            (["--budget", "2000", "--per-class", "20"], "not allowed with"),
            (["--baseline", "bic", "--per-class", "4"], "5 is the least"),
            (["--baseline", "joint", "--exemplars", "mnemonics"], "herding or random"),
            (["--baseline", "joint", "--rehearsal", "2"], "leave --rehearsal out"),
            (["--baseline", "joint", "--adjust"], "leave --adjust out"),
            (["--baseline", "joint", "--weight-transfer"], "leave --weight-transfer out"),
            (["--baseline", "joint", "--unrehearsed", "2"], "leave --unrehearsed out"),
            (["--unrehearsed", "21"], "a class has 20"), (["--adjust"], "are 1: raise --unrehearsed, or give --no-adjust"),
            (["--exemplar-epochs", "0"], "at least 1"), (["--recipe", "pixels"], "choose from"),
            (["--unrehearsed", "20", "--rehearsal", "2"], "leave --rehearsal out"),
            (["--baseline", "joint", "--finetune"], "upper bound"), (["--recipe", "paper", "--subsets", "21"], "into 21 parts"),
            (["--subsets", "1"], "at least 2"), (["--train-per-class", "10"], "more than the 10"),
            (["--out", ""], "--out is empty"), (["--report", ""], "--report is empty"),
            (["--embedding", ""], "--embedding is empty"), (["--report", "a", "--demo"], "--report has no use for --demo"),
            (["--report", "a", "--embedding", "b"], "--report has no use for --embedding"),
            (["--embedding", "a", "--no-adjust"], "no use for --adjust"),
            (["--benchmark", "--demo"], "no use for --demo"),
            (["--validate"], "give --train-per-class"), (["--batch-size", "1"], "at least 2"),
            (["--seed", "-1"], "at least 0"), (["--order-seed", str(2 ** 32)], "at most"),
            (["--checkpoint-minutes", "nan"], "finite"), (["--no-such-flag"], "unrecognized"),
        ])

    def test_what_a_run_records_can_be_given_again(self):
        """config.json holds what was resolved; --resume --out takes it for settings that were given."""
        for baseline, finetune, recipe, level in itertools.product(mn.BASELINES, (None, True, False), mn.RECIPES, (
                None, "means")):
            config = dataclasses.replace(mn.CIFAR100, baseline=baseline, finetune=finetune, recipe=recipe, base_level=level)
            with contextlib.suppress(mn.UserError):
                mn.validate(config)
                settings = json.loads(json.dumps(dataclasses.asdict(config.resolved())))
                again = mn.config_of("a run", settings, mn.CIFAR100)
                try:
                    mn.validate(again)
                except mn.UserError as error:
                    self.fail(f"{baseline}, {finetune}, {recipe}, {level}: {error}")
                self.assertEqual(again.resolved(), config.resolved())

    def test_bad_invocations(self):
        if not torch.cuda.is_available():
            self.refused([(["--demo", "--device", "cuda"], "no CUDA")])
        file, empty = self.folder / "file", self.folder / "empty"
        file.write_text("x")
        empty.mkdir()
        corrupt = self.folder / "corrupt/cifar-100-python"
        corrupt.mkdir(parents=True)
        for name in ("train", "test", "meta"):
            (corrupt / name).write_bytes(b"rubbish")
        (self.folder / "broken").mkdir()
        (self.folder / "broken/results.json").write_text("{")
        odd = self.folder / "odd"
        odd.mkdir()
        for name in ("results.json", "config.json"):
            (odd / name).write_text('{"epochs": 3}')
        self.refused([
            (["--class-order", self.folder / "none", "--demo"], "No such file"),
            (["--order-seed", "1", "--class-order", "f"], "not allowed with"),
            (["--data-dir", file], "is a file"), (["--data-dir", corrupt.parent], "damaged"),
            (["--demo", "--out", file / "x"], "--out"), (["--demo", "--resume", "--out", empty], "is this the folder"),
            (["--demo", "--start-from", empty, "--out", self.folder / "y"], "does not exist"),
            (["--demo", "--per-class", "101"], "training images"), (["--report", empty], "no results.json"),
            (["--report", empty, self.folder / "none"], "none: no such folder"), (["--report", self.folder / "broken"], "cannot be read"),
            (["--demo", "--train-per-class", "100", "--validate"], "none would be left"),
            (["--report", odd], "not a results.json"), (["--demo", "--resume", "--out", odd], "not a config.json"),
            (["--demo", "--start-from", odd, "--out", self.folder / "z"], "not a config.json"),
            (["--demo", "--base-networks", "10"], "lower --base-networks"),
        ])

    def test_missing_data_names_the_file_and_its_place(self):
        from torchvision.datasets import CIFAR100
        original = CIFAR100.download

        def offline(self):
            raise OSError("no network")

        CIFAR100.download = offline
        try:
            status, _, err = self.cli("--data-dir", self.folder)
        finally:
            CIFAR100.download = original
        self.assertEqual((status, err.count("\n")), (2, 1))
        for word in (f"{CIFAR100.base_folder}/train", CIFAR100.url, str(self.folder)):
            self.assertIn(word, err)
        with unittest.mock.patch.dict(os.environ, WORLD_SIZE="2"):            # two that write one archive spoil it
            status, _, err = self.cli("--data-dir", self.folder)
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("start once without torchrun", err)

    def test_help_shows_every_flag_and_the_default_used(self):
        with unittest.mock.patch.dict(os.environ, COLUMNS="80"):
            status, out, _ = self.cli("--help")
        self.assertEqual(status, 0)
        self.assertEqual([line for line in out.splitlines() if len(line) > 80], [])
        for field in dataclasses.fields(mn.Config):
            if field.metadata["group"] in (None, "imagenet"):
                continue
            flag = "--" + field.name.replace("_", "-")
            found = re.search(f"^  {flag}[ ,\n].*?\\(default:\\s+([^;)]*)", out[out.index("protocol:"):], re.S | re.M)
            self.assertIsNotNone(found, flag)
            value = getattr(mn.CIFAR100, field.name)
            if field.name in mn.RECIPES["default"]:
                value = mn.RECIPES["default"][field.name]
            shown = field.metadata["auto"] if value is None else mn._shown(value)
            self.assertEqual(" ".join(found.group(1).split()), shown.split(";")[0], flag)

    def test_interrupt_saves_and_names_the_command(self):
        original = mn._Run.on_event

        def stop(self, event):
            original(self, event)
            os.kill(os.getpid(), signal.SIGTERM)

        mn._Run.on_event = stop
        try:
            status, _, err = self.cli(*DEMO, "--out", self.folder / "run")
        finally:
            mn._Run.on_event = original
        self.assertEqual(status, 143)
        self.assertIn(f"python run_cifar.py {shlex.join(map(str, DEMO))}", err)
        self.assertIn("--resume", err)
        self.assertEqual(err.count("\n"), 1)
        torch.load(self.folder / "run/checkpoint.pt", weights_only=True)
        # Again while that is read: no damage to a file.
        with unittest.mock.patch.object(torch, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)):
            status, _, err = self.cli(*DEMO, "--out", self.folder / "run", "--resume")
        self.assertEqual((status, err), (143, "error: interrupted\n"))
        status, _, err = self.cli(*DEMO, "--out", self.folder / "run", "--resume")
        self.assertEqual(status, 0, err)
        with unittest.mock.patch.object(run_cifar, "demo_data", lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            status, _, err = self.cli(*DEMO, "--out", self.folder / "other")
        self.assertEqual((status, err), (143, "error: interrupted\n"))                     # no run yet to resume

    def test_closed_stdout_does_not_stop_a_run(self):
        class Closed(io.StringIO):
            def write(self, text):
                raise BrokenPipeError

        with contextlib.redirect_stdout(Closed()):
            config = dataclasses.replace(SMALL, out=str(self.folder / "run"))
            self.assertTrue(mn.run(config, blobs(), blobs(seed=1))["complete"])
            sys.stdout.close()                                              # the null device that took its place

    def test_live_line_on_a_terminal_only(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        for kind, live in (("xterm", True), ("dumb", False)):
            screen = Terminal()
            config = dataclasses.replace(SMALL, out=str(self.folder / kind), exemplars="herding", epochs=8)
            clock = itertools.count()                                       # a fast machine is done before it draws
            with unittest.mock.patch.dict(os.environ, TERM=kind), contextlib.redirect_stdout(screen), \
                    unittest.mock.patch.object(mn.time, "monotonic", lambda: next(clock) / 10):
                mn.run(config, blobs(), blobs(seed=1))
            text = screen.getvalue()
            self.assertEqual("\r" in text, live)
            self.assertNotIn("\033", text)
            self.assertTrue(all(len(line) <= 100 for line in re.split("[\r\n]", text)))
            self.assertEqual(text.count("phase classes"), 1 if live else 2)  # a table, or a heading over each row

    @SLOW
    def test_twenty_kills_at_random_moments(self):
        words = [sys.executable, str(HERE / "run_cifar.py"), *DEMO, "--checkpoint-minutes", "0", "--epochs", "40",
                 "--exemplar-epochs", "5", "--finetune-epochs", "40", "--device", "cpu", "--precision", "float32"]
        subprocess.run([*words, "--out", self.folder / "whole"], check=True, capture_output=True)
        log, rng, kills, lives = self.folder / "cut/log.jsonl", random.Random(0), 0, 0
        while True:
            resume = ["--resume"] if (self.folder / "cut/config.json").exists() else []
            before, lives = log.stat().st_size if log.exists() else 0, lives + 1
            process = subprocess.Popen([*words, "--out", self.folder / "cut", *resume], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True)
            while kills < 20 and process.poll() is None:
                if log.exists() and log.stat().st_size > before or rng.random() < 0.001:
                    time.sleep(rng.uniform(0, 0.1))                         # anywhere: writing, training, between
                    process.kill()
                    kills += process.wait() == -signal.SIGKILL
                time.sleep(0.01)
            err = process.communicate()[1]
            if process.returncode == 0:
                break
            self.assertEqual(process.returncode, -signal.SIGKILL, err)
        self.assertEqual(kills, 20)
        Runs.same_runs(self, self.folder / "whole", self.folder / "cut")


class ImageNet(Case):

    def tree(self, classes=4, each=8, size=20):
        """train/ and val/ of small JPEGs, classes told apart by colour."""
        from PIL import Image
        data = blobs(classes, each, size=size)
        for part in ("train", "val"):
            for k, (image, label) in enumerate(zip(data.images, data.labels)):
                folder = self.folder / "data" / part / f"n{90 - int(label):08d}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.JPEG")
        return self.folder / "data"

    def cli(self, *words):
        with (unittest.mock.patch.dict(mn.NETWORKS, resnet18=mn.NETWORKS["tiny"]),
              unittest.mock.patch.object(run_imagenet, "WORKERS_FROM", 1)):
            return quiet(run_imagenet.main, [str(w) for w in ("--data-dir", self.folder / "data", "--image-size", 16,
                         "--classes", 4, "--phases", 2, "--epochs", 2, "--per-class", 2, "--exemplar-epochs", 2,
                         "--base-steps", 2, "--init", "herding", "--base-networks", 1, "--finetune-epochs", 1, "--workers",
                         0, "--batch-size", 8, "--out", self.folder / "run", *words)])

    def test_a_whole_run_on_files(self):
        self.tree()
        status, _, err = self.cli("--workers", "2")
        self.assertEqual(status, 0, err)
        results = json.loads((self.folder / "run/results.json").read_text())
        wnids = sorted(f"n{90 - k:08d}" for k in range(4))
        self.assertEqual(results["class_order"], [wnids[k] for k in mn.class_order(4)])
        self.assertEqual([row["exemplars"] for row in results["phases"]], [4, 6, 8])
        stored = torch.load(self.folder / "run/exemplars_002.pt", weights_only=True)["images"]
        self.assertEqual((stored.dtype, stored.shape), (torch.uint8, (8, 3, 16, 16)))
        first = results["phases"]
        # Neither the number of workers nor exemplars that stay in their file change anything.
        loads = []
        with unittest.mock.patch.object(mn, "MAPPED_BYTES", 0), unittest.mock.patch.object(
                mn, "load_memory", lambda *args, load=mn.load_memory: loads.append(args) or load(*args)):
            status, _, err = self.cli("--out", self.folder / "again")
        self.assertEqual(status, 0, err)
        self.assertEqual(len(loads), 3)
        second = json.loads((self.folder / "again/results.json").read_text())["phases"]
        self.assertEqual([r["accuracy"] for r in first], [r["accuracy"] for r in second])
        with unittest.mock.patch.object(mn, "MAPPED_BYTES", 0):                        # a finished run, its file mapped
            self.assertEqual(self.cli("--out", self.folder / "again", "--resume")[0], 0)
        again = torch.load(self.folder / "again/exemplars_002.pt", weights_only=True)["images"]
        self.assertTrue(torch.equal(stored, again))
        for part in ("train", "val"):                                       # somebody else's classes
            os.rename(self.folder / "data" / part / wnids[0], self.folder / "data" / part / "n99999999")
        words = ["--embedding", str(self.folder / "run"), "--data-dir", str(self.folder / "data")]
        status, _, err = quiet(run_imagenet.main, words)
        self.assertEqual((status, err.count("\n")), (2, 1), err)
        self.assertIn("lacks classes of that run", err)

    @SLOW                                                                   # PyTorch looks for lost workers every 5 s
    def test_workers_that_are_terminated_interrupt_the_run(self):
        """As a scheduler does that ends a job: all of its processes, the decoding ones first."""
        self.tree()
        original, ended = mn._Run.on_event, []

        def end(run, event):
            original(run, event)
            ended.extend(multiprocessing.active_children())
            for worker in ended:
                worker.terminate()
            time.sleep(0.5)                                                 # PyTorch hears of it here, or at the next batch

        with unittest.mock.patch.object(mn._Run, "on_event", end):
            status, _, err = self.cli("--workers", 2)
        self.assertEqual((status, len(ended), err.count("\n")), (143, 2, 1), err)
        self.assertIn("interrupted; continue with: python run_imagenet.py", err)
        status, out, err = self.cli("--workers", 2, "--resume")
        self.assertEqual(status, 0, err)
        self.assertIn("going on with phase 0, model, after epoch 1", out)

    def test_benchmark_of_the_pipeline(self):
        self.tree()
        words = f"--benchmark --workers 1 --image-size 16 --classes 4 --phases 2 --batch-size 8 --data-dir {self.folder}/data"
        with unittest.mock.patch.object(run_imagenet, "WORKERS_FROM", 1):
            status, out, err = quiet(run_imagenet.main, words.split())
        self.assertEqual(status, 0, err)
        self.assertNotIn("without effect", err)
        rates = dict(re.findall(r"^ +(\d+) workers +(\d+) images/s$", out, re.M))
        self.assertIn("0", rates)
        self.assertIn("1", rates)
        self.assertTrue(all(int(rate) > 0 for rate in rates.values()))

    def test_a_file_drawn_twice_is_cropped_twice(self):
        self.tree()
        source = run_imagenet.load_data(dataclasses.replace(mn.IMAGENET_SUBSET, classes=4, image_size=16, workers=0,
                                                            data_dir=str(self.folder / "data")))[0]
        draw = lambda seed: next(source.batches([torch.tensor([3, 3])], True, torch.Generator().manual_seed(seed)))[0]
        self.assertFalse(torch.equal(*draw(0)))
        self.assertTrue(torch.equal(draw(0), draw(0)))
        self.assertFalse(torch.equal(draw(0), draw(1)))

    def test_labels_of_exemplars_behind_files(self):
        source = run_imagenet.load_data(dataclasses.replace(mn.IMAGENET_SUBSET, classes=4, image_size=16, workers=0,
                                                            data_dir=str(self.tree())))[0]
        joined = source.subset(torch.tensor([0, 9])).join(torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), torch.tensor([3]))
        images, labels = next(joined.batches([torch.tensor([2, 0, 1])]))
        self.assertEqual(labels.tolist(), [3, 0, 1])
        self.assertEqual(float(images[0].float().mean()), 7)
        torch.testing.assert_close(images[1:], source[torch.tensor([0, 9])])

    def test_bad_folders(self):
        root = self.tree()
        broken = next((root / "train/n00000090").glob("*.JPEG"))
        content = broken.read_bytes()
        broken.write_bytes(b"not a picture")
        for workers in (0, 2):
            status, _, err = self.cli("--workers", workers, "--batch-size", 300, "--out", self.folder / f"b{workers}")
            self.assertEqual((status, err.count("\n")), (2, 1), err)
            self.assertIn(str(broken), err)
            self.assertNotIn("Traceback", err)
            self.assertEqual(multiprocessing.active_children(), [])        # at once: gc.collect() would wait for them
        from PIL import Image
        for image, word in ((Image.new("I;16", (9, 9), 40000), "8 bits a channel"), (Image.new("L", (200, 100)), "Bomb")):
            image.save(broken, "PNG")
            with unittest.mock.patch.object(Image, "MAX_IMAGE_PIXELS", 5000):
                status, _, err = self.cli("--out", self.folder / word)
            self.assertEqual((status, err.count("\n")), (2, 1), err)
            self.assertRegex(err, f"{broken} cannot be decoded .*{word}")
        broken.write_bytes(content)
        for path in (root / "val/n00000088").glob("*"):
            path.unlink()
        for remove, expected in ((None, "holds no images"), (root / "val/n00000088", "is missing"), (root / "val", "not a folder")):
            if remove is not None:
                subprocess.run(["rm", "-r", str(remove)], check=True)
            status, _, err = self.cli("--out", self.folder / "x")
            self.assertEqual((status, err.count("\n")), (2, 1))
            self.assertIn(expected, err)
        self.assertEqual(self.cli("--classes", 5, "--phases", 2)[0], 2)
        status, _, err = self.cli("--sync-bn")                              # one process has nothing to synchronise
        self.assertEqual((status, err.count("\n")), (2, 1))
        self.assertIn("torchrun", err)

    def test_the_subset_is_lucirs_draw(self):
        wnids = [f"n{k:08d}" for k in range(1000)]
        np.random.seed(1993)
        expected = np.random.choice(wnids, 100, replace=False).tolist()
        self.assertEqual(run_imagenet.subset_wnids(wnids[::-1]), expected)
        self.assertEqual(run_imagenet.chosen_wnids(wnids, 100), sorted(expected))
        self.assertEqual(run_imagenet.chosen_wnids(wnids, 1000), wnids)
        for classes in (mn.IMAGENET_SUBSET.classes, 1000):
            mn.validate(dataclasses.replace(mn.IMAGENET_SUBSET, classes=classes))
        with self.assertRaisesRegex(mn.UserError, "--classes 1001: the data set has 1000"):
            mn.validate(dataclasses.replace(mn.IMAGENET_SUBSET, classes=1001))
        self.assertEqual(run_imagenet.chosen_wnids(wnids[:100], 10), wnids[:100])
        self.assertEqual(run_imagenet.chosen_wnids(wnids[:200], 200), wnids[:200])
        for present, classes in ((wnids[:500], 100), (wnids, 500), (wnids[:50], 100)):
            with self.assertRaisesRegex(mn.UserError, f"--classes {classes}"):
                run_imagenet.chosen_wnids(present, classes)


class Readme(unittest.TestCase):

    def test_snippets_run(self):
        text = (HERE / "README.md").read_text()
        snippets = re.findall(r"```python\n(.*?)```", text, re.S)
        self.assertGreaterEqual(len(snippets), 4)
        data = blobs(100, 3)
        names = {"train_x": data.images, "train_y": data.labels, "test_x": data.images, "test_y": data.labels}
        for number, snippet in enumerate(snippets):
            # The same code, on a schedule and a network that finish in a second.
            snippet = re.sub(r"mn\.CIFAR100(?=[,)])", "SHORT", snippet).replace("mn.resnet32(", "TINY(")
            snippet = snippet.replace("epochs=160", "epochs=1")
            scope = {**names, "mn": mn, "TINY": mn.NETWORKS["tiny"], "SHORT": dataclasses.replace(
                SMALL, dataset_classes=100, per_class=2, epochs=1, exemplar_epochs=1, base_steps=1, finetune_epochs=1,
                bop_chunk=100, adjust=False)}
            with self.subTest(number), tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(
                    mn.BASELINES), unittest.mock.patch.object(mn, "accuracy_picture", lambda folder: []):
                if "mn.load(" in snippet:
                    quiet(mn.run, dataclasses.replace(SMALL, out=folder), blobs(), blobs(seed=1))
                    snippet = snippet.replace("runs/mine", folder)
                quiet(exec, compile(snippet, f"README snippet {number}", "exec"), scope)


@unittest.skipUnless(os.environ.get("MNEMONICS_DATA"), "set MNEMONICS_DATA to a folder with CIFAR-100")
class RealData(Case):

    def test_a_tiny_schedule_on_cifar_100(self):
        status, out, err = quiet(run_cifar.main, [
            "--data-dir", os.environ["MNEMONICS_DATA"], "--classes", "10", "--phases", "1", "--epochs", "1",
            "--train-per-class", "40", "--exemplar-epochs", "3", "--finetune-epochs", "1", "--out", str(self.folder / "r")])
        self.assertEqual(status, 0, err)
        results = json.loads((self.folder / "r/results.json").read_text())
        self.assertEqual(results["class_order"], mn.class_order(100)[:10])
        self.assertEqual([row["exemplars"] for row in results["phases"]], [100, 200])


if __name__ == "__main__":
    unittest.main()
