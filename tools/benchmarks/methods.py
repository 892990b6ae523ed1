"""What each `--method` costs: parameters, a training step, and an image in a test."""

import torch

import train_ext_test0
from ChannelAug import normalise
from core import engine
from core.optim import build_optimizer
from loss import METHODS
from tools.benchmarks.measuring import alternate
from tools.benchmarks.step import PEOPLE
from utils import seed_everything


def bench_methods(args, device):
    """Steps have the batch of the method's own recipe for SYSU-MM01, at one size of images for all."""
    print(f"{'':10}{'parameters, M':>15}{'images a step':>15}{'a step, ms':>12}{'a test image, ms':>18}")
    results = {}
    for method in METHODS:  # one after the other: the memory of a recorded step serves no other network
        run = MethodRun(method, args, device)
        (turn,), (test,) = (alternate(method, [side], args.repeats, device) for side in (run.train, run.test))
        parameters = sum(p.numel() for p in run.net.parameters())
        step, image = turn / args.steps, test / len(run.images)
        print(f"{method:10}{parameters / 1e6:15.1f}{run.count:15}{1000 * step:12.0f}{1000 * image:18.1f}")
        results[method] = {
            "parameters": parameters,
            "images_per_step": run.count,
            "step_seconds": step,
            "image_seconds": image,
        }
    return results


class MethodRun:
    """Training steps of a method, and a test of its network, on random images."""

    def __init__(self, method, args, device):
        argv = ["--method", method, "--weights", "none", "--arch", args.arch]
        argv += ["--img_h", str(args.img_h), "--img_w", str(args.img_w), "--amp", args.amp]
        argv += ["--graph", str(args.graph)]
        recipe = train_ext_test0.get_args_parser().parse_args(argv)
        seed_everything(0)
        self.device, self.amp, self.steps = device, args.amp, args.steps
        self.net = train_ext_test0.build_network(recipe, PEOPLE, device, pretrained=True)
        self.train_step = train_ext_test0.build_step(recipe, self.net, device)
        self.optimizer = build_optimizer(self.net, recipe.optim, 1e-6, METHODS[method].rates)
        labels = torch.arange(recipe.batch_size, device=device).repeat_interleave(recipe.num_pos)
        shape = (len(labels), 3, args.img_h, args.img_w)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.batch = self.images, self.images.flip(0), labels
        self.count = len(self.train_step.augment(*self.batch)[2])

    def train(self):
        engine.train_epoch(self.train_step, self.optimizer, [self.batch] * self.steps)

    def test(self):
        """Embed the visible images of a batch, each with its mirror image."""
        with torch.inference_mode():
            engine.network_embedding(self.net, self.device, normalise, self.amp)(self.images, "visible")
